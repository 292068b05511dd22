"""Converts checkpoints to the native layout and back, in memory or from file to file, one tensor at a time."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .build import build_tensor, pieces
from .checkpoint import INDEX, Checkpoint, open_checkpoint
from .layer_map import LayerMap, matches
from .marker import MARK, SOURCE, Marker, Side
from .plan import plan_marked, plan_native
from .planned import Plan, Planned, Source
from .safetensors_file import Spec, write_safetensors
from .staging import staging
from .tensors import FLOATS, as_array
from .verify import verify

__all__ = ["LayerMap", "Options", "Report", "Row", "convert", "read_native", "to_native"]

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, the bytes that were done since the last call, and the bytes in all."""


def read_native(reference: str | Path, layers: LayerMap, what: str, key: str | None = None) -> dict[str, np.ndarray]:
    """Reads a checkpoint, native or PyTorch's, into native weights.

    Args:
        reference, key: As for `max_conv.weights.open_checkpoint`.
        layers: Which of its tensors are filters, and what happens to the others.
        what: The model's name; error messages begin with it.

    Returns:
        Arrays by name: filters SCF and SFC, weight norm folded, everything else as it is; 16-bit floats as float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or its tensors are not the ones that `layers` declares.

    >>> read_native("gone.safetensors", LayerMap(), "hifigan")
    Traceback (most recent call last):
    FileNotFoundError: checkpoint: there is no file gone.safetensors.
    """
    with open_checkpoint(reference, key) as checkpoint:
        checkpoint.log_notes()
        return _arrays(checkpoint, layers, what)


def to_native(state: Mapping[str, Any], layers: LayerMap, what: str) -> dict[str, np.ndarray]:
    """Converts a state dict in memory to native weights, as `read_native` does for a file.

    Args:
        state: PyTorch's names and layouts, such as `module.state_dict()`: arrays of NumPy, tensors of torch, or any
            object with `__dlpack__`.
        layers, what: As for `read_native`.

    Raises:
        ValueError: If the arrays are not the ones that `layers` declares.

    >>> to_native({"up.weight": np.zeros((4, 2, 16))}, LayerMap(conv_transpose=("up.*",)), "net")["up.weight"].shape
    (16, 2, 4)
    """
    return _arrays(Checkpoint.of_arrays(state), layers, what)


def _arrays(checkpoint: Checkpoint, layers: LayerMap, what: str) -> dict[str, np.ndarray]:
    plan = plan_native(checkpoint, layers, what=what)
    return {item.name: as_array(build_tensor(checkpoint, plan, item, item.dtype)) for item in plan.tensors}


@dataclass(frozen=True)
class Options:
    """How to convert from file to file.

    Attributes:
        strict: Whether tensors that no pattern names are errors; otherwise they are copied.
        dtype: safetensors' name of the dtype that floating tensors are cast to, or None.
        keep: Patterns of names, after renaming, of tensors that are not cast.
        key: Where the state dict is in a PyTorch file, as for `open_checkpoint`.
        source_layout: The library whose layout the filters have, if the file has no marker: "torch" (FCS, transposed
            CFS), "mlx" (FSC) or "keras" (SCF, transposed SFC).
        batch_norms: Pairs of a layer's name and the name of the batch norm after it, with `*` for the parts that vary;
            `{i}` is a number in an nn.Sequential, and `{i+1}` the next number.
        eps: The number that these batch norms add to the variance.
        max_shard_size: The most bytes of data in one file, or None. A larger tensor gets a separate file.
        verify: Whether to compute every layer both in PyTorch and from the converted file, and to compare the outputs,
            before any file appears.
        dry_run: Whether to write nothing.
        force: Whether to overwrite files.
    """

    strict: bool = True
    dtype: str | None = None
    keep: tuple[str, ...] = ()
    key: str | None = None
    source_layout: Source = "torch"
    batch_norms: tuple[tuple[str, str], ...] = ()
    eps: float = 1e-5
    max_shard_size: int | None = None
    verify: bool = False
    dry_run: bool = False
    force: bool = False


