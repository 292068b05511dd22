"""Every error sentence of the convolutions and their layers, one row each; a `raise` without a row fails."""

import ast
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max.driver import Buffer
from max.dtype import DType
from max.graph import BufferType, DeviceRef, Graph, TensorType, TensorValue, ops
from max_conv.graphs import silero_vad

import max_conv
from harness import HOST, is_one_sentence, normal
from max_conv import Conv1D, ConvTranspose1D, ConvTranspose1d, WeightNormConv1D, conv1d, conv_transpose1d
from max_conv.conv.graph import custom_op
from max_conv.conv.layouts import permutation
from max_conv.conv.ops import Form, emit
from max_conv.conv.processor import has_tiles
from max_conv.conv.recurrent import lstm

PACKAGE = Path(max_conv.__file__).parent / "conv"
CHECKED = ("layouts.py", "geometry.py", "checks.py", "ops.py", "nn.py", "weight_norm.py", "recurrent.py")
SOURCES = {path.name: path for path in [*(PACKAGE / name for name in CHECKED), Path(silero_vad.__file__)]}
F32 = DType.float32
GPU = DeviceRef.GPU(0)

Operand = Sequence[Any] | TensorType
Row = tuple[Callable[[], Any], type[Exception], str]


def op(
    x: Operand = ("n", "l", 12),
    w: Operand = (3, 12, 8),
    bias: Operand | None = None,
    function: Callable = conv1d,
    **kwargs: Any,
) -> Callable:
    """Calls `conv1d` on graph inputs of these shapes."""

    def call() -> None:
        operands = [x, w] if bias is None else [x, w, bias]
        types = [o if isinstance(o, TensorType) else TensorType(F32, list(o), HOST) for o in operands]
        with Graph("errors", input_types=types) as graph:
            function(*[value.tensor for value in graph.inputs], **kwargs)

    return call


def transposed(
    x: Operand = ("n", "l", 12), w: Operand = (3, 8, 12), bias: Operand | None = None, **kwargs: Any
) -> Callable:
    """Calls `conv_transpose1d` on graph inputs of these shapes."""
    return op(x, w, bias, conv_transpose1d, **kwargs)


def memory(**changed: Operand) -> Callable:
    """Calls `lstm` on graph inputs of these shapes."""

    def call() -> None:
        operands: dict[str, Operand] = {"x": (2, 5, 3), "w_ih": (3, 16), "w_hh": (4, 16), "bias": (16,)}
        operands |= {"hidden": (2, 4), "cell": (2, 4), **changed}
        types = [o if isinstance(o, TensorType) else TensorType(F32, list(o), HOST) for o in operands.values()]
        with Graph("errors", input_types=types) as graph:
            lstm(*[value.tensor for value in graph.inputs])

    return call


def other_spectrum() -> None:
    """Compiles Silero's network with filters that are not waves, in a graph that was built for filters that are."""
    shapes = silero_vad.Config().shapes()
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    graph = silero_vad.build(silero_vad.Config(), weights)
    max_conv.compile(graph, weights=weights | {"stft_conv.weight": np.ones(shapes["stft_conv.weight"], np.float32)})


def two_layers() -> None:
    first, second = (Conv1D(3, 8, 8, F32) for _ in range(2))
    Graph("errors", lambda x: second(first(x)), input_types=[TensorType(F32, (1, 9, 8), HOST)])


def layer(kernel_size: Any = 3, in_channels: Any = 12, out_channels: Any = 8, **kwargs: Any) -> Callable:
    return lambda: Conv1D(kernel_size, in_channels, out_channels, F32, **kwargs)


def array_as(name: str) -> Callable:
    """Calls `conv1d` with an array where a graph value belongs."""

    def call() -> None:
        with Graph("errors", input_types=[TensorType(F32, shape, HOST) for shape in ([1, 9, 12], [3, 12, 8])]) as graph:
            x, w = (value.tensor for value in graph.inputs)
            operands: dict[str, Any] = {"x": x, "filter": w}
            conv1d(**operands | {name: np.ones((3, 12, 8), np.float32)})

    return call


def ragged(dtype: DType = DType.int64, shape: Sequence[int] = (2,), x: Sequence[int] = (2, 9, 12)) -> Callable:
    """Calls `conv1d` with lengths of this dtype and shape."""

    def call() -> None:
        types = [TensorType(F32, x, HOST), TensorType(F32, [3, 12, 8], HOST), TensorType(dtype, shape, HOST)]
        with Graph("errors", input_types=types) as graph:
            x_, w, lengths = (value.tensor for value in graph.inputs)
            conv1d(x_, w, lengths=lengths)

    return call


def remembering() -> None:
    """Builds a live graph whose LSTM begins with a given memory."""

    def network(x: TensorValue) -> TensorValue:
        w_ih, w_hh, bias, memory = (
            ops.constant(normal(*s), F32, device=HOST) for s in [(3, 16), (4, 16), (16,), (2, 4)]
        )
        return lstm(x, w_ih, w_hh, bias, memory, memory)[0]

    max_conv.streaming(network, [TensorType(F32, [2, "length", 3], HOST)])


