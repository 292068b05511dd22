"""Who may import whom, checked on the sources."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "max_conv"

# Every module of the package: the modules of the package that it may import, anywhere in it, and the packages outside
# the standard library that it may import as it is loaded. What a module needs on some paths only, it imports there.
MODULES: dict[str, tuple[str, str]] = {
    "__init__": ("dispatch frontends nn ops packing session weight_norm", ""),
    "layouts": ("", "numpy"),
    "geometry": ("", ""),
    "reference": ("geometry layouts", "numpy"),
    "cache": ("", ""),
    "kernel_library": ("cache", ""),
    "dispatch": ("geometry layouts", ""),
    "packing": ("dispatch layouts", "max numpy"),
    "dlpack": ("", "numpy"),
    "arrays": ("dlpack", "max numpy"),
    "checks": ("", "max"),
    "ops": ("checks dispatch geometry kernel_library layouts packing", "max"),
    "describe": ("dispatch packing", "max"),
    "recurrent": ("checks ops packing", "max"),
    "nn": ("arrays checks geometry layouts ops packing", "max"),
    "weight_norm": ("arrays checkpoint layouts nn ops packing", "max"),
    "idle": ("", ""),
    "fork": ("", ""),
    "ports": ("", ""),
    "notice": ("", ""),
    "session": ("arrays checkpoint fork idle notice packing ports", "max numpy"),
    "tensors": ("", "numpy"),
    "safetensors_file": ("tensors", "numpy"),
    "npz_file": ("safetensors_file tensors", "numpy"),
    "file_kind": ("", ""),
    "harmless": ("", ""),
    "state_dicts": ("safetensors_file", ""),
    "torch_file": ("harmless safetensors_file state_dicts tensors", "numpy"),
    "onnx_file": ("safetensors_file", "numpy"),
    "folding": ("", "numpy"),
    "marker": ("", ""),
    "checkpoint": ("assets file_kind folding marker npz_file safetensors_file tensors torch_file", "numpy"),
    "layer_map": ("", ""),
    "planned": ("marker", ""),
    "norm_parts": ("checkpoint folding layer_map planned safetensors_file tensors", ""),
    "batch_norms": ("planned tensors", ""),
    "plan": ("batch_norms checkpoint layer_map marker norm_parts planned safetensors_file", ""),
    "making": ("checkpoint folding layouts planned tensors", "numpy"),
    "verify": ("checkpoint making plan planned reference tensors", "numpy"),
    "staging": ("", ""),
    "convert": ("checkpoint layer_map making marker plan planned safetensors_file staging tensors verify", "numpy"),
    "frontends": ("frontends.mlx frontends.torch", ""),
    "frontends.eager": ("arrays geometry nn packing session", "max numpy"),
    "frontends.mlx": ("frontends.eager layouts", "max numpy"),
    "frontends.torch_module": ("arrays folding frontends.eager", "max numpy"),
    "frontends.torch": ("frontends.eager frontends.torch_module", "max numpy"),
    "assets": ("cache", ""),
    "audio": ("", "numpy"),
    "speech": ("", "numpy"),
    "pitch": ("", "numpy"),
    "picture": ("pitch speech", "numpy"),
    "terminal": ("", "click"),
    "cli_convert": ("convert layer_map tensors terminal", "click"),
    "cli_run": ("assets audio picture pitch session speech terminal", "click"),
    "cli": ("cache checkpoint cli_convert cli_run describe kernel_library session terminal", "click"),
}
LIGHT = [name for name, (_, outside) in MODULES.items() if "max" not in outside.split()]
"""Modules that are loaded without MAX, and so within a moment."""

BY_NAME = {"__init__", "frontends", "cli", "terminal"}
"""Modules that load others by name: lazily, and for the command line also the graphs."""

PUBLIC = {
    "max_conv",
    "max_conv.arrays",
    "max_conv.assets",
    "max_conv.audio",
    "max_conv.checkpoint",
    "max_conv.convert",
    "max_conv.geometry",
    "max_conv.graphs",
    "max_conv.layouts",
    "max_conv.pitch",
    "max_conv.recurrent",
    "max_conv.reference",
    "max_conv.tensors",
}
"""What every graph and script may import from."""

INSIDE = {
    "graphs/parts.py": {"max_conv.packing"},
    "graphs/silero_vad.py": {"max_conv.dispatch", "max_conv.onnx_file", "max_conv.ops", "max_conv.packing"},
    "scripts/convert_checkpoint.py": {"max_conv.cli_convert", "max_conv.terminal"},
    "scripts/report.py": {"max_conv.dispatch"},
}
"""What single files import besides, each for a kernel or command that no other file has."""

HEAVY = {"max", "mojo", "torch", "mlx", "onnx", "onnxruntime", "safetensors", "soundfile", "soxr", "matplotlib"}
OUTERMOST = {"tests", "scripts", "graphs", "harness"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def path_of(name: str) -> Path:
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports_in(tree: ast.AST, package: str = "") -> Iterator[tuple[str, str | None]]:
    """Yields (module, name) for every import in a tree; `package` is what one leading dot stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def at_load(tree: ast.Module) -> ast.Module:
    """Returns a module without its functions and what stands under TYPE_CHECKING."""
    kept = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(kept, [])


