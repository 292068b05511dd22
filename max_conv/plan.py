"""What becomes of every tensor of a checkpoint: decided from names alone, before any of them is read."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal, cast

from .checkpoint import Checkpoint, some
from .folding import weight_norm_dim
from .layer_map import LayerMap
from .marker import Marker, Side
from .tensors import FLOATS, ROUNDED

Kind = Literal["conv", "conv_transpose", "copy"]
ORDERS: dict[str, dict[str, str]] = {
    "conv": {"torch": "FCS", "native": "SCF"},
    "conv_transpose": {"torch": "CFS", "native": "SFC"},
}
"""The axis order of filters in PyTorch and in native files."""

# What a weight is made of, under either of PyTorch's spellings: the part, and the end of its name.
_PARTS = {
    "weight norm": (
        {"g": "weight_g", "v": "weight_v"},
        {"g": "parametrizations.weight.original0", "v": "parametrizations.weight.original1"},
    ),
    "spectral norm": (
        {"w": "weight_orig", "u": "weight_u", "v": "weight_v"},
        {
            "w": "parametrizations.weight.original",
            "u": "parametrizations.weight.0._u",
            "v": "parametrizations.weight.0._v",
        },
    ),
}
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Planned:
    """One tensor of the output.

    Attributes:
        name: Its name in the output.
        sources: The names of the tensors it is made of, by their part: "w" alone is the tensor itself.
        kind: What it is.
        shape: Its shape in the source's layout.
        dtype: safetensors' name of its dtype, before a cast.
        norm: What is folded, "weight norm", "spectral norm" or "".
        batch_norm: The names of the batch norm's tensors, by their last part, or None.
        declared: Whether a pattern names it.
    """

    name: str
    sources: Mapping[str, str]
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    norm: str = ""
    batch_norm: Mapping[str, str] | None = None
    declared: bool = True

    @property
    def plain(self) -> bool:
        """Whether its values are those of one tensor of the source."""
        return not self.norm and self.batch_norm is None


@dataclass
class Plan:
    """Every tensor of the output, in order; the sides that filters come from and go to; what was dropped."""

    tensors: list[Planned]
    source: Side
    target: Side
    dropped: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)

    def order(self, item: Planned) -> tuple[str, str] | None:
        """Returns the axis orders of a filter before and after, or None for what is no filter."""
        if item.kind == "copy":
            return None
        return ORDERS[item.kind][self.source], ORDERS[item.kind][self.target]

    def shape(self, item: Planned) -> tuple[int, ...]:
        """Returns a tensor's shape in the output."""
        orders = self.order(item)
        return item.shape if orders is None else tuple(item.shape[orders[0].index(axis)] for axis in orders[1])

    def marker(self) -> Marker:
        """Returns the marker of the output."""
        conv, transposed = (
            tuple(sorted(item.name for item in self.tensors if item.kind == kind))
            for kind in ("conv", "conv_transpose")
        )
        return Marker(self.target, conv, transposed, self.renamed)


def plan_native(
    checkpoint: Checkpoint,
    layers: LayerMap,
    *,
    what: str = "convert",
    strict: bool = True,
    batch_norms: Sequence[tuple[str, str]] = (),
) -> Plan:
    """Plans the conversion of PyTorch's layout, or the reading of a native file that is known to fit the same layers.

    Args:
        checkpoint: What is converted.
        layers: The declaration of its tensors.
        what: Begins error messages.
        strict: Whether tensors that no pattern names are errors; otherwise they are copied.
        batch_norms: Pairs of patterns of a layer's name and of the batch norm behind it that is folded into it; what
            each `*` stands for in the first stands in the second.

    Raises:
        ValueError: If a tensor has no place, a pattern names nothing or no filter, or parts of a norm are missing.
    """
    marker = Marker.of(checkpoint.metadata, checkpoint.source)
    native = marker is not None and marker.layout == "native"
    if native:
        gone: list[str] = []
        found = {name: Planned(name, {"w": name}, "copy", *_size(checkpoint, name)) for name in checkpoint.names}
        renamed = dict(marker.renamed) if marker else {}
    else:
        now = _rename(checkpoint, layers, what)
        renamed = {new: old for new, old in now.items() if new != old}
        found, gone = _assemble(checkpoint, now, layers, strict, what)
    tensors, dropped = _classify(found, layers, strict, what)
    if native:
        assert marker is not None
        for item in tensors:
            if item.kind != marker.kind(item.name):
                raise ValueError(
                    f"{what}: {item.name} is declared as {item.kind}, but {checkpoint.source} marks it as "
                    f"{marker.kind(item.name)}; convert the original again."
                )
    _check_patterns(tensors, layers, what, checkpoint)
    for item in tensors:
        if item.kind != "copy" and len(item.shape) != 3:
            raise ValueError(
                f"{what}: {item.name} has shape {item.shape}, but a filter has 3 axes; name only filters as {item.kind}."
            )
    if not native:
        for pair in batch_norms:
            tensors = _with_batch_norm(tensors, pair, what, checkpoint)
    kept = {item.name for item in tensors}
    return Plan(
        tensors,
        "native" if native else "torch",
        "native",
        gone + dropped,
        {new: old for new, old in renamed.items() if new in kept},
    )


