"""The benchmark's arithmetic and its messages. Nothing is timed here."""

import json
import math
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import bench
import compiles
import report
from layers import LAYERS, Layer
from network_racers import judge
from racers import RACES, Call, Contender, Data, distance, verify

RACE = RACES["float32"]
PEAKS: dict[str, Any] = {"fma_one": 250.0, "fma_all": 500.0, "threads": 2}
PEAKS["copy"] = {"L2": {"fits": 1 << 20, "GB/s": 400.0}, "DRAM": {"fits": None, "GB/s": 50.0}}
SMALL = Layer(4, 8, 3, 10, padding=1)
CRASHED = {"MAX": {"failed": "crashed", "why": "SIGSEGV"}}


def made_up(**milliseconds: float) -> dict:
    """Returns a row with two rounds per contender; the contenders' names have no spaces."""
    names = {name.replace(" ", "_").replace(".", "_"): name for name in RACE.contenders}
    seconds = {names[key]: [0.9e-3 * ms, 1.1e-3 * ms] for key, ms in milliseconds.items()}
    return report.row(RACE, SMALL, seconds, CRASHED, PEAKS)


@pytest.mark.parametrize(
    ("layer", "out_length", "flop", "values", "text"),
    [
        (SMALL, 10, 2 * 10 * 8 * 3 * 4, 40 + 80 + 8 * 13, "4→8 k3 p1 L10"),
        (Layer(4, 8, 3, 10), 8, 2 * 8 * 8 * 3 * 4, 40 + 64 + 8 * 13, "4→8 k3 L10"),
        (Layer(4, 8, 3, 10, dilation=4), 2, 2 * 2 * 8 * 3 * 4, 40 + 16 + 8 * 13, "4→8 k3 d4 L10"),
        (Layer(4, 8, 4, 11, stride=3, groups=2), 3, 2 * 3 * 8 * 4 * 2, 44 + 24 + 8 * 9, "4→8 k4 s3 g2 L11"),
        (Layer(2, 2, 2, 5, groups=2, batch=3), 4, 3 * 2 * 4 * 2 * 2, 3 * (10 + 8) + 2 * 3, "2→2 k2 g2 N3 L5"),
    ],
    ids=str,
)
def test_layer(layer: Layer, out_length: int, flop: int, values: int, text: str) -> None:
    assert (layer.out_length, layer.flop, layer.values, str(layer)) == (out_length, flop, values, text)
    x, w, bias = layer.data("float32")
    assert x.size + w.size + bias.size + layer.batch * layer.filters * out_length == values


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_an_output(name: str) -> None:
    layer = LAYERS[name]
    assert layer.out_length > 0 and layer.channels % layer.groups == layer.filters % layer.groups == 0


def test_data_for_bfloat16_fits_into_it() -> None:
    for array in SMALL.data("bfloat16"):
        assert not (array.view(np.uint32) & 0xFFFF).any()


def test_row() -> None:
    found = made_up(max_conv_NLC=2.0, max_conv_NCL=4.0, PyTorch=3.0, JAX=5.0)
    assert found["ms"]["JAX"] == pytest.approx(5) and found["rounds"]["JAX"] == pytest.approx([4.5, 5.5])
    assert found["ratios"] == pytest.approx({"best peer / NLC": 1.5, "best peer / NCL": 0.75})
    assert found["GFLOP/s"] == pytest.approx(SMALL.flop / 2e6)
    assert found["of roof"] == pytest.approx(report.roof(SMALL, "float32", PEAKS) / 2e-3)
    assert json.loads(json.dumps(found)) == found


def test_row_without_peers_or_without_ours() -> None:
    assert made_up(max_conv_NLC=2.0)["ratios"] == {}
    alone = made_up(PyTorch=2.0)
    assert alone["ratios"] == {} and "of roof" not in alone


def test_roof() -> None:
    near, wide, deep = Layer(1, 1, 1, 100), Layer(1, 1, 1, 1 << 20), Layer(256, 256, 3, 300, padding=1)
    assert report.roof(wide, "float32", PEAKS) == pytest.approx(4 * wide.values / 50e9)
    assert report.roof(wide, "bfloat16", PEAKS) == pytest.approx(2 * wide.values / 50e9)
    assert report.roof(near, "float32", PEAKS) == pytest.approx(4 * near.values / 400e9)
    assert report.roof(deep, "float32", PEAKS) == pytest.approx(deep.flop / 500e9)


def test_means() -> None:
    rows = {
        "a": made_up(max_conv_NLC=1.0, max_conv_NCL=1.0, PyTorch=2.0),
        "b": made_up(max_conv_NLC=1.0, max_conv_NCL=2.0, PyTorch=8.0, JAX=9.0),
        "c": made_up(PyTorch=1.0),
    }
    mean = report.means(RACE, rows)
    times = {"max_conv NLC": 1, "max_conv NCL": math.sqrt(2), "PyTorch": 4, "JAX": 9}
    assert mean["times"] == pytest.approx(times)
    assert mean["ratios"] == pytest.approx({"best peer / NLC": 4, "best peer / NCL": math.sqrt(8)})
    assert report.means(RACE, {}) == {"times": {}, "ratios": {}, "of roof": {}}


