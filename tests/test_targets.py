"""The CPU kernels on other processors: compiled for all, run where this one can."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Triple, processor, the kind of vectors.
TARGETS = {
    "avx2": ("x86_64-unknown-linux-gnu", "haswell"),
    "neon": ("aarch64-unknown-linux-gnu", "neoverse-n1"),
}


def build(output: Path, *options: str) -> None:
    from mojo.run import subprocess_run_mojo

    source = ROOT / "tests" / "targets.mojo"
    command = ["build", "-I", str(ROOT / "max_conv"), *options, str(source), "-o", str(output)]
    done = subprocess_run_mojo(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target: str, tmp_path: Path) -> None:
    triple, processor = TARGETS[target]
    output = tmp_path / f"{target}.s"
    build(output, "--target-triple", triple, "--target-cpu", processor, "--emit", "asm")
    vectors = {"avx2": "ymm", "neon": "fmla\tv"}[target]
    assert vectors in output.read_text()


@pytest.mark.skipif(platform.machine() != "x86_64", reason=f"AVX2 code does not run on {platform.machine()}")
def test_avx2_is_right(tmp_path: Path) -> None:
    build(tmp_path / "avx2", "--target-cpu", "haswell")
    done = subprocess.run([tmp_path / "avx2"], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0 and done.stdout.startswith("right"), done.stdout + done.stderr
