"""The gradient of a trainer's first optimiser step, to compare with a definition in float64."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback, set_seed

from procon.data import padding_collator
from procon.training import ProConConfig

LORA = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")


def perturb(model: torch.nn.Module, seed: int = 5) -> None:
    """Move what trains off the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


class Gradients(TrainerCallback):
    """Keeps the gradient of each optimiser step, having moved the model off its start when training begins."""

    def __init__(self, move: bool = True):
        self.move, self.steps = move, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.move:
            perturb(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def arguments(folder, **settings) -> ProConConfig:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 1,
        "max_grad_norm": 0,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "procon_schedule": "0",
    }
    return ProConConfig(**{**defaults, **settings})


def first_step(trainer_class, model, dataset, tokenizer, folder, *, collator=None, accepts=True, **settings) -> dict:
    """Gradient of the first optimiser step, of all eight samples."""
    own = {name: settings.pop(name) for name in list(settings) if name not in ProConConfig.__dataclass_fields__}
    callback = Gradients()
    set_seed(0)
    trainer = trainer_class(
        model,
        arguments(folder, **settings),
        train_dataset=dataset,
        data_collator=collator or padding_collator(tokenizer),
        callbacks=[callback],
        **own,
    )
    trainer.model_accepts_loss_kwargs = accepts
    trainer.train()
    return callback.steps[0]


def lora_model(model) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(model, LORA)


def double_model(tiny_model, kind: str):
    """All weights, a fresh adapter, or one that is trained further; float64, where differences are exact enough."""
    model = tiny_model()
    if kind != "full":
        model = lora_model(model)
    if kind == "continued":
        perturb(model, seed=9)
    return model.double()


def gradient(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    """fp32 sums of the loss stand against float64 ones: a few of its roundings each."""
    assert ours.keys() >= theirs.keys()
    flat, other = (torch.cat([g[name].flatten() for name in theirs]) for g in (ours, theirs))
    assert other.norm() > 1e-4
    assert (flat - other).norm() <= relative * other.norm()


ACCUMULATION = [
    {"per_device_train_batch_size": 8},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "accepts": False},
]
