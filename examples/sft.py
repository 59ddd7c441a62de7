"""TRL's SFTTrainer under the constraint: LoRA on a file of conversations, packed or not.

    python examples/sft.py --model MODEL --data data.jsonl --output_dir tuned --packing

All of TRL's SFTConfig and the constraint's own settings (``procon_...``) are flags. TRL gets each conversation as a
prompt and a completion, its last turn. So the loss is on the completion alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import LoraConfig
from transformers import HfArgumentParser

from procon import ProConSFTConfig, ProConSFTTrainer
from procon.data import load_conversations


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Chat model: a folder or hub name."})
    data: str = field(metadata={"help": "Conversations: .json, .jsonl, .csv or .parquet."})


def main() -> None:
    script, config = HfArgumentParser((ScriptArguments, ProConSFTConfig)).parse_args_into_dataclasses()
    dataset = load_conversations(script.data).map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns="messages"
    )
    trainer = ProConSFTTrainer(
        script.model,
        config,
        train_dataset=dataset,
        peft_config=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
