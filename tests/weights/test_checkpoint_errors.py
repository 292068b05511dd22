"""Every error sentence of the code that reads and converts checkpoints is reached by a passing test that expects it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import max_conv

PACKAGE = Path(max_conv.__file__).parent
CHECKED = [
    "checkpoint",
    "state_dicts",
    "torch_file",
    "npz_file",
    "safetensors_file",
    "file_kind",
    "tensors",
    "marker",
    "layer_map",
    "folding",
    "planned",
    "norm_parts",
    "batch_norms",
    "plan",
    "build",
    "verify",
    "staging",
    "convert",
]
TESTS = [
    "test_state_of_arrays.py",
    "test_checkpoint.py",
    "test_checkpoint_sources.py",
    "test_convert.py",
    "test_convert_layers.py",
]
SLOW = "memory_stays or there_and_back or reads_every_bit or rounds or values_are or signals or killed or shards_in_and_out"

# Runs the tests, and prints where the checked modules raised.
REACHED = """
import json, sys
import pytest
checked = set(json.loads(sys.argv[1]))
reached = set()
def inner(frame, event, argument):
    if event == "exception":
        reached.add((frame.f_code.co_filename, frame.f_lineno))
    return inner
def outer(frame, event, argument):
    return inner if frame.f_code.co_filename in checked else None
class Plugin:
    def pytest_runtest_setup(self):
        sys.settrace(outer)
    def pytest_runtest_teardown(self):
        sys.settrace(None)
code = pytest.main(sys.argv[2:], plugins=[Plugin()])
print(json.dumps(sorted(reached)))
sys.exit(code)
"""


def raises(path: Path) -> set[int]:
    """Returns the lines of the `raise` statements that name an error."""
    return {node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise) and node.exc}


def test_every_raise_is_reached() -> None:
    paths = [PACKAGE / ("conv" if name == "folding" else "weights") / f"{name}.py" for name in CHECKED]
    tests = [str(Path(__file__).parent / name) for name in TESTS]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-k", f"not ({SLOW})", "-n0"]
    command = [sys.executable, "-c", REACHED, json.dumps([str(path) for path in paths]), *options, *tests]
    run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    reached = {tuple(place) for place in json.loads(run.stdout.splitlines()[-1])}
    missed = [
        f"{path.name}:{line}" for path in paths for line in sorted(raises(path)) if (str(path), line) not in reached
    ]
    assert sum(len(raises(path)) for path in paths) > 80 and not missed, missed
