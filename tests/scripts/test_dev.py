"""scripts/dev.py, as far as it can be tested without a network."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import dev

FILE = Path(dev.__file__)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository without a virtual environment."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "VENV", tmp_path / ".venv")
    return tmp_path


class Ran(list[tuple[list[str], Path | None]]):
    """Commands, each with its folder, and the status that answers them."""

    status = 0


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """The commands that were run, in order; `ran.status` answers them."""
    commands = Ran()

    def run(command: list[str | Path], cwd: Path | None = None) -> int:
        commands.append(([str(word) for word in command], cwd))
        return commands.status

    monkeypatch.setattr(dev, "run", run)
    return commands


@pytest.fixture
def installed(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Pretends that installing works: makes the files that would be there."""
    calls = []

    def watch(command: list[str]) -> int:
        calls.append([str(word) for word in command])
        if "venv" in command:
            python = root / ".venv" / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.symlink_to(sys.executable)
            (root / ".venv" / "pyvenv.cfg").touch()
        return 0

    monkeypatch.setattr(dev, "watch", watch)
    monkeypatch.setattr(dev.shutil, "which", lambda name: None)
    return calls


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FILE, *arguments],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | environment,
    )


def test_help() -> None:
    answer = program("--help")
    assert answer.returncode == 0
    for command in dev.COMMANDS:
        assert f"dev.py {command}" in answer.stdout
    assert program().stdout == answer.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tset"], "dev.py: there is no command 'tset'; the commands are demo, test, smoke, lint.\n"),
        (["lint", "max_conv"], "dev.py: lint takes no arguments, but got max_conv.\n"),
        (["smoke", "-x"], "dev.py: smoke takes no arguments, but got -x.\n"),
    ],
)
def test_wrong_arguments(arguments: list[str], sentence: str) -> None:
    answer = program(*arguments)
    assert (answer.returncode, answer.stdout, answer.stderr) == (1, "", sentence)


def test_python_without_venv(root: Path, tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "ensurepip.py").write_text("raise ImportError('as on Debian')\n")
    script = root / "scripts" / "dev.py"
    script.parent.mkdir()
    script.write_text(FILE.read_text())
    answer = subprocess.run(
        [sys.executable, script, "demo"],
        capture_output=True,
        text=True,
        env={"PATH": "/nowhere", "PYTHONPATH": str(modules)},
    )
    assert answer.returncode == 1
    assert "sudo apt install python3-venv" in answer.stderr and answer.stderr.count("\n") == 1
    assert not (root / ".venv").exists()


def test_an_older_python_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    # Everything up to the check must be parsed and run by any Python 3, so the newer spellings stay out of this file.
    source = FILE.read_text()
    for new in (":=", "match ", "\nfrom __future__"):
        assert new not in source
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    with pytest.raises(SystemExit, match=r"^dev\.py: Python 3\.11 or newer is needed, but this is 3\.8\.$"):
        exec(compile(source, str(FILE), "exec"), {"__name__": "dev"})


def test_demo_passes_its_arguments_on(root: Path, installed: list[list[str]], ran: Ran) -> None:
    assert dev.main(["demo", "my file.wav", "--json"]) == 0
    assert ran == [([f"{root}/.venv/bin/max-conv", "run", "speech", "my file.wav", "--json"], None)]
    assert installed[-1][-2:] == ["--editable", f"{root}[all]"]


def test_test_with_arguments_runs_only_pytest(root: Path, installed: list[list[str]], ran: Ran) -> None:
    ran.status = 5
    assert dev.main(["test", "-k", "same or valid"]) == 5
    assert ran == [([f"{root}/.venv/bin/python", "-m", "pytest", "-k", "same or valid"], root)]
    assert installed[-1][-2:] == ["--editable", f"{root}[test]"]


