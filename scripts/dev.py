#!/usr/bin/env python3
"""Sets the project up in `.venv` and runs it.

    python3 scripts/dev.py demo [ARGS]    runs `max-conv run speech ARGS`
    python3 scripts/dev.py test [ARGS]    runs lint and every test, or with ARGS only `pytest ARGS`
    python3 scripts/dev.py test --all [ARGS]        the same, with the tests that are marked nightly
    python3 scripts/dev.py test --coverage [ARGS]   the same tests, and shows which Python lines they ran
    python3 scripts/dev.py smoke          runs a minute's choice of the tests
    python3 scripts/dev.py lint           runs ruff, mypy and the checks of Mojo sources

The first run makes `.venv` at the repository root and installs what the command needs, with uv when it is on the PATH
and with pip when it is not; later runs start at once. `--here` before the command uses the Python that runs this file
instead and installs nothing. The standard library is all it needs.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

if sys.version_info < (3, 11):  # noqa: UP036 -- the sentence is for users of an older Python
    sys.exit("dev.py: Python 3.11 or newer is needed, but this is {}.{}.".format(*sys.version_info[:2]))

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

Step = list[str] | Callable[[Path], int]
"""The words of `python -m`, or a function of the Python to use that returns an exit status."""
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
COMMANDS = ("demo", "test", "smoke", "lint")
LINT: dict[str, Step] = {
    # Without its cache: how ruff sorts an import depends on the files next to it, which the cache does not look at.
    "ruff check": ["ruff", "check", "--no-cache", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "mojo format": lambda python: mojo_format(python),
    "mojo lines": lambda python: mojo_lines(),
}
WIDTH = 120
"""Columns of a line of Mojo."""
SMOKE = [
    "tests/test_docs.py::test_docstring_examples[max_conv.conv.geometry]",
    "tests/test_docs.py::test_docstring_examples[max_conv.conv.layouts]",
    "tests/test_docs.py::test_docstring_examples[max_conv.conv.reference]",
    "tests/conv/test_layouts.py::test_there_and_back",
    "tests/conv/test_dispatch.py",
    "tests/conv/test_errors.py::test_sentence",
    "tests/test_docs.py::test_readme_code[0]",
]
"""Geometry, layouts, the reference, errors of graphs, and one layer through MAX. pytest fails if a file is gone."""
OPTIONS = {
    "--all": ["--all"],
    "--coverage": ["--cov=max_conv", "--cov=scripts", "--cov-report=term:skip-covered"],
}
"""The arguments that `test` passes to pytest for its own first option."""
# An extra brings others with it, so that `demo` after `test` installs nothing.
EXTRAS = {"all": ["all"], "test": ["test", "all"]}
HEARTBEAT = 10.0
"""Seconds without news after which a line says that work goes on."""
CLEAR = "\r\033[K" if sys.stdout.isatty() else ""
"""Wipes the line of a terminal that was last written to."""
BIG = 20.0
"""Megabytes from which a download is reported."""


def say(text: str) -> None:
    print(f"dev.py: {text}", flush=True)


def stop(text: str) -> NoReturn:
    sys.exit(f"dev.py: {text}")


def main(arguments: list[str]) -> int:
    here = arguments[:1] == ["--here"]
    command, *rest = arguments[here:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if command not in COMMANDS:
        stop(f"there is no command {command!r}; the commands are {', '.join(COMMANDS)}.")
    if command in ("lint", "smoke") and rest:
        stop(f"{command} takes no arguments, but got {' '.join(rest)}.")
    python = Path(sys.executable) if here else set_up("all" if command == "demo" else "test")
    if command == "demo":
        return run([python.parent / "max-conv", "run", "speech", *rest])
    # pytest and ruff find their settings, and pytest the paths among its arguments, at the repository root.
    if command == "smoke":
        return run([python, "-m", "pytest", "-q", *SMOKE], cwd=ROOT)
    more = OPTIONS.get(rest[0], []) if command == "test" and rest else []
    rest = rest[bool(more) :]
    if command == "test" and rest:
        return run([python, "-m", "pytest", *more, *rest], cwd=ROOT)
    steps = dict(LINT)
    if command == "test":
        # Compiling graphs keeps one core busy: two workers halve the wait. A file stays with one of them.
        steps["pytest"] = ["pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *more]
    return run_all(python, steps)


def run(command: list[str | Path], cwd: Path | None = None) -> int:
    """Runs a command in the foreground and returns its exit status, as a shell would give it."""
    try:
        process = subprocess.Popen([str(word) for word in command], cwd=cwd)
    except FileNotFoundError:
        stop(f"there is no {command[0]}; run without --here, or install the project first.")
    while True:
        try:
            status = process.wait()
            return 128 - status if status < 0 else status
        except KeyboardInterrupt:
            # The terminal has sent the signal to the command, too: it prints its last lines and ends.
            continue


def run_all(python: Path, steps: dict[str, Step]) -> int:
    """Runs every step, even if steps before it failed; returns the last status that was not 0."""
    result, lines = 0, []
    for name, step in steps.items():
        say(name)
        start = time.monotonic()
        status = step(python) if callable(step) else run([python, "-m", *step], cwd=ROOT)
        lines.append(f"{name}: {'passed' if status == 0 else f'FAILED ({status})'}, {time.monotonic() - start:.1f} s")
        result = status or result
        if status == 128 + signal.SIGINT:
            break
    for line in lines:
        say(line)
    return result


def mojo_sources() -> list[Path]:
    """Returns the Mojo files that are checked."""
    files = [file for folder in ("max_conv", "scripts", "tests") for file in (ROOT / folder).rglob("*.mojo")]
    return sorted(files)


def mojo_format(python: Path) -> int:
    """Checks whether Mojo's formatter would change a file; changes no file."""
    # mblack has no __main__, and its script may not be in PATH.
    words: list[str | Path] = [python, "-c", "import mblack; mblack.patched_main()", "--check", "-l", str(WIDTH)]
    return run([*words, *mojo_sources()], cwd=ROOT)


