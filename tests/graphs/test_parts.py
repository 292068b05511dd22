"""Activations that are polynomials, against NumPy in float64."""

import math
from typing import Any

import numpy as np
import pytest
from max.dtype import DType
from max.graph import DeviceRef, TensorType, ops
from max_conv.graphs import parts

import max_conv

RATE, GAIN = 0.7, 0.3


def graphs() -> dict[str, tuple[Any, Any]]:
    shapes: tuple[list[int | str], ...] = ([1, "length", 1], [1], [1])
    types = [TensorType(DType.float32, shape, DeviceRef.CPU()) for shape in shapes]
    with max_conv.PackedGraph("parts", input_types=types) as graph:
        x, rate, gain = (value.tensor for value in graph.inputs)
        graph.output(parts.sine(x), parts.snake(x, rate, gain))
    with max_conv.PackedGraph("short", input_types=types[:1]) as short:
        x = ops.cast(short.inputs[0].tensor, DType.bfloat16)
        made = [parts.leaky_relu(x, 0.1), parts.inverse_leaky_relu(x, 0.1), parts.elu(x), parts.gelu(x), parts.tanh(x)]
        short.output(*(ops.cast(value, DType.float32) for value in [x, *made, parts.silu(x)]))
    return {"parts": (graph, {}), "short": (short, {})}


@pytest.fixture(scope="module")
def model(models: dict[str, max_conv.Model]) -> max_conv.Model:
    return models["parts"]


def values(model: max_conv.Model, x: np.ndarray) -> list[np.ndarray]:
    answers = model(x.astype(np.float32)[None, :, None], np.array([RATE], np.float32), np.array([GAIN], np.float32))
    return [answer[0, :, 0] for answer in answers]


def test_are_as_near_as_they_say(model: max_conv.Model) -> None:
    x = np.concatenate([np.linspace(-9, 9, 20001), np.linspace(-100, 100, 20001)]).astype(np.float32)
    sine, snake = values(model, x)
    wide = x.astype(np.float64)
    assert np.abs(sine - np.sin(wide)).max() <= 2e-7
    # The rounding of the product may add or subtract half a turn.
    turns = x * np.float32(RATE)
    assert np.abs(snake - (wide + GAIN * np.sin(np.pi * turns.astype(np.float64)) ** 2)).max() <= 1e-5


def test_values_of_16_bits_are_rounded_once(models: dict[str, max_conv.Model]) -> None:
    """Two roundings would be off by up to twice as much."""
    given = np.linspace(-4, 4, 20001, dtype=np.float32)
    x, *made = (np.float64(y[0, :, 0]) for y in models["short"](given[None, :, None]))
    assert len(np.unique(x)) > 700 and np.abs(x - given).max() <= 2.0**-7
    gelu = x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    wants = [
        np.maximum(x, x / 10),
        np.minimum(x, x * 10),
        np.where(x > 0, x, np.expm1(x)),
        gelu,
        np.tanh(x),
        x / (1 + np.exp(-x)),
    ]
    for got, want in zip(made, wants, strict=True):
        assert np.abs(got - want).max() > 0
        assert (np.abs(got - want) <= 2.0**-9 * 1.02 * 2 ** np.ceil(np.log2(np.abs(want) + 1e-30)) + 1e-6).all()


def test_not_a_number(model: max_conv.Model) -> None:
    for value in values(model, np.array([np.nan, 1.0])):
        assert np.isnan(value).tolist() == [True, False]
