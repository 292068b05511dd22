"""The GPU path: compiled for three architectures everywhere, run where there is a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from max.driver import accelerator_count
from max.dtype import DType
from max.graph import DeviceRef

import max_conv
from max_conv.reference import conv1d_ref

COMPILE = Path(__file__).parent / "gpu_compile.py"


@pytest.mark.parametrize(("api", "architecture"), [("cuda", "sm_90a"), ("cuda", "sm_100a"), ("hip", "gfx942")])
def test_compiles_for(api: str, architecture: str) -> None:
    # MAX exports a PYTHONEXECUTABLE that would lead the new process out of its virtual environment.
    command = [sys.executable, str(COMPILE), api, architecture]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("compiled 11 convolutions")


CASES = {
    "dense": {"kernel_size": 3, "in_channels": 80, "out_channels": 96, "padding": 1},
    "long": {"kernel_size": 7, "in_channels": 2, "out_channels": 4, "length": 70_001, "stride": 2},
    "dilated": {"kernel_size": 11, "in_channels": 32, "out_channels": 32, "dilation": 5, "padding": "same"},
    "grouped": {"kernel_size": 5, "in_channels": 12, "out_channels": 24, "num_groups": 3, "padding": "causal"},
    "depthwise": {"kernel_size": 4, "in_channels": 64, "out_channels": 64, "num_groups": 64, "padding": 3},
    "reflect": {"kernel_size": 5, "in_channels": 9, "out_channels": 5, "padding": 7, "padding_mode": "reflect"},
    "circular": {"kernel_size": 5, "in_channels": 9, "out_channels": 5, "padding": 7, "padding_mode": "circular"},
    "replicate": {"kernel_size": 5, "in_channels": 9, "out_channels": 5, "padding": 7, "padding_mode": "replicate"},
}


@pytest.mark.skipif(accelerator_count() == 0, reason="no accelerator on this machine: the GPU path was only compiled")
@pytest.mark.parametrize("permute", [False, True], ids=["NLC", "NCL"])
@pytest.mark.parametrize("case", list(CASES))
def test_runs_on_the_gpu(case: str, permute: bool) -> None:
    options = dict(CASES[case])
    length = options.pop("length", 257)
    layer = max_conv.Conv1D(**options, dtype=DType.float32, device=DeviceRef.GPU(), has_bias=True, permute=permute)
    random = np.random.default_rng(0)
    state = {
        name: random.standard_normal([int(n) for n in weight.shape]).astype(np.float32)
        for name, weight in layer.raw_state_dict().items()
    }
    layer.load_state_dict(state)
    sizes = {"N": 2, "L": length, "C": layer.in_channels}
    x = random.standard_normal([sizes[axis] for axis in layer.layout]).astype(np.float32)
    want = conv1d_ref(
        x,
        state["weight"],
        state["bias"],
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.num_groups,
        padding_mode=layer.padding_mode,
        layout=layer.layout,
        filter_layout=layer.filter_layout,
    )
    np.testing.assert_allclose(max_conv.compile(layer)(x), want, rtol=1e-5, atol=1e-4)
