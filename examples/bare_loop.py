"""A PyTorch loop under the constraint, with gradient accumulation and the schedule, and no Trainer.

    python examples/bare_loop.py --model MODEL --data data.jsonl --output_dir tuned

Cross-entropy is a sum over tokens, divided by their count in the whole optimiser step. So is the penalty on training
tokens, if there is one. So the number of micro-batches per step changes neither.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from procon import ProCon, ProConSettings
from procon.data import load_conversations, padding_collator, tokenize_conversations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="chat model: a folder or hub name")
    parser.add_argument("--data", required=True, help="conversations: .json, .jsonl, .csv or .parquet")
    parser.add_argument("--output_dir", type=Path, default="tuned", help="for the model, and anchors if there are any")
    parser.add_argument("--terms", default="probes", help="what the constraint keeps: probes, tokens (paper) or both")
    parser.add_argument("--schedule", default="procon_s", help="alpha over training")
    parser.add_argument("--epochs", type=int, default=3, help="a warm-up of the schedule comes on top")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per optimiser step")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    dataset = tokenize_conversations(load_conversations(args.data), tokenizer)
    loader = DataLoader(dataset, args.batch_size, shuffle=True, collate_fn=padding_collator(tokenizer))

    # What the starting model is at the probes: once, before the first step.
    procon = ProCon(model, tokenizer, ProConSettings(args.terms, args.schedule), folder=args.output_dir)
    loader = procon.prepare(loader, accumulation=args.accumulation)

    steps_per_epoch = procon.steps_per_epoch
    total_steps = args.epochs * steps_per_epoch + procon.schedule.extra_steps(steps_per_epoch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

    step = 0
    model.train()
    while step < total_steps:
        batches = iter(loader)
        while step < total_steps and (micro_batches := list(islice(batches, args.accumulation))):
            procon.begin_step(step, micro_batches)
            labelled = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
            step_loss = 0.0
            for batch in micro_batches:
                procon.begin(batch)
                loss = model(**batch, num_items_in_batch=labelled).loss + procon.loss()
                loss.backward()
                step_loss += loss.item()
            procon.end(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            logged = "  ".join(f"{name} {value:.6g}" for name, value in procon.log(step).items())
            print(f"step {step}/{total_steps}  {logged}  loss {step_loss:.4f}")
    procon.close()
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
