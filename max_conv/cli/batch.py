"""The command `max-conv batch`: a network on every file of a folder, in one process, in several, or on a cluster."""

import contextlib
import json
import os
import re
import time
from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from .run import NETWORKS, SAVED
from .terminal import CONFIG, JSON, WEIGHTS, config, sentence, step

if TYPE_CHECKING:
    from rich.progress import Progress, Task

# Importing MAX and NumPy is slow: the command imports what it uses, so that --help is fast.

DEFAULTS = {"speech": "silero-vad", "pitch": "crepe"}
TRIES = 2
"""How many processes a file may end before it counts as failed, and how many may end before they have a file."""
AHEAD = 2
"""Files that are sent to a process before it has answered, so that it does not wait for the next file."""
TOGETHER = 8
"""Files that Ray hands over in one call."""

Row = tuple[str, str, float]
"""A source, its error or "", and its seconds of sound."""


@click.command()
@click.argument("task", type=click.Choice([*NETWORKS]))
@click.argument("folder")
@click.argument("out")
@click.option("--network", "name", metavar="NAME", help="Default: silero-vad for speech, crepe for pitch.")
@WEIGHTS
@CONFIG
@SAVED
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes, or actors of Ray.")
@click.option("--ray", metavar="ADDRESS", help='A cluster\'s address, "auto", or "local" to start Ray here.')
@JSON
def batch(
    task: str,
    folder: str,
    out: str,
    name: str | None,
    weights: str | None,
    file: Any,
    saved: Any,
    **how: Any,
) -> None:
    """Runs a network on every file in FOLDER and below, and writes the results to OUT.

    Sources are .wav, .flac, .ogg and .mp3 files, or .npy arrays for networks that take arrays. The result of a.wav is
    a.wav.json (speech, pitch), a.wav.wav (codec), a.npy.wav (vocoder) or a.wav.npy (features). Both folders may be URLs, such as
    s3://BUCKET/FOLDER, if fsspec is installed.

    Run it again to do what is missing. A file that cannot be read or run has a.wav.error.json instead, and is tried again. The
    exit status is 1 if there is such a file.
    """
    if (name := name or DEFAULTS.get(task)) not in NETWORKS[task]:
        came = f"not {name}" if name else "as --network"
        raise ValueError(f"batch: pass a network for {task}, {came}: {', '.join(NETWORKS[task])}.")
    if weights and saved:
        raise ValueError("batch: pass --model or --weights, but not both.")
    if saved and not saved.is_file():
        raise FileNotFoundError(f"batch: --model {saved} is not a file.")
    given = {"folder": folder, "out": out, "network": name, "config": config(name, file)}
    weights = _absolute(weights) if weights and os.path.exists(weights) else weights
    _run(given | {"weights": weights, "saved": saved and _absolute(saved)}, **how)


def _absolute(address: Any) -> str:
    """Returns a path that is the same in another folder; a URL is one already."""
    return str(address) if "://" in str(address) else os.path.abspath(address)


def _run(given: dict[str, Any], workers: int, ray: str | None, as_json: bool) -> None:
    """Runs a job, shows its progress, and prints the result."""
    from ..serving.batch import ERROR, Batch, rows_of

    job = Batch(**given)
    names, done = job.begin()
    failed, seconds, start = 0, 0.0, time.perf_counter()
    rows: Generator[Row]
    try:
        if not names:
            rows = (row for row in list[Row]())
        elif ray:
            rows = by_ray(given, names, workers, ray)
        elif workers > 1:
            rows = by_processes(given, names, workers)
        else:
            job.open(step)
            rows = (row for name in names for row in rows_of(job({"path": [name]})))
        start = time.perf_counter()
        # The processes end when the generator is closed, also after an error in this loop.
        with contextlib.closing(rows), _progress(len(names)) as progress:
            for _, error, sound in rows:
                failed, seconds = failed + bool(error), seconds + sound
                progress.update(progress.task_ids[0], advance=1, sound=seconds)
    finally:
        job.tidy()
    taken = time.perf_counter() - start
    facts = {"out": given["out"], "network": given["network"], "files": done + len(names), "done_before": done}
    facts |= {"done": len(names) - failed, "failed": failed, "seconds": seconds, "seconds_taken": taken}
    if as_json:
        click.echo(json.dumps(facts | {"files_per_second": len(names) / taken, "times_real_time": seconds / taken}))
    else:
        before = f", {done} were there" if done else ""
        click.echo(f"{given['out']}: {len(names) - failed} new results{before} ({_rate(len(names), seconds, taken)})")
    if failed:
        click.echo(f"max-conv: {failed} of {len(names)} files failed; {given['out']}/*{ERROR} say why.", err=True)
        raise click.exceptions.Exit(1)


def _rate(files: int, seconds: float, taken: float) -> str:
    taken = max(taken, 1e-9)
    heard = f", {seconds / taken:,.0f}× real time" if seconds else ""
    return f"{files / taken:,.1f} files/s{heard}"


