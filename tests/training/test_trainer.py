"""The trainer: the penalty scales as CE does, alpha 0 is the Trainer it extends, and bad set-ups stop."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from procon.data import flattening_collator, padding_collator
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import find_decoder
from procon.training import ProConConfig, ProConMixin, ProConTrainer


@pytest.fixture
def dataset(samples) -> Dataset:
    return Dataset.from_list(samples)


def random_directions(model) -> Directions:
    decoder = find_decoder(model)
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(
        torch.randn(len(decoder.blocks), decoder.hidden_size, generator=generator), dim=1
    )
    ones = torch.ones(len(decoder.blocks))
    return Directions(unit[:, None], ones[:, None])


def constrained_trainer(model, dataset, collator, folder, *, callbacks=(), **settings) -> ProConTrainer:
    """A ProConTrainer of training tokens, that writes no checkpoints and prints nothing unless told to."""
    defaults = {"procon_terms": "tokens", "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    return ProConTrainer(
        model,
        ProConConfig(output_dir=str(folder), **{**defaults, **settings}),
        directions=random_directions(model),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=list(callbacks),
    )


class Gradient(TrainerCallback):
    """Moves the model off its anchors when training starts, and keeps the gradient of the first optimiser step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def first_step(
    model, dataset, collator, folder, schedule: str, *, accepts_loss_kwargs: bool = True, **arguments
) -> tuple[torch.Tensor, float | None]:
    """Gradient and logged penalty of the first optimiser step."""
    callback = Gradient()
    trainer = constrained_trainer(
        model,
        dataset,
        collator,
        folder,
        callbacks=[callback],
        procon_schedule=schedule,
        max_steps=1,
        max_grad_norm=0,
        logging_steps=1,
        **arguments,
    )
    trainer.model_accepts_loss_kwargs = accepts_loss_kwargs
    trainer.train()
    return callback.flat, trainer.state.log_history[0].get("procon/penalty")


def aux_step(tiny_model, *rest, **settings) -> tuple[torch.Tensor, float]:
    """The penalty and its own gradient: with it minus without, in float64, where the difference is exact enough."""
    constrained, penalty = first_step(tiny_model().double(), *rest, "procon_s:2", **settings)
    plain, _ = first_step(tiny_model().double(), *rest, "0", **settings)
    return constrained - plain, penalty


def assert_same_step(one: tuple[torch.Tensor, float], two: tuple[torch.Tensor, float]) -> None:
    (gradient, penalty), (other_gradient, other_penalty) = one, two
    assert gradient.norm() > 1e-3
    assert (other_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    assert other_penalty == pytest.approx(penalty, rel=1e-5)


@pytest.mark.parametrize("accepts_loss_kwargs", [True, False])
def test_gradient_accumulation_leaves_the_penalty_alone(tiny_model, dataset, tokenizer, tmp_path, accepts_loss_kwargs):
    def step(accumulated: int) -> tuple[torch.Tensor, float]:
        return aux_step(
            tiny_model,
            dataset,
            padding_collator(tokenizer),
            tmp_path,
            per_device_train_batch_size=8 // accumulated,
            gradient_accumulation_steps=accumulated,
            accepts_loss_kwargs=accepts_loss_kwargs,
        )

    whole = step(1)
    for accumulated in (2, 4, 8):
        assert_same_step(whole, step(accumulated))


def test_padded_flattened_and_single_rows_are_one_step(tiny_model, dataset, tokenizer, tmp_path):
    padded, flat = padding_collator(tokenizer), flattening_collator()
    whole = aux_step(tiny_model, dataset, padded, tmp_path / "padded", per_device_train_batch_size=8)
    flattened = aux_step(tiny_model, dataset, flat, tmp_path / "flat", per_device_train_batch_size=8)
    single = aux_step(
        tiny_model, dataset, padded, tmp_path / "one", per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    # Each set-up records its own anchors in fp32, off by an ulp or so of projections of order 1.
    assert_same_step(whole, flattened)
    assert_same_step(whole, single)


def final_weights(trainer_class, arguments, model, dataset, tokenizer, **extra) -> dict[str, torch.Tensor]:
    set_seed(0)
    trainer = trainer_class(model, arguments, train_dataset=dataset, data_collator=padding_collator(tokenizer), **extra)
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_alpha_zero_is_the_trainer_bitwise(tiny_model, dataset, tokenizer, tmp_path):
    common = {
        "output_dir": str(tmp_path),
        "num_train_epochs": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    plain = final_weights(Trainer, TrainingArguments(**common), tiny_model(), dataset, tokenizer)
    ours = final_weights(ProConTrainer, ProConConfig(**common, procon_schedule="0"), tiny_model(), dataset, tokenizer)
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert not list(tmp_path.iterdir())


def test_warmup_is_extra_and_is_logged(tiny_model, dataset, tokenizer, tmp_path):
    model = tiny_model()
    trainer = constrained_trainer(
        model,
        dataset,
        padding_collator(tokenizer),
        tmp_path,
        procon_schedule="procon_wu:1@1ep",
        num_train_epochs=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "procon/alpha" in row]
    assert trainer.state.global_step == 12
    assert [row["procon/alpha"] for row in rows] == [1.0] * 4 + [0.0] * 8
    penalties = [row.get("procon/penalty") for row in rows]
    assert penalties[0] == pytest.approx(0, abs=1e-9)  # the model is at its anchors
    assert all(penalty > 1e-6 for penalty in penalties[1:4])
    assert penalties[4:] == [None] * 8
    assert not any(block._forward_pre_hooks for block in find_decoder(model).blocks)


def test_constraint_holds_projections(tiny_model, dataset, tokenizer, tmp_path):
    """What it is for: under the constraint the last penalty is far below what plain training drifts to."""

    def final_penalty(schedule: str) -> float:
        set_seed(0)
        model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]))
        trainer = constrained_trainer(
            model,
            dataset,
            padding_collator(tokenizer),
            tmp_path,
            procon_schedule=schedule,
            num_train_epochs=20,
            per_device_train_batch_size=8,
            learning_rate=2e-2,
            logging_steps=1,
        )
        trainer.train()
        return [row["procon/penalty"] for row in trainer.state.log_history if "procon/penalty" in row][-1]

    # An alpha this small measures drift without hindering it.
    assert final_penalty("100") < 0.1 * final_penalty("1e-12")


