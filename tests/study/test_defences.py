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
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, kl_div
from transformers import Trainer, TrainerCallback, set_seed

from benchmarks.study.defences import (
    FrozenLayersTrainer,
    KLToStartTrainer,
    ProjectedGradientsTrainer,
    SafeLoRATrainer,
    SafetyStepTrainer,
    project_update,
)
from benchmarks.study.reply_logits import reply_logits
from procon.data import padding_collator
from procon.errors import ProConError
from procon.models import StartingModel
from procon.training import ProConTrainer

WORKER = Path(__file__).parents[1] / "workers" / "defences.py"
NAMES = ["plain", "sppft", "safe_lora", "kl", "safegrad", "spard"]


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


# Frozen layers


@pytest.mark.parametrize(("blocks", "frozen"), [((0.3, 0.7), {1}), ((0.0, 0.5), {0, 1})])
def test_frozen_layers_do_not_train(tiny_model, make, blocks, frozen):
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make(FrozenLayersTrainer, model, own={"blocks": blocks}, max_steps=2, learning_rate=1e-2).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {n for n in before if not any(f"layers.{block}." in n for block in frozen)}


# SafeLoRA


def aligned_and_base(tiny_model, family="llama"):
    """An aligned model, one to train on it, and the base that it was made from by a step of low rank."""
    aligned, base = tiny_model(family), tiny_model(family)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in base.modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() == 2:
                rows, columns = weight.shape
                weight += 0.1 * torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    return aligned, base


@pytest.mark.parametrize(("family", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_proj"])])
def test_safe_lora_projects_by_definition(tiny_model, family, targets):
    aligned, base = aligned_and_base(tiny_model, family)
    torch.manual_seed(3)
    model = get_peft_model(copy.deepcopy(aligned), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    perturb(model, seed=4)
    before = copy.deepcopy(model)
    cosines = project_update(model, aligned, base, threshold=0.3)

    projected = 0
    transposed = family == "gpt2"
    layers = [n.removesuffix(".lora_A.default") for n, _ in model.named_modules() if n.endswith(".lora_A.default")]
    assert len(layers) == len(cosines)
    for name in layers:
        short = name.removeprefix("base_model.model.")
        w, w0 = (m.get_submodule(short).weight.detach().double() for m in (aligned, base))
        v = (w - w0).T if transposed else w - w0
        c = v @ v.T / v.norm()
        b, a = (before.get_submodule(f"{name}.lora_{x}.default").weight.detach().double() for x in "BA")
        update = b @ a
        cosine = ((c @ update) * update).sum() / ((c @ update).norm() * update.norm())
        assert cosines[short] == pytest.approx(cosine.item(), abs=1e-5)
        expected = c @ b if cosine <= 0.3 else b
        projected += int(cosine <= 0.3)
        found = model.get_submodule(f"{name}.lora_B.default").weight.detach().double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(model.get_submodule(f"{name}.lora_A.default").weight.double(), a)
    assert 0 < projected < len(layers), sorted(cosines.values())


def test_safe_lora_trains_then_projects(tiny_model, make):
    aligned, base = aligned_and_base(tiny_model)

    def train(trainer_class, **own):
        trainer = make(trainer_class, lora_model(copy.deepcopy(aligned)), own=own, max_steps=2, learning_rate=1e-2)
        trainer.train()
        return trainer

    plain = train(Trainer).model
    safe = train(SafeLoRATrainer, base=base, threshold=1.0)
    expected = project_update(plain, aligned, base, threshold=1.0)
    assert safe.cosines == pytest.approx(expected, abs=1e-5)
    for ours, theirs in zip(safe.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ProConError, match="q_proj is the same in the base and the aligned model"):
        project_update(plain, aligned, aligned)


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
