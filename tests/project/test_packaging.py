"""What is installed: metadata, words that are true before a release, the image, the notebook.

Wheel and source archive themselves are built, checked and tested by `.ci/run packages`.
"""

import contextlib
import io
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXTS = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.*")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "Dockerfile")),
]


def test_no_text_takes_the_package_from_an_index():
    """Before the first release it is not there: installing is from a checkout. A message adds to what is installed."""
    taken = re.compile(r"(?:install|add|download)\b[^\n`]*[\s'\"]procon-llm")
    for text in TEXTS:
        found = taken.findall(text.read_text(encoding="utf-8").replace("pip install 'procon-llm[…]'", ""))
        assert not found, f"{text}: {found}"


def test_the_index_page_has_no_link_that_is_dead_there(setup):
    page = setup["long_description"]
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links
    assert all(link.startswith("https://") for link in links)
    for path in re.findall(r"`([\w./-]+)` in the source|^\| .*?`(docs/[\w./-]+)`", page):
        assert (ROOT / (path[0] or path[1])).exists(), path
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = [path for words, path in re.findall(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", readme) if words != path]
    assert len(re.findall(r"` in the source\)", page)) == len(named)


# The image


def test_what_the_image_installs_is_declared(setup):
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (extras,) = re.findall(r'"/source\[([\w,-]+)\]"', text)
    assert set(extras.split(",")) <= setup["extras_require"].keys()
    (torch,) = re.findall(r'^ARG TORCH="(.+)"$', text, re.MULTILINE)
    assert torch in setup["install_requires"]
    (python,) = re.findall(r"^FROM python:([\d.]+)-slim$", text, re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in setup["classifiers"]
    assert re.search(r"^USER (?!root)(?:(?!\n(?:RUN|COPY) ).)*\Z", text, re.MULTILINE | re.DOTALL)


# The notebook


def cells(tag: str | None = None) -> list[str]:
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "commit it without outputs"
    return ["".join(cell["source"]) for cell in code if tag in (None, *cell["metadata"].get("tags", ()))]


def test_the_notebook_installs_from_the_checkout(setup):
    (install,) = cells("install")
    assert install == cells()[0]
    (extra,) = re.findall(r'^%pip install --quiet "\{source\}\[(\w+)\]"$', install, re.MULTILINE)
    assert extra in setup["extras_require"]
    assert not [cell for cell in cells()[1:] if re.search(r"^[%!]", cell, re.MULTILINE)]


def test_the_notebook_runs(place):
    """Its cells after the installation, in order, on a tiny model and a few samples."""
    _, parameters, *rest = cells()
    (marked,) = cells("parameters")
    assert parameters == marked
    names: dict = {}
    exec(parameters, names)
    assert {"model_name", "examples", "held_out", "prompts"} <= names.keys()
    names |= {"model_name": "model", "examples": 16, "held_out": 2, "prompts": 2}
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for number, cell in enumerate(rest, 2):
            exec(compile(cell, f"cell {number}", "exec"), names)
    assert [run.label for run in names["runs"]] == ["start", "plain", "ProCon"]
    assert names["trainer"].procon.did()["constrained_steps"] == 1
    assert Path("notebook/report.html").is_file()
    assert re.search(r"step 2 +cross-entropy [\d.]+ +penalty [\d.]+", shown.getvalue())
