"""Files, functions and argument lists stay small enough to be read at once."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE, FUNCTION, ARGUMENTS = 400, 60, 8
"""The most lines of a file, lines of a function without its docstring, and arguments."""

SOURCES = [
    path for folder in ("max_conv", "graphs", "scripts", "examples") for path in sorted((ROOT / folder).rglob("*.py"))
]
KERNELS = sorted((ROOT / "max_conv").rglob("*.mojo"))

MORE_ARGUMENTS = {
    "conv1d": "PyTorch's and MLX's arguments, layouts",
    "conv_transpose1d": "PyTorch's and MLX's arguments, layouts",
    "conv1d_ref": "conv1d's arguments",
    "conv_transpose1d_ref": "conv_transpose1d's arguments",
    "explain": "a layer's sizes, for a Geometry that knows none, and the machine's two peaks",
    "Conv1D.__init__": "max.nn.Conv1D's arguments",
    "ConvTranspose1D.__init__": "max.nn.Conv1D's arguments and PyTorch's",
    "ConvTranspose1d.__init__": "max.nn.ConvTranspose1d's arguments",
    "Conv1d.__init__": "PyTorch's or MLX's arguments",
    "EagerConv1D.__init__": "the front ends' arguments",
    "EagerConvTranspose1D.__init__": "the front ends' arguments",
    "turns": "the arguments of Silero's get_speech_timestamps",
    "main": "the options of a command",
}
"""Functions with more arguments, and whose argument list they mirror."""


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inside + node.name, node
        within = f"{node.name}." if isinstance(node, ast.ClassDef) else inside
        yield from functions(node, within)


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Counts a function's lines, without its docstring and decorators."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def arguments_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("path", [*SOURCES, *KERNELS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions(path: Path) -> None:
    for name, function in functions(ast.parse(path.read_text())):
        assert lines_of(function) <= FUNCTION, f"{name} has {lines_of(function)} lines"
        assert arguments_of(function) <= ARGUMENTS or name in MORE_ARGUMENTS, f"{name} has {arguments_of(function)}"


def test_no_exception_is_stale() -> None:
    long = {
        name
        for path in SOURCES
        for name, function in functions(ast.parse(path.read_text()))
        if arguments_of(function) > ARGUMENTS
    }
    assert long == set(MORE_ARGUMENTS)


def mojo_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Yields every function of a Mojo source: its name, its run-time arguments, and its lines."""
    lines = text.splitlines()
    for start, line in enumerate(lines):
        found = re.match(r"^( *)(?:def|fn) (\w+)", line)
        if not found:
            continue
        end, depth, header, index = start, 0, "", start
        while True:  # to the colon that ends the header
            header += lines[index] + "\n"
            depth = sum(header.count(a) - header.count(b) for a, b in ("()", "[]", "{}"))
            if depth == 0 and header.rstrip().endswith(":"):
                break
            index += 1
        end = index
        for number in range(index + 1, len(lines)):
            text = lines[number]
            if text.strip() and len(text) - len(text.lstrip()) <= len(found[1]):
                break
            if text.strip():
                end = number
        yield found[2], _run_time_arguments(header), end - start + 1


def _run_time_arguments(header: str) -> int:
    """Counts the arguments in a header's last pair of outer parentheses."""
    depth, pieces, current = 0, [], ""
    body = header[header.index("(") :] if "[" not in header or header.index("(") < header.index("[") else _after(header)
    for letter in body[1:]:
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
            if depth < 0:
                break
        if letter == "," and depth == 0:
            pieces.append(current)
            current = ""
        else:
            current += letter
    names = [piece.strip() for piece in [*pieces, current]]
    named = [name for name in names if name and name not in ("*", "/") and not re.match(r"^(mut |out )?self\b", name)]
    return len(named)


def _after(header: str) -> str:
    """Returns the text after a header's compile-time parameters."""
    depth = 0
    for index, letter in enumerate(header):
        depth += (letter == "[") - (letter == "]")
        if letter == "]" and depth == 0:
            rest = header[index + 1 :]
            return rest[rest.index("(") :]
    raise AssertionError(header)


LONGER = {
    "placing": (95, "its closures as functions of a struct made kernels up to 2.5 times as slow"),
    "execute": (70, "the operands of an operation, one a line"),
    "tiles": (
        200,
        "a GPU's kernel is one closure, to which what it captures is copied by name, and its registers are local to it",
    ),
    "task": (160, "the same"),
    "hopper": (210, "the same"),
    "rows": (70, "the same"),
}
"""Kernels that may be longer, and why."""


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels(path: Path) -> None:
    for name, arguments, lines in mojo_functions(path.read_text()):
        assert lines <= LONGER.get(name, (FUNCTION,))[0], f"{name} has {lines} lines"
        # An operation's `execute` has an argument for each of its operands.
        assert arguments <= ARGUMENTS or name == "execute", f"{name} has {arguments} arguments"
    assert all(len(line) <= 120 for line in path.read_text().splitlines()), "a line is longer than 120 columns"


def test_the_counts() -> None:
    text = "def a[width: Int, //, f: def(Int) -> Int](x: Int, mut y: List[Tuple[Int, Int]], *, z: Int = 2) -> Int:\n    pass\n\n\ndef b(self, out x: Int):\n    var y = 1\n    x = y\n"
    assert list(mojo_functions(text)) == [("a", 3, 2), ("b", 1, 3)]
    tree = ast.parse("class A:\n    def f(self, a, *, b):\n        'doc'\n        return a\n")
    assert [(name, arguments_of(f), lines_of(f)) for name, f in functions(tree)] == [("A.f", 2, 2)]
