"""Batch jobs: the results, the effect of a broken file, and the files that a job leaves if it is killed at any moment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from max_conv.cli import batch as command
from max_conv.serving import Network, Task, open_network
from max_conv.serving.batch import PART, RECORD, Batch, Parts

FILES = 200
BROKEN = ["cut.flac", "empty.wav", "text.wav"]
LIMIT = 300
"""Seconds for a job that needs a few seconds: the machine may be busy."""


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A job that waits for ever fails its test."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"not within {3 * LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(3 * LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Silero compiled: the only network of these tests."""
    path = tmp_path_factory.mktemp("batch") / "silero.maxconv"
    open_network("silero-vad").model.save(path)
    return path


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 sounds of 0.1 to 4 s, noise with bursts of a voice-like buzz; and three files that are broken."""
    import soundfile

    folder = tmp_path_factory.mktemp("sounds")
    random = np.random.default_rng(0)
    for i in range(FILES):
        time = np.arange(random.integers(1600, 64000)) / 16000
        buzz = sum(np.sin(2 * np.pi * 120 * k * time) / k for k in range(1, 20)) * (np.sin(2 * np.pi * time) > 0)
        sound = 0.1 * buzz + 0.01 * random.standard_normal(len(time))
        soundfile.write(folder / f"{i:03}.{'flac' if i % 5 == 0 else 'wav'}", sound, 16000)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("This is no sound.")
    whole = (folder / "000.flac").read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    return folder


def results(out: Path) -> dict[str, bytes]:
    """Returns the finished files of a job, errors too, by name."""
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="session")
def want(sounds: Path, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of one process that nobody disturbs."""
    out = tmp_path_factory.mktemp("alone")
    job = Batch(str(sounds), str(out), "silero-vad", saved=str(saved))
    names, done = job.begin()
    assert (len(names), done) == (FILES + 3, 0)
    told = job({"path": np.array(names)})
    assert [name for name, error in zip(told["path"], told["error"]) if error] == BROKEN
    assert told["path"].tolist() == names and told["seconds"].sum() > FILES
    return results(out)


def start(sounds: Path, out: Path, saved: Path, *options: Any) -> subprocess.Popen:
    """Starts a job by the command."""
    line = [Path(sys.executable).parent / "max-conv", "batch", "speech", sounds, out, "--model", saved, *options]
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(list(map(str, line)), stdout=log, stderr=log, env=dict(os.environ))


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {LIMIT} s"
        time.sleep(0.002)