ROWS: dict[str, Row] = {
    "lengths-dtype": (ragged(DType.int32), TypeError, "conv1d: lengths must be int64, but is int32; cast it first."),
    "lengths-shape": (ragged(shape=(3,)), ValueError, "conv1d: lengths must have shape (2,), but has (3,)."),
    "lengths-unbatched": (
        ragged(x=(9, 12)),
        ValueError,
        "conv1d: lengths needs a batch axis in x, which has shape (9, 12).",
    ),
    "lstm-live": (
        remembering,
        ValueError,
        "streaming: an LSTM with hidden= and cell= starts anew in every call; leave them out.",
    ),
    # layouts.py
    "layout": (op(layout="NHC"), ValueError, "conv1d: layout must be one of NLC, NCL, but is 'NHC'."),
    "filter_layout": (
        op(filter_layout="OIK"),
        ValueError,
        "conv1d: filter_layout must be one of SCF, FCS, FSC, CFS, SFC, but is 'OIK'.",
    ),
    "permutation": (
        lambda: permutation("NLC", "SCF"),
        ValueError,
        "layouts: NLC and SCF do not name the same axes; pass two orders of the same letters.",
    ),
    # geometry.py
    "stride-0": (op(stride=0), ValueError, "conv1d: stride must be at least 1, but is 0."),
    "dilation-negative": (op(dilation=-2), ValueError, "conv1d: dilation must be at least 1, but is -2."),
    "groups-0": (op(groups=0), ValueError, "conv1d: groups must be at least 1, but is 0."),
    "kernel-0": (layer(0), ValueError, "conv1d: kernel_size must be at least 1, but is 0."),
    "in-0": (layer(in_channels=0), ValueError, "conv1d: in_channels must be at least 1, but is 0."),
    "out-0": (layer(out_channels=0), ValueError, "conv1d: out_channels must be at least 1, but is 0."),
    "num_groups-0": (layer(num_groups=0), ValueError, "conv1d: num_groups must be at least 1, but is 0."),
    "stride-float": (op(stride=1.0), TypeError, "conv1d: stride must be an int, but is 1.0 (float)."),
    "stride-tuple": (op(stride=(2,)), TypeError, "conv1d: stride must be an int, but is (2,) (tuple)."),
    "dilation-bool": (op(dilation=True), TypeError, "conv1d: dilation must be an int, but is True (bool)."),
    "groups-string": (op(groups="2"), TypeError, "conv1d: groups must be an int, but is '2' (str)."),
    "padding-float": (op(padding=0.5), TypeError, "conv1d: padding must be an int, but is 0.5 (float)."),
    "padding-none": (op(padding=(1, None)), TypeError, "conv1d: padding must be an int, but is None (NoneType)."),
    "padding_mode": (
        op(padding_mode="edge"),
        ValueError,
        "conv1d: padding_mode must be one of zeros, reflect, replicate, circular, but is 'edge'.",
    ),
    "padding-word": (
        op(padding="full"),
        ValueError,
        'conv1d: padding must be an int, (left, right), "same", "valid" or "causal", but is \'full\'.',
    ),
    "padding-same-stride": (
        op(padding="same", stride=2),
        ValueError,
        'conv1d: padding="same" needs stride 1, but stride is 2; pass the padding as numbers.',
    ),
    "padding-three": (
        op(padding=(1, 2, 3)),
        ValueError,
        "conv1d: padding must be one int or (left, right), but has 3 values: (1, 2, 3).",
    ),
    "padding-negative": (
        op(padding=(2, -1)),
        ValueError,
        "conv1d: padding must not be negative, but is (2, -1); slice the input instead.",
    ),
    "short": (
        op(x=(1, 7, 12), dilation=4, padding=(0, 1)),
        ValueError,
        "conv1d: the filter reaches over 9 positions (kernel_size 3, dilation 4), but the padded input has only 8; "
        "pad more or pass a longer input.",
    ),
    "short-unbatched": (
        op(x=(2, 12)),
        ValueError,
        "conv1d: the filter reaches over 3 positions (kernel_size 3, dilation 1), but the padded input has only 2; "
        "pad more or pass a longer input.",
    ),
    "reflect-wide": (
        op(x=(1, 4, 12), padding=(4, 3), padding_mode="reflect"),
        ValueError,
        "conv1d: padding_mode='reflect' cannot pad (4, 3) from an input of 4 positions; pad less or pass a longer input.",
    ),
    "circular-wide": (
        op(x=(1, 4, 12), padding=(0, 5), padding_mode="circular"),
        ValueError,
        "conv1d: padding_mode='circular' cannot pad (0, 5) from an input of 4 positions; pad less or pass a longer input.",
    ),
    "replicate-nothing": (
        op(x=(1, 0, 12), padding=2, padding_mode="replicate"),
        ValueError,
        "conv1d: padding_mode='replicate' cannot pad (2, 2) from an input of 0 positions; pad less or pass a longer input.",
    ),
    # ops.py
    "x-array": (
        array_as("x"),
        TypeError,
        "conv1d: x must be a graph value, but is a ndarray; call max_conv.compile or a front end to run on arrays.",
    ),
    "filter-array": (
        array_as("filter"),
        TypeError,
        "conv1d: filter must be a graph value, but is a ndarray; call max_conv.compile or a front end to run on arrays.",
    ),
    "bias-array": (
        array_as("bias"),
        TypeError,
        "conv1d: bias must be a graph value, but is a ndarray; call max_conv.compile or a front end to run on arrays.",
    ),
    "x-rank": (
        op(x=(1, 2, 9, 12)),
        ValueError,
        "conv1d: x must have 3 axes (NLC) or 2 (no batch), but has shape (1, 2, 9, 12).",
    ),
    "filter-rank": (
        op(w=(3, 12), filter_layout="FCS"),
        ValueError,
        "conv1d: the filter must have 3 axes (FCS), but has shape (3, 12).",
    ),
    "filter-symbolic": (
        op(w=("k", 12, 8)),
        ValueError,
        "conv1d: the filter's shape must be known when the graph is built, but is (k, 12, 8).",
    ),
    "filter-empty": (
        op(w=(0, 12, 8)),
        ValueError,
        "conv1d: the filter must not be empty, but has shape (0, 12, 8), layout SCF.",
    ),
    "dtype": (
        op(x=TensorType(DType.int32, [1, 9, 12], HOST)),
        TypeError,
        "conv1d: the dtype of x must be one of float32, float64, float16, bfloat16, but is int32.",
    ),
    "filter-dtype": (
        op(w=TensorType(DType.bfloat16, [3, 12, 8], HOST)),
        TypeError,
        "conv1d: x is float32 but the filter is bfloat16; cast one to the other.",
    ),
    "bias-dtype": (
        op(bias=TensorType(DType.float64, [8], HOST)),
        TypeError,
        "conv1d: x is float32 but the bias is float64; cast one to the other.",
    ),
    "filter-device": (
        op(x=TensorType(F32, [1, 9, 12], GPU)),
        ValueError,
        "conv1d: x is on gpu:0 but the filter is on cpu:0; move one to the other.",
    ),
    "bias-device": (
        op(bias=TensorType(F32, [8], GPU)),
        ValueError,
        "conv1d: x is on cpu:0 but the bias is on gpu:0; move one to the other.",
    ),
    "bias-shape": (
        op(bias=(12,)),
        ValueError,
        "conv1d: the bias must have shape (8,), one value per filter, but has (12,).",
    ),
    "bias-rank": (
        op(bias=(1, 8)),
        ValueError,
        "conv1d: the bias must have shape (8,), one value per filter, but has (1, 8).",
    ),
    "groups-filters": (
        op(w=(3, 4, 8), groups=3),
        ValueError,
        "conv1d: groups=3 must divide the 8 filters (filter shape (3, 4, 8), layout SCF).",
    ),
    "groups-channels": (
        op(x=("n", 10, "l"), w=(8, 4, 3), groups=4, layout="NCL", filter_layout="FCS"),
        ValueError,
        "conv1d: groups=4 must divide the 10 channels of x (shape (n, 10, l), layout NCL).",
    ),
    "channels": (
        op(x=("n", "l", 12), w=(3, 5, 9), groups=3),
        ValueError,
        "conv1d: the filter takes 4 channels per group (x has 12 channels, groups=3) but has 5 "
        "(filter shape (3, 5, 9), layout SCF).",
    ),
    "groups-channels-unbatched": (
        op(x=("l", 10), w=(3, 4, 8), groups=4),
        ValueError,
        "conv1d: groups=4 must divide the 10 channels of x (shape (l, 10), layout LC).",
    ),
    "causal padding beyond the limit": (
        op(padding="causal", dilation=2**30),
        ValueError,
        "conv1d: padding='causal' would add 2147483648 positions, but must add fewer than 2**31; lower dilation or kernel_size.",
    ),
    "two layers without a name": (
        two_layers,
        ValueError,
        "conv1d: the graph has another weight named 'weight'; give each layer a different name with name=.",
    ),
    "limit": (
        op(dilation=2**62),
        ValueError,
        "conv1d: dilation must be between -2**31 and 2**31, but is 4611686018427387904.",
    ),
    "padding-bytes": (
        op(padding=b"ab"),
        TypeError,
        "conv1d: padding must be an int, but is b'ab' (bytes).",
    ),
    # nn.py
    "layer-dtype": (
        lambda: Conv1D(3, 12, 8, DType.int32),
        TypeError,
        "conv1d: dtype must be one of float32, float64, float16, bfloat16, but is int32.",
    ),
    "layer-dtype-name": (
        lambda: Conv1D(3, 12, 8, "float32"),  # type: ignore[arg-type]
        TypeError,
        "conv1d: dtype must be one of float32, float64, float16, bfloat16, but is 'float32'.",
    ),
    "num_groups-in": (
        layer(num_groups=8),
        ValueError,
        "conv1d: 8 groups must divide in_channels=12 and out_channels=8.",
    ),
    "num_groups-out": (
        layer(num_groups=3),
        ValueError,
        "conv1d: 3 groups must divide in_channels=12 and out_channels=8.",
    ),
    # The same rules, and the rules of transposed convolution.
    "transposed-layout": (
        transposed(layout="NHC"),
        ValueError,
        "conv_transpose1d: layout must be one of NLC, NCL, but is 'NHC'.",
    ),
    "transposed-filter_layout": (
        transposed(filter_layout="FCS"),
        ValueError,
        "conv_transpose1d: filter_layout must be one of SFC, CFS, FSC, but is 'FCS'.",
    ),
    "transposed-stride": (
        transposed(stride=0),
        ValueError,
        "conv_transpose1d: stride must be at least 1, but is 0.",
    ),
    "transposed-groups": (
        transposed(groups=5),
        ValueError,
        "conv_transpose1d: groups=5 must divide the 12 channels (filter shape (3, 8, 12), layout SFC).",
    ),
    "transposed-groups-FSC": (
        transposed(w=(8, 3, 12), groups=3, filter_layout="FSC"),
        ValueError,
        "conv_transpose1d: groups=3 must divide the 8 filters (filter shape (8, 3, 12), layout FSC).",
    ),
    "transposed-channels": (
        transposed(w=(3, 8, 10)),
        ValueError,
        "conv_transpose1d: the filter takes 12 channels per group (x has 12 channels, groups=1) but has 10 "
        "(filter shape (3, 8, 10), layout SFC).",
    ),
    "transposed-bias": (
        transposed(bias=(8,), groups=2),
        ValueError,
        "conv_transpose1d: the bias must have shape (16,), one value per filter, but has (8,).",
    ),
    "transposed-padding": (
        transposed(padding="same"),
        ValueError,
        "conv_transpose1d: padding must be an int, (left, right) or \"causal\", but is 'same'.",
    ),
    "transposed-padding-negative": (
        transposed(padding=(0, -1)),
        ValueError,
        "conv_transpose1d: padding must not be negative, but is (0, -1); slice the input instead.",
    ),
    "output_padding": (
        transposed(stride=2, dilation=3, output_padding=3),
        ValueError,
        "conv_transpose1d: output_padding must be at least 0 and less than stride or dilation, but is 3 with stride 2 "
        "and dilation 3.",
    ),
    "output_size": (
        transposed(x=(1, 9, 12), stride=2, output_size=17),
        ValueError,
        "conv_transpose1d: output_size must be between 19 and 20 for an input of 9 positions, but is 17.",
    ),
    "output_size-0": (
        transposed(output_size=0),
        ValueError,
        "conv_transpose1d: output_size must be at least 1, but is 0.",
    ),
    "transposed-empty": (
        transposed(x=(1, 0, 12)),
        ValueError,
        "conv_transpose1d: x must have at least 1 position, but has 0.",
    ),
    "transposed-nothing": (
        transposed(x=(1, 2, 12), padding=2),
        ValueError,
        "conv_transpose1d: padding (2, 2) takes off all of the 4 outputs of 2 positions; pad less.",
    ),
    "transposed-layer-groups": (
        lambda: ConvTranspose1D(3, 12, 8, F32, num_groups=3),
        ValueError,
        "conv_transpose1d: 3 groups must divide in_channels=12 and out_channels=8.",
    ),
    "transposed-pair": (
        lambda: ConvTranspose1d(3, 12, 8, F32, stride=(2, 2)),
        ValueError,
        "conv_transpose1d: stride must be an int or (1, int), but is (2, 2).",
    ),
    # weight_norm.py
    "dim": (
        lambda: WeightNormConv1D(3, 12, 8, F32, dim=3),
        ValueError,
        "conv1d: dim must be None or an axis of the filter, -3 to 2, but is 3.",
    ),
    # recurrent.py
    "lstm-dtype": (
        memory(x=TensorType(DType.int32, [2, 5, 3], HOST)),
        TypeError,
        "lstm: x must be one of float32, float64, float16, bfloat16, but is int32; cast it first.",
    ),
    "lstm-dtypes": (
        memory(w_hh=TensorType(DType.float64, [4, 16], HOST)),
        TypeError,
        "lstm: x is float32 but w_hh is float64; cast one to the other.",
    ),
    "lstm-devices": (
        memory(cell=TensorType(F32, [2, 4], GPU)),
        ValueError,
        "lstm: x is on cpu:0 but cell is on gpu:0; move one to the other.",
    ),
    "lstm-rank": (
        memory(x=(2, 3)),
        ValueError,
        "lstm: x must have shape (batch, time, channels), channels known, but has (2, 3).",
    ),
    "lstm-channels": (
        memory(x=(2, 5, "c")),
        ValueError,
        "lstm: x must have shape (batch, time, channels), channels known, but has (2, 5, c).",
    ),
    "lstm-units": (
        memory(w_hh=("h", 16)),
        ValueError,
        "lstm: w_hh must have shape (H, 4H), known when the graph is built, but has (h, 16).",
    ),
    "lstm-bias": (
        memory(bias=(4,)),
        ValueError,
        "lstm: bias must have shape (16) for x of shape (2, 5, 3) and 4 hidden units, but has (4).",
    ),
    # graphs/silero_vad.py
    "silero-spectrum": (
        other_spectrum,
        ValueError,
        "silero_vad: stft_conv.weight is no windowed transform; build the graph with these weights.",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_sentence(name: str) -> None:
    call, error, sentence = ROWS[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == sentence
    assert is_one_sentence(re.sub("^(layouts|lstm|silero_vad|streaming):", "conv1d:", sentence))


def raise_statements() -> set[tuple[str, int]]:
    """Returns the file and line of every `raise` of a sentence in the checked sources."""
    trees = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
    return {
        (name, node.lineno)
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and node.exc
    }


def test_every_raise_has_a_row() -> None:
    hit = set()
    for call, error, _ in ROWS.values():
        with pytest.raises(error) as caught:
            call()
        frame = traceback.extract_tb(caught.value.__traceback__)[-1]
        hit.add((Path(frame.filename).name, frame.lineno))
    assert len(raise_statements()) >= 20
    assert not (unproved := raise_statements() - hit), f"no row for {sorted(unproved)}"


@pytest.mark.parametrize("batch", [[], [1]], ids=["unbatched", "batched"])
def test_nothing_is_emitted_before_an_error(batch: list[int]) -> None:
    types = [TensorType(F32, shape, HOST) for shape in ([*batch, 9, 12], [3, 5, 8])]
    with Graph("errors", input_types=types) as graph:
        x, w = (value.tensor for value in graph.inputs)
        before = str(graph)
        for arguments in ({}, {"stride": 0}, {"padding": "full"}, {"groups": 3}, {"padding_mode": "edge"}):
            with pytest.raises(ValueError, match="conv1d: "):
                conv1d(x, w, **arguments)
            assert str(graph) == before


# Errors that only appear at run time: one graph; each row makes one input wrong.

GEOMETRY = {"stride": 1, "dilation": 1, "left": 0, "right": 0, "mode": 0, "groups": 1}
GEOMETRY |= {"kernel_size": 3, "depthwise_groups": 8, "lines_stride": 1}
SIZES = {"any": (1, 9, 4), "reflect": (1, 9, 4), "circular": (1, 9, 4), "replicate": (1, 9, 4)}
GEOMETRY |= {"t_stride": 2, "t_dilation": 1, "t_left": 0, "t_right": 0, "t_groups": 1, "t_kernel_size": 4}
SIZES |= {
    "dense_x": (1, 9, 8),
    "depthwise_x": (1, 9, 8),
    "dense_w": (3, 8, 32),
    "packed_w": (1, 6, 256),
    "lines_x": (1, 8, 9),
    "any_up": (1, 9, 4),
    "up_x": (1, 9, 4),
    "phased_w": (2, 4, 16),
    "up_packed_w": (1, 2, 128),
}
OUTPUTS = {"dense": (1, 7, 32), "depthwise": (1, 7, 8), "lines": (1, 8, 7), "up": (1, 20, 8)}
KERNEL_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "short": (
        {"any": (1, 2, 4)},
        "conv1d: the filter reaches over 3 positions, but the padded input has only 2; pad more or pass a longer input",
    ),
    "short-empty-batch": (
        {"any": (0, 1, 4)},
        "conv1d: the filter reaches over 3 positions, but the padded input has only 1; pad more or pass a longer input",
    ),
    "channels-few": (
        {"any": (1, 9, 3)},
        "conv1d: x has 3 channels, but the filter takes 4 for each of 1 groups and gives 8; pass what the graph was built for",
    ),
    "channels-none": (
        {"any": (1, 9, 0)},
        "conv1d: x has 0 channels, but the filter takes 4 for each of 1 groups and gives 8; pass what the graph was built for",
    ),
    # The graph was built with groups=1: twice the channels must not silently become two groups.
    "channels-twice": (
        {"any": (1, 9, 8)},
        "conv1d: x has 8 channels, but the filter takes 4 for each of 1 groups and gives 8; pass what the graph was built for",
    ),
    "reflect": (
        {"reflect": (1, 3, 4)},
        "conv1d: padding of 3 with values of the input needs more than its 3 positions; "
        "pad less or pass a longer input",
    ),
    "circular": (
        {"circular": (1, 4, 4)},
        "conv1d: padding of 5 with values of the input needs more than its 4 positions; "
        "pad less or pass a longer input",
    ),
    "replicate-nothing": (
        {"replicate": (1, 0, 4)},
        "conv1d: padding of 2 with values of the input needs more than its 0 positions",
    ),
    "stride": ({"stride": 0}, "conv1d: kernel_size, stride, dilation and the filter's sizes must be at least 1"),
    "dilation": ({"dilation": 0}, "conv1d: kernel_size, stride, dilation and the filter's sizes must be at least 1"),
    "padding": ({"left": -1}, "conv1d: padding must not be negative"),
    "output": ({"dense": (1, 6, 32)}, "conv1d: the output has 6 positions, not 7"),
    "whole": (
        {"dense_w": (3, 8, 8), "dense": (1, 7, 8)},
        "conv1d: the graph was built for a multiple of 32 filters, not 8 a group",
    ),
    "packed": (
        {"packed_w": (1, 3, 256)},
        "conv1d: the packed filter must have shape (1, 6, 256) for these sizes; pass what max_conv.compile packed",
    ),
    "depthwise": (
        {"depthwise_x": (1, 9, 4), "depthwise_groups": 4},
        "conv1d: the depthwise kernel needs one channel in and one out a group",
    ),
    "depthwise-stride": (
        {"lines_stride": 2, "lines": (1, 8, 4)},
        "conv1d: the depthwise kernel takes NCL data with stride 1 only, not 2",
    ),
    "up-stride": (
        {"t_stride": 0},
        "conv_transpose1d: kernel_size, stride, dilation and the filter's sizes must be at least 1",
    ),
    "up-padding": ({"t_left": -1}, "conv_transpose1d: padding must not be negative"),
    "up-channels": (
        {"any_up": (1, 9, 5)},
        "conv_transpose1d: x has 5 channels, but the filter takes 4 for each of 1 groups and gives 8; "
        "pass what the graph was built for",
    ),
    "up-nothing": ({"any_up": (1, 0, 4)}, "conv_transpose1d: x must have at least 1 position, but has 0"),
    "up-output": (
        {"up": (1, 22, 8)},
        "conv_transpose1d: the output has 22 positions, not 20 to 21; pad less or pass a longer input",
    ),
    "up-packed": (
        {"up_packed_w": (1, 3, 128)},
        "conv_transpose1d: the packed filter must have shape (1, 2, 128) for these sizes; "
        "pass what max_conv.compile packed",
    ),
    "up-phased": (
        {"phased_w": (2, 4, 8)},
        "conv_transpose1d: the packed filter must have shape (2, 4, 16) for these sizes; "
        "pass what max_conv.compile packed",
    ),
}


def convolutions() -> Graph:
    """One convolution per padding mode, with symbolic sizes, and others that are emitted without a check."""
    vector = TensorType(DType.int64, [7], HOST)
    inputs = [TensorType(F32, [f"n{i}", f"l{i}", f"c{i}"], HOST) for i in range(len(SIZES))]
    outputs = [TensorType(DType.int8, [f"n{i}", f"l{i}", f"f{i}"], HOST) for i in range(20, 20 + len(OUTPUTS))]
    with Graph("errors", input_types=[*inputs, *[vector] * 4, *outputs]) as graph:
        values = [value.tensor for value in graph.inputs]
        any_x, reflect_x, circular_x, replicate_x, dense_x, depthwise_x, dense_w, packed_w, lines_x = values[:9]
        any_up_x, up_x, phased_w, up_packed_w, *rest = values[9:]
        numbers, depthwise_numbers, lines_numbers, up_numbers, dense, depthwise, lines, up = rest
        w = ops.constant(normal(3, 4, 8), F32, device=HOST)
        one_a_group = ops.constant(normal(3, 1, 8), F32, device=HOST)
        none = ops.constant([], F32, device=HOST)
        graph.output(
            conv1d(any_x, w),
            conv1d(reflect_x, w, padding=3, padding_mode="reflect"),
            conv1d(circular_x, w, padding=(5, 0), padding_mode="circular"),
            conv1d(replicate_x, w, padding=2, padding_mode="replicate"),
            emit(dense_x, dense_w, none, numbers, dense.shape, Form("dense", "NLC", "SCF", whole=True)),
            emit(
                depthwise_x,
                one_a_group,
                none,
                depthwise_numbers,
                depthwise.shape,
                Form("depthwise", "NLC", "SCF"),
            ),
            emit(
                lines_x,
                one_a_group,
                none,
                lines_numbers,
                lines.shape,
                Form("depthwise", "NCL", "SCF"),
            ),
            emit(dense_x, packed_w, none, numbers, dense.shape, Form("winograd", "NLC", "packed")),
            conv_transpose1d(any_up_x, ops.constant(normal(4, 8, 4), F32, device=HOST), stride=2),
            *(
                emit(up_x, w, none, up_numbers, up.shape, Form(kernel, "NLC", layout, transposed=True))
                for w, kernel, layout in ((phased_w, "lengthwise", "phased"), (up_packed_w, "dense", "packed"))
            ),
        )
    return graph


def graphs() -> dict[str, tuple[Graph, dict[str, Any]]]:
    return {"convolutions": (convolutions(), {}), "recurrent": (recurrent_kernels(), {})}


@pytest.fixture
def model(models: dict[str, max_conv.Model]) -> max_conv.Model:
    return models["convolutions"]


@pytest.fixture
def recurrent(models: dict[str, max_conv.Model]) -> max_conv.Model:
    return models["recurrent"]


def run_raw(model: max_conv.Model, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Runs a model without the checks that it makes before its kernels run."""
    return [y.to_numpy() for y in model._execute([Buffer.from_numpy(array) for array in arrays])]


def run_with(model: max_conv.Model, spoiled: dict[str, Any]) -> list[Any]:
    sizes = [spoiled.get(name, size) for name, size in SIZES.items()]
    g = {name: spoiled.get(name, number) for name, number in GEOMETRY.items()}
    rest = (g["dilation"], g["left"], g["right"], g["mode"])
    up = [g[f"t_{name}"] for name in ("stride", "dilation", "left", "right")]
    vectors = [
        (g["stride"], *rest, g["groups"], g["kernel_size"]),
        (g["stride"], *rest, g["depthwise_groups"], g["kernel_size"]),
        (g["lines_stride"], *rest, g["depthwise_groups"], g["kernel_size"]),
        (*up, 0, g["t_groups"], g["t_kernel_size"]),
    ]
    numbers = [np.array(vector, np.int64) for vector in vectors]
    outputs = [np.zeros(spoiled.get(name, size), np.int8) for name, size in OUTPUTS.items()]
    return run_raw(model, [*[normal(*size) for size in sizes], *numbers, *outputs])


def test_kernel_takes_what_is_right(model: max_conv.Model) -> None:
    shapes = [(1, 7, 8), (1, 13, 8), (1, 12, 8), (1, 11, 8), (1, 7, 32), (1, 7, 8), (1, 8, 7), (1, 7, 32)]
    shapes += [(1, 20, 8)] * 3
    assert [y.shape for y in run_with(model, {})] == shapes
    # The shortest inputs that each mode accepts.
    run_with(model, {"any": (1, 3, 4), "reflect": (1, 4, 4), "circular": (1, 5, 4), "replicate": (1, 1, 4)})


@pytest.mark.parametrize("name", KERNEL_ROWS)
def test_kernel_sentence(name: str, model: max_conv.Model) -> None:
    spoiled, sentence = KERNEL_ROWS[name]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run_with(model, spoiled)


# The inputs of the kernels of `lstm` and of Silero's network; each row makes one input wrong.
RECURRENT = {"gates": (2, 6, 16), "w_hh": (4, 16), "hidden": (2, 4), "cell": (2, 4)}
RECURRENT |= {"chunks": (2, 3, 64), "state": (2, 40), "panels": (3200,), "ragged": (2, 9, 4), "live": (2, 3, 4)}
RECURRENT_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "lstm-batch": ({"gates": (1, 6, 16)}, "lstm: the gates and the weights do not fit an output of 4 units"),
    "lstm-steps": ({"gates": (2, 4, 16)}, "lstm: the gates and the weights do not fit an output of 4 units"),
    "lstm-gates": ({"gates": (2, 6, 20)}, "lstm: the gates and the weights do not fit an output of 4 units"),
    "lstm-units": ({"w_hh": (5, 16)}, "lstm: the gates and the weights do not fit an output of 4 units"),
    "lstm-weights": ({"w_hh": (4, 20)}, "lstm: the gates and the weights do not fit an output of 4 units"),
    "lstm-hidden": ({"hidden": (1, 4)}, "lstm: hidden and cell must both have shape (2, 4)"),
    "lstm-cell": ({"cell": (2, 5)}, "lstm: hidden and cell must both have shape (2, 4)"),
    "silero-chunks": ({"chunks": (2, 0, 64)}, "silero_vad: chunks must hold at least one chunk of each signal."),
    "ragged-batch": ({"ragged": (3, 9, 4)}, "conv1d: lengths must have a value for each of the 3 signals."),
    "ragged-length": ({"ragged": (2, 6, 4)}, "conv1d: a signal of the batch cannot have 9 positions"),
    "live-batch": ({"live": (1, 3, 4)}, "stream: ticks, ends and state must have as many rows as the chunk, 1."),
    "silero-weights": ({"panels": (3199,)}, "silero_vad: the weights do not fit their sizes"),
}


def recurrent_kernels() -> Graph:
    """The kernels of `lstm` and of Silero's network, emitted without a check."""
    types = [
        TensorType(F32, [f"{name}{axis}" for axis in range(len(shape))], HOST) for name, shape in RECURRENT.items()
    ]
    with Graph("recurrent", input_types=types) as graph:
        gates, w_hh, hidden, cell, chunks, state, panels, ragged, live = [value.tensor for value in graph.inputs]
        # Taps, stride, padding and filters of the spectrum and of the gates.
        sizes = ops.constant(np.array([[64, 32, 0, 33], [1, 1, 0, 32]]), DType.int64, device=HOST)
        head, memory = (ops.constant(normal(*size), F32, device=HOST) for size in [(9,), (8, 32)])
        output, last = (TensorType(F32, size, HOST) for size in [(2, 5, 4), (2, 4)])
        probability = TensorType(F32, chunks.shape[:2], HOST)
        reflected = ops.constant(16, DType.int64, device=HOST)
        operands = [chunks, state, sizes, panels, memory, head, reflected]
        numbers = ([9, 5], [0] * 10, [0, 0, 0, 1, *[0] * 6])
        lengths, plan, ticking = (ops.constant(np.array(v), DType.int64, device=HOST) for v in numbers)
        buffer = ops.buffer_create(BufferType(DType.uint8, [2, 64], HOST))
        rows, chunk = TensorType(F32, (2, 9, 4), HOST), TensorType(F32, (2, 3, 4), HOST)
        layout = {"layout": "NLC"}
        graph.output(
            *custom_op("max_conv.ragged_window", HOST, [ragged, lengths, plan], [rows], layout),
            *custom_op("max_conv.window", HOST, [buffer, live, lengths, lengths, ticking], [chunk], layout),
            *custom_op("max_conv.lstm", HOST, [gates, w_hh, hidden, cell], [output, last, last]),
            *custom_op("max_conv.silero_vad", HOST, operands, [probability, state.type]),
        )
    return graph


def run_recurrent(model: max_conv.Model, spoiled: dict[str, Any]) -> list[Any]:
    return run_raw(model, [normal(*spoiled.get(name, shape)) for name, shape in RECURRENT.items()])


def test_recurrent_kernels_take_what_is_right(recurrent: max_conv.Model) -> None:
    shapes = [(2, 9, 4), (2, 3, 4), (2, 5, 4), (2, 4), (2, 4), (2, 3), (2, 40)]
    assert [y.shape for y in run_recurrent(recurrent, {})] == shapes


@pytest.mark.parametrize("name", RECURRENT_ROWS)
def test_recurrent_kernel_sentence(name: str, recurrent: max_conv.Model) -> None:
    spoiled, sentence = RECURRENT_ROWS[name]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run_recurrent(recurrent, spoiled)


REFUSED = "conv1d: the system does not let this process use the processor's tiles (AMX)."
REFUSED_PROGRAM = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

import numpy as np
from max.dtype import DType
import max_conv
from max_conv import Conv1D, PackedGraph
from max_conv.conv import as_buffer
from max_conv.conv.dispatch import only

layer = Conv1D(3, 32, 32, DType.bfloat16)
layer.load_state_dict({"weight": as_buffer(np.zeros((3, 32, 32)), DType.bfloat16)})
with only("amx"):
    graph = PackedGraph("refused", layer, input_types=layer.input_types())
    model = max_conv.compile(graph, weights=graph.loaded())
# Linux refuses tiles to a process in which a stack for signals is too small for them.
memory = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 4096)), None) == 0
try:
    model(as_buffer(np.zeros((1, 50, 32)), DType.bfloat16))
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(not has_tiles(), reason="this processor has no tiles (AMX)")
def test_a_system_without_tiles() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED_PROGRAM], capture_output=True, text=True)
    assert done.stdout.strip() == REFUSED, done.stdout + done.stderr


