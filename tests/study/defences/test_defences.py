"""Each defence against its definition, written out here: gradients of the first optimiser step, with accumulation."""

import copy

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
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import Trainer, TrainerCallback, set_seed

from benchmarks.study.defences import (
    ConstrainedSFTTrainer,
    FrozenLayersTrainer,
    HiddenStatesTrainer,
    LisaTrainer,
    SafeLoRATrainer,
    SteeringTrainer,
    project_update,
)
from benchmarks.study.defences.constrained_sft import response_positions
from procon.data import flattening_collator, padding_collator
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import StartingModel, find_decoder

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


# Constrained SFT


def constrained_definition(model, start, samples, betas=(0.5, 2, 2, 2, 2), after=0.1) -> torch.Tensor:
    terms = []
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        ours, theirs = model(input_ids=ids).logits[0], start(input_ids=ids).logits[0]
        t = 0
        for position, label in enumerate(sample["labels"]):
            t = t + 1 if label != -100 else 0
            if label == -100 or position == 0:
                continue
            log_pi, log_ref = (x[position - 1].log_softmax(-1)[label] for x in (ours, theirs))
            beta = betas[t - 1] if t <= len(betas) else after
            terms.append(-2 / beta * logsigmoid(beta * (log_pi - log_ref.detach())))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("kind", ["full", "continued"])
@pytest.mark.parametrize("step", ACCUMULATION)
def test_constrained_sft_is_its_definition(tiny_model, dataset, samples, tokenizer, tmp_path, kind, step):
    model = double_model(tiny_model, kind)
    start, moved = copy.deepcopy(model).eval(), copy.deepcopy(model)
    perturb(moved)
    expected = gradient(moved, constrained_definition(moved, start, samples))
    found = first_step(ConstrainedSFTTrainer, model, dataset, tokenizer, tmp_path, **step)
    assert_same(found, expected)


def test_constrained_sft_begins_as_cross_entropy(tiny_model, dataset, tokenizer, tmp_path):
    def step(trainer_class):
        callback = Gradients(move=False)
        trainer_class(
            tiny_model().double(),
            arguments(tmp_path),
            train_dataset=dataset,
            data_collator=padding_collator(tokenizer),
            callbacks=[callback],
        ).train()
        return callback.steps[0]

    assert_same(step(ConstrainedSFTTrainer), step(Trainer))


def test_response_tokens_are_counted_within_each_turn():
    labels = torch.tensor([[-100, 5, 6, -100, -100, 7, 8, 9], [-100, -100, -100, 4, -100, -100, -100, -100]])
    assert response_positions(labels).tolist() == [0, 1, 0, 1, 2, 0]


# Hidden states


def hidden_definition(model, start, samples, blocks, scope) -> torch.Tensor:
    """The mean square of hidden states' changes."""
    distances = []
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        ours, theirs = (m(input_ids=ids, output_hidden_states=True).hidden_states for m in (model, start))
        response = torch.tensor(sample["labels"]) != -100
        response[0] = False
        kept = {"response": response, "prompt": ~response, "all": torch.ones_like(response)}[scope]
        change = torch.stack([(ours[block] - theirs[block].detach())[0, kept] for block in blocks], 1)
        distances.append(change.square().mean(-1).flatten())
    return torch.cat(distances).mean()


@pytest.mark.parametrize("step", ACCUMULATION)
@pytest.mark.parametrize(
    ("kind", "blocks", "chosen", "scope"),
    [("full", "all", (0, 1, 2), "response"), ("continued", 0.5, (1, 2), "prompt"), ("fresh", [2], (2,), "all")],
)
def test_hidden_states_is_its_definition(
    tiny_model, dataset, samples, tokenizer, tmp_path, kind, blocks, chosen, scope, step
):
    model = double_model(tiny_model, kind)
    start, moved = copy.deepcopy(model).eval(), copy.deepcopy(model)
    perturb(moved)
    expected = gradient(moved, 50 * hidden_definition(moved, start, samples, chosen, scope))
    # With it minus without: without ``num_items_in_batch`` the Trainer's CE is no mean over the step's tokens. Alpha is
    # such that the two are alike, as RMSNorm rounds the gradient of their sum to fp32 in a float64 model too.
    held, plain = (
        first_step(
            HiddenStatesTrainer,
            copy.deepcopy(model),
            dataset,
            tokenizer,
            tmp_path,
            alpha=alpha,
            blocks=blocks,
            scope=scope,
            **step,
        )
        for alpha in (50.0, 0.0)
    )
    assert_same({name: held[name] - plain[name] for name in held}, expected)


