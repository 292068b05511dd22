"""Facts in both Mojo and Python code are the same: Winograd's points, groups of taps, phases, shapes."""

import os
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from max_conv.conv.dispatch import LANES, PANEL, Layer, quad_products, quad_spacing, tap_groups
from max_conv.conv.geometry import Geometry, TransposedGeometry
from max_conv.conv.library import SOURCES
from max_conv.conv.packing import LIMIT, POINTS, Packing

SOURCE = Path(__file__).parent / "twins.mojo"
PLANS = list(product(range(1, 13), (1, 2, 3, 6), (1, 2, 4)))
PHASES = list(product((1, 3, 4, 7, 16), (1, 2, 3, 8), (1, 2, 3)))

Facts = dict[str, list[float]]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """The facts that the kernels print."""
    from mojo.run import subprocess_run_mojo

    program = tmp_path_factory.mktemp("twins") / "twins"
    command = ["build", "-I", str(SOURCES.parent), str(SOURCE), "-o", str(program)]
    done = subprocess_run_mojo(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    lines = [line.split(" =") for line in done.stdout.splitlines()]
    found = {name: [float(number) for number in numbers.split()] for name, numbers in lines}
    assert len(found) == len(lines)
    return found


def test_sizes(facts: Facts) -> None:
    assert facts["panel"] == [PANEL]
    assert facts["lanes"] == [LANES]
    assert facts["points"] == [len(POINTS[3])]
    assert facts["quad"] == [4]  # `Layer.products` counts four outputs, too
    assert {name: facts[f"limit {name}"] for name in LIMIT} == {name: [value**2] for name, value in LIMIT.items()}


def test_points(facts: Facts) -> None:
    for size, points in POINTS.items():
        got = [facts[f"points {size} {tap}"] for tap in range(size)]
        np.testing.assert_allclose(np.transpose(got), points, rtol=1e-15)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), PLANS)
def test_groups_of_taps(kernel: int, stride: int, dilation: int, facts: Facts) -> None:
    name = f"{kernel} {stride} {dilation}"
    geometry = Geometry.of(kernel, stride=stride, dilation=dilation)
    groups = tap_groups(geometry)
    assert [tuple(facts[f"group {name} {i}"]) for i in range(len(groups))] == groups
    assert facts[f"plan {name}"] == [len(groups), quad_spacing(geometry), quad_products(geometry)]
    layer = Layer(geometry, "NLC", 6, 33, 2)
    for kind in ("winograd", "dense", "paired", "amx"):
        assert tuple(facts[f"shape {kind} {name}"]) == Packing("w", kind, layer, "SCF").shape


@pytest.mark.parametrize(("kernel", "stride", "dilation"), PHASES)
def test_phases(kernel: int, stride: int, dilation: int, facts: Facts) -> None:
    geometry = TransposedGeometry.of(kernel, stride=stride, dilation=dilation)
    inner = geometry.convolution
    for kind, groups, channels, filters in [("dense", 2, 3, 5), ("lengthwise", 2, 3, 5), ("depthwise", 8, 1, 1)]:
        layer = Layer.of(geometry, "NLC", channels, filters, groups)
        lanes = LANES if kind == "dense" else 1
        name = f"{kernel} {stride} {dilation} {groups} {lanes}"
        columns = layer.columns if kind == "dense" else layer.filters
        want = [geometry.step, geometry.phases, inner.kernel_size, inner.dilation, groups * columns]
        assert facts[f"transposed {name}"] == want
        line = np.arange(1, kernel * filters * groups * channels + 1, dtype=np.float32)
        made = Packing("w", kind, layer, "SFC").phased(line.reshape(kernel, filters, groups * channels))
        np.testing.assert_array_equal(facts[f"phased {name}"], made.ravel())
