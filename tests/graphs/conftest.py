"""Networks of published sizes: they run with NumPy, and with `--all` through MAX."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import max_conv
from interpreter import Interpreter


@pytest.fixture(scope="module", params=["NumPy", pytest.param("MAX", marks=pytest.mark.nightly)])
def started(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A function that starts a network of published sizes.

    With NumPy it shows that the graph is the original. That MAX and our kernels compute what the graph says is shown by
    smaller networks and by the tests of each kernel.
    """

    def with_numpy(graph: max_conv.PackedGraph, weights: Mapping[str, np.ndarray]) -> Callable[..., Any]:
        run = Interpreter(graph, weights)

        def call(*arrays: np.ndarray) -> Any:
            results = run(*arrays)
            return results[0] if len(results) == 1 else tuple(results)

        return call

    def with_max(graph: max_conv.PackedGraph, weights: Mapping[str, np.ndarray]) -> max_conv.Model:
        return max_conv.compile(graph, weights=weights)

    return with_numpy if request.param == "NumPy" else with_max
