"""A LightningModule under the constraint, with ``accumulate_grad_batches``.

    python examples/lightning_loop.py --model MODEL --data data.jsonl --output_dir tuned

The constraint has the whole default: anchors of the training tokens, and probes. Cross-entropy and penalty are both
sums over tokens, divided by the count of the whole optimiser step. Lightning then divides each loss by
``accumulate_grad_batches`` and averages gradients over ranks, so ``training_step`` multiplies by both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from procon import ProCon, ProConSettings, constrained_tokens
from procon.data import load_conversations, padding_collator, tokenize_conversations


class OptimizerSteps:
    """A loader that looks ahead: each batch has the token counts of its whole optimiser step."""

    def __init__(self, loader: DataLoader, accumulation: int):
        self.loader = loader
        self.accumulation = accumulation

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        batches = iter(self.loader)
        while window := list(islice(batches, self.accumulation)):
            labelled = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
            constrained = constrained_tokens(window)
            for batch in window:
                yield {**batch, "labelled": labelled, "constrained": constrained}


class ConstrainedModule(lightning.LightningModule):
    def __init__(self, model, procon: ProCon, learning_rate: float):
        super().__init__()
        self.model = model
        self.procon = procon
        self.learning_rate = learning_rate

    def training_step(self, batch):
        labelled, constrained = (
            self.trainer.strategy.reduce(batch.pop(name), reduce_op="sum") for name in ("labelled", "constrained")
        )
        if self.procon.step.tokens is None:  # the first micro-batch of an optimiser step
            self.procon.begin_step(self.procon.step.number, tokens=constrained)
        self.procon.begin(batch)
        loss = self.model(**batch, num_items_in_batch=labelled).loss + self.procon.loss()
        self.log("loss", loss, prog_bar=True, reduce_fx="sum")
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_before_optimizer_step(self, optimizer):
        self.procon.end(optimizer)

    def on_fit_end(self):
        self.procon.close()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="chat model: a folder or hub name")
    parser.add_argument("--data", required=True, help="conversations: .json, .jsonl, .csv or .parquet")
    parser.add_argument("--output_dir", type=Path, default="tuned", help="for anchors and the model")
    parser.add_argument("--schedule", default="procon_s", help="alpha over training: procon_s, or phases (1@2ep,0)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per optimiser step")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    args = parser.parse_args()

    lightning.seed_everything(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    dataset = tokenize_conversations(load_conversations(args.data), tokenizer)
    loader = DataLoader(dataset, args.batch_size, shuffle=True, collate_fn=padding_collator(tokenizer))

    # Directions, anchors and probes: once, before the first step, from the model as training starts.
    procon = ProCon(model, tokenizer, ProConSettings(schedule=args.schedule), folder=args.output_dir)
    loader = procon.prepare(loader, accumulation=args.accumulation)

    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulation,
        default_root_dir=args.output_dir,
        enable_checkpointing=False,
        logger=False,
    )
    module = ConstrainedModule(model.train(), procon, args.learning_rate)
    trainer.fit(module, OptimizerSteps(loader, args.accumulation))
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
