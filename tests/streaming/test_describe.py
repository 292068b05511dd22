"""The description of a network, against its real outputs."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from max.dtype import DType
from max.graph import DeviceRef, TensorType, Weight, ops

import max_conv
from max_conv import PackedGraph, conv1d, conv_transpose1d
from max_conv.conv.recurrent import lstm
from max_conv.streaming.describe import describe

CPU_REF = DeviceRef.CPU()
LENGTH = 60
# Each row is a network: its layers, whether they are transposed, and their options.
LAYERS: list[list[tuple[bool, int, dict[str, Any]]]] = [
    [(False, 5, {"padding": 2})],
    [(False, 3, {"padding": "causal", "dilation": 4}), (False, 2, {"stride": 2})],
    [(False, 4, {"stride": 3, "padding": 1}), (True, 6, {"stride": 3, "padding": 1}), (False, 3, {"padding": 1})],
    [(True, 8, {"stride": 4, "padding": 2}), (False, 3, {"dilation": 5, "padding": 5})],
    [(True, 4, {"stride": 2, "padding": "causal"}), (True, 3, {"stride": 1, "dilation": 2})],
]


def network(number: int) -> PackedGraph:
    sound = TensorType(DType.float32, [1, "length", 1], CPU_REF)
    with PackedGraph(f"network{number}", input_types=[sound]) as graph:
        x = graph.inputs[0].tensor
        for transposed, taps, options in LAYERS[number]:
            filter = ops.constant(np.ones((taps, 1, 1), np.float32), DType.float32, CPU_REF)
            x = (conv_transpose1d if transposed else conv1d)(x, filter, **options)
        graph.output(x)
    return graph


def graphs() -> dict[str, tuple[PackedGraph, dict[str, Any]]]:
    return {str(number): (network(number), {}) for number in range(len(LAYERS))}


@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_an_output_sees_the_described_span(models: dict[str, max_conv.Model], number: int) -> None:
    span, model = describe(network(number)).span, models[str(number)]
    assert span.left is not None and span.right is not None and span.field is not None
    pulses = np.eye(LENGTH, dtype=np.float32)[:, None, :, None]
    # All weights are 1: an output grows with every input that it sees.
    seen = np.stack([model(pulse)[0, :, 0] > 0 for pulse in pulses])
    inside = [o for o in range(seen.shape[1]) if span.left <= o * span.step < LENGTH - 1 - span.right]
    assert len(inside) > 5
    for output in inside:
        inputs = np.flatnonzero(seen[:, output])
        assert output * span.step - span.left <= inputs[0] and inputs[-1] <= output * span.step + span.right
    # After a stride down and a stride up, no single output may see as far on both sides as some outputs see on one.
    spare = any(options.get("stride") for _, _, options in LAYERS[number][:-1]) and len(LAYERS[number]) == 3
    widest = max(np.ptp(np.flatnonzero(seen[:, output])) + 1 for output in inside)
    assert widest <= span.field <= widest + spare


def test_branches_recurrence_and_cost() -> None:
    with PackedGraph("network", input_types=[TensorType(DType.float32, ["n", "l", 16], CPU_REF)]) as graph:
        x = graph.inputs[0].tensor
        weights = {n: np.ones(s, np.float32) for n, s in (("a", (3, 16, 16)), ("b", (7, 4, 16)))}
        a, b = (weight(name, array) for name, array in weights.items())
        y = conv1d(x, a, padding=1) + conv1d(x, b, padding=(6, 0), groups=4)
        graph.output(y)
    told = describe(graph)
    assert [(layer.name, layer.sizes, layer.flops) for layer in told.layers] == [
        ("a", "16→16 k3", Fraction(2 * 3 * 16 * 16)),
        ("b", "16→16 k7 g4", Fraction(2 * 7 * 4 * 16)),
    ]
    assert (told.span.left, told.span.right, told.span.step) == (Fraction(6), Fraction(1), Fraction(1))
    assert told.parameters == 3 * 16 * 16 + 7 * 4 * 16

    with PackedGraph("memory", input_types=[TensorType(DType.float32, ["n", "l", 16], CPU_REF)]) as graph:
        x = graph.inputs[0].tensor
        shapes = {"w_ih": (16, 32), "w_hh": (8, 32), "bias": (32,)}
        w_ih, w_hh, bias = (weight(name, np.ones(shape, np.float32)) for name, shape in shapes.items())
        nothing = ops.broadcast_to(ops.constant(0, DType.float32, CPU_REF), [x.shape[0], 8])
        graph.output(lstm(x, w_ih, w_hh, bias, nothing, nothing)[0])
    told = describe(graph)
    assert told.layers[-1].kind == "lstm" and told.layers[-1].flops == 2 * 8 * 32
    assert told.span.field is None and told.span.left is None


def weight(name: str, array: np.ndarray) -> Weight:
    return Weight(name, DType.float32, array.shape, CPU_REF)
