"""Activations that are polynomials, against NumPy in float64."""

from typing import Any

import numpy as np
import pytest
from max.dtype import DType
from max.graph import DeviceRef, TensorType
from max_conv.graphs import parts

import max_conv

RATE, GAIN = 0.7, 0.3


def networks() -> dict[str, tuple[Any, Any]]:
    shapes: tuple[list[int | str], ...] = ([1, "length", 1], [1], [1])
    types = [TensorType(DType.float32, shape, DeviceRef.CPU()) for shape in shapes]
    with max_conv.PackedGraph("parts", input_types=types) as graph:
        x, rate, gain = (value.tensor for value in graph.inputs)
        graph.output(parts.sine(x), parts.snake(x, rate, gain))
    return {"parts": (graph, {})}


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


def test_not_a_number(model: max_conv.Model) -> None:
    for value in values(model, np.array([np.nan, 1.0])):
        assert np.isnan(value).tolist() == [True, False]