def test_a_class_that_asks_the_trainer_first_is_refused():
    class Mine(Trainer):
        pass

    with pytest.raises(ProConError, match="class Wrong has transformers' Trainer before ProConMixin"):

        class Wrong(Mine, ProConMixin):
            pass

    class Right(Mine, ProConTrainer):  # asks Mine, then ProConMixin, then Trainer
        pass


def test_nan_during_training_stops_before_a_checkpoint(tiny_model, dataset, tokenizer, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                torch.nn.init.constant_(find_decoder(model).blocks[0].mlp.down_proj.weight, float("nan"))

    trainer = constrained_trainer(
        tiny_model(),
        dataset,
        padding_collator(tokenizer),
        tmp_path,
        callbacks=[Spoil()],
        procon_schedule="procon_s",
        num_train_epochs=2,
        per_device_train_batch_size=2,
        logging_steps=100,
        save_strategy="steps",
        save_steps=3,
    )
    with pytest.raises(ProConError, match=r"penalty became nan by step 3.*NaN or infinite"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fused_and_plain_norms_end_at_the_same_loss(tiny_model, dataset, tokenizer, tmp_path, family):
    def losses(fuse: str) -> list[float]:
        trainer = constrained_trainer(
            tiny_model(family),
            dataset,
            padding_collator(tokenizer),
            tmp_path / fuse,
            procon_schedule="procon_s:1",
            procon_penalty="squared",  # smooth: rounding does not turn a gradient round
            max_steps=50,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
        )
        trainer.procon.tokens.fuse = fuse
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    fused, plain = losses("auto"), losses("never")
    assert len(fused) == 50
    assert plain[-1] < 0.9 * plain[0]
    assert fused != plain  # another order of rounding: not the same code twice
    assert fused[-1] == pytest.approx(plain[-1], rel=1e-4)


def test_resume_with_other_settings_is_refused(tiny_model, dataset, tokenizer, tmp_path):
    def trainer(**settings):
        defaults = {"procon_schedule": "procon_s", "num_train_epochs": 1, "per_device_train_batch_size": 2}
        saving = {"save_strategy": "steps", "save_steps": 2}
        collator = padding_collator(tokenizer)
        return constrained_trainer(tiny_model(), dataset, collator, tmp_path, **{**defaults, **saving, **settings})

    with pytest.raises(ProConError, match="no complete checkpoint"):
        trainer().train(resume_from_checkpoint=True)
    trainer().train()
    with pytest.raises(ProConError, match=r"was trained with schedule '0.2', not '0.3'"):
        trainer(procon_schedule="procon_s:0.3").train(resume_from_checkpoint=True)
    with pytest.raises(ProConError, match="trained with scope"):
        trainer(procon_scope="response").train(resume_from_checkpoint=True)
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:20])  # as a killed run leaves it
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert json.loads(state.read_text())["global_step"] == 4  # went on from checkpoint-2, and wrote it again
