"""The versions that CI tests are those that the package asks for."""

import re
import runpy
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from procon.version import __version__

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def declared() -> dict[str, Requirement]:
    """Of setup.py, the extras' too."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    arguments = setup.call_args.kwargs
    texts = arguments["install_requires"] + [text for extra in arguments["extras_require"].values() for text in extra]
    return {requirement.name: requirement for requirement in map(Requirement, texts)}


def versions() -> list[tuple[str, ...]]:
    lines = (ROOT / "requirements" / "versions.txt").read_text().splitlines()
    return [tuple(line.split()) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize(("package", "oldest", "newest"), versions())
def test_range_begins_at_the_oldest_and_has_the_newest(declared, package, oldest, newest):
    specifiers = declared[package].specifier
    (floor,) = [specifier.version for specifier in specifiers if specifier.operator == ">="]
    assert Version(floor) == Version(oldest)
    assert newest in specifiers


def test_what_the_package_requires_is_tested(declared):
    untested = {"pytest", "pytest-benchmark", "pytest-xdist", "deepspeed", "lightning", "liger-kernel"}
    untested |= {"tensorboard", "wandb", "flash-attn", "lm-eval"}
    untested |= {"latex2mathml", "mkdocs-material", "mkdocstrings", "playwright"}
    untested |= {"coverage", "mutmut"}
    untested |= {"markdown", "scikit-learn", "scipy", "shtab"}
    untested |= {"codespell", "import-linter", "pre-commit", "pre-commit-hooks", "pyright", "ruff"}
    assert declared.keys() == {package for package, *_ in versions()} | untested


def test_no_floor_has_a_vulnerability_that_the_security_page_lists(declared):
    page = (ROOT / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| .+ \|$", page, re.MULTILINE)
    assert len(rows) > 5
    for package, fixed in rows:
        (floor,) = [item.version for item in declared[package].specifier if item.operator == ">="]
        assert Version(floor) >= Version(fixed), package


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r'^version: "?([^"\n]+)"?$', citation, re.MULTILINE)[1] == __version__
