"""Which kernel a layer gets, and what `explain` says about it."""

import re
from typing import Any

import pytest

from max_conv import explain
from max_conv.conv import dispatch
from max_conv.conv.dispatch import LEAST_OUTPUTS, LEAST_PACKED, Layer, choose, quad_products
from max_conv.conv.geometry import Geometry, TransposedGeometry
from max_conv.conv.layouts import Layout

K3 = Geometry.of(3, padding=1)

# Geometry, data layout, channels and filters of a group, groups, dtype, kernel.
KERNELS: list[tuple[Geometry | TransposedGeometry, Layout, int, int, int, str, str]] = [
    (K3, "NLC", 80, 384, 1, "float32", "winograd"),
    (K3, "NCL", 80, 384, 1, "float32", "winograd"),
    (K3, "NLC", 32, 32, 1, "float64", "winograd"),
    (K3, "NLC", 31, 384, 1, "float32", "short"),
    (K3, "NLC", 384, 31, 1, "float32", "dense"),
    (K3, "NCL", 384, 31, 1, "float32", "lengthwise"),
    (K3, "NLC", 2049, 32, 1, "float32", "dense"),
    (Geometry.of(1), "NLC", 512, 1024, 1, "float32", "dense"),
    (Geometry.of(2, dilation=64), "NCL", 64, 128, 1, "float32", "winograd"),
    (Geometry.of(2, dilation=512), "NCL", 64, 128, 1, "float32", "lengthwise"),
    (Geometry.of(3, stride=2), "NLC", 384, 384, 1, "float32", "winograd"),
    (Geometry.of(3, stride=3), "NLC", 384, 384, 1, "float32", "dense"),
    (Geometry.of(128, padding=64), "NLC", 48, 48, 16, "float32", "dense"),
    (Geometry.of(10, stride=5), "NLC", 1, 512, 1, "float32", "short"),
    (K3, "NLC", 1, 8, 64, "float32", "short"),
    (K3, "NLC", 32, 1, 1, "float32", "lengthwise"),
    (K3, "NLC", 4, 7, 3, "float32", "lengthwise"),
    (K3, "NLC", 1, 2, 64, "float32", "lengthwise"),
    (K3, "NLC", 1, 1, 512, "float32", "depthwise"),
    (K3, "NLC", 1, 1, 8, "bfloat16", "depthwise"),
    (K3, "NLC", 1, 1, 7, "float32", "lengthwise"),
    (K3, "NCL", 1, 1, 512, "float32", "lengthwise"),
    (Geometry.of(31), "NCL", 1, 1, 512, "float32", "depthwise"),
    (Geometry.of(31), "NCL", 1, 1, 512, "float16", "lengthwise"),
    (Geometry.of(31, stride=2), "NCL", 1, 1, 512, "float32", "lengthwise"),
    (K3, "NLC", 80, 384, 1, "bfloat16", "paired"),
    (K3, "NCL", 8, 16, 16, "bfloat16", "paired"),
    (K3, "NLC", 80, 384, 1, "float16", "winograd"),
    (Geometry.of(3, dilation=10_000), "NCL", 80, 384, 1, "bfloat16", "lengthwise"),
]
UP2, UP8 = TransposedGeometry.of(4, stride=2, padding=1), TransposedGeometry.of(16, stride=8, padding=4)
KERNELS += [
    (UP8, "NLC", 512, 256, 1, "float32", "winograd"),
    (UP8, "NCL", 512, 256, 1, "float32", "winograd"),
    (UP2, "NLC", 64, 16, 1, "float32", "winograd"),  # 32 filters of two phases
    (UP2, "NLC", 64, 7, 1, "float32", "lengthwise"),
    (UP2, "NLC", 31, 64, 1, "float32", "short"),
    (TransposedGeometry.of(8, stride=8), "NLC", 512, 256, 1, "float32", "dense"),
    (TransposedGeometry.of(5, stride=4), "NLC", 96, 96, 1, "float32", "dense"),  # 20 multiplications for 20
    (TransposedGeometry.of(11, stride=5), "NLC", 384, 192, 1, "float32", "winograd"),
    (UP2, "NLC", 1, 1, 512, "float32", "depthwise"),
    (UP2, "NLC", 1, 2, 512, "float32", "lengthwise"),
    (UP2, "NCL", 1, 1, 512, "float32", "lengthwise"),
    (UP2, "NLC", 64, 64, 1, "bfloat16", "paired"),
]