def plan_marked(checkpoint: Checkpoint, target: Side) -> Plan:
    """Plans what needs no declaration, because the marker knows the filters and the names that they had.

    Args:
        checkpoint: A file that `max-conv convert` wrote.
        target: "torch", or the layout that the file has already.

    Raises:
        ValueError: If the file has no marker, or one that does not fit.
    """
    marker = Marker.of(checkpoint.metadata, checkpoint.source)
    if marker is None:
        raise ValueError(
            f"convert: {checkpoint.source} has no layout marker, which max-conv convert writes; without one its filters "
            "are taken for PyTorch's already."
        )
    back = marker.layout == "native" and target == "torch"
    tensors = []
    for name in checkpoint.names:
        shape, dtype = _size(checkpoint, name)
        kind = cast(Kind, marker.kind(name))
        if kind != "copy" and len(shape) != 3:
            raise ValueError(
                f"convert: {name} is marked as a filter, but has shape {shape}; convert the original again."
            )
        new = marker.renamed.get(name, name) if back else name
        tensors.append(Planned(new, {"w": name}, kind, shape, dtype))
    if len({item.name for item in tensors}) < len(tensors):
        raise ValueError(f"convert: {checkpoint.source} gives two tensors one name; convert the original again.")
    return Plan(tensors, marker.layout, target, renamed={} if back else dict(marker.renamed))


def _size(checkpoint: Checkpoint, name: str) -> tuple[tuple[int, ...], str]:
    return checkpoint.shape(name), checkpoint.dtype(name)


def _rename(checkpoint: Checkpoint, layers: LayerMap, what: str) -> dict[str, str]:
    """Returns the old names by the new ones."""
    found: dict[str, str] = {}
    for old in checkpoint.names:
        new = layers.renamed(old)
        if not new or not new.isprintable():
            raise ValueError(f"{what}: the renaming rules turn {old} into {new!r}, which is no name.")
        if new in found:
            raise ValueError(f"{what}: the renaming rules call both {found[new]} and {old} {new}; make them differ.")
        found[new] = old
    return found


def _assemble(
    checkpoint: Checkpoint, now: Mapping[str, str], layers: LayerMap, strict: bool, what: str
) -> tuple[dict[str, Planned], list[str]]:
    """Returns the tensors by their names, those of norms put together where they are declared, and what is dropped."""
    found: dict[str, Planned] = {}
    taken: set[str] = set()
    dropped: list[str] = []
    for new in now:
        found.setdefault(new, Planned(new, {"w": now[new]}, "copy", *_size(checkpoint, now[new])))
        for norm, stem, parts in _norms(new, now):
            whole = f"{stem}weight"
            kind = layers.kind(whole)
            # Undeclared, or copied part by part: the parts are tensors like others.
            if kind is None or (norm == "spectral norm" and kind == "copy" and not strict):
                continue
            taken.update(parts.values())
            if kind == "ignore":
                dropped += [now[name] for name in parts.values() if name in now]
                continue
            if whole in now:
                raise ValueError(
                    f"{what}: {checkpoint.source} has both {whole} and its parts {some(list(parts.values()))}."
                )
            if missing := [part for part in parts.values() if part not in now]:
                raise ValueError(f"{what}: {new} belongs to {norm} of {whole}, but {missing[0]} is missing.")
            if norm == "spectral norm" and kind == "copy":
                raise ValueError(
                    f"{what}: {whole} has spectral norm, which is folded into filters alone; name its kind, or its parts."
                )
            found[whole] = _folded(
                checkpoint, whole, norm, {part: now[name] for part, name in parts.items()}, kind, what
            )
    return {name: item for name, item in found.items() if name not in taken}, dropped


def _norms(name: str, now: Mapping[str, str]) -> list[tuple[str, str, dict[str, str]]]:
    """Returns the norm, the layer's name with a dot, and the names of all parts, where `name` is the first part of one."""
    for norm, spellings in _PARTS.items():
        for ends in spellings:
            for part in ("w", "g"):
                end = ends.get(part)
                if end and (name == end or name.endswith(f".{end}")):
                    stem = name.removesuffix(end)
                    return [(norm, stem, {part: stem + end for part, end in ends.items()})]
    return []


def _folded(checkpoint: Checkpoint, name: str, norm: str, sources: Mapping[str, str], kind: str, what: str) -> Planned:
    shape, dtype = _size(checkpoint, sources["v" if norm == "weight norm" else "w"])
    for source in sources.values():
        if checkpoint.dtype(source) not in FLOATS or dtype not in ROUNDED:
            raise ValueError(f"{what}: {source} of {norm} is {checkpoint.dtype(source)}, which cannot be folded.")
    try:
        if norm == "weight norm":
            weight_norm_dim(checkpoint.shape(sources["g"]), shape)
        else:
            _check_spectral(checkpoint, sources, 1 if kind == "conv_transpose" else 0)
    except ValueError as error:
        raise ValueError(f"{what}: {norm} of {name} cannot be folded: {error}.") from None
    return Planned(name, sources, "copy", shape, dtype, norm)


