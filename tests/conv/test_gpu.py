"""The GPU path: compiled for three architectures everywhere, run where there is a GPU.

What would run on a GPU runs on the CPU, too, so that the tests themselves are known to be right.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from max.driver import accelerator_count
from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType

import max_conv
from harness import Case, check, graphs_of, normal, run
from max_conv.conv.layouts import permute
from max_conv.conv.recurrent import lstm

COMPILE = Path(__file__).parent / "gpu_compile.py"
NO_GPU = pytest.mark.skipif(accelerator_count() == 0, reason="no accelerator here: the GPU path was only compiled")
OTHERS = [pytest.param(*other, marks=pytest.mark.nightly) for other in (("cuda", "sm_100a"), ("hip", "gfx942"))]


@pytest.mark.parametrize(("api", "architecture"), [("cuda", "sm_90a"), *OTHERS])
def test_compiles_for(api: str, architecture: str) -> None:
    # MAX exports a PYTHONEXECUTABLE with which the new process would leave its virtual environment.
    command = [sys.executable, str(COMPILE), api, architecture]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("compiled 21 convolutions")


# Filter (K, C / groups, F), length, options.
LAYERS: dict[str, tuple[tuple[int, int, int], int, dict[str, Any]]] = {
    "dense": ((3, 80, 96), 257, {"padding": 1}),
    "long": ((7, 2, 4), 70_001, {"stride": 2}),
    "dilated": ((11, 32, 32), 257, {"dilation": 5, "padding": "same"}),
    "grouped": ((5, 4, 24), 257, {"groups": 3, "padding": "causal"}),
    "depthwise": ((4, 1, 64), 257, {"groups": 64, "padding": 3}),
    "reflect": ((5, 9, 5), 57, {"padding": 7, "padding_mode": "reflect"}),
    "circular": ((5, 9, 5), 57, {"padding": 7, "padding_mode": "circular"}),
    "replicate": ((5, 9, 5), 57, {"padding": 7, "padding_mode": "replicate"}),
    "no batch": ((1, 4, 6), 9, {}),
}
# Filter (K, F / groups, C), length, options.
TRANSPOSED: dict[str, tuple[tuple[int, int, int], int, dict[str, Any]]] = {
    "upsampling": ((16, 24, 40), 57, {"stride": 8, "padding": 4}),
    "long": ((4, 4, 2), 35_001, {"stride": 2, "padding": "causal"}),
    "grouped": ((5, 8, 12), 57, {"groups": 3, "stride": 2, "dilation": 3, "output_padding": 2}),
    "depthwise": ((4, 1, 64), 125, {"groups": 64, "stride": 2}),
    "gaps": ((3, 5, 7), 19, {"stride": 6, "dilation": 4, "padding": 2}),
    "one position": ((7, 3, 5), 1, {"stride": 3, "padding": (2, 1)}),
}


def cases() -> Iterator[Case]:
    for name, (shape, length, options) in LAYERS.items():
        for layout, filter_layout in (("NLC", "SCF"), ("NCL", "FCS"), ("NLC", "FSC")):
            batch = () if name == "no batch" else (2,)
            x = normal(*batch, length, shape[1] * options.get("groups", 1))
            axes = layout if batch else layout.replace("N", "")
            x, w = permute(x, "NLC"[-x.ndim :], axes), permute(normal(*shape), "SCF", filter_layout)
            kwargs = {**options, "layout": layout, "filter_layout": filter_layout}
            yield Case(f"{name} {layout} {filter_layout}", x, w, normal(shape[2]), kwargs)
    for name, (shape, length, options) in TRANSPOSED.items():
        for layout, filter_layout in (("NLC", "SFC"), ("NCL", "CFS")):
            x, w = permute(normal(2, length, shape[2]), "NLC", layout), permute(normal(*shape), "SFC", filter_layout)
            bias = normal(shape[1] * options.get("groups", 1))
            kwargs = {**options, "layout": layout, "filter_layout": filter_layout}
            yield Case(f"transposed {name} {layout}", x, w, bias, kwargs, transposed=True)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        shapes = ((2, 33, 17), (5, 17, 40), (40,), (5, 40, 17))
        data, filter, shift, turned = (torch.from_numpy(normal(*shape)).to(dtype) for shape in shapes)
        yield Case(str(dtype), data, filter, shift, {"padding": 2})
        yield Case(f"transposed {dtype}", data, turned, shift, {"stride": 2}, transposed=True)


CASES = list(cases())
LSTM = {"x": (3, 20, 5), "w_ih": (5, 4 * 33), "w_hh": (33, 4 * 33), "bias": (4 * 33,), "h0": (3, 33), "c0": (3, 33)}


def lstm_graph(device: DeviceRef) -> Graph:
    return Graph("lstm", lstm, [TensorType(DType.float32, shape, device) for shape in LSTM.values()])


def graphs() -> dict[str, Any]:
    return graphs_of(CASES) | {"lstm": (lstm_graph(DeviceRef.CPU()), {})}


def test_runs_on_the_cpu(models: dict[str, max_conv.Model]) -> None:
    for case, got in zip(CASES, run(CASES, models)):
        check(case, got)


@NO_GPU
def test_runs_on_the_gpu() -> None:
    for case, got in zip(CASES, run(CASES, device=DeviceRef.GPU())):
        check(case, got)


def test_lstm_runs_on_the_cpu(models: dict[str, max_conv.Model]) -> None:
    check_lstm(models["lstm"])


@NO_GPU
def test_lstm_runs_on_the_gpu() -> None:
    check_lstm(max_conv.compile(lstm_graph(DeviceRef.GPU())))


def check_lstm(model: max_conv.Model) -> None:
    theirs = torch.nn.LSTM(5, 33, batch_first=True)
    state = {key: value.detach() for key, value in theirs.state_dict().items()}
    x, memory = torch.randn(3, 20, 5), torch.zeros(3, 33)
    bias = state["bias_ih_l0"] + state["bias_hh_l0"]
    inputs = [
        x,
        state["weight_ih_l0"].T.contiguous(),
        state["weight_hh_l0"].T.contiguous(),
        bias,
        memory,
        memory.clone(),
    ]
    assert [tuple(value.shape) for value in inputs] == list(LSTM.values())
    got = model(*inputs)
    with torch.no_grad():
        outputs, (hidden, cell) = theirs(x)
    for ours, want in zip(got, (outputs, hidden[0], cell[0])):
        np.testing.assert_allclose(torch.from_dlpack(ours).cpu().numpy(), want.numpy(), atol=1e-5)
