"""Reads and writes safetensors files, one piece at a time; the header is checked before any data is used.

The format: https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .tensors import DTYPES, width

HEADER_LIMIT = 32 << 20
"""The most bytes of a header: enough for over 200,000 tensors. Parsed, it needs many times as much memory."""
AXES_LIMIT = 32
"""The most axes that all versions of NumPy support."""


class Spec(NamedTuple):
    """A tensor's entry in a header: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * width(self.dtype)


class SafetensorsFile:
    """An open safetensors file: `specs` and `metadata` from its header, data on request.

    Raises:
        ValueError: If the file is not a safetensors file, or its header is damaged or impossible.
    """

    left_out: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            self.specs, self._starts, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def load(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns values `start` to `stop` of a tensor, in the order of its memory, as unsigned ints."""
        each = width(self.specs[name].dtype)
        data = np.empty((stop - start) * each, np.uint8)
        self._file.seek(self._starts[name] + start * each)
        if self._file.readinto(data.data) != len(data):
            raise ValueError(f"checkpoint: {self.path} became shorter while it was read; {name} is incomplete.")
        return data.view(f"<u{each}")

    def _read_header(self) -> tuple[dict[str, Spec], dict[str, int], dict[str, str]]:
        total = os.fstat(self._file.fileno()).st_size
        size = int.from_bytes(self._file.read(8), "little")
        if total < 8 or size > total - 8:
            raise self._damaged(f"its header should have {size} bytes, but the file has {total}")
        if size > HEADER_LIMIT:
            raise self._damaged(f"its header of {size} bytes is longer than {HEADER_LIMIT}")
        try:
            header = json.loads(self._file.read(size).decode(), object_pairs_hook=_distinct)
        except (ValueError, RecursionError) as error:
            reason = "too deeply nested" if isinstance(error, RecursionError) else str(error).splitlines()[0]
            raise self._damaged(f"its header is not JSON: {reason}") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata  # MLX writes null
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._damaged("its metadata are not strings by name")
        places = {name: self._place(name, entry) for name, entry in header.items()}
        self._check_cover(places, total - 8 - size)
        ordered = sorted(places, key=lambda name: places[name][1:])
        starts = {name: 8 + size + places[name][1] for name in ordered}
        return {name: places[name][0] for name in ordered}, starts, metadata

    def _place(self, name: str, entry: Any) -> tuple[Spec, int, int]:
        check_name(name, self.path)
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"{name} lacks dtype, shape and data_offsets alone")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"checkpoint: {name} in {self.path} is {str(dtype)[:20]!a}, which is not supported.")
        if not _naturals(shape) or len(shape) > AXES_LIMIT or math.prod(n for n in shape if n) >= 1 << 59:
            raise self._damaged(f"{name} has the shape {_short(shape)}")
        if not _naturals(offsets) or len(offsets) != 2:
            raise self._damaged(f"{name} has the data_offsets {_short(offsets)}")
        spec = Spec(dtype, tuple(shape))
        if offsets[1] - offsets[0] != spec.nbytes:
            raise self._damaged(
                f"{name} should have {spec.nbytes} bytes, but its place has {_short(offsets[1] - offsets[0])}"
            )
        return spec, offsets[0], offsets[1]

    def _check_cover(self, places: Mapping[str, tuple[Spec, int, int]], total: int) -> None:
        """Raises an error unless the tensors fill the file to its end, without gaps or overlaps."""
        end = 0
        for name, (_, start, stop) in sorted(places.items(), key=lambda item: item[1][1:]):
            if start != end:
                raise self._damaged(f"{name} begins at byte {start} of the data, where {end} was expected")
            end = stop
        if end != total:
            raise self._damaged(f"its tensors have {end} bytes, but the file has {total} for them")

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"checkpoint: {self.path} is not a safetensors file, or is damaged ({reason}).")


def check_name(name: Any, path: Path) -> None:
    """Raises ValueError unless a tensor's name can be printed on one line and is not reserved."""
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 1000 or name == "__metadata__":
        raise ValueError(f"checkpoint: {path} names a tensor {_short(name)}, which is no name of a weight.")


def some(names: Sequence[str]) -> str:
    """Returns the first names of a list, for a sentence.

    >>> some(list("abcdefg"))
    'a, b, c, d, e and 2 more'
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _short(value: Any) -> str:
    text = ascii(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "more than 64 bits can count"
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_safetensors(
    file: BinaryIO,
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
    pieces: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Writes a safetensors file: first the header, then every tensor piece by piece.

    Args:
        file: Open for writing, at its start.
        specs: The tensors. Wide dtypes come first in the file, so that each tensor is aligned.
        metadata: Strings by name.
        pieces: Returns the bits of a tensor, as successive arrays of unsigned ints.

    >>> import io
    >>> file = io.BytesIO()
    >>> write_safetensors(file, {"a": Spec("U8", (3,))}, {}, lambda name: [np.arange(3, dtype=np.uint8)])
    >>> file.getvalue()[-3:]
    b'\\x00\\x01\\x02'
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    names = sorted(specs, key=lambda name: -width(specs[name].dtype))
    end = 0
    for name in names:
        start, end = end, end + specs[name].nbytes
        header[name] = {"dtype": specs[name].dtype, "shape": list(specs[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"checkpoint: a header of {len(text)} bytes would be longer than {HEADER_LIMIT}.")
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        written = 0
        for piece in pieces(name):
            data = np.ascontiguousarray(piece, piece.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
            file.write(data.data)
            written += data.nbytes
        if written != specs[name].nbytes:
            raise RuntimeError(f"checkpoint: {name} has {written} bytes, but {specs[name].nbytes} were announced.")
