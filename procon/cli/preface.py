"""What ``procon train`` says before the first step: what trains, on what, and whether the constraint is on."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from procon.errors import printable
from procon.models import find_decoder, spread
from procon.training import ProConMixin

_WIDTH, _HEAD = 80, 16


class Preface(TrainerCallback):
    """Prints it as training starts."""

    def __init__(self, trainer: Trainer, model: str) -> None:
        self.trainer = trainer
        self.model = model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            Console().print(Text("\n".join(_lines(describe(self.trainer, self.model)))), soft_wrap=True)


def describe(trainer: Trainer, name: str) -> dict[str, str]:
    """The facts, by what they are about; ``name`` is the model's."""
    args, state, model = trainer.args, trainer.state, trainer.model
    assert model is not None  # noqa: S101  # it trains
    parameters = [(_size(weight), weight.requires_grad) for weight in model.parameters()]
    total, trained = sum(size for size, _ in parameters), sum(size for size, trains in parameters if trains)
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    facts = {
        "model": f"{name}, {_weights(model)}, {_where(model, args)}",
        "trains": f"{trained:,} of {total:,} parameters ({trained / total:.2%}), {_method(model)}",
        "data": f"{_samples(trainer.train_dataset)}, {per_step} per step, {state.max_steps} steps"
        + (f", from step {state.global_step}" if state.global_step else ""),
    }
    return facts | _evaluation(trainer) | _constraint(trainer)


def _weights(model: Any) -> str:
    """Dtypes of the weights that are numbers, and how the others are quantised."""
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters() if weight.is_floating_point()}
    bits = [f"{bits} bits" for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)]
    return " and ".join([*bits, *sorted(dtypes)])


def _where(model: Any, args: TrainingArguments) -> str:
    if devices := spread(model):
        return f"over {', '.join(devices)}"
    return f"on {args.device}" + (f", {args.world_size} processes" if args.world_size > 1 else "")


def _evaluation(trainer: Trainer) -> dict[str, str]:
    args, dataset = trainer.args, trainer.eval_dataset
    if dataset is None or args.eval_strategy == "no":
        return {}
    when = "after each epoch" if args.eval_strategy == "epoch" else f"every {args.eval_steps:g} steps"
    best = "; the best checkpoint is kept" if args.load_best_model_at_end else ""
    return {"evaluation": f"{_samples(dataset)}, {when}{best}"}


def _method(model: Any) -> str:
    configs = getattr(model, "peft_config", None) or {}
    for config in configs.values():
        targets = config.target_modules
        names = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
        if not hasattr(config, "r"):
            return f"{config.peft_type.value} adapter"
        kind = "DoRA" if getattr(config, "use_dora", False) else "LoRA"
        kind = f"rs{kind}" if getattr(config, "use_rslora", False) else kind
        whole = ", ".join(getattr(config, "modules_to_save", None) or ())
        dropout = getattr(config, "lora_dropout", 0)
        return (
            f"{kind} of rank {config.r} on {names}"
            + (f", dropout {dropout:g}" if dropout else "")
            + (f"; {whole} as a whole" if whole else "")
        )
    return "full fine-tuning"


def _size(weight: Any) -> int:
    return int(getattr(weight, "ds_numel", weight.numel()))  # of DeepSpeed's, which is sharded


def _samples(dataset: Any) -> str:
    return f"{len(dataset):,} samples" if hasattr(dataset, "__len__") else "a stream"


def _constraint(trainer: Trainer) -> dict[str, str]:
    if not isinstance(trainer, ProConMixin) or not trainer.procon.active:
        return {"constraint": "none"}
    procon, settings = trainer.procon, trainer.procon.settings
    found = {"constraint": f"alpha {procon.schedule}"}
    if (constraint := procon.constraint) is not None:
        fused, blocks = len(constraint.fused), len(constraint.blocks)
        where = (
            "within their norms" if fused == blocks else f"{fused} of them within a norm, {blocks - fused} ahead of it"
        )
        acting = len(constraint.acting)
        moved = "" if acting == blocks else f"; training moves {acting}"
        source = (
            "from a forward of the starting model on each batch"
            if settings.anchors == "live"
            else f"recorded in {settings.anchors_dir or f'{trainer.args.output_dir}/_anchors'}"
        )
        found |= {
            "training tokens": f"{settings.scope}, penalty {settings.penalty}, units {settings.units}",
            "blocks": f"{blocks} under the constraint, of {len(find_decoder(constraint.model).blocks)}; {where}{moved}",
            "anchors": source,
        }
    if settings.has_probes:
        replies = f" and their replies (up to {settings.probe_reply_tokens} tokens)"
        found["probes"] = (
            f"the last state of {settings.probe_file or 'built-in prompts'}"
            f"{replies if settings.probe_reply_tokens else ''}, {settings.probe_batch} at a time every "
            f"{settings.probe_every} steps, weight {settings.probe_weight:g}"
        )
    return found


def _lines(facts: dict[str, str]) -> list[str]:
    lines = []
    for name, fact in facts.items():
        parts = wrap(printable(fact), _WIDTH - _HEAD, break_on_hyphens=False)
        lines += [f"{name if place == 0 else '':<{_HEAD}}{part}" for place, part in enumerate(parts)]
    return lines