def test_every_kernel_error_has_a_row() -> None:
    sources = "\n".join(path.read_text() for path in sorted((PACKAGE / "kernels").rglob("*.mojo")))
    starts = re.findall(r'Error\(\s*(?:op,\s*)?"([^"]+)"', sources)
    assert len(starts) == len(re.findall(r"\bError\(", sources)) >= 15, "an error that does not begin with its sentence"
    rows = [REFUSED, *(sentence for _, sentence in [*KERNEL_ROWS.values(), *RECURRENT_ROWS.values()])]
    assert not (unproved := [s for s in starts if not any(s.rstrip(".") in row for row in rows)]), unproved


def test_an_output_of_negative_length(model: max_conv.Model) -> None:
    """MAX allocates the output before the kernel runs, and fails; `max_conv.Model` checks lengths before that."""
    with pytest.raises((ValueError, RuntimeError), match="Memory allocation failed"):
        run_with(model, {"any": (1, 1, 4)})
    x, w = TensorType(F32, ["n", "l", 4], HOST), TensorType(F32, [3, 4, 8], HOST)
    ours = max_conv.compile(lambda x, w: conv1d(x, w), {"x": x, "w": w})
    with pytest.raises(
        ValueError, match=r"^model: input 'x' is too short: its dimension 'l' must be at least 3, but is 1\.$"
    ):
        ours(normal(1, 1, 4), normal(3, 4, 8))
