"""The wheel carries the package, its kernels and its graphs, and nothing else, and works without the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("max_conv", "graphs"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, env=dict(os.environ))
    (file,) = folder.glob("*.whl")
    return file


def test_wheel(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kinds = ("*.py", "*.mojo", "*.html", "py.typed")
    package = {path.relative_to(ROOT) for kind in kinds for path in (ROOT / "max_conv").rglob(kind)}
    graphs = {Path("max_conv") / path.relative_to(ROOT) for path in (ROOT / "graphs").glob("*.py")}
    assert held == {str(path) for path in package | graphs}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "max_conv" / "conv" / "kernels").rglob("*.mojo")}
    assert kernels and kernels <= held


def test_an_installed_wheel_runs_readmes_first_example(wheel: Path, tmp_path: Path) -> None:
    """Installs into an environment that sees the packages of this one, but not this checkout."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    # Folders on the path, not .pth files in them: those would lead back to the editable checkout.
    folders = [folder for folder in sys.path if "site-packages" in folder]
    (site / "packages.pth").write_text("\n".join(folders))

    match = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert match
    work = tmp_path / "work"
    work.mkdir()
    (work / "example.py").write_text(f"{match.group(1)}\nprint(max_conv.__file__, conv1d.__file__, sep='\\n')\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    answer = subprocess.run([python, "example.py"], cwd=work, env=clean, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    places = [Path(line) for line in answer.stdout.splitlines()[-2:]]
    assert len(places) == 2 and all(place.is_relative_to(site) for place in places), answer.stdout
    assert (work / "stem.maxconv").exists()
