"""The contenders of bench.py. Each one runs in a separate process.

    python scripts/racers.py RACE CONTENDER THREADS     answers questions on stdin, one line of JSON each

A question names a layer and the file of its float64 output. The reply is the seconds per call, or why there are none.
"""

import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from layers import LAYERS, Data, Layer, from_bits, to_bits


class Call(NamedTuple):
    """A contender's implementation of a layer: a call to time, and its output as an array (N, F, L)."""

    run: Callable[[], Any]
    read: Callable[[Any], np.ndarray] = np.asarray
    expect: Callable[[np.ndarray], np.ndarray] = np.asarray
    """Makes the expected output from the convolution's, if an operation follows it."""


def ours(layer: Layer, data: Data, _: int, permute: bool = False, dtype: str = "float32") -> Call:
    from max.driver import Buffer
    from max.dtype import DType

    import max_conv
    from max_conv.conv import permute as permuted

    def buffer(values: np.ndarray) -> Buffer:
        if dtype == "float32":
            return Buffer.from_numpy(values)
        return Buffer.from_numpy(to_bits(values)).view(DType.bfloat16, list(values.shape))

    def read(y: Buffer) -> np.ndarray:
        wide = y.to_numpy() if dtype == "float32" else from_bits(y.view(DType.uint16, list(y.shape)).to_numpy())
        return permuted(wide, conv.layout, "NCL")

    sizes = (layer.kernel_size, layer.channels, layer.filters)
    if layer.transposed:
        conv: Any = max_conv.ConvTranspose1D(
            *sizes, DType[dtype], *layer.options[:3], num_groups=layer.groups, has_bias=True, permute=permute
        )
    else:
        conv = max_conv.Conv1D(*sizes, DType[dtype], *layer.options, has_bias=True, permute=permute)
    w = permuted(data.w, "CFS" if layer.transposed else "FCS", conv.filter_layout)
    model = max_conv.compile(conv, weights={"weight": buffer(w), "bias": buffer(data.bias)})
    x = buffer(permuted(data.x, "NCL", conv.layout))
    return Call(lambda: model(x), read)


def own(layer: Layer, data: Data, _: int) -> Call:
    """MAX's layer in its own layout, which is its faster one, compiled for exactly these sizes."""
    from max.driver import Buffer
    from max.dtype import DType
    from max.graph import DeviceRef, TensorType
    from max.nn import Conv1D, ConvTranspose1d

    import max_conv
    from max_conv.conv import permute

    sizes = (layer.kernel_size, layer.channels, layer.filters)
    if layer.transposed:
        if layer.groups > 1:
            raise NotImplementedError("max.nn.ConvTranspose1d has no groups")
        conv: Any = ConvTranspose1d(*sizes, DType.float32, *layer.options[:3], device=DeviceRef.CPU(), has_bias=True)
    else:
        conv = Conv1D(*sizes, DType.float32, *layer.options, device=DeviceRef.CPU(), has_bias=True)
    order = ("CFS", "SFC") if layer.transposed else ("FCS", "SCF")
    x = Buffer.from_numpy(permute(data.x, "NCL", "NLC"))
    inputs = {"x": TensorType(DType.float32, list(x.shape), DeviceRef.CPU())}
    model = max_conv.compile(conv, inputs, weights={"weight": permute(data.w, *order), "bias": data.bias})
    return Call(lambda: model(x), lambda y: permute(y.to_numpy(), "NLC", "NCL"))


def pytorch(layer: Layer, data: Data, threads: int, compiled: bool = False, dtype: str = "float32") -> Call:
    import torch

    torch.set_num_threads(threads)
    x, w, bias = (torch.from_numpy(a).to(getattr(torch, dtype)) for a in data)

    def convolve(x: Any) -> Any:
        if layer.transposed:
            return torch.nn.functional.conv_transpose1d(
                x, w, bias, layer.stride, layer.padding, 0, layer.groups, layer.dilation
            )
        return torch.nn.functional.conv1d(x, w, bias, *layer.options)

    call = torch.compile(convolve) if compiled else convolve

    @torch.inference_mode()
    def run() -> Any:
        return call(x)

    return Call(run, lambda y: y.float().numpy())


