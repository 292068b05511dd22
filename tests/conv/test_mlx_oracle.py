"""MLX as a second live oracle, on its own layouts: NLC data, (F, K, C / groups) filters."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import max_conv
from harness import Array, Case, check, check_reference, graphs_of, ids, normal, run

mx = pytest.importorskip("mlx.core", reason="MLX is installed by the test extra on Linux only")
nn = pytest.importorskip("mlx.nn", reason="MLX is installed by the test extra on Linux only")

# N, L, C, F, K, stride, padding, dilation, groups
ROWS = [
    (1, 9, 1, 1, 1, 1, 0, 1, 1),
    (2, 9, 4, 6, 3, 1, 0, 1, 1),
    (2, 30, 5, 7, 4, 1, 3, 1, 1),
    (1, 100, 80, 48, 3, 1, 1, 1, 1),
    (1, 100, 48, 40, 3, 2, 1, 1, 1),
    (3, 57, 16, 33, 5, 1, 8, 4, 1),
    (1, 64, 16, 16, 15, 1, 7, 1, 1),
    (2, 41, 3, 20, 7, 5, 4, 3, 1),
    (1, 200, 1, 64, 10, 5, 0, 1, 1),
    (2, 31, 32, 1, 7, 1, 3, 1, 1),
    (2, 9, 4, 6, 3, 2, 3, 2, 2),
    (1, 33, 12, 18, 4, 1, 2, 1, 3),
    (2, 50, 16, 16, 7, 1, 3, 1, 16),
    (2, 50, 16, 48, 4, 1, 3, 1, 16),
    (1, 50, 40, 40, 31, 2, 15, 1, 40),
    (2, 20, 24, 8, 5, 3, 10, 5, 8),
    (1, 5, 2, 3, 5, 1, 0, 1, 1),
    (1, 1, 3, 4, 3, 1, 1, 1, 1),
]


def op_cases() -> Iterator[Case]:
    for row in ROWS:
        n, length, c, f, k, stride, padding, dilation, groups = row
        x, w = normal(n, length, c), normal(f, k, c // groups, seed=1)
        kwargs = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        theirs = np.array(mx.conv1d(mx.array(x), mx.array(w), **kwargs))
        yield Case(f"op-{'-'.join(map(str, row))}", x, w, None, kwargs | {"filter_layout": "FSC"}, expected=theirs)


def layer_cases() -> Iterator[Case]:
    for row in ROWS:
        n, length, c, f, k, stride, padding, dilation, groups = row
        mx.random.seed(0)
        layer = nn.Conv1d(c, f, k, stride, padding, dilation, groups)
        layer.bias = mx.random.normal((f,))  # it starts at zero
        x = normal(n, length, c)
        kwargs = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        weights = np.array(layer.weight), np.array(layer.bias)
        theirs = np.array(layer(mx.array(x)))
        yield Case(f"layer-{'-'.join(map(str, row))}", x, *weights, kwargs | {"filter_layout": "FSC"}, expected=theirs)


def transposed_cases() -> Iterator[Case]:
    """The same sizes in the other direction; as a layer if there is one group, because MLX's layer has no groups.

    MLX computes wrong lengths for padding beyond the filter's reach: those rows have less.
    """
    for row in ROWS:
        n, length, c, f, k, stride, padding, dilation, groups = row
        sizes = dict(stride=stride, padding=min(padding, dilation * (k - 1)), dilation=dilation)
        sizes["output_padding"] = stride // 2
        x, w, bias = normal(n, length + padding, c), normal(f, k, c // groups, seed=1), None
        if groups > 1:
            theirs = mx.conv_transpose1d(mx.array(x), mx.array(w), **sizes, groups=groups)
        else:
            layer = nn.ConvTranspose1d(c, f, k, **sizes)
            bias = normal(f)
            layer.update({"weight": mx.array(w), "bias": mx.array(bias)})
            theirs = layer(mx.array(x))
        kwargs = sizes | {"groups": groups, "filter_layout": "FSC"}
        name = f"transposed-{'-'.join(map(str, row))}"
        yield Case(name, x, w, bias, kwargs, expected=np.array(theirs), transposed=True)


CASES = [*op_cases(), *layer_cases(), *transposed_cases()]


def graphs() -> dict[str, Any]:
    return graphs_of(CASES)


@pytest.fixture(scope="module")
def results(models: dict[str, max_conv.Model]) -> dict[str, Array]:
    return dict(zip(ids(CASES), run(CASES, models), strict=True))


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_case(case: Case, results: dict[str, Array]) -> None:
    check_reference(case)
    check(case, results[case.id])
