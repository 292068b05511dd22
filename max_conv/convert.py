"""Checkpoints of PyTorch's layout into native weights, in memory or from file to file."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from .checkpoint import Checkpoint, open_checkpoint
from .folding import BatchNorm, fold_spectral_norm, fold_weight_norm, weight_norm_dim
from .layouts import permute
from .plan import LayerMap, Plan, Planned, plan_native
from .tensors import Tensor, as_array, rounded, values

__all__ = ["LayerMap", "make", "pieces", "read_native", "to_native"]

Cast = Callable[[Planned], str]
"""Tells the dtype of a tensor in the output."""


def read_native(reference: str | Path, layers: LayerMap, what: str) -> dict[str, np.ndarray]:
    """Reads a checkpoint, native or PyTorch's, into native weights.

    Args:
        reference: What `max_conv.checkpoint.open_checkpoint` takes.
        layers: Which of its tensors are filters, and what becomes of the others.
        what: Begins error messages: the model's name.

    Returns:
        Arrays by name: filters SCF and SFC, weight norm folded, everything else as it is; 16-bit floats as float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or its tensors are not those that `layers` declares.

    >>> read_native("gone.safetensors", LayerMap(), "hifigan")
    Traceback (most recent call last):
    FileNotFoundError: checkpoint: there is no file gone.safetensors.
    """
    with open_checkpoint(reference) as checkpoint:
        return _arrays(checkpoint, layers, what)


def to_native(state: Mapping[str, np.ndarray], layers: LayerMap, what: str) -> dict[str, np.ndarray]:
    """Turns a state dict in memory into native weights, as `read_native` does with a file.

    Args:
        state: PyTorch's names and layouts, such as `{k: v.numpy() for k, v in module.state_dict().items()}`.
        layers, what: As for `read_native`.

    Raises:
        ValueError: If the arrays are not those that `layers` declares.

    >>> to_native({"up.weight": np.zeros((4, 2, 16))}, LayerMap(conv_transpose=("up.*",)), "net")["up.weight"].shape
    (16, 2, 4)
    """
    return _arrays(Checkpoint.of_arrays(state), layers, what)


def _arrays(checkpoint: Checkpoint, layers: LayerMap, what: str) -> dict[str, np.ndarray]:
    plan = plan_native(checkpoint, layers, what=what)
    return {item.name: as_array(make(checkpoint, plan, item, item.dtype)) for item in plan.tensors}


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
