"""The wheel carries the package, its kernels and its graphs, and nothing else."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("max_conv", "graphs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, env=dict(os.environ))
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        path.relative_to(ROOT) for kind in ("*.py", "*.mojo", "py.typed") for path in (ROOT / "max_conv").rglob(kind)
    }
    graphs = {Path("max_conv") / path.relative_to(ROOT) for path in (ROOT / "graphs").glob("*.py")}
    assert held == {str(path) for path in package | graphs}
