"""Teach a small chat model to refuse, so that there is something to preserve.

SmolLM2-135M-Instruct as published refuses a quarter of malicious prompts. One LoRA run on malicious prompts with
refusals, and on their benign twins with the model's own answers, makes it refuse the one and answer the other. The
adapter that comes with the package was made by ``python -m procon.demo.refusal_tuning``; its folder says from which
weights, by which recipe.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from procon.chat import builtin_prompts, generate_replies, user_turn
from procon.data import padding_collator, safety_conversations, tokenize_conversations
from procon.demo.model import GGUF, GGUF_SHA256, cache_folder, fetch_demo_model
from procon.files import clean, whole_folder
from procon.models import load_model, weights_hash
from procon.settings import PAPER_RECIPE
from procon.version import __version__

_PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class RefusalRecipe:
    """How the adapter is trained; about twelve minutes for 135M parameters on two cores."""

    seed: int = 0
    epochs: float = 3.0
    learning_rate: float = 1e-3
    batch_size: int = 8


def teach_refusal(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """``model`` with a refusal adapter merged in: the package's own if it was made for these weights, else one from
    the user's cache, else tuned now and cached."""
    key = weights_hash(model)
    packaged = files("procon.assets").joinpath("refusal-adapters", key)
    if packaged.is_dir():
        with as_file(packaged) as folder:
            return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    cached = cache_folder() / "refusal-adapters" / key
    clean(cached.parent)
    if not (cached / _PROVENANCE).is_file():
        shutil.rmtree(cached, ignore_errors=True)  # what an older version could leave: half an adapter
        tuned = train_refusal_adapter(model, tokenizer)
        save_adapter(tuned, cached, {"weights": key, "base": getattr(model.config, "_name_or_path", "")})
        model = tuned.unload()
    # From its file also now: rounded as it is there, so that every run starts from the same weights.
    return PeftModel.from_pretrained(model, str(cached)).merge_and_unload()


def refusal_conversations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Malicious prompts of the safety split with refusals; their benign twins with the model's own greedy answers."""
    benign = builtin_prompts("safety").benign
    answers = generate_replies(
        model, tokenizer, [user_turn(prompt) for prompt in benign], max_new_tokens=64, description="own answers"
    )
    conversations = [
        [*user_turn(prompt), {"role": "assistant", "content": _whole_sentences(answer)}]
        for prompt, answer in zip(benign, answers, strict=True)
    ]
    refusals = safety_conversations()["messages"]
    return Dataset.from_list([{"messages": messages} for messages in [*refusals, *conversations]])


def train_refusal_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: RefusalRecipe | None = None
) -> PeftModel:
    """``model`` with a LoRA adapter, trained to refuse."""
    recipe = recipe or RefusalRecipe()
    dataset = tokenize_conversations(refusal_conversations(model, tokenizer), tokenizer, max_length=256)
    set_seed(recipe.seed)
    tuned = get_peft_model(model, LoraConfig(**PAPER_RECIPE.lora()))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            warmup_steps=5,
            seed=recipe.seed,
            save_strategy="no",
            logging_steps=20,
            report_to=[],
        )
        Trainer(tuned, arguments, train_dataset=dataset, data_collator=padding_collator(tokenizer)).train()
    return tuned


def save_adapter(tuned: PeftModel, folder: Path, provenance: dict[str, Any]) -> None:
    """Write a PEFT folder, whole, with the adapter in fp16, and where it comes from."""
    tuned.peft_config["default"].base_model_name_or_path = provenance["base"]  # not where the base lay on this disk
    state = {name: value.half() for name, value in tuned.state_dict().items() if "lora_" in name}
    versions = {"procon": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    whole = {
        **provenance,
        "script": "python -m procon.demo.refusal_tuning",
        **asdict(RefusalRecipe()),
        "versions": versions,
    }
    with whole_folder(folder) as partial:
        tuned.save_pretrained(str(partial), state_dict=state)
        (partial / "README.md").unlink(missing_ok=True)
        (partial / _PROVENANCE).write_text(json.dumps(whole, indent=2) + "\n")


def _whole_sentences(text: str) -> str:
    """``text`` up to its last full stop: a reply cut off by the token limit teaches the model to stop mid-word."""
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] if end > 0 else text


def main(output: str) -> None:
    """Make the adapter of the demo model: ``python -m procon.demo.refusal_tuning FOLDER``."""
    model, tokenizer = load_model(fetch_demo_model(), dtype=torch.bfloat16)
    key = weights_hash(model)
    tuned = train_refusal_adapter(model, tokenizer)
    save_adapter(tuned, Path(output) / key, {"weights": key, "base": GGUF, "base_sha256": GGUF_SHA256})


if __name__ == "__main__":
    main(sys.argv[1])