@pytest.mark.parametrize("row", KERNELS, ids=str)
def test_kernel_of_a_layer(row: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    *layer, kernel = row
    monkeypatch.setattr(dispatch, "has_pairs", lambda: True)
    assert choose(Layer.of(*layer)).kernel == kernel


@pytest.mark.parametrize(("tiles", "pairs"), [(True, True), (False, True), (False, False)])
def test_the_processor_decides_on_bfloat16(tiles: bool, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_tiles", lambda: tiles)
    monkeypatch.setattr(dispatch, "has_pairs", lambda: pairs)
    layer = Layer(K3, "NLC", 80, 384, 1, "bfloat16")
    best, plain = "paired" if pairs else "winograd", "paired" if pairs else "dense"
    assert choose(layer, packed=True).kernel == ("amx" if tiles else best)
    assert choose(layer).kernel == best and choose(layer, exact=True).kernel == plain
    assert choose(Layer(Geometry.of(1), "NLC", 2, 384, 1, "bfloat16"), packed=True).kernel == "short"
    huge = Layer(Geometry.of(3, dilation=10_000), "NCL", 80, 384, 1, "bfloat16")
    assert choose(huge, packed=True).kernel == "lengthwise"


@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation", "products"),
    [
        (1, 1, 1, 4),
        (2, 1, 64, 5),
        (3, 1, 1, 6),
        (4, 1, 3, 10),
        (11, 1, 5, 23),
        (3, 2, 1, 9),
        (3, 2, 2, 6),
        (2, 5, 1, 8),
    ],
)
def test_quad_products(kernel_size: int, stride: int, dilation: int, products: int) -> None:
    assert quad_products(Geometry.of(kernel_size, stride=stride, dilation=dilation)) == products


def test_a_layer_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    from max.dtype import DType

    from max_conv import Conv1D

    found = explain(Conv1D(3, 80, 384, DType.float32, padding=1, permute=True), length=3000, batch=2)
    assert capsys.readouterr().out == f"{found}\n"
    assert found.kernel == "winograd" and found.bound == "compute" and found.shared
    assert found.output_shape == (2, 384, 3000)
    assert found.flops == 2 * 2 * 3000 * 384 * 3 * 80
    assert found.multiplications == found.flops // 4
    assert found.bytes == 4 * (2 * 3000 * 80 + 3 * 80 * 384 + 2 * 3000 * 384)


def test_a_transposed_layer_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    from max.dtype import DType

    from max_conv import ConvTranspose1D

    up = ConvTranspose1D(16, 512, 256, DType.float32, stride=8, padding=4)
    found = explain(up, length=100)
    assert capsys.readouterr().out == f"{found}\n"
    assert (found.kernel, found.bound, found.output_shape) == ("winograd", "compute", (1, 800, 256))
    assert found.flops == 2 * 100 * 512 * 256 * 16
    assert found.multiplications == found.flops // 2 * 5 // 8
    assert found.bytes == 4 * (100 * 512 + 16 * 512 * 256 + 800 * 256)
    # Fewer outputs of a phase than Winograd's kernel needs to pay.
    assert explain(up, length=5).kernel == "dense"
    assert explain(UP8, length=100, channels=512, filters=256).kernel == "winograd"


@pytest.mark.parametrize(("packed", "least", "dilations"), [(True, LEAST_PACKED, 4), (False, LEAST_OUTPUTS, 16)])
def test_a_short_input_gets_another_kernel(packed: bool, least: int, dilations: int) -> None:
    def kernel(geometry: Geometry, length: int, batch: int = 1) -> str:
        return explain(geometry, length=length, batch=batch, channels=64, filters=64, packed=packed).kernel

    assert kernel(K3, least - 1) == "dense"
    assert kernel(K3, least // 2, batch=2) == "winograd"
    dilated = Geometry.of(3, padding=64, dilation=64)
    assert kernel(dilated, 64 * dilations - 1) == "dense"
    assert kernel(dilated, 64 * dilations) == "winograd"


def test_groups_take_winograd_where_filters_are_packed() -> None:
    sizes: dict[str, Any] = {"channels": 256, "filters": 256, "groups": 4}
    assert explain(K3, length=1000, **sizes).kernel == "winograd"
    assert explain(K3, length=1000, packed=False, **sizes).kernel == "dense"


def test_memory_bounds_a_depthwise_layer() -> None:
    found = explain(K3, length=1000, channels=512, filters=512, groups=512)
    assert (found.kernel, found.bound) == ("depthwise", "memory")


def test_a_layer_on_a_gpu() -> None:
    from max.dtype import DType
    from max.graph import DeviceRef

    from max_conv import Conv1D

    found = explain(Conv1D(3, 8, 8, DType.float32, device=DeviceRef.GPU()), length=10)
    assert found.kernel == "each" and not found.shared and str(found).endswith("compiled    for itself")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "explain: a Geometry needs channels=... and filters=... as well.", {"length": 3}),
        (ValueError, "conv1d: length must be at least 1, but is 0.", {"length": 0, "channels": 1, "filters": 1}),
        (
            ValueError,
            "explain: 2 groups must divide channels=3 and filters=4.",
            {"length": 9, "channels": 3, "filters": 4, "groups": 2},
        ),
        (
            ValueError,
            "explain: dtype must be one of float32, float64, float16, bfloat16, but is 'int8'.",
            {"length": 9, "channels": 1, "filters": 1, "dtype": "int8"},
        ),
        (
            ValueError,
            "explain: device must be cpu or gpu, but is 'cuda'.",
            {"length": 9, "channels": 1, "filters": 1, "device": "cuda"},
        ),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        explain(K3, **arguments)
