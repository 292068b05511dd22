"""pixi.toml and pyproject.toml are valid, and pixi's tasks do the same as dev.py's commands."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from validate_pyproject.api import Validator
from validate_pyproject_schema_store.schema import get_schema

import dev

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pixi() -> dict:
    return tomllib.loads((ROOT / "pixi.toml").read_text())


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def validate() -> Validator:
    return Validator()


def test_pyproject_is_valid(validate: Validator, project: dict[str, Any]) -> None:
    validate(project)


def test_pixi_is_valid(validate: Validator, pixi: dict[str, Any]) -> None:
    # pyproject.toml may hold the content of pixi.toml as [tool.pixi], so one schema serves both.
    validate({"tool": {"pixi": pixi}})


@pytest.mark.parametrize(
    "wrong",
    [
        {"workspace": {"name": "x", "channels": "conda-forge", "platforms": []}},
        {"workspace": {"name": "x", "channels": [], "platforms": [], "licence": "MIT"}},
        {"workspace": {"name": "x", "channels": [], "platforms": []}, "tasks": {"demo": 1}},
    ],
)
def test_the_schema_finds_errors(validate: Validator, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"tool\.pixi"):
        validate({"tool": {"pixi": wrong}})


def test_every_top_level_key_is_known(pixi: dict[str, Any]) -> None:
    # The schema itself allows unknown tables.
    assert set(pixi) <= set(get_schema("pixi")["properties"])


def test_tasks_are_the_commands_of_dev(pixi: dict[str, Any]) -> None:
    tasks = {name: task["cmd"] for feature in pixi["feature"].values() for name, task in feature["tasks"].items()}
    assert tasks == {name: f"python scripts/dev.py --here {name}" for name in dev.COMMANDS}


def test_environments_install_what_dev_installs(pixi: dict[str, Any]) -> None:
    extras = {
        name: pixi["feature"][feature]["pypi-dependencies"]["max-conv"]["extras"]
        for name, env in pixi["environments"].items()
        for feature in env["features"]
    }
    assert extras == {"default": ["all"], "test": ["test"]}
    assert {extra for names in extras.values() for extra in names} == set(dev.EXTRAS)


def test_python_is_the_same(pixi: dict[str, Any], project: dict[str, Any]) -> None:
    oldest = re.match(r">=([\d.]+)", pixi["dependencies"]["python"])
    assert oldest and project["project"]["requires-python"] == oldest.group()
