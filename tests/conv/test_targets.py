"""The CPU kernels on other processors: compiled for all, and run if this processor can.

On this processor itself, the property tests run them every day.
"""

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import pytest

from max_conv.conv.library import kernel_key
from max_conv.conv.processor import has_pairs
from max_conv.conv.processor import processor as this_processor

ROOT = Path(__file__).parents[2]

# Triple, processor, the kind of vectors.
TARGETS = {
    "avx2": ("x86_64-unknown-linux-gnu", "haswell"),
    "neon": ("aarch64-unknown-linux-gnu", "neoverse-n1"),
}


def build(cache: pytest.Cache, *options: str) -> Path:
    """Returns the path of what `mojo build` makes of `targets.mojo`; pytest's cache keeps it for the next run."""
    from mojo.run import subprocess_run_mojo

    source = Path(__file__).parent / "targets.mojo"
    key = " ".join([kernel_key(), this_processor(), source.read_text(), *options])
    output = cache.mkdir("targets") / hashlib.sha256(key.encode()).hexdigest()
    if not output.exists():
        part = output.with_suffix(f".{os.getpid()}")
        command = ["build", "-I", str(ROOT / "max_conv" / "conv"), *options, str(source), "-o", str(part)]
        done = subprocess_run_mojo(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        part.rename(output)
    return output


@pytest.fixture
def cache(request: pytest.FixtureRequest) -> pytest.Cache:
    assert request.config.cache is not None
    return request.config.cache


@pytest.mark.parametrize("target", [pytest.param("avx2", marks=pytest.mark.nightly), "neon"])
def test_kernels_compile(target: str, cache: pytest.Cache) -> None:
    triple, processor = TARGETS[target]
    text = build(cache, "--target-triple", triple, "--target-cpu", processor, "--emit", "asm").read_text()
    assert {"avx2": "ymm", "neon": "fmla\tv"}[target] in text


KERNELS = {
    *(f"{name} NLC" for name in ("dense", "short", "packed dense")),
    *(
        f"{name} {layout}"
        for name in ("depthwise", "lengthwise", "winograd", "packed winograd", "amx")
        for layout in ("NLC", "NCL")
    ),
    *(f"{name} transposed" for name in ("dense", "depthwise", "lengthwise", "winograd")),
    *("spiked NLC", "spiked NCL", "frames"),
}
"""The kernels and layers that are compared on every processor."""
PAIRED = {"paired NLC", "paired NCL"}
"""The layers that AVX512_BF16 adds."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason=f"AVX2 code does not run on {platform.machine()}")
@pytest.mark.parametrize("processor", ["haswell", pytest.param(None, marks=pytest.mark.nightly)], ids=["avx2", "here"])
def test_kernels_are_right(processor: str | None, cache: pytest.Cache) -> None:
    """For each kernel, the program prints how many layers it has compared."""
    pairs = processor is None and has_pairs()
    options = [*(["--target-cpu", processor] if processor else []), *(["-D", "AVX512_BF16"] if pairs else [])]
    done = subprocess.run([build(cache, *options)], capture_output=True, text=True, env=dict(os.environ))
    verdict, *lines = done.stdout.splitlines()
    assert done.returncode == 0 and verdict == "right", done.stdout + done.stderr
    counts = {name: int(count) for name, count in (line.split(" = ") for line in lines)}
    assert counts.keys() == KERNELS | (PAIRED if pairs else set())
    assert min(counts.values()) > 0
