"""Which folders may import from which, checked on the sources."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "max_conv"

# Every folder of the package: the other folders that its modules may import from. Arrows go down this list only.
FOLDERS = {
    "cli": "weights runtime streaming sound serving conv cache",
    "serving": "runtime streaming sound",
    "frontends": "runtime conv",
    "runtime": "streaming conv cache",
    "streaming": "conv",
    "weights": "conv cache",
    "sound": "",
    "conv": "cache",
}
OF_WEIGHTS = {"conv.dlpack", "conv.folding", "conv.geometry", "conv.layouts", "conv.reference"}
"""The modules of conv that weights may import: NumPy only."""

LIGHT = [
    *sorted(OF_WEIGHTS),
    *(
        "cache",
        "cli",
        "cli.batch",
        "cli.main",
        "cli.run",
        "cli.convert",
        "cli.terminal",
        "conv",
        "conv.dispatch",
        "conv.explanation",
        "conv.library",
        "conv.processor",
        "conv.tuned",
    ),
    *("frontends", "serving", "serving.task", "sound", "sound.audio", "sound.picture", "weights", "weights.convert"),
]
"""Modules that are loaded without MAX, and therefore fast."""
OF_SERVERS = {"msgspec", "prometheus_client", "starlette", "uvicorn"}
OUTSIDE_AT_LOAD = {"cli": {"click"}, "sound": {"numpy"}, "weights": {"numpy"}, "serving": {"numpy", *OF_SERVERS}}
"""The packages that a folder's modules may import when they are loaded; other folders may import MAX and NumPy."""

BY_NAME = {"__init__.py", "cli/compile.py", "serving/networks.py"}
"""Modules that load others by name: lazily, and the graphs."""

