"""The versions that CI tests are those that the package asks for."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from procon.version import __version__

ROOT = Path(__file__).parents[2]


#: Extras of a framework that takes older versions than the others, and the file of those that were tested.
OLDER = {"llama-factory": "llama-factory.txt"}


@pytest.fixture(scope="module")
def extras(setup) -> dict[str, dict[str, Requirement]]:
    """Of setup.py; the core's requirements under no name."""
    texts = {"": setup["install_requires"], **setup["extras_require"]}
    return {
        extra: {requirement.name: requirement for requirement in map(Requirement, listed)}
        for extra, listed in texts.items()
    }


@pytest.fixture(scope="module")
def declared(extras) -> dict[str, Requirement]:
    """All requirements; one and the same of a package in each extra."""
    found: dict[str, Requirement] = {}
    for extra, requirements in extras.items():
        for name, requirement in {} if extra in OLDER else requirements.items():
            assert found.setdefault(name, requirement) == requirement, (extra, name)
    return found


def versions() -> list[tuple[str, ...]]:
    lines = (ROOT / "requirements" / "versions.txt").read_text().splitlines()
    return [tuple(line.split()) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("extra", OLDER)
def test_older_ranges_begin_at_what_was_tested(extras, extra):
    lines = (ROOT / "requirements" / OLDER[extra]).read_text().splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    floors = {
        name: next(item.version for item in requirement.specifier if item.operator == ">=")
        for name, requirement in extras[extra].items()
        if requirement != extras["cli"][name]
    }
    assert floors
    assert {name: Version(floor) for name, floor in floors.items()} == {name: Version(tested[name]) for name in floors}
    assert all(version in extras[extra][name].specifier for name, version in tested.items() if name in extras[extra])


def test_no_range_ends_at_a_release_that_is_about_to_come(declared):
    """A cap is at the next major version, which may break what is used; at the next minor it would bite every time."""
    caps = {name: [i.version for i in found.specifier if i.operator == "<"] for name, found in declared.items()}
    assert all(re.fullmatch(r"\d+", cap) for found in caps.values() for cap in found), caps
    assert caps["torch"] == ["3"]


@pytest.mark.parametrize(("package", "oldest", "newest"), versions())
def test_range_begins_at_the_oldest_and_has_the_newest(declared, package, oldest, newest):
    specifiers = declared[package].specifier
    (floor,) = [specifier.version for specifier in specifiers if specifier.operator == ">="]
    assert Version(floor) == Version(oldest)
    assert newest in specifiers


def test_what_compiles_for_the_gpu_that_is_played_is_supported(declared):
    lines = (ROOT / "requirements" / "compiled.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert tested.keys() == {"triton", "ttsem"}
    assert tested["triton"] in declared["triton"].specifier


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
