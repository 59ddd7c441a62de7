"""The import contracts in ``pyproject.toml`` hold for the package as it is installed, and find what is planted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter is not installed: pip install -e '.[lint]'")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package, with the kernels in it as setup.py installs them."""
    ignored = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "procon", tmp_path / "procon", ignore=ignored)
    shutil.copytree(ROOT / "kernels", tmp_path / "procon" / "kernels", ignore=ignored)
    return tmp_path


def lint(folder: Path) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml", "--no-cache"]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=False
    )


def test_contracts_hold(package):
    run = lint(package)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("file", "line", "broken", "named"),
    [
        ("anchors/store.py", "from procon.training import ProConMixin", "Data flows one way", "procon.anchors.store"),
        ("settings.py", "def late():\n    from procon.chat import render", "Data flows one way", "procon.settings"),
        ("kernels/penalty.py", "from procon.ops import constrain", "Data flows one way", "procon.kernels.penalty"),
        ("ops/autograd.py", "import transformers", "The op knows no models", "procon.ops.autograd"),
        ("cli/arguments.py", "import torch", "Settings are light", "procon.cli.arguments"),
        ("anchors/shards.py", "import datasets", "load datasets", "procon.anchors.shards"),
        ("new_room/__init__.py", '"""No floor of its own."""', "Data flows one way", "new_room"),
    ],
)
def test_a_planted_import_is_found(package, file, line, broken, named):
    path = package / "procon" / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as module:
        module.write(f"\n\n{line}\n")
    run = lint(package)
    assert run.returncode == 1, run.stdout + run.stderr
    assert any(broken in row and "BROKEN" in row for row in run.stdout.splitlines()), run.stdout
    assert named in run.stdout
