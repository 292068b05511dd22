"""Opens checkpoints of other libraries without loading them: names, shapes and metadata at once, tensors one by one."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from ..conv.folding import fold_weight_norm, weight_norm_names
from .assets import resolve
from .file_kind import check_kind
from .marker import MARK, Marker
from .npz_file import NpzFile
from .safetensors_file import HEADER_LIMIT, SafetensorsFile, Spec, some
from .tensors import DTYPES, Tensor, of_value, width
from .torch_file import TorchFile

__all__ = ["MARK", "Checkpoint", "Tensor", "fold_weight_norm", "open_checkpoint", "read_layer", "weight_norm_names"]

PIECE = 4 << 20
"""The bytes of a piece in which tensors stream from file to file."""

TORCH_SUFFIXES = (".pt", ".pth", ".tar", ".th", ".bin", ".ckpt")
INDEX = ".index.json"
SUFFIXES = (".safetensors", INDEX, ".npz", *TORCH_SUFFIXES)
PREFERRED = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
PREFIXES = ("module.", "_orig_mod.")
"""The prefixes that DataParallel and torch.compile put before every name."""


class _File(Protocol):
    @property
    def specs(self) -> Mapping[str, Spec]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    @property
    def left_out(self) -> Sequence[str]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    def load(self, name: str, start: int, stop: int) -> np.ndarray: ...
    def close(self) -> None: ...


class Entry(NamedTuple):
    """A tensor of an open checkpoint: its dtype and shape, and the function that reads values `start` to `stop`."""

    spec: Spec
    load: Callable[[int, int], np.ndarray]


class Checkpoint:
    """An open checkpoint; a context manager. It keeps no tensor in memory.

    Attributes:
        source: The reference that was opened, for messages.
        files: The files that it consists of, an index before its shards.
        metadata: Strings by name, of safetensors files.
        left_out: The names of entries that are not weights: `None`, and the `_extra_state` that modules save.
        notes: Sentences about which part of the files was used, if there was a choice.
    """

    def __init__(
        self,
        source: str,
        files: list[Path],
        entries: Mapping[str, Entry],
        metadata: Mapping[str, str],
        opened: Sequence[_File] = (),
    ):
        self.source, self.files, self.metadata = source, files, dict(metadata)
        self.left_out = [name for file in opened for name in file.left_out]
        self.notes = [note for file in opened for note in file.notes]
        self._entries = dict(entries)
        self._closing = list(opened)

    @classmethod
    def of_arrays(cls, state: Mapping[str, Any], source: str = "the state") -> "Checkpoint":
        """Returns arrays in memory as a checkpoint: NumPy's, torch's, or any with `__dlpack__`.

        >>> Checkpoint.of_arrays({"a": np.zeros((2, 3), np.float32)}).shape("a")
        (2, 3)
        """

        def entry(name: str, array: Any) -> Entry:
            tensor = of_value(array, name)
            flat = tensor.bits.reshape(-1)
            return Entry(Spec(tensor.dtype, tensor.bits.shape), lambda start, stop: flat[start:stop])

        return cls(source, [], {name: entry(name, array) for name, array in state.items()}, {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._closing:
            file.close()

    def log_notes(self) -> None:
        """Logs `notes`, for callers that do not show them."""
        for note in self.notes:
            logging.getLogger("max_conv").warning(note)

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in the file's order."""
        return list(self._entries)

    def dtype(self, name: str) -> str:
        """Returns safetensors' name of a tensor's dtype."""
        return self._entries[name].spec.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self._entries[name].spec.shape

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """Yields a tensor's bits in row-major order, in flat arrays of at most `PIECE` bytes."""
        spec, load = self._entries[name]
        step = PIECE // width(spec.dtype)
        for start in range(0, spec.size, step):
            yield load(start, min(start + step, spec.size))

    def read(self, name: str) -> Tensor:
        """Reads one tensor.

        Raises:
            KeyError: If there is no tensor of this name.
        """
        spec = self._entries[name].spec
        bits = np.empty(spec.size, f"u{width(spec.dtype)}")
        start = 0
        for piece in self.pieces(name):
            bits[start : start + len(piece)] = piece
            start += len(piece)
        return Tensor(spec.dtype, bits.reshape(spec.shape))


def open_checkpoint(reference: str | os.PathLike, key: str | None = None) -> Checkpoint:
    """Opens a checkpoint; its tensors are read when they are asked for.

    Args:
        reference: A `.safetensors` file, a sharded `.index.json`, a PyTorch `.pt`, `.pth`, `.tar`, `.th`, `.bin` or `.ckpt`
            file, an `.npz` file of NumPy or MLX, a directory that holds one of them, or a reference that
            `max_conv.weights.resolve` downloads. If every name begins with "module." or "_orig_mod.", this prefix is
            removed, also if it is repeated.
        key: Where the state dict is in a training script's file, such as "net.decoder"; dots that are part of a key may
            be written `\\.`. None uses a state dict under a usual name, such as "state_dict" or "model".

    Raises:
        FileNotFoundError: If there is no such file, or a shard is missing.
        ValueError: If the file is of another kind, is damaged, or holds anything but tensors.
        ImportError: If it is PyTorch's and PyTorch is not installed.

    >>> open_checkpoint("model.onnx")
    Traceback (most recent call last):
    FileNotFoundError: checkpoint: there is no file model.onnx.
    """
    path = _locate(reference)
    opened: list[_File] = []
    try:
        if path.name.endswith(INDEX):
            files, entries, metadata = _open_sharded(path, str(reference), key, opened)
        else:
            files, (entries, metadata) = [path], _open_file(path, key, opened)
        entries = entries if MARK in metadata else _without_prefix(entries)
        return Checkpoint(str(reference), files, entries, metadata, opened)
    except BaseException:
        for file in opened:
            file.close()
        raise


