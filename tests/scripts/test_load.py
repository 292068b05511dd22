"""The server under load: two minutes of good and bad requests, clients that go, and restarts. `load.py` checks every answer."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SECONDS = 120


def test_two_minutes_of_faults() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "load.py"), "faults", "--clients", "6"]
    command += ["--seconds", str(SECONDS), "--restart", str(SECONDS / 3)]
    run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=SECONDS + 600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("exit status 0") == 3
    total = re.search(r"in all: \{'right': (\d+), 'wrong': 0, 'lost': 0", run.stdout)
    assert total and int(total[1]) > 1000, run.stdout