def test_verdict_names_the_rows() -> None:
    rows = {
        "fast": made_up(max_conv_NLC=1.0, max_conv_NCL=1.0, PyTorch=0.96),
        "slow": made_up(max_conv_NLC=1.0, max_conv_NCL=1.1, PyTorch=1.0),
        "worse": report.row(RACE, SMALL, {}, {"max_conv NLC": {"failed": "wrong", "why": "off by nan"}}, PEAKS),
    }
    slow = "slow: best peer / NCL is 0.909, below 0.95"
    assert report.verdict(rows, report.LEAST) == [slow, "worse: max_conv NLC wrong"]
    assert report.verdict(rows, 0) == ["worse: max_conv NLC wrong"]


def test_table() -> None:
    names = ["max_conv NLC", "PyTorch", "MAX"]
    found = made_up(max_conv_NLC=2.0, PyTorch=3.0)
    lines = [*report.table_head(RACE, names), report.table_row(RACE, names, "tiny", found)]
    lines.append(report.table_mean(RACE, names, report.means(RACE, {"tiny": found})))
    assert {line.count("|") for line in lines} == {10}
    assert lines[2].startswith("| tiny | 4→8 k3 p1 L10 | 2.000 | 3.000 | crashed | 1.50 | – | ")
    assert lines[3].startswith("| geometric mean | × max_conv NLC | 1.00× | 1.50× | – | 1.50 | – |")


def test_epilogue_table() -> None:
    race = RACES["epilogues"]
    seconds = {"max_conv alone": [1e-3], "max_conv ReLU": [1.5e-3]}
    failed = {name: {"failed": "wrong", "why": ""} for name in race.contenders if name not in seconds}
    lines = report.epilogue_table(race, {"tiny": report.row(race, SMALL, seconds, failed, PEAKS)})
    assert lines[2:4] == ["| alone | 1.000 | 1.00 |", "| ReLU | 1.500 | 1.50 |"]
    assert lines[-1] == "| residual | wrong | – |"


def test_chart(tmp_path: Path) -> None:
    rows = {"tiny": made_up(max_conv_NLC=1.0, max_conv_NCL=2.0, PyTorch=0.01)}
    result = {"layers": rows, "versions": dict.fromkeys(RACE.contenders, "1"), "threads": 2, "peaks": PEAKS}
    report.draw(result | {"machine": bench.machine()}, RACE, tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--layers", "nowhere"], "bench: there is no layer 'nowhere'; the layers are whisper conv1, "),
        (["--contenders", "nobody"], "bench: there is no contender 'nobody'; the contenders are max_conv NLC, "),
        (["--dtype", "bfloat16", "--contenders", "JAX"], "bench: there is no contender 'JAX'; "),
        (["--json", "/nowhere/a.json"], "bench: /nowhere/a.json cannot be written: there is no folder /nowhere."),
        (["--chart", "a.doc"], "bench: a.doc cannot be drawn: name a file that ends in .png or .svg."),
        (["--epilogues", "--check"], "bench: --epilogues races in float32 against nobody; "),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], sentence: str) -> None:
    result = CliRunner().invoke(bench.main, words)
    assert result.exit_code == 2
    assert result.output.startswith(sentence) and result.output.count("\n") == 1


def never(layer: Layer, data: Data, threads: int) -> Call:
    raise AssertionError("a contender that is not installed ran")


def test_who_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    contenders = {"max_conv NLC": RACE.contenders["max_conv NLC"], "Nobody": Contender(["no-such-package"], never)}
    race = RACE._replace(contenders=contenders)
    assert bench.taking_part(race.contenders, []) == {"max_conv NLC": f"max-conv {version('max-conv')}"}
    said = capsys.readouterr().err
    assert said.startswith("bench: Nobody is left out: the package no-such-package is not installed")
    with pytest.raises(bench.Sentence, match="nobody is left"):
        bench.taking_part(race.contenders, ["Nobody"])


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.shutil, "which", lambda _: None)
    try:
        version("torch")
    except PackageNotFoundError:
        pytest.skip("torch is not installed")
    assert bench.missing(RACE.contenders, "torch.compile") == "there is no C++ compiler (g++)"
    assert bench.missing(RACE.contenders, "PyTorch") is None


def test_a_racer_that_dies_is_started_again() -> None:
    code = (
        "import os\nfor line in iter(input, ''):\n os.kill(os.getpid(), 11 * ('die' in line))\n print(line, flush=True)"
    )
    racer = bench.Racer([sys.executable, "-S", "-c", code], {})
    assert racer.ask({"layer": "die"}) == {"failed": "crashed", "why": "SIGSEGV"}
    assert racer.ask({"layer": "live"}) == {"layer": "live"}
    racer.stop()
    assert racer.process is None