class Row(NamedTuple):
    """A tensor of the output: the tensors it is made from, its name, shape and dtype; a filter's layout, or ""."""

    sources: list[str]
    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    declared: bool


@dataclass
class Report:
    """The result of a conversion.

    Attributes:
        rows: The tensors of the output.
        dropped: The names of the source's tensors, and of other entries, that are not in the output.
        already: Whether the source already had the wanted layout.
        files: The files that were written; the first one is the one to open.
        verified: How many layers were compared with PyTorch's.
        notes: Sentences about which part of the source was used, if there was a choice.
    """

    rows: list[Row]
    dropped: list[str]
    already: bool
    files: list[Path] = field(default_factory=list)
    verified: int = 0
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    layers: LayerMap | None = None,
    *,
    to: Side = "native",
    options: Options = Options(),
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Converts a checkpoint to a safetensors file of the other layout, holding about one tensor in memory.

    A file that already has the layout, according to its marker, is copied, and the declaration is ignored. The inverse
    conversion needs no declaration either. It restores every bit of the filters, and the names; what was folded stays
    folded.

    Args:
        source: A reference, as for `max_conv.weights.open_checkpoint`.
        target: The `.safetensors` file to write. With `max_shard_size` its name gets numbers, NAME-00001-of-00003, and
            NAME.safetensors.index.json lists the file of each tensor. Files appear whole or not at all, the index last.
        layers: The declaration; None if the marker is enough.
        to: "native" or "torch".
        options: All other options.
        progress: Called with the progress.

    Raises:
        FileExistsError: If something would be overwritten.
        FileNotFoundError: If the source, or the folder of the target, is missing.
        ValueError: If the source is damaged, its tensors are not the declared ones, or a value does not fit a dtype.

    >>> convert("model.pt", "model.bin")
    Traceback (most recent call last):
    ValueError: convert: the output must end in .safetensors, but is model.bin.
    """
    target = Path(target)
    old = _in_the_way(target) if not options.dry_run else []
    if old and not options.force:
        raise FileExistsError(f"convert: {old[0]} exists already; pass --force to overwrite it.")
    with open_checkpoint(source, options.key) as checkpoint:
        marker = Marker.of(checkpoint.metadata, checkpoint.source)
        already = marker is not None and marker.layout == to
        known = already or to == "torch"
        plan = plan_marked(checkpoint, to) if known else _declared(checkpoint, layers, options)
        dtypes = _dtypes(plan, options)
        report = Report(_rows(plan, dtypes), plan.dropped, already, notes=checkpoint.notes)
        if options.dry_run:
            return report
        metadata = _metadata(checkpoint, plan, already, progress)
        with staging(target) as folder:
            staged = _write(folder, target.name, checkpoint, plan, dtypes, metadata, options, progress)
            if options.verify:
                with open_checkpoint(staged[0]) as written:
                    report.verified = verify(checkpoint, plan, written, options.eps)
            for path in reversed(staged):
                path.replace(target.parent / path.name)
    report.files = [target.parent / path.name for path in staged]
    # Files that an earlier conversion left under these names would look like a part of this one.
    for path in old:
        if path not in report.files and path not in checkpoint.files:
            path.unlink(missing_ok=True)
    return report


def _declared(checkpoint: Checkpoint, layers: LayerMap | None, options: Options) -> Plan:
    if layers is None or not (layers.conv or layers.conv_transpose or options.strict):
        raise ValueError(
            "convert: name the filters with --conv PATTERN and --conv-transpose PATTERN, or pass --map or --model; "
            "nothing is guessed from shapes."
        )
    norms, source = options.batch_norms, options.source_layout
    return plan_native(checkpoint, layers, strict=options.strict, batch_norms=norms, source=source)


def _in_the_way(target: Path) -> list[Path]:
    """Returns the files that the output would replace; raises an error if it cannot be written."""
    if target.suffix != ".safetensors":
        raise ValueError(f"convert: the output must end in .safetensors, but is {target}.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"convert: there is no folder {target.parent}; make it first.")
    if target.is_dir():
        raise IsADirectoryError(f"convert: {target} is a folder; name a file.")
    numbered = re.compile(re.escape(target.stem) + r"-\d{5}-of-\d{5}\.safetensors")
    shards = sorted(path for path in target.parent.iterdir() if numbered.fullmatch(path.name))
    return [path for path in (target, _index(target)) if os.path.lexists(path)] + shards


def _index(target: Path) -> Path:
    return target.with_name(f"{target.stem}.safetensors{INDEX}")


def _dtypes(plan: Plan, options: Options) -> dict[str, str]:
    """Returns the dtype of every tensor of the output."""
    for pattern in options.keep:
        if not any(matches(item.name, [pattern]) for item in plan.tensors):
            raise ValueError(f"convert: no tensor is named like {pattern!r}, which is to keep its dtype.")

    def dtype(item: Planned) -> str:
        stays = options.dtype is None or item.dtype not in FLOATS or matches(item.name, options.keep)
        return item.dtype if stays else str(options.dtype)

    return {item.name: dtype(item) for item in plan.tensors}


def _rows(plan: Plan, dtypes: Mapping[str, str]) -> list[Row]:
    rows = []
    for item in plan.tensors:
        sources = [*item.sources.values(), *(item.batch_norm or {}).values()]
        orders = plan.order(item)
        layout = "" if orders is None else orders[1] if orders[0] == orders[1] else f"{orders[0]} -> {orders[1]}"
        rows.append(Row(sources, item.name, plan.shape(item), dtypes[item.name], layout, item.declared))
    return rows


def _metadata(checkpoint: Checkpoint, plan: Plan, already: bool, progress: Progress) -> dict[str, str]:
    """Returns the metadata of the output: the source's metadata, the marker, and digests of the source's files."""
    if already:
        return checkpoint.metadata
    total = sum(path.stat().st_size for path in checkpoint.files)
    digests = {}
    for path in checkpoint.files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
                progress("hashing", len(block), total)
        digests[path.name] = digest.hexdigest()
    made = {"tool": f"max_conv {version('max-conv')}", "sha256": digests}
    said = {**checkpoint.metadata, MARK: plan.marker().text(), SOURCE: json.dumps(made)}
    return said if plan.target == "native" else {"format": "pt", **said}


def _shards(specs: Mapping[str, Spec], limit: int | None) -> list[list[str]]:
    """Returns the names of the tensors of each file."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and limit is not None and size + spec.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.nbytes
    return groups