def onnxruntime(layer: Layer, data: Data, threads: int) -> Call:
    """Bound to its input and output: plain `run` copies them, which made it 2 to 10 % slower."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    sizes: dict[str, Any] = {
        "strides": [layer.stride],
        "pads": [layer.padding] * 2,
        "dilations": [layer.dilation],
    }
    node = helper.make_node(
        "ConvTranspose" if layer.transposed else "Conv", ["x", "w", "b"], ["y"], group=layer.groups, **sizes
    )
    shapes = {"x": data.x.shape, "y": (layer.batch, layer.filters, layer.out_length)}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    weights = [numpy_helper.from_array(data.w, "w"), numpy_helper.from_array(data.bias, "b")]
    graph = helper.make_graph([node], "layer", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    given = onnxruntime.OrtValue.ortvalue_from_numpy(data.x)
    taken = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shapes["y"], np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", given)
    binding.bind_ortvalue_output("y", taken)
    return Call(lambda: session.run_with_iobinding(binding), lambda _: taken.numpy())


def backwards(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Gives OpenVINO's transposed convolutions the arguments of its other convolutions."""

    def build(x: Any, w: Any, strides: list, begin: list, end: list, dilations: list) -> Any:
        return operation(x, w, strides, pads_begin=begin, pads_end=end, dilations=dilations)

    return build


def openvino(layer: Layer, data: Data, threads: int, dtype: str = "float32") -> Call:
    import openvino
    from openvino import opset13 as ops

    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    kind = getattr(openvino.Type, short)
    x = ops.parameter(list(data.x.shape), kind)
    geometry = ([layer.stride], [layer.padding], [layer.padding], [layer.dilation])
    whole, grouped = ops.convolution, ops.group_convolution
    if layer.transposed:
        whole, grouped = backwards(ops.convolution_backprop_data), backwards(ops.group_convolution_backprop_data)
    if layer.groups == 1:
        y = whole(x, ops.constant(data.w, dtype=kind), *geometry)
    else:
        w = data.w.reshape(layer.groups, -1, *data.w.shape[1:])
        y = grouped(x, ops.constant(w, dtype=kind), *geometry)
    model = openvino.Model([ops.add(y, ops.constant(data.bias[:, None], dtype=kind))], [x])
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": short}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    # An input that is set once saves about 10 microseconds of Python per call. It owns its memory: a view of an array
    # would not keep the array alive.
    given = openvino.Tensor(kind, openvino.Shape(data.x.shape))
    if dtype == "float32":
        given.data[...] = data.x
    else:
        given.data.view(np.uint16)[...] = to_bits(data.x)
    request.set_input_tensor(given)

    def read(_: Any) -> np.ndarray:
        values = request.get_output_tensor().data
        return values if dtype == "float32" else from_bits(values.view(np.uint16))

    return Call(lambda: request.infer(share_outputs=True), read)


