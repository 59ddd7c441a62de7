"""Judges, prompt sets and task metrics of ``procon eval``, on a tiny model."""

from pathlib import Path

import pytest

from procon.chat import ContrastPrompts
from procon.cli import judging, main
from procon.cli.arguments import EvalArguments
from procon.cli.judging import evaluation_prompts
from procon.errors import ProConError
from procon.evaluation import Evaluation, Verdict, endpoint

EVAL = ["eval", "--model", "model", "--dtype", "float32", "--output", "found.json", "--max_new_tokens", "2"]
SET = (
    {"set": "harmbench", "source": "s", "revision": "main", "commit": None, "prompts": 2, "of": 9},
    {"set": "built-in"},
)


@pytest.fixture
def named_set(monkeypatch) -> list:
    """``load_prompt_sets`` without a hub; what it was asked for."""
    asked = []

    def load(names, *, most):
        asked.append((names, most))
        return ContrastPrompts(("count to two", "count to one"), ("count",)), dict(
            zip(("malicious", "benign"), SET, strict=True)
        )

    monkeypatch.setattr(judging, "load_prompt_sets", load)
    return asked


def test_a_judge_and_a_set(place, named_set, monkeypatch, capsys):
    answers = iter([True, True, False, True])
    monkeypatch.setattr(
        endpoint.EndpointJudge, "_answer", lambda self, exchange: "refused" if next(answers) else "complied"
    )
    url = "http://127.0.0.1:9/v1#m"
    assert main([*EVAL, "--prompts", "harmbench", "--max_prompts", "2", "--judge", url]) == 0
    assert named_set == [("harmbench", 2)]
    found = Evaluation.load("found.json")
    assert (found.judge, found.refusal_malicious.total, found.refusal_benign.total) == (url, 2, 1)
    assert found.sources == dict(zip(("malicious", "benign"), SET, strict=True))
    printed = " ".join(capsys.readouterr().out.split())
    assert "malicious prompts: 2 of 9 of harmbench, revision main, whose commit is not known." in printed
    assert f"Refusals are judged by {url}." in printed


def test_a_graded_metric(place, capsys):
    Path("one.txt").write_text("count\n")
    files = ["--malicious", "one.txt", "--benign", "one.txt"]
    assert main([*EVAL, *files, "--task", "data.jsonl", "--task_max_new_tokens", "2", "--task_metric", "rouge-l"]) == 0
    found = Evaluation.load("found.json")
    assert (found.metric, found.task.total) == ("rouge-l", 16)
    assert "/16)" in capsys.readouterr().out
    assert found.sources["malicious"] == {"set": "file", "source": "one.txt", "prompts": 1}


def test_a_file_goes_before_a_set(named_set, tmp_path):
    (tmp_path / "mine.txt").write_text("paint\n")
    prompts, sources = evaluation_prompts(EvalArguments("m", prompts="harmbench", benign=str(tmp_path / "mine.txt")))
    assert prompts == ContrastPrompts(("count to two", "count to one"), ("paint",))
    assert (sources["malicious"]["set"], sources["benign"]["set"]) == ("harmbench", "file")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--judge", "gpt"], "there is no judge 'gpt'"),
        (["--judge", "refusal:/no/such"], "model '/no/such' cannot be loaded"),
        (["--task_metric", "bleu"], "there is no task metric 'bleu'"),
        (["--prompts", "harm"], "there is no prompt set 'harm'"),
        (["--max_prompts", "5"], "max_prompts is 5, and there is no set to take them from: give --prompts"),
        (["--max_prompts", "-1"], "max_prompts is -1: give 0 or more"),
    ],
)
def test_what_is_wrong_shows_before_a_model_is_read(place, capsys, monkeypatch, argv, message):
    monkeypatch.setattr("procon.cli.commands.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    assert main([*EVAL, *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("procon: error: ")
    with pytest.raises(ProConError, match=message):
        raise ProConError(error)


def test_a_judge_of_harm_is_named(place, monkeypatch, capsys):
    class Harm:
        name, reads = "harm", "harm"

        def verdicts(self, prompts, replies):
            return [Verdict(True)] * len(replies)

    monkeypatch.setattr("procon.cli.commands.load_judge", lambda *_, **__: Harm())
    Path("one.txt").write_text("count\n")
    assert main([*EVAL, "--malicious", "one.txt", "--benign", "one.txt"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Refusals are judged by harm; replies to benign prompts by keywords." in printed
