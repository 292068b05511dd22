"""Finds, by their names, the tensors that together make one: the parts of weight norm, spectral norm and pruning."""

import math
from collections.abc import Mapping

from ..conv.folding import weight_norm_dim
from .checkpoint import Checkpoint
from .layer_map import LayerMap
from .planned import ORDERS, Planned, Source
from .safetensors_file import some
from .tensors import FLOATS, ROUNDED

# A tensor's parts, in both of PyTorch's namings: the norm, the end of the tensor's name, the ends of the parts' names.
_PARTS = (
    ("weight norm", "weight", {"g": "weight_g", "v": "weight_v"}),
    (
        "weight norm",
        "weight",
        {"g": "parametrizations.weight.original0", "v": "parametrizations.weight.original1"},
    ),
    ("spectral norm", "weight", {"w": "weight_orig", "u": "weight_u", "v": "weight_v"}),
    (
        "spectral norm",
        "weight",
        {
            "w": "parametrizations.weight.original",
            "u": "parametrizations.weight.0._u",
            "v": "parametrizations.weight.0._v",
        },
    ),
    ("weight norm", "bias", {"g": "bias_g", "v": "bias_v"}),
    ("weight norm", "bias", {"g": "parametrizations.bias.original0", "v": "parametrizations.bias.original1"}),
    ("pruning", "weight", {"w": "weight_orig", "m": "weight_mask"}),
    ("pruning", "bias", {"w": "bias_orig", "m": "bias_mask"}),
)
_SINGLE = {"weight_orig": "weight_u or weight_mask", "bias_orig": "bias_mask"}
"""First parts that belong to several norms, and the further parts that would decide between them."""


def assemble(
    checkpoint: Checkpoint, now: Mapping[str, str], layers: LayerMap, source: Source, strict: bool, what: str
) -> tuple[dict[str, Planned], list[str]]:
    """Returns the tensors by their names, declared ones with a norm put together, and the names that are dropped.

    Args:
        checkpoint: The source.
        now: The old names by the new ones.
        layers: The declaration of the tensors.
        source: The library whose layout they have.
        strict: Whether tensors that no pattern names are errors.
        what: Error messages begin with it.

    Raises:
        ValueError: If parts are missing, do not fit each other, or cannot be folded.
    """
    found: dict[str, Planned] = {}
    taken: set[str] = set()
    dropped: list[str] = []
    for new in now:
        shape, dtype = checkpoint.shape(now[new]), checkpoint.dtype(now[new])
        found.setdefault(new, Planned(new, {"w": now[new]}, "copy", shape, dtype))
        if (belongs := _norm(new, now)) is None:
            continue
        norm, whole, parts = belongs
        kind = layers.kind(whole)
        if kind is None and whole.endswith("bias") and layers.kind(f"{whole.removesuffix('bias')}weight"):
            kind = "copy"
        # Not declared, or copied part by part: the parts are treated like any other tensor.
        if kind is None or (norm == "spectral norm" and kind == "copy" and not strict):
            continue
        taken.update(parts.values())
        if kind == "ignore":
            dropped += [now[name] for name in parts.values() if name in now]
            continue
        _check_parts(checkpoint, new, norm, whole, parts, now, what)
        if norm == "spectral norm" and kind == "copy":
            raise ValueError(
                f"{what}: {whole} has spectral norm, which is folded into filters alone; name its kind, or its parts."
            )
        sources = {part: now[name] for part, name in parts.items()}
        found[whole] = _folded(checkpoint, whole, norm, sources, ORDERS.get(kind, {}).get(source, ""), what)
    return {name: item for name, item in found.items() if name not in taken}, dropped


def _norm(name: str, now: Mapping[str, str]) -> tuple[str, str, dict[str, str]] | None:
    """Returns the norm whose first part is `name`, the name of the tensor that it makes, and the names of all parts."""
    fitting = []
    for norm, whole, ends in _PARTS:
        end = next(iter(ends.values()))
        if name == end or name.endswith(f".{end}"):
            stem = name.removesuffix(end)
            parts = {part: stem + end for part, end in ends.items()}
            fitting.append((sum(part in now for part in parts.values()), (norm, stem + whole, parts)))
    # Of several norms with the same first part, the one with most of its parts present.
    return max(fitting, key=lambda entry: entry[0])[1] if fitting else None


def _check_parts(
    checkpoint: Checkpoint,
    first: str,
    norm: str,
    whole: str,
    parts: Mapping[str, str],
    now: Mapping[str, str],
    what: str,
) -> None:
    """Raises ValueError unless all parts are there, and the tensor that they make is not."""
    if whole in now:
        raise ValueError(f"{what}: {checkpoint.source} has both {whole} and its parts {some(list(parts.values()))}.")
    missing = [part for part in parts.values() if part not in now]
    if not missing:
        return
    if len(missing) < len(parts) - 1 or norm == "weight norm":
        raise ValueError(f"{what}: {first} belongs to {norm} of {whole}, but {missing[0]} is missing.")
    for end, others in _SINGLE.items():
        if first.endswith(end):
            raise ValueError(
                f"{what}: {first} is what spectral norm or pruning makes {whole} of, but there is no {others}; "
                "remove them from the module and save it again."
            )
    raise ValueError(
        f"{what}: {first} is what a parametrization makes {whole} of, and only weight norm and spectral norm are known; "
        "call torch.nn.utils.parametrize.remove_parametrizations and save again."
    )


def _folded(checkpoint: Checkpoint, name: str, norm: str, sources: Mapping[str, str], order: str, what: str) -> Planned:
    whole = sources["v" if norm == "weight norm" else "w"]
    shape, dtype = checkpoint.shape(whole), checkpoint.dtype(whole)
    for source in sources.values():
        if checkpoint.dtype(source) not in FLOATS or dtype not in ROUNDED:
            raise ValueError(f"{what}: {source} of {norm} is {checkpoint.dtype(source)}, which cannot be folded.")
    try:
        if norm == "weight norm":
            weight_norm_dim(checkpoint.shape(sources["g"]), shape)
        elif norm == "spectral norm":
            _check_spectral(checkpoint, sources, order.index("F"))
        elif checkpoint.shape(sources["m"]) != shape:
            raise ValueError(
                f"a mask of shape {checkpoint.shape(sources['m'])} does not belong to one of shape {shape}"
            )
    except ValueError as error:
        raise ValueError(f"{what}: {norm} of {name} cannot be folded: {error}.") from None
    return Planned(name, sources, "copy", shape, dtype, norm)


def _check_spectral(checkpoint: Checkpoint, sources: Mapping[str, str], dim: int) -> None:
    w, u, v = (checkpoint.shape(sources[part]) for part in "wuv")
    rows = w[dim] if len(w) > dim else -1
    if u != (rows,) or rows == 0 or v != (math.prod(w) // rows,):
        raise ValueError(f"u {u} and v {v} do not belong to a weight of shape {w} and dim {dim}")
