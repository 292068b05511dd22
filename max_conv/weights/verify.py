"""Checks a converted file: compares PyTorch on the source with the reference on the output, for every layer."""

from typing import Any

import numpy as np

from ..conv.reference import conv1d_ref, conv_transpose1d_ref
from .build import batch_norm
from .checkpoint import Checkpoint
from .plan import bias_name
from .planned import ORDERS, Plan, Planned
from .tensors import FLOATS, Tensor, values

_EPS = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
_SMALLEST = {"F64": 2.0**-1074, "F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
_EXTRA = 4
"""Positions of the input beyond the filter's length: enough to distinguish all taps."""


def verify(source: Checkpoint, plan: Plan, target: Checkpoint, eps: float = 1e-5) -> int:
    """Compares the layers of a converted file with PyTorch's layers from the source, on random input.

    Each output may be off by `4 eps (|x| * |w| + |b|)`, where eps belongs to the output's dtype. Tensors that were only
    copied must be the same in every bit.

    Args:
        source: The checkpoint that was converted.
        plan: The plan of the conversion.
        target: The files that were written, read back.
        eps: The number that folded batch norms add to the variance.

    Returns:
        The number of layers.

    Raises:
        ImportError: If PyTorch is not installed.
        ValueError: If a layer's output differs; the message names the layer.
    """
    torch = _torch()
    items = {item.name: item for item in plan.tensors}
    count = 0
    for item in plan.tensors:
        if item.kind != "copy":
            if 0 in item.shape:
                raise ValueError(
                    f"verify: {item.name} of shape {item.shape} is empty, which is no layer's filter; declare it as what "
                    "is copied or ignored; nothing was written."
                )
            try:
                _check_layer(torch, source, plan, items, item, target, eps)
            except (RuntimeError, NotImplementedError) as error:  # PyTorch's message is a page of alternatives
                line = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(
                    f"verify: PyTorch cannot compute the layer of {item.name}, of shape {item.shape} ({line:.120}); "
                    "nothing was written."
                ) from None
            count += 1
        elif item.plain and target.dtype(item.name) == item.dtype:
            pairs = zip(source.pieces(item.sources["w"]), target.pieces(item.name), strict=True)
            if not all(np.array_equal(before, after) for before, after in pairs):
                raise ValueError(f"verify: {item.name} should be a copy, but has other bits; nothing was written.")
    return count


def _check_layer(
    torch: Any, source: Checkpoint, plan: Plan, items: dict[str, Planned], item: Planned, target: Checkpoint, eps: float
) -> None:
    bias_item = items.get(bias_name(item.name))
    order = ORDERS[item.kind][plan.source]
    axes = [order.index(axis) for axis in ORDERS[item.kind]["torch"]]
    filter = _source_values(torch, source, item, order).permute(axes)
    norm = None if item.batch_norm is None else batch_norm(source, item.batch_norm, eps)
    bias = _source_values(torch, source, bias_item, "") if bias_item is not None and bias_item.sources else None
    count = len(norm.scale) if norm else plan.filters(item) if bias is None else len(bias)
    groups = plan.groups(item, count)
    seed = np.random.default_rng(len(item.name))
    x = seed.standard_normal((1, filter.shape[0 if item.kind == "conv_transpose" else 1], filter.shape[2] + _EXTRA))

    function = torch.nn.functional.conv1d if item.kind == "conv" else torch.nn.functional.conv_transpose1d
    want = function(torch.from_numpy(x), filter, bias, groups=groups)
    if norm is not None:
        mean, variance, weight, offset = map(torch.from_numpy, (norm.mean, norm.variance, norm.weight, norm.bias))
        want = torch.nn.functional.batch_norm(want, mean, variance, weight, offset, False, 0.0, eps)

    new = _numbers(target.read(item.name))
    new_bias = None if bias_item is None else _numbers(target.read(bias_item.name))
    got = _reference(item, plan, x, new, new_bias, groups)
    size = _reference(item, plan, np.abs(x), np.abs(new), None if new_bias is None else np.abs(new_bias), groups)
    dtypes = [target.dtype(item.name), *([target.dtype(bias_item.name)] if bias_item is not None else [])]
    eps, smallest = (max(table.get(dtype, 0.0) for dtype in dtypes) for table in (_EPS, _SMALLEST))
    bound = 4 * max(eps, 1e-13) * size + smallest * (1 + np.abs(x).sum())
    with np.errstate(invalid="ignore"):
        off = np.abs(got - want.numpy())
        wrong = ~((off <= bound) | (got == want.numpy()) | (np.isnan(got) & np.isnan(want.numpy())))
    if wrong.any():
        layer = item.name.removesuffix("weight").rstrip(".") or item.name
        raise ValueError(
            f"verify: the layer {layer} gives another output than in PyTorch, off by "
            f"{np.nanmax(off[wrong]):.3g} where {bound[wrong].min():.3g} is allowed; nothing was written."
        )


def _source_values(torch: Any, source: Checkpoint, item: Planned, order: str) -> Any:
    """Returns the weight of PyTorch's layer, in float64 and the source's layout."""
    parts = {part: torch.from_numpy(_numbers(source.read(name))) for part, name in item.sources.items()}
    if item.norm == "weight norm":
        g, v = parts["g"], parts["v"]
        own = [axis for axis, size in enumerate(g.shape) if size != 1]
        if not own:
            return torch._weight_norm(v, g.reshape(()), -1)
        axes = [axis for axis in range(v.ndim) if axis != own[0]]
        return v * (g / (torch.linalg.vector_norm(v, dim=axes, keepdim=True) if axes else v.abs()))
    if item.norm == "spectral norm":
        first = parts["w"].movedim(order.index("F"), 0)
        return parts["w"] / torch.dot(parts["u"], torch.mv(first.reshape(first.shape[0], -1), parts["v"]))
    return parts["w"] * parts["m"] if item.norm else parts["w"]


def _reference(
    item: Planned, plan: Plan, x: np.ndarray, filter: np.ndarray, bias: np.ndarray | None, groups: int
) -> np.ndarray:
    """Returns the reference's output (N, F, L), for a filter of the output's layout."""
    function: Any = conv1d_ref if item.kind == "conv" else conv_transpose1d_ref
    return function(x, filter, bias, groups=groups, layout="NCL", filter_layout=ORDERS[item.kind][plan.target])


def _numbers(tensor: Tensor) -> np.ndarray:
    """Returns the values; for dtypes without values here, the bits as numbers, which are the same in a copy."""
    return values(tensor) if tensor.dtype in FLOATS else tensor.bits.astype(np.float64)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise ImportError("verify: comparing with PyTorch needs PyTorch; install torch.") from None
    return torch
