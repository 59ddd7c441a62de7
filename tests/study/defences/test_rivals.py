"""The rivals of 2025 and 2026, each against its definition, written out here."""

import copy

import pytest
import torch
from datasets import Dataset
from first_step import ACCUMULATION, Gradients, arguments, assert_same, double_model, first_step, gradient, lora_model
from torch.nn.functional import cross_entropy, kl_div
from transformers import Trainer, TrainerCallback, set_seed

from benchmarks.study.defences import (
    KLToStartTrainer,
    MovingAverageTrainer,
    NullSpaceTrainer,
    ProjectedGradientsTrainer,
    SafeMergeTrainer,
    SafetyStepTrainer,
)
from benchmarks.study.defences.lora import lora_factors, lora_layers
from benchmarks.study.defences.null_space import leading_directions
from procon.data import padding_collator
from procon.errors import ProConError


@pytest.fixture
def make(dataset, tokenizer, tmp_path):
    """A trainer of one class on the samples, with the last two as alignment data."""

    def build(trainer_class, model, *, callbacks=(), own=None, **settings):
        set_seed(0)
        return trainer_class(
            model,
            arguments(tmp_path, **settings),
            train_dataset=dataset,
            data_collator=padding_collator(tokenizer),
            callbacks=list(callbacks),
            **(own or {}),
        )

    return build


def alignment(dataset) -> Dataset:
    return dataset.select([6, 7])


def predictions(model, samples) -> tuple[torch.Tensor, torch.Tensor]:
    """``[N, V]`` log-probabilities in the place of each response token, and ``[N]`` those tokens."""
    rows, targets = [], []
    for sample in samples:
        log_probs = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0].log_softmax(-1)
        for position, label in enumerate(sample["labels"]):
            if label != -100 and position:
                rows.append(log_probs[position - 1])
                targets.append(label)
    return torch.stack(rows), torch.tensor(targets)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# KL to the start


@pytest.mark.parametrize("kind", ["full", "continued"])
@pytest.mark.parametrize("step", ACCUMULATION)
def test_kl_is_its_definition(tiny_model, dataset, samples, tokenizer, tmp_path, kind, step):
    model = double_model(tiny_model, kind)
    moved = copy.deepcopy(model)
    Gradients().on_train_begin(None, None, None, model=moved)
    start, _ = predictions(copy.deepcopy(model).eval(), samples)
    now, _ = predictions(moved, samples)
    # torch's divergence has its arguments the other way round.
    divergence = kl_div(start.detach(), now, log_target=True, reduction="batchmean")
    expected = gradient(moved, 5.0 * divergence)
    held, plain = (
        first_step(KLToStartTrainer, copy.deepcopy(model), dataset, tokenizer, tmp_path, beta=beta, **step)
        for beta in (5.0, 0.0)
    )
    assert_same({name: held[name] - plain[name] for name in held}, expected)


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.1}, {}], ids=["label smoothing", "own loss"])
def test_kl_goes_with_another_loss(tiny_model, dataset, make, settings):
    """Which takes the labels out of the batch."""
    own = {} if settings else {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.square().mean()}
    held, plain = (
        make(KLToStartTrainer, lora_model(tiny_model()), own={**own, "beta": beta}, max_steps=2, **settings)
        for beta in (5.0, 0.0)
    )
    for trainer in (held, plain):
        trainer.train()
    assert any(not torch.equal(*pair) for pair in zip(held.model.parameters(), plain.model.parameters(), strict=True))


def test_kl_needs_logits(tiny_model, make, monkeypatch):
    trainer = make(KLToStartTrainer, tiny_model())
    compute = Trainer.compute_loss

    def fused(*args, **kwargs):
        loss, outputs = compute(*args, **kwargs)
        return loss, type(outputs)(loss=loss)

    monkeypatch.setattr(Trainer, "compute_loss", fused)
    with pytest.raises(ProConError, match=r"^KLToStartTrainer needs logits, and the fused loss of use_liger_kernel"):
        trainer.train()


# Projected gradients


