"""Filters that `compile` packs, and the weights that they are made from."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops

import max_conv
from harness import normal
from max_conv.conv.arrays import as_buffer
from max_conv.conv.dispatch import Layer
from max_conv.conv.geometry import Geometry, TransposedGeometry
from max_conv.conv.layouts import permute
from max_conv.conv.packing import LINE, Packing, aligned
from max_conv.conv.processor import has_pairs, has_tiles
from max_conv.conv.reference import conv1d_ref
from max_conv.frontends.torch import Conv1d
from max_conv.runtime import idle

RANDOM = np.random.default_rng(0)
F32 = DType.float32
PYTORCH: dict[str, Any] = {"layout": "NCL", "filter_layout": "FCS"}


@pytest.mark.parametrize("kernel", ["winograd", "dense", "depthwise", "paired", "amx"])
@pytest.mark.parametrize("filter_layout", ["FCS", "FSC", "CFS", "SFC"])
def test_every_layout_packs_the_same(kernel: str, filter_layout: str) -> None:
    groups, channels, filters = (34, 1, 1) if kernel == "depthwise" else (2, 5, 34)
    layer = Layer(Geometry.of(7, stride=2, dilation=3), "NLC", channels, filters, groups)
    w = normal(7, channels, groups * filters)
    want = Packing("weight", kernel, layer, "SCF")(w)
    got = Packing("weight", kernel, layer, filter_layout)(permute(w, "SCF", filter_layout))
    assert got.tobytes() == want.tobytes()
    assert got.ctypes.data % LINE == 0


@pytest.mark.parametrize("kernel", ["winograd", "dense", "depthwise", "lengthwise"])
def test_every_transposed_layout_packs_the_same(kernel: str) -> None:
    groups, channels, filters = (34, 1, 1) if kernel == "depthwise" else (2, 5, 34)
    geometry = TransposedGeometry.of(7, stride=6, dilation=4)
    layer = Layer.of(geometry, "NLC", channels, filters, groups)
    w = normal(7, filters, groups * channels)
    want = Packing("weight", kernel, layer, "SFC")(w)
    fsc = w.reshape(7, filters, groups, channels).transpose(2, 1, 0, 3).reshape(groups * filters, 7, channels)
    for layout, same in (("CFS", permute(w, "SFC", "CFS")), ("FSC", fsc)):
        got = Packing("weight", kernel, layer, layout)(same)
        assert got.tobytes() == want.tobytes() and got.ctypes.data % LINE == 0


def test_phases_are_filters() -> None:
    """Tap k belongs to phase k mod 3; in the order of time it is the last but k // 3 of the phase."""
    w = normal(7, 5, 4)
    layer = Layer.of(TransposedGeometry.of(7, stride=3), "NLC", 4, 5, 1)
    phased = Packing("weight", "lengthwise", layer, "SFC")(w)
    assert phased.shape == (3, 4, 3 * 5)
    for t, phase in np.ndindex(3, 3):
        k = phase + 3 * (2 - t)
        got = phased[t, :, phase * 5 : (phase + 1) * 5]
        assert (got == (w[k].T if k < 7 else 0)).all()
    panels = Packing("weight", "dense", layer, "SFC")(w).reshape(2, 3, 4, 32)
    assert (panels[0, :, :, :5] == phased[..., :5]).all() and (panels[0, :, :, 16:21] == phased[..., 5:10]).all()
    assert (panels[1, :, :, :5] == phased[..., 10:]).all() and not panels[:, :, :, 5:16].any()


def test_dense_panels_hold_the_filter_and_zeros() -> None:
    w = normal(3, 5, 2 * 34)
    packed = Packing("weight", "dense", Layer(Geometry.of(3), "NLC", 5, 34, 2), "SCF")(w)
    panels = packed.reshape(2, 2, 3, 5, 32).transpose(2, 3, 0, 1, 4).reshape(3, 5, 2, 64)
    assert (panels[..., :34].reshape(3, 5, 68) == w).all() and not panels[..., 34:].any()


