"""Every layout of the data with every layout of the filter."""

from typing import Any, get_args

import numpy as np
import pytest

import max_conv
from harness import Array, Case, check, graphs_of, normal, run
from max_conv.conv.layouts import FilterLayout, Layout, permutation, permute

LAYOUTS, FILTER_LAYOUTS = get_args(Layout), get_args(FilterLayout)


def cases() -> list[Case]:
    """Few filters and many: for fewer than 8 per group, another kernel computes NLC data."""
    found = []
    for layout in LAYOUTS:
        for filter_layout in FILTER_LAYOUTS:
            for filters in (6, 40):
                x = permute(normal(2, 21, 10), "NLC", layout)
                w = permute(normal(3, 5, filters), "SCF", filter_layout)
                options = {
                    "groups": 2,
                    "stride": 2,
                    "padding": (2, 1),
                    "layout": layout,
                    "filter_layout": filter_layout,
                }
                found.append(Case(f"{layout}-{filter_layout}-{filters}", x, w, normal(filters), options))
    return found


CASES = cases()


def graphs() -> dict[str, Any]:
    return graphs_of(CASES)


@pytest.fixture(scope="module")
def answers(models: dict[str, max_conv.Model]) -> dict[str, Array]:
    return {case.id: got for case, got in zip(CASES, run(CASES, models))}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_layouts(case: Case, answers: dict[str, Array]) -> None:
    check(case, answers[case.id])


@pytest.mark.parametrize("source", FILTER_LAYOUTS)
@pytest.mark.parametrize("target", FILTER_LAYOUTS)
def test_there_and_back(source: str, target: str) -> None:
    w = normal(3, 4, 5)
    there = permute(w, source, target)
    assert there.shape == tuple(w.shape[axis] for axis in permutation(source, target))
    np.testing.assert_array_equal(permute(there, target, source), w)