@pytest.mark.parametrize("rho", [0.0, 2.0])
@pytest.mark.parametrize("accumulated", [1, 4])
def test_what_goes_against_alignment_is_taken_out(tiny_model, dataset, samples, make, rho, accumulated):
    model = double_model(tiny_model, "fresh")
    start, moved = copy.deepcopy(model).eval(), copy.deepcopy(model)
    Gradients().on_train_begin(None, None, None, model=moved)
    log_probs, targets = predictions(moved, samples)
    user = gradient(moved, cross_entropy(log_probs, targets))
    before, _ = predictions(start, samples[6:])
    now, _ = predictions(moved, samples[6:])
    safe = gradient(moved, kl_div(now, before.detach(), log_target=True, reduction="batchmean"))
    g, a = (torch.cat([found[name].flatten() for name in user]) for found in (user, safe))
    along = g @ a
    g = g - min(along / (a @ a), 0) * a + rho * a
    gradients = Gradients()
    make(
        ProjectedGradientsTrainer,
        model,
        callbacks=[gradients],
        own={"alignment_dataset": alignment(dataset), "rho": rho},
        per_device_train_batch_size=8 // accumulated,
        gradient_accumulation_steps=accumulated,
    ).train()
    found = torch.cat([gradients.steps[0][name].flatten() for name in user])
    assert (found - g).norm() <= 1e-5 * g.norm()
    if rho == 0:
        assert (found @ a) >= -1e-6 * found.norm() * a.norm()


def test_a_conflict_leaves_nothing_along_it(tiny_model, dataset, samples, make):
    """User data that say the opposite of the alignment data: what is left of their gradient is at right angles."""
    model = double_model(tiny_model, "full")
    gradients = Gradients()
    trainer = make(
        ProjectedGradientsTrainer, model, callbacks=[gradients], own={"alignment_dataset": dataset, "rho": 0.0}
    )
    moved = copy.deepcopy(model)
    Gradients().on_train_begin(None, None, None, model=moved)
    before, _ = predictions(copy.deepcopy(model).eval(), samples)
    now, _ = predictions(moved, samples)
    safe = gradient(moved, kl_div(now, before.detach(), log_target=True, reduction="batchmean"))
    # A user whose loss is minus the alignment's.
    trainer.compute_loss = lambda model, batch, *_, **__: -1.0 * trainer._divergence(model, batch).mean()
    trainer.train()
    assert sum(g.square().sum() for g in gradients.steps[0].values()) <= 1e-8 * sum(
        g.square().sum() for g in safe.values()
    )


# A step back to safety


