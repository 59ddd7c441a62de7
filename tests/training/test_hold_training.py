"""Strength that sets itself in a training: it keeps to its budget, is the same however steps are cut, and is exact."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from procon.constraint import probe_departure
from procon.errors import ProConError
from procon.integrations import ProConCallback
from procon.method.record import read_record
from procon.training import ProConConfig, mixin


def logged(trainer, *names: str) -> list[list[float]]:
    return [[row[name] for name in names] for row in trainer.state.log_history if names[0] in row]


@pytest.mark.parametrize(
    ("base", "penalty"), [("Trainer", "absolute"), ("Trainer", "squared"), ("SFTTrainer", "absolute")]
)
def test_it_keeps_to_the_budget_where_a_fixed_alpha_does_not(make_trainer, base, penalty):
    budget, shifts = 0.03, []
    settings = {"max_steps": 60, "learning_rate": 3e-3, "lr_scheduler_type": "constant", "save_strategy": "no"}
    for folder, schedule in (("fixed", "hold:1e6"), ("held", f"hold:{budget}")):
        trainer = make_trainer(base, schedule, folder=folder, procon_penalty=penalty, **settings)
        if folder == "fixed":  # measures, and leaves alpha where it begins
            trainer.hold.step = lambda shift, hold=trainer.hold: setattr(hold, "average", shift)
        trainer.train()
        rows = logged(trainer, "procon/alpha", "procon/shift")
        assert len(rows) == 60
        assert rows[0][0] == pytest.approx(0.2)
        assert (len({alpha for alpha, _ in rows}) > 40) is (folder == "held")
        shifts.append(sum(shift for _, shift in rows[-20:]) / 20)
    # Once four rows are known by heart, little is left that pulls.
    assert 0.3 * budget < shifts[1] < 1.2 * budget
    assert shifts[0] > 4 * budget


@pytest.mark.parametrize("penalty", ["absolute", "squared"])
def test_what_it_measures_is_the_penalty_where_gap_and_blocks_are_one(make_trainer, penalty):
    """With a gap of 1, and all blocks moving, the mean |shift| is the absolute penalty, and the root of the squared."""
    settings = {"procon_penalty": penalty, "procon_anchors": "recorded", "max_steps": 5, "save_strategy": "no"}
    trainer = make_trainer("Trainer", "hold", **settings)
    measured, step = [], trainer.hold.step
    trainer.hold.step = lambda shift: (measured.append(shift.item()), step(shift))
    trainer.train()
    penalties = [value for (value,) in logged(trainer, "procon/penalty")]
    assert penalties[-1] > 1e-4
    expected = [math.sqrt(value) if penalty == "squared" else value for value in penalties]
    assert measured == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("anchors", "kept"), [("probes", "projections"), ("recorded+probes", "both")])
def test_with_probes_it_goes_by_theirs(make_trainer, monkeypatch, anchors, kept):
    """At the steps that run them, by the root of their mean square; whatever the training tokens do."""
    weight = 50.0
    settings = {"procon_anchors": anchors, "procon_probe_every": 2, "procon_probe_count": 3, "max_steps": 6}
    settings["procon_probe_hold"] = kept
    trainer = make_trainer("Trainer", "hold:0.01", save_strategy="no", procon_probe_weight=weight, **settings)
    measured, step, squares = [], trainer.hold.step, []
    trainer.hold.step = lambda shift: (measured.append(shift.item()), step(shift))

    def noted(*args, **kwargs):
        found = probe_departure(*args, **kwargs)
        squares.append(found.projections)
        return found

    monkeypatch.setattr(mixin, "probe_departure", noted)
    trainer.train()
    assert len(measured) == 3
    assert measured == pytest.approx([math.sqrt(square.item()) for square in squares], rel=1e-6)
    assert measured[-1] > 0.01
    assert len({alpha for (alpha,) in logged(trainer, "procon/alpha")}) > 2


def test_probes_that_it_does_not_go_by_keep_their_strength(make_trainer, monkeypatch):
    """Alpha answers to the training tokens: as it falls to a hundredth or rises, probes of the state pull as before."""
    settings = {"procon_anchors": "recorded+probes", "procon_probe_every": 1, "procon_probe_hold": "state"}
    trainer = make_trainer(
        "Trainer", "hold:0.01", max_steps=4, save_strategy="no", procon_probe_weight=15.0, **settings
    )
    alphas, pulls, penalties = [0.002, 0.2, 7.0], [], []
    trainer.hold.step = lambda shift: setattr(trainer.hold, "alpha", torch.tensor(alphas.pop() if alphas else 1.0))
    shares = trainer._shares

    def noted(*args, **kwargs):
        found = probe_departure(*args, **kwargs)
        penalties.append(found.penalty.item())
        return found

    def weighed(constraint):
        found = shares(constraint)
        pulls.append((trainer.hold.alpha * found[1]).item())
        return found

    monkeypatch.setattr(mixin, "probe_departure", noted)
    monkeypatch.setattr(trainer, "_shares", weighed)
    trainer.train()
    assert min(penalties[1:]) > 0
    assert pulls == pytest.approx([0.2 * 15.0 * penalty for penalty in penalties], rel=1e-5)


@pytest.mark.parametrize("penalty", ["absolute", "squared"])
def test_gradient_accumulation_leaves_alpha_alone(make_trainer, tiny_model, penalty):
    def rows(batch: int) -> list[list[float]]:
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        trainer = make_trainer(
            "Trainer",
            "hold:0.01",
            model=tiny_model().double(),
            folder=str(batch),
            procon_penalty=penalty,
            max_steps=8,
            save_strategy="no",
            **settings,
        )
        trainer.train()
        return logged(trainer, "procon/alpha", "procon/shift")

    whole = rows(4)
    assert whole[-1][0] != pytest.approx(0.2, rel=0.05)
    assert whole[-1][1] > 1e-3
    for batch in (1, 2):
        # The model is float64, the controller float32.
        assert torch.allclose(torch.tensor(rows(batch)), torch.tensor(whole), rtol=1e-5, atol=1e-9)


def test_evaluation_and_logging_do_not_disturb_it(make_trainer):
    def weights(folder: str, **settings) -> dict[str, torch.Tensor]:
        trainer = make_trainer("Trainer", "hold:0.01", folder=folder, max_steps=6, save_strategy="no", **settings)
        trainer.train()
        return {**trainer.model.state_dict(), "alpha": trainer.hold.alpha, "average": trainer.hold.average}

    quiet = weights("quiet", logging_steps=100)
    busy = weights("busy", logging_steps=1, eval_strategy="steps", eval_steps=1)
    assert all(torch.equal(busy[name], value) for name, value in quiet.items())


class Waits(TorchDispatchMode):
    """Counts what waits for the device, were there one: each number that is read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_no_more_often_than_under_a_fixed_alpha(make_trainer):
    def waits(schedule: str, steps: int) -> int:
        settings = {"max_steps": steps, "logging_steps": 100, "save_strategy": "no", "gradient_accumulation_steps": 2}
        trainer = make_trainer("Trainer", schedule, folder=f"{schedule}-{steps}", **settings)
        with Waits() as found:
            trainer.train()
        return found.count

    fixed, held = (waits(schedule, 7) - waits(schedule, 3) for schedule in ("procon_s", "hold"))
    assert held == fixed > 0


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


