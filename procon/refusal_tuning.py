"""Teach a small chat model to refuse, so that there is something to preserve (design of the quickstart).

SmolLM2-135M-Instruct as published hardly refuses. One short LoRA run on malicious prompts with refusals, and on
their benign twins with the model's own answers, makes it refuse the one and answer the other.
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from procon.chat import user_turn
from procon.data import padding_collator, safety_conversations, tokenize_conversations
from procon.generation import generate_replies
from procon.prompts import builtin_prompts

#: Rank and targets of the paper's adapters (section IV-A2).
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"}


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


def tune_refusal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    epochs: float = 1.0,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
) -> PeftModel:
    """``model`` with a LoRA adapter, trained to refuse. About two minutes for 135M parameters on two cores."""
    dataset = tokenize_conversations(refusal_conversations(model, tokenizer), tokenizer, max_length=256)
    tuned = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=True))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=5,
            seed=seed,
            save_strategy="no",
            logging_steps=10,
            report_to=[],
        )
        Trainer(tuned, arguments, train_dataset=dataset, data_collator=padding_collator(tokenizer)).train()
    return tuned


def _whole_sentences(text: str) -> str:
    """``text`` up to its last full stop: a reply cut off by the token limit teaches the model to stop mid-word."""
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] if end > 0 else text