def test_hidden_states_of_a_flattened_batch_are_those_of_a_padded_one(tiny_model, dataset, tokenizer, tmp_path):
    def step(collator):
        return first_step(
            HiddenStatesTrainer, tiny_model().double(), dataset, tokenizer, tmp_path, alpha=0.5, collator=collator
        )

    assert_same(step(flattening_collator()), step(padding_collator(tokenizer)))


def test_hidden_states_under_checkpointing(tiny_model, dataset, tokenizer, tmp_path):
    def step(reentrant: bool | None):
        checkpointing = reentrant is not None
        kwargs = {"use_reentrant": reentrant} if checkpointing else None
        model = lora_model(tiny_model()).double()
        return first_step(
            HiddenStatesTrainer,
            model,
            dataset,
            tokenizer,
            tmp_path,
            alpha=0.5,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=kwargs,
        )

    assert_same(step(False), step(None))


# Lisa


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("accepts", [True, False])
def test_lisa_holds_each_state_to_the_last_switch(tiny_model, dataset, tokenizer, tmp_path, accumulated, accepts):
    """Second user step: its gradient is CE's and rho times the way from the weights that the alignment left."""
    alignment = dataset.select([3])
    weights, gradients = [], Gradients(move=False)

    class Weights(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            weights.append(copy.deepcopy(model))

    set_seed(0)
    trainer = LisaTrainer(
        lora_model(tiny_model()).double(),
        arguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=8 // accumulated,
            gradient_accumulation_steps=accumulated,
            learning_rate=1e-2,
        ),
        train_dataset=dataset,
        data_collator=padding_collator(tokenizer),
        callbacks=[Weights(), gradients],
        alignment_dataset=alignment,
        alignment_steps=2,
        user_steps=5,
        rho=3.0,
    )
    trainer.model_accepts_loss_kwargs = accepts
    start = copy.deepcopy(trainer.model)
    trainer.train()

    switch, now = weights
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(switch.parameters(), start.parameters(), strict=True))
    batch = padding_collator(tokenizer)(list(dataset))
    logits = now(**{k: v for k, v in batch.items() if k != "labels"}).logits
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    if accepts or accumulated == 1:
        expected = gradient(now, losses.sum() / (batch["labels"][:, 1:] != -100).sum())
        before = dict(switch.named_parameters())
        for name, parameter in now.named_parameters():
            if parameter.requires_grad:
                expected[name] = expected[name] + 3.0 * (parameter - before[name]).detach()
        assert_same(gradients.steps[1], expected)
    plain = sum(3.0 * (p - dict(switch.named_parameters())[n]).norm() for n, p in now.named_parameters())
    assert plain > 1e-2  # the term is not lost in rounding


class Batches(LisaTrainer):
    """Keeps what it trained on."""

    def training_step(self, model, inputs, *rest):
        self.seen.append((self.state.global_step, inputs["input_ids"][:, 0].tolist()))
        return super().training_step(model, inputs, *rest)


def test_lisa_sees_user_data_as_often_as_asked(tiny_model, dataset, tokenizer, tmp_path):
    """8 samples in batches of 3, two epochs: 6 user steps, and 2 alignment steps before every 4 of them."""
    numbered = Dataset.from_list([{"input_ids": [5 + n, 40, 41], "labels": [-100, 40, 41]} for n in range(8)])
    alignment = Dataset.from_list([{"input_ids": [50, 42, 43], "labels": [-100, 42, 43]}] * 2)
    trainer = Batches(
        tiny_model(),
        arguments(tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=3),
        train_dataset=numbered,
        data_collator=padding_collator(tokenizer),
        alignment_dataset=alignment,
        alignment_steps=2,
        user_steps=4,
    )
    trainer.seen = []
    trainer.train()
    assert trainer.state.global_step == 6
    states = ["alignment" if 50 in ids else "user" for _, ids in trainer.seen]
    assert states == ["alignment"] * 2 + ["user"] * 4 + ["alignment"] * 2 + ["user"] * 2
    assert {step for (step, _), state in zip(trainer.seen, states, strict=True) if state == "alignment"} == {0, 4}
    users = [first for (_, ids), state in zip(trainer.seen, states, strict=True) if state == "user" for first in ids]
    assert sorted(users) == sorted(2 * list(range(5, 13)))
    assert "alignment_loss" in trainer.state.log_history[0]


