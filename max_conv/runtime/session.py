"""Compiled models, which are called on arrays, saved and loaded."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from max.driver import CPU, Buffer, accelerator_count
from max.dtype import DType
from max.graph import Graph, TensorType, Weight

from ..conv.arrays import ARRAYS, buffer_of
from ..conv.folding import weight_norm_names
from ..conv.graph import PackedGraph, argument_names
from ..conv.max_nn import nn
from ..streaming.graph import StreamingGraph
from ..streaming.stream import Stream
from ..streaming.timing import Timing
from . import kinds, saved
from .compiled import compiled
from .compiler import compile_graphs
from .devices import accelerators, device_of, port_of, session_of
from .fork import check_fork
from .idle import first_run
from .kinds import Alone
from .notice import slow_compile
from .ports import Port, check_inputs, live_array

NOT_IN_NUMPY = (DType.bfloat16,)


class Model:
    """A compiled graph, called on arrays. Made by `compile` and `load`; safe to call from several threads.

    Attributes:
        inputs: Name, dtype and shape of every input.
        outputs: Name, dtype and shape of every output.
        timing: For a live graph, when its outputs are available; otherwise None.
        facts: Other facts, which `save` keeps: numbers and texts by name. `max_conv.serving.open_network` stores the network,
            its kind and its rate.
    """

    def __init__(
        self,
        compiled: Any,
        weights: Mapping[str, Buffer],
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        alone: Alone | None = None,
        number: int = 0,
        timing: Timing | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts a compiled graph: the one with this `number`, if several were compiled together."""
        self.timing, self.facts = timing, dict(facts or {})
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._compiled = compiled
        # MAX uses the memory of the weights in place: they have to live as long as the model.
        self._weights = dict(weights)
        self._checked: Any = None  # dtypes and shapes of the last inputs, which are usually the same again
        devices = accelerators(*inputs, *outputs)
        self._devices = {"cpu": CPU(), **{name: device_of(name) for name in devices}}
        self._alone, self._number = alone, number
        # Bypasses `execute`'s own checks of the inputs: `__call__` does them, and a call may take only microseconds.
        self._execute: Any
        if alone:
            self._execute = alone.bind(kinds.execute_of(compiled, number), self._weights)
        else:
            models = list(session_of(devices).init_all(compiled, weights_registry=self._weights).values())
            self._execute = models[number]._execute_device_tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Args:
            args, kwargs: The inputs, by position or by name: NumPy arrays, or anything with DLPack (tensors of torch, JAX
                and MLX, `max.driver.Buffer`). Contiguous and writeable arrays of NumPy, torch and MAX are not copied;
                all others are copied.

        Returns:
            One array, or a tuple if the model has several outputs: NumPy arrays for NumPy inputs, otherwise
            `max.driver.Buffer`, which supports DLPack. bfloat16 is always a Buffer, since NumPy lacks it.

        Raises:
            TypeError, ValueError: Before anything runs: wrong number, names, dtypes or shapes of the inputs, or an
                input that is too short for the network.
            RuntimeError: In a forked child, where MAX would hang. `compile` and `load` raise it, too.
        """
        check_fork("model")
        values = list(args) if len(args) == len(self.inputs) and not kwargs else self._bind(args, kwargs)
        buffers = [buffer_of(value, "model: input", port.name) for value, port in zip(values, self.inputs, strict=True)]
        kinds = [(buffer.dtype, buffer.shape) for buffer in buffers]
        if kinds != self._checked:
            check_inputs(self.inputs, self.outputs, kinds)
            self._checked = kinds
        if accelerator_count():
            buffers = [buffer.to(self._devices[port.device]) for buffer, port in zip(buffers, self.inputs, strict=True)]
        try:
            results = first_run(self._execute, buffers)
        except (ValueError, RuntimeError) as error:
            # MAX puts the kernels' one-sentence errors into a page of text about the graph.
            if sentence := re.search(r"^(conv1d|conv_transpose1d|lstm|silero_vad): .*$", str(error), re.MULTILINE):
                raise ValueError(sentence.group()) from None
            # MAX allocates an output before its kernel can check sizes.
            if "Memory allocation failed" in str(error):
                raise ValueError(
                    "model: an output does not fit into memory, or would have a negative length because the input is "
                    "shorter than a filter reaches; pass a smaller batch or a longer input."
                ) from None
            raise
        if all([isinstance(value, ARRAYS) for value in values]):
            results = [r if r.dtype in NOT_IN_NUMPY else r.to_numpy() for r in results]
        return results[0] if len(results) == 1 else tuple(results)

    def stream(self, batch: int = 1, state: Mapping[str, Any] | None = None) -> Stream:
        """Returns new live signals, which are pushed chunk by chunk. Any number of streams can share a model.

        Args:
            batch: How many signals there are.
            state: The result of `Stream.state`, to go on from there, in this process or another one.

        Raises:
            TypeError: If the model was not compiled from a live graph, `max_conv.streaming(...)`.
            ValueError: If the state belongs to another model.

        >>> import numpy as np
        >>> from max.dtype import DType
        >>> import max_conv
        >>> layer = max_conv.Conv1D(3, 1, 1, DType.float32, padding=1)
        >>> layer.load_state_dict({"weight": np.ones((3, 1, 1), np.float32)})
        >>> stream = max_conv.compile(max_conv.streaming(layer)).stream()
        >>> stream.push(np.ones((1, 3, 1), np.float32)).ravel(), stream.flush().ravel()
        (array([2., 3.], dtype=float32), array([2.], dtype=float32))
        """
        if self.timing is None:
            raise TypeError(
                "model: was not compiled from a live graph; compile max_conv.streaming(...) of the network to stream."
            )
        if state is not None:
            batch = len(state["ticks"])
        chunks = [
            live_array(port, axis, self.timing.tick) for port, axis in zip(self.inputs, self.timing.axes, strict=False)
        ]
        results = [
            live_array(port, signal.axis) for port, signal in zip(self.outputs, self.timing.outputs, strict=False)
        ]
        stream = Stream(self, self.timing, chunks, results, batch)
        if state is not None:
            stream.put(range(batch), state)
        return stream

    def save(self, path: str | os.PathLike) -> None:
        """Writes the compiled model with its weights to one file, which `load` reads without compiling.

        A temporary file next to `path` is written first and then renamed, so `path` is never half a model.
        """
        parts = (
            self._compiled,
            self._weights,
            self.inputs,
            self.outputs,
            self._alone,
            self._number,
            self.timing,
            self.facts,
        )
        saved.write(path, saved.Parts(*parts))

    def __repr__(self) -> str:
        inputs = ", ".join(f"{port.name}: {port.dtype}{port}" for port in self.inputs)
        outputs = ", ".join(f"{port.name}: {port.dtype}{port}" for port in self.outputs)
        return f"Model({inputs}) -> {outputs}"

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        names = [port.name for port in self.inputs]
        if len(args) > len(names):
            raise TypeError(f"model: takes {len(names)} inputs ({', '.join(names)}), but got {len(args)}.")
        values = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in names:
                raise TypeError(f"model: has no input {name!r}; its inputs are {', '.join(names)}.")
            if name in values:
                raise TypeError(f"model: input {name!r} came twice, by position and by name.")
            values[name] = value
        if missing := [name for name in names if name not in values]:
            raise TypeError(f"model: input {missing[0]!r} is missing; the inputs are {', '.join(names)}.")
        return [values[name] for name in names]


def compile(
    model: nn.Module | Callable[..., Any] | Graph,
    inputs: Mapping[str, TensorType] | Sequence[TensorType] | Sequence[str] | None = None,
    *,
    outputs: Sequence[str] | None = None,
    weights: Mapping[str, Any] | None = None,
    exact: bool = False,
    specialise: bool = False,
    tune: Sequence[int | Mapping[str, int]] | None = None,
) -> Model:
    """Compiles a layer, a builder function or a graph into a callable on arrays.

    Filters of a layer, a function or a `PackedGraph` are packed once, in the order in which the kernels read them. In
    any other graph they stay as they are, and the kernels pack them on every call.

    Args:
        model: A `max.nn.Module`; a function from graph values to one or several; or a finished `Graph`.
        inputs: The types of the inputs, by name or in order. Not needed for a module with a method `input_types()`,
            such as `Conv1D`: its batch and length are symbolic. For a `Graph`, optionally the names of its inputs.
        outputs: The names of the outputs; by default the names that the graph's builder gave, or output0, output1 and so on.
        weights: Arrays by weight name. Not needed for layers of this package that have loaded their weights, whether
            alone, in a function, in a `PackedGraph` or inside another module. The model keeps the arrays alive.
        exact: Whether all layers get direct kernels, as with `conv1d(..., exact=True)`. In a finished `Graph` the
            kernels are chosen already: build it with `exact=True` instead.
        specialise: Whether a convolution alone is compiled for its own sizes. Otherwise it runs in the graph of its kind,
            whose sizes are symbolic, and which is compiled once on a machine.
        tune: Lengths of the input for which each layer's kernels are timed first, if this machine has not timed them yet;
            the layers get the fastest. `max_conv.runtime.tune` does the timing; its `lengths` lists all forms.

    Returns:
        A `Model`.

    Raises:
        TypeError, ValueError: If input types or weights are missing; one sentence.

    >>> import numpy as np
    >>> from max.dtype import DType
    >>> from max_conv import Conv1D
    >>> layer = Conv1D(3, 1, 1, DType.float32, padding=1)
    >>> layer.load_state_dict({"weight": np.ones((3, 1, 1), np.float32)})
    >>> compile(layer)(np.ones((1, 4, 1), np.float32)).ravel().tolist()
    [2.0, 3.0, 3.0, 2.0]
    """
    check_fork("compile")
    graph, names, weights = _tuned(tune, model, inputs, weights, exact)
    ports = [port_of(name, value.type) for name, value in zip(names, graph.inputs, strict=True)]
    names = list(
        outputs or getattr(graph, "output_names", ()) or [f"output{i}" for i in range(len(graph.output_types))]
    )
    if len(names) != len(graph.output_types) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"compile: the graph has {len(graph.output_types)} outputs; pass as many names, not {names}.")
    results = [port_of(name, type_) for name, type_ in zip(names, graph.output_types, strict=True)]
    buffers = registry(graph, weights)
    devices = accelerators(*ports, *results)
    layer = None if specialise or devices else kinds.alone(graph)
    if layer:
        kind = kinds.ready(layer.kind)[0]
        return Model(kind.compiled, buffers, ports, results, layer, kind.number)

    def compile_now() -> Any:
        with slow_compile(graph.name):
            return compile_graphs(graph, devices=devices)

    found = compiled(graph, compile_now)
    timing = graph.timing if isinstance(graph, StreamingGraph) else None
    return Model(found.compiled, buffers, ports, results, number=found.number, timing=timing)


def _tuned(
    lengths: Sequence[int | Mapping[str, int]] | None, model: Any, inputs: Any, weights: Any, exact: bool
) -> tuple[Graph, list[str], Mapping[str, Any]]:
    """Does what `_trace` does, after the kernels of the layers were timed for lengths, if there are any."""
    traced = _trace(model, inputs, weights, exact)
    if lengths is None:
        return traced
    if isinstance(model, Graph):
        raise TypeError(
            "compile: a finished Graph has its kernels already; call max_conv.runtime.tune(graph, lengths), and build it again."
        )
    from .tuning import tune

    tune(traced[0], lengths, again=False)
    return _trace(model, inputs, weights, exact)


def registry(graph: Graph, weights: Mapping[str, Any]) -> dict[str, Buffer]:
    """Returns the weights of a graph for a plain MAX session: packed for a `PackedGraph`, otherwise unchanged.

    Args:
        graph: The finished graph.
        weights: Arrays by weight name. The result may share their memory, and has to outlive the session's model.

    Raises:
        ValueError: If a weight has no value, or a value of another dtype or shape.
        TypeError: If a value is not an array.

    >>> import numpy as np
    >>> from max.engine import InferenceSession
    >>> from max_conv.graphs import conv1d
    >>> weights = {"weight": np.ones((3, 16, 32), np.float32)}
    >>> graph = conv1d.build(conv1d.Config(padding=1), weights)
    >>> model = InferenceSession().load(graph, weights_registry=registry(graph, weights))
    """
    check_fork("compile")
    made = graph.derived if isinstance(graph, PackedGraph) else {}
    read = {name: entry.weight for name, entry in getattr(graph, "_weights", {}).items()}
    sources = {source.name: source for entry in made.values() for source in entry.sources}
    wanted = {name: weight for name, weight in (read | sources).items() if name not in made}
    buffers = _fitting(wanted, weights)
    for name, entry in made.items():
        buffers[name] = entry.make(*(buffers[source.name] for source in entry.sources))
    return {name: buffer for name, buffer in buffers.items() if name in read or name not in sources}


def _fitting(wanted: Mapping[str, Weight], weights: Mapping[str, Any]) -> dict[str, Buffer]:
    """Returns the weights' memory, or raises an error if it does not fit: MAX would use it without a check."""
    buffers = {name: buffer_of(value, "compile: weight", name) for name, value in weights.items()}
    for name, weight in wanted.items():
        if name not in buffers:
            raise ValueError(f"compile: the weight {name!r} has no value; pass it in weights=.")
        value = buffers[name]
        want = f"{weight.dtype.name} of shape {tuple(int(n) for n in weight.shape)}"
        if (got := f"{value.dtype.name} of shape {tuple(value.shape)}") != want:
            raise ValueError(f"compile: the weight {name!r} must be {want}, but is {got}.")
    return buffers


