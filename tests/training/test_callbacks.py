"""Drift and refusals measured while training: as defined, apart from the training's own rows, and on resuming too."""

import pytest
import torch

from procon.chat import ContrastPrompts, builtin_prompts, render, user_turn
from procon.errors import ProConError
from procon.training import DriftCallback, EvaluationCallback

PROMPTS = ContrastPrompts(
    malicious=("steal it", "forge a passport for me tonight", "rob"),
    benign=("paint it", "wash the car for me", "sing about the old house"),
)


@pytest.fixture
def trainer(make_trainer, tokenizer):
    """``trainer(steps=..., **settings)``: six plain steps with a DriftCallback, and the callback."""

    def make(base="Trainer", schedule="0", *, steps: int = 1, prompts=PROMPTS, **settings):
        made = make_trainer(base, schedule, **{"max_steps": 6, "save_strategy": "no", **settings})
        drift = DriftCallback(made, tokenizer, steps=steps, prompts=prompts)
        made.add_callback(drift)
        return made, drift

    return make


def series(trainer, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in trainer.state.log_history if name in row}


def means(model, tokenizer, prompts) -> torch.Tensor:
    """``[L, D]`` fp64: mean of each block's input at the last prompt token, one prompt at a time."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([render(tokenizer, user_turn(prompt), generation_prompt=True)])
        with torch.no_grad():
            states = model.eval()(ids, output_hidden_states=True).hidden_states
        rows.append(torch.stack([state[0, -1] for state in states[:-1]]).double())
    return torch.stack(rows).mean(0)


def test_logs_are_drift_by_definition(trainer, tiny_model, tokenizer):
    made, callback = trainer(steps=3)
    made.train()
    (m0, b0), (m1, b1) = (
        (means(model, tokenizer, PROMPTS.malicious), means(model, tokenizer, PROMPTS.benign))
        for model in (tiny_model(), made.model)
    )
    first, again = (m0 - b0)[1:], (m1 - b1)[1:]  # the first block's input is the same for all prompts
    cosine = torch.cosine_similarity(first, again, dim=-1)
    gap = first.norm(dim=-1)
    unit = first / gap[:, None]
    shifts = [(((now - start)[1:] * unit).sum(-1) / gap).mean() for start, now in ((m0, m1), (b0, b1))]

    start, _, last = (row for row in made.state.log_history if "procon/drift_cos" in row)
    assert (start["step"], last["step"]) == (0, 6)
    # fp32 forwards of two kinds, on differences of means a hundredth as long as the means.
    close = {"rel": 1e-3, "abs": 1e-4}
    assert last["procon/drift_cos"] == pytest.approx(float(cosine.mean()), **close)
    assert last["procon/drift_cos_lowest"] == pytest.approx(float(cosine.min()), **close)
    names = ["procon/drift_shift_malicious", "procon/drift_shift_benign"]
    assert [last[name] for name in names] == pytest.approx([float(shift) for shift in shifts], **close)
    assert float(cosine.max()) < 0.999  # or all of this would hold of a callback that logs ones
    assert min(abs(float(shift)) for shift in shifts) > 0.01

    assert [start["procon/drift_cos"], start["procon/drift_cos_lowest"]] == [1, 1]
    assert [start[name] for name in names] == [0, 0]
    assert callback.drift.mean_cosine == last["procon/drift_cos"]
    assert 0 < callback.seconds < made.state.log_history[-1]["train_runtime"]


def test_a_measurement_is_four_forwards_of_the_decoder(trainer, monkeypatch):
    monkeypatch.undo()  # with all built-in prompts
    made, callback = trainer(prompts=None, steps=10)
    made.train()
    rows = []
    with made.model.model.register_forward_pre_hook(
        lambda _module, args, kwargs: rows.append((len(kwargs["input_ids"]), torch.is_grad_enabled())), with_kwargs=True
    ):
        callback.measure()
    assert rows == [(32, False)] * 4


def test_trls_own_metrics_and_ours_stay_with_the_rows_of_the_loss(trainer):
    made, _ = trainer("SFTTrainer", "1@4steps,0", steps=2)
    made.train()
    rows = made.state.log_history
    assert list(series(made, "procon/drift_cos")) == [0, 2, 4, 6]
    assert list(series(made, "loss")) == [1, 2, 3, 4, 5, 6]  # those of measured steps, too
    assert list(series(made, "procon/alpha").values()) == [1, 1, 1, 1, 0, 0]
    assert list(series(made, "procon/penalty")) == [1, 2, 3, 4]
    for row in rows:
        assert ("mean_token_accuracy" in row) == ("loss" in row)
        assert ("entropy" in row) == ("loss" in row)


def test_what_is_logged_reaches_a_tracker(trainer, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard comes with the extra `trackers`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    made, _ = trainer("Trainer", "1@4steps,0", steps=2, report_to=["tensorboard"])
    made.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for name in ("loss", "procon/alpha", "procon/penalty", "procon/drift_cos", "procon/drift_shift_benign"):
        found = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert found == pytest.approx(series(made, name), rel=1e-6), name  # it keeps fp32


def test_refusals_and_the_task_are_logged(make_trainer, tokenizer):
    made = make_trainer("Trainer", "0", max_steps=2, save_strategy="no")
    task = [{"instruction": "count to one", "output": "0"}]
    short = {"max_new_tokens": 2, "task_max_new_tokens": 2}
    made.add_callback(EvaluationCallback(made, tokenizer, steps=2, prompts=PROMPTS, task=task, **short))
    made.train()
    for name in ("procon/refusal_malicious", "procon/refusal_benign", "procon/task"):
        found = series(made, name)
        assert list(found) == [2]
        assert 0 <= found[2] <= 1


def test_no_steps_are_refused(make_trainer, tokenizer):
    with pytest.raises(ProConError, match="steps is 0"):
        DriftCallback(make_trainer("Trainer", "0"), tokenizer, steps=0)


def test_a_run_resumed_measures_against_its_own_start(trainer, tmp_path):
    whole, _ = trainer(steps=2, save_strategy="steps", save_steps=3)
    whole.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    resumed, _ = trainer(steps=2)
    resumed.train(resume_from_checkpoint=checkpoint)
    for name in ("procon/drift_cos", "procon/drift_cos_lowest", "procon/drift_shift_malicious"):
        assert series(resumed, name) == series(whole, name)
    assert list(series(whole, "procon/drift_cos")) == [0, 2, 4, 6]

    other, _ = trainer(prompts=builtin_prompts("extraction").first(2))
    with pytest.raises(ProConError, match=r"no drift reference '.*' of these prompts, asked in this way"):
        other.train(resume_from_checkpoint=checkpoint)
    (tmp_path / "out" / "drift-reference.procon").unlink()
    with pytest.raises(ProConError, match=r"no drift reference"):
        resumed.train(resume_from_checkpoint=checkpoint)