def test_answers_are_verified() -> None:
    want = np.arange(6.0).reshape(1, 2, 3)
    assert distance(want + 0.5, want) == pytest.approx(0.1)
    assert distance(want[:, :1], want) == math.inf
    assert verify(Call(lambda: want), want, 1e-6) is None
    assert verify(Call(lambda: want + 1), want, 1e-6) == "off by 2.0e-01 of the largest value"
    assert verify(Call(lambda: np.where(want == 1, np.nan, want)), want, 1e-6) == "off by nan of the largest value"
    answers = iter([want, want, want + 1])
    assert verify(Call(lambda: next(answers)), want, 1e-6)


def test_the_scripts_are_where_bench_looks() -> None:
    assert (bench.HERE / "racers.py").exists() and (bench.HERE / "peaks.mojo").exists()
    assert Path(bench.__file__).parent == bench.HERE


def told(seconds: float, size: int, decibels: float = 120.0) -> dict:
    return {"seconds": [0.9 * seconds, 1.1 * seconds], "bytes": size, "process": 2 * size, "decibels": decibels}


def test_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row runs in a new process with the caches of the rows before; the first row is the unit."""
    ran = []

    def answer(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append((command[1:], (env["MAX_CONV_CACHE"], env["XDG_CACHE_HOME"])))
        seconds = {"wall": 2.0 * len(ran), "cpu": 3.0 * len(ran)}
        return subprocess.CompletedProcess(command, 0, json.dumps(seconds))

    monkeypatch.setattr(subprocess, "run", answer)
    result = CliRunner().invoke(bench.main, ["--compile", "--layers", "none"])
    assert result.exit_code == 0, result.output
    assert [words for words, _ in ran] == [[compiles.__file__, str(i)] for i in range(len(compiles.ROWS))]
    assert len({caches for _, caches in ran}) == 1
    lines = result.stdout.splitlines()
    assert lines[2:4] == [
        "| MAX's graph of one ReLU | 2.000 | 3.00 | 1.00 |",
        "| the first layer of a kind | 4.000 | 6.00 | 2.00 |",
    ]


def test_network_rows() -> None:
    facts = {"max_conv": told(0.5, 300), "PyTorch": told(1.0, 200), "OpenVINO": told(0.8, 400)}
    halves = {"max_conv bf16": told(0.1, 100, 40), "OpenVINO bf16": told(0.1, 10, 30)}
    found = report.network_facts(facts | halves, {"ONNX Runtime": {"failed": "refused", "why": ""}}, 10.0)
    assert found["ratios"] == pytest.approx({"best peer / ours": 1.6})  # bfloat16 does not count
    assert (found["memory"], found["times real time"]) == pytest.approx((1.5, 20))
    assert json.loads(json.dumps(found)) == found
    names = [*facts, *halves, "ONNX Runtime"]
    alone = report.network_facts({"PyTorch": told(1.0, 200)}, {name: CRASHED["MAX"] for name in names}, 10.0)
    rows = {"net, batch 1": found, "net, batch 8": alone}
    lines = [*report.network_head(names), report.network_row("net, batch 1", names, found)]
    lines += [report.network_row("net, batch 8", names, alone), report.network_mean(names, rows)]
    assert {line.count("|") for line in lines} == {13}
    ours = "500.00 | 1000.00 | 800.00 | 100.00 | 100.00 | refused | 1.60 | 20 | 0 | 1.50 | 40 |"
    assert lines[2] == f"| net, batch 1 | {ours}"
    assert lines[3].endswith("| crashed | – | – | – | – | – |") and lines[4].startswith("| geometric mean | | ")
    assert report.verdict({"slow": report.network_facts({"max_conv": told(2, 1), "PyTorch": told(1, 1)}, {}, 1)}, 1)


def test_answers_of_networks_are_judged(tmp_path: Path) -> None:
    want: list[np.ndarray] = [np.linspace(-1, 1, 100, dtype=np.float32), np.arange(400)]
    for i, array in enumerate(want):
        np.save(tmp_path / f"output{i}.npy", array)
    wrong, decibels = judge("max_conv", want, tmp_path)
    assert wrong is None and decibels > 1000
    wrong, decibels = judge("max_conv", [want[0] * 1.01, want[1]], tmp_path)
    assert wrong and "off by 1.0e-02" in wrong and decibels == pytest.approx(40)
    assert judge("max_conv bf16", [want[0] * 1.01, want[1] // 2], tmp_path)[0] is None
    assert "of the codes are equal" in str(judge("OpenVINO", [want[0], want[1] // 2], tmp_path)[0])
    assert "shape (99,)" in str(judge("OpenVINO", [want[0][1:], want[1]], tmp_path)[0])
