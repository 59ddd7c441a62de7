"""transformers' Trainer under the constraint: LoRA on a file of conversations.

    python examples/trainer.py --model MODEL --data data.jsonl --output_dir tuned

All of transformers' TrainingArguments and the constraint's own (``procon_...``) are flags.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from procon import ProConConfig, ProConTrainer
from procon.data import load_conversations, padding_collator, tokenize_conversations


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Chat model: a folder or hub name."})
    data: str = field(metadata={"help": "Conversations: .json, .jsonl, .csv or .parquet."})


def main() -> None:
    script, config = HfArgumentParser((ScriptArguments, ProConConfig)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    model = AutoModelForCausalLM.from_pretrained(script.model, dtype="auto")
    trainer = ProConTrainer(
        get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")),
        config,
        train_dataset=tokenize_conversations(load_conversations(script.data), tokenizer),
        data_collator=padding_collator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
