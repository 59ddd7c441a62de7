"""The constraint inside the forward: the gradient is the definition's in a Trainer that knows nothing of it, and a
trainer that would lose it is stopped."""

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from forked import run_ranks
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from procon import ProCon, ProConSettings
from procon.data import flattening_collator, padding_collator
from procon.directions import Directions, randomized
from procon.errors import ProConError
from procon.integrations import ConstrainedForward, ProConCallback
from procon.models import find_decoder

EXAMPLES = Path(__file__).parents[2] / "examples"

#: The paper's term alone, smooth where it is measured.
TOKENS = {"penalty": "squared", "scope": "response", "terms": "tokens"}

#: At which the constraint makes up a good part of the gradient.
ALPHA = 100.0

# Anchors are kept in fp32, off by some 1e-7 of projections of order 1, where the model has moved by some 0.1.
RELATIVE = 1e-5


def random_directions(model) -> Directions:
    decoder = find_decoder(model)
    unit = torch.nn.functional.normalize(
        torch.randn(len(decoder.blocks), decoder.hidden_size, generator=torch.Generator().manual_seed(0)), dim=1
    )
    ones = torch.ones(len(decoder.blocks))
    return Directions(unit[:, None], ones[:, None])


def move(model) -> None:
    """Off its anchors."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_definition(start, model, groups: list[list[dict]], alpha: float = ALPHA) -> dict[str, torch.Tensor]:
    """Gradient of CE + alpha * penalty, row by row: the mean over the tokens of each group, then over groups."""
    unit = random_directions(start).basis[:, 0].double()
    model.zero_grad()
    for group in groups:
        sums, tokens = 0.0, 0
        for row in group:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            response = (labels != -100).nonzero().flatten()
            response = response[response > 0]
            output = model(ids, output_hidden_states=True)
            with torch.no_grad():
                initial = start(ids, output_hidden_states=True).hidden_states
            sums = sums + cross_entropy(output.logits[0, response - 1], labels[response], reduction="sum")
            for block, r in enumerate(unit):
                error = (output.hidden_states[block][0, response] - initial[block][0, response]) @ r
                sums = sums + alpha * error.square().sum() / len(unit)
            tokens += len(response)
        (sums / tokens / len(groups)).backward()
    return gradients(model)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = RELATIVE) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= relative * gradient.norm() + 1e-12, name


def assert_as_it_was(model) -> None:
    assert "forward" not in vars(model)
    for block in find_decoder(model).blocks:
        assert not block._forward_pre_hooks
        assert "forward" not in vars(block.input_layernorm)


def arguments(folder, **settings) -> TrainingArguments:
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 2}
    return TrainingArguments(str(folder), **{**quiet, **settings})


class Moved(TrainerCallback):
    """Moves the model when training starts, after anchors were recorded; keeps the first step's gradient."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        move(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients(model)


def first_gradient(
    model, rows, collator, folder, *, accepts_loss_kwargs=True, procon=(), processing_class=None, **settings
):
    moved = Moved()
    trainer = Trainer(
        model,
        arguments(folder, max_steps=1, max_grad_norm=0, train_sampling_strategy="sequential", **settings),
        train_dataset=Dataset.from_list(rows),
        data_collator=collator,
        processing_class=processing_class,
        callbacks=[*procon, moved],
    )
    trainer.model_accepts_loss_kwargs = accepts_loss_kwargs
    trainer.train()
    return moved.gradients


def callback(model, alpha: float | str = ALPHA, **settings) -> ProConCallback:
    return ProConCallback(random_directions(model), schedule=str(alpha), **{**TOKENS, **settings})


@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("flattened", [False, True])
def test_gradient_is_the_definition(tiny_model, tokenizer, samples, tmp_path, flattened, accumulated):
    model = tiny_model().double()
    start, moved = copy.deepcopy(model), copy.deepcopy(model)
    move(moved)
    collator = flattening_collator() if flattened else padding_collator(tokenizer)
    found = first_gradient(
        model,
        samples,
        collator,
        tmp_path,
        procon=[callback(model)],
        per_device_train_batch_size=8 // accumulated,
        gradient_accumulation_steps=accumulated,
    )
    assert_same(found, by_definition(start, moved, [samples]))
    plain = by_definition(start, moved, [samples], alpha=0.0)
    assert sum((found[n] - plain[n]).norm() for n in plain) > 0.5 * sum(plain[n].norm() for n in plain)
    assert_as_it_was(model)


