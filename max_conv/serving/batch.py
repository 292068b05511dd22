"""Batch jobs: a network on every file of a folder, in this process, in several, or on a cluster by Ray Data.

The results are the ledger: the result of `a.wav` is `a.wav.json` (speech, pitch), `a.wav.wav` (codec), `a.npy.wav` (vocoder) or
`a.wav.npy` (features). The suffix of the source stays in the name, so `a.wav` and `a.flac` have different results. Files in
folders below keep their folders. A result appears whole or not at all, and a later job runs only the files without a result. A file
that cannot be read or run gets `a.wav.error.json`, which is removed when the file succeeds.

Unfinished files are in folders `.max-conv-part.*` of OUT. Each is locked by its process; the next job removes the folders whose
process is gone.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ..sound import Track, Turn, note, read_audio, stretches, turns, write_audio
from .networks import graph_file
from .task import SOUND, Network, Task, open_network

SOUNDS, ARRAYS = (".wav", ".flac", ".ogg", ".mp3"), (".npy",)
"""The suffixes of the files that a job reads."""
ENDINGS = {"speech": ".json", "pitch": ".json", "vocoder": ".wav", "codec": ".wav", "features": ".npy"}
"""The end of a result's name, for each kind of network."""
ERROR = ".error.json"
RECORD = ".max-conv-batch.json"
"""The file in OUT that says which network made the results."""
PART = ".max-conv-part."