def _progress(total: int) -> "contextlib.AbstractContextManager[Progress]":
    """Returns a progress bar of files on stderr, with the rate and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: "Task") -> Text:
            return Text(_rate(int(task.completed), task.fields["sound"], task.elapsed or 0) if task.completed else "")

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True))
    progress.add_task("files", total=total, sound=0.0)
    return progress


def by_processes(given: Mapping[str, Any], names: Iterable[str], count: int) -> Generator[Row]:
    """Runs a job in `count` processes, and yields a row for each source as it is done; `given` are `Batch`'s arguments.

    A process that is killed is replaced, and its files are done again. A file that ends two processes has failed.
    The first process opens the network before the others start, so that it is compiled once.

    Raises:
        RuntimeError: If a process cannot open the network, or cannot write a result.
    """
    from collections import Counter, deque
    from multiprocessing.connection import wait

    from ..runtime import load  # noqa: F401, it removes PYTHONEXECUTABLE, which would give the processes another environment
    from ..serving.batch import Batch, rows_of

    todo, ended, opened = deque(names), Counter[str](), False
    workers: dict[Any, _Worker] = {}
    try:
        while left := len(todo) + sum(len(worker.has) for worker in workers.values()):
            while len(workers) < min(left, count if opened else 1):
                worker = _Worker(given)
                workers[worker.pipe] = worker
            for worker in workers.values():
                # The last files go to any process that is free.
                while todo and worker.opened and len(worker.has) < (AHEAD if len(todo) > count else 1):
                    if not worker.send(todo[0]):
                        break
                    todo.popleft()
            for pipe in wait([*workers]):
                worker = workers[pipe]
                try:
                    answer = worker.pipe.recv()
                except (EOFError, OSError):  # it was killed
                    error = workers.pop(pipe).lost()
                    culprit = worker.has[0] if worker.has else ""
                    ended[culprit] += bool(culprit) or not worker.opened
                    if ended[culprit] >= TRIES:
                        if not culprit:
                            raise RuntimeError(error) from None
                        worker.has.popleft()
                        Batch(**given).fail(culprit, error)
                        yield culprit, error, 0.0
                    todo.extendleft(reversed(worker.has))
                    continue
                if isinstance(answer, str):
                    raise RuntimeError(answer)
                if answer is None:
                    opened = worker.opened = True
                    ended[""] = 0
                else:
                    worker.has.popleft()
                    yield from rows_of(answer)
    finally:
        for worker in workers.values():
            worker.stop()


class _Worker:
    """A process that runs sources one after the other."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        from collections import deque
        from multiprocessing import get_context

        context = get_context("spawn")  # a forked child of MAX would wait for ever
        self.pipe, theirs = context.Pipe()
        # Not a daemon: MAX compiles in a separate process, and daemons may not have children.
        self.process = context.Process(target=_work, args=(dict(given), theirs))
        self.process.start()
        theirs.close()
        self.opened = False
        self.has: deque[str] = deque()

    def send(self, name: str) -> bool:
        """Gives it a source; returns whether it is alive."""
        try:
            self.pipe.send(name)
        except OSError:
            return False
        self.has.append(name)
        return True

    def lost(self) -> str:
        """Returns a sentence about a process that has ended."""
        what = f"ran {self.has[0]}" if self.has else "opened the network"
        return f"batch: {TRIES} processes ended with status {self.stop()} while they {what}; is the memory full?"

    def stop(self) -> int | None:
        """Ends the process at once; returns its exit status. Its finished results stay."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode


def _work(given: Mapping[str, Any], pipe: Any) -> None:
    """Runs sources that come through a pipe: answers None when the network is open, then a table for each, or a sentence."""
    import signal
    import threading
    from multiprocessing import parent_process

    from ..serving.batch import Batch

    def end_with_parent() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        job = Batch(**given)
        job.open()
        pipe.send(None)
        while True:
            pipe.send(job({"path": [pipe.recv()]}))
    except EOFError:  # nobody sends any more
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(sentence(error))


def by_ray(given: dict[str, Any], names: Iterable[str], count: int, address: str) -> Generator[Row]:
    """Runs a job by Ray Data in `count` actors, and yields a row for each source as it is done.

    Args:
        given: The arguments of `Batch`. The nodes see the same folders and files, and have max_conv installed.
        names: The sources.
        count: The number of actors, each with a CPU.
        address: A cluster's address, "auto", or "local": Ray is started here, and ended with the job.

    Raises:
        ImportError: If Ray is not installed.
        RuntimeError: If Ray cannot start, or the job ends with an error.
    """
    import logging
    import socket

    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError("batch: --ray needs Ray; run pip install 'max-conv[ray]'.") from None
    from ..serving.batch import Batch

    rows = [{"path": name} for name in names]
    local = {"num_cpus": count, "include_dashboard": False} if address == "local" else {}
    try:
        if re.fullmatch(r"[^/]+:\d+", address):  # Ray itself would wait for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR", **local)
    except Exception as error:  # Ray raises many kinds
        what = f"batch: Ray does not answer at {address} ({_first_line(error)})"
        raise RuntimeError(f"{what}; is it running, and is its token in RAY_AUTH_TOKEN_PATH?") from error
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the sentence below says it
        table = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // TOGETHER)).map_batches(
            Batch,
            fn_constructor_kwargs=given | {key: _absolute(given[key]) for key in ("folder", "out")},
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=1,
            batch_size=TOGETHER,
        )
        for row in table.iter_rows():
            yield row["path"], row["error"], row["seconds"]
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"batch: the job ended with an error in Ray ({_first_line(error)})") from error
    finally:
        ray.shutdown()


def _first_line(error: BaseException) -> str:
    """Returns the error that an actor raised, from the traceback in Ray's message; or the message's first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    raised = [line.partition(": ")[2] for line in lines if re.match(r"\w+(Error|Exception): .", line)]
    return (raised or lines)[0].rstrip(".")
