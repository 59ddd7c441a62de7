"""The runs of DPO and GRPO, on a tiny model."""

from dataclasses import replace

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from benchmarks.preferences import trial
from benchmarks.study import __main__ as command
from benchmarks.study.plan import Budget, Part, Size, load_budget
from benchmarks.study.record import load_runs

METHODS = tuple(load_budget("preferences").method(name) for name in ("start", "plain", "live", "probes_3"))
SMALL = Budget(
    tuple(Part(job, job, "Why?", METHODS, (job,), seeds=(0,)) for job in ("dpo", "grpo")),
    Size(train=8, test=4, prompts=4, extraction=8, pairs=4),
)


@pytest.fixture
def small(tiny_start, tmp_path, monkeypatch):
    """The command with a tiny start and few steps."""
    monkeypatch.setattr(command, "load_budget", lambda name: SMALL)
    monkeypatch.setattr(command, "open_start", lambda *_args, **_settings: tiny_start)
    for name, batch in (("dpo", 2), ("grpo", 4)):
        algorithm = trial.ALGORITHMS[name]
        few = {"max_steps": 2, "per_device_train_batch_size": batch, "warmup_steps": 0, "logging_steps": 1}
        if name == "grpo":
            few |= {"num_generations": 2, "max_completion_length": 6}
        monkeypatch.setitem(trial.ALGORITHMS, name, replace(algorithm, recipe={**algorithm.recipe, **few}))
    return tmp_path


def test_runs(small):
    file = small / "runs.jsonl.xz"
    assert command.main(["--budget", "preferences", "--runs", str(file)]) == 0
    found = {(cell.job, cell.method): run for cell, run in load_runs(file).items()}
    assert set(found) == {(job, method.name) for job in ("dpo", "grpo") for method in METHODS}
    for (job, name), run in found.items():
        assert run["made"]["trl"]
        assert len(run["replies"]["task"]) == 4
        assert all(0 <= reply["reward"] <= 1 for reply in run["replies"]["task"])
        if name == "start":
            continue
        assert run["steps"] == 2
        assert [row["step"] for row in run["history"]] == [1, 2]
        assert ("procon/penalty" in run["history"][-1]) == (name != "plain")
        assert all(trial.ALGORITHMS[job].logged[1] in row for row in run["history"])
        assert ("pairs" in run) == (job == "dpo")
