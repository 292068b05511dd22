"""Reads NumPy's .npz archives, with one array in memory at a time. Pickled arrays are never loaded."""

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from .safetensors_file import AXES_LIMIT, Spec, check_name
from .tensors import CODES, of_array

HEADER = 1 << 16
"""The most bytes of an array's header that are read."""
SMALL = 32 << 20
"""Bytes that all arrays together may always have."""
SWOLLEN = 128
"""Above that, all arrays together may have this many times the file's size: some archives are compressed."""


class _Place(NamedTuple):
    entry: zipfile.ZipInfo
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    order: str


class NpzFile:
    """An open .npz archive: `specs` from the headers of its arrays, data on request.

    Raises:
        ValueError: If the file is not an archive of plain arrays, is damaged, or claims more data than it can have.
    """

    metadata: Mapping[str, str] = {}
    left_out: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except Exception as error:  # for damaged files zipfile may raise anything
            raise self._damaged(error) from None
        try:
            self._places = self._read_headers()
        except BaseException:
            self._archive.close()
            raise
        self.specs = {name: Spec(CODES[place.dtype.name], place.shape) for name, place in self._places.items()}
        self._last: tuple[str, np.ndarray] | None = None

    def close(self) -> None:
        self._last = None
        self._archive.close()

    def load(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns values `start` to `stop` of an array, counted in row-major order, as unsigned ints."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._whole(name)
        return self._last[1][start:stop]

    def _whole(self, name: str) -> np.ndarray:
        place = self._places[name]
        try:
            with self._archive.open(place.entry) as file:
                file.read(place.start)
                data = file.read()
            array = np.frombuffer(data, place.dtype).reshape(place.shape, order=place.order)  # type: ignore[call-overload]
        except Exception as error:
            raise self._damaged(error) from None
        return of_array(array).bits.reshape(-1)

    def _read_headers(self) -> dict[str, _Place]:
        entries = self._archive.infolist()
        claimed, there = sum(entry.file_size for entry in entries), self.path.stat().st_size
        if claimed > max(SMALL, SWOLLEN * there):
            raise self._damaged(f"its arrays claim {claimed} bytes, but the file has {there}")
        places: dict[str, _Place] = {}
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            check_name(name, self.path)
            if name == entry.filename or name in places:
                raise self._damaged(f"{entry.filename!a:.60} is no array, or is there twice")
            # zipfile unpacks other kinds of compression without a limit.
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise self._damaged(f"{entry.filename!a:.60} is compressed in a way that numpy.savez never uses")
            places[name] = self._place(name, entry)
        return places

    def _place(self, name: str, entry: zipfile.ZipInfo) -> _Place:
        try:
            with self._archive.open(entry) as file:
                head = io.BytesIO(file.read(HEADER))
            version = npy.read_magic(head)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, fortran, dtype = read(head)
        except Exception as error:
            raise self._damaged(error) from None
        if dtype.name not in CODES or len(shape) > AXES_LIMIT:
            raise ValueError(
                f"checkpoint: {name} in {self.path} is {dtype.name} of {len(shape)} axes, which is not supported."
            )
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != entry.file_size - head.tell():
            raise self._damaged(f"{name} should have {size} bytes, but its place has {entry.file_size - head.tell()}")
        return _Place(entry, head.tell(), dtype, shape, "F" if fortran else "C")

    def _damaged(self, reason: object) -> ValueError:
        lines = str(reason).splitlines() or [type(reason).__name__]
        return ValueError(
            f"checkpoint: {self.path} is not an .npz file of plain arrays, or is damaged ({lines[0]:.120})."
        )
