"""replay.py's reports, its files, and the layers that it draws; nothing is compiled here."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from max.driver import Buffer

import replay
import replay_layers
import replay_networks

CASES = {f"layer {i}": {"kernel": "dense", "digest": f"{i:064}"} for i in range(15)}


def run(
    monkeypatch: pytest.MonkeyPatch, action: str, file: Path, computed: Mapping[str, Mapping[str, str]], *options: str
) -> Result:
    monkeypatch.setattr(replay, "compute", lambda layers, networks: iter(computed.items()))
    return CliRunner().invoke(replay.main, [action, str(file), *options])


def test_what_was_recorded_is_equal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    assert run(monkeypatch, "record", file, CASES).exit_code == 0
    assert list(tmp_path.iterdir()) == [file]
    again = run(monkeypatch, "compare", file, CASES)
    assert again.exit_code == 0 and "15 of 15 cases are equal" in again.output


def test_the_first_ten_that_differ_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    replay.write(file, CASES)
    changed = {name: {"kernel": "short", "digest": "other"} for name in list(CASES)[:12]}
    result = run(monkeypatch, "compare", file, CASES | changed)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith("3 of 15 cases are equal")
    assert lines[1] == "differs: layer 0 (dense -> short)"
    assert lines[10:] == ["differs: layer 9 (dense -> short)", "and 2 more"]


def test_fewer_and_unknown_cases_are_told() -> None:
    lines, equal = replay.report(CASES, {"layer 1": CASES["layer 1"]})
    assert equal and lines == ["1 of 1 cases are equal, bit for bit; 14 of the file were not computed"]
    lines, equal = replay.report({}, {"layer 1": CASES["layer 1"]})
    assert not equal and lines[1:] == ["not in the file: layer 1"]
    assert not replay.report(CASES, {})[1]


def test_record_keeps_what_it_does_not_compute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    replay.write(file, CASES)
    new = {"network tcn output 0": {"kernel": "", "digest": "new"}}
    assert run(monkeypatch, "record", file, new).exit_code == 0
    assert replay.read(file) == CASES | new


@pytest.mark.parametrize("key", ["cpu", "threads", "max"])
def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str) -> None:
    file = tmp_path / "base.json"
    replay.write(file, CASES)
    file.write_text(json.dumps({"machine": replay.machine() | {key: "another"}, "cases": CASES}))
    result = run(monkeypatch, "compare", file, CASES)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {file} was recorded on another machine ({key}); record it on this one.\n"


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_other_files_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "base.json"
    if text is not None:
        file.write_text(text)
    result = run(monkeypatch, "compare", file, CASES)
    assert result.exit_code == 1 and "is no recording of replay.py" in result.stderr


def test_an_unknown_network_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(monkeypatch, "record", tmp_path / "base.json", CASES, "--networks", "tcn,alexnet")
    assert result.exit_code == 1 and "there is no network 'alexnet'" in result.stderr


def test_digests_tell_bits_but_not_kinds_of_nan() -> None:
    values = np.array([1.0, -0.0, np.nan], np.float32)
    quiet = values.copy()
    quiet.view(np.uint32)[2] |= 0x80000001
    assert replay.digest(Buffer.from_numpy(values)) == replay.digest(Buffer.from_numpy(quiet))
    for other in (np.abs(values), values.reshape(1, 3), np.nextafter(values, np.float32(2)), values.view(np.int32)):
        assert replay.digest(Buffer.from_numpy(values)) != replay.digest(Buffer.from_numpy(other))


def test_layers_are_the_same_in_every_run_and_cover_all() -> None:
    layers = [replay_layers.draw(number) for number in range(400)]
    assert layers == [replay_layers.draw(number) for number in range(400)]
    assert len({layer.name for layer in layers}) == len(layers)
    assert {layer.dtype for layer in layers} == {"float32", "float64", "float16", "bfloat16"}
    orders = {(layer.transposed, layer.options["filter_layout"]) for layer in layers}
    assert orders == {(False, order) for order in ("SCF", "FCS", "FSC", "CFS", "SFC")} | {
        (True, order) for order in ("SFC", "CFS", "FSC")
    }
    modes = {layer.options.get("padding_mode", "zeros") for layer in layers}
    assert modes == {"zeros", "reflect", "replicate", "circular"}


def test_silero_has_the_weights_of_its_own_kernel() -> None:
    from max_conv.graphs import silero_vad

    config = silero_vad.Config()
    weights = {name: replay_networks.weight(name, shape) for name, shape in config.shapes().items()}
    assert len(silero_vad.build(config, weights).emitted) == 1
