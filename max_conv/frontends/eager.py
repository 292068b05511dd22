"""What the front ends share: start values, and running on arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import DeviceRef, TensorValue

from ..geometry import Padding
from ..nn import Conv1D
from ..session import Model, compile


class EagerConv1D(Conv1D):
    """A `Conv1D` that starts with random weights and also runs on arrays."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: Padding,
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        dtype: Any,
        device: DeviceRef | None,
        generator: np.random.Generator | int | None,
        bias_bound: float = 1.0,
        **options: Any,
    ) -> None:
        """Takes the arguments of the front ends; `bias_bound` scales the bias's start values."""
        super().__init__(
            one("kernel_size", kernel_size),
            in_channels,
            out_channels,
            as_dtype(dtype),
            stride=one("stride", stride),
            padding=padding,
            dilation=one("dilation", dilation),
            num_groups=groups,
            device=device,
            has_bias=bias,
            **options,
        )
        bound = (self.num_groups / (self.in_channels * self.kernel_size)) ** 0.5
        random = np.random.default_rng(generator)
        bounds = {"weight": bound, "bias": bound * bias_bound}
        self.load_state_dict(
            {
                name: as_buffer(random.uniform(-bounds[name], bounds[name], [int(n) for n in weight.shape]), self.dtype)
                for name, weight in self.raw_state_dict().items()
            }
        )

    def load_state_dict(self, state_dict: Any, **options: Any) -> None:
        """Sets the weights; the next call on an array uses them."""
        super().load_state_dict(state_dict, **options)
        self._model: Model | None = None

    def __call__(self, x: Any) -> Any:
        """Emits the convolution of a graph value, or runs it on an array.

        Args:
            x: A graph value, or an array (NumPy or DLPack), in the layer's layout, with or without a batch axis.

        Returns:
            A graph value, a NumPy array for a NumPy array, or a `max.driver.Buffer`, which speaks DLPack.
        """
        if isinstance(x, TensorValue):
            return super().__call__(x)
        if self.filter.name != "weight":
            raise ValueError(
                f"conv1d: this layer's weights belong to a model, as {self.filter.name!r}; call the compiled model."
            )
        if self._model is None:
            self._model = compile(self)
        if len(x.shape) != 2:
            return self._model(x)
        y = self._model(x.view(x.dtype, [1, *x.shape]) if isinstance(x, Buffer) else x[None])
        return y.view(y.dtype, y.shape[1:]) if isinstance(y, Buffer) else y[0]


def one(name: str, value: Any) -> Any:
    """Returns the value of an argument that may come as a 1-tuple."""
    if isinstance(value, tuple | list):
        if len(value) != 1:
            raise ValueError(f"conv1d: {name} must be one int or a 1-tuple, but is {value!r}.")
        return value[0]
    return value


def as_dtype(dtype: Any) -> DType:
    """Returns MAX's dtype for MAX's, PyTorch's, MLX's or NumPy's, or its name; None is float32."""
    if isinstance(dtype, DType):
        return dtype
    if dtype is None:
        return DType.float32
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
    name = name.rpartition(".")[2]
    try:
        return DType[name]
    except KeyError:
        raise TypeError(f"conv1d: dtype must be float32, float64, float16 or bfloat16, but is {dtype!r}.") from None


def as_buffer(values: np.ndarray, dtype: DType) -> Buffer:
    """Returns values rounded to `dtype`, also bfloat16, which NumPy lacks."""
    if dtype != DType.bfloat16:
        return Buffer.from_numpy(np.ascontiguousarray(values, dtype.to_numpy()))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Round half to even: add half of the last kept bit, less one where that bit is zero.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return Buffer.from_numpy(rounded.astype(np.uint16)).view(DType.bfloat16, list(values.shape))
