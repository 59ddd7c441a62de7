"""Make the adapter by which the demo model refuses: ``python -m benchmarks.refusal_adapter FOLDER``.

SmolLM2-135M-Instruct as published refuses a quarter of malicious prompts. One LoRA run on malicious prompts with
refusals, and on their benign twins with the model's own answers, makes it refuse the one and answer the other: about
twelve minutes on two cores. The package has what this made, in ``procon/assets/refusal-adapters``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from procon.chat import builtin_prompts, generate_replies, user_turn
from procon.data import padding_collator, safety_conversations, tokenize_conversations
from procon.demo import fetch_demo_model
from procon.demo.model import GGUF, GGUF_SHA256
from procon.models import load_model, weights_hash
from procon.settings import PAPER_RECIPE
from procon.version import __version__

RECIPE = {"seed": 0, "num_train_epochs": 3.0, "learning_rate": 1e-3, "per_device_train_batch_size": 8}


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


def _whole_sentences(text: str) -> str:
    """``text`` up to its last full stop: a reply cut off by the token limit teaches the model to stop mid-word."""
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] if end > 0 else text


def main(output: str) -> None:
    """Train the adapter, and write a PEFT folder with it in fp16, and where it comes from."""
    model, tokenizer = load_model(fetch_demo_model(), dtype=torch.bfloat16)
    folder = Path(output) / (key := weights_hash(model))
    dataset = tokenize_conversations(refusal_conversations(model, tokenizer), tokenizer, max_length=256)
    set_seed(0)
    tuned = get_peft_model(model, LoraConfig(**PAPER_RECIPE.lora()))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, warmup_steps=5, save_strategy="no", logging_steps=20, report_to=[], **RECIPE
        )
        Trainer(tuned, arguments, train_dataset=dataset, data_collator=padding_collator(tokenizer)).train()
    tuned.peft_config["default"].base_model_name_or_path = GGUF  # not where the base lay on this disk
    state = {name: value.half() for name, value in tuned.state_dict().items() if "lora_" in name}
    tuned.save_pretrained(str(folder), state_dict=state)
    (folder / "README.md").unlink(missing_ok=True)
    versions = {"procon": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    made = {"weights": key, "base": GGUF, "base_sha256": GGUF_SHA256, **RECIPE, "versions": versions}
    (folder / "provenance.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
