"""What the commands do: each takes its arguments, calls the library, and prints what it found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from procon.chat import ContrastPrompts, Split, builtin_prompts, load_instructions
from procon.cli.arguments import DirectionsArguments, DriftArguments, EvalArguments, QuickstartArguments, TrainArguments
from procon.data import (
    flattening_collator,
    load_conversations,
    mix_safety,
    padding_collator,
    safety_conversations,
    tokenize_conversations,
)
from procon.defences import Defence, build_trainer, find_defence
from procon.demo.quickstart import quickstart as run_quickstart
from procon.directions import DIRECTIONS, ContrastMeans, RefusalDirections
from procon.errors import ProConError
from procon.evaluation import Drift, evaluate, measure_drift
from procon.models import find_decoder, load_model, parse_dtype
from procon.report import Run, print_table
from procon.training import DriftCallback, JsonlCallback, ProConConfig, ProConTrainer
from procon.training.checkpoints import last_complete


def quickstart(arguments: QuickstartArguments) -> None:
    """``procon quickstart``"""
    run_quickstart(arguments.model, arguments.output_dir, arguments.seed, control=arguments.control)


def directions(arguments: DirectionsArguments) -> None:
    """``procon directions``"""
    output = _output_file(arguments.output)
    prompts = _prompts(arguments.malicious, arguments.benign, "extraction")
    model, tokenizer = load_model(arguments.model, dtype=parse_dtype(arguments.dtype))
    found = RefusalDirections.extract(model, tokenizer, prompts, k=arguments.k, batch_size=arguments.batch_size)
    found.save(output)
    table = Table("block", "gap", "held-out AUROC", box=box.SIMPLE_HEAD)
    for block, (gap, auroc) in enumerate(zip(found.gap.tolist(), found.auroc.tolist(), strict=True)):
        table.add_row(str(block), f"{gap:.3g}" if gap else "no direction", f"{auroc:.2f}" if gap else "-")
    console = Console()
    console.print(table)
    console.print(f"The model refuses {found.provenance['refusal_rate']:.0%} of malicious prompts. Written: {output}")


def train(arguments: TrainArguments, config: ProConConfig) -> None:
    """``procon train``"""
    output = Path(config.output_dir)
    found = last_complete(output)
    if found and not arguments.resume:
        raise ProConError(f"output_dir {str(output)!r} holds checkpoints: pass --resume, or another --output_dir")
    if arguments.resume and not found:
        raise ProConError(f"no complete checkpoint in {str(output)!r} to resume from: leave --resume out")
    defence = find_defence(arguments.defence) if arguments.defence else None
    settings = _defence_settings(arguments, defence)
    if defence:
        config = defence.configure(config)
    needs = defence.needs if defence else {"directions"} if config.schedule().active else set()
    conversations = load_conversations(arguments.data)
    aligning = "alignment_dataset" in needs
    # Safety data that a defence trains on apart are mixed in besides only if a number is given.
    asked = arguments.safety_data or (defence and defence.safety)
    mixing = arguments.safety_samples or (asked and not aligning)
    if mixing or aligning:
        safety = load_conversations(arguments.safety_data) if arguments.safety_data else safety_conversations()
    if mixing:
        conversations = mix_safety(conversations, safety, arguments.safety_samples or len(safety), seed=config.seed)
    directed = "directions" in needs
    known = RefusalDirections.load(arguments.directions) if directed and arguments.directions else None
    if directed and arguments.resume and known is None:
        known = RefusalDirections.load(found if (found / DIRECTIONS).is_file() else output)

    dtype = torch.float32 if arguments.method == "full" and arguments.dtype == "auto" else parse_dtype(arguments.dtype)
    model, tokenizer = load_model(arguments.model, dtype=dtype, attn_implementation=arguments.attn_implementation)
    if known:
        known.check_fits(find_decoder(model))
    dataset = tokenize_conversations(conversations, tokenizer, max_length=arguments.max_length)
    set_seed(config.seed)
    # A new adapter changes nothing yet, and one that does not fit shows before the minutes of extraction.
    model = _trainable(model, arguments)
    if directed and known is None:
        # Before there is a trainer, as that makes the output folder.
        with config.main_process_first(local=False, desc="refusal directions"):
            if config.process_index == 0:
                RefusalDirections.extract(model, tokenizer).save(output / DIRECTIONS)
            known = RefusalDirections.load(output)
    common: dict[str, Any] = {
        "directions": known,
        "train_dataset": dataset,
        "data_collator": _collator(arguments, model, tokenizer),
        "processing_class": tokenizer,
    }
    if defence:
        if aligning:
            common["alignment_dataset"] = tokenize_conversations(safety, tokenizer, max_length=arguments.max_length)
        common |= {"settings": settings, "base": arguments.base}
        trainer = build_trainer(defence.name, model, config, **common)
    else:
        trainer = ProConTrainer(model, config, **common)
    trainer.add_callback(JsonlCallback())
    if arguments.drift_steps:
        trainer.add_callback(
            DriftCallback(
                trainer,
                tokenizer,
                every=arguments.drift_steps,
                gate=arguments.drift_gate,
                on_gate=arguments.drift_action,
            )
        )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    trainer.save_model()
    trainer.save_state()
    if config.process_index == 0:
        Console().print(f"Written: {output}, its log in log.jsonl. Measure it: procon eval --model {output}")


def drift(arguments: DriftArguments) -> None:
    """``procon drift``"""
    output = _output_file(arguments.output)
    prompts = _prompts(arguments.malicious, arguments.benign, "extraction")
    dtype = parse_dtype(arguments.dtype)
    model, tokenizer = load_model(arguments.start, dtype=dtype)
    means = ContrastMeans.measure(model, tokenizer, prompts, batch_size=arguments.batch_size)
    reference = RefusalDirections.from_means(means)
    del model
    model, _ = load_model(arguments.tuned, dtype=dtype)
    found = measure_drift(model, tokenizer, reference, prompts, batch_size=arguments.batch_size)
    if output:
        _write_drift(found, output)
    table = Table("block", "cosine", "malicious shift", "benign shift", box=box.SIMPLE_HEAD)
    for block, row in enumerate(zip(*_columns(found).values(), strict=True)):
        table.add_row(str(block), *("-" if value is None else f"{value:+.3f}" for value in row))
    console = Console()
    console.print(table)
    console.print(f"Mean cosine {found.mean_cosine:.3f}; shifts along the first direction, in units of its gap.")


def evaluation(arguments: EvalArguments) -> None:
    """``procon eval``"""
    output = _output_file(arguments.output)
    prompts = _prompts(arguments.malicious, arguments.benign, "held_out")
    task = _task(arguments.task) if arguments.task else None
    model, tokenizer = load_model(arguments.model, dtype=parse_dtype(arguments.dtype))
    found = evaluate(
        model,
        tokenizer,
        prompts=prompts,
        task=task,
        label=arguments.model,
        max_new_tokens=arguments.max_new_tokens,
        task_max_new_tokens=arguments.task_max_new_tokens,
        batch_size=arguments.batch_size,
    )
    if output:
        found.save(output)
    print_table([Run(label=arguments.model, evaluation=found)])


def _output_file(path: str | None) -> Path | None:
    """The path; refused before any work where it could not be written after it."""
    if path and Path(path).is_dir():
        raise ProConError(f"output {path!r} is a folder: give a file in it")
    return Path(path) if path else None


def _prompts(malicious: str | None, benign: str | None, split: Split) -> ContrastPrompts:
    builtin = builtin_prompts(split)
    if not malicious and not benign:
        return builtin
    return ContrastPrompts(
        load_instructions(malicious) if malicious else builtin.malicious,
        load_instructions(benign) if benign else builtin.benign,
    )


def _task(path: str) -> list[dict]:
    """Question and reference of each conversation: its first user and its last assistant turn."""
    conversations = load_conversations(path)["messages"]
    rows = []
    for number, turns in enumerate(conversations, 1):
        questions, answers = ([t["content"] for t in turns if t["role"] == role] for role in ("user", "assistant"))
        if not questions or not answers:
            raise ProConError(f"task {path!r}, row {number}: give it a user turn and an assistant turn")
        rows.append({"instruction": questions[0], "output": answers[-1]})
    return rows


def _defence_settings(arguments: TrainArguments, defence: Defence | None) -> dict[str, Any]:
    """The parsed ``defence_settings``; checked before any work."""
    for name, taken in {"defence_settings": defence, "base": defence and "base" in defence.needs}.items():
        if (value := getattr(arguments, name)) and not taken:
            raise ProConError(f"{name} is {value!r}, but there is no defence to take it: add --defence NAME")
    text = arguments.defence_settings or ""
    settings = {}
    # At commas with a name and = behind them: a value may be a list.
    for part in re.split(r",(?=\s*\w+\s*=)", text) if text.strip() else []:
        name, equals, value = part.partition("=")
        try:
            settings[name.strip()] = _yaml_value(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise ProConError(f"defence_settings has {part!r}: give key=value, joined by commas")
    if defence:
        defence.check(settings)
    return settings


def _yaml_value(text: str) -> Any:
    """The value, but for YAML's own reading of 2e-4 as a text."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _trainable(model: PreTrainedModel, arguments: TrainArguments) -> PreTrainedModel | PeftModel:
    if arguments.method == "full":
        if isinstance(model, PeftModel):
            raise ProConError(
                f"model {arguments.model!r} is a LoRA folder: merge it into its base, or use --method lora"
            )
        return model
    if isinstance(model, PeftModel):
        model.set_adapter(model.active_adapter)  # loaded for inference, it was frozen
        return model
    targets = arguments.lora_targets
    names = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules=names, task_type="CAUSAL_LM"
            ),
        )
    except ValueError as error:
        raise ProConError(f"lora_targets {targets!r} do not fit the model ({error}): try all-linear") from error


def _collator(arguments: TrainArguments, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
    if arguments.flatten:
        return flattening_collator(bounds="flash" in model.config._attn_implementation)
    return padding_collator(tokenizer)


def _columns(found: Drift) -> dict[str, list[float | None]]:
    columns = {
        "cosine": found.cosine,
        "malicious_shift": found.malicious_shift,
        "benign_shift": found.benign_shift,
    }
    return {name: [None if value != value else value for value in column.tolist()] for name, column in columns.items()}


def _write_drift(found: Drift, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"mean_cosine": found.mean_cosine, **_columns(found)}, indent=2) + "\n")