def wait_for_results(out: Path, count: int) -> None:
    until(lambda: len(list(out.glob("[0-9]*.json"))) >= count, f"{count} results")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(pid: int) -> list[int]:
    """Returns the processes that run files."""
    return [child for child in children(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def check_whole(out: Path, want: dict[str, bytes], complete: bool) -> None:
    """Checks that every result is the one that was wanted, to the bit, and that there is nothing else."""
    found = results(out)
    assert found == {name: want[name] for name in (want if complete else found)}
    if complete:
        assert [path.name for path in out.glob(".*")] == [RECORD]


def test_results(sounds: Path, want: dict[str, bytes]) -> None:
    assert len(want) == FILES + 3
    for name in BROKEN:
        facts = json.loads(want[f"{name}.error.json"])
        assert facts["source"] == name and facts["error"].startswith(f"audio: {name} cannot be read as a sound file")
    network = open_network("silero-vad")
    from max_conv.sound import read_audio, turns

    with_turns = 0
    for name in ("000.flac", "001.wav", "150.flac", "199.wav"):
        sound = read_audio(sounds / name, 16000)[0]
        chances = network.run(sound)
        facts = json.loads(want[f"{name}.json"])
        assert np.array_equal(np.array(facts["probabilities"], np.float32), chances)
        found = [{"start": t.start, "end": t.end} for t in turns(chances, duration=len(sound) / 16000)]
        assert facts["turns"] == found and facts["seconds"] == len(sound) / 16000 and facts["source"] == name
        with_turns += bool(found)
    assert sum(bool(json.loads(value).get("turns")) for value in want.values()) >= with_turns


def test_two_processes_equal_one(sounds: Path, saved: Path, want: dict[str, bytes], tmp_path: Path) -> None:
    given = {"folder": str(sounds), "out": str(tmp_path / "out"), "network": "silero-vad", "saved": str(saved)}
    names, _ = Batch(**given).begin()
    rows = list(command.by_processes(given, names, 2))
    assert sorted(name for name, _, _ in rows) == sorted(names)
    assert sorted(name for name, error, _ in rows if error) == BROKEN
    Batch(**given).tidy()
    check_whole(tmp_path / "out", want, complete=True)


def test_a_killed_worker(sounds: Path, saved: Path, want: dict[str, bytes], tmp_path: Path) -> None:
    """The job goes on, and nothing is lost."""
    out = tmp_path / "out"
    job = start(sounds, out, saved, "--workers", 2)
    try:
        for count in (10, 60):
            wait_for_results(out, count)
            os.kill(workers(job.pid)[0], signal.SIGKILL)
        assert job.wait(LIMIT) == 1, Path(f"{out}.log").read_text()
    finally:
        job.kill()
    assert f"3 of {FILES + 3} files failed" in Path(f"{out}.log").read_text()
    check_whole(out, want, complete=True)


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_driver(count: int, sounds: Path, saved: Path, want: dict[str, bytes], tmp_path: Path) -> None:
    """Its workers end, no result is half written, and the next job does the missing files."""
    out = tmp_path / "out"
    job = start(sounds, out, saved, "--workers", count)
    try:
        wait_for_results(out, 20)
        below = children(job.pid)
        assert len(below) == (0 if count == 1 else 1 + len(workers(job.pid)))
    finally:
        job.kill()
        job.wait()
    until(lambda: not any(map(alive, below)), "the workers end")
    check_whole(out, want, complete=False)
    missing = FILES - len(list(out.glob("[0-9]*.json")))
    assert list(out.glob(f"{PART}*")) and missing > 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("[0-9]*.json")}
    again = start(sounds, out, saved, "--json")
    assert again.wait(LIMIT) == 1
    line = next(line for line in Path(f"{out}.log").read_text().splitlines() if line.startswith("{"))
    assert json.loads(line)["done"] == missing and json.loads(line)["done_before"] == FILES - missing
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    check_whole(out, want, complete=True)


def test_stopped(sounds: Path, saved: Path, want: dict[str, bytes], tmp_path: Path) -> None:
    """SIGTERM ends all processes, and removes unfinished files."""
    out = tmp_path / "out"
    job = start(sounds, out, saved, "--workers", 2)
    try:
        wait_for_results(out, 10)
        below = children(job.pid)
        job.terminate()
        assert job.wait(LIMIT) == 128 + signal.SIGTERM
    finally:
        job.kill()
    until(lambda: not any(map(alive, below)), "the workers end")
    assert "stopped by SIGTERM; what was half done is removed." in Path(f"{out}.log").read_text()
    assert not list(out.glob(f"{PART}*")) and len(results(out)) < FILES
    check_whole(out, want, complete=False)


# Stand-ins for the process that runs files. They are loaded by name in a new process.


def deadly(given: dict[str, Any], pipe: Any) -> None:
    """Dies of one file."""
    pipe.send(None)
    while True:
        name = pipe.recv()
        if "deadly" in name:
            os.kill(os.getpid(), signal.SIGKILL)
        pipe.send({"path": [name], "error": [""], "seconds": [1.0]})


def dies_late(given: dict[str, Any], pipe: Any) -> None:
    """Dies the first time that it gets a file, when the other process has nothing left to do."""
    pipe.send(None)
    while True:
        name = pipe.recv()
        if "late" in name and not (mark := Path(given["out"], "mark")).exists():
            mark.touch()
            time.sleep(5)
            os.kill(os.getpid(), signal.SIGKILL)
        pipe.send({"path": [name], "error": [""], "seconds": [1.0]})


def stillborn(given: dict[str, Any], pipe: Any) -> None:
    os._exit(3)


def telling(given: dict[str, Any], pipe: Any) -> None:
    pipe.send("load: the model is damaged.")


def test_a_file_that_kills_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_work", deadly)
    given = {"folder": str(tmp_path), "out": str(tmp_path / "out"), "network": "silero-vad"}
    (tmp_path / "out").mkdir()
    names = ["a.wav", "deadly.wav", "b.wav", "c.wav", "d.wav"]
    rows = {name: error for name, error, _ in command.by_processes(given, names, 2)}
    assert rows.keys() == set(names) and [name for name, error in rows.items() if error] == ["deadly.wav"]
    facts = json.loads((tmp_path / "out/deadly.wav.error.json").read_text())
    assert facts["error"] == "batch: 2 processes ended with status -9 while they ran deadly.wav; is the memory full?"


def test_the_last_file_of_a_killed_process_goes_to_an_idle_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_work", dies_late)
    given = {"folder": str(tmp_path), "out": str(tmp_path), "network": "silero-vad"}
    rows = list(command.by_processes(given, ["a.wav", "late.wav", "b.wav"], 2))
    assert sorted(rows) == [("a.wav", "", 1.0), ("b.wav", "", 1.0), ("late.wav", "", 1.0)]


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (stillborn, r"batch: 2 processes ended with status 3 while they opened the network; is the memory full\?"),
        (telling, r"load: the model is damaged\."),
    ],
)
def test_no_process_can_start(work: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_work", work)
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        list(command.by_processes({"folder": "a", "out": str(tmp_path), "network": "silero-vad"}, ["a.wav"], 2))


# The results of each kind of network, with a plain function for the network.


def half(model: Any, signal: np.ndarray, config: Any) -> np.ndarray:
    return signal / 2


def spoken(model: Any, mels: np.ndarray, config: Any) -> np.ndarray:
    return np.repeat(mels.mean(axis=-1), 10, axis=1)


CONFIG = SimpleNamespace(rate=8000, mels=4)
STAND_INS = {
    "codec": Network("net", Task("codec", "sound", "", half), CONFIG, None),  # type: ignore[arg-type]
    "vocoder": Network("net", Task("vocoder", "mels", "", spoken), CONFIG, None),  # type: ignore[arg-type]
    "features": Network("net", Task("features", "mels", "", half), CONFIG, None),  # type: ignore[arg-type]
}


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[Path]:
    """Files whose names differ by their suffix or folder alone, arrays, and files that are not sources."""
    import soundfile

    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(["a.wav", "a.flac", "below/a.wav", "B.WAV"]):
        soundfile.write(folder / name, np.full((80 * (i + 1), 2), 0.5), 8000)
    np.save(folder / "m.npy", np.ones((5, 4)))
    np.save(folder / "wrong.npy", np.ones((5, 3)))
    (folder / "notes.txt").touch()
    (folder / ".hidden.wav").touch()
    yield folder


def run(folder: Path | str, out: Path | str, kind: str) -> dict[str, str]:
    job = Batch(str(folder), str(out), STAND_INS[kind])
    told = job({"path": job.begin()[0]})
    return dict(zip(told["path"], told["error"]))


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def test_codec_writes_sound(sources: Path, tmp_path: Path) -> None:
    import soundfile

    out = tmp_path / "out"
    assert run(sources, out, "codec") == dict.fromkeys(["B.WAV", "a.flac", "a.wav", "below/a.wav"], "")
    assert tree(out) == {"B.WAV.wav", "a.flac.wav", "a.wav.wav", "below/a.wav.wav"}
    for name, samples in (("a.wav", 80), ("a.flac", 160), ("below/a.wav", 240), ("B.WAV", 320)):
        sound, rate = soundfile.read(out / f"{name}.wav")
        assert rate == 8000 and sound.shape == (samples, 2) and np.allclose(sound, 0.25, atol=1e-4)


def test_vocoder_and_features(sources: Path, tmp_path: Path) -> None:
    import soundfile

    told = run(sources, tmp_path / "sound", "vocoder")
    assert told["m.npy"] == "" and told["wrong.npy"].startswith("net: wrong.npy must hold floating point of shape")
    assert soundfile.read(tmp_path / "sound/m.npy.wav")[0].shape == (50,)
    assert tree(tmp_path / "sound") == {"m.npy.wav", "wrong.npy.error.json"}
    run(sources, tmp_path / "vectors", "features")
    assert np.array_equal(np.load(tmp_path / "vectors/m.npy.npy"), np.full((1, 5, 4), 0.5, np.float32))
    # Others may read a result, as a file that is written directly.
    assert (tmp_path / "vectors/m.npy.npy").stat().st_mode == (sources / "m.npy").stat().st_mode


def test_a_failed_file_is_tried_again(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(sources, out, "features")
    assert tree(out) == {"m.npy.npy", "wrong.npy.error.json"}
    np.save(sources / "wrong.npy", np.ones((5, 4)))
    assert run(sources, out, "features") == {"wrong.npy": ""}
    assert tree(out) == {"m.npy.npy", "wrong.npy.npy"} and run(sources, out, "features") == {}


def test_a_result_that_cannot_be_written(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is not the fault of a file: the job ends, and nothing is there."""
    real = np.save

    def full(path: Path, array: np.ndarray) -> None:
        real(path, array)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(sources, tmp_path / "out", "features")
    assert tree(tmp_path / "out") == set()


def test_leftovers(sources: Path, tmp_path: Path) -> None:
    """Folders of processes that are gone are removed, and only these."""
    out = tmp_path / "out"
    out.mkdir()
    mine = Parts(str(out))
    (mine.folder / "result.npy").touch()
    for name, files in ((f"{PART}gone", ["lock", "result.npy"]), (f"{PART}early", [])):
        (out / name).mkdir()
        for file in files:
            (out / name / file).touch()
    Batch(str(sources), str(out), STAND_INS["features"]).begin()
    assert mine.folder.is_dir() and not (out / f"{PART}gone").exists() and not (out / f"{PART}early").exists()
    folder = mine.folder
    del mine
    assert not folder.exists()


def test_a_folder_holds_one_network(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(sources, out, "vocoder")
    with pytest.raises(ValueError, match=r"out holds results of another job \(task vocoder, not features\); choose"):
        run(sources, out, "features")
    (out / RECORD).write_text("{")
    with pytest.raises(ValueError, match=r"\.json is damaged\)"):
        run(sources, out, "vocoder")
    (out / RECORD).unlink()
    assert "m.npy" in run(sources, out, "features")
    # A job that failed before its first result does not count.
    run(sources, tmp_path / "new", "vocoder")
    (tmp_path / "new/m.npy.wav").unlink()
    assert "m.npy" in run(sources, tmp_path / "new", "features")


def test_folders_are_checked(sources: Path, tmp_path: Path) -> None:
    for out in (sources, sources / "below/out"):
        with pytest.raises(ValueError, match=r"^batch: OUT \(.*\) must not lie in"):
            run(sources, out, "codec")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run(tmp_path / "gone", tmp_path / "out", "codec")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none holds no file that ends in \.wav or \.flac or"):
        run(tmp_path / "none", tmp_path / "out", "codec")
    assert not (tmp_path / "out").exists()


def test_urls(sources: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="URLs need fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    memory = MemoryFileSystem()
    memory.put(str(sources), "/in", recursive=True)
    told = run("memory://in", "memory://out", "features")
    assert told["m.npy"] == "" and told["wrong.npy"].startswith("net: wrong.npy must hold")
    run(sources, tmp_path / "out", "features")
    found = {name.removeprefix("/out/"): memory.cat_file(name) for name in memory.find("/out")}
    assert found.pop(RECORD) and found == results(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert run("memory://in", tmp_path / "out", "features") == told
    assert run("memory://in", "memory://out", "features").keys() == {"wrong.npy"}


def test_urls_without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ImportError, match=r"^batch: s3://a/b is a URL, which needs fsspec; run pip install fsspec\.$"):
        run("s3://a/b", "out", "features")
