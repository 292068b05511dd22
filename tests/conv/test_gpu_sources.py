"""Variables that a GPU kernel captures must be copied into it: by reference, it gets an address in the host's memory.

Nothing else shows it before the kernel runs on a GPU: it compiles, and every access to such a variable is an illegal one.
"""

import re
import textwrap
from pathlib import Path

import pytest

from max_conv.conv.library import SOURCES

LAUNCH = re.compile(r"enqueue_function\[(\w+)\]")


def captured(source: str) -> dict[str, set[str]]:
    """Returns the local variables that each launched closure reads by reference, by the closure's name and line."""
    lines = source.splitlines()
    found = {}
    for number, line in enumerate(lines):
        if not (launch := LAUNCH.search(line)):
            continue
        closure = max(i for i in range(number) if re.match(rf"\s+def {launch[1]}\(", lines[i]))
        indent = len(lines[closure]) - len(lines[closure].lstrip())
        outer = max(i for i in range(closure) if lines[i].startswith("def "))
        first = closure
        while lines[first - 1].strip().startswith("@"):
            first -= 1
        end = closure + 1
        while not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent:
            end += 1
        local = {
            match[1]
            for line in lines[outer:closure]
            if (match := re.match(r"\s+var (\w+)", line)) and len(line) - len(line.lstrip()) <= indent
        }
        copied = set(
            re.findall(r"\w+", " ".join(re.findall(r"@__copy_capture\((.*)\)", "\n".join(lines[first:closure]))))
        )
        body = "\n".join(lines[closure:end])
        own = set(re.findall(r"\bvar (\w+)", body)) | set(re.findall(r"(\w+):", lines[closure]))
        used = {name for name in local - own if re.search(rf"(?<![.\w]){name}\b(?!=)", body)}
        found[f"{launch[1]}, line {closure + 1}"] = used - copied
    return found


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.mojo")), ids=lambda path: path.stem)
def test_kernels_copy_what_they_capture(path: Path) -> None:
    assert {name: names for name, names in captured(path.read_text()).items() if names} == {}


def test_a_reference_is_found() -> None:
    source = textwrap.dedent("""
        def add(size: Int, ctx: DeviceContext) raises:
            var double = 2 * size
            var half = size // 2
            var unused = 1

            @__parameter
            @__copy_capture(half)
            def task(i: Int32):
                var row = size + half + double
                row.unused = 2

            ctx.enqueue_function[task](Int32(1), grid_dim=1, block_dim=1)
    """)
    assert captured(source) == {"task, line 9": {"double"}}
    assert captured(source.replace("(half)", "(half, double)")) == {"task, line 9": set()}


def test_every_launch_is_seen() -> None:
    launches = sum(len(LAUNCH.findall(path.read_text())) for path in SOURCES.rglob("*.mojo"))
    assert launches >= 8
    assert launches == sum(len(captured(path.read_text())) for path in SOURCES.rglob("*.mojo"))