def test_pairs_of_channels_stand_side_by_side() -> None:
    w = RANDOM.integers(1, 2**16, (3, 5, 2 * 34), np.uint16)
    packed = Packing("weight", "paired", Layer(Geometry.of(3), "NLC", 5, 34, 2, "bfloat16"), "SCF")(w)
    assert packed.shape == (4, 3, 6 * 32)
    for f, c, k in np.ndindex(68, 6, 3):
        group, filter = divmod(f, 34)
        panel, lane = divmod(filter, 32)
        value = packed[2 * group + panel, k, c // 2 * 64 + 2 * lane + c % 2]
        assert value == (w[k, c, f] if c < 5 else 0)


@pytest.mark.parametrize(("dilation", "each"), [(1, 5), (2, 32)])
def test_pairs_of_inputs_fill_the_steps_of_tiles(dilation: int, each: int) -> None:
    w = RANDOM.integers(1, 2**16, (7, 5, 2 * 34), np.uint16)
    geometry = Geometry.of(7, dilation=dilation)
    packed = Packing("weight", "amx", Layer(geometry, "NLC", 5, 34, 2, "bfloat16"), "SCF")(w)
    rows = {1: 64, 2: 7 * 32}[dilation]
    assert packed.shape == (4, 1, rows * 32) and np.count_nonzero(packed) == w.size
    for f, c, k in np.ndindex(68, 5, 7):
        group, filter = divmod(f, 34)
        panel, lane = divmod(filter, 32)
        row = k * each + c
        assert packed[2 * group + panel, 0, row // 2 * 64 + 2 * lane + row % 2] == w[k, c, f]


@pytest.mark.skipif(not has_pairs(), reason="filters are packed in pairs for AVX512_BF16 and AMX alone")
def test_a_bfloat16_model_packs_pairs(tmp_path: Path) -> None:
    conv = Conv1d(9, 20, 3, dtype="bfloat16", generator=0)
    model = max_conv.compile(conv)
    assert sorted(model._weights) == ["bias", f"weight.{'amx' if has_tiles() else 'paired'}.FCS.s1d1g1"]
    model.save(tmp_path / "conv.maxconv")
    x = as_buffer(normal(1, 9, 50), DType.bfloat16)
    got, again = model(x), max_conv.load(tmp_path / "conv.maxconv")(x)
    y, same = (torch.from_dlpack(values).float().numpy() for values in (got, again))
    state = {name: torch.from_dlpack(value).float().numpy() for name, value in conv.state_dict().items()}
    want = conv1d_ref(torch.from_dlpack(x).float(), state["weight"], state["bias"], **PYTORCH)
    assert (y == same).all()
    np.testing.assert_allclose(y, want, atol=0.02)


def test_a_weight_with_several_readers() -> None:
    """Convolutions of two strides and a sum share a weight: it is packed for each stride, and kept."""
    first = max_conv.Conv1D(3, 64, 64, F32, padding=1, name="conv")
    causal = max_conv.Conv1D(3, 64, 64, F32, padding="causal", name="conv")
    second = max_conv.Conv1D(3, 64, 64, F32, stride=2, padding=1, name="conv")
    causal.filter = second.filter = first.filter
    lone = max_conv.Conv1D(1, 64, 40, F32, name="lone")

    def twice(x: TensorValue) -> tuple[TensorValue, ...]:
        return second(causal(first(x))), ops.sum(first.filter), lone(x)

    weights = {"conv.weight": normal(3, 64, 64) / 8, "lone.weight": normal(1, 64, 40, seed=2)}
    model = max_conv.compile(twice, {"x": TensorType(F32, ["n", "l", 64], DeviceRef.CPU())}, weights=weights)
    held = sorted(model._weights)
    assert held == [
        "conv.weight",
        "conv.weight.winograd.SCF.s1d1g1",
        "conv.weight.winograd.SCF.s2d1g1",
        "lone.weight.short.SCF.s1d1g1",
    ]
    x, w = normal(1, 300, 64, seed=1), weights["conv.weight"]
    y, total, z = model(x)
    want = conv1d_ref(conv1d_ref(conv1d_ref(x, w, padding=1), w, padding="causal"), w, stride=2, padding=1)
    np.testing.assert_allclose(y, want, atol=1e-4)
    np.testing.assert_allclose(total, w.sum(-1, keepdims=True), atol=1e-4)
    np.testing.assert_allclose(z, conv1d_ref(x, weights["lone.weight"]), atol=1e-4)


def test_packed_filters_are_saved(tmp_path: Path) -> None:
    conv = max_conv.Conv1D(7, 40, 40, F32, padding=3, permute=True)
    w = normal(40, 40, 7)
    model = max_conv.compile(conv, weights={"weight": w})
    model.save(tmp_path / "conv.maxconv")
    loaded = max_conv.load(tmp_path / "conv.maxconv")
    assert sorted(loaded._weights) == ["weight.winograd.FCS.s1d1g1"]
    x = normal(2, 40, 9, seed=1)  # too short for Winograd's kernel in a plain session
    assert model(x).tobytes() == loaded(x).tobytes()
    want = conv1d_ref(x.transpose(0, 2, 1), w.transpose(2, 1, 0), padding=3).transpose(0, 2, 1)
    np.testing.assert_allclose(loaded(x), want, atol=1e-3)


def test_arrays_start_at_cache_lines() -> None:
    for size in (1, 7, 1000):
        array = aligned((size, 3), np.float32)
        assert array.shape == (size, 3) and array.ctypes.data % LINE == 0


IDLE = """
import json, os, sys
import numpy as np
import max_conv
from max.dtype import DType

def slacks():
    found = {}
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/{task}/timerslack_ns") as file:
                found[task] = int(file.read())
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended
    return found

conv = max_conv.Conv1D(3, 4, 4, DType.float32)
model = max_conv.compile(conv, weights={"weight": np.zeros((3, 4, 4), np.float32)})
before = slacks()
model(np.zeros((1, 9, 4), np.float32))
json.dump([before, slacks()], sys.stdout)
"""


@pytest.mark.skipif(not Path("/proc/self/timerslack_ns").exists(), reason="Linux alone can let timers be late")
def test_a_thread_of_the_first_run_has_late_timers() -> None:
    def late() -> list[int]:
        found: list[int] = []

        def read() -> None:
            found.append(int(Path(f"/proc/{threading.get_native_id()}/timerslack_ns").read_text()))

        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        return found

    own = late()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idle, "_started", False)
        assert idle.first_run(late) == [idle.SLACK]
        assert idle.first_run(late) == late() == own


@pytest.mark.skipif(os.getuid() != 0, reason="only root may read how late the timers of other threads are")
@pytest.mark.skipif(not Path("/proc/self/timerslack_ns").exists(), reason="Linux alone can let timers be late")
def test_the_polling_thread_has_late_timers() -> None:
    """Their effect depends on the load: a thread is woken together with other threads, whenever these are woken."""
    done = subprocess.run(
        [sys.executable, "-c", IDLE], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    before, after = json.loads(done.stdout)
    started = [slack for thread, slack in after.items() if thread not in before]
    assert idle.SLACK in started
    assert all(after.get(thread, slack) == slack for thread, slack in before.items())
