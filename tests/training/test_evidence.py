"""Does the constraint act as much as it says? Noise in the forward, micro-batches without it, no batches at all."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from procon import ProCon, ProConSettings
from procon.constraint import ProjectionConstraint
from procon.data import padding_collator
from procon.errors import ProConError
from procon.integrations import ConstrainedForward, ProConCallback
from procon.models import find_decoder

LORA = {"r": 2, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def by_callback(tiny_model, tokenizer, samples, random_directions, tmp_path):
    """``by_callback(model=..., callbacks=(...), **settings)``: someone's Trainer with our callback."""

    def make(model=None, *, callbacks=(), **settings):
        model = tiny_model() if model is None else model
        quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "max_steps": 2}
        args = TrainingArguments(str(tmp_path), **{**quiet, "per_device_train_batch_size": 2, **settings})
        return Trainer(
            model,
            args,
            train_dataset=Dataset.from_list(samples),
            data_collator=padding_collator(tokenizer),
            callbacks=[ProConCallback(random_directions(model), terms="tokens"), *callbacks],
        )

    return make


#: Anchors of training tokens, and whether there are probes.
RECORDED, LIVE = {"procon_terms": "tokens"}, {"procon_anchors": "live", "procon_terms": "tokens"}
PROBES = {"procon_terms": "probes"}


@pytest.fixture
def constrained(tiny_model, tokenizer, samples, random_directions, tmp_path):
    """``constrained(model)``: a constrained forward of it, and a batch."""

    def make(model):
        pad, settings = padding_collator(tokenizer), ProConSettings(schedule="0.1", scope="response", terms="tokens")
        procon = ProCon(model, tokenizer, settings, random_directions(model), folder=tmp_path, progress=False)
        procon.prepare(torch.utils.data.DataLoader(samples, 4, collate_fn=pad))
        procon.detach()
        return ConstrainedForward(procon), pad(samples[:4])

    return make


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "from their anchors" in record.getMessage()]