def jax(layer: Layer, data: Data, _: int) -> Call:
    """The faster of two ways: NLC with constant weights, which won nearly always, and NCL with weights as arguments."""
    import jax

    def convolve(x: Any, w: Any, bias: Any, axes: tuple[str, str, str]) -> Any:
        if layer.transposed:
            # A convolution of the input, with zeros inserted, and the reversed filter, whose channels are regrouped.
            reach = layer.dilation * (layer.kernel_size - 1)
            pads = ((reach - layer.padding,) * 2,)
            return (
                jax.lax.conv_general_dilated(x, w, (1,), pads, (layer.stride,), (layer.dilation,), axes, layer.groups)
                + bias
            )
        geometry = ((layer.stride,), ((layer.padding,) * 2,), (1,), (layer.dilation,))
        return jax.lax.conv_general_dilated(x, w, *geometry, axes, layer.groups) + bias

    w: Any = data.w
    if layer.transposed:
        parts = w.reshape(layer.groups, -1, *w.shape[1:])[..., ::-1]
        w = np.ascontiguousarray(parts.swapaxes(1, 2).reshape(layer.filters, -1, layer.kernel_size))
    x, w, bias = (jax.numpy.asarray(a) for a in (data.x, w, data.bias))
    turned = x.transpose(0, 2, 1), w.transpose(2, 1, 0)
    constant = jax.jit(lambda x: convolve(x, turned[1], bias, ("NHC", "HIO", "NHC")))
    argument = jax.jit(lambda x, w, bias: convolve(x, w, bias[:, None], ("NCH", "OIH", "NCH")))
    nlc = Call(lambda: constant(turned[0]).block_until_ready(), lambda y: np.asarray(y).transpose(0, 2, 1))
    ncl = Call(lambda: argument(x, w, bias).block_until_ready())
    return min((nlc, ncl), key=lambda call: burst(call.run))


WARM_UP = 0.2
"""Seconds of calls before the first burst: if each call gets new memory, the first calls took ten times as long."""

LEAK = 0.1
erf = np.vectorize(math.erf, otypes=[float])
EPILOGUES: dict[str, tuple[Callable[..., Any], Callable[..., np.ndarray]]] = {
    "alone": (lambda _, y: y, lambda y: y),
    "ReLU": (lambda ops, y: ops.relu(y), lambda y: np.maximum(y, 0)),
    "LeakyReLU": (lambda ops, y: ops.max(y, y * LEAK), lambda y: np.maximum(y, LEAK * y)),
    "SiLU": (lambda ops, y: ops.silu(y), lambda y: y / (1 + np.exp(-y))),
    "tanh": (lambda ops, y: ops.tanh(y), np.tanh),
    "GELU tanh": (
        lambda ops, y: ops.gelu(y, "tanh"),
        lambda y: y / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
    ),
    "GELU": (lambda ops, y: ops.gelu(y), lambda y: y / 2 * (1 + erf(y / math.sqrt(2)))),
    "residual": (lambda _, y, other: y + other, lambda y, other: y + other),
}
"""The operations that may follow a convolution: with `max.graph.ops` on graph values, and in float64 on arrays."""


def followed(layer: Layer, data: Data, _: int, epilogue: str) -> Call:
    """Ours, NLC, and an operation after it in the graph, compiled for exactly these sizes."""
    from max.driver import Buffer
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType, ops

    import max_conv
    from max_conv.conv import permute

    emit, expect = EPILOGUES[epilogue]
    arrays = [permute(data.x, "NCL", "NLC")]
    if epilogue == "residual":
        shape = (layer.batch, layer.out_length, layer.filters)
        arrays.append(np.random.default_rng(1).standard_normal(shape, np.float32))
    conv = max_conv.Conv1D(
        layer.kernel_size, layer.channels, layer.filters, DType.float32, *layer.options, has_bias=True
    )
    conv.load_state_dict({"weight": permute(data.w, "FCS", "SCF"), "bias": data.bias})
    types = [TensorType(DType.float32, list(a.shape), DeviceRef.CPU()) for a in arrays]
    with Graph("followed", input_types=types) as graph:
        x, *others = (value.tensor for value in graph.inputs)
        graph.output(emit(ops, conv(x), *others))
    model = max_conv.compile(graph, weights=conv.state_dict())
    buffers = [Buffer.from_numpy(a) for a in arrays]
    twins = [permute(a, "NLC", "NCL") for a in arrays[1:]]
    return Call(lambda: model(*buffers), lambda y: permute(y.to_numpy(), "NLC", "NCL"), lambda y: expect(y, *twins))


class Contender(NamedTuple):
    """A contender: the packages that it needs (the first has its version), and the function that builds it."""

    packages: Sequence[str]
    build: Callable[[Layer, Data, int], Call]


