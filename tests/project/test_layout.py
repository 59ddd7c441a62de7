"""The house: doors that say what they are, and no way past them."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import procon

ROOT = Path(__file__).parents[2]
PROCON = ROOT / "procon"
ROOMS = sorted(door.parent.name for door in PROCON.glob("*/__init__.py") if door.parent.name not in ("assets", "eager"))
SOURCES = [
    path
    for folder in ("procon", "kernels", "benchmarks", "examples", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

#: Modules that need TRL.
OF_TRL = {"training.sft", "training.preferences"}


def shown(room: str) -> set[str]:
    """The names that a room's door shows."""
    tree = ast.parse((PROCON / room / "__init__.py").read_text(encoding="utf-8"))
    (names,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(ast.literal_eval(names))


def past_doors(source: str, own_room: str | None) -> list[str]:
    """Imports of ``source`` that go to an inner module of another room for a name that its door shows."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("procon."):
            continue
        _, room, *inner = node.module.split(".")
        if not inner or room == own_room or room not in ROOMS:
            continue
        found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name in shown(room)]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_door_says_what_goes_in_and_out(room):
    text = ast.get_docstring(ast.parse((PROCON / room / "__init__.py").read_text(encoding="utf-8")))
    assert re.fullmatch(r".+\n\nIn: .+\nOut: .+\nMay import: .+", text, re.DOTALL), text
    assert all(hasattr(__import__(f"procon.{room}", fromlist=["*"]), name) for name in shown(room))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_way_past_a_door(path):
    parts = path.relative_to(ROOT).parts
    own = parts[1] if parts[0] == "procon" and len(parts) > 2 else None
    assert past_doors(path.read_text(encoding="utf-8"), own) == []


def test_a_way_past_a_door_is_found():
    planted = "def late():\n    from procon.anchors.store import Anchors, _MANIFEST\n"
    assert past_doors(planted, "training") == ["procon.anchors.store.Anchors"]
    assert past_doors(planted, "anchors") == []
    assert past_doors("from procon.anchors import Anchors", "training") == []


def test_public_names():
    assert set(procon.__all__) == {"__version__", *procon._HOME}
    assert all(getattr(procon, name) is not None for name, home in procon._HOME.items() if home not in OF_TRL)


def test_only_the_kernels_are_mounted_in_a_source_tree(tmp_path):
    """A checkout that is not installed has ``procon.kernels``, and nothing else of the folder that both lie in."""
    (tmp_path / "procon").symlink_to(PROCON, target_is_directory=True)
    program = (
        "import procon, procon.kernels as kernels, importlib.util as u\n"
        "assert not u.find_spec('kernels'), 'kernels passes for the package of that name'\n"
        "assert all(u.find_spec(f'procon.{name}') is None for name in ('tests', 'docs', 'benchmarks', 'setup'))\n"
        "assert u.find_spec('procon.kernels.launch').origin.endswith('/kernels/launch.py')\n"
        "assert procon.kernels is kernels\n"
        "print(*kernels.__path__)\n"
    )
    # Isolated, and without site-packages, where an installed one would be found.
    search = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    run = subprocess.run([sys.executable, "-ISc", search + program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(ROOT / "kernels")


def test_kernels_of_a_checkout_do_not_pass_for_the_hubs(tmp_path):
    """In its root, where ``python -m benchmarks...`` and notebooks start."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}  # looked through after the current folder
    command = [sys.executable, "-c", "import procon.kernels, kernels; print(kernels.__file__)"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(tmp_path / "kernels" / "__init__.py")


def test_what_readme_and_pages_import_is_at_the_top():
    """A name that ``procon`` exports is imported from there, by README, how-tos and examples."""
    pages = [ROOT / "README.md", *(ROOT / "docs" / "how-to").glob("*.md"), *(ROOT / "examples").rglob("*.py")]
    elsewhere = {}
    for page in pages:
        for module, names in re.findall(r"from (procon\.[\w.]+) import ([\w, ]+)", page.read_text(encoding="utf-8")):
            named = {name.strip() for name in names.split(",")} & procon._HOME.keys()
            # Of the ops' door, a page may take all.
            if named and module != "procon.ops":
                elsewhere[page.name] = named
    assert not elsewhere
