"""Drift measured while training: block by block as defined, shown in few words, and a gate that warns or stops."""

import json
import logging
import re

import pytest
import torch
from transformers import PrinterCallback, TrainerCallback

from procon.chat import ContrastPrompts, builtin_prompts, render, user_turn
from procon.errors import ProConError
from procon.evaluation import Drift
from procon.method import ranks
from procon.training import DriftCallback, callbacks
from procon.training.console import log_with_details
from procon.training.drift_gate import DriftGate

PROMPTS = ContrastPrompts(
    malicious=("steal it", "forge a passport for me tonight", "rob"),
    benign=("paint it", "wash the car for me", "sing about the old house"),
)
BY_BLOCK = "procon/drift_cos_block/"


@pytest.fixture
def trainer(make_trainer, tokenizer):
    """``trainer(steps=..., **settings)``: six plain steps with a DriftCallback, and the callback."""

    def make(*, steps: int = 1, prompts=PROMPTS, gate=None, gate_action="warn", callbacks=(), **settings):
        made = make_trainer("Trainer", "0", **{"max_steps": 6, "save_strategy": "no", **settings})
        drift = DriftCallback(made, tokenizer, steps=steps, prompts=prompts, gate=gate, gate_action=gate_action)
        for callback in (drift, *callbacks):
            made.add_callback(callback)
        return made, drift

    return make


def drift_of(*cosines: float) -> Drift:
    """A drift with these cosines, behind a first block without a direction."""
    cosine = torch.tensor([torch.nan, *cosines])
    return Drift(cosine=cosine, malicious_shift=cosine - 1, benign_shift=cosine * 0)


@pytest.fixture
def planned(monkeypatch):
    """``planned(drifts)``: what measurements find, one after the other."""

    def plan(drifts: list[Drift]) -> None:
        left = iter(drifts)
        monkeypatch.setattr(callbacks, "measure_drift", lambda *args, **kwargs: next(left))

    return plan


def series(trainer, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in trainer.state.log_history if name in row}


# What is logged


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
    assert [name for name in last if name.startswith(BY_BLOCK)] == [BY_BLOCK + "01", BY_BLOCK + "02"]
    # fp32 forwards of two kinds, on differences of means a hundredth as long as the means.
    close = {"rel": 1e-3, "abs": 1e-4}
    assert [last[BY_BLOCK + "01"], last[BY_BLOCK + "02"]] == pytest.approx(cosine.tolist(), **close)
    assert last["procon/drift_cos"] == pytest.approx(float(cosine.mean()), **close)
    names = ["procon/drift_shift_malicious", "procon/drift_shift_benign"]
    assert [last[name] for name in names] == pytest.approx([float(shift) for shift in shifts], **close)
    assert float(cosine.max()) < 0.999  # or all of this would hold of a callback that logs ones
    assert min(abs(float(shift)) for shift in shifts) > 0.01

    assert [start[BY_BLOCK + "01"], start[BY_BLOCK + "02"], start["procon/drift_cos"]] == [1, 1, 1]
    assert [start[name] for name in names] == [0, 0]
    assert callback.drift.mean_cosine == last["procon/drift_cos"]


def test_names_of_blocks_sort(planned, trainer):
    cosines = torch.linspace(-1, 1, 119).tolist()
    planned([drift_of(*cosines)])
    made, _ = trainer(max_steps=1)
    made.train()
    found = {name: value for name, value in made.state.log_history[1].items() if name.startswith(BY_BLOCK)}
    assert [found[name] for name in sorted(found)] == pytest.approx(cosines)
    assert (min(found), max(found)) == (BY_BLOCK + "001", BY_BLOCK + "119")


def test_a_measurement_is_four_forwards_of_the_decoder(trainer, tiny_model):
    made, callback = trainer(prompts=None, steps=10)
    made.train()
    rows = []
    with made.model.model.register_forward_pre_hook(
        lambda _module, args, kwargs: rows.append((len(kwargs["input_ids"]), torch.is_grad_enabled())), with_kwargs=True
    ):
        callback.measure()
    assert rows == [(32, False)] * 4


# What is shown


class Seen(TrainerCallback):
    """A tracker, or with ``training_bar`` a console, that keeps what it is handed."""

    def __init__(self, **attributes):
        self.logs = []
        vars(self).update(attributes)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_the_console_shows_all_but_single_blocks(trainer):
    tracker, console = Seen(), Seen(training_bar=None)  # as TRL's RichProgressCallback has one
    made, _ = trainer(steps=3, callbacks=[tracker, console])
    made.train()
    assert len(tracker.logs) == len(console.logs) == len(made.state.log_history)
    for whole, short in zip(tracker.logs, console.logs, strict=True):
        assert short == {name: value for name, value in whole.items() if not name.startswith(BY_BLOCK)}
    assert sum(BY_BLOCK + "01" in logs for logs in tracker.logs) == 3
    assert sum("procon/drift_cos" in logs for logs in console.logs) == 3


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_printed_lines_and_the_progress_bar(trainer, planned, capsys, disable_tqdm):
    planned([drift_of(0.75, 0.5), drift_of(0.25, 0.5)])
    trainer(max_steps=2, disable_tqdm=disable_tqdm)[0].train()
    shown = capsys.readouterr()
    printed = re.findall(r"'procon/drift_cos': '([\d.]+)'", shown.out)
    assert printed == ["1", "0.625", "0.375"]
    assert "'procon/drift_shift_malicious': '-0.375'" in shown.out
    assert "'loss'" in shown.out
    assert "drift_cos_block" not in shown.out + shown.err
    beside = re.findall(r"drift cos ([\d.]+), block (\d): ([\d.]+)", shown.err)
    if disable_tqdm:
        assert beside == []
    else:
        assert list(dict.fromkeys(beside)) == [
            ("1.000", "1", "1.000"),
            ("0.625", "2", "0.500"),
            ("0.375", "1", "0.250"),
        ]