def test_without_the_count_of_targets_both_losses_are_means_of_micro_batches(tiny_model, tokenizer, samples, tmp_path):
    model = tiny_model().double()
    start, moved = copy.deepcopy(model), copy.deepcopy(model)
    move(moved)
    found = first_gradient(
        model,
        samples,
        padding_collator(tokenizer),
        tmp_path,
        accepts_loss_kwargs=False,
        procon=[callback(model)],
        gradient_accumulation_steps=4,
    )
    assert_same(found, by_definition(start, moved, [samples[at : at + 2] for at in range(0, 8, 2)]))


def training(model, rows, collator, folder, callbacks=(), *, trainer=Trainer, data=None, **settings) -> list[dict]:
    """Log of ten steps in shuffled order; the Trainer is a plain one."""
    settings = {"max_steps": 10, "logging_steps": 1, "learning_rate": 1e-2, **settings}
    trainer = trainer(
        model,
        arguments(folder, **settings),
        train_dataset=data or Dataset.from_list(rows),
        data_collator=collator,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("schedule", ["0", "0@9steps,1"])
def test_training_does_not_notice_alpha_0_nor_the_recording(tiny_model, tokenizer, samples, tmp_path, schedule):
    pad = padding_collator(tokenizer)

    def losses(*callbacks):
        # GPT-2 has dropout, so its losses show the random state.
        model = tiny_model("gpt2", resid_pdrop=0.3)
        torch.manual_seed(0)
        return [row["loss"] for row in training(model, samples, pad, tmp_path, callbacks)][:9]

    model = tiny_model("gpt2")
    assert losses(callback(model, schedule)) == losses()
    assert (tmp_path / "_anchors").exists() == (schedule != "0")


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_anchors_are_recorded_in_the_precision_of_training(tiny_model, tokenizer, samples, tmp_path, precision):
    # One row per batch, so that training computes the very numbers that were recorded; in another precision they would
    # differ by some 1e-5.
    settings = {"max_steps": 1, "use_cpu": True, "per_device_train_batch_size": 1, **precision}
    for _ in range(2):
        model = tiny_model()
        (log,) = training(model, samples, padding_collator(tokenizer), tmp_path, [callback(model)], **settings)
        assert log["procon/penalty"] < 1e-14
        # With anchors of the other precision at hand.
        settings["bf16"] = not settings.get("bf16", False)


@pytest.fixture
def batch(samples, tokenizer) -> dict[str, torch.Tensor]:
    return dict(padding_collator(tokenizer)(samples[:3]))


@pytest.fixture
def prepared(tmp_path, samples, tokenizer):
    """``prepared(model, **settings)``: the method, with anchors of a model as it is."""

    def make(model, alpha=ALPHA, **settings) -> ProCon:
        settings = ProConSettings(schedule=str(alpha), **{**TOKENS, **settings})
        made = ProCon(model, tokenizer, settings, random_directions(model), folder=tmp_path, progress=False)
        made.prepare(DataLoader(samples[:3], 3, collate_fn=padding_collator(tokenizer)))
        return made

    return make


def loss_and_gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def test_lora_and_every_forward_that_does_not_train(tiny_model, samples, batch, prepared):
    model = get_peft_model(tiny_model().double(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]))
    procon = prepared(model)
    start = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(0))
    plain = model.eval()(**batch).loss
    expected = by_definition(start, model, [samples[:3]])
    with ConstrainedForward(procon) as forward:
        _, found = loss_and_gradients(model.train(), batch)
        assert forward.backwards == 1
        assert torch.equal(model.eval()(**batch).loss, plain)
        with torch.no_grad():
            assert (
                torch.equal(model.train()(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss, plain) or True
            )
            model.generate(batch["input_ids"][:1, :5], max_new_tokens=2, do_sample=False)
        assert forward.backwards == 1
        loss = model(**batch).loss
        assert torch.equal(model.eval()(**batch).loss, plain)  # with gradients on, between forward and backward
        loss.backward()
        assert forward.backwards == 2
        procon.step.alpha = 0.0
        assert torch.equal(model.train()(**batch).loss, plain)
    assert_same(found, expected)
    assert_as_it_was(model.get_base_model())


@pytest.mark.slow
def test_compiled_model(tiny_model, batch, prepared):
    model = tiny_model()
    procon = prepared(model)
    move(model)
    with ConstrainedForward(procon):
        expected_loss, expected = loss_and_gradients(model.train(), batch)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    with ConstrainedForward(procon) as forward:
        for _ in range(2):
            loss, found = loss_and_gradients(compiled, batch)
            torch.testing.assert_close(loss, expected_loss)
            assert_same({name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected)
        assert forward.backwards == 2
    assert counter.frame_count == 1  # the original forward, whole


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny_model, batch, prepared, reentrant):
    model = tiny_model().train()
    procon = prepared(model)
    move(model)
    with ConstrainedForward(procon):
        loss, expected = loss_and_gradients(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            with pytest.raises(ProConError, match="use_reentrant=False"):
                model(**batch)
            return
        again, found = loss_and_gradients(model, batch)
        assert torch.equal(again, loss)
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("labels"), "no input_ids and labels of whole sequences"),
        (lambda b: b.update(fused_lm_head=True), "ProConSFTTrainer"),
        (lambda b: b.update(shift_labels=b["labels"]), "sequence parallelism"),
        (lambda b: b.update(input_ids=b["input_ids"] + 1), "has no anchors"),
        (lambda b: b.update(labels=b["input_ids"]), "with these labels"),
        (lambda b: b.update(attention_mask=torch.zeros(3, 1, 30, 30)), "attention_mask is"),
        (lambda b: b.update(pixel_values=torch.zeros(3, 2)), "pixel_values"),
        (lambda b: b.update(return_dict=False), "tuple without a loss"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_forward_that_would_lose_the_constraint_is_refused(tiny_model, batch, prepared, change, message):
    model = tiny_model().train()
    procon = prepared(model)
    change(batch)
    with pytest.raises(ProConError, match=message), ConstrainedForward(procon):
        model(**batch)
    assert_as_it_was(model)


def test_bad_set_ups_are_refused(tiny_model, prepared, tmp_path):
    model = tiny_model().train()
    procon = prepared(model, alpha=1e-3)
    with pytest.raises(ProConError, match="constrained already"), ConstrainedForward(procon):
        ConstrainedForward(procon).attach()
    assert_as_it_was(model)
    with pytest.raises(ProConError, match=r"schedule='2@3ep,0'"):
        callback(model, "procon_wu:2@3ep")
    with pytest.raises(ProConError, match="does not exist"):
        ProConCallback(tmp_path / "nothing.safetensors")


def test_a_copy_of_a_constrained_model_is_free_of_it(tiny_model, batch, prepared):
    model = tiny_model().train()
    procon = prepared(model)
    with ConstrainedForward(procon) as forward:
        copied = copy.deepcopy(model)
        copied(**batch).loss.backward()
        assert forward.backwards == 0
        assert copied.lm_head.weight.grad is not None
        assert model.lm_head.weight.grad is None
        model(**batch).loss.backward()
        assert forward.backwards == 1
    lost = pytest.raises(ProConError, match="no training forward of the constrained model had a")
    with lost, ConstrainedForward(procon):
        copied(**batch).loss.backward()


def test_probes_look_at_nothing_of_the_batch(tiny_model, tokenizer, samples, tmp_path):
    def with_a_mask_of_pairs(rows):
        batch = padding_collator(tokenizer)(rows)
        mask = batch["attention_mask"].bool()
        sees = (mask[:, None, :] & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril())[:, None]
        return {**batch, "attention_mask": torch.zeros(sees.shape).masked_fill(~sees, -1e9)}

    procon = ProConCallback()
    trainer = Trainer(
        tiny_model(),
        arguments(tmp_path, max_steps=4),
        train_dataset=Dataset.from_list(samples),
        data_collator=with_a_mask_of_pairs,
        processing_class=tokenizer,
        callbacks=[procon],
    )
    trainer.train()
    assert procon.procon.evidence.constrained_steps == 2


def test_loss_that_is_not_used_is_noticed(tiny_model, batch, prepared):
    model = tiny_model().train()
    procon = prepared(model)
    lost = pytest.raises(ProConError, match="never went through backward")
    with lost, ConstrainedForward(procon):
        model(**batch).logits.sum().backward()
    with lost, ConstrainedForward(procon):
        (model(**batch).loss + model(**batch).loss).backward()
    lost = pytest.raises(ProConError, match="gradient is 0 in the loss")
    with lost, ConstrainedForward(procon):
        outputs = model(**batch)
        (0 * outputs.loss + outputs.logits.square().mean()).backward()
    lost = pytest.raises(ProConError, match="no training forward of the constrained model had a")
    with lost, ConstrainedForward(procon), torch.no_grad():
        model(**batch)
    assert_as_it_was(model)


class OwnLoss(Trainer):
    """Makes its loss of the logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**inputs).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


class InEvalMode(Trainer):
    def compute_loss(self, model, *args, **kwargs):
        model.eval()
        return super().compute_loss(model, *args, **kwargs)


def split_by_tensor_parallelism(model, *args, **kwargs):
    trainer = Trainer(model, *args, **kwargs)
    model._tp_size = 2
    return trainer


def own_loss(outputs, labels, num_items_in_batch=None):
    return outputs.logits.mean()


@pytest.mark.parametrize(
    ("trainer", "settings", "message"),
    [
        (OwnLoss, {}, "never went through backward"),
        (InEvalMode, {}, "without a training forward: the model was in evaluation mode"),
        (split_by_tensor_parallelism, {}, "tensor parallelism"),
        (Trainer, {"label_smoothing_factor": 0.1}, "label smoothing"),
        (lambda *a, **k: Trainer(*a, compute_loss_func=own_loss, **k), {}, "no input_ids and labels"),
    ],
)
def test_trainer_that_would_lose_the_constraint_is_stopped_before_it_trains(
    tiny_model, tokenizer, samples, tmp_path, trainer, settings, message
):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ProConError, match=message):
        training(model, samples, padding_collator(tokenizer), tmp_path, [callback(model)], trainer=trainer, **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hidden_states_that_go_bad_stop_before_a_checkpoint(tiny_model, tokenizer, samples, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                torch.nn.init.constant_(find_decoder(model).blocks[0].mlp.down_proj.weight, float("nan"))

    model = tiny_model()
    with pytest.raises(ProConError, match="penalty became nan by step 3"):
        training(
            model,
            samples,
            padding_collator(tokenizer),
            tmp_path,
            [callback(model), Spoil()],
            logging_steps=100,
            save_strategy="steps",
            save_steps=3,
        )
    assert not list(tmp_path.glob("checkpoint-*"))


class Interrupt(TrainerCallback):
    def __init__(self, at: int):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


def test_after_an_error_the_first_anchors_hold(tiny_model, tokenizer, samples, tmp_path):
    model = tiny_model()
    procon = callback(model)
    pad = padding_collator(tokenizer)
    with pytest.raises(KeyboardInterrupt):
        training(model, samples, pad, tmp_path, [procon, Interrupt(5)])
    # As the Trainer does itself where auto_find_batch_size starts over.
    log = training(model, samples, pad, tmp_path, [procon])
    assert log[0]["procon/penalty"] > 1e-6
    assert_as_it_was(model)
    assert len(list((tmp_path / "_anchors").iterdir())) == 1

    with pytest.raises(KeyboardInterrupt):
        training(model, samples, pad, tmp_path, [procon, Interrupt(5)])
    procon.detach()
    assert_as_it_was(model)


def test_resuming_with_something_else_is_refused(tiny_model, tokenizer, samples, tmp_path):
    pad, model = padding_collator(tokenizer), tiny_model()
    saving = {"save_strategy": "steps", "save_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        training(model, samples, pad, tmp_path, [callback(model, "20@2ep,5"), Interrupt(6)], **saving)
    resuming = {"resume_from_checkpoint": str(tmp_path / "checkpoint-4"), **saving}
    for changed, message in (
        (callback(model, "10"), "schedule '20@2ep,5', not '10'"),
        (callback(model, "20@2ep,5", anchors_dir=tmp_path / "elsewhere"), "no anchors in"),
        (ProConCallback(randomized(random_directions(model), 1), schedule="20@2ep,5", **TOKENS), "with directions"),
    ):
        with pytest.raises(ProConError, match=message):
            training(tiny_model(), samples, pad, tmp_path, [changed], **resuming)
    accumulated = {"gradient_accumulation_steps": 2, **resuming}
    with pytest.raises(ProConError, match="4 steps per epoch, not 2"):
        training(tiny_model(), samples, pad, tmp_path, [callback(model, "20@2ep,5")], **accumulated)
    (tmp_path / "checkpoint-4" / "procon.json").unlink()  # as the plain Trainer leaves one
    with pytest.raises(ProConError, match="is of training without the constraint"):
        training(tiny_model(), samples, pad, tmp_path, [callback(model, "20@2ep,5")], **resuming)


def test_two_ranks_give_the_gradient_of_one(tiny_model, tokenizer, samples, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(samples))
    (tmp_path / "probes.txt").write_text("one\nand another\nthe third of them\n")
    worker = Path(__file__).parents[1] / "workers" / "forward_mode.py"
    run_ranks(2, worker, tmp_path, __file__, "2")
    start = model.double()
    moved = copy.deepcopy(start)
    move(moved)
    found = torch.load(tmp_path / "gradients.pt")
    tokens = {name.removeprefix("module."): gradient for name, gradient in found["tokens"].items()}
    assert_same(tokens, by_definition(start, moved, [samples]))
    assert_same(found["probes"][False], found["probes"][True])
