"""Finds, by their names, the batch norms that are folded into layers."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from .planned import ORDERS, Plan, Planned
from .tensors import FLOATS, ROUNDED

_PARTS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_BEFORE = (
    "a norm before a layer is not folded: it shifts the layer's input before that is padded, and a checkpoint does not "
    "contain the padding; keep it as it is"
)


def fold_norms(plan: Plan, pair: tuple[str, str], what: str) -> None:
    """Folds the batch norms after some layers of a plan into these layers.

    Args:
        plan: Is changed: the norms' tensors are removed, and layers without a bias get one.
        pair: The name of a layer and of the batch norm after it, with * or {i}, {i+1} for the parts that vary.
        what: Error messages begin with it.

    Raises:
        ValueError: If there is no such layer or norm, or they do not fit each other.
    """
    match, after = _patterns(*pair, what)
    by_name = {item.name: item for item in plan.tensors}
    counting = "{i}" in pair[0]
    layers = [name.removesuffix(".weight") for name, item in by_name.items() if item.kind != "copy" and match(name)]
    if counting:  # Not every layer of an nn.Sequential has a batch norm after it.
        layers = [layer for layer in layers if f"{after(layer)}.running_mean" in by_name]
    if not layers and not counting:
        norms = [name.removesuffix("running_mean") for name in by_name if name.endswith(".running_mean")]
        if any(match(f"{name}weight") for name in norms):
            raise ValueError(
                f"{what}: {pair[0]!r} names a batch norm, but the layer comes first, as in CONV=BN; {_BEFORE}."
            )
    if not layers:
        also = " and has a batch norm after it" if counting else ""
        raise ValueError(
            f"{what}: no filter belongs to a layer named like {pair[0]!r}{also}, whose batch norm is to be folded."
        )
    for layer in layers:
        _fold_one(plan, by_name, layer, after(layer), what)
    plan.tensors = list(by_name.values())


def _fold_one(plan: Plan, by_name: dict[str, Planned], layer: str, norm: str, what: str) -> None:
    item = by_name[f"{layer}.weight"]
    parts = {part: f"{norm}.{part}" for part in _PARTS if f"{norm}.{part}" in by_name}
    if _comes_before(norm, layer):
        raise ValueError(f"{what}: {norm} comes before {layer}, and {_BEFORE}.")
    if not {"running_mean", "running_var"} <= parts.keys() or not all(by_name[p].plain for p in parts.values()):
        raise ValueError(f"{what}: {norm} is to be folded into {layer}, but has no running_mean and running_var.")
    if item.batch_norm is not None:
        raise ValueError(f"{what}: two batch norms are to be folded into {layer}; name one.")
    _check(plan, item, {name: by_name[part] for name, part in parts.items()}, norm, what)
    sources = {name: by_name[part].sources["w"] for name, part in parts.items()}
    bias = by_name.get(f"{layer}.bias")
    count = by_name[parts["running_mean"]].shape
    if bias is not None and bias.shape != count:
        raise ValueError(f"{what}: {bias.name} of shape {bias.shape} does not fit {norm} of shape {count}.")
    by_name[item.name] = replace(item, batch_norm=sources)
    made = Planned(f"{layer}.bias", bias.sources if bias else {}, "copy", count, item.dtype, bias.norm if bias else "")
    by_name[made.name] = replace(made, batch_norm=sources)
    for part in parts.values():
        del by_name[part]


def _check(plan: Plan, item: Planned, parts: Mapping[str, Planned], norm: str, what: str) -> None:
    vectors = {name: part for name, part in parts.items() if name != "num_batches_tracked"}
    shape = vectors["running_mean"].shape
    if len(shape) != 1 or any(part.shape != shape for part in vectors.values()) or not plan.groups(item, shape[0]):
        channels = item.shape[ORDERS[item.kind][plan.source].index("C")]
        why = f", but its {channels} channels, and {_BEFORE}" if shape == (channels,) else ""
        raise ValueError(f"{what}: {norm} of shape {shape} does not fit {item.name} of shape {item.shape}{why}.")
    if item.dtype not in ROUNDED or any(part.dtype not in FLOATS for part in vectors.values()):
        raise ValueError(f"{what}: {norm} cannot be folded into {item.name}, because one of them is not floating.")


def _comes_before(norm: str, layer: str) -> bool:
    """Returns whether two names differ only in one number, as in an nn.Sequential, and the norm's number is smaller."""
    pairs = [pair for pair in zip(norm.split("."), layer.split("."), strict=False) if pair[0] != pair[1]]
    same = norm.count(".") == layer.count(".") and len(pairs) == 1
    return same and all(part.isdecimal() for part in pairs[0]) and int(pairs[0][0]) < int(pairs[0][1])


def _patterns(layer: str, norm: str, what: str) -> tuple[Callable[[str], bool], Callable[[str], str]]:
    """Returns whether a weight's name belongs to a layer that matches, and the name of the batch norm after a layer."""
    if layer.count("*") != norm.count("*"):
        raise ValueError(f"{what}: {layer}={norm} must have as many * on one side as on the other.")
    steps = re.findall(r"\{i([+-]\d{1,3})?\}", norm)
    if layer.count("{i}") != bool(steps):
        raise ValueError(
            f"{what}: {layer}={norm} must have {{i}} once in the layer and {{i+1}} in the norm, or neither."
        )
    if any(int(step or 0) < 0 for step in steps):
        raise ValueError(f"{what}: {norm} must come after {layer}, as {{i+1}} comes after {{i}}; {_BEFORE}.")
    pieces = {"*": "([^.]*)", "{i}": "(?P<i>[0-9]{1,9})"}
    pattern = re.compile("".join(pieces.get(text, re.escape(text)) for text in re.split(r"(\*|\{i\})", layer)))

    def after(name: str) -> str:
        found = pattern.fullmatch(name)
        assert found
        number = found["i"] if steps else None
        stars = iter(text for i, text in enumerate(found.groups(), 1) if i != pattern.groupindex.get("i"))
        text = re.sub(r"\*", lambda _: next(stars), norm)
        return re.sub(r"\{i(\+\d+)?\}", lambda step: str(int(number or 0) + int(step[1] or 0)), text)

    return lambda name: name.endswith(".weight") and pattern.fullmatch(name.removesuffix(".weight")) is not None, after
