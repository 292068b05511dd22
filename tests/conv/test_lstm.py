"""`lstm` against torch.nn.LSTM."""

from itertools import chain
from typing import Any

import pytest
import torch
from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType

import max_conv
from max_conv.conv.recurrent import lstm

CPU = DeviceRef.CPU()
# Dtype, channels, hidden units (whole vectors, less than one, several and a part), largest difference from torch.
NETWORKS = [
    (torch.float32, 3, 5, 1e-5),
    (torch.float32, 128, 128, 1e-5),
    (torch.float32, 10, 150, 1e-5),
    (torch.float32, 16, 300, 1e-5),  # weights that threads share
    (torch.float64, 7, 33, 1e-12),
    (torch.bfloat16, 4, 20, 1e-2),
    (torch.float16, 4, 20, 1e-3),
]
# A batch of one, of fewer items than are computed together, of more; one step; no step.
SIZES = [(1, 1), (1, 0), (0, 3), (1, 60), (2, 7), (3, 60), (9, 13)]


def input_types(
    dtype: DType, channels: int, units: int, batch: int | str = "batch", time: int | str = "time"
) -> list[TensorType]:
    shapes: list[list[int | str]] = [
        [batch, time, channels],
        [channels, 4 * units],
        [units, 4 * units],
        [4 * units],
        [batch, units],
    ]
    return [TensorType(dtype, shape, CPU) for shape in [*shapes, shapes[-1]]]


def graphs() -> dict[str, tuple[Graph, dict[str, Any]]]:
    """All networks in one graph."""
    types = [
        input_types(getattr(DType, str(dtype).removeprefix("torch.")), channels, units)
        for dtype, channels, units, _ in NETWORKS
    ]
    with Graph("networks", input_types=list(chain(*types))) as graph:
        values = [value.tensor for value in graph.inputs]
        graph.output(*(y for i in range(0, len(values), 6) for y in lstm(*values[i : i + 6])))
    return {"networks": (graph, {})}


@pytest.fixture
def model(models: dict[str, max_conv.Model]) -> max_conv.Model:
    return models["networks"]


def torch_lstm(
    dtype: torch.dtype, channels: int, units: int, batch: int, time: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns the inputs of `lstm` and torch's three results; sixteen-bit types are computed in float32 from them."""
    wide = torch.promote_types(dtype, torch.float32)
    network: Any = torch.nn.LSTM(channels, units, batch_first=True, dtype=wide)
    x, h, c = (torch.randn(size, dtype=dtype) for size in [(batch, time, channels), (batch, units), (batch, units)])
    with torch.no_grad():
        network.bias_ih_l0 += network.bias_hh_l0
        network.bias_hh_l0.zero_()
        for weight in network.parameters():
            weight.copy_(weight.to(dtype))
        if batch and time:
            y, (hn, cn) = network(x.to(wide), (h[None].to(wide), c[None].to(wide)))
        else:
            y, hn, cn = torch.zeros(batch, time, units, dtype=wide), h.to(wide), c.to(wide)
    weights = (network.weight_ih_l0.T, network.weight_hh_l0.T, network.bias_ih_l0)
    inputs = [x, *(weight.detach().to(dtype).contiguous() for weight in weights), h, c]
    return inputs, [y, hn.reshape(batch, units), cn.reshape(batch, units)]


@pytest.mark.parametrize(("batch", "time"), SIZES)
def test_agrees_with_torch(model: max_conv.Model, batch: int, time: int) -> None:
    torch.manual_seed(batch * 100 + time)
    inputs, expected = [], []
    for dtype, channels, units, _ in NETWORKS:
        x, y = torch_lstm(dtype, channels, units, batch, time)
        inputs += x
        expected += y
    results = [torch.from_dlpack(y) for y in model(*inputs)]
    for i, (result, wanted) in enumerate(zip(results, expected)):
        dtype, *_, bound = NETWORKS[i // 3]
        assert result.dtype == dtype and result.shape == wanted.shape
        assert (result.to(wanted.dtype) - wanted).abs().max() <= bound if wanted.numel() else True


def test_extreme_gates_and_nan(model: max_conv.Model) -> None:
    torch.manual_seed(0)
    inputs = [torch_lstm(*network[:3], 2, 4)[0] for network in NETWORKS]
    x = inputs[0][0]
    x[0] = 1e30
    x[1, 2, 0] = torch.nan
    y = torch.from_dlpack(model(*chain(*inputs))[0])
    assert y[0].isfinite().all()
    assert y[1, :2].isfinite().all() and y[1, 2:].isnan().all()


ERRORS = [
    (0, DType.int32, [2, 5, 3], TypeError, "lstm: x must be one of float32, float64, float16, bfloat16, but is int32"),
    (
        0,
        DType.float32,
        [2, 3],
        ValueError,
        "lstm: x must have shape (batch, time, channels), channels known, but has (2, 3)",
    ),
    (
        0,
        DType.float32,
        [2, 5, "c"],
        ValueError,
        "lstm: x must have shape (batch, time, channels), channels known, but has",
    ),
    (
        0,
        DType.float32,
        [2, 5, 9],
        ValueError,
        "lstm: w_ih must have shape (9, 16) for x of shape (2, 5, 9) and 4 hidden",
    ),
    (1, DType.float64, [3, 16], TypeError, "lstm: x is float32 but w_ih is float64; cast one to the other."),
    (2, DType.float32, ["h", 16], ValueError, "lstm: w_hh must have shape (H, 4H), known when the graph is built, but"),
    (2, DType.float32, [4, 12], ValueError, "lstm: w_hh must have shape (4, 16) for x of shape (2, 5, 3) and 4 hidden"),
    (3, DType.float32, [4], ValueError, "lstm: bias must have shape (16) for x"),
    (4, DType.float32, [1, 4], ValueError, "lstm: hidden must have shape (2, 4) for x"),
    (5, DType.float32, [2, 5], ValueError, "lstm: cell must have shape (2, 4) for x"),
]


@pytest.mark.parametrize(("place", "dtype", "shape", "kind", "sentence"), ERRORS)
def test_errors_come_before_anything_is_emitted(
    place: int, dtype: DType, shape: list[int | str], kind: type[Exception], sentence: str
) -> None:
    types = input_types(DType.float32, 3, 4, 2, 5)
    types[place] = TensorType(dtype, shape, CPU)
    with Graph("wrong", input_types=types) as graph:
        before = str(graph)
        with pytest.raises(kind) as caught:
            lstm(*(value.tensor for value in graph.inputs))
        assert str(graph) == before
    assert str(caught.value).startswith(sentence)
