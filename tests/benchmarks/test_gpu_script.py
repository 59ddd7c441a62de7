"""benchmarks/gpu.sh: its parts, its limits, and what a second command does. A shell script stands in for Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
TEXT = SCRIPT.read_text()
PARTS = re.search(r"^parts=\((.*?)\)", TEXT, re.MULTILINE | re.DOTALL)[1].split()

#: Writes the files that it is asked for and its command; fails for FAILING, and without a file for BARREN.
STAND_IN = """#!/usr/bin/env bash
if [ "$2" = -c ]; then case $3 in *torch*) echo True; exit ;; *) exit 1 ;; esac; fi
echo "$*" >> "$COMMANDS"
if [[ "$*" == *${BARREN:-nothing}* ]]; then echo "no such thing"; exit 3; fi
for argument; do
    case $before in --benchmark-json | --junitxml | --json) echo '{}' > "$argument" ;; esac
    before=$argument
done
[[ "$*" != *${FAILING:-nothing}* ]] || exit 1
"""

#: What the script finds on PATH: a card, a compute-sanitizer and a limit that nothing runs into.
PROGRAMS = {
    "nvidia-smi": 'echo "${CARD:-A card}"',
    "compute-sanitizer": 'exec "${@:3}"',
    "timeout": '"${@:4}"',
}


@pytest.fixture
def gpu(tmp_path) -> Callable[..., tuple[subprocess.CompletedProcess, list[str]]]:
    """``gpu(*parts, **environment)``: what the script did, and the names of the files and modules that it ran."""
    stand_in, commands = tmp_path / "python", tmp_path / "commands"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)

    def run(*parts: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        commands.write_text("")
        variables = {"PYTHON": str(stand_in), "COMMANDS": str(commands), "PROCON_GPU_SECONDS": "480"}
        path = f"{programs}:{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", str(SCRIPT), str(tmp_path / "folder"), *parts],
            env=os.environ | {"PATH": path} | variables | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return result, re.findall(r"bench_\w+|benchmarks\.tune|-m gpu", commands.read_text())

    return run


def record(folder: Path, part: str) -> dict:
    return json.loads((folder / "folder" / f"{part}.part.json").read_text())


IN_ORDER = [
    "-m gpu",
    "bench_clone",
    "bench_rms_norm_penalty",
    "bench_projection_penalty",
    "bench_training_step",
    "benchmarks.tune",
    "bench_host_overhead",
    "bench_projection_penalty",
    "bench_rms_norm_penalty",
    "bench_training_step",
    "bench_training_step",
    "bench_anchors",
    "bench_anchor_sources",
]


def test_the_most_telling_first_and_nothing_twice(gpu, tmp_path):
    result, ran = gpu()
    assert (result.returncode, ran) == (0, IN_ORDER), result.stdout + result.stderr
    assert {part for part in PARTS if record(tmp_path, part)["finished"]} == set(PARTS)
    result, ran = gpu()
    assert (result.returncode, ran) == (0, [])
    assert result.stdout.count("finished before, status 0") == len(PARTS)


def test_every_suite_is_a_part(gpu):
    suites = {file.stem for file in (ROOT / "benchmarks").glob("bench_*.py")}
    assert set(re.findall(r"bench_\w+", TEXT)) - {"bench_"} == suites
    result, _ = gpu("clones")
    assert result.returncode == 2
    assert result.stderr == f"there is no part 'clones'; parts: {' '.join(PARTS)}\n"


def test_little_time_is_kept_for_what_fits(gpu, tmp_path):
    result, ran = gpu(PROCON_GPU_SECONDS="25")
    assert result.returncode == 1
    assert ran == ["bench_clone", "bench_host_overhead"]
    assert record(tmp_path, "tests")["why"] == "not started: no time was left"
    left = [part for part in PARTS if part not in ("clone", "host_overhead")]
    assert result.stdout.splitlines()[-1] == f"left, give the command again: {' '.join(left)}"


def test_failures(gpu, tmp_path):
    result, _ = gpu("tests", "clone", FAILING="-m gpu", BARREN="bench_clone")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-3:] == [
        "failed: tests (1)",
        "failed: clone (3)",
        "left, give the command again: clone",
    ]
    # Failed tests are a result, which the next command still reports; where nothing came of a part, it runs again.
    result, ran = gpu("tests", "clone")
    assert ran == ["bench_clone"]
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "failed: tests (1)"


def test_another_card_needs_another_folder(gpu):
    gpu("clone")
    result, ran = gpu("tune", CARD="Another card")
    assert (result.returncode, ran) == (2, [])
    assert re.search(r"has results of: A card, kernels \d+; here are: Another card, kernels \d+\. Give", result.stderr)