def read_input(name: str, task: Task, source: Path, config: Any) -> np.ndarray:
    """Reads a network's input from a file.

    Args:
        name: The network's name, for error messages.
        task: Its task.
        source: A sound file of any rate and channel count, or a .npy file of an array.
        config: The network's config.

    Returns:
        float32. Sound at `config.rate`: (samples,), channels mixed, for speech and pitch, otherwise (channels, samples).
        An array: (batch, length, values).

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds something else.

    >>> task, config = graph_file("whisper").TASK, graph_file("whisper").Config()
    >>> with tempfile.NamedTemporaryFile(suffix=".npy") as file:
    ...     np.save(file.name, np.zeros((10, config.mels)))
    ...     read_input("whisper", task, Path(file.name), config).shape
    (1, 10, 80)
    """
    if task.input == SOUND:
        sound = read_audio(source, config.rate)
        return sound.mean(axis=0) if task.kind in ("speech", "pitch") else sound
    try:
        array = np.load(source, allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(f"{name}: {source} must be a .npy file of an array.") from None
    return task.check(f"{name}: {source}", array, config)


def speech_facts(found: Iterable[Turn]) -> dict[str, Any]:
    """Returns speech turns as JSON fields.

    >>> speech_facts([Turn(0.5, 1.0)])
    {'turns': [{'start': 0.5, 'end': 1.0}]}
    """
    return {"turns": [{"start": turn.start, "end": turn.end} for turn in found]}


def pitch_facts(track: Track, found: Iterable[Any]) -> dict[str, Any]:
    """Returns a pitch track and its stretches as JSON fields.

    >>> pitch_facts(Track(np.zeros(1), np.full(1, 440), np.ones(1)), [])["track"]
    {'times': [0.0], 'pitch': [440.0], 'periodicity': [1.0]}
    """
    frames = {name: [round(float(value), 4) for value in values] for name, values in vars(track).items()}
    return {"stretches": [vars(stretch) | {"note": note(stretch.pitch)} for stretch in found], "track": frames}


def _behind(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL, and the folder in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ImportError(f"batch: {url} is a URL, which needs fsspec; run pip install fsspec.") from None
    files, root = url_to_fs(url)
    return files, root.rstrip("/")


class Place:
    """A folder, on this machine or at a URL that fsspec reads, such as s3://bucket/folder.

    Raises:
        ImportError: If it is a URL, and fsspec or its package for this kind of URL is not installed.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.remote: Any = None
        self.root = os.path.abspath(address)
        if "://" in address:
            self.remote, self.root = _behind(address)

    def names(self) -> list[str]:
        """Returns the files of the folder and of the folders below, relative and in order, without hidden ones.

        Raises:
            OSError: If a folder cannot be read.
        """

        def stop(error: OSError) -> None:
            raise error

        if self.remote is not None:
            self.remote.invalidate_cache()
            paths = [path[len(self.root) :].lstrip("/") for path in self.remote.find(self.root)]
        else:
            walk = os.walk(self.root, onerror=stop)
            paths = [
                os.path.relpath(os.path.join(folder, name), self.root) for folder, _, files in walk for name in files
            ]
        return sorted(path for path in paths if not any(part.startswith(".") for part in path.split("/")))

    def fetch(self, name: str, folder: Path) -> Path:
        """Returns the local path of a file, which is copied to `folder` if it is at a URL."""
        if self.remote is None:
            return Path(self.root, name)
        local = folder / f"source{Path(name).suffix}"
        self.remote.get_file(f"{self.root}/{name}", str(local))
        return local

    def put(self, part: Path, name: str) -> None:
        """Moves a finished file to its place. At a URL, its file system decides how it appears."""
        if self.remote is None:
            target = Path(self.root, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            part.replace(target)
            return
        target_name = f"{self.root}/{name}"
        self.remote.makedirs(target_name.rpartition("/")[0], exist_ok=True)
        self.remote.put_file(str(part), target_name)

    def remove(self, name: str) -> None:
        """Removes a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            if self.remote is None:
                os.unlink(os.path.join(self.root, name))
            else:
                self.remote.rm_file(f"{self.root}/{name}")


class Batch:
    """Runs a network on files, and writes a result for each: long-lived, and called with a batch of paths.

    Args:
        folder: The folder of the sources, or a URL. Paths are relative to it.
        out: The folder of the results, or a URL.
        network: A network's name, which is opened at the first call, or an open network.
        config: Its sizes; None means the published ones.
        weights: As for `open_network`.
        saved: As for `open_network`.

    Ray Data accepts the class: `dataset.map_batches(Batch, fn_constructor_kwargs=...)` with a column "path".

    >>> import soundfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.mkdir(f"{folder}/in")
    ...     soundfile.write(f"{folder}/in/a.wav", np.zeros(8000), 16000)
    ...     job = Batch(f"{folder}/in", f"{folder}/out", open_network("silero_vad"))
    ...     names, done = job.begin()
    ...     names, job({"path": names})["error"].tolist(), [name for name in os.listdir(f"{folder}/out") if name[0] != "."]
    (['a.wav'], [''], ['a.wav.json'])
    """

    def __init__(
        self,
        folder: str,
        out: str,
        network: str | Network,
        config: Any = None,
        *,
        weights: str | None = None,
        saved: str | None = None,
    ) -> None:
        self.source, self.out = Place(folder), Place(out)
        self.config, self.weights, self.saved = config, weights, saved
        self.name = network if isinstance(network, str) else network.name
        self.task = graph_file(network).TASK if isinstance(network, str) else network.task
        self._network = None if isinstance(network, str) else network
        self._parts: Parts | None = None

    def open(self, step: Callable[[str], AbstractContextManager[Any]] = nullcontext) -> Network:
        """Returns the network; the first call loads or compiles it. `step` is as for `open_network`."""
        if self._network is None:
            self._network = open_network(self.name, self.config, weights=self.weights, saved=self.saved, step=step)
        return self._network

    def begin(self) -> tuple[list[str], int]:
        """Makes OUT, removes the unfinished files of killed jobs there, and returns the sources without a result.

        Returns:
            The paths, and how many sources have a result already.

        Raises:
            ValueError: If OUT is in FOLDER or holds results of another network, or FOLDER has nothing to read.
            OSError: If one of them cannot be read or written.
        """
        suffixes = SOUNDS if self.task.input == SOUND else ARRAYS
        if self.source.remote is None and not os.path.isdir(self.source.root):
            raise FileNotFoundError(f"batch: there is no folder {self.source.address}.")
        inside = f"{os.path.realpath(self.out.root)}/".startswith(f"{os.path.realpath(self.source.root)}/")
        if inside and type(self.out.remote) is type(self.source.remote):
            raise ValueError(
                f"batch: OUT ({self.out.address}) must not lie in {self.source.address}; choose another folder."
            )
        sources = [name for name in self.source.names() if name.lower().endswith(suffixes)]
        if not sources:
            raise ValueError(f"batch: {self.source.address} holds no file that ends in {' or '.join(suffixes)}.")
        if self.out.remote is None:
            os.makedirs(self.out.root, exist_ok=True)
        self.tidy()
        made = set(self.out.names())
        self._check_record(any(not name.endswith(ERROR) for name in made))
        missing = [name for name in sources if name + ENDINGS[self.task.kind] not in made]
        return missing, len(sources) - len(missing)

    def tidy(self) -> None:
        """Removes the unfinished files of processes that are gone."""
        remove_parts(self._root())

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Runs the network on files, and writes a result or an error for each.

        Args:
            batch: "path": (B,), the paths of sources, relative to FOLDER.

        Returns:
            "path": (B,). "error": (B,), a sentence, or "" if there is a result. "seconds": (B,), float64, of sound.

        Raises:
            OSError: If a result cannot be written; then no part of it exists.
            ImportError: If a package that reads sound is not installed.
        """
        names = [str(name) for name in batch["path"]]
        told = [self._one(name) for name in names]
        errors, seconds = [error for error, _ in told], [second for _, second in told]
        return {"path": np.array(names, object), "error": np.array(errors, object), "seconds": np.array(seconds, float)}

    def fail(self, name: str, error: str) -> None:
        """Writes the error of a source."""
        self._put({"source": name, "error": error}, name + ERROR)

    def _one(self, name: str) -> tuple[str, float]:
        network, folder = self.open(), self._folder()
        local = None
        try:
            local = self.source.fetch(name, folder)
            values = read_input(network.name, network.task, local, network.config)
            result = network.run(values)
            ending, rate = ENDINGS[network.task.kind], getattr(network.config, "rate", 0)
            heard = values if network.task.input == SOUND else result if ending == ".wav" else None
            seconds = 0.0 if heard is None else heard.shape[-1] / rate
            text = json.dumps(self._facts(name, result, seconds), allow_nan=False) if ending == ".json" else ""
        except ImportError:  # every file would fail
            raise
        except Exception as error:  # a broken file is an answer, not the end of the job
            sentence = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            sentence = sentence.replace(str(local), name)
            self.fail(name, sentence)
            return sentence, 0.0
        finally:
            if local is not None and self.source.remote is not None:
                local.unlink(missing_ok=True)
        part = folder / f"result{ending}"
        if ending == ".json":
            part.write_text(text)
        elif ending == ".npy":
            np.save(part, result)
        else:
            write_audio(part, result, rate)
        self.out.put(part, name + ending)
        self.out.remove(name + ERROR)
        return "", seconds

    def _facts(self, name: str, result: Any, seconds: float) -> dict[str, Any]:
        facts = {"source": name, "network": self.name, "seconds": seconds}
        if self.task.kind == "pitch":
            return facts | pitch_facts(result.track, stretches(result.track))
        config = self.open().config
        found = turns(result, hop=config.hop / config.rate, duration=seconds)
        # The shortest decimals that give the same float32.
        return facts | speech_facts(found) | {"probabilities": [float(str(value)) for value in result]}

    def _put(self, facts: Mapping[str, Any], name: str) -> None:
        part = self._folder() / "facts.json"
        part.write_text(json.dumps(facts))
        self.out.put(part, name)

    def _root(self) -> str:
        return self.out.root if self.out.remote is None else tempfile.gettempdir()

    def _folder(self) -> Path:
        """Returns the folder of this process for unfinished files."""
        if self._parts is None:
            os.makedirs(self._root(), exist_ok=True)
            self._parts = Parts(self._root())
        return self._parts.folder

    def _check_record(self, results: bool) -> None:
        """Notes in OUT which network makes the results, or raises ValueError if there are results of another one."""
        config = None if self.config is None else repr(self.config)
        facts = {
            "task": self.task.kind,
            "network": self.name,
            "weights": self.weights,
            "model": self.saved,
            "config": config,
        }
        try:
            known = json.loads(self.out.fetch(RECORD, self._folder()).read_text()) if results else facts
            other = [f"{key} {known[key]}, not {facts[key]}" for key in facts if known[key] != facts[key]]
        except FileNotFoundError:
            other = []
        except (ValueError, KeyError, TypeError):
            other = [f"{RECORD} is damaged"]
        if other:
            raise ValueError(
                f"batch: {self.out.address} holds results of another job ({other[0]}); choose another folder, or remove "
                f"{RECORD} there to go on anyway."
            )
        self._put(facts, RECORD)


class Parts:
    """A locked folder for unfinished files. It is removed with the object; if the process is killed, its lock is freed."""

    def __init__(self, root: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=PART, dir=root))
        lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        with contextlib.suppress(OSError):  # without locks, nobody removes the folder of a killed process
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        weakref.finalize(self, _end_parts, self.folder, lock)


def _end_parts(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def remove_parts(root: str) -> None:
    """Removes the folders of unfinished files whose process is gone."""
    for folder in Path(root).glob(f"{PART}*"):
        try:
            with open(folder / "lock", "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # killed before it made its lock
            with contextlib.suppress(OSError):
                folder.rmdir()
        except OSError:  # somebody has the lock, or it belongs to another user
            continue


def rows_of(table: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yields the path, the error and the seconds of each source in the result of a `Batch`."""
    for path, error, seconds in zip(table["path"], table["error"], table["seconds"], strict=True):
        yield str(path), str(error), float(seconds)
