"""The common parts of the races of bench.py: a contender's process, and errors of one sentence."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

PATIENCE = 600
"""Seconds after which a contender that does not answer counts as crashed: MAX compiles a layer in about 25."""


class Sentence(click.ClickException):
    """An error for the user: one sentence on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        note(self.message)


def note(text: str) -> None:
    click.echo(f"bench: {text}", err=True)


class Racer:
    """A contender's process. It is stopped while others run: idle threads of some libraries spin for a while."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.command = command
        self.environment = environment
        self.process: subprocess.Popen[str] | None = None

    def ask(self, question: Mapping[str, str | float]) -> dict[str, Any]:
        """Returns the reply, or the fact that the process died. The next question starts another process."""
        if self.process is None:
            pipe, silence = subprocess.PIPE, subprocess.DEVNULL
            self.process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=silence, text=True, env=dict(self.environment)
            )
        assert self.process.stdin and self.process.stdout
        self.process.send_signal(signal.SIGCONT)
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            ready = select.select([self.process.stdout], [], [], PATIENCE)[0]
        except BrokenPipeError:
            ready = [self.process.stdout]
        if not ready:
            self.stop()
            return {"failed": "crashed", "why": f"no answer within {PATIENCE} s"}
        if line := self.process.stdout.readline():
            self.process.send_signal(signal.SIGSTOP)
            return json.loads(line)
        status = self.process.wait()
        self.stop()
        return {"failed": "crashed", "why": signal.Signals(-status).name if status < 0 else f"exit status {status}"}

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError), self.process:  # a question that nobody has read
                self.process = None


def start(
    script: Sequence[str], names: Sequence[str], threads: int, folder: Path, more: Sequence[str] = ()
) -> dict[str, Racer]:
    environment = dict(
        os.environ,
        OMP_NUM_THREADS=str(threads),
        NPROC=str(threads),  # XLA's threads
        JAX_PLATFORMS="cpu",
        TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"),
        TORCHINDUCTOR_COMPILE_THREADS="1",  # no processes that outlive the race
        MALLOC_MMAP_THRESHOLD_=str(4 << 30),
        MALLOC_TRIM_THRESHOLD_=str(8 << 30),
        # Separate arenas per thread return large blocks despite the thresholds: JAX took 8 ms instead of 1 ms.
        MALLOC_ARENA_MAX="1",
    )
    command = [sys.executable, *script]
    return {name: Racer([*command, name, str(threads), *more], environment) for name in names}


def prepare(name: str, words: Sequence[str]) -> str:
    """Runs a script that prepares a network for its contenders; returns the last line that it prints.

    Raises:
        Sentence: If it fails.
    """
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise Sentence(f"{name} cannot be prepared: {(done.stderr.strip().splitlines() or ['no words'])[-1]}")
    return done.stdout.strip().splitlines()[-1]
