"""The common part of the front ends: initial values, and running on arrays."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import DeviceRef, TensorValue

from ..conv.arrays import ARRAYS, as_buffer, buffer_of
from ..conv.geometry import Padding
from ..conv.graph import PackedGraph
from ..conv.nn import Conv1D, ConvolutionLayer, ConvTranspose1D
from ..runtime.session import Model, compile


class _Eager(ConvolutionLayer):
    """A layer that starts with random weights and also runs on arrays."""

    def _start(self, fan: int, bias: bool, generator: np.random.Generator | int | None) -> None:
        """Sets initial values: U(-sqrt(1 / fan), sqrt(1 / fan)); for the bias only if `bias` is true, else zeros."""
        random = np.random.default_rng(generator)
        bounds = {"weight": fan**-0.5, "bias": fan**-0.5 * bias}
        self.load_state_dict(
            {
                name: as_buffer(random.uniform(-bound, bound, [int(n) for n in weight.shape]), self.dtype)
                for name, weight in self.raw_state_dict().items()
                for bound in [bounds[name.removeprefix(self._prefix)]]
            }
        )

    def load_state_dict(self, state_dict: Any, **options: Any) -> None:
        """Sets the weights; the next call on an array uses them."""
        super().load_state_dict(state_dict, **options)
        self._models: dict[int, Model] = {}

    def _run(self, x: Any, emit: Callable[..., Any], key: int = 0) -> Any:
        """Runs the operation that `emit` emits on an array, with or without a batch axis; compiles it once per `key`.

        Returns:
            A NumPy array for a NumPy array, or a `max.driver.Buffer`, which supports DLPack.
        """
        for name, weight in self.layer_weights.items():
            if weight.name != name:
                raise ValueError(
                    f"{self.op}: this layer's weights belong to a model, as {weight.name!r}; call the compiled model."
                )
        buffer = self._memory(x)
        if key not in self._models:
            graph = PackedGraph(type(self).__name__, emit, input_types=self.input_types())
            self._models[key] = compile(graph, ["x"], weights=self.state_dict())
        unbatched = buffer.rank == 2
        y = self._models[key](buffer.view(buffer.dtype, [1, *buffer.shape]) if unbatched else buffer)
        if unbatched:
            y = y.view(y.dtype, y.shape[1:])
        return y.to_numpy() if isinstance(x, ARRAYS) and y.dtype != DType.bfloat16 else y

    def _memory(self, x: Any) -> Buffer:
        return buffer_of(x, f"{self.op}: input", "x")


class EagerConv1D(_Eager, Conv1D):
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
        random_bias: bool = True,
        **options: Any,
    ) -> None:
        """Has the arguments of the front ends; `random_bias` is whether the bias starts with random values."""
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
        self._start(self.in_channels // self.num_groups * self.kernel_size, random_bias, generator)

    def __call__(self, x: Any) -> Any:
        """Emits the convolution of a graph value, or runs it on an array.

        Args:
            x: A graph value, or an array (NumPy or DLPack), in the layer's layout, with or without a batch axis.

        Returns:
            A graph value, a NumPy array for a NumPy array, or a `max.driver.Buffer`, which supports DLPack.
        """
        return super().__call__(x) if isinstance(x, TensorValue) else self._run(x, super().__call__)


class EagerConvTranspose1D(_Eager, ConvTranspose1D):
    """A `ConvTranspose1D` that starts with random weights and also runs on arrays."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: Any,
        output_padding: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        dtype: Any,
        device: DeviceRef | None,
        permute: bool = False,
        name: str | None = None,
        exact: bool = False,
    ) -> None:
        """Has the arguments of the front ends."""
        super().__init__(
            one("kernel_size", kernel_size, self.op),
            in_channels,
            out_channels,
            as_dtype(dtype, self.op),
            stride=one("stride", stride, self.op),
            padding=padding,
            output_padding=one("output_padding", output_padding, self.op),
            dilation=one("dilation", dilation, self.op),
            num_groups=groups,
            device=device,
            has_bias=bias,
            permute=permute,
            exact=exact,
            name=name,
        )

    def __call__(self, x: Any, output_size: int | Sequence[int] | None = None) -> Any:
        """Emits the transposed convolution of a graph value, or runs it on an array.

        Args:
            x: A graph value, or an array (NumPy or DLPack), in the layer's layout, with or without a batch axis.
            output_size: L_out, from which `output_padding` is then computed. Also a sequence: L_out alone, or all sizes
                of the output.

        Returns:
            A graph value, a NumPy array for a NumPy array, or a `max.driver.Buffer`, which supports DLPack.
        """
        shape: Any = (x if isinstance(x, TensorValue) else self._memory(x)).shape
        along = self.layout[-len(shape) :].find("L")
        size: Any = output_size
        if isinstance(size, tuple | list):
            size = one("output_size", [size[along]] if len(size) == len(shape) else size, self.op)
        if isinstance(x, TensorValue):
            return super().__call__(x, size)
        added = self.output_padding
        if size is not None and len(shape) in (2, 3):
            added = self.geometry.with_output(shape[along], size).output_padding
        return self._run(x, lambda value: self._emit(value, output_padding=added), added)


def one(name: str, value: Any, op: str = "conv1d") -> Any:
    """Returns the value of an argument that may be a 1-tuple."""
    if isinstance(value, tuple | list):
        if len(value) != 1:
            raise ValueError(f"{op}: {name} must be one int or a 1-tuple, but is {value!r}.")
        return value[0]
    return value


def as_dtype(dtype: Any, op: str = "conv1d") -> DType:
    """Returns MAX's dtype for a dtype of MAX, PyTorch, MLX or NumPy, or for a name; None is float32."""
    if isinstance(dtype, DType):
        return dtype
    if dtype is None:
        return DType.float32
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
    name = name.rpartition(".")[2]
    try:
        return DType[name]
    except KeyError:
        raise TypeError(f"{op}: dtype must be float32, float64, float16 or bfloat16, but is {dtype!r}.") from None
