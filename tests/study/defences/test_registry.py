"""Defences by name: each trains, none takes what it does not know, and what it cannot do it refuses."""

import copy
import inspect
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from benchmarks.study.defences import (
    DEFENCES,
    ConstrainedSFTTrainer,
    FrozenLayersTrainer,
    HiddenStatesTrainer,
    LisaTrainer,
    SafeLoRATrainer,
    SteeringTrainer,
    build_trainer,
    project_update,
)
from procon.data import padding_collator
from procon.errors import ProConError
from procon.schedule import AlphaSchedule
from procon.training import ProConConfig, ProConTrainer

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def config(tmp_path):
    def make(**settings) -> ProConConfig:
        defaults = {
            "output_dir": str(tmp_path),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        return ProConConfig(**{**defaults, **settings})

    return make


@pytest.fixture
def data(samples, tokenizer) -> dict:
    return {
        "train_dataset": Dataset.from_list(samples),
        "data_collator": padding_collator(tokenizer),
        "processing_class": tokenizer,
    }


def needed(model, random_directions, samples) -> dict:
    """All that any defence needs."""
    base = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return {
        "directions": random_directions(model),
        "alignment_dataset": Dataset.from_list(samples[:2]),
        "base": base,
    }


def test_registry():
    for defence in DEFENCES.values():
        assert set(defence.config) <= {f.name for f in fields(ProConConfig)}
        if defence.trainer not in (Trainer, ProConTrainer):
            assert defence.needs <= inspect.signature(defence.trainer.__init__).parameters.keys()
            # In the module's docstring: paper and equation.
            assert "arXiv" in inspect.getmodule(defence.trainer).__doc__


@pytest.mark.parametrize("name", sorted(DEFENCES))
@pytest.mark.parametrize("lora", [True, False])
def test_every_defence_trains(tiny_model, random_directions, samples, config, data, name, lora):
    model = tiny_model()
    given = needed(model, random_directions, samples)
    model = get_peft_model(model, LORA) if lora else model
    if name in ("safe_lora", "safe_merge", "null_space") and not lora:
        with pytest.raises(ProConError, match=r" a LoRA adapter, but .*weight trains"):
            build_trainer(name, model, config(), **given, **data)
        return
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = build_trainer(name, model, config(), **given, **data)
    assert type(trainer) is DEFENCES[name].trainer
    trainer.train()
    extra = AlphaSchedule.parse(DEFENCES[name].configure(config()).procon_schedule).extra_steps(2)
    assert trainer.state.global_step == 2 + extra
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_schedules_are_those_of_the_name_unless_one_is_given(config):
    assert DEFENCES["procon_s"].configure(config()).procon_schedule == "procon_s"
    assert DEFENCES["procon_wu_safe"].configure(config()).procon_schedule == "procon_wu:1@2ep"
    given = config(procon_schedule="procon_s:0.2", procon_scope="all")
    configured = DEFENCES["procon_wu"].configure(given)
    assert (configured.procon_schedule, configured.procon_scope) == ("procon_s:0.2", "all")
    assert DEFENCES["lisa"].configure(config()).procon_schedule == "0"
    assert given.procon_schedule == "procon_s:0.2"
    unchanged = config()
    DEFENCES["lisa"].configure(unchanged)
    assert unchanged.procon_schedule == config().procon_schedule


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("steering", "directions"),
        ("procon_s", "directions"),
        ("lisa", "alignment_dataset"),
        ("safe_lora", "base"),
    ],
)
def test_what_is_needed_and_not_given(tiny_model, random_directions, samples, config, data, name, need):
    model = tiny_model()
    given = {**needed(model, random_directions, samples), need: None}
    with pytest.raises(ProConError, match=f"'{name}' needs {need}"):
        build_trainer(name, model, config(), **given, **data)


@pytest.mark.parametrize(
    ("name", "schedule", "message"),
    [
        ("lisa", "procon_s:0.2", "LisaTrainer has no projection constraint, but procon_schedule is 'procon_s:0.2'"),
        ("procon_wu", "0", "ProConTrainer has a projection constraint, but procon_schedule is '0'"),
    ],
)
def test_a_schedule_that_contradicts_the_defence(tiny_model, config, data, name, schedule, message):
    with pytest.raises(ProConError, match=message):
        build_trainer(name, tiny_model(), config(procon_schedule=schedule), **data)


@pytest.mark.parametrize(
    ("trainer_class", "settings", "message"),
    [
        (FrozenLayersTrainer, {"blocks": (0.5, 0.2)}, "the shares 0.5 to 0.2"),
        (FrozenLayersTrainer, {"blocks": []}, r"frozen blocks are .*, of a model that has 3"),
        (FrozenLayersTrainer, {"blocks": [3]}, "frozen blocks are .3., of a model that has 3"),
        (FrozenLayersTrainer, {"blocks": [0.2, 1, 2]}, "frozen blocks are .0.2, 1, 2.: give two shares of the depth"),
        (FrozenLayersTrainer, {"blocks": ["a", "b"]}, "frozen blocks are .'a', 'b'.: give two shares of the depth"),
        (ConstrainedSFTTrainer, {"betas": ()}, "betas are"),
        (ConstrainedSFTTrainer, {"betas": (1.0, 0.0)}, "betas are .1.0, 0.0."),
        (ConstrainedSFTTrainer, {"compute_loss_func": lambda *_: 0}, "has a loss of its own"),
        (HiddenStatesTrainer, {"alpha": -1.0}, "alpha is -1"),
        (HiddenStatesTrainer, {"alpha": float("nan")}, "alpha is nan"),
        (HiddenStatesTrainer, {"scope": "answers"}, "scope is 'answers'"),
        (HiddenStatesTrainer, {"blocks": [7]}, "the model has 3"),
        (SteeringTrainer, {"strength": 0.0}, "strength is 0"),
        (LisaTrainer, {"user_steps": 0}, "alignment_steps and user_steps are 10 and 0"),
        (LisaTrainer, {"rho": -1.0}, "rho is -1"),
    ],
)
def test_bad_settings(tiny_model, random_directions, samples, config, data, trainer_class, settings, message):
    model = tiny_model()
    extra = {
        SteeringTrainer: {"directions": random_directions(model)},
        LisaTrainer: {"alignment_dataset": Dataset.from_list(samples)},
    }.get(trainer_class, {})
    with pytest.raises(ProConError, match=message):
        trainer_class(model, config(procon_schedule="0"), **extra, **settings, **data)


