"""A LightningModule under the constraint, with ``accumulate_grad_batches``.

    python examples/lightning_loop.py --model MODEL --data data.jsonl --output_dir tuned

Lightning divides each loss by ``accumulate_grad_batches``, of which ``prepare`` is told.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from procon import ProCon, ProConSettings
from procon.data import load_conversations, padding_collator, tokenize_conversations


class ConstrainedModule(lightning.LightningModule):
    def __init__(self, model, procon: ProCon, learning_rate: float):
        super().__init__()
        self.model = model
        self.procon = procon
        self.learning_rate = learning_rate

    def training_step(self, batch):
        self.procon.begin(batch)
        loss = self.model(**batch).loss + self.procon.loss()
        self.log("loss", loss, prog_bar=True)
        return loss

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
    parser.add_argument("--output_dir", type=Path, default="tuned", help="for the model, and anchors if there are any")
    parser.add_argument("--terms", default="probes", help="what the constraint keeps: probes, tokens (paper) or both")
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

    # What the starting model is at the probes: once, before the first step.
    procon = ProCon(model, tokenizer, ProConSettings(args.terms, args.schedule), folder=args.output_dir)
    loader = procon.prepare(loader, accumulation=args.accumulation)

    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulation,
        default_root_dir=args.output_dir,
        enable_checkpointing=False,
        logger=False,
    )
    module = ConstrainedModule(model.train(), procon, args.learning_rate)
    trainer.fit(module, loader)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