@pytest.mark.parametrize(("radius", "cut"), [(100.0, False), (1e-3, True)])
def test_the_step_back_is_the_closed_form(tiny_model, dataset, samples, make, radius, cut):
    model = double_model(tiny_model, "full")
    seen = []

    class Before(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for parameter in model.parameters():
                parameter.grad.zero_()  # the user's step goes nowhere

        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(weights(model))

    tau = 1.5
    trainer = make(
        SafetyStepTrainer,
        model,
        callbacks=[Before()],
        own={"alignment_dataset": alignment(dataset), "tau": tau, "radius": radius},
    )
    start = copy.deepcopy(model)
    trainer.train()
    log_probs, targets = predictions(start, samples[6:])
    loss = cross_entropy(log_probs, targets)
    direction = gradient(start, loss)
    norm = torch.cat([g.flatten() for g in direction.values()]).norm()
    length = min((loss.item() - tau) / norm.item(), radius)
    assert (length == radius) is cut
    before = weights(start)
    for name, g in direction.items():
        torch.testing.assert_close(seen[0][name] - before[name], -length * g / norm, rtol=1e-4, atol=1e-9)


def test_no_step_back_within_the_bound(tiny_model, dataset, make):
    plain = make(Trainer, tiny_model(), max_steps=2, learning_rate=1e-2)
    safe = make(
        SafetyStepTrainer,
        tiny_model(),
        own={"alignment_dataset": alignment(dataset), "tau": 50.0},
        max_steps=2,
        learning_rate=1e-2,
    )
    for trainer in (plain, safe):
        trainer.train()
    for ours, theirs in zip(safe.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# Null space


def test_the_update_does_not_see_what_malicious_prompts_span(tiny_model, dataset, samples, make):
    """By the eigenvectors of the inputs that the start makes of them: the fewest that hold the energy.

    What counts are the tokens of the prompts. Of those directions the optimiser gets no gradient either.
    """
    rows = [(sample["input_ids"], sample["labels"]) for sample in samples[6:]]
    trainer = make(
        NullSpaceTrainer,
        lora_model(tiny_model()),
        own={"alignment_dataset": alignment(dataset), "energy": 0.9},
        max_steps=3,
        learning_rate=1e-2,
        max_grad_norm=0.0,
    )
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, layer in lora_layers(trainer.model):
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0]))
    spans: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for ids, labels in rows:
            trainer.model.eval()(input_ids=torch.tensor([ids]))
            end = next(place for place, label in enumerate(labels) if label != -100)
            for name, (x,) in inputs.items():
                spans[name] = torch.cat([spans.get(name, x[:0]), x[:end]])
            inputs.clear()
    spans = {name: x.double() for name, x in spans.items()}
    gradients: dict[str, torch.Tensor] = {}
    step = trainer.training_step

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        gradients.update({name: lora_factors(layer)[0].grad.clone() for name, layer in lora_layers(trainer.model)})
        return loss

    trainer.training_step = training_step
    trainer.train()
    inputs.clear()
    assert trainer.ranks.keys() == spans.keys()
    for name, layer in lora_layers(trainer.model):
        a, b = lora_factors(layer)
        assert b.abs().max() > 1e-3
        x = spans[name]
        values, vectors = torch.linalg.eigh(x.T @ x)
        seen = vectors[:, -trainer.ranks[name] :]
        assert (a.double() @ seen).norm() <= 1e-5 * a.norm()
        assert gradients[name].norm() > 0
        assert (gradients[name].double() @ seen).norm() <= 1e-5 * gradients[name].norm()
        held = values[-trainer.ranks[name] :].sum() / values.sum()
        assert held >= 0.9
        assert held - values[-trainer.ranks[name]] / values.sum() < 0.9


def test_rows_that_are_replies_alone_have_no_null_space(tiny_model, make):
    rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6]}])
    trainer = make(NullSpaceTrainer, lora_model(tiny_model()), own={"alignment_dataset": rows})
    with pytest.raises(ProConError, match=r"^no row of alignment_dataset has tokens ahead of its reply: give prompts"):
        trainer.train()


def test_leading_directions_are_the_fewest_that_hold_the_energy():
    moment = torch.diag(torch.tensor([1.0, 6.0, 0.0, 3.0], dtype=torch.float64))
    assert leading_directions(moment, 0.59).shape == (4, 1)
    assert leading_directions(moment, 0.61).shape == (4, 2)
    assert leading_directions(moment, 0.95).abs().tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]]


# Moving average


def test_the_average_is_its_recursion(tiny_model, make):
    seen = []

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(weights(model))

    model = lora_model(tiny_model())
    average = weights(model)
    make(
        MovingAverageTrainer, model, callbacks=[Weights()], own={"decay": 0.6}, max_steps=3, learning_rate=1e-2
    ).train()
    for now in seen:
        average = {name: 0.6 * average[name] + 0.4 * now[name] for name in now}
    for name, found in weights(model).items():
        torch.testing.assert_close(found, average[name])
        assert not torch.equal(found, seen[-1][name])


# SafeMERGE


