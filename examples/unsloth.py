"""unsloth's LoRA under the constraint: a callback for the SFTTrainer that unsloth patches.

    python examples/unsloth.py --model MODEL --data data.jsonl

unsloth's gradient checkpointing runs the blocks without gradients, and training tokens would lose theirs. So it is off
here; with it and them, the run stops and says why. It also stops with TRL 1.16's SFTTrainer, which makes its own loss.

Not tested with unsloth itself, which needs a GPU. Tested on a CPU with trl 0.24.0, transformers 5.6.0 and peft 0.18.1,
and a stand-in for unsloth that loads the model with transformers.
"""

from __future__ import annotations

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="chat model: a folder or hub name")
    parser.add_argument("--data", required=True, help="conversations: .json, .jsonl, .csv or .parquet")
    parser.add_argument("--terms", default="probes", help="what the constraint keeps: probes, tokens (paper) or both")
    parser.add_argument("--schedule", default="procon_s", help="alpha over training: procon_s, or phases (1@2ep,0)")
    parser.add_argument("--output_dir", default="tuned", help="folder for the adapter")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    args = parser.parse_args()

    from unsloth import FastLanguageModel  # before everything that it patches

    from trl import SFTConfig, SFTTrainer  # isort: skip

    from procon.data import load_conversations, padding_collator, tokenize_conversations
    from procon.integrations import ProConCallback

    model, tokenizer = FastLanguageModel.from_pretrained(args.model, max_seq_length=2048, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(
        model,
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        use_gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            logging_steps=1,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        # With labels and a collator of its own: so nothing is packed, and labels say which tokens are constrained.
        train_dataset=tokenize_conversations(load_conversations(args.data), tokenizer),
        data_collator=padding_collator(tokenizer),
        processing_class=tokenizer,
        # unsloth reads its norms' weights and does not call them.
        callbacks=[ProConCallback(terms=args.terms, schedule=args.schedule, fuse="never")],
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
