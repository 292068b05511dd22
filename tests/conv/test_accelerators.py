"""Which GPU kernel a layer gets, and the filter in the order that the kernel reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from max_conv import explain
from max_conv.conv import accelerators
from max_conv.conv.accelerators import accelerated, check_file, trusted, trying
from max_conv.conv.dispatch import Layer
from max_conv.conv.geometry import Geometry, TransposedGeometry
from max_conv.conv.layouts import FilterLayout, Layout, permute
from max_conv.conv.packing import Packing
from max_conv.conv.reference import conv1d_ref, conv_transpose1d_ref

K3 = Geometry.of(3, padding=1)
UP8 = TransposedGeometry.of(16, 8, 4)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "architecture", lambda: "sm_90a")


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(accelerators, "architecture", lambda: "gfx942")
    monkeypatch.setenv("MAX_CONV_CACHE", str(tmp_path))
    yield


# Geometry, data layout, channels and filters of a group, groups, dtype, kernel.
KERNELS: list[tuple[Geometry | TransposedGeometry, Layout, int, int, int, str, str]] = [
    (K3, "NLC", 80, 384, 1, "float32", "tiles128"),
    (K3, "NLC", 80, 33, 1, "float32", "tiles64"),
    (K3, "NLC", 80, 32, 1, "float32", "tiles32"),
    (K3, "NCL", 80, 384, 1, "float32", "tiles64"),
    (K3, "NLC", 80, 3, 1, "float32", "each"),
    (K3, "NLC", 80, 384, 1, "float64", "each"),
    (K3, "NLC", 80, 384, 1, "bfloat16", "hopper192"),
    (K3, "NLC", 80, 512, 1, "float16", "hopper128"),
    (K3, "NLC", 80, 48, 16, "bfloat16", "hopper64"),
    (K3, "NLC", 80, 8, 1, "bfloat16", "hopper32"),
    (K3, "NLC", 81, 384, 1, "bfloat16", "tiles128"),
    (K3, "NCL", 80, 384, 1, "bfloat16", "tiles64"),
    (Geometry.of(3, stride=2), "NLC", 80, 384, 1, "bfloat16", "tiles128"),
    (Geometry.of(3, padding=1, padding_mode="reflect"), "NLC", 80, 384, 1, "bfloat16", "tiles128"),
    (K3, "NLC", 1, 1, 64, "bfloat16", "rows"),
    (K3, "NCL", 1, 1, 64, "float32", "rows"),
    (K3, "NLC", 1, 1, 1, "float32", "each"),
    (UP8, "NLC", 512, 256, 1, "float32", "tiles128"),
    (UP8, "NLC", 512, 4, 1, "bfloat16", "hopper32"),
    (TransposedGeometry.of(5, 2), "NLC", 512, 256, 1, "float32", "each"),
    (TransposedGeometry.of(4, 2, dilation=3), "NLC", 512, 256, 1, "float32", "each"),
]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("row", KERNELS, ids=str)
def test_kernel(row: tuple[Any, ...]) -> None:
    *layer, kernel = row
    choice = accelerated(Layer.of(*layer), True)
    assert choice.kernel == kernel and choice.why


@pytest.mark.usefixtures("hopper")
def test_a_transposed_filter_that_is_an_input() -> None:
    assert accelerated(Layer.of(UP8, "NLC", 512, 256, 1), False).kernel == "each"


@pytest.mark.usefixtures("another")
def test_a_gpu_on_which_no_kernel_has_been_tried() -> None:
    layer = Layer.of(K3, "NLC", 80, 384, 1, "bfloat16")
    choice = accelerated(layer, True)
    assert choice.kernel == "each" and "max-conv check --device gpu" in choice.why and not trusted()
    token = trying.set(True)
    assert accelerated(layer, True).kernel == "tiles128"
    trying.reset(token)
    assert not trusted()
    check_file().parent.mkdir(parents=True)
    check_file().touch()
    assert trusted() and accelerated(layer, True).kernel == "tiles128"


@pytest.mark.usefixtures("hopper")
def test_explain_says_the_gpus_kernel() -> None:
    from max.dtype import DType
    from max.graph import DeviceRef

    from max_conv import Conv1D

    found = explain(Conv1D(3, 64, 64, DType.bfloat16, padding=1, device=DeviceRef.GPU()), length=10)
    assert found.kernel == "hopper64" and "tensor cores" in found.why and not found.shared
    found = explain(K3, length=10, channels=64, filters=64, device="gpu")
    assert found.kernel == "tiles64" and not found.shared


@pytest.mark.parametrize("kernel", ["tiles32", "hopper32"])
def test_a_filter_in_the_kernels_order(kernel: str) -> None:
    random = np.random.default_rng(0)
    given = random.standard_normal((24, 8, 3)).astype(np.float32)
    layer = Layer.of(K3, "NLC", 8, 12, 2)
    made = Packing("w", kernel, layer, "FCS")(given)
    order: FilterLayout = "FSC" if kernel == "hopper32" else "SCF"
    np.testing.assert_array_equal(made, permute(given, "FCS", order))
    x = random.standard_normal((1, 20, 16)).astype(np.float32)
    want = conv1d_ref(x, given, padding=1, groups=2, filter_layout="FCS")
    np.testing.assert_allclose(conv1d_ref(x, made, padding=1, groups=2, filter_layout=order), want, rtol=1e-12)


@pytest.mark.parametrize("kernel", ["tiles32", "hopper32"])
def test_the_phases_of_a_transposed_filter(kernel: str) -> None:
    """The convolution that `place` in `kernels/gpu/dispatch.mojo` spreads over the output is the transposed one."""
    random = np.random.default_rng(0)
    given = random.standard_normal((6, 5, 4)).astype(np.float32)  # (K, F / groups, C)
    geometry = TransposedGeometry.of(6, 3, 2)
    layer = Layer.of(geometry, "NLC", 2, 5, 2)
    made = Packing("w", kernel, layer, "SFC")(given)
    order: FilterLayout = "FSC" if kernel == "hopper32" else "SCF"
    x = random.standard_normal((1, 9, 4)).astype(np.float32)
    want = conv_transpose1d_ref(x, given, stride=3, padding=2, groups=2)
    sums = conv1d_ref(x, made, padding=1, groups=2, filter_layout=order)
    got = np.zeros_like(want)
    first = -((geometry.stride - 1 - geometry.left) // geometry.stride)
    for position in range(sums.shape[1]):
        for column in range(sums.shape[2]):
            group, phase, filter = column // 15, column // 5 % 3, column % 5
            output = (position + first) * 3 - geometry.left + phase
            if 0 <= output < got.shape[1]:
                got[0, output, group * 5 + filter] = sums[0, position, column]
    np.testing.assert_allclose(got, want, rtol=1e-12)
