"""The server under load: good and bad requests, clients that go, and restarts. `load.py` checks every answer."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("seconds", "restart", "starts"), [(60, 10, range(2, 7)), pytest.param(120, 40, [3], marks=pytest.mark.nightly)]
)
def test_faults(seconds: int, restart: int, starts: Sequence[int]) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "load.py"), "faults", "--clients", "6"]
    command += ["--seconds", str(seconds), "--restart", str(restart)]
    run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=seconds + 600)
    assert run.returncode == 0, run.stdout + run.stderr
    # A server needs ten seconds and more to start on a busy machine.
    assert run.stdout.count("exit status 0") in starts
    total = re.search(r"in all: \{'right': (\d+), 'wrong': 0, 'lost': 0", run.stdout)
    assert total and int(total[1]) > 1000, run.stdout