def test_test_runs_everything_even_after_a_failure(
    root: Path, installed: list[list[str]], ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    ran.status = 1
    assert dev.main(["test"]) == 1
    assert [command[2] for command, _ in ran] == [
        "ruff",
        "ruff",
        "mypy",
        "import mblack; mblack.patched_main()",
        "pytest",
    ]
    assert "pytest: FAILED (1)" in capsys.readouterr().out


@pytest.mark.parametrize("option", list(dev.OPTIONS))
def test_own_options(option: str, root: Path, installed: list[list[str]], ran: Ran) -> None:
    python, words = f"{root}/.venv/bin/python", dev.OPTIONS[option]
    assert dev.main(["test", option, "-k", "same"]) == 0
    assert ran == [([python, "-m", "pytest", *words, "-k", "same"], root)]
    assert dev.main(["test", option]) == 0
    assert ran[-1][0][2] == "pytest" and "-n" in ran[-1][0] and ran[-1][0][-len(words) :] == words


def test_smoke(root: Path, installed: list[list[str]], ran: Ran) -> None:
    ran.status = 4
    assert dev.main(["smoke"]) == 4
    assert ran == [([f"{root}/.venv/bin/python", "-m", "pytest", "-q", *dev.SMOKE], root)]


def test_smoke_names_tests_that_exist() -> None:
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", *dev.SMOKE]
    answer = subprocess.run(words, capture_output=True, text=True, cwd=dev.ROOT)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_long_lines_of_mojo_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "max_conv" / "kernels").mkdir(parents=True)
    (root / "max_conv" / "kernels" / "wide.mojo").write_text(f"# {'x' * 119}\n# {'x' * 118}\n")
    assert dev.mojo_lines() == 1
    assert capsys.readouterr().out == "dev.py: max_conv/kernels/wide.mojo:1: 121 columns, not 120\n"


def test_unformatted_mojo_fails(root: Path) -> None:
    (root / "scripts").mkdir()
    file = root / "scripts" / "new.mojo"
    for text, status in (("def main():\n    print(1)\n", 0), ("def main( ):\n  print( 1 )\n", 1)):
        file.write_text(text)
        assert dev.mojo_format(Path(sys.executable)) == status
        assert file.read_text() == text


def test_here_installs_nothing(root: Path, installed: list[list[str]], ran: Ran) -> None:
    assert dev.main(["--here", "test", "-x"]) == 0
    assert ran == [([sys.executable, "-m", "pytest", "-x"], root)]
    assert installed == []


def test_installs_once(root: Path, installed: list[list[str]], ran: Ran) -> None:
    for _ in range(3):
        dev.main(["demo"])
    assert len(installed) == 2  # the environment, the packages


def test_what_test_installs_serves_demo_too(root: Path, installed: list[list[str]], ran: Ran) -> None:
    dev.main(["test"])
    dev.main(["demo"])
    assert len(installed) == 2


