"""In a forked child MAX's threads do not exist: an error, not a hang. Each case is a process with a time limit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from max.dtype import DType

import max_conv

LIMIT = 240
SENTENCE = (
    "this process was forked from one that had imported MAX, whose threads do not survive a fork; "
    "use the start method spawn or forkserver."
)
COMMON = """
import multiprocessing, sys
import numpy as np

def work(path, action):
    import max_conv
    from max.dtype import DType
    from max_conv.frontends import torch as front
    try:
        x = np.ones((1, 5, 4), np.float32)
        if action == "load":
            y = max_conv.load(path)(x)
        elif action == "call":
            y = model(x)
        elif action == "front end":
            y = front.Conv1d(5, 8, 3)(x)
        else:
            layer = max_conv.Conv1D(3, 4, 8, DType.float32)
            layer.load_state_dict({"weight": np.ones((3, 4, 8), np.float32)})
            max_conv.PackedGraph("built", layer, input_types=layer.input_types())  # needs no threads
            y = max_conv.compile(layer)(x)
        return f"right {y.sum()}"
    except RuntimeError as error:
        return f"RuntimeError {error}"
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layer = max_conv.Conv1D(3, 4, 8, DType.float32)
    layer.load_state_dict({"weight": np.ones((3, 4, 8), np.float32)})
    path = tmp_path_factory.mktemp("fork") / "m"
    max_conv.compile(layer).save(path)
    return path


def answers(folder: Path, code: str, *arguments: str) -> list[str]:
    """Returns the lines that a program prints; fails if it takes too long, and ends children that hang."""
    script = folder / "script.py"
    script.write_text(COMMON + code)
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        pytest.fail("the child hangs")
    assert process.returncode == 0, err
    return out.splitlines()


POOL = """
if __name__ == "__main__":
    method, path, *actions = sys.argv[1:]
    if method != "untouched":
        import max_conv
        model = max_conv.load(path)
        model(np.ones((1, 5, 4), np.float32))
    with multiprocessing.get_context("fork" if method == "untouched" else method).Pool(1) as pool:
        for action in actions:
            print(pool.apply(work, (path, action)))
"""


def test_fork_is_refused_in_one_sentence(saved: Path, tmp_path: Path) -> None:
    got = answers(tmp_path, POOL, "fork", str(saved), "load", "call", "front end", "compile")
    assert got == [f"RuntimeError {op}: {SENTENCE}" for op in ("load", "model", "compile", "compile")]


@pytest.mark.parametrize("method", ["spawn", "forkserver", "untouched"])
def test_other_start_methods_work(method: str, saved: Path, tmp_path: Path) -> None:
    """So does fork, before anything has imported MAX."""
    assert answers(tmp_path, POOL, method, str(saved), "load") == ["right 288.0"]


LOADER = """
class Data:
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return work(self.path, "load")

if __name__ == "__main__":
    import max_conv
    from torch.utils.data import DataLoader
    max_conv.load(sys.argv[2])
    print(*next(iter(DataLoader(Data(sys.argv[2]), num_workers=1, multiprocessing_context=sys.argv[1]))))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str, saved: Path, tmp_path: Path) -> None:
    want = "right 288.0" if method == "spawn" else f"RuntimeError load: {SENTENCE}"
    assert answers(tmp_path, LOADER, method, str(saved)) == [want]
