"""Plans what happens to every tensor of a checkpoint, from names alone, before any tensor is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import cast

from .batch_norms import fold_norms
from .checkpoint import Checkpoint
from .layer_map import LayerMap
from .marker import Marker, Side
from .norm_parts import assemble
from .planned import ORDERS, Kind, Plan, Planned, Source
from .safetensors_file import some


def plan_native(
    checkpoint: Checkpoint,
    layers: LayerMap,
    *,
    what: str = "convert",
    strict: bool = True,
    batch_norms: Sequence[tuple[str, str]] = (),
    source: Source = "torch",
) -> Plan:
    """Plans the conversion of a file of a library's layout, or the reading of a native file for the same layers.

    Args:
        checkpoint: The source.
        layers: The declaration of its tensors.
        what: Error messages begin with it.
        strict: Whether tensors that no pattern names are errors; otherwise they are copied.
        batch_norms: Pairs of patterns: a layer's name, and the name of the batch norm after it, which is folded into
            it. Each `*` matches the same text in both.
        source: The library whose layout the filters have, if the file has no marker.

    Raises:
        ValueError: If no pattern names a tensor, a pattern names no tensor or not a filter, parts of a norm are
            missing, or a bias does not fit its filter.
    """
    if source not in ORDERS["conv"]:
        raise ValueError(f"{what}: source_layout must be one of {', '.join(ORDERS['conv'])}, but is {source!a:.60}.")
    marker = Marker.of(checkpoint.metadata, checkpoint.source)
    native = marker is not None and marker.layout == "native"
    if marker is not None and source not in ("torch", marker.layout):
        raise ValueError(
            f"{what}: {checkpoint.source} is marked as of {marker.layout} layout, not {source}; leave --source-layout out."
        )
    if native:
        gone: list[str] = []
        found = {name: Planned(name, {"w": name}, "copy", *_size(checkpoint, name)) for name in checkpoint.names}
        renamed = dict(marker.renamed) if marker else {}
    else:
        now = _rename(checkpoint, layers, what)
        renamed = {new: old for new, old in now.items() if new != old}
        found, gone = assemble(checkpoint, now, layers, source, strict, what)
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
    plan = Plan(tensors, "native" if native else source, "native", [*checkpoint.left_out, *gone, *dropped])
    if not native:
        for pair in batch_norms:
            fold_norms(plan, pair, what)
    _check_biases(plan, checkpoint, what)
    kept = {item.name for item in plan.tensors}
    plan.renamed = {new: old for new, old in renamed.items() if new in kept}
    return plan


def plan_marked(checkpoint: Checkpoint, target: Side) -> Plan:
    """Plans a conversion without a declaration, from the marker, which has the filters and their original names.

    Args:
        checkpoint: A file that `max-conv convert` wrote.
        target: "torch", or the layout that the file already has.

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
    plan = Plan(tensors, marker.layout, target, checkpoint.left_out, {} if back else dict(marker.renamed))
    _check_biases(plan, checkpoint, "convert")
    return plan


def _check_biases(plan: Plan, checkpoint: Checkpoint, what: str) -> None:
    """Raises ValueError if a bias does not have one value per filter: then the filter's declaration is wrong."""
    # A network declares its own layers: then the file is wrong.
    advice = "declare the filter's true kind and layout" if what == "convert" else "pass a file of this network"
    by_name = {item.name: item for item in plan.tensors}
    for item in plan.tensors:
        bias = by_name.get(bias_name(item.name)) if item.kind != "copy" else None
        if bias is not None and (len(bias.shape) != 1 or not plan.groups(item, bias.shape[0])):
            raise ValueError(
                f"{what}: {bias.name} of shape {bias.shape} does not fit the {plan.filters(item)} filters of {item.name}, "
                f"of shape {item.shape}, in {checkpoint.source}; {advice}."
            )


def bias_name(name: str) -> str:
    """Returns the name of a filter's bias in PyTorch, MLX or Keras, or "".

    >>> bias_name("up.weight"), bias_name("conv/kernel:0"), bias_name("embedding")
    ('up.bias', 'conv/bias:0', '')
    """
    found = re.fullmatch(r"(|.*[^a-zA-Z0-9])(weight|kernel)(:0)?", name)
    return f"{found[1]}bias{found[3] or ''}" if found else ""


def _size(checkpoint: Checkpoint, name: str) -> tuple[tuple[int, ...], str]:
    return checkpoint.shape(name), checkpoint.dtype(name)


def _rename(checkpoint: Checkpoint, layers: LayerMap, what: str) -> dict[str, str]:
    """Returns the old names, by the new names."""
    found: dict[str, str] = {}
    for old in checkpoint.names:
        new = layers.renamed(old)
        if not new or not new.isprintable():
            raise ValueError(f"{what}: the renaming rules turn {old} into {new!r}, which is no name.")
        if new in found:
            raise ValueError(f"{what}: the renaming rules call both {found[new]} and {old} {new}; make them differ.")
        found[new] = old
    return found


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
