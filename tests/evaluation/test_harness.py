"""lm-evaluation-harness through ``procon eval``: with a stand-in of its entry points, and with itself if installed."""

import importlib.machinery
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from procon.cli import main
from procon.errors import ProConError
from procon.evaluation import Evaluation, HarnessTasks, harness

RESULTS = {
    "count": {"alias": "count", "acc,none": np.float64(0.25), "acc_stderr,none": 0.1, "samples": 4},
    "words": {"exact_match,strict": 1.0, "exact_match_stderr,strict": "N/A", "bits,none": math.nan},
}


@pytest.fixture
def stand_in(monkeypatch) -> SimpleNamespace:
    """Modules by the harness's names, with what is called of them; what they were given."""
    seen = SimpleNamespace(managers=[], calls=[])

    class TaskManager:
        def __init__(self, include_defaults=True):
            seen.managers.append(include_defaults)

        def match_tasks(self, names):
            return [name for name in names if name in ("count", "words")]

    def simple_evaluate(model, **settings):
        seen.calls.append((model, settings))
        if isinstance(seen.calls, Exception):
            raise seen.calls
        return {"results": RESULTS, "versions": {"count": 1}, "n-shot": {"count": 0}, "samples": "not kept"}

    modules = {
        name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
    }
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval"].__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    modules["lm_eval.tasks"].TaskManager = TaskManager
    modules["lm_eval.models.huggingface"].HFLM = lambda **given: given
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harness, "version", lambda name: "0.0.stand-in")
    return seen


def test_tasks_are_run_on_the_model_as_it_is(stand_in):
    tasks = HarnessTasks("count, words")
    found = tasks.run("model", "tokenizer", batch_size=3, limit=4)
    ((model, settings),) = stand_in.calls
    assert model == {"pretrained": "model", "tokenizer": "tokenizer", "batch_size": 3}
    assert (settings["tasks"], settings["limit"], settings["log_samples"]) == (["count", "words"], 4, False)
    assert found["results"]["count"] == {"alias": "count", "acc,none": 0.25, "acc_stderr,none": 0.1, "samples": 4}
    assert found["results"]["words"]["bits,none"] is None
    assert (found["lm_eval"], found["tasks"], found["limit"]) == ("0.0.stand-in", ["count", "words"], 4)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert stand_in.managers == [True]


def test_files_alone_need_no_index(stand_in, tmp_path):
    (tmp_path / "own.yaml").write_text("task: own\n")
    HarnessTasks(str(tmp_path / "own.yaml"))
    HarnessTasks(f"count,{tmp_path / 'own.yaml'}")
    assert stand_in.managers == [False, True]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("count,none", "lm-evaluation-harness has no task 'none'"),
        ("none.yaml", "lm_eval task file 'none.yaml' does not exist"),
        (" , ", "lm_eval is ' , ': name tasks"),
    ],
)
def test_wrong_tasks(stand_in, names, message):
    with pytest.raises(ProConError, match=message):
        HarnessTasks(names)


def test_a_task_that_cannot_be_run(stand_in, monkeypatch):
    tasks = HarnessTasks("count")
    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", lambda *_, **__: 1 / 0)
    with pytest.raises(ProConError, match=r"lm_eval tasks 'count' cannot be run \(division by zero\): try them"):
        tasks.run("model", "tokenizer")


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        ProConError, match=r"by lm-evaluation-harness needs lm_eval, which is not installed: pip install .*\[lm-eval\]"
    ):
        HarnessTasks("count")


EVAL = ["eval", "--model", "model", "--dtype", "float32", "--output", "found.json", "--max_new_tokens", "2"]


@pytest.fixture
def short(place) -> Path:
    """A model, and one prompt of each kind."""
    for kind in ("malicious", "benign"):
        Path(f"{kind}.txt").write_text("count to one\n")
    return place


def test_on_the_command_line(short, stand_in, capsys):
    assert main([*EVAL, "--malicious", "malicious.txt", "--benign", "benign.txt", "--lm_eval", "count"]) == 0
    assert Evaluation.load("found.json").lm_eval["results"]["count"]["acc,none"] == 0.25
    printed = capsys.readouterr().out
    assert "count acc (none): 0.2500 +- 0.1000" in printed
    assert "words exact_match (strict): 1.0000\n" in printed


def test_a_task_that_fails_leaves_what_was_measured(short, stand_in, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", lambda *_, **__: 1 / 0)
    assert main([*EVAL, "--malicious", "malicious.txt", "--benign", "benign.txt", "--lm_eval", "count"]) == 2
    assert Evaluation.load("found.json").lm_eval is None


TASK = """\
task: made_up
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: answer
doc_to_choice: ["one", "two"]
metric_list:
  - metric: acc
"""


def test_the_harness_itself(short, capsys):
    """With a task of two documents in a file; nothing is fetched."""
    pytest.importorskip("lm_eval.models.huggingface", reason="lm-evaluation-harness is not installed: extra lm-eval")
    Path("docs.jsonl").write_text('{"prompt": "count to", "answer": 0}\n{"prompt": "count", "answer": 1}\n')
    Path("made_up.yaml").write_text(TASK.format(data=Path("docs.jsonl").absolute()))
    argv = [*EVAL, "--malicious", "malicious.txt", "--benign", "benign.txt", "--lm_eval", "made_up.yaml"]
    assert main(argv) == 0
    found = Evaluation.load("found.json").lm_eval
    assert found["results"]["made_up"]["acc,none"] in (0, 0.5, 1)
    assert "made_up acc (none): " in capsys.readouterr().out
