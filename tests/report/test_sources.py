"""What can be reported is told apart by its content, and anything else is refused in one line that names it."""

import json
import re
from pathlib import Path

import pytest

from procon.chat import builtin_prompts
from procon.errors import ProConError
from procon.evaluation import Evaluation, Rate
from procon.method.record import write_record
from procon.report import Run, print_table, read_source, read_sources, write_html

STUDY = Path(__file__).parents[2] / "benchmarks" / "study" / "runs" / "table" / "arithmetic"


@pytest.fixture
def evaluation() -> Evaluation:
    replies = [
        {"kind": kind, "prompt": f"{kind} {number}", "reply": "no", "refused": kind != "benign", "degenerate": False}
        for kind in ("malicious", "benign")
        for number in range(4)
    ]
    return Evaluation("tuned", Rate(4, 4), Rate(0, 4), Rate(0, 8), None, replies)


@pytest.fixture
def output(tmp_path) -> Path:
    """A training output folder."""
    folder = tmp_path / "out"
    history = [
        {"step": 2, "loss": 2.0, "procon/penalty": 0.5, "procon/alpha": 0.2},
        {"step": 4, "procon/drift_cos": 0.9, "procon/drift_cos_block/01": 0.8, "procon/drift_cos_block/02": 1.0},
        {"step": 4, "loss": 1.0, "procon/penalty": 0.7, "procon/alpha": 0.2},
        {"step": 4, "train_runtime": 9.0, "step_seconds": 4.0, "step_cpu_seconds": 1.5},
    ]
    write_record(folder, {"schedule": "0.2", "run": {"seed": 3}, "arguments": {"learning_rate": 1e-3}, "did": {}})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def test_a_run_file(tmp_path, evaluation):
    run = Run("mine", evaluation, [1.0], 2.0)
    source = read_source(run.save(tmp_path / "r.json"))
    assert (source.kind, source.run) == ("run", run)


def test_an_evaluation_and_a_drift(tmp_path, evaluation):
    source = read_source(evaluation.save(tmp_path / "e.json"))
    assert (source.kind, source.run.label, source.run.evaluation) == ("evaluation", "tuned", evaluation)
    (tmp_path / "d.json").write_text(json.dumps({"mean_cosine": 0.5, "cosine": [None, 0.5], "malicious_shift": []}))
    drift = read_source(tmp_path / "d.json")
    assert (drift.kind, drift.run.label, drift.run.mean_cosine, drift.run.evaluation) == ("drift", "d", 0.5, None)


def test_a_training_folder(output, evaluation):
    source = read_source(output)
    assert (source.kind, source.run.label, source.run.evaluation) == ("training", "out", None)
    assert (source.run.mean_cosine, source.run.seconds_per_step) == (pytest.approx(0.9), 1.5)
    assert source.run.series("loss") == ([2, 4], [2.0, 1.0])
    assert source.settings == {"schedule": "0.2", "seed": 3, "learning_rate": 1e-3}
    evaluation.save(output / "eval.json")
    assert read_source(output).run.evaluation == evaluation
    evaluation.save(output / "second.json")
    with pytest.raises(ProConError, match=r"holds 2 evaluations \(eval.json, second.json\): give one of the files"):
        read_source(output)


