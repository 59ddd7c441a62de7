"""The harness finds a ratio that is known, every suite runs in a small size, and its results can be drawn."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks import draw
from benchmarks.harness import agreement, interleaved

ROOT = Path(__file__).parents[2]

#: What each suite promises in addition to contender, baseline and ratios.
FIELDS = {
    "bench_clone": {"bytes", "bytes_formula", "flops", "gigabytes_per_second", "percent_of_copy"},
    "bench_projection_penalty": {"bytes", "bytes_formula", "flops", "gigabytes_per_second", "percent_of_copy"},
    "bench_rms_norm_penalty": {"bytes", "bytes_formula", "flops", "gigabytes_per_second", "percent_of_copy"},
    "bench_training_step": {"tokens_per_second"},
    "bench_host_overhead": set(),
    "bench_anchors": set(),
    "bench_anchor_sources": {"tokens_per_second"},
}


def host_clock(call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def test_known_ratio():
    contenders = {"short": partial(time.sleep, 0.002), "long": partial(time.sleep, 0.003)}
    samples = interleaved.interleave(contenders, host_clock, rounds=15)
    ratio = samples.ratio("long", "short")
    # A sleep takes at least its time, and on a busy machine up to a few tenths of a millisecond more.
    assert 1.2 < ratio.median < 1.6
    assert ratio.low <= ratio.median <= ratio.high
    assert samples.ratio("short", "short") == (1, 1, 1)


def test_every_contender_once_per_round_in_rotating_order():
    order = []
    contenders = {name: partial(order.append, name) for name in "abc"}
    samples = interleaved.interleave(contenders, host_clock, rounds=3, warmup=1)
    assert "".join(order[-9:]) == "abcbcacab"
    assert {name: len(seconds) for name, seconds in samples.seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_interval_covers_the_truth():
    """Pairs whose ratio is 1.02 but for noise: of 200 intervals for 95%, some 190 contain it."""
    import numpy as np

    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        base = random.uniform(1, 2, 16)
        samples = interleaved.Samples({"base": list(base), "other": list(base * 1.02 * random.normal(1, 0.01, 16))})
        ratio = samples.ratio("other", "base")
        covered += ratio.low <= 1.02 <= ratio.high
    assert covered >= 180


def test_disagreement_is_named():
    import torch

    check = agreement.check_agreement
    check({"one": [torch.ones(3)], "two": [torch.full((3,), 1.0001)]}, 1e-3)
    with pytest.raises(AssertionError, match="result 0 of two"):
        check({"one": [torch.ones(3)], "two": [torch.full((3,), 1.1)]}, 1e-3)
    with pytest.raises(AssertionError, match="nan away"):
        check({"one": [torch.ones(3)], "two": [torch.full((3,), torch.nan)]}, 1e-3)


def test_a_library_that_fails_takes_no_other_along(monkeypatch):
    import torch

    from benchmarks import bench_rms_norm_penalty as suite
    from benchmarks.harness.passes import Shape

    def raises(hidden, weight, eps):
        raise RuntimeError("no kernel image\nis available")

    peers = {
        "liger": lambda hidden, weight, eps: torch.nn.functional.rms_norm(hidden, weight.shape, weight, eps),
        "quack": raises,
        "cudnn": lambda hidden, weight, eps: 1.1 * hidden * weight,
    }
    monkeypatch.setattr(
        suite, "LEFT_OUT", dict.fromkeys(("compiled", "compiled_constrained", "liger_cute"), "too long")
    )
    monkeypatch.setattr(suite, "norm_of", peers.get)
    monkeypatch.setattr(suite, "time_passes", lambda functions, *_: list(functions))
    timed, failures = suite._measure.__wrapped__(Shape(16, 64, torch.float32, "hot"))
    assert timed == ["transformers", "liger", "torch", "ours", "separate", "ours_constrained"]
    assert failures["quack"] == "failed: RuntimeError: no kernel image"
    assert failures["cudnn"].endswith("away from that of transformers")


@pytest.mark.slow
def test_every_suite_and_its_pictures(tmp_path, capsys):
    suites = {file.stem for file in (ROOT / "benchmarks").glob("bench_*.py")}
    assert suites == set(FIELDS)
    results = tmp_path / "results.json"
    # Not from the folder itself, where kernels/ would pass for Hugging Face's package of that name.
    command = [sys.executable, "-P", "-m", "pytest", "benchmarks", "--benchmark-only", "--benchmark-json", str(results)]
    # Nor as a worker of this run, where pytest-benchmark would switch itself off.
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    environment = ours | {"PROCON_BENCHMARK_SIZE": "smoke"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "times plain, 95% [" in run.stdout

    content = json.loads(results.read_text())
    assert {"device", "versions"} <= set(content["machine_info"]["procon"])
    assert {"command", "size", "copy_bandwidth", "freed_memory_kept"} == set(content["run"])
    seen = set()
    for benchmark in content["benchmarks"]:
        suite = Path(benchmark["fullname"].partition("::")[0]).stem
        seen.add(suite)
        info = benchmark["extra_info"]
        assert {"contender", "baseline", "ratios"} | FIELDS[suite] <= set(info)
        for ratio in info["ratios"].values():
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert benchmark["stats"]["rounds"] == len(benchmark["stats"]["data"]) >= 3
    assert seen == suites

    draw.main([str(results), "--out", str(tmp_path)])
    table = capsys.readouterr().out
    groups = {benchmark["group"] for benchmark in content["benchmarks"]}
    assert len(list(tmp_path.glob("*.png"))) == len(groups)
    assert all(f"| {group} | median |" in table for group in groups)
    assert content["machine_info"]["procon"]["device"] in table