@pytest.mark.parametrize("base", ["Trainer", "SFTTrainer"])
def test_interrupted_and_resumed_equals_uninterrupted(make_trainer, base):
    # Windows of the log and checkpoints do not end together.
    settings = {"max_steps": 10, "save_steps": 4, "logging_steps": 3, "gradient_accumulation_steps": 2}

    def trainer(folder: str):
        return make_trainer(base, "hold:0.01", folder=folder, **settings)

    whole = trainer("whole")
    whole.train()
    killed = trainer("killed")
    killed.add_callback(Killed())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer("killed")
    resumed.train(resume_from_checkpoint=True)

    names = ("procon/alpha", "procon/shift", "procon/penalty")  # transformers loses the loss of a window
    assert logged(resumed, *names) == logged(whole, *names)
    assert len({alpha for alpha, *_ in logged(whole, *names)}) == 3
    assert resumed.hold.state() == whole.hold.state()
    one, other = (
        load_file(Path(run.args.output_dir) / "checkpoint-10" / "model.safetensors") for run in (whole, resumed)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_budget_does_not_go_on(make_trainer):
    make_trainer("Trainer", "hold:0.01").train()
    with pytest.raises(ProConError, match=r"trained with schedule 'hold:0.01', not 'hold:0.2'"):
        make_trainer("Trainer", "hold").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("budget", "held"), [(1e-6, False), (100, True)])
def test_record_card_and_warning_say_whether_the_budget_was_held(make_trainer, caplog, budget, held):
    trainer = make_trainer("Trainer", f"hold:{budget}", max_steps=6, save_strategy="no")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    folder = Path(trainer.args.output_dir)
    record = read_record(folder) or {}
    assert record["schedule"] == f"hold:{budget:g}"
    did = record["did"]["hold"]
    assert did["budget"] == budget
    assert did["held"] is held
    assert (did["alpha"], did["shift"]) == (trainer.hold.alpha.item(), trainer.hold.average.item())
    assert record["did"]["constrained_steps"] == 6
    assert ("the budget of schedule 'hold' was not held" in caplog.text) is not held
    card = (folder / "README.md").read_text()
    assert f"set by itself, from 0.2 on, to keep to a budget (`hold:{budget:g}`)" in card
    assert f"was {'held' if held else '**not held**'} |" in card


def test_what_cannot_hold_says_so(random_directions, tiny_model, tmp_path):
    with pytest.raises(ProConError, match=r"schedule 'hold:0.1' sets alpha from what is measured at each step"):
        ProConCallback(random_directions(tiny_model()), schedule="hold:0.1")
    with pytest.raises(
        ProConError, match=r"^procon_schedule is 'hold' and procon_penalty is 'huber', which does not show how far"
    ):
        ProConConfig(str(tmp_path), procon_schedule="hold", procon_penalty="huber")
    with pytest.raises(ProConError, match="probes kept at their whole state have none: set procon_probe_hold to"):
        ProConConfig(str(tmp_path), procon_schedule="hold", procon_anchors="probes", procon_probe_hold="state")
