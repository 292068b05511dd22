"""`max-conv check`: every kernel is compared, a wrong one is found, and the result is kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from max.driver import accelerator_count
from max.dtype import DType
from max.graph import DeviceRef

from max_conv import Conv1D, PackedGraph
from max_conv.cli.main import main
from max_conv.conv import accelerators, tuned
from max_conv.conv.processor import has_pairs, has_tiles
from max_conv.runtime import Checked, check, kernel_check, last_check

KERNELS = {
    ("conv1d dense", "NLC"),
    ("conv1d depthwise", "NLC"),
    ("conv1d lengthwise", "NCL"),
    ("conv1d lengthwise", "NLC"),
    ("conv1d short", "NLC"),
    ("conv1d winograd", "NCL"),
    ("conv1d winograd", "NLC"),
    ("conv_transpose1d dense", "NLC"),
    ("conv_transpose1d depthwise", "NLC"),
    ("conv_transpose1d lengthwise", "NCL"),
    ("conv_transpose1d lengthwise", "NLC"),
    ("conv_transpose1d short", "NLC"),
    ("conv_transpose1d winograd", "NCL"),
    ("conv_transpose1d winograd", "NLC"),
}
"""The kernels of float32."""


@pytest.fixture(autouse=True)
def own_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the user's own result as it is."""
    monkeypatch.setattr(kernel_check, "_path", lambda device: tmp_path / "checks" / "result.json")


@pytest.fixture
def only_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "EPS", {DType.float32: kernel_check.EPS[DType.float32]})


def test_every_kernel_and_dtype_has_layers() -> None:
    groups = kernel_check._drawn(3)
    for dtype in kernel_check.EPS:
        kernels = {(kernel, layout) for kernel, layout, name in groups if name == dtype.name}
        special = "amx" if has_tiles() else "paired" if has_pairs() else ""
        own = {(f"conv1d {special}", layout) for layout in ("NLC", "NCL") if special and dtype == DType.bfloat16}
        assert kernels >= own and len(kernels) >= 14 - len(own) * 2
    assert {key[:2] for key in groups if key[2] == "float32"} == KERNELS
    modes = {getattr(case.layer, "padding_mode", "") for cases in groups.values() for case in cases}
    assert modes == {"zeros", "reflect", "replicate", "circular", ""}
    assert all(len(cases) == 3 and max(cases[-1].x.shape) == kernel_check.LONG for cases in groups.values())


@pytest.mark.usefixtures("only_float32")
def test_this_machine_is_right() -> None:
    said: list[str] = []
    rows = check(3, timed=True, step=said.append)
    assert all(row.right and row.layers == 3 for row in rows), [row for row in rows if not row.right]
    assert {(row.kernel, row.layout) for row in rows[:-2]} == KERNELS
    assert [row.kernel for row in rows[-2:]] == ["conv1d in chunks", "conv1d, ragged"]
    assert all(row.gflops and row.gflops > 0 for row in rows[:-2]) and len(said) == 3
    assert last_check() == rows


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda y: y, 1),
        (lambda y: y * np.float32(1 + 1e-3), 9),
        (lambda y: np.where(np.arange(y.size).reshape(y.shape) == y.size - 1, np.nan, y), 9),
        (lambda y: y[:, :-1], 9),
    ],
)
def test_an_answer_that_is_wrong_is_found(change: Any, error: float) -> None:
    want = np.random.default_rng(0).standard_normal((2, 50, 3))
    allowed = 4 * kernel_check.EPS[DType.float32] * np.full(want.shape, 3.0)
    found = kernel_check._error(change(want), want, allowed)
    assert found <= error if error == 1 else found > error


def test_no_result_or_a_damaged_one(tmp_path: Path) -> None:
    assert last_check() is None
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks" / "result.json").write_text('[{"kernel": 1}]')
    assert last_check() is None


def test_every_kernel_of_a_gpu_has_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "architecture", lambda: "sm_90a")
    groups = kernel_check._drawn(2, DeviceRef.GPU())
    tiles = {"tiles32", "tiles64", "tiles128", "each", "rows"}
    for dtype in ("float32", "float16", "bfloat16"):
        kernels = {key[0].split()[1] for key in groups if key[2] == dtype}
        assert kernels >= tiles | ({"hopper32", "hopper64", "hopper128"} if dtype != "float32" else set())
    assert {key[0].split()[1] for key in groups if key[2] == "float64"} == {"each"}
    assert all(case.layer.device == DeviceRef.GPU() for cases in groups.values() for case in cases)


def test_a_gpu_that_is_not_there() -> None:
    if accelerator_count():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(ValueError, match="check: this machine has no accelerator that MAX can use"):
        check(device="gpu")
    refused = CliRunner().invoke(main, ["check", "--device", "gpu"])
    assert refused.exit_code == 2 and "check: this machine has no accelerator" in refused.stderr


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Checked("conv1d dense", "NLC", "float32", 8, 0.25, "1 -> 2", 12.5),
        Checked("conv1d short", "NLC", "float32", 8, 7.5, "3 -> 4 k5", None),
    ]
    monkeypatch.setattr("max_conv.runtime.check", lambda **options: rows)
    wrong = CliRunner().invoke(main, ["check"])
    assert wrong.exit_code == 1 and "7.500 WRONG" in wrong.stdout
    assert "1 of 2 rows are wrong on this machine; the worst is conv1d short NLC float32: 3 -> 4 k5" in wrong.stderr
    told = CliRunner().invoke(main, ["check", "--json"])
    assert told.exit_code == 1 and [row["right"] for row in json.loads(told.stdout)] == [True, False]
    del rows[1]
    right = CliRunner().invoke(main, ["check", "--time"])
    assert right.exit_code == 0 and "1 rows, 8 layers: all right" in right.stdout and "12.5" in right.stdout


def test_the_check_takes_usual_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise a table of times would leave kernels unchecked."""
    layer = Conv1D(3, 64, 64, DType.float32, padding=1)
    (emitted,) = kernel_check._graph(layer).emitted[0]
    monkeypatch.setattr(tuned, "folder", lambda: tmp_path)
    tuned.keep({emitted.layer.key: {"100": {"winograd": 2.0, "dense": 1.0}}})  # type: ignore[union-attr]
    assert kernel_check._graph(layer).emitted[0][0].kernel == emitted.kernel == "winograd"
    assert PackedGraph("tuned", layer, input_types=layer.input_types()).emitted[0][0].kernel == "dense"
