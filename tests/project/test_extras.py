"""The light core, and the extras beside it: each import is of the core, of an extra that is asked for, or optional."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
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

#: Packages that those of an extra bring, and that are imported through no door of theirs.
BROUGHT_ALONG = {"huggingface_hub": "transformers", "pyarrow": "datasets", "typing_extensions": "torch"}

#: Imports that no extra brings: the kernels are asked for only if Triton is there, a plugin only by its framework, and
#: DeepSpeed only for a model that it holds.
BY_THEMSELVES = {
    *(("triton", f"{kernel}_penalty.py") for kernel in ("projection", "rms_norm")),
    *(("triton", file) for file in ("launch.py", "penalty.py", "rows.py")),
    *(("triton", "backends.py"), ("axolotl", "axolotl_trainer.py"), ("deepspeed", "weights.py")),
}


def imported(texts: Iterable[str]) -> set[str]:
    """The names by which requirements are imported."""
    names = {Requirement(text).name for text in texts}
    return {IMPORTED.get(package, package.replace("-", "_")) for package in names}


def asked_for(tree: ast.AST) -> set[str]:
    """The extras that a file asks for."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {call.args[0].value for call in calls if getattr(call.func, "id", None) == "require_extra"}


def needed(node: ast.AST) -> Iterator[str]:
    """Packages that are imported below ``node``, but for type checkers and if they are there."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from needed(child)
        return
    if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type):
        # One of the two is there, or neither is needed.
        return
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield (node.module or "").partition(".")[0]
    for child in ast.iter_child_nodes(node):
        yield from needed(child)


def uncovered(path: Path, source: str) -> set[str]:
    """What a file imports that neither the core, nor its door's extra, nor one that it asks for brings."""
    tree = ast.parse(source)
    extras = asked_for(tree)
    room = path.relative_to(ROOT).parts
    if room[0] == "procon" and len(room) > 2:
        # The command line's door asks for nothing: `procon --help` needs no extra, and a command asks before it runs.
        door = ast.parse((ROOT / "procon" / room[1] / "__init__.py").read_text(encoding="utf-8"))
        extras |= {"cli"} if room[1] == "cli" else asked_for(door)
    covered = CORE | {package for extra in extras for package in EXTRAS[extra]} | {"procon"}
    covered |= {package for package, by in BROUGHT_ALONG.items() if by in covered}
    found = set(needed(tree)) - set(sys.stdlib_module_names) - covered
    return {package for package in found if (package, path.name) not in BY_THEMSELVES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_import_is_of_the_core_or_of_an_extra_that_is_asked_for(path):
    assert uncovered(path, path.read_text(encoding="utf-8")) == set()


def test_an_import_of_neither_is_found():
    op = ROOT / "procon" / "ops" / "planted.py"
    assert uncovered(op, "import numpy\ndef late():\n    from tqdm import tqdm") == {"tqdm"}
    assert uncovered(op, "try:\n    import tqdm\nexcept ImportError:\n    tqdm = None") == set()
    assert uncovered(op, 'require_extra("train", "it")\nimport tqdm, huggingface_hub, pandas') == {"pandas"}
    assert uncovered(ROOT / "procon" / "training" / "planted.py", "import tqdm\nimport trl") == {"trl"}


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
ROOMS_OF_THE_CORE = {
    "assets",
    "cli",
    "eager",
    "errors",
    "files",
    "kernels",
    "ops",
    "ranks",
    "schedule",
    "sequences",
    "settings",
}


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
    assert own <= {
        *("procon", "procon.version", "procon.kernels", "procon.errors", "procon.settings", "procon.schedule"),
        *("procon.ops", *(f"procon.ops.{module}" for module in ("autograd", "backends", "functional"))),
        *("procon.eager", *(f"procon.eager.{file}" for file in ("penalty", "projection_penalty", "rms_norm_penalty"))),
        "procon.eager.tiles",
    }
    # torch's own that are loaded on first use; a few hundred would be the compiler's.
    assert len(found) <= len(own) + 15, found
    assert {name.partition(".")[0] for name in only} - set(sys.stdlib_module_names) <= {"procon"}
    assert procon.constrain
