"""Each defence against its definition, written out here; and ranks that train as one process."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from first_step import (
    ACCUMULATION,
    Gradients,
    arguments,
    assert_same,
    double_model,
    first_step,
    gradient,
    lora_model,
    perturb,
)
from forked import run_python, run_ranks
from torch.nn.functional import cross_entropy, kl_div
from transformers import TrainerCallback, set_seed

from benchmarks.study.defences import (
    KLToStartTrainer,
    ProjectedGradientsTrainer,
    SafetyStepTrainer,
)
from benchmarks.study.reply_logits import reply_logits
from procon.data import padding_collator
from procon.errors import ProConError
from procon.models import StartingModel
from procon.training import ProConTrainer

WORKER = Path(__file__).parents[1] / "workers" / "defences.py"
NAMES = ["plain", "kl", "safegrad", "spard"]


@pytest.fixture
def dataset(samples) -> Dataset:
    return Dataset.from_list(samples)


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


# What the model was


@pytest.mark.parametrize("kind", ["full", "fresh", "continued"])
def test_starting_model_is_the_model_before_training(tiny_model, kind):
    model = double_model(tiny_model, kind).train()
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(model).eval()(input_ids=ids).logits.detach()
    start = StartingModel(model)
    perturb(model)
    found = start(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert model.training
    assert (model.eval()(input_ids=ids).logits - expected).abs().max() > 1e-3


def test_starting_model_copies_what_trains_where_switching_adapters_off_is_not_enough(tiny_model):
    model = lora_model(tiny_model())
    assert StartingModel(model)._copies == {}
    model.base_model.model.model.norm.requires_grad_()
    assert set(StartingModel(model)._copies) == {p for p in model.parameters() if p.requires_grad}
    model.base_model.model.model.norm.requires_grad_(False)
    perturb(model)
    assert set(StartingModel(model)._copies) == {p for n, p in model.named_parameters() if "lora" in n}
    with pytest.raises(ProConError, match="nothing in the model trains"):
        StartingModel(model.requires_grad_(False))


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


@pytest.mark.parametrize("tau", [1.5, 5.4, 100.0])
def test_the_step_back_is_the_optimisers_own_scaled_by_tensor(tiny_model, dataset, samples, make, tau):
    model = double_model(tiny_model, "full")
    seen = []

    class Before(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for parameter in model.parameters():
                parameter.grad.zero_()  # the user's step goes nowhere

        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(weights(model))

    trainer = make(
        SafetyStepTrainer,
        model,
        callbacks=[Before()],
        own={"alignment_dataset": alignment(dataset), "tau": tau},
        optim="sgd",
    )
    start = copy.deepcopy(model)
    trainer.train()
    log_probs, targets = predictions(start, samples[6:])
    loss = cross_entropy(log_probs, targets)
    direction = gradient(start, loss)
    clip = min(1 / torch.cat([g.flatten() for g in direction.values()]).norm().item(), 1)
    before, scales = weights(start), []
    for name, g in direction.items():
        step = clip * g
        scales.append(min((loss.item() - tau) / step.norm().item(), 1) if loss > tau + 0.1 else 0)
        moved = seen[0][name] - before[name]
        torch.testing.assert_close(moved, -trainer.args.learning_rate * scales[-1] * step, rtol=1e-4, atol=1e-9)
    # Nothing where the loss is allowed; else whole steps, or some cut short.
    assert {1.5: min(scales) == 1, 5.4: 0 < min(scales) < 1, 100.0: max(scales) == 0}[tau], (loss, scales)


# All


@pytest.mark.parametrize(
    ("trainer_class", "own"),
    [
        (KLToStartTrainer, {"beta": 1.0}),
        (ProjectedGradientsTrainer, {"rho": 1.0}),
        (SafetyStepTrainer, {"tau": 0.1}),
        (ProConTrainer, {}),
    ],
)
def test_training_with_the_logits_of_replies_is_that_with_all(
    trainer_class, own, tiny_model, dataset, tokenizer, random_directions, make
):
    if trainer_class in (ProjectedGradientsTrainer, SafetyStepTrainer):
        own = {**own, "alignment_dataset": alignment(dataset)}
    settings = {} if trainer_class is not ProConTrainer else {"procon_terms": "tokens"}
    found = []
    for few in (False, True):
        model = lora_model(tiny_model())
        if trainer_class is ProConTrainer:
            own = {"directions": random_directions(model), "processing_class": tokenizer}
        trainer = make(trainer_class, model.double(), own=own, max_steps=2, learning_rate=1e-2, **settings)
        if few:
            trainer.data_collator = reply_logits(trainer.data_collator, model)
            batch = trainer.data_collator([dataset[0], dataset[1]])
            assert len(batch["logits_to_keep"]) < batch["input_ids"].shape[1]
        before = torch.cat([p.flatten() for p in weights(model).values()])
        trainer.train()
        found.append(torch.cat([p.flatten() for p in weights(model).values()]))
    assert (found[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_train_as_one_process(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_python(WORKER, tmp_path, *NAMES)
    run_ranks(2, WORKER, tmp_path, *NAMES)
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))

    def flat(found: dict, index: int) -> torch.Tensor:
        return torch.cat([pair[index].flatten() for pair in found.values()])

    way = {name: flat(found, 1) - flat(found, 0) for name, found in one.items()}
    for name in NAMES:
        assert way[name].norm() > 1e-3, name
        difference = flat(two[name], 1) - flat(one[name], 1)
        # The loss is summed in fp32.
        assert difference.norm() <= 1e-4 * way[name].norm(), name
        assert name == "plain" or (way[name] - way["plain"]).norm() > 1e-2 * way["plain"].norm(), name