def test_what_could_not_act_is_refused(tiny_model, random_directions, samples, config, data):
    plain = config(procon_schedule="0")
    only_last = LoraConfig(target_modules=["q_proj"], layers_to_transform=[2], task_type="CAUSAL_LM")
    with pytest.raises(ProConError, match=r"nothing in blocks .0. trains"):
        FrozenLayersTrainer(get_peft_model(tiny_model(), only_last), plain, blocks=[0], **data)
    with pytest.raises(ProConError, match=r"with blocks .2. frozen nothing trains"):
        FrozenLayersTrainer(get_peft_model(tiny_model(), only_last), plain, blocks=[2], **data)
    with pytest.raises(ProConError, match="nothing below a chosen block trains"):
        HiddenStatesTrainer(get_peft_model(tiny_model(), only_last), plain, **data)
    with pytest.raises(ProConError, match="ConstrainedSFTTrainer does not support torch_compile"):
        ConstrainedSFTTrainer(tiny_model(), config(procon_schedule="0", torch_compile=True), **data)
    with pytest.raises(ProConError, match="LisaTrainer does not support model_init"):
        LisaTrainer(None, plain, model_init=lambda: tiny_model(), alignment_dataset=data["train_dataset"], **data)
    with pytest.raises(ProConError, match="has a loss of its own"):
        ConstrainedSFTTrainer(tiny_model(), config(procon_schedule="0", label_smoothing_factor=0.1), **data)
    with pytest.raises(ProConError, match="directions are for 3 blocks of width 32, but the model has 2"):
        SteeringTrainer(tiny_model(num_hidden_layers=2), plain, directions=random_directions(tiny_model()), **data)
    lisa = LisaTrainer(tiny_model(), plain, alignment_dataset=data["train_dataset"], **data)
    with pytest.raises(ProConError, match="LisaTrainer cannot resume"):
        lisa.train(resume_from_checkpoint=True)
    dropping = config(procon_schedule="0", dataloader_drop_last=True)
    lisa = LisaTrainer(tiny_model(), dropping, alignment_dataset=Dataset.from_list(samples[:3]), **data)
    with pytest.raises(ProConError, match="alignment_dataset makes no batch"):
        lisa.train()


def test_what_safe_lora_cannot_project(tiny_model, config, data):
    plain, aligned, base = config(procon_schedule="0"), tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.1

    def adapted(**settings):
        return get_peft_model(
            tiny_model(), LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
        )

    with pytest.raises(ProConError, match="q_proj is the same in the base and the aligned model"):
        SafeLoRATrainer(adapted(), plain, base=aligned, **data)
    with pytest.raises(ProConError, match=r"but .*lm_head.*weight trains"):
        SafeLoRATrainer(adapted(modules_to_save=["lm_head"]), plain, base=base, **data)
    with pytest.raises(ProConError, match=r"magnitude.* trains"):
        SafeLoRATrainer(adapted(use_dora=True), plain, base=base, **data)
    with pytest.raises(ProConError, match="another adapter than one LoRA on a linear layer"):
        project_update(adapted(use_dora=True), aligned, base)
    with pytest.raises(ProConError, match="another adapter than one LoRA on a linear layer"):
        project_update(adapted(target_modules=["embed_tokens"]), aligned, base)
    with pytest.raises(ProConError, match="LlamaForCausalLM has none"):
        project_update(aligned, aligned, base)
    with pytest.raises(ProConError, match=r"has the shape .32, 32., and .64, 64. in the base"):
        project_update(adapted(), aligned, tiny_model(hidden_size=64, head_dim=32))
    with pytest.raises(ProConError, match=r"the base has no layer model.layers.2"):
        project_update(adapted(), aligned, tiny_model(num_hidden_layers=2))


def test_evaluation_is_of_plain_cross_entropy(tiny_model, random_directions, samples, config, data):
    """Whatever a defence trains on."""
    evaluation = Dataset.from_list(samples[:4])
    expected = Trainer(tiny_model(), config(), data_collator=data["data_collator"]).evaluate(evaluation)["eval_loss"]
    for name in ("constrained_sft", "hidden_states", "lisa", "steering", "kl", "safegrad"):
        model = tiny_model()
        trainer = build_trainer(name, model, config(), **needed(model, random_directions, samples), **data)
        assert trainer.evaluate(evaluation)["eval_loss"] == pytest.approx(expected, rel=1e-6), name