def mojo_lines() -> int:
    """Names the lines that are too long; the formatter leaves comments and strings as they are."""
    status = 0
    for file in mojo_sources():
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if len(line) > WIDTH:
                say(f"{file.relative_to(ROOT)}:{number}: {len(line)} columns, not {WIDTH}")
                status = 1
    return status


# The environment.


def set_up(extra: str) -> Path:
    """Returns the Python of `.venv`, with the project and `extra` installed.

    `.venv/dev-EXTRA` holds the key of the installed packages. `.venv/dev-unfinished` exists while packages are being
    written: after a set-up that was cut short it is not known which packages are whole, so it starts over.
    """
    lock = os.open(ROOT, os.O_RDONLY)
    try:
        take(lock)
        python = VENV / "bin" / "python"
        if os.access(python, os.X_OK) and not (VENV / "dev-unfinished").exists() and stamp(extra) == key():
            return python
        start = time.monotonic()
        reason = unusable(python)
        if reason:
            if VENV.exists() or VENV.is_symlink():
                say(f"{reason}; making .venv anew")
                remove(VENV)
            make()
        install(python, extra)
        say(f"ready after {time.monotonic() - start:.0f} s")
        return python
    finally:
        os.close(lock)


def take(lock: int) -> None:
    """Waits until no other dev.py is setting up."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waiting for another dev.py that is setting up")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass  # Some network file systems have no locks.


def key() -> str:
    """Returns a digest of the facts that decide the installed packages and their place."""
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    digest.update(f"{ROOT} {version()}".encode())
    return digest.hexdigest()


def version() -> str:
    return "{}.{}".format(*sys.version_info[:2])


def stamp(extra: str) -> str | None:
    try:
        return (VENV / f"dev-{extra}").read_text()
    except FileNotFoundError:
        return None


def unusable(python: Path) -> str | None:
    """Returns why `.venv` cannot be used, or None."""
    if not VENV.exists():
        return "there is none"
    if (VENV / "dev-unfinished").exists():
        return "the last set-up was cut short"
    check = "import sys, pip; print('{}.{}'.format(*sys.version_info[:2]), sys.prefix)"
    try:
        answer = subprocess.run([python, "-c", check], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "its Python does not run"
    if answer.returncode:
        return "its Python has no pip"
    found, prefix = answer.stdout.strip().split(" ", 1)
    if Path(prefix).resolve() != VENV.resolve():
        return f"it was made in {prefix}"
    return None if found == version() else f"it has Python {found}, and this is {version()}"


def remove(folder: Path) -> None:
    """Removes a virtual environment, and nothing else that may be called `.venv`."""
    if folder.is_symlink() or not folder.is_dir():
        stop(f"{folder} is not a folder; move it away.")
    ours = (folder / "pyvenv.cfg").exists() or (folder / "dev-unfinished").exists() or not any(folder.iterdir())
    if not ours:
        stop(f"{folder} is not a virtual environment; move it away.")
    shutil.rmtree(folder)


def make() -> None:
    """Makes `.venv` with pip inside."""
    # If this runs inside a virtual environment, the environment's base Python is used.
    base = getattr(sys, "_base_executable", None) or sys.executable
    ways = []
    uv = shutil.which("uv")
    if uv:
        # Files that are already there, such as the mark, stay. pip is wanted inside: max-conv downloads wheels with it.
        ways.append([uv, "venv", "--seed", "--allow-existing", "--python", base, str(VENV)])
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401

        ways.append([base, "-m", "venv", str(VENV)])
    except ImportError:
        if not uv:
            stop(
                f"this Python ({base}) cannot make virtual environments; install its venv module "
                "(on Debian and Ubuntu: sudo apt install python3-venv) or uv."
            )
    VENV.mkdir()
    (VENV / "dev-unfinished").touch()
    say(f"making .venv with Python {version()}")
    if all(watch(way) for way in ways):
        stop("no virtual environment could be made; the lines above say why.")


def install(python: Path, extra: str) -> None:
    mark = VENV / "dev-unfinished"
    mark.touch()
    project = ["--editable", f"{ROOT}[{extra}]"]
    ways = {"pip": [str(python), "-m", "pip", "install", "--disable-pip-version-check", *project]}
    uv = shutil.which("uv")
    if uv:
        # uv does not read pip's configuration files: if they name the machine's package sources, only pip succeeds.
        ways = {"uv": [uv, "pip", "install", "--python", str(python), *project], **ways}
    for name, command in ways.items():
        say(f"installing the project with its extra {extra!r}, with {name}")
        if watch(command) == 0:
            break
    else:
        # Installers first resolve and download, and write packages only when all are downloaded.
        mark.unlink()
        stop("the installation failed; the lines above say why (is there a network?).")
    for name in EXTRAS[extra]:
        (VENV / f"dev-{name}").write_text(key())
    mark.unlink()


def environment() -> dict[str, str]:
    """Returns the environment for installers: uv looks for wheels in the places that pip's settings name."""
    found = dict(os.environ, PYTHONUNBUFFERED="1", PIP_PROGRESS_BAR="off")
    if "PIP_FIND_LINKS" in found and "UV_FIND_LINKS" not in found:
        found["UV_FIND_LINKS"] = ",".join(found["PIP_FIND_LINKS"].split())
    return found


