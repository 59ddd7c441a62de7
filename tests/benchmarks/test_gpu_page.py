"""The page of GPU results, from results that are invented: no page of the project shows these numbers."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import tune
from benchmarks.gpu_page.folder import PARTS, read_folder
from benchmarks.gpu_page.page import write_page
from benchmarks.harness.interleaved import Samples

MACHINE = {
    "device": "INVENTED CARD",
    "card": {"driver": "000.00", "CUDA": "0.0"},
    "versions": {"python": "3.0.0", "torch": "0.0.0"},
}
UNIT = 8192 * 4096 * 2
UNITS = {"forward": 2, "backward": 3, "both": 5}
#: Microseconds; a clone takes 45.
NORMS = {
    "ours_constrained": {"forward": 50.0, "backward": 90.0, "both": 140.0},
    "ours": {"forward": 50.0, "backward": 80.0, "both": 130.0},
    "liger": {"forward": 52.0, "backward": 93.0, "both": 145.0},
}


def benchmark(group: str, contender: str, seconds: float, others: dict[str, float], **info) -> dict:
    """As pytest-benchmark writes it, with a spread of 2% to both sides."""
    ratios = {
        name: {"median": seconds / other, "low": 0.98 * seconds / other, "high": 1.02 * seconds / other}
        for name, other in others.items()
        if name != contender
    }
    return {
        "group": group,
        "extra_info": {"contender": contender, "baseline": next(iter(others)), "ratios": ratios, **info},
        "stats": {"median": seconds, "q1": 0.98 * seconds, "q3": 1.02 * seconds},
    }


def suite(benchmarks: list[dict], device: str = MACHINE["device"]) -> dict:
    return {
        "machine_info": {"procon": MACHINE | {"device": device}},
        "run": {"command": "pytest", "size": "full", "copy_bandwidth": 3e12},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "1999-12-31T00:00:00",
        "benchmarks": benchmarks,
    }


def tuned(file: Path) -> dict:
    """As tuning writes it: two sizes share an entry, and one kernel cannot run with the tile of the table."""
    choices = {"listed": tune.Choice(1, 256), "wide": tune.Choice(1, 128), "tall": tune.Choice(2, 512)}
    seconds = {
        4096: {"listed": [11.0, 11.2, 10.8], "wide": [10.0, 10.0, 10.0], "tall": [20.0, 20.0, 20.0]},
        3000: {"listed": [5.0, 5.0, 5.0], "wide": [5.5, 5.5, 5.5]},
    }
    results = [tune.found("forward", size, 4096, choices, Samples(times)) for size, times in seconds.items()]
    results.append(tune.found("norm_backward", 4096, 4096, choices, Samples({"tall": [1.0, 1.0, 1.0]})))
    tune.write(results, "sm_00", file)
    return json.loads(file.read_text()) | {"machine": MACHINE}


@pytest.fixture
def invented(tmp_path) -> Callable[..., Path]:
    """``invented(norms=..., step=...)``: a folder as gpu.sh leaves it, all parts but three whole."""

    def make(norms=NORMS, step=0.99, device=MACHINE["device"]) -> Path:
        clone = 45e-6
        clones = {"clone": clone, "add": 70e-6}
        norm = "norm 8192x4096-bfloat16-cold"
        steps = {"plain": 0.5, "fused": 0.5 * step}
        files = {
            "clone": suite(
                [
                    benchmark("clone 8192x4096-bfloat16-cold", name, seconds, clones, bytes=units * UNIT)
                    for (name, seconds), units in zip(clones.items(), (2, 3), strict=True)
                ]
            ),
            "rms_norm_penalty": suite(
                [
                    benchmark(
                        f"{norm} {which}",
                        name,
                        1e-6 * times[which],
                        {other: 1e-6 * theirs[which] for other, theirs in norms.items()},
                        bytes=units * UNIT,
                    )
                    for which, units in UNITS.items()
                    for name, times in norms.items()
                ],
                device,
            ),
            "training_step_7b": suite(
                [
                    benchmark(
                        "training step Llama-2-7B-lora-bfloat16-8x512",
                        name,
                        seconds,
                        steps,
                        tokens_per_second=4096 / seconds,
                        peak_memory_bytes=2**34,
                    )
                    for name, seconds in steps.items()
                ]
            ),
            "tune": tuned(tmp_path / "tune.json"),
        }
        for name in PARTS:
            record = {"status": 0, "seconds": 10, "limit": 60, "finished": True, "why": ""}
            if name == "anchors":
                record |= {"status": None, "finished": False, "why": "not started: no time was left"}
            if name == "sanitizer":
                record |= {"status": 9}
                (tmp_path / "sanitizer.log").write_text("...\n========= ERROR SUMMARY: 3 errors\n\n")
            if name != "anchor_sources":
                (tmp_path / f"{name}.part.json").write_text(json.dumps(record))
            if name in files:
                (tmp_path / f"{name}.json").write_text(json.dumps(files[name]))
        (tmp_path / "tests.xml").write_text(
            '<testsuites><testsuite><testcase classname="tests.ops" name="test_a[4096-1]" />'
            '<testcase classname="tests.ops" name="test_b[4096-1]"><failure message="assert 1 &lt; 0">long</failure>'
            '</testcase><testcase classname="" name="tests.sft"><error message="collection failure">Traceback\n'
            "E   ModuleNotFoundError: No module named 'datasets'</error></testcase></testsuite></testsuites>"
        )
        (tmp_path / "rms_norm_penalty.xml").write_text(
            '<testsuites><testsuite><testcase classname="b" name="test_norm[8192x4096-bfloat16-cold-forward-ours]" />'
            '<testcase classname="b" name="test_norm[8192x4096-bfloat16-cold-forward-quack]"><skipped '
            'message="quack-kernels is not installed">where</skipped></testcase></testsuite></testsuites>'
        )
        return tmp_path

    return make


def rows(page: str) -> dict[str, list[str]]:
    """Cells of all tables by the first of their line; the first line of a name counts."""
    found: dict[str, list[str]] = {}
    for line in page.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            first, *others = re.split(r" \| ", line.strip("| "))
            found.setdefault(first, others)
    return found


def test_figures_and_goals(invented, tmp_path):
    files = write_page(invented(), tmp_path / "page")
    assert [file.name for file in files] == ["gpu.md", "gpu-norm.svg", "gpu-step.svg"]
    page = files[0].read_text()
    for fact in ("INVENTED CARD", "driver 000.00", "CUDA 0.0", "torch 0.0.0", "1999-12-31", "commit 0123456789"):
        assert fact in page
    cells = rows(page)
    # 2 U in 50 us beside 2 U in 45 us; 3 U in 90 us.
    assert cells["norm with the constraint, forward: share of a clone's bandwidth"] == [
        "at least 90%",
        "90.0%<br>88.2 to 91.8",
        "8192 x 4096 bf16",
        "reached",
    ]
    assert cells["norm with the constraint, backward: share of a clone's bandwidth"][1:] == [
        "75.0%<br>73.5 to 76.5",
        "8192 x 4096 bf16",
        "missed",
    ]
    liger = "norm with the constraint over Liger's norm ({}), both passes"
    assert cells[liger.format("Triton")][1:] == ["0.966<br>0.946 to 0.985", "8192 x 4096 bf16", "reached"]
    assert cells[liger.format("CuTe DSL")][1:] == ["-", "-", "not measured"]
    step = "LoRA step of the 7B shape, constraint inside the norms, over the plain step"
    assert cells[step][1::2] == ["0.990<br>0.970 to 1.010", "reached"]
    assert cells["Liger, Triton"] == ["0.966<br>0.946 to 0.985"]
    assert cells["ours, without it"] == ["1.077<br>1.055 to 1.098"]
    listed = "1 row, 256 threads"
    assert cells["forward, D = 4096"] == [listed, "1 row, 128 threads", "1.100<br>1.080 to 1.120"]
    assert cells["forward, D = 3000"] == [listed, listed, "1.000<br>1.000 to 1.000"]
    assert cells["norm_backward, D = 4096"] == [listed, "2 rows, 512 threads", "the table's does not fit"]
    # One entry for both sizes: 10 + 5.5 is less than 11 + 5.
    assert '"forward": {"sm_00": {4096: (1, 128)}},' in page
    assert cells["tests"] == ["1", "2", "0"]
    assert "compute-sanitizer over the kernels of the suites: ERROR SUMMARY: 3 errors." in page


@pytest.mark.parametrize(("change", "step", "verdict"), [(1.0, 1.001, "missed"), (1.08, 1.0, "reached")])
def test_verdicts_follow_the_bounds(invented, tmp_path, change, step, verdict):
    slower = NORMS | {"ours_constrained": {which: change * time for which, time in NORMS["ours_constrained"].items()}}
    page = write_page(invented(slower, step), tmp_path)[0].read_text()
    lines = [line for line in page.splitlines() if "over the plain step |" in line]
    assert [line.split(" | ")[-1].strip(" |") for line in lines] == [verdict]
    (share,) = [line for line in page.splitlines() if "forward: share" in line]
    assert share.endswith("reached |" if change == 1 else "missed |")


def test_the_page_says_what_is_missing(invented, tmp_path):
    page = write_page(invented(), tmp_path)[0].read_text()
    missing = rows(page.partition("## What is missing")[2])
    assert missing["part `anchors`"] == ["not started: no time was left"]
    assert missing["part `anchor_sources`"] == ["not run"]
    assert missing["part `sanitizer`"] == ["ended with status 9: ERROR SUMMARY: 3 errors"]
    assert missing["`rms_norm_penalty`: quack"] == ["skipped: quack-kernels is not installed"]
    assert missing["`tests`: test_b[4096-1]"] == ["failed: assert 1 &lt; 0"]
    assert missing["`tests`: tests.sft"] == ["failed: ModuleNotFoundError: No module named 'datasets'"]
    assert "**Not measured:** part `host_overhead`: no results." in page
    assert "Not from a GPU" not in page


def test_a_norm_without_a_clone_has_no_share(invented, tmp_path):
    folder = invented()
    (folder / "clone.json").write_text('{"machine_info": ')  # its writing was cut short
    page = write_page(folder, tmp_path)[0].read_text()
    assert "**Not measured:** part `clone`: no results." in page
    assert rows(page)["8192 x 4096 bf16"] == ["-", "-", "1.077<br>1.055 to 1.098"]
    assert not (tmp_path / "assets" / "gpu-norm.svg").exists()


def test_results_of_two_cards_are_refused(invented):
    with pytest.raises(ValueError, match=r"several machines \(INVENTED CARD: clone, .*; ANOTHER: rms_norm_penalty\)"):
        read_folder(invented(device="ANOTHER"))


def test_a_folder_without_results_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the module reorders
    main = importlib.import_module("benchmarks.gpu_page.__main__").main
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {tmp_path} has no results of benchmarks/gpu.sh")
