"""Layers with weight norm: a filter `weight_g * weight_v / |weight_v|`, which is folded once, in float64.

It is folded when the layer loads its weights, when `max_conv.compile` compiles it, or by `remove_weight_norm`. One case
is left: an outer module loaded the weights and the graph runs in a plain MAX session. Then the graph folds it on every
call.
"""

from collections.abc import Mapping
from typing import Any

from max.driver import Buffer
from max.dtype import DType
from max.graph import TensorValue, Weight, ops

from .arrays import as_buffer, as_float64
from .folding import fold_weight_norm, weight_norm_names
from .graph import derived, in_graph
from .layouts import permutation, permute
from .max_nn import nn
from .nn import Conv1D, ConvolutionLayer, ConvTranspose1D
from .nn import ConvTranspose1d as PlainConvTranspose1d

TORCH = {"SCF": "FCS", "SFC": "CFS"}
"""PyTorch's axis order of native filters; `dim` is an axis in this order."""


class _WeightNorm(ConvolutionLayer):
    """The part of a layer that weight norm adds; the layer's filter is the weight named "weight"."""

    weight_g: Weight
    weight_v: Weight

    def __init__(self, *args: Any, dim: int | None = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if dim is not None and dim not in range(-3, 3):
            raise ValueError(f"{self.op}: dim must be None or an axis of the filter, -3 to 2, but is {dim!r}.")
        self.dim = None if dim in (None, -1) else dim % 3  # in PyTorch -1 also means one norm of the whole filter
        self.folded = False
        shape = [int(size) for size in getattr(self, self.filter_attribute).shape]
        sizes = [shape[axis] for axis in permutation(self._order, self._torch_order)]
        norms = [] if self.dim is None else [size if axis == self.dim else 1 for axis, size in enumerate(sizes)]
        self.weight_g = self._declare("weight_g", norms)
        self.weight_v = self._declare("weight_v", shape)

    @property
    def _order(self) -> str:
        return self.filter_layout

    @property
    def _torch_order(self) -> str:
        return TORCH.get(self._order, self._order)

    @property
    def layer_weights(self) -> dict[str, Weight]:
        """The weights by name: magnitude and direction until they are folded, then the filter."""
        absent = ("weight_g", "weight_v") if self.folded else ("weight",)
        names = {self._prefix + name for name in absent}
        return {name: weight for name, weight in super().layer_weights.items() if name not in names}

    def fold(self, g: Any, v: Any) -> Buffer:
        """Returns the filter that magnitude and direction define, in the layer's layout and dtype."""
        direction = permute(as_float64(v), self._order, self._torch_order)
        folded = fold_weight_norm(as_float64(g), direction, self.dim)
        return as_buffer(permute(folded, self._torch_order, self._order), self.dtype)

    def load_state_dict(self, state_dict: Mapping[str, Any], **options: Any) -> None:
        """Sets the weights, and folds magnitude and direction, which may have either of PyTorch's two namings."""
        state = weight_norm_names(state_dict)
        g, v, filter = (f"{self._prefix}{name}" for name in ("weight_g", "weight_v", "weight"))
        if g in state and v in state:
            state[filter] = self.fold(state.pop(g), state.pop(v))
        before, self.folded = self.folded, self.folded or filter in state
        try:
            super().load_state_dict(state, **options)
        except ValueError:
            self.folded = before
            raise

    def _filter(self) -> TensorValue:
        if self.folded:
            return super()._filter()
        g, v = self._named(self.weight_g), self._named(self.weight_v)
        weight = Weight(f"{v.name}.folded", v.dtype, v.shape, v.device)
        return derived(weight, (g, v), self.fold) or self._fold_in_graph()

    def _fold_in_graph(self) -> TensorValue:
        axes = permutation(self._order, self._torch_order)
        direction = ops.cast(in_graph(self.weight_v), DType.float64).permute(list(axes))
        squares = direction * direction
        for axis in range(3):
            if axis != self.dim:
                squares = ops.sum(squares, axis)
        magnitude = ops.cast(in_graph(self.weight_g), DType.float64).reshape([*squares.shape])
        folded = direction * (magnitude / ops.sqrt(squares))
        return ops.cast(folded.permute(list(permutation(self._torch_order, self._order))), self.weight_v.dtype)


class WeightNormConv1D(_WeightNorm, Conv1D):
    """`Conv1D` with weight norm.

    Args:
        args, kwargs: The arguments of `Conv1D`.
        dim: The axis of PyTorch's filter (F, C / num_groups, K) along which each index has its own norm: 0 in nearly
            every checkpoint, 2 in wav2vec 2.0; None for one norm of the whole.

    Attributes:
        weight_g: The magnitude: (F, 1, 1) for `dim` 0, (1, 1, K) for 2, () for None, whatever the filter's layout.
        weight_v: The direction, of the filter's shape and layout.
        bias: The weight, (F,), or None.

    `load_state_dict` accepts both of PyTorch's namings, and a folded `weight`.

    >>> from max.dtype import DType
    >>> layer = WeightNormConv1D(7, 80, 512, DType.float32, padding=3, has_bias=True)
    >>> {name: [int(n) for n in weight.shape] for name, weight in layer.raw_state_dict().items()}
    {'bias': [512], 'weight_g': [512, 1, 1], 'weight_v': [7, 80, 512]}

    Source: Salimans and Kingma, Weight Normalization, 2016, https://arxiv.org/abs/1602.07868
    """


class WeightNormConvTranspose1D(_WeightNorm, ConvTranspose1D):
    """`ConvTranspose1D` with weight norm.

    Args:
        args, kwargs: The arguments of `ConvTranspose1D`.
        dim: The axis of PyTorch's filter (C, F / num_groups, K) along which each index has its own norm; None for one
            norm of the whole.

    Attributes:
        weight_g: The magnitude: (C, 1, 1) for `dim` 0, (1, 1, K) for 2, () for None, whatever the filter's layout.
        weight_v: The direction, of the filter's shape and layout.
        bias: The weight, (F,), or None.

    `load_state_dict` accepts both of PyTorch's namings, and a folded `weight`.

    >>> from max.dtype import DType
    >>> layer = WeightNormConvTranspose1D(16, 512, 256, DType.float32, stride=8, padding=4)
    >>> {name: [int(n) for n in weight.shape] for name, weight in layer.raw_state_dict().items()}
    {'weight_g': [512, 1, 1], 'weight_v': [16, 256, 512]}

    Source: Salimans and Kingma, Weight Normalization, 2016, https://arxiv.org/abs/1602.07868
    """


class WeightNormConvTranspose1d(_WeightNorm, PlainConvTranspose1d):
    """`WeightNormConvTranspose1D` with the arguments of `max.nn.WeightNormConvTranspose1d`: only the import has to change."""


def remove_weight_norm(module: nn.Module) -> None:
    """Folds the weight norm of every layer that has loaded its weights: each then has a plain `weight`.

    `max_conv.compile` does this itself. In a plain MAX session it saves the folding on every call.

    >>> import numpy as np
    >>> from max.dtype import DType
    >>> layer = WeightNormConv1D(1, 1, 1, DType.float32)
    >>> layer.load_state_dict({"weight_g": np.full((1, 1, 1), 3, np.float32), "weight_v": np.ones((1, 1, 1), np.float32)})
    >>> remove_weight_norm(layer)
    >>> layer.state_dict()["weight"].to_numpy().item()
    3.0
    """
    state = dict(module.state_dict(auto_initialize=False))
    for prefix, layer in module.named_modules():
        if isinstance(layer, _WeightNorm) and not layer.folded:
            start = prefix + layer._prefix
            g, v = (state.pop(f"{start}{name}") for name in ("weight_g", "weight_v"))
            state[f"{start}weight"] = layer.fold(g, v)
            layer.folded = True
    module.load_state_dict(state)
