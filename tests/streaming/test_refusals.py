"""Networks that cannot run live, or on signals of different length, are refused in one sentence. Nothing is compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from max.dtype import DType
from max.graph import DeviceRef, Dim, TensorType, TensorValue, Weight, ops
from max_conv.graphs import (
    crepe,
    dac,
    encodec,
    hifigan,
    mamba,
    pesto,
    silero_vad,
    tcn,
    univnet,
    vocos,
    wav2vec2,
    whisper,
)

import max_conv
from max_conv import PackedGraph, conv1d, conv_transpose1d
from max_conv.conv import signals
from max_conv.streaming import RaggedGraph
from max_conv.streaming.positions import ALONG, ELEMENTWISE, ONE_SIGNAL, OTHER_AXES, OVER_CHANNELS

F32, CPU = DType.float32, DeviceRef.CPU()
X = [TensorType(F32, ["batch", "length", 8], CPU)]


def weight(*shape: int) -> Weight:
    return Weight("w" + "x".join(map(str, shape)), F32, shape, CPU)


def constant(*shape: int) -> TensorValue:
    return ops.constant(np.ones(shape, np.float32), F32, device=CPU)


def positions(x: TensorValue) -> TensorValue:
    return x + ops.cast(
        ops.unsqueeze(ops.range(0, x.shape[1], 1, out_dim=x.shape[1], dtype=DType.int64, device=CPU), 1), F32
    )


def attention(x: TensorValue) -> TensorValue:
    return ops.softmax(x @ ops.transpose(x, 1, 2)) @ x


NEEDS = "it needs the whole signal."
BOTH: dict[str, tuple[Callable[[TensorValue], TensorValue], str]] = {
    "mean": (lambda x: x - ops.mean(x, 1), f"mean goes over positions; {NEEDS}"),
    "max": (lambda x: ops.max(x, axis=1), f"max goes over positions; {NEEDS}"),
    "softmax": (lambda x: ops.softmax(x, axis=1), f"softmax goes over positions; {NEEDS}"),
    "cumsum": (lambda x: ops.cumsum(x, axis=1), f"cumsum goes over positions; {NEEDS}"),
    "layer norm": (
        lambda x: ops.layer_norm(ops.reshape(x, [x.shape[0], 8, x.shape[1]]), constant(8), constant(8), 1e-5),
        f"reshape goes over positions; {NEEDS}",
    ),
    "attention": (
        attention,
        f"a product of two values with positions, such as attention, goes over positions; {NEEDS}",
    ),
    "first position": (lambda x: x - x[:, :1], f"slice goes over positions; {NEEDS}"),
    "all but one": (lambda x: x[:, 1:], f"slice goes over positions; {NEEDS}"),
    "flattened": (lambda x: ops.flatten(x, 1, 2), f"reshape goes over positions; {NEEDS}"),
    "twice as long": (lambda x: ops.concat([x, x], axis=1), f"concat goes over positions; {NEEDS}"),
    "padded": (lambda x: ops.pad(x, [0, 0, 1, 0, 0, 0]), f"pad goes over positions; {NEEDS}"),
    "absolute positions": (
        positions,
        "range makes a value for every position from what is no signal; use signals().ones_like.",
    ),
    "top k": (
        lambda x: ops.top_k(x, 2, axis=-1)[0],
        "top_k is not known to keep positions apart; compute it on the whole signal, outside the graph.",
    ),
    "pooling": (
        lambda x: ops.squeeze(ops.avg_pool2d(ops.unsqueeze(x, 1), (1, 1)), 1),
        "avg_pool is not known to keep positions apart; compute it on the whole signal, outside the graph.",
    ),
}
LIVE: dict[str, tuple[Callable[[TensorValue], TensorValue], str]] = {
    "circular": (
        lambda x: conv1d(x, weight(3, 8, 8), padding=1, padding_mode="circular"),
        'padding_mode="circular" puts the end of a signal before its begin; use another mode.',
    ),
    "output_size": (
        lambda x: conv_transpose1d(x, weight(4, 8, 8), stride=2, output_size=40),
        "output_size fixes the length of a signal; use output_padding.",
    ),
    "two rates": (
        lambda x: x @ ops.transpose(conv1d(x, weight(2, 8, 8), stride=2), 1, 2),
        "values with 1 and 2 positions a tick meet; they cannot be joined.",
    ),
    "no signal": (
        lambda x: constant(1, 3, 8),
        "a value that must be a signal has no positions; compute it outside the graph.",
    ),
}


@pytest.mark.parametrize("name", [*BOTH, *LIVE])
def test_what_cannot_run_live_is_refused(name: str) -> None:
    function, message = (BOTH | LIVE)[name]
    with pytest.raises(ValueError) as error:
        max_conv.streaming(function, X)
    assert str(error.value) == f"streaming: {message}"


@pytest.mark.parametrize("name", list(BOTH))
def test_what_cannot_run_on_a_ragged_batch_is_refused(name: str) -> None:
    function, message = BOTH[name]
    graph = RaggedGraph("ragged", input_types=X)
    with pytest.raises(ValueError) as error, graph:
        graph.output(function(graph.inputs[0].tensor))
    assert str(error.value) == f"ragged: {message}"


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ([TensorType(F32, [1, 30, 8], CPU)], "input 0 must have a batch axis and one other axis of symbolic size"),
        ([TensorType(F32, ["batch", "a", "b"], CPU)], "input 0 must have a batch axis and one other axis"),
        ([X[0], TensorType(F32, ["batch", "other", 8], CPU)], "all inputs must have equally many positions"),
    ],
)
def test_inputs_that_are_no_signals(types: Sequence[TensorType], message: str) -> None:
    with pytest.raises(ValueError, match=f"^streaming: {message}"):
        max_conv.streaming(lambda *values: values[0], types)


def test_a_network_that_is_no_packed_graph() -> None:
    with pytest.raises(TypeError, match=r"^streaming: the network must build a PackedGraph, but built a int"):
        max_conv.streaming(lambda: 3)
    with pytest.raises(ValueError, match=r"^streaming: an LSTM with hidden= and cell= starts anew in every call"):
        max_conv.streaming(
            lambda x: max_conv.conv.lstm(x, constant(8, 8), constant(2, 8), constant(8), x[:, 0, :2], x[:, 0, :2])[0], X
        )


def zeros(config: Any) -> dict[str, np.ndarray]:
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in config.shapes().items()}


TIMINGS = {
    # network, its tick, and the delay, latency (ms) and state (bytes) of its first output
    "hifigan": (hifigan.build, hifigan.Config(), 1, 3258, 162.5, 720768),
    "univnet": (univnet.build, univnet.Config(), 1, 6147, 277.3, 3279424),
    "vocos": (vocos.build, vocos.Config(), 1, 7424, 320.0, 162304),
    "dac encoder": (dac.build_encoder, dac.Config(), 512, 8, 104.5, 500800),
    "dac decoder": (dac.build_decoder, dac.Config(), 1, 4757, 127.7, 712320),
    "dac": (dac.build, dac.Config(), 512, 8853, 212.4, 1213120),
    "encodec encoder": (encodec.build_encoder, encodec.Config(), 320, 0, 13.3, 36480),
    "encodec decoder": (encodec.build_decoder, encodec.Config(), 1, 0, 13.3, 19712),
    "encodec": (encodec.build, encodec.Config(), 320, 0, 13.3, 56192),
    "tcn": (tcn.build, tcn.Config(), 1, 0, None, 1564608),
    "mamba": (mamba.build, mamba.Config(), 1, 0, None, 18432),
    "wav2vec2 features": (wav2vec2.build_features, wav2vec2.Config(norm="layer"), 320, 1, 40.0, 12352),
    "crepe": (crepe.build, crepe.Config(), 160, 6, 70.0, 3840),
    "pesto": (pesto.build, pesto.Config(), 160, 6, 70.0, 8128),
    "silero_vad": (silero_vad.build, silero_vad.Config(), 512, 0, 32.0, 1280),
}


@pytest.mark.parametrize("name", list(TIMINGS))
def test_latency_and_state_are_known_before_a_network_runs(name: str) -> None:
    build, config, tick, delay, milliseconds, state = TIMINGS[name]
    graph = max_conv.streaming(build, config, zeros(config))
    timing = graph.timing
    assert (timing.tick, timing.delay, timing.state) == (tick, delay, state)
    assert (None if timing.milliseconds is None else round(timing.milliseconds, 1)) == milliseconds
    assert graph.input_names[-3:] == ("ticks", "ends", "state")
    assert graph.output_names[-1] == "state"
    assert not graph.input_names[0].startswith("input")


@pytest.mark.parametrize(
    ("build", "config", "word"),
    [
        (wav2vec2.build_features, wav2vec2.Config(), "mean"),
        (whisper.build, whisper.Config(), ""),
    ],
    ids=["wav2vec2", "whisper"],
)
def test_networks_that_need_the_whole_signal_are_refused(build: Callable[..., Any], config: Any, word: str) -> None:
    for function, arguments in ((max_conv.streaming, (build,)), (build, ())):
        options: dict[str, Any] = {} if arguments else {"ragged": True}
        with pytest.raises(ValueError, match=rf"^(streaming|ragged): .*{word}"):
            function(*arguments, config, zeros(config), **options)


def test_every_operation_on_the_white_list_exists() -> None:
    names = {name.split(".")[-1] for name in ELEMENTWISE | OTHER_AXES | ALONG | OVER_CHANNELS | ONE_SIGNAL}
    assert {"add", "mul", "softmax", "layer_norm", "matmul", "slice"} <= names


def test_joins_of_different_delay_get_a_delay_line() -> None:
    def network(x: TensorValue) -> TensorValue:
        late = conv1d(x, weight(3, 8, 8), padding=(0, 2))
        return ops.tanh(late + x) * x

    graph = max_conv.streaming(network, X)
    assert graph.timing.delay == 2
    windows = graph.signals.windows
    assert [(window.rows, window.kept) for window in windows] == [(2, 2), (2, 2), (2, 2)]


def test_signals_of_a_whole_graph_are_plain_arithmetic() -> None:
    with PackedGraph("whole", input_types=X) as graph:
        x = graph.inputs[0].tensor
        assert not signals().live
        shapes = [value.shape for value in signals().neighbours(x, 1, 2)]
        assert all(shape == x.shape for shape in shapes)
        assert len(shapes) == 4
        framed = signals().whole_frames(x[:, :, 0], 5)
        assert framed.shape[1] == (Dim("length") + 4) // 5
        graph.output(framed)
