"""The light core, and the extras beside it: each import is of one of them, and what is missing is named."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import procon
from procon.errors import EXTRAS, ProConError

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "procon").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
CORE = {"torch", "numpy", "safetensors"}

#: What a package is imported as, if not by its name.
IMPORTED = {"pyyaml": "yaml"}

#: What packages of an extra bring, and what is asked for only if it is there.
BROUGHT_ALONG = {"huggingface_hub", "pyarrow", "typing_extensions", "axolotl", "pydantic", "triton", "deepspeed"}


def imported(texts: Iterable[str]) -> set[str]:
    """The names by which requirements are imported."""
    names = {Requirement(text).name for text in texts}
    return {IMPORTED.get(package, package.replace("-", "_")) for package in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_import_is_of_the_core_or_of_an_extra(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    found = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert found <= CORE.union(*EXTRAS.values()) | BROUGHT_ALONG | {"procon"}


def test_the_extras_are_those_of_setup(setup):
    assert imported(setup["install_requires"]) == CORE
    found = {name: imported(texts) for name, texts in setup["extras_require"].items()}
    assert {name: set(packages) for name, packages in EXTRAS.items()} == {name: found[name] for name in EXTRAS}
    assert found["all"] == set().union(*(found[name] for name in [*EXTRAS, "trackers"]))
    assert found["llama-factory"] == found["cli"]


#: In the light core: what each public name and each door ends in, and what the commands print.
PROGRAM = """
import contextlib, importlib, io, json, pkgutil, sys
absent = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(absent))
import procon
from procon.cli import main

def outcome(get):
    try:
        get()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def run(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()

found = {
    "names": {name: outcome(lambda: getattr(procon, name)) for name in procon.__all__},
    "rooms": {
        module.name: outcome(lambda: importlib.import_module(module.name))
        for module in pkgutil.iter_modules(procon.__path__, "procon.")
    },
    "commands": {" ".join(argv): run(*argv) for argv in (
        ["--version"], ["--help"], ["train", "--help"], ["help", "eval"],
        ["train", "MODEL", "DATA"], ["quickstart", "--config", "x.yaml"],
    )},
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def light() -> dict:
    absent = sorted(set().union(*EXTRAS.values()) - {"jinja2"})  # which torch brings
    command = [sys.executable, "-c", PROGRAM, json.dumps(absent)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


#: What works in the light core.
OF_THE_CORE = {"AlphaSchedule", "ChatSettings", "ProConSettings", "ProConError", "__version__"}
OF_THE_CORE |= {"constrain", "project", "projection_penalty", "rms_norm_constrain"}
ROOMS_OF_THE_CORE = {"assets", "cli", "eager", "errors", "files", "kernels", "ops", "schedule", "sequences", "settings"}


def test_the_light_core_has_the_op(light):
    assert {name for name, error in light["names"].items() if error is None} == OF_THE_CORE
    rooms = {name.removeprefix("procon.") for name, error in light["rooms"].items() if error is None}
    assert rooms - {"kernels"} == (ROOMS_OF_THE_CORE | {"version"}) - {"kernels"}


def test_the_rest_names_its_extra_in_one_line(light):
    pattern = r"ProConError: procon\.\w+ needs \w+, which is not installed: pip install 'procon-llm\[(train|report)\]'"
    errors = {**light["names"], **light["rooms"]}
    assert all(re.fullmatch(pattern, error) for error in errors.values() if error is not None), errors
    assert errors["procon.report"].endswith("[report]'")


def test_commands_in_the_light_core(light):
    for shown in ("--version", "--help", "train --help", "help eval"):
        code, out, err = light["commands"].pop(shown)
        assert (code, err) == (0, ""), shown
        assert out
    assert light["commands"]
    for command, (code, out, err) in light["commands"].items():
        name = command.split(" ")[0]
        assert (code, out) == (2, ""), command
        assert re.fullmatch(
            rf"procon: error: procon {name} needs \w+, which is not installed: pip install 'procon-llm\[cli\]'\n", err
        ), err


@pytest.mark.parametrize("name", ["sft", "preferences"])
def test_trl_is_named_where_it_is_missing(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, f"procon.training.{name}", raising=False)
    with pytest.raises(ProConError, match=rf"procon\.training\.{name} needs trl, .*'procon-llm\[trl\]'"):
        __import__(f"procon.training.{name}")


def test_the_op_loads_nothing_beside_torch():
    """Counted, not timed: modules that ``import torch`` has not loaded, and what is not Python's own or ours."""
    program = (
        "import torch, sys\n"
        "before = set(sys.modules)\n"
        "import procon\n"
        "only = set(sys.modules) - before\n"
        "from procon import constrain\n"
        "print(sorted(only))\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    only, found = map(ast.literal_eval, run.stdout.splitlines())
    own = {name for name in found if name.partition(".")[0] == "procon"}
    others = {name.partition(".")[0] for name in found} - {"procon"} - set(sys.stdlib_module_names)
    assert others <= {"torch"}
    assert not [name for name in found if name.startswith(("torch._dynamo", "torch._inductor", "triton"))]
    # torch's own that are loaded on first use; a few hundred would be the compiler's.
    assert len(found) <= len(own) + 15, found
    assert {name.partition(".")[0] for name in only} - set(sys.stdlib_module_names) <= {"procon"}
    assert procon.constrain
