"""Everything that the documentation shows works: docstring examples, README's code, README's commands, links."""

import doctest
import importlib
import os
import pkgutil
import re
import shlex
from pathlib import Path

import click
import pytest

import dev
import max_conv

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "ARCHITECTURE.md", "MEASUREMENTS.md", "BENCHMARKS.md", "CONTRIBUTING.md", "CHANGELOG.md")
FOLDERS = "conv|weights|runtime|frontends|streaming|sound|serving|cli"
README = (ROOT / "README.md").read_text()


def modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(max_conv.__path__, "max_conv.")]
    graphs = [f"max_conv.graphs.{file.stem}" for file in sorted((ROOT / "graphs").glob("[!_]*.py"))]
    return sorted({"max_conv", "dev", *names, *graphs})


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    for example in finder.find(importlib.import_module(name), name):
        runner.run(example, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


@pytest.mark.parametrize("name", ["Conv1D", "ConvTranspose1D", "compile", "conv1d", "conv_transpose1d"])
def test_the_public_names_have_examples(name: str) -> None:
    assert doctest.DocTestFinder(recurse=False).find(getattr(max_conv, name), name)[0].examples


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_readme_code(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[number], f"README.md, block {number}", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_readme_commands(words: list[str]) -> None:
    if words[0] == "python3":
        script, command = ROOT / words[1], words[2]
        assert script == Path(dev.__file__) and command in dev.COMMANDS
    elif words[0] == "max-conv":
        from max_conv.cli.main import main

        rest = iter(words[1:])
        called: click.Command = main
        while isinstance(called, click.Group):
            called = called.commands[next(rest)]
        known = {option for parameter in called.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in rest if word.startswith("--")} <= {*known, "--help"}
    elif words[0] == "pixi":
        assert words[1] == "run" and words[2] in dev.COMMANDS
    else:
        assert words[:2] in (["pip", "install"], ["git", "clone"], ["cd", "max_conv"]), words


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    paths = re.findall(r"`((?:tests|scripts|graphs|max_conv|\.ci)/[\w./-]+)`", text)
    # ARCHITECTURE.md names modules without the package, and kernels by their folder.
    short = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text)
    paths += [f"max_conv/{path}" for path in short]
    paths += [f"max_conv/conv/{path}" for path in re.findall(r"`(kernels/[\w./-]*)`", text)]
    missing = [path for path in (*links, *paths) if not (ROOT / path).exists()]
    assert not missing


def test_pages_are_short() -> None:
    assert README.count("\n") <= 150
    assert (ROOT / "ARCHITECTURE.md").read_text().count("\n") <= 180


def test_sources_are_found() -> None:
    # The lists above are made by searching: an empty one would pass every test.
    assert len(modules()) > 10 and len(blocks("python")) >= 2 and len(commands()) >= 5
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "dev.py test" in (ROOT / ".ci" / "run").read_text()
