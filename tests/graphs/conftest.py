"""Fixtures for networks: small ones are compiled together, published ones run with NumPy, and with `--all` through MAX."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import max_conv
from harness import compile_together
from interpreter import Interpreter

Network = tuple[max_conv.PackedGraph, Mapping[str, np.ndarray]]
"""A graph and its weights."""


@pytest.fixture(scope="session")
def compiled_networks(request: pytest.FixtureRequest) -> dict[tuple[str, str], max_conv.Model]:
    """Compiles the networks of all selected test files together; returns them by file and name."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    files = {
        test.module.__name__: test.module
        for test in tests
        if hasattr(test.module, "networks") and "models" in test.fixturenames and not test.get_closest_marker("skip")
    }
    networks: dict[tuple[str, str], Network] = {}
    for file, module in files.items():
        networks |= {(file, name): network for name, network in module.networks().items()}
    return dict(zip(networks, compile_together(*networks.values()), strict=True))


@pytest.fixture(scope="module")
def models(
    request: pytest.FixtureRequest, compiled_networks: dict[tuple[str, str], max_conv.Model]
) -> dict[str, max_conv.Model]:
    """The compiled networks of a test file, by name."""
    return {name: model for (file, name), model in compiled_networks.items() if file == request.module.__name__}


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