def watch(command: list[str]) -> int:
    """Runs an installer and returns its status: short lines while it works, and its whole output if it failed."""
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    said: list[str] = []
    told = [start]
    doing = ["starting"]

    def tell(text: str) -> None:
        told[0] = time.monotonic()
        print(f"{CLEAR}  {told[0] - start:4.0f} s  {text}", flush=True)

    def listen() -> None:
        assert process.stdout
        with process.stdout as lines:
            for line in lines:
                said.append(line)
                text = news(line)
                if text:
                    doing[0] = text
                    tell(text)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        while listener.is_alive():
            listener.join(0.2)
            if CLEAR:
                last = said[-1].strip() if said else doing[0]
                print(f"{CLEAR}  {time.monotonic() - start:4.0f} s  {last[:60]}", end="", flush=True)
            elif time.monotonic() - told[0] > HEARTBEAT:
                tell(f"still working ({doing[0]})")
        print(CLEAR, end="", flush=True)
        if process.wait():
            print("".join(said), end="", flush=True)
        return process.returncode
    except KeyboardInterrupt:
        process.wait()
        raise


def news(line: str) -> str | None:
    """Returns the part of an installer's line that is worth reporting.

    >>> news("  Downloading torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl (190.4 MB)")
    'downloading torch-2.13.0 (190 MB)'
    """
    packages = re.match(r"Installing collected packages: (.*)", line)
    if packages:
        return f"writing {packages.group(1).count(',') + 1} packages"
    if re.match(r"(Resolved|Prepared|Installed) \d+ packages? in ", line):
        return line.strip().lower()
    got = re.match(r" *(Downloading|Using cached) (\S+) \(([\d.]+) ?([MG])i?B\)", line)
    if got:
        verb, name, size, unit = got.groups()
        megabytes = float(size) * (1024 if unit == "G" else 1)
        if megabytes >= BIG:
            package = "-".join(name.split("-")[:2]) if name.endswith(".whl") else name
            return f"{verb.lower()} {package} ({megabytes:.0f} MB)"
    return None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\ndev.py: interrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