HEAVY = {"max", "mojo", "torch", "mlx", "onnx", "onnxruntime", "safetensors", "soundfile", "soxr", "matplotlib"}
OUTERMOST = {"tests", "scripts", "graphs", "harness"}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_in(tree: ast.AST, package: str = "") -> Iterator[tuple[str, str | None]]:
    """Yields (module, name) for every import in a tree; `package` is what one leading dot means."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def at_load(tree: ast.Module) -> ast.Module:
    """Returns a module without its functions and without the code under TYPE_CHECKING."""
    kept = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(kept, [])


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).parts[:-1])


def targets(tree: ast.AST, package: str) -> set[str]:
    """Returns the modules of the package that a tree imports, each by its full name."""
    found = set()
    for module, imported in imports_in(tree, package):
        if module.partition(".")[0] == "max_conv":
            # `from . import session` names a module after the import.
            below = f"{module}.{imported}"
            found.add(below if imported and is_module(below) else module)
    return found


def check_file(path: Path, tree: ast.Module) -> None:
    """Raises AssertionError if a file of the package imports what its folder may not import."""
    place = path.relative_to(PACKAGE)
    folder = place.parts[0] if len(place.parts) > 1 else ""
    for target in targets(tree, package_of(path)):
        parts = target.split(".")[1:]
        if not parts:  # `lazily`, for the packages that use it
            assert place.name == "__init__.py", f"{place} imports the package itself"
        elif not folder:
            assert place.name == "__init__.py", f"{place} imports {target}"
        else:
            allowed = {folder, *FOLDERS[folder].split()}
            assert parts[0] in allowed, f"{place} imports {target}"
            if folder == "weights" and parts[0] == "conv":
                assert ".".join(parts) in OF_WEIGHTS, f"{place} imports {target}"


def test_every_folder_has_a_row() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(FOLDERS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "cache.py"}


def test_arrows_go_down() -> None:
    order = [*FOLDERS, "cache"]
    for folder, below in FOLDERS.items():
        assert all(order.index(name) > order.index(folder) for name in below.split()), folder


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_within_the_package(path: Path) -> None:
    tree = ast.parse(path.read_text())
    check_file(path, tree)
    assert not OUTERMOST & {module.partition(".")[0] for module, _ in imports_in(tree, package_of(path))}
    dynamic = {"import_module", "__import__"} & {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
    }
    assert not dynamic or path.relative_to(PACKAGE).as_posix() in BY_NAME, f"{path} imports by name"
    assert "graphs" not in {part for module, _ in imports_in(tree) for part in module.split(".")}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("conv/ops.py", "from ..runtime import session"),
        ("conv/nn.py", "from ..weights.checkpoint import open_checkpoint"),
        ("weights/plan.py", "from ..conv.ops import conv1d"),
        ("weights/plan.py", "def later():\n    from ..runtime.session import compile"),
        ("sound/audio.py", "import max_conv.conv"),
        ("runtime/session.py", "from ..frontends import torch"),
        ("frontends/mlx.py", "from .. import conv1d"),
        ("cache.py", "from .conv import layouts"),
    ],
)
def test_arrows_up_fall(file: str, source: str) -> None:
    with pytest.raises(AssertionError, match="imports"):
        check_file(PACKAGE / file, ast.parse(source))


def test_circles() -> None:
    """No module needs itself while it is loaded, in any order of imports."""
    needs = {
        name_of(path): targets(at_load(ast.parse(path.read_text())), package_of(path))
        for path in FILES
        if path.name != "__init__.py"
    }
    while free := [name for name, inside in needs.items() if not inside & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_at_load(path: Path) -> None:
    tree = at_load(ast.parse(path.read_text()))
    loaded = {module.partition(".")[0] for module, _ in imports_in(tree, package_of(path))}
    folder = path.relative_to(PACKAGE).parts[0]
    allowed = OUTSIDE_AT_LOAD.get(folder, {"max", "numpy"})
    assert loaded - sys.stdlib_module_names - {"max_conv"} <= allowed


# The public names are listed in a folder's `__all__`.


def public_names() -> dict[str, set[str]]:
    folders = ["max_conv", *(f"max_conv.{folder}" for folder in FOLDERS)]
    return {folder: set(importlib.import_module(folder).__all__) for folder in folders}


PUBLIC = public_names()
OUTSIDE = sorted([*(ROOT / "graphs").glob("*.py"), *(ROOT / "scripts").glob("*.py")])


def check_public(tree: ast.Module, path: str) -> None:
    """Raises AssertionError if a graph or a script imports a name of the package that is not public."""
    ours = set()
    # Graphs are installed inside the package: two dots lead into it.
    for module, imported in imports_in(tree, "max_conv.graphs" if path.startswith("graphs/") else "scripts"):
        top = module.partition(".")[0]
        assert top not in {"tests", "harness"} and (path.startswith("scripts/") or top != "scripts"), module
        if top == "max_conv" and not f"{module}.{imported}".startswith("max_conv.graphs."):
            known = PUBLIC.get(module)
            assert known is not None, f"{path} imports {module}, which is not public"
            assert imported is None or imported in {*known, *FOLDERS, "graphs"}, f"{module}.{imported} is not public"
            ours.add(imported or module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert ast.unparse(node.value).partition(".")[0] not in ours, f"{ast.unparse(node)} is not public"


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_graphs_and_scripts_use_public_names(path: Path) -> None:
    check_public(ast.parse(path.read_text()), path.relative_to(ROOT).as_posix())


@pytest.mark.parametrize(
    "source",
    [
        "from max_conv.conv.checks import check_bias",
        "from max_conv.conv import checks",
        "import max_conv.conv.checks",
        "from ..conv.checks import check_bias",
        "from ..conv import quad_products",
        "from max_conv.weights import plan_native",
        "from max_conv.weights import _a",
        "import max_conv\nmax_conv._a",
        "import tests.a",
    ],
)
def test_other_names_fall(source: str) -> None:
    with pytest.raises(AssertionError):
        check_public(ast.parse(source), "graphs/tcn.py")


@pytest.mark.parametrize("folder", PUBLIC)
def test_public_names_exist(folder: str) -> None:
    module = importlib.import_module(folder)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
            assert value.__doc__, f"{folder}.{name} has no docstring"


def test_the_tool_for_developers_needs_nothing() -> None:
    loaded = {module.partition(".")[0] for module, _ in imports_in(ast.parse((ROOT / "scripts/dev.py").read_text()))}
    assert loaded <= sys.stdlib_module_names


def loaded_with(names: list[str]) -> list[str]:
    """Returns which heavy packages are loaded in a new process that imports `names`."""
    code = f"import sys, {', '.join(names)}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    # MAX sets PYTHONEXECUTABLE, which os.environ does not show: the new process would leave its environment.
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_light_modules_load_without_max() -> None:
    every = [name_of(path) for path in FILES if path.relative_to(PACKAGE).parts[0] in ("cli", "weights", "sound")]
    assert loaded_with(["max_conv", *every, *(f"max_conv.{name}" for name in LIGHT)]) == []


def test_heavy_modules_load_with_max_alone() -> None:
    heavy = [name_of(path) for path in FILES if path.relative_to(PACKAGE).parts[0] in FOLDERS]
    assert {*loaded_with(heavy)} <= {"max", "mojo"}
