"""The tensors of a plan: read, folded, permuted and cast, one at a time."""

from collections.abc import Iterator, Mapping

import numpy as np

from .checkpoint import Checkpoint
from .folding import BatchNorm, fold_spectral_norm, fold_weight_norm, weight_norm_dim
from .layouts import permute
from .plan import Plan, Planned
from .tensors import Tensor, rounded, values


def make(checkpoint: Checkpoint, plan: Plan, item: Planned, dtype: str, eps: float = 1e-5) -> Tensor:
    """Reads what a tensor of the output is made of, and makes it.

    Args:
        checkpoint: The source.
        plan: The plan that `item` is part of.
        item: The tensor.
        dtype: safetensors' name of its dtype in the output.
        eps: What batch norms add to the variance.

    Raises:
        ValueError: If a finite value becomes infinite in `dtype`.
    """
    if item.plain:
        tensor = _cast(checkpoint.read(item.sources["w"]), dtype, item.name)
    else:
        tensor = _rounded(_folded(checkpoint, item, eps), dtype, item.name)
    orders = plan.order(item)
    return tensor if orders is None else Tensor(tensor.dtype, permute(tensor.bits, *orders))


def pieces(checkpoint: Checkpoint, plan: Plan, item: Planned, dtype: str, eps: float = 1e-5) -> Iterator[np.ndarray]:
    """Yields the bits of what `make` makes; tensors that only move are never in memory as a whole."""
    if item.plain and plan.order(item) is None:
        before = checkpoint.dtype(item.sources["w"])
        for piece in checkpoint.pieces(item.sources["w"]):
            yield _cast(Tensor(before, piece), dtype, item.name).bits
    else:
        yield make(checkpoint, plan, item, dtype, eps).bits


def _folded(checkpoint: Checkpoint, item: Planned, eps: float) -> np.ndarray:
    """Returns the values of a tensor that is made of several, float64, in the source's layout."""
    parts = {part: values(checkpoint.read(name)) for part, name in item.sources.items()}
    if item.norm == "weight norm":
        whole = fold_weight_norm(parts["g"], parts["v"], weight_norm_dim(parts["g"].shape, parts["v"].shape))
    elif item.norm:
        # PyTorch puts the filters first in the matrix, which are the second axis of a transposed filter.
        dim = 1 if item.kind == "conv_transpose" else 0
        whole = fold_spectral_norm(parts["w"], parts["u"], parts["v"], dim)
    else:
        whole = parts.get("w", np.zeros(item.shape))
    if item.batch_norm is None:
        return whole
    norm = batch_norm(checkpoint, item.batch_norm, eps)
    return norm.fold_bias(whole) if item.kind == "copy" else norm.fold_filter(whole, item.kind == "conv_transpose")


def batch_norm(checkpoint: Checkpoint, names: Mapping[str, str], eps: float) -> BatchNorm:
    """Reads a batch norm.

    Args:
        checkpoint: The source.
        names: Its tensors, by the last parts of their names; weight and bias may be missing.
        eps: What it adds to the variance.
    """
    read = {part: values(checkpoint.read(name)) for part, name in names.items() if part != "num_batches_tracked"}
    mean = read["running_mean"]
    weight, bias = read.get("weight", np.ones_like(mean)), read.get("bias", np.zeros_like(mean))
    return BatchNorm(weight, bias, mean, read["running_var"], eps)


def _cast(tensor: Tensor, dtype: str, name: str) -> Tensor:
    return tensor if tensor.dtype == dtype else _rounded(values(tensor), dtype, name)


def _rounded(array: np.ndarray, dtype: str, name: str) -> Tensor:
    try:
        return rounded(array, dtype)
    except OverflowError as error:
        raise ValueError(f"convert: {name} cannot be cast: {error}; keep it as it is with --keep {name}.") from None