class Moves(TrainerCallback):
    """Trains another model than the one that the anchors are of."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            find_decoder(model).blocks[0].mlp.down_proj.weight.mul_(1.1)


NOISE = {
    "attention dropout": {"model": {"attention_dropout": 0.1}},
    "another model": {"callbacks": [Moves()]},
    "live": {"model": {"attention_dropout": 0.1}, **LIVE},
}


@pytest.mark.parametrize("door", ["trainer", "callback", "forward"])
@pytest.mark.parametrize("case", NOISE)
def test_anchors_of_another_forward_are_told_once(
    make_trainer, by_callback, constrained, tiny_model, caplog, case, door
):
    settings = {**RECORDED, **NOISE[case]}
    model, callbacks = tiny_model(**settings.pop("model", {})), settings.pop("callbacks", [])
    if door == "trainer":
        run = make_trainer("Trainer", "procon_s", model=model, save_strategy="no", **settings)
        for callback in callbacks:
            run.add_callback(callback)
        run.train()
    elif door == "callback":
        by_callback(model, callbacks=callbacks, max_steps=3).train()
    else:
        attached, batch = constrained(model)
        for callback in callbacks:
            callback.on_train_begin(None, None, None, model)
        with attached:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
            for _ in range(3):
                model.train()(**batch).loss.backward()
                optimizer.step()
    assert len(told(caplog)) == 1


QUIET = {
    "float32": {},
    "absolute": {"procon_penalty": "absolute", "procon_scope": "all"},
    "eager attention": {"model": {"attn_implementation": "eager"}},
    "bfloat16 weights": {"dtype": torch.bfloat16},
    "autocast": {"bf16": True, "use_cpu": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "accumulation": {"gradient_accumulation_steps": 2},
    "LoRA with dropout": {"lora": LoraConfig(**LORA, lora_dropout=0.5)},
    "live": LIVE,
    "packed": {"base": "SFTTrainer", "packing": True, "max_length": 64},
    "a late start": {"schedule": "0@2steps,0.2"},
    "probes from the first step on": {"procon_terms": "both", "procon_probe_every": 1},
}


@pytest.mark.parametrize("case", QUIET)
def test_rounding_is_no_noise(make_trainer, tiny_model, caplog, case):
    settings = {**RECORDED, "base": "Trainer", "schedule": "0.2", **QUIET[case]}
    model = tiny_model(**settings.pop("model", {})).to(settings.pop("dtype", torch.float32))
    base, schedule = settings.pop("base"), settings.pop("schedule")
    run = make_trainer(base, schedule, model=model, save_strategy="no", **settings)
    run.train()
    assert not told(caplog)
    assert not run.procon.evidence.departure > 0.5  # an eighth of what is told; NaN of a late start


@pytest.mark.parametrize("anchors", [RECORDED, LIVE, PROBES], ids=["recorded", "live", "probes"])
@pytest.mark.parametrize("base", ["Trainer", "SFTTrainer"])
def test_noise_on_the_embeddings_is_refused(make_trainer, base, anchors):
    with pytest.raises(ProConError, match="neftune_noise_alpha is 5, and noise"):
        make_trainer(base, "procon_s", neftune_noise_alpha=5.0, **anchors)
    make_trainer(base, "0", neftune_noise_alpha=5.0)


def test_noise_on_the_embeddings_is_refused_in_the_callback(by_callback):
    with pytest.raises(ProConError, match="neftune_noise_alpha is 5, and noise"):
        by_callback(neftune_noise_alpha=5.0).train()


def test_noise_that_a_loop_of_ones_own_adds_is_refused(constrained, tiny_model):
    attached, _ = constrained(model := tiny_model())
    handle = activate_neftune(model, 5.0)
    with pytest.raises(ProConError, match="neftune_noise_alpha is 5, and noise"):
        attached.attach()
    deactivate_neftune(model, handle)
    attached.attach().detach()


def rests(kind: type) -> type:
    """``kind`` with the model in evaluation mode in all micro-batches but each fourth."""

    class Rests(kind):
        calls = 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.calls += 1
            model.train(self.calls % 4 == 0)
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return loss if model.training else outputs.logits.square().mean()

    return Rests


@pytest.mark.parametrize("door", ["trainer", "callback"])
def test_micro_batches_in_evaluation_mode_are_not_left_out(make_trainer, by_callback, door):
    accumulated = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    if door == "trainer":
        run = make_trainer("Trainer", "procon_s", save_strategy="no", **RECORDED, **accumulated)
    else:
        run = by_callback(**accumulated)
    run.__class__ = rests(type(run))
    with pytest.raises(ProConError, match="3 of 4 micro-batches of this optimiser step have no gradient"):
        run.train()


def test_a_loop_of_ones_own_in_evaluation_mode_is_stopped(constrained, tiny_model):
    attached, batch = constrained(model := tiny_model())
    with attached:
        model.train()(**batch).loss.backward()
        loss = model.eval()(**batch).loss  # to look at it is harmless
        with pytest.raises(ProConError, match="without a training forward: the model was in evaluation mode"):
            loss.backward()


@pytest.mark.parametrize("anchors", [RECORDED, PROBES], ids=["recorded", "probes"])
def test_an_adapter_on_the_embeddings_is_told_of(make_trainer, caplog, anchors):
    lora = LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]})
    make_trainer("Trainer", "procon_s", lora=lora, save_strategy="no", max_steps=2, **anchors).train()
    found = [record.getMessage() for record in caplog.records if "embeddings" in record.getMessage()]
    assert len(found) == (anchors is PROBES)


@pytest.mark.parametrize("door", ["trainer", "callback"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_without_batches_says_so(make_trainer, by_callback, door, accumulation):
    settings = {"per_device_train_batch_size": 16, "dataloader_drop_last": True, "save_strategy": "no"}
    settings["gradient_accumulation_steps"] = accumulation
    run = make_trainer("Trainer", "procon_s", **settings) if door == "trainer" else by_callback(**settings)
    with pytest.raises(ProConError, match=r"no batch was made of the [48] rows of the training set"):
        run.train()


@pytest.mark.parametrize("rate", [0.47, 0.5, None, "high"])
def test_directions_of_a_model_that_rarely_refuses_are_told_of(random_directions, tiny_model, recwarn, rate):
    found = replace(random_directions(tiny_model()), provenance={"refusal_rate": rate})
    ProjectionConstraint(found)
    told = [str(warning.message) for warning in recwarn if "of malicious prompts" in str(warning.message)]
    assert [text[:44] for text in told] == ["the model refuses 47% of malicious prompts, " for _ in told]
    assert len(told) == (rate == 0.47)