def test_a_training_folder_with_its_log_alone(output):
    before = read_source(output).run.history
    (output / "trainer_state.json").unlink()
    (output / "log.jsonl").write_text(
        "".join(json.dumps({f"train/{k}": v for k, v in row.items()}) + "\n" for row in before)
    )
    assert read_source(output).run.history == before
    (output / "log.jsonl").write_text("[1]\n")
    with pytest.raises(ProConError, match=r"log '.*log\.jsonl' is damaged or holds something else"):
        read_source(output)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("procon.json", {"run": None}, "record file .* is damaged"),
        ("procon.json", {"arguments": []}, "record file .* is damaged"),
        ("procon.json", [], "record file .* is damaged"),
        ("trainer_state.json", {"log_history": [1]}, "training state file .* is damaged"),
        ("trainer_state.json", {"log_history": [{"loss": "nan"}]}, "'nan' is no number"),
        ("trainer_state.json", {"log_history": [{"loss": True}]}, "True is no number"),
        ("trainer_state.json", {"log_history": [{"loss": 10**400}]}, "training state file .* is damaged"),
        ("trainer_state.json", {"log_history": [{"step_seconds": "1"}]}, "'1' is no number"),
        ("trainer_state.json", {"log_history": [{"procon/drift_cos_block/x": 1}]}, "training state file .* is damaged"),
        ("trainer_state.json", {"log_history": [{"procon/drift_cos_block/99999999": 1}]}, "block 99999999"),
        ("log.jsonl", {"train/loss": "nan"}, r"log '.*log\.jsonl' is damaged .*'nan' is no number"),
        ("log.jsonl", {"train/step": 1.5}, "step is 1.5, no whole number"),
    ],
)
def test_a_damaged_training_folder(name, content, message, output):
    if name == "log.jsonl":
        (output / "trainer_state.json").unlink()
    (output / name).write_text(json.dumps(content))
    (output / "other.json").write_text("[" * 100_000)
    with pytest.raises(ProConError, match=message):
        read_source(output)


def test_a_run_of_the_study():
    source = read_source(STUDY / "procon_s" / "seed-0.json")
    data = json.loads((STUDY / "procon_s" / "seed-0.json").read_text())
    evaluation = source.run.evaluation
    assert source.run.label == "ProCon_s, arithmetic, seed 0"
    for kind, rate in {"malicious": evaluation.refusal_malicious, "benign": evaluation.refusal_benign}.items():
        assert rate == Rate.of(reply["refused"] for reply in data["replies"][kind])
    assert evaluation.task == Rate.of(reply["correct"] for reply in data["replies"]["task"])
    shown = [reply["prompt"] for reply in evaluation.replies if reply["kind"] == "malicious"]
    assert shown == list(builtin_prompts("held_out").malicious)
    assert source.settings["procon_schedule"] == "procon_s:0.2"
    assert source.run.seconds_per_step == data["train_seconds"] / data["steps"]


def test_a_page_of_three_runs_of_the_study(tmp_path, capsys):
    paths = [STUDY / method / "seed-0.json" for method in ("start", "plain", "procon_s")]
    runs = [source.run for source in read_sources(paths)]
    page = write_html(runs, tmp_path / "r.html", title="Three").read_text()
    print_table(runs)
    printed = capsys.readouterr().out
    for run in runs:
        assert str(run.evaluation.refusal_malicious) in page
        assert str(run.evaluation.refusal_malicious) in printed
    assert "should be </b>" not in page  # of a task whose answers are not in the file


def test_pages_of_runs_without_evaluations(output, tmp_path, capsys):
    run = read_source(output).run
    page = write_html([run], tmp_path / "r.html", title="One").read_text()
    assert "Drift by block" in page
    assert "Refusal and task" not in page
    assert "Sample replies" not in page
    print_table([run])
    assert "0.900" in capsys.readouterr().out
    assert Run.from_dict(run.to_dict()).evaluation is None


def test_runs_of_one_label_have_their_files_behind_it(tmp_path, evaluation):
    paths = [evaluation.save(tmp_path / name) for name in ("a.json", "b.json")]
    assert [source.run.label for source in read_sources(paths)] == [f"tuned ({path})" for path in paths]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run 'x.json' does not exist: give a run file"),
        (b"\xff\xfe", "run file 'x.json' is damaged or holds something else"),
        (b"[1]", r"run file 'x.json' .*\(give a run file, a file of 'procon eval --output'"),
        (b'{"a": 1}', r"run file 'x.json' .*\(give a run file"),
        (b'{"mean_cosine": 1, "cosine": ["x"]}', "run file 'x.json' .*'x' is no number"),
        (b'{"setting": 1, "method": {}, "seed": 1, "replies": {}}', "run file 'x.json' .*no key"),
        (b'{"label": "x", "refusal_malicious": 1, "refusal_benign": 1, "replies": []}', "run file 'x.json'"),
    ],
)
def test_what_is_no_run(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("x.json").write_bytes(content)
    with pytest.raises(ProConError, match=message):
        read_source("x.json")
    Path("empty").mkdir()
    with pytest.raises(ProConError, match=re.escape("run 'empty' is a folder without procon.json, trainer_state.json")):
        read_source("empty")