def test_installs_again_when_the_project_changes(
    root: Path, installed: list[list[str]], ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev.main(["demo"])
    monkeypatch.setattr(dev, "unusable", lambda python: None)
    (root / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    dev.main(["demo"])
    assert len(installed) == 3


def test_starts_over_after_an_interruption(
    root: Path,
    installed: list[list[str]],
    ran: Ran,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = dev.watch

    def interrupted(command: list[str]) -> int:
        if "install" in command:
            raise KeyboardInterrupt
        return whole(command)

    monkeypatch.setattr(dev, "watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dev.main(["demo"])
    (root / ".venv" / "half").touch()
    monkeypatch.setattr(dev, "watch", whole)
    assert dev.main(["demo"]) == 0
    assert "the last set-up was cut short; making .venv anew" in capsys.readouterr().out
    assert not (root / ".venv" / "half").exists()


def test_a_failed_installation_is_tried_again_and_harms_nothing(
    root: Path, installed: list[list[str]], ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev.main(["demo"])
    monkeypatch.setattr(dev, "unusable", lambda python: None)
    monkeypatch.setattr(dev, "watch", lambda command: 1)
    with pytest.raises(SystemExit, match="the installation failed"):
        dev.main(["test"])
    assert dev.main(["demo"]) == 0


def test_makes_the_environment_anew_where_its_python_is_gone(
    root: Path, installed: list[list[str]], ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    dev.main(["demo"])
    python = root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    assert dev.main(["demo"]) == 0
    assert "its Python does not run; making .venv anew" in capsys.readouterr().out
    assert python.exists()


def test_removes_nothing_but_environments(root: Path, installed: list[list[str]], ran: Ran) -> None:
    (root / ".venv").mkdir()
    (root / ".venv" / "diary.txt").touch()
    with pytest.raises(SystemExit, match="is not a virtual environment; move it away"):
        dev.main(["demo"])
    assert (root / ".venv" / "diary.txt").exists()


def test_uv_before_pip(root: Path, installed: list[list[str]], ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev.shutil, "which", lambda name: f"/opt/{name}")
    dev.main(["demo"])
    assert [command[:2] for command in installed] == [["/opt/uv", "venv"], ["/opt/uv", "pip"]]
    assert "--seed" in installed[0]  # max-conv needs pip


def test_pip_where_uv_fails(root: Path, installed: list[list[str]], ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dev.watch
    monkeypatch.setattr(dev.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(
        dev, "watch", lambda command: whole(command) or int(command[0] == "/opt/uv" and "pip" in command)
    )
    assert dev.main(["demo"]) == 0
    assert installed[-1][1:4] == ["-m", "pip", "install"]


def test_uv_looks_where_pip_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/a /b")
    monkeypatch.delenv("UV_FIND_LINKS", raising=False)
    assert dev.environment()["UV_FIND_LINKS"] == "/a,/b"
    monkeypatch.setenv("UV_FIND_LINKS", "/c")
    assert dev.environment()["UV_FIND_LINKS"] == "/c"


@pytest.mark.parametrize(
    ("line", "news"),
    [
        (
            "  Downloading max_core-26.7.0-py3-none-manylinux_2_34_x86_64.whl (87.1 MB)",
            "downloading max_core-26.7.0 (87 MB)",
        ),
        ("Using cached torch-2.13.0-cp312-cp312-linux_x86_64.whl (1.5 GB)", "using cached torch-2.13.0 (1536 MB)"),
        ("Downloading max-mojo-libs (27.5MiB)", "downloading max-mojo-libs (28 MB)"),
        ("  Downloading click-8.3.0-py3-none-any.whl (107 kB)", None),
        ("Downloading idna-3.11-py3-none-any.whl (2.0 MB)", None),
        ("Installing collected packages: a, b, c", "writing 3 packages"),
        ("Installed 61 packages in 1.2s", "installed 61 packages in 1.2s"),
        ("Collecting numpy>=1.26", None),
    ],
)
def test_news(line: str, news: str | None) -> None:
    assert dev.news(line) == news


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_exit_status_passes_through(code: str, status: int) -> None:
    assert dev.run([sys.executable, "-c", code]) == status


def test_watch_shows_all_that_was_said_where_it_failed(capsys: pytest.CaptureFixture[str]) -> None:
    assert dev.watch([sys.executable, "-c", "print('why'); raise SystemExit(3)"]) == 3
    assert "why" in capsys.readouterr().out
    assert dev.watch([sys.executable, "-c", "print('quiet')"]) == 0
    assert "quiet" not in capsys.readouterr().out


WORKFLOWS = sorted((dev.ROOT / ".github" / "workflows").glob("*.yml"))


def commands_of(job: dict[str, Any]) -> Iterator[str]:
    """Every command line of a workflow's job, with each value of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step)
        if "run" in step:
            values = matrix["command"] if "matrix.command" in step["run"] else [""]
            yield from (step["run"].replace("${{ matrix.command }}", value) for value in values)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_call_dev_and_nothing_else(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text())
    # YAML 1.1 reads the key `on` as true.
    assert set(workflow) == {"name", True, "permissions", "jobs"}
    for job in workflow["jobs"].values():
        lines = [shlex.split(line) for line in commands_of(job)]
        assert lines
        for line in lines:
            assert line[:2] == ["python3", "scripts/dev.py"] and line[2] in dev.COMMANDS
            assert all((dev.ROOT / word).exists() for word in line[3:] if not word.startswith("-"))


def test_the_workflows_are_found() -> None:
    assert [file.name for file in WORKFLOWS] == ["ci.yml", "nightly.yml"]


def test_pre_commit_runs_lint() -> None:
    (repo,) = yaml.safe_load((dev.ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repo["hooks"]
    assert (repo["repo"], hook["entry"], hook["pass_filenames"]) == ("local", "python3 scripts/dev.py lint", False)
