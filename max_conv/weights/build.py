"""The tensors of a plan: read, folded, permuted and cast, one at a time."""

from collections.abc import Iterator, Mapping

import numpy as np

from ..conv.folding import BatchNorm, fold_spectral_norm, fold_weight_norm, weight_norm_dim
from ..conv.layouts import permute
from .checkpoint import Checkpoint
from .planned import ORDERS, Plan, Planned
from .tensors import Tensor, rounded, values, width

BLOCK = 1 << 19
"""The number of values that are rounded at once: rounding needs several arrays of this size."""


def build_tensor(checkpoint: Checkpoint, plan: Plan, item: Planned, dtype: str, eps: float = 1e-5) -> Tensor:
    """Makes a tensor of the output from the tensors of the source.

    Args:
        checkpoint: The source.
        plan: The plan that `item` is part of.
        item: The tensor.
        dtype: safetensors' name of its dtype in the output.
        eps: The number that batch norms add to the variance.

    Raises:
        ValueError: If a finite value becomes infinite in `dtype`.
    """
    if item.plain:
        # Cast piece by piece: the whole tensor in float64 would need many times its memory.
        bits = np.empty(item.shape, f"u{width(dtype)}")
        start = 0
        for piece in _cast(checkpoint, item, dtype):
            bits.reshape(-1)[start : start + len(piece)] = piece
            start += len(piece)
        tensor = Tensor(dtype, bits)
    else:
        tensor = _rounded(_folded(checkpoint, plan, item, eps), dtype, item.name)
    orders = plan.order(item)
    return tensor if orders is None else Tensor(tensor.dtype, permute(tensor.bits, *orders))


def pieces(checkpoint: Checkpoint, plan: Plan, item: Planned, dtype: str, eps: float = 1e-5) -> Iterator[np.ndarray]:
    """Yields the bits of the tensor that `build_tensor` returns. A tensor that only moves is never in memory whole."""
    if item.plain and plan.order(item) is None:
        yield from _cast(checkpoint, item, dtype)
    else:
        yield build_tensor(checkpoint, plan, item, dtype, eps).bits


def _folded(checkpoint: Checkpoint, plan: Plan, item: Planned, eps: float) -> np.ndarray:
    """Returns the values of a tensor that is made from several, in float64 and the source's layout."""
    order = ORDERS.get(item.kind, {}).get(plan.source, "")
    parts = {part: values(checkpoint.read(name)) for part, name in item.sources.items()}
    if item.norm == "weight norm":
        whole = fold_weight_norm(parts["g"], parts["v"], weight_norm_dim(parts["g"].shape, parts["v"].shape))
    elif item.norm == "spectral norm":
        # PyTorch's matrix has the filters first; in a transposed filter they are the second axis.
        whole = fold_spectral_norm(parts["w"], parts["u"], parts["v"], order.index("F"))
    elif item.norm:
        with np.errstate(invalid="ignore"):  # as in PyTorch, an infinity that is pruned becomes NaN
            whole = parts["w"] * parts["m"]
    else:
        whole = parts.get("w", np.zeros(item.shape))
    if item.batch_norm is None:
        return whole
    norm = batch_norm(checkpoint, item.batch_norm, eps)
    return norm.fold_bias(whole) if item.kind == "copy" else norm.fold_filter(whole, order)


def batch_norm(checkpoint: Checkpoint, names: Mapping[str, str], eps: float) -> BatchNorm:
    """Reads a batch norm.

    Args:
        checkpoint: The source.
        names: Its tensors, by the last parts of their names; weight and bias may be missing.
        eps: The number that it adds to the variance.
    """
    read = {part: values(checkpoint.read(name)) for part, name in names.items() if part != "num_batches_tracked"}
    mean = read["running_mean"]
    weight, bias = read.get("weight", np.ones_like(mean)), read.get("bias", np.zeros_like(mean))
    return BatchNorm(weight, bias, mean, read["running_var"], eps)


def _cast(checkpoint: Checkpoint, item: Planned, dtype: str) -> Iterator[np.ndarray]:
    """Yields the bits of a tensor that is made from one tensor, in row-major order of the source's layout."""
    for piece in checkpoint.pieces(item.sources["w"]):
        yield piece if item.dtype == dtype else _rounded(values(Tensor(item.dtype, piece)), dtype, item.name).bits


def _rounded(array: np.ndarray, dtype: str, name: str) -> Tensor:
    bits = np.empty(array.shape, f"u{width(dtype)}")
    flat, to = np.ascontiguousarray(array).reshape(-1), bits.reshape(-1)
    try:
        for start in range(0, flat.size, BLOCK):
            to[start : start + BLOCK] = rounded(flat[start : start + BLOCK], dtype).bits
        return Tensor(dtype, bits)
    except OverflowError as error:
        raise ValueError(f"convert: {name} cannot be cast: {error}; keep it as it is with --keep {name}.") from None