def _write(
    folder: Path,
    name: str,
    checkpoint: Checkpoint,
    plan: Plan,
    dtypes: Mapping[str, str],
    metadata: Mapping[str, str],
    options: Options,
    progress: Progress,
) -> list[Path]:
    """Writes the output to a folder, and returns its files; an index is the first."""
    items = {item.name: item for item in plan.tensors}
    specs = {item.name: Spec(dtypes[item.name], plan.shape(item)) for item in plan.tensors}
    total = sum(spec.nbytes for spec in specs.values())

    def bits(tensor: str) -> Iterator[np.ndarray]:
        for piece in pieces(checkpoint, plan, items[tensor], dtypes[tensor], options.eps):
            yield piece
            progress("writing", piece.nbytes, total)

    groups = _shards(specs, options.max_shard_size)
    stem = Path(name).stem
    count = len(groups)
    names = [name] if count == 1 else [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for shard, group in zip(names, groups, strict=True):
        with (folder / shard).open("xb") as file:
            write_safetensors(file, {tensor: specs[tensor] for tensor in group}, metadata, bits)
    if count == 1:
        return [folder / name]
    places = {tensor: shard for shard, group in zip(names, groups, strict=True) for tensor in group}
    index = _index(folder / name)
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n")
    return [index, *(folder / shard for shard in names)]