def test_a_console_that_fails_leaves_the_others_in_place(trainer):
    made, _ = trainer()
    before = list(made.callback_handler.callbacks)

    class Broken(PrinterCallback):
        def on_log(self, *args, **kwargs):
            raise OSError("no terminal")

    made.add_callback(Broken)
    with pytest.raises(OSError, match="no terminal"):
        log_with_details(made, {"a": 1.0}, {"b": 2.0})
    assert made.callback_handler.callbacks[:-1] == before


# The gate

#: Means 0.95, 0.8, 0.7, 0.9, 0.85 and 0.95: below 0.9 at steps 2, 3 and 5.
PLAN = [
    drift_of(0.95, 0.95),
    drift_of(0.9, 0.7),
    drift_of(0.5, 0.9),
    drift_of(0.90625, 0.90625),
    drift_of(0.8, 0.9),
    drift_of(0.95, 0.95),
]


def gate_lines(caplog) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING and "gate" in record.msg
    ]


def test_each_crossing_is_told_once(trainer, planned, caplog, tmp_path):
    planned(PLAN)
    made, _ = trainer(gate=0.9)
    made.train()
    assert made.state.global_step == 6
    assert series(made, "procon/drift_gate") == {2: 1.0, 5: 1.0}
    second, fifth = gate_lines(caplog)
    for part in ("step 2:", "is 0.800, below the gate of 0.9", "lowest: 0.700 at block 2", "a larger alpha"):
        assert part in second
    assert "step 5:" in fifth
    assert "lowest: 0.800 at block 1" in fifth
    assert "stops" not in second + fifth
    assert "\n" not in second
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("save_strategy", ["no", "epoch", "steps"])
def test_stop_ends_training_with_a_checkpoint(trainer, planned, caplog, tmp_path, save_strategy):
    planned(PLAN)
    made, _ = trainer(gate=0.9, gate_action="stop", save_strategy=save_strategy, save_steps=10)
    made.train()
    assert made.state.global_step == 2
    assert series(made, "procon/drift_gate") == {2: 1.0}
    assert sorted(series(made, "loss")) == [1, 2]
    (line,) = gate_lines(caplog)
    assert "step 2:" in line
    assert line.endswith("training stops here, with a checkpoint saved")
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert "procon/drift_gate" in state["log_history"][-2]  # before the loss of that step

    planned([drift_of(0.7, 0.7), drift_of(0.6, 0.6)])
    resumed, _ = trainer(gate=0.9, gate_action="stop")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.state.global_step == 3  # still below
    planned(PLAN[3:4] * 5)
    resumed, _ = trainer(gate=0.9, gate_action="stop")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.state.global_step == 6


def test_without_a_gate_nothing_is_told(trainer, planned, caplog):
    planned(PLAN)
    made, _ = trainer()
    made.train()
    assert made.state.global_step == 6
    assert series(made, "procon/drift_gate") == {}
    assert gate_lines(caplog) == []


def test_all_ranks_decide_by_the_main_processs_figures(trainer, planned, monkeypatch):
    """As on a rank that finds the cosine just above the gate, where the main process finds it just below."""
    planned([drift_of(0.91, 0.91)] * 6)

    def receive(objects: list) -> None:
        if isinstance(objects[0], Drift):
            objects[0] = drift_of(0.89, 0.89)

    monkeypatch.setattr(ranks, "broadcast_object_list", receive)
    made, _ = trainer(gate=0.9, gate_action="stop")
    made.train()
    assert made.state.global_step == 1
    assert series(made, "procon/drift_cos")[1] == pytest.approx(0.89)


@pytest.mark.parametrize(
    ("gate", "gate_action", "message"),
    [
        (1.5, "warn", "gate is 1.5: give a mean cosine"),
        (1.0, "warn", "gate is 1.0"),
        (float("nan"), "warn", "gate is nan"),
        (0.9, "halt", "gate_action is 'halt': choose one of warn, stop"),
        (None, "stop", "is 'stop', but there is no gate"),
    ],
)
def test_gates_that_cannot_be(trainer, gate, gate_action, message):
    with pytest.raises(ProConError, match=re.escape(message)):
        trainer(gate=gate, gate_action=gate_action)


def test_a_cosine_that_is_no_number_does_not_pass():
    assert not DriftGate.parse(0.9, "warn").passes(drift_of(float("nan")))


# Resuming


def test_a_run_resumed_measures_against_its_own_start(trainer, tmp_path):
    whole, _ = trainer(steps=2, save_strategy="steps", save_steps=3)
    whole.train()
    resumed, _ = trainer(steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    for name in ("procon/drift_cos", BY_BLOCK + "02", "procon/drift_shift_malicious"):
        assert series(resumed, name) == series(whole, name)
    assert list(series(whole, "procon/drift_cos")) == [0, 2, 4, 6]


def test_a_run_resumed_without_a_reference_is_refused(make_trainer, trainer, tmp_path):
    make_trainer("Trainer", "0").train()  # without DriftCallback
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    made, _ = trainer()
    with pytest.raises(ProConError, match=r"no drift reference '.*': the run that is resumed did not measure drift"):
        made.train(resume_from_checkpoint=checkpoint)

    saving = {"save_strategy": "steps", "save_steps": 2, "procon_overwrite": True}
    trainer(prompts=builtin_prompts("extraction").first(2), **saving)[0].train()
    with pytest.raises(
        ProConError, match="was measured on other prompts, or asked in another way: resume with the prompts"
    ):
        made.train(resume_from_checkpoint=checkpoint)