def _check_spectral(checkpoint: Checkpoint, sources: Mapping[str, str], dim: int) -> None:
    w, u, v = (checkpoint.shape(sources[part]) for part in "wuv")
    rows = w[dim] if len(w) > dim else -1
    total = 1
    for size in w:
        total *= size
    if u != (rows,) or rows == 0 or v != (total // rows,):
        raise ValueError(f"u {u} and v {v} do not belong to a weight of shape {w} and dim {dim}")


def _classify(
    found: Mapping[str, Planned], layers: LayerMap, strict: bool, what: str
) -> tuple[list[Planned], list[str]]:
    tensors: list[Planned] = []
    dropped: list[str] = []
    lost = []
    for name, item in found.items():
        kind = layers.kind(name)
        if kind == "ignore":
            dropped += item.sources.values()
        elif kind is None and strict:
            lost.append(name)
        else:
            tensors.append(replace(item, kind=cast(Kind, kind or "copy"), declared=kind is not None))
    if lost:
        raise ValueError(
            f"{what}: no pattern names {some(lost)}; declare each as conv, conv_transpose or copy, or ignore it."
        )
    return tensors, dropped


def _check_patterns(tensors: Sequence[Planned], layers: LayerMap, what: str, checkpoint: Checkpoint) -> None:
    names = [item.name for item in tensors]
    for pattern in (*layers.conv, *layers.conv_transpose, *layers.copy):
        if pattern not in layers.optional and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{what}: no tensor is named like {pattern!r}; {checkpoint.source} has {some(names) or 'none'}."
            )


def _with_batch_norm(tensors: list[Planned], pair: tuple[str, str], what: str, checkpoint: Checkpoint) -> list[Planned]:
    """Returns the tensors with the batch norms behind some layers folded into those."""
    match, behind = _wildcards(*pair, what)
    by_name = {item.name: item for item in tensors}
    layers = [name.removesuffix(".weight") for name, item in by_name.items() if item.kind != "copy" and match(name)]
    if not layers:
        raise ValueError(
            f"{what}: no filter belongs to a layer named like {pair[0]!r}, whose batch norm is to be folded."
        )
    for layer in layers:
        norm = behind(layer)
        parts = {part: f"{norm}.{part}" for part in _BATCH_NORM if f"{norm}.{part}" in by_name}
        item = by_name[f"{layer}.weight"]
        if not {"running_mean", "running_var"} <= parts.keys() or not all(by_name[p].plain for p in parts.values()):
            raise ValueError(f"{what}: {norm} is to be folded into {layer}, but has no running_mean and running_var.")
        if item.batch_norm is not None:
            raise ValueError(f"{what}: two batch norms are to be folded into {layer}; name one.")
        _check_batch_norm(item, {name: by_name[part] for name, part in parts.items()}, norm, what)
        sources = {name: by_name[part].sources["w"] for name, part in parts.items()}
        bias = by_name.get(f"{layer}.bias")
        before = {"w": bias.sources["w"]} if bias else {}
        count = by_name[parts["running_mean"]].shape
        by_name[item.name] = replace(item, batch_norm=sources)
        made = Planned(f"{layer}.bias", before, "copy", count, item.dtype, batch_norm=sources)
        by_name[made.name] = made
        for part in parts.values():
            del by_name[part]
    return list(by_name.values())


def _check_batch_norm(item: Planned, parts: Mapping[str, Planned], norm: str, what: str) -> None:
    vectors = {name: part for name, part in parts.items() if name != "num_batches_tracked"}
    shape = vectors["running_mean"].shape
    filters, channels = (item.shape[0], 0) if item.kind == "conv" else (item.shape[1], item.shape[0])
    groups, rest = divmod(shape[0], filters) if len(shape) == 1 and filters else (0, 0)
    # A transposed filter tells the filters of one group: their number follows from the batch norm.
    fits = groups == 1 or (groups > 1 and item.kind == "conv_transpose" and channels % groups == 0)
    if rest or not fits or any(part.shape != shape for part in vectors.values()):
        raise ValueError(f"{what}: {norm} of shape {shape} does not fit {item.name} of shape {item.shape}.")
    if item.dtype not in ROUNDED or any(part.dtype not in FLOATS for part in vectors.values()):
        raise ValueError(f"{what}: {norm} cannot be folded into {item.name}, because one of them is not floating.")


def _wildcards(layer: str, norm: str, what: str) -> tuple[Callable[[str], bool], Callable[[str], str]]:
    """Returns whether a weight's name belongs to a layer that matches, and the name of the batch norm behind a layer."""
    if layer.count("*") != norm.count("*"):
        raise ValueError(f"{what}: {layer}={norm} must have as many * on one side as on the other.")
    pattern = re.compile("([^.]*)".join(re.escape(text) for text in layer.split("*")))

    def behind(name: str) -> str:
        found = pattern.fullmatch(name)
        assert found
        stars = iter(found.groups())
        return re.sub(r"\*", lambda _: next(stars), norm)

    return lambda name: name.endswith(".weight") and pattern.fullmatch(name.removesuffix(".weight")) is not None, behind
