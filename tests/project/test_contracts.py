"""The import contracts in ``pyproject.toml`` hold for the package as it is installed, and find what is planted."""

import os
import re
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
    (tmp_path / "procon" / "kernels" / "__init__.py").touch()  # without which import-linter passes a folder over
    return tmp_path


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml", "--no-cache"]
    environment = os.environ | {"COLUMNS": "200"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    run.stdout = re.sub(r"\x1b\[[\d;]*m", "", run.stdout)  # older versions colour what no terminal shows
    return run


def test_contracts_hold(package):
    run = lint(package)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Contracts: 4 kept, 0 broken." in run.stdout


#: A file, what is planted in it, and the contract that it breaks.
PLANTED = [
    ("anchors/store.py", "from procon.training import ProConMixin", "Data flows one way"),
    ("settings.py", "def late():\n    from procon.chat import render", "Data flows one way"),
    ("kernels/penalty.py", "from procon.ops import constrain", "Data flows one way"),
    ("ops/autograd.py", "import transformers", "The op knows no models"),
    ("cli/arguments.py", "import torch", "Settings are light"),
    ("anchors/shards.py", "import datasets", "load datasets"),
]


def plant(package: Path, file: str, lines: str) -> None:
    with (package / "procon" / file).open("a") as module:
        module.write(f"\n\n{lines}\n")


def test_each_contract_finds_what_is_planted(package):
    for file, lines, _ in PLANTED:
        plant(package, file, lines)
    (package / "procon" / "new_room.py").write_text('"""On no floor."""\n')
    run = lint(package)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Contracts: 0 kept, 4 broken." in run.stdout
    sections = run.stdout.split("Broken contracts")[1]
    for file, _, contract in PLANTED:
        importer = f"procon.{file.removesuffix('.py').replace('/', '.')}"
        assert contract in sections
        assert f"{importer} -> " in sections, importer
    assert "new_room" in sections