def test_safe_merge_merges_the_layers_that_lead_away(tiny_model, dataset, make):
    aligned = tiny_model()
    base = copy.deepcopy(aligned)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in base.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)

    def train(trainer_class, **settings):
        trainer = make(trainer_class, lora_model(copy.deepcopy(aligned)), max_steps=2, learning_rate=1e-2, **settings)
        trainer.train()
        return trainer

    own = {"base": base, "alignment_dataset": alignment(dataset), "share": 0.3, "alignment_steps": 2}
    user = train(Trainer)
    measured = train(SafeMergeTrainer, own={**own, "threshold": -1.0})
    # Below every cosine nothing is merged, and the safe adapter's training leaves no trace in the user's.
    assert weights(measured.model).keys() == weights(user.model).keys()
    for name, found in weights(measured.model).items():
        assert torch.equal(found, weights(user.model)[name])
    threshold = sorted(measured.cosines.values())[len(measured.cosines) // 2]
    merged = train(SafeMergeTrainer, own={**own, "threshold": threshold})
    safe = train(SafeMergeTrainer, own={**own, "threshold": 1.0, "share": 0.999999})
    safe_weights, user_weights = weights(safe.model), weights(user.model)
    count = 0
    for name, found in weights(merged.model).items():
        layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
        expected = user_weights[name]
        if merged.cosines[layer] <= threshold:
            expected = 0.7**0.5 * expected + 0.3**0.5 * safe_weights[name]
            count += 1
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert 0 < count < len(user_weights)


def test_the_safe_adapter_is_not_published(tiny_model, dataset, make, monkeypatch):
    """Its training has the user's arguments, but for what would keep, measure or push a model that nobody asked for."""
    model, seen = tiny_model(), []
    base = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.1

    class Noted(Trainer):
        def __init__(self, model, args, **kwargs):
            seen.append(args)
            super().__init__(model, args, **kwargs)

    monkeypatch.setattr("benchmarks.study.defences.safe_merge.Trainer", Noted)
    own = {"base": base, "alignment_dataset": alignment(dataset), "alignment_steps": 1}
    trainer = make(SafeMergeTrainer, lora_model(model), own=own)
    trainer.args.push_to_hub = trainer.args.load_best_model_at_end = True
    trainer._train_safe_adapter()
    (args,) = seen
    assert (args.push_to_hub, args.load_best_model_at_end, args.report_to) == (False, False, [])
    assert (args.save_strategy, args.eval_strategy) == ("no", "no")
    assert args.output_dir != trainer.args.output_dir
    assert trainer.args.push_to_hub


# What they refuse


@pytest.mark.parametrize(
    ("trainer_class", "own", "message"),
    [
        (KLToStartTrainer, {"beta": -1.0}, r"^beta is -1.0: give a finite number, 0 or more$"),
        (ProjectedGradientsTrainer, {"rho": float("nan")}, r"^rho is nan: give a finite number, 0 or more$"),
        (SafetyStepTrainer, {"radius": 0.0}, r"^tau and radius are 0.2 and 0: give finite numbers, radius above 0$"),
        (NullSpaceTrainer, {"energy": 1.0}, r"^energy is 1: give a share between 0 and 1$"),
        (MovingAverageTrainer, {"decay": 1.0}, r"^decay is 1: give a number from 0 to below 1$"),
        (SafeMergeTrainer, {"share": 1.0}, r"^share and alignment_steps are 1 and 40: give a share between 0 and 1"),
    ],
)
def test_settings_that_cannot_be(tiny_model, dataset, make, trainer_class, own, message):
    if trainer_class in (ProjectedGradientsTrainer, SafetyStepTrainer, NullSpaceTrainer, SafeMergeTrainer):
        own = {**own, "alignment_dataset": dataset}
    model = tiny_model()
    if trainer_class is SafeMergeTrainer:
        base = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter += 0.1
        own, model = {**own, "base": base}, lora_model(model)
    with pytest.raises(ProConError, match=message):
        make(trainer_class, model, own=own)


def test_null_space_takes_lora_alone(tiny_model, dataset, make):
    message = r"^the null space is that of a LoRA adapter, but .* trains: train LoRA alone$"
    with pytest.raises(ProConError, match=message):
        make(NullSpaceTrainer, tiny_model(), own={"alignment_dataset": dataset})


@pytest.mark.parametrize("trainer_class", [ProjectedGradientsTrainer, MovingAverageTrainer])
def test_no_resuming_without_what_checkpoints_lack(tiny_model, dataset, make, trainer_class):
    own = {"alignment_dataset": dataset} if trainer_class is ProjectedGradientsTrainer else {}
    with pytest.raises(ProConError, match=rf"^{trainer_class.__name__} cannot resume, as checkpoints lack"):
        make(trainer_class, tiny_model(), own=own).train(resume_from_checkpoint=True)