def _locate(reference: str | os.PathLike) -> Path:
    if "://" in str(reference):
        return resolve(str(reference))
    path = Path(reference).expanduser()
    if path.is_dir():
        return _inside(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}.")
    return path


def _inside(folder: Path) -> Path:
    """Returns the one checkpoint of a directory."""
    for name in PREFERRED:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and path.is_file())
    indices = [path for path in found if path.name.endswith(INDEX)]
    shards = {folder / shard for index in indices for shard in _weight_map(index).values()}
    found = [path for path in found if path not in shards]
    if len(found) == 1:
        return found[0]
    if not found:
        raise FileNotFoundError(f"checkpoint: the folder {folder} has no file that ends in {', '.join(SUFFIXES)}.")
    names = some([path.name for path in found])
    raise ValueError(f"checkpoint: the folder {folder} has {len(found)} checkpoints, {names}; name one of them.")


def _open_file(path: Path, key: str | None, opened: list[_File]) -> tuple[dict[str, Entry], Mapping[str, str]]:
    file: _File
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"checkpoint: {path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    check_kind(path)
    if path.suffix in TORCH_SUFFIXES:
        file = TorchFile(path, key)
    elif key is not None:
        raise ValueError(f"checkpoint: {path} has tensors alone, and nothing at the key {key!a:.80}; leave --key out.")
    else:
        file = SafetensorsFile(path) if path.suffix == ".safetensors" else NpzFile(path)
    opened.append(file)
    return {name: Entry(spec, _loader(file, name)) for name, spec in file.specs.items()}, file.metadata


def _loader(file: _File, name: str) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: file.load(name, start, stop)


def _weight_map(path: Path) -> dict[str, str]:
    """Returns the shard of every tensor of an index."""
    check_kind(path)
    try:
        if path.stat().st_size > HEADER_LIMIT:
            raise ValueError
        places = json.loads(path.read_bytes())["weight_map"]
        shards = set(places.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"checkpoint: {path} is not an index of shards: it has no weight_map.") from None
    for shard in shards:
        plain = isinstance(shard, str) and shard.isprintable() and Path(shard).name == shard and "\\" not in shard
        if not plain or shard.endswith(".json"):
            raise ValueError(f"checkpoint: {path} names the shard {shard!a:.60}, but shards must be in its folder.")
    return places


def _open_sharded(
    path: Path, reference: str, key: str | None, opened: list[_File]
) -> tuple[list[Path], dict[str, Entry], Mapping[str, str]]:
    places = _weight_map(path)
    files, marks = [path], []
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(places.values())):
        beside = path.parent / shard
        if "://" in reference:  # Each file of a repository is downloaded separately.
            beside = resolve(f"{reference.rpartition('/')[0]}/{shard}")
        elif not beside.is_file():
            raise FileNotFoundError(f"checkpoint: there is no file {beside}, a shard of {path.name}.")
        files.append(beside)
        found, said = _open_file(beside, key, opened)
        metadata |= said
        marks.append(said.get(MARK))
        wanted = [name for name, place in places.items() if place == shard]
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(f"checkpoint: {shard} lacks {missing[0]!a:.60}, which {path.name} says it holds.")
        entries.update((name, found[name]) for name in wanted)
    if len(set(marks)) > 1:
        raise ValueError(
            f"checkpoint: the shards of {path} differ in their layout marker; convert the originals again."
        )
    return files, {name: entries[name] for name in places}, metadata


def _without_prefix(entries: dict[str, Entry]) -> dict[str, Entry]:
    while prefix := next((prefix for prefix in PREFIXES if entries and all(_goes_on(n, prefix) for n in entries)), ""):
        entries = {name.removeprefix(prefix): entry for name, entry in entries.items()}
    return entries


def _goes_on(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name != prefix


def read_layer(
    path: str | os.PathLike, name: str, native: bool = False, key: str | None = None
) -> tuple[dict[str, Any], Any]:
    """Reads one layer of a checkpoint: its weights as MAX buffers, and their MAX dtype.

    Args:
        path, key: As for `open_checkpoint`.
        name: The layer: its tensors are `{name}.weight` and, if there is one, `{name}.bias`.
        native: Whether the filter is native (SCF) or PyTorch's (FCS). For a file that `max-conv convert` wrote, it must
            agree with the file's marker.

    Raises:
        ValueError: If the checkpoint has no such layer, its weight and bias differ in dtype, or it is marked as of the
            other layout.
    """
    from max.driver import Buffer
    from max.dtype import DType

    with open_checkpoint(path, key) as checkpoint:
        checkpoint.log_notes()
        marker = Marker.of(checkpoint.metadata, checkpoint.source)
        if marker and (marker.layout == "native") != native:
            does = "pass --native" if not native else "leave --native out"
            raise ValueError(f"checkpoint: {path} is marked as of {marker.layout} layout; {does}.")
        names = {part: f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in checkpoint.names}
        if "weight" not in names:
            raise ValueError(f"checkpoint: {path} has no tensor {name}.weight; it has {some(checkpoint.names)}.")
        found = {part: checkpoint.read(full) for part, full in names.items()}
    dtypes = {tensor.dtype for tensor in found.values()}
    if len(dtypes) > 1:
        raise ValueError(f"checkpoint: {name} in {path} mixes {' and '.join(sorted(dtypes))}; cast one to the other.")
    dtype = DType[DTYPES[found["weight"].dtype][0]]
    return {
        part: Buffer.from_numpy(np.ascontiguousarray(tensor.bits)).view(dtype, list(tensor.bits.shape))
        for part, tensor in found.items()
    }, dtype
