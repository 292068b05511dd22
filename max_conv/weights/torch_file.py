"""Reads PyTorch's files of weights: maps them instead of loading them, and never runs code in them."""

import contextlib
import ctypes
import re
import sys
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from .harmless import HARMLESS
from .safetensors_file import AXES_LIMIT, Spec, check_name
from .state_dicts import find_state_dict, is_extra
from .tensors import CODES, width

SMALL = 32 << 20
"""Bytes that all tensors together may always have."""
TIED = 128
"""Above that, all tensors together may have this many times the file's size: some share their values."""

_LOADING = threading.Lock()

_PAGEOUT = 21  # Linux's MADV_PAGEOUT: gives mapped pages back to their file; other pages keep their contents.


class TorchFile:
    """An open PyTorch file: `specs` of the tensors of its state dict, data on request.

    Files of PyTorch 1.6 and newer are mapped: they use memory only while a piece is read. Older ones are loaded.

    Raises:
        ImportError: If PyTorch is not installed.
        ValueError: If the file is damaged, holds more than weights, or claims more data than it has.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.path = path
        with path.open("rb") as file:
            self._mapped = file.read(4) == b"PK\x03\x04"
        _check_pickles(path, self._mapped)
        tensor = _torch(path).Tensor
        found, self.notes = find_state_dict(_load(path, self._mapped), path, key, tensor)
        for name in found:
            check_name(name, path)
        self.left_out: Sequence[str] = [name for name, value in found.items() if is_extra(name, value)]
        self._tensors = {name: tensor.detach(value) for name, value in found.items() if not is_extra(name, value)}
        try:
            self.specs = {name: self._spec(name, value) for name, value in self._tensors.items()}
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:  # tensors of unusual kinds
            raise _damaged(path, _reason(str(error))) from None
        claimed, there = sum(spec.nbytes for spec in self.specs.values()), path.stat().st_size
        if claimed > max(SMALL, TIED * there):
            raise _damaged(path, f"its tensors claim {claimed} bytes, but the file has {there}")

    def close(self) -> None:
        self._tensors = {}

    def load(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns values `start` to `stop` of a tensor, counted in row-major order, as unsigned ints."""
        torch = _torch(self.path)
        each = width(self.specs[name].dtype)
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[each]
        value = self._tensors[name]
        bits = value.view(kind).numpy().view(f"u{each}")
        # Both return a copy.
        found = bits.reshape(-1)[start:stop].copy() if value.is_contiguous() else bits.flat[start:stop]
        if self._mapped and sys.platform == "linux":
            _page_out(value)
        return found

    def _spec(self, name: str, value: Any) -> Spec:
        torch = _torch(self.path)
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(
                f"checkpoint: {name} in {self.path} is sparse, quantized or empty; save it as plain values."
            )
        code = CODES.get(str(value.dtype).removeprefix("torch."))
        if code is None or value.is_conj() or value.ndim > AXES_LIMIT:
            raise ValueError(
                f"checkpoint: {name} in {self.path} is {str(value.dtype).removeprefix('torch.')} of {value.ndim} axes, "
                "which is not supported."
            )
        spec = Spec(code, tuple(value.shape))
        # An expanded tensor repeats its values: four bytes can claim to be terabytes.
        if spec.nbytes > value.untyped_storage().nbytes():
            raise ValueError(
                f"checkpoint: {name} in {self.path} claims {spec.nbytes} bytes, but the file has "
                f"{value.untyped_storage().nbytes()} for it; save a contiguous copy."
            )
        return spec


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ImportError(f"checkpoint: reading {path} needs PyTorch; install torch.") from None
    return torch


def _check_pickles(path: Path, mapped: bool) -> None:
    """Raises ValueError if loading would decompress something, or would turn a few bytes into many."""
    try:
        if mapped:
            with zipfile.ZipFile(path) as archive:
                wrong = _wrong_in_zip(archive)
        else:
            with path.open("rb") as file:
                wrong = _wrong_in_pickle(file)
    # For damaged files zipfile may raise anything.
    except Exception as error:
        raise _damaged(path, _reason(str(error) or type(error).__name__)) from None
    if wrong:
        raise _damaged(path, wrong)


def _wrong_in_zip(archive: zipfile.ZipFile) -> str:
    if any(name.endswith("/constants.pkl") for name in archive.namelist()):
        return "it is a TorchScript archive, which holds code; save the state_dict() of what torch.jit.load returns"
    for entry in archive.infolist():
        # Data that is mapped must be stored uncompressed.
        if entry.file_size != entry.compress_size or entry.compress_type != zipfile.ZIP_STORED:
            return f"{entry.filename!a:.60} is compressed, which torch.save never does"
        if entry.filename.endswith(".pkl"):
            with archive.open(entry) as pickle:
                if wrong := _wrong_in_pickle(pickle):
                    return wrong
    return ""


def _wrong_in_pickle(file: IO[bytes]) -> str:
    """Finds a bytearray, which PyTorch's own restrictions allow, although it can fill any memory with zeros."""
    before = b""
    while block := file.read(1 << 20):
        if b"\nbytearray\n" in before + block:
            return "it would make a bytearray"
        before = block[-20:]
    return ""


def _load(path: Path, mapped: bool) -> Any:
    torch = _torch(path)
    try:
        with warnings.catch_warnings(), _harmless(torch.serialization):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    # Damaged pickles may raise anything.
    except Exception as error:
        text = str(error) or type(error).__name__
        if code := re.search(r"GLOBAL ([\w.]+)", text):
            raise ValueError(
                f"checkpoint: {path} is not a PyTorch file of weights alone: it would run {code[1]}; "
                "save module.state_dict() alone."
            ) from None
        raise _damaged(path, _reason(text)) from None


@contextlib.contextmanager
def _harmless(serialization: Any) -> Iterator[None]:
    """Allows pickles to name harmless classes, and none that other code in this process has allowed."""
    with _LOADING:
        before = serialization.get_safe_globals()
        serialization.clear_safe_globals()
        serialization.add_safe_globals([(value, name) for name, value in HARMLESS.items()])
        try:
            yield
        finally:
            serialization.clear_safe_globals()
            serialization.add_safe_globals(before)


def _reason(text: str) -> str:
    """Returns the reason from PyTorch's long message, without its advice on how to run the code anyway."""
    inner = text.rpartition("WeightsUnpickler error:")[2] or text
    line = next((line.strip() for line in inner.splitlines() if line.strip()), "")
    if line.startswith("Unsupported operand"):
        return "it is not pickled as torch.save does by default, with protocol 2"
    return "it holds more than tensors" if line.startswith("Weights only") else f"{line:.120}".rstrip(".")


def _page_out(value: Any) -> None:
    """Gives the pages of a mapped tensor back to its file."""
    page = 4096
    begin = value.data_ptr() // page * page
    size = value.untyped_storage().nbytes() - value.storage_offset() * value.element_size()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _PAGEOUT)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"checkpoint: {path} is not a PyTorch file of weights alone, or is damaged ({reason}).")