class Race(NamedTuple):
    """The contenders, the one whose GFLOP/s are shown, and the times that are divided: None means the best peer's time."""

    dtype: str
    contenders: dict[str, Contender]
    main: str
    ratios: dict[str, tuple[str | None, str]]
    tolerance: float
    """The largest error allowed, relative to the largest value."""


part = functools.partial
OURS = ("max-conv", "max")
RACES = {
    "float32": Race(
        "float32",
        {
            "max_conv NLC": Contender(OURS, ours),
            "max_conv NCL": Contender(OURS, part(ours, permute=True)),
            "PyTorch": Contender(("torch",), pytorch),
            "torch.compile": Contender(("torch",), part(pytorch, compiled=True)),
            "ONNX Runtime": Contender(("onnxruntime", "onnx"), onnxruntime),
            "OpenVINO": Contender(("openvino",), openvino),
            "JAX": Contender(("jax",), jax),
            "MAX": Contender(("max",), own),
        },
        "max_conv NLC",
        {"best peer / NLC": (None, "max_conv NLC"), "best peer / NCL": (None, "max_conv NCL")},
        2e-5,
    ),
    "bfloat16": Race(
        "bfloat16",
        {
            "max_conv NLC": Contender(OURS, ours),
            "max_conv NLC bf16": Contender(OURS, part(ours, dtype="bfloat16")),
            "PyTorch bf16": Contender(("torch",), part(pytorch, dtype="bfloat16")),
            "OpenVINO bf16": Contender(("openvino",), part(openvino, dtype="bfloat16")),
        },
        "max_conv NLC bf16",
        {
            "best peer / bf16": (None, "max_conv NLC bf16"),
            "float32 / bf16": ("max_conv NLC", "max_conv NLC bf16"),
        },
        2e-2,
    ),
    "epilogues": Race(
        "float32",
        {f"max_conv {name}": Contender(OURS, part(followed, epilogue=name)) for name in EPILOGUES},
        "max_conv alone",
        {name: (f"max_conv {name}", "max_conv alone") for name in EPILOGUES},
        2e-5,
    ),
}


def burst(call: Callable[[], Any], seconds: float = 0.05) -> float:
    """Returns the median seconds per call, of calls that together fill `seconds`."""
    times: list[float] = []
    call()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """Returns the error of an output (N, F, L), relative to the largest value; NaN if the output has NaN."""
    if got.shape != want.shape:
        return math.inf
    filters = range(want.shape[1])  # one at a time: the longest layers fill gigabytes in float64
    return float(np.max([np.abs(got[:, f] - want[:, f]).max() for f in filters]) / np.abs(want).max())


def verify(call: Call, want: np.ndarray, tolerance: float) -> str | None:
    """Returns what is wrong with three outputs in a row: a call that reads foreign memory may be right by luck."""
    for _ in range(3):
        off = distance(call.read(call.run()), want)
        if not off <= tolerance:
            return f"off by {off:.1e} of the largest value"
    return None


def work(race: Race, contender: Contender, threads: int) -> None:
    """Answers questions on stdin until it is closed."""
    # Text that libraries print would be read as a reply.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    current, call = None, None
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if question["layer"] != current or call is None:
                current, call = question["layer"], None  # frees the last layer's memory first
                call = contender.build(LAYERS[current], LAYERS[current].data(race.dtype), threads)
                want = call.expect(np.load(question["reference"], mmap_mode="r"))
                if wrong := verify(call, want, race.tolerance):
                    answer = {"failed": "wrong", "why": wrong}
                del want
                burst(call.run, WARM_UP)
            answer = answer or {"seconds": burst(call.run)}
        except Exception as error:
            words = str(error).strip() or type(error).__name__
            answer = {"failed": "refused", "why": words.splitlines()[0][:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    chosen = RACES[sys.argv[1]]
    work(chosen, chosen.contenders[sys.argv[2]], int(sys.argv[3]))
