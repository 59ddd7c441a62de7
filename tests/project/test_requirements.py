"""The versions that CI tests are those that the package asks for."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from procon import ProCon
from procon.version import TESTED, __version__, say_untested

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


#: Versions by package.
OLDEST, NEWEST = (
    dict(re.findall(r"^([\w-]+)[<=]=(\S+)$", (ROOT / "requirements" / f"{name}.txt").read_text(), re.MULTILINE))
    for name in ("oldest", "newest")
)


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


@pytest.mark.parametrize("package", OLDEST)
def test_range_begins_at_the_oldest_and_has_the_newest(declared, package):
    specifiers = declared[package].specifier
    (floor,) = [specifier.version for specifier in specifiers if specifier.operator == ">="]
    assert Version(floor) == Version(OLDEST[package])
    assert NEWEST[package] in specifiers


def test_the_newest_versions_are_one_list():
    """What the README installs, and what a line warns beyond; no range leaves it out."""
    assert {name: NEWEST[name] for name in TESTED} == TESTED


def test_what_is_declared_is_held_to_what_was_tested(declared):
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in declared} - {"flash-attn"}
    assert names <= NEWEST.keys()


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ("5.99.1", "transformers 5.99.1 (tested: up to {tested})"),
        ("6.0.0.dev0", "transformers 6.0.0.dev0 (tested: up to {tested})"),
        ("{tested}", None),
        ("{tested}+cu130", None),
        ("5.16.1", None),
    ],
)
def test_a_newer_version_is_one_line_once(monkeypatch, caplog, installed, said):
    tested = TESTED["transformers"]
    monkeypatch.setattr(
        "procon.version.version", lambda name: installed.format(tested=tested) if name == "transformers" else "0"
    )
    say_untested.cache_clear()
    for _ in range(2):
        say_untested()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (said is not None)
    assert said is None or said.format(tested=tested) in lines[0]
    assert said is None or "torch" not in lines[0]


def test_training_says_it(tiny_model, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("procon.version.version", lambda name: "99.0")
    say_untested.cache_clear()
    ProCon(tiny_model(), tokenizer, progress=False)
    ProCon(tiny_model(), tokenizer, progress=False)
    assert caplog.text.count("newer than this version of ProCon was tested with") == 1


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