def package_of(name: str) -> str:
    inside = name == "__init__" or path_of(name).name == "__init__.py"
    full = "max_conv" if name == "__init__" else f"max_conv.{name}"
    return full if inside else full.rpartition(".")[0]


def test_every_module_has_a_row() -> None:
    assert {name_of(path) for path in PACKAGE.rglob("*.py")} == set(MODULES)


def test_the_rows_have_no_circle() -> None:
    left = {name: {*inside.split()} for name, (inside, _) in MODULES.items()}
    while free := [name for name, inside in left.items() if not inside & left.keys()]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("name", MODULES)
def test_imports_within_the_package(name: str) -> None:
    allowed = {*MODULES[name][0].split()}
    tree = ast.parse(path_of(name).read_text())
    for module, imported in imports_in(tree, package_of(name)):
        assert module.partition(".")[0] not in OUTERMOST, f"{name} imports {module}"
        if module.partition(".")[0] != "max_conv":
            continue
        inner = module.removeprefix("max_conv").lstrip(".")
        # `from . import session` names a module after the import.
        below = f"{inner}.{imported}".lstrip(".")
        target = below if below in MODULES else inner
        assert target in allowed, f"{name} imports {target or 'the package itself'}"
    dynamic = {"import_module", "__import__"} & {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
    }
    assert not dynamic or name in BY_NAME, f"{name} imports by name"
    assert "graphs" not in {part for module, _ in imports_in(tree) for part in module.split(".")}


@pytest.mark.parametrize("name", MODULES)
def test_imports_at_load(name: str) -> None:
    tree = at_load(ast.parse(path_of(name).read_text()))
    loaded = {module.partition(".")[0] for module, _ in imports_in(tree, package_of(name))}
    assert loaded - sys.stdlib_module_names - {"max_conv"} <= {*MODULES[name][1].split()}


OUTSIDE = sorted([*(ROOT / "graphs").glob("*.py"), *(ROOT / "scripts").glob("*.py")])


def inner_names(tree: ast.Module, path: str) -> set[str]:
    """Checks the imports of a graph or script, and returns the modules that it takes from beyond PUBLIC."""
    ours, inner = set(), set()
    # Graphs are installed inside the package: two dots lead into it.
    for module, imported in imports_in(tree, package="max_conv.graphs" if path.startswith("graphs/") else "scripts"):
        top = module.partition(".")[0]
        assert top not in {"tests", "harness"} and (path.startswith("scripts/") or top != "scripts"), module
        if top == "max_conv" and not module.startswith("max_conv.graphs."):
            below = f"{module}.{imported}"
            target = below if below.removeprefix("max_conv.") in MODULES else module
            if target not in PUBLIC:
                assert target in INSIDE.get(path, ()), f"{path} imports {target}, which is not public"
                inner.add(target)
            assert not (imported or "").startswith("_"), f"{module}.{imported}"
            ours.add(imported or module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert ast.unparse(node.value).partition(".")[0] not in ours, ast.unparse(node)
    return inner


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_graphs_and_scripts_use_public_names(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert inner_names(ast.parse(path.read_text()), name) == INSIDE.get(name, set())


@pytest.mark.parametrize("module", ["checks", "planned", "dispatch", "onnx_file", "cli", "frontends.eager"])
def test_other_names_fall(module: str) -> None:
    parent, _, last = f"max_conv.{module}".rpartition(".")
    spellings = [f"from max_conv.{module} import a", f"import max_conv.{module}", f"from {parent} import {last}"]
    for source in [*spellings, f"from ..{module} import a"]:
        with pytest.raises(AssertionError, match="not public"):
            inner_names(ast.parse(source), "graphs/tcn.py")


@pytest.mark.parametrize(
    "source", ["from max_conv.convert import _a", "import max_conv\nmax_conv._a", "import tests.a"]
)
def test_hidden_names_fall(source: str) -> None:
    with pytest.raises(AssertionError):
        inner_names(ast.parse(source), "graphs/tcn.py")


def test_the_tool_for_developers_needs_nothing() -> None:
    loaded = {module.partition(".")[0] for module, _ in imports_in(ast.parse((ROOT / "scripts/dev.py").read_text()))}
    assert loaded <= sys.stdlib_module_names


def loaded_with(names: list[str]) -> list[str]:
    """Returns which heavy packages are loaded in a new process that imports `names`."""
    code = f"import sys, {', '.join(names)}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    # MAX sets PYTHONEXECUTABLE behind os.environ, which would lead the new process out of its environment.
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_light_modules_load_without_max() -> None:
    assert loaded_with(["max_conv", *(f"max_conv.{name}" for name in LIGHT if name != "__init__")]) == []


def test_heavy_modules_load_with_max_alone() -> None:
    assert {*loaded_with([f"max_conv.{name}" for name in MODULES if name not in LIGHT])} <= {"max", "mojo"}