def load(path: str | os.PathLike) -> Model:
    """Reads a model that `Model.save` wrote, without compiling it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a saved model, or was made for another MAX version, CPU or device.
    """
    check_fork("load")
    return Model(*saved.read(path))


def _trace(model: Any, inputs: Any, weights: Any, exact: bool) -> tuple[Graph, list[str], Mapping[str, Any]]:
    """Returns the graph, the names of its inputs, and its weights."""
    if isinstance(model, Graph):
        if exact and not getattr(model, "exact", False):
            raise TypeError(
                "compile: a finished Graph has its kernels already; build it with exact=True, as a PackedGraph or by its layers."
            )
        own = list(getattr(model, "input_names", ()))
        names = list(inputs or own or [f"input{i}" for i in range(len(model.inputs))])
        if len(names) != len(model.inputs) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"compile: a Graph knows its inputs' types; pass {len(model.inputs)} names, not {names}.")
        loaded = model.loaded() if isinstance(model, PackedGraph) else {}
        return model, names, loaded | dict(weights or {})
    weights = None if weights is None else weight_norm_names(weights)
    if not callable(model):
        raise TypeError(f"compile: takes a layer, a function or a Graph, but got a {type(model).__name__}.")
    name = getattr(model, "__name__", type(model).__name__)
    if inputs is None:
        if not hasattr(model, "input_types"):
            raise TypeError(f"compile: {name} needs the types of its inputs; pass inputs={{'x': TensorType(...)}}.")
        inputs = model.input_types()
    types = list(inputs.values() if isinstance(inputs, Mapping) else inputs)
    names = list(inputs) if isinstance(inputs, Mapping) else argument_names(model, len(types))
    if isinstance(model, nn.Module):
        if weights is None:
            weights = _own_weights(name, model)
        else:  # MAX's own layers keep the arrays that were passed to them
            weights = {name: buffer_of(value, "compile: weight", name) for name, value in weights.items()}
        model.load_state_dict(weights)
        weights = model.state_dict(auto_initialize=False)
    graph = PackedGraph(name, model, input_types=types, exact=exact)
    return graph, names, graph.loaded() | dict(weights or {})


def _own_weights(name: str, model: nn.Module) -> dict[str, Any]:
    """Returns the values that the module, or a layer inside it, has loaded."""
    values: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        for weight, value in module._weight_values.items():
            values.setdefault(prefix + weight, value)
    wanted = model.raw_state_dict()
    if missing := [weight for weight in wanted if weight not in values]:
        raise ValueError(
            f"compile: the weight {missing[0]!r} of {name} has no value; call load_state_dict or pass weights=."
        )
    return {weight: values[weight] for weight in wanted}