def test_lisa_moves_the_model_by_alignment_data(tiny_model, dataset, tokenizer, tmp_path):
    """The loss on alignment data falls although user data never have it."""
    alignment = dataset.select([3])
    batch = padding_collator(tokenizer)(list(alignment))
    model = tiny_model()
    before = model(**batch).loss.item()
    LisaTrainer(
        model,
        arguments(tmp_path, max_steps=4, learning_rate=1e-2),
        train_dataset=dataset.select([0, 1]),
        data_collator=padding_collator(tokenizer),
        alignment_dataset=alignment,
        alignment_steps=10,
        user_steps=2,
        rho=0.0,
    ).train()
    assert model(**batch).loss.item() < before - 0.5


# Steering


def test_steering_displaces_block_inputs_towards_compliance(tiny_model, random_directions, tmp_path):
    """With blocks that add nothing, the input of block l is gap_l * r_l / 4 away from the embeddings."""
    model = tiny_model()
    directions = random_directions(model)
    directions.gaps[:, 0].copy_(torch.tensor([1.0, 2.0, 5.0]))
    with torch.no_grad():
        for block in find_decoder(model).blocks:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    trainer = SteeringTrainer(model, arguments(tmp_path), directions=directions, blocks=[0, 2])
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    seen = []
    # After the steering's hooks: what the blocks read.
    with trainer._steering():
        hooks = [
            block.register_forward_pre_hook(
                lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            for block in find_decoder(model).blocks
        ]
        model.train()(input_ids=ids)
        embedded = model.get_input_embeddings()(ids)
        shifts = [hidden - embedded for hidden in seen]
        model.eval()(input_ids=ids)
        unsteered = [hidden - embedded for hidden in seen[3:]]
    for hook in hooks:
        hook.remove()
    r = directions.basis[:, 0]
    expected = [-0.25 * 1.0 * r[0], -0.25 * 1.0 * r[0], -0.25 * 5.0 * r[2]]
    for shift, vector in zip(shifts, expected, strict=True):
        torch.testing.assert_close(shift, vector.expand_as(shift), atol=1e-5, rtol=0)
    assert all(shift.abs().max() < 1e-6 for shift in unsteered)


def test_steering_takes_refusal_directions_alone(tiny_model, tmp_path):
    other = Directions.from_vectors(tiny_model(), {1: torch.ones(32)}, name="honesty")
    with pytest.raises(ProConError, match=r"^steering goes against refusal, and these are directions of"):
        SteeringTrainer(tiny_model(), arguments(tmp_path), directions=other)


def test_steering_changes_training_and_leaves_nothing_behind(
    tiny_model, dataset, tokenizer, tmp_path, random_directions
):
    model = tiny_model().double()
    plain = first_step(Trainer, tiny_model().double(), dataset, tokenizer, tmp_path)
    steered = first_step(
        SteeringTrainer, model, dataset, tokenizer, tmp_path, directions=random_directions(model), strength=2.0
    )
    name = "model.layers.2.mlp.down_proj.weight"
    assert (plain[name] - steered[name]).norm() > 1e-2 * plain[name].norm()
    assert not any(block._forward_pre_hooks for block in find_decoder(model).blocks)


# Frozen layers


@pytest.mark.parametrize(("blocks", "frozen"), [((0.3, 0.7), {1}), ([0, 2], {0, 2}), ((0.9, 1.0), {2})])
@pytest.mark.parametrize("lora", [False, True])
def test_frozen_layers_do_not_train(tiny_model, dataset, tokenizer, tmp_path, blocks, frozen, lora):
    model = lora_model(tiny_model()) if lora else tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    FrozenLayersTrainer(
        model,
        arguments(tmp_path, max_steps=2, learning_rate=1e-2),
        train_dataset=dataset,
        data_collator=padding_collator(tokenizer),
        blocks=blocks,
    ).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {n for n in trains if not any(f"layers.{block}." in n for block in frozen)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains


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


def test_safe_lora_trains_then_projects(tiny_model, dataset, tokenizer, tmp_path):
    aligned, base = aligned_and_base(tiny_model)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def train(trainer_class, **own):
        model = lora_model(copy.deepcopy(aligned))
        set_seed(0)
        trainer = trainer_class(
            model,
            arguments(tmp_path, max_steps=2, learning_rate=1e-2),
            train_dataset=dataset,
            data_collator=padding_collator(tokenizer),
            **own,
        )
        trainer.train()
        return trainer

    plain = train(Trainer).model
    safe = train(SafeLoRATrainer, base=tmp_path / "base", threshold=1.0)
    expected = project_update(plain, aligned, base, threshold=1.0)
    assert safe.cosines == pytest.approx(expected, abs=1e-5)
    for ours, theirs in zip(safe.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
