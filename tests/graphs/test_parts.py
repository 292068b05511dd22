"""Activations that are polynomials, against NumPy in float64."""

import numpy as np
import pytest
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue
from max_conv.graphs import parts

import max_conv

RATE, GAIN = 0.7, 0.3


def activations(x: TensorValue, rate: TensorValue, gain: TensorValue) -> tuple[TensorValue, ...]:
    return parts.sine(x), parts.snake(x, rate, gain)


@pytest.fixture(scope="module")
def model():
    types = [TensorType(DType.float32, shape, DeviceRef.CPU()) for shape in ([1, "length", 1], [1], [1])]
    return max_conv.compile(activations, types)


def values(model, x):
    answers = model(x.astype(np.float32)[None, :, None], np.float32([RATE]), np.float32([GAIN]))
    return [answer[0, :, 0] for answer in answers]


def test_are_as_near_as_they_say(model):
    x = np.concatenate([np.linspace(-9, 9, 20001), np.linspace(-100, 100, 20001)]).astype(np.float32)
    sine, snake = values(model, x)
    wide = x.astype(np.float64)
    assert np.abs(sine - np.sin(wide)).max() <= 2e-7
    # The rounding of the product may add or subtract half a turn.
    turns = x * np.float32(RATE)
    assert np.abs(snake - (wide + GAIN * np.sin(np.pi * turns.astype(np.float64)) ** 2)).max() <= 1e-5


def test_not_a_number(model):
    for value in values(model, np.array([np.nan, 1.0])):
        assert np.isnan(value).tolist() == [True, False]
