"""ConvTranspose1D and ConvTranspose1d as layers: MAX's arguments, causal padding, symbolic lengths, operations after them."""

from typing import Any

import numpy as np
import pytest
from max import nn
from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType, TensorValue, ops

import max_conv
from harness import HOST, Case, check, normal
from max_conv.conv.reference import conv_transpose1d_ref

F32 = DType.float32

# Arguments of max.nn.ConvTranspose1d, by position and by name.
ARGUMENTS: list[tuple[tuple, dict[str, Any]]] = [
    ((4, 6, 8, F32), {}),
    ((4, 6, 8, F32, 2, 1), {"has_bias": True}),
    ((4, 6, 8, F32, (1, 2), (0, 0, 1, 1), (1, 1), (0, 1), DeviceRef.CPU(), True, True, "up"), {}),
    ((), {"length": 4, "in_channels": 6, "out_channels": 8, "dtype": F32, "permute": True}),
]


@pytest.mark.parametrize(("args", "kwargs"), ARGUMENTS)
def test_arguments_and_weights_are_those_of_max(args: tuple, kwargs: dict[str, Any]) -> None:
    theirs, ours = nn.ConvTranspose1d(*args, **kwargs), max_conv.ConvTranspose1d(*args, **kwargs)
    named = [{name: (w.dtype, list(w.shape)) for name, w in layer.raw_state_dict().items()} for layer in (theirs, ours)]
    assert named[0] == named[1]
    assert theirs.stride == (1, ours.stride) and theirs.padding == (0, 0, *ours.padding)
    assert theirs.output_padding == (0, ours.output_padding)


def drop_in() -> tuple[Graph, dict[str, np.ndarray], list[Case]]:
    """Returns a plain graph of two layers, their weights, and the case of each layer."""
    native = max_conv.ConvTranspose1d(4, 6, 8, F32, 2, 1, has_bias=True, name="native")
    pytorch = max_conv.ConvTranspose1d(4, 6, 8, F32, 2, 1, permute=True, name="pytorch")
    weights = {"native.weight": normal(4, 8, 6), "native.bias": normal(8), "pytorch.weight": normal(6, 8, 4)}
    options = {"stride": 2, "padding": 1}
    cases = [
        Case("native", normal(2, 9, 6), weights["native.weight"], weights["native.bias"], options, transposed=True),
        Case(
            "pytorch",
            normal(2, 6, 9),
            weights["pytorch.weight"],
            None,
            {**options, "layout": "NCL", "filter_layout": "CFS"},
            transposed=True,
        ),
    ]
    with Graph("layers", input_types=[TensorType(F32, list(case.x.shape), HOST) for case in cases]) as graph:
        x, y = (value.tensor for value in graph.inputs)
        graph.output(native(x), pytorch(y))
    return graph, weights, cases


def stack() -> tuple[max_conv.PackedGraph, dict[str, np.ndarray]]:
    """Symbolic batch and length, groups, an activation after a layer, one layer without a batch, `output_size`."""
    up = max_conv.ConvTranspose1D(8, 24, 12, F32, stride=4, padding="causal", has_bias=True, name="up")
    grouped = max_conv.ConvTranspose1D(4, 12, 12, F32, stride=2, padding=1, num_groups=12, name="grouped")
    sparse = max_conv.ConvTranspose1D(2, 12, 5, F32, stride=3, dilation=3, has_bias=True, name="sparse", permute=True)
    weights = {
        name: normal(*(int(n) for n in weight.shape), seed=1)
        for layer in (up, grouped, sparse)
        for name, weight in layer.raw_state_dict().items()
    }

    def network(x: TensorValue) -> tuple[TensorValue, TensorValue]:
        y = grouped(ops.relu(up(x)))
        return y, sparse(ops.squeeze(y.transpose(1, 2)[:1], 0), output_size=194)

    return max_conv.PackedGraph("stack", network, [TensorType(F32, ["n", "l", 24], HOST)]), weights


def graphs() -> dict[str, Any]:
    return {"drop-in": drop_in()[:2], "stack": stack()}


def test_the_drop_in_in_a_plain_graph(models: dict[str, max_conv.Model]) -> None:
    """MAX's own layer has the same arguments, but does not compile for any size on the CPU (MAX 26.7.0)."""
    cases = drop_in()[2]
    for case, got in zip(cases, models["drop-in"](*(case.x for case in cases)), strict=True):
        check(case, got)


def test_a_stack_of_layers(models: dict[str, max_conv.Model]) -> None:
    model, (_, weights) = models["stack"], stack()
    x = normal(2, 8, 24)
    y, z = model(x)
    first = conv_transpose1d_ref(x, weights["up.weight"], weights["up.bias"], stride=4, padding=(0, 4))
    assert first.shape == (2, 32, 12)
    want = conv_transpose1d_ref(np.maximum(first, 0), weights["grouped.weight"], stride=2, padding=1, groups=12)
    assert want.shape == (2, 64, 12)
    np.testing.assert_allclose(y, want, atol=1e-4)
    options: dict[str, Any] = dict(stride=3, dilation=3, output_size=194, layout="NCL", filter_layout="CFS")
    last = conv_transpose1d_ref(want[0].T, weights["sparse.weight"], weights["sparse.bias"], **options)
    assert last.shape == z.shape == (5, 194)
    np.testing.assert_allclose(z, last, atol=1e-3)
    with pytest.raises(ValueError, match=r"conv_transpose1d: the output has 194 positions, not 217 to 219; pad less"):
        model(normal(1, 9, 24))


@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(8, 4, 1), (4, 2, 2), (3, 1, 3), (2, 5, 1)])
def test_causal_padding_sees_no_future(kernel_size: int, stride: int, dilation: int) -> None:
    """The output is `stride` times as long, or ends with the last tap; a shorter input gives the same start."""
    x, w = normal(1, 9, 2), normal(kernel_size, 3, 2)
    sizes: dict[str, Any] = dict(stride=stride, dilation=dilation, padding="causal")
    whole, start = (conv_transpose1d_ref(part, w, **sizes) for part in (x, x[:, :5]))
    reach = dilation * (kernel_size - 1) + 1
    assert whole.shape[1] == 9 * stride - max(0, stride - reach)
    np.testing.assert_allclose(whole[:, : start.shape[1]], start, atol=1e-12)
