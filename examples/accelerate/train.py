"""A loop under the constraint with Accelerate: DDP, FSDP2, DeepSpeed ZeRO-2 or ZeRO-3, as the configuration says.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate/train.py \
        --model MODEL --data data.jsonl --output_dir tuned

Under ZeRO-3, which takes one forward for each backward, give ``--terms tokens``: probes are a second one. Cross-entropy
is a sum over tokens, divided by their count in the whole optimiser step: all its micro-batches, all ranks. So is the
penalty on training tokens. So neither the number of ranks nor the number of micro-batches changes them.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from procon import ProCon, ProConSettings
from procon.data import load_conversations, padding_collator, tokenize_conversations
from procon.method import once_through


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="chat model: a folder or hub name")
    parser.add_argument("--data", required=True, help="conversations: .json, .jsonl, .csv or .parquet")
    parser.add_argument("--directions", help="of the term tokens: file from 'procon directions'; ZeRO-3 needs it")
    parser.add_argument("--output_dir", type=Path, default="tuned", help="for the model, and anchors if there are any")
    parser.add_argument("--schedule", default="procon_s", help="alpha over training")
    parser.add_argument("--terms", default="probes", help="what the constraint keeps: probes, tokens (paper) or both")
    parser.add_argument("--epochs", type=int, default=3, help="a warm-up of the schedule comes on top")
    parser.add_argument("--batch_size", type=int, default=2, help="rows of a micro-batch, per rank")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per optimiser step")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    args = parser.parse_args()

    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulation,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # one order on any number of ranks
    )
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    dataset = tokenize_conversations(load_conversations(args.data), tokenizer)
    collator = padding_collator(tokenizer)

    settings = ProConSettings(args.terms, args.schedule)
    progress = accelerator.is_main_process
    procon = ProCon(model, tokenizer, settings, args.directions, folder=args.output_dir, progress=progress)
    procon.run.precision = accelerator.mixed_precision
    procon.find()  # directions if a term needs any, by the main process: FSDP may have loaded the weights only there
    procon.attach()
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.AdamW(model.parameters(), lr=args.learning_rate),
        DataLoader(dataset, args.batch_size, shuffle=True, collate_fn=procon.collator(collator)),
    )
    # Once, before the first step, from the model as it will train: on its device, sharded, in its precision.
    rank, ranks = accelerator.process_index, accelerator.num_processes
    with accelerator.autocast():
        procon.record(lambda: once_through(dataset, collator, args.batch_size, rank=rank, ranks=ranks))

    steps_per_epoch = -(-len(loader) // args.accumulation)
    procon.set_steps_per_epoch(steps_per_epoch)
    total_steps = args.epochs * steps_per_epoch + procon.schedule.extra_steps(steps_per_epoch)
    # Ranks average their gradients, and backward() divides by the number of micro-batches: the counts include both.
    undo = accelerator.num_processes * accelerator.gradient_accumulation_steps
    step = 0
    model.train()
    while step < total_steps:
        batches = iter(loader)
        while step < total_steps and (micro_batches := list(islice(batches, args.accumulation))):
            procon.begin_step(step, micro_batches)
            labelled = accelerator.reduce(sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches))
            step_loss = torch.zeros((), device=accelerator.device)
            for batch in micro_batches:
                accelerator.sync_gradients = batch is micro_batches[-1]
                with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
                    procon.begin(batch)
                    with accelerator.autocast():
                        loss = model(**batch, num_items_in_batch=labelled).loss + procon.loss()
                    accelerator.backward(loss * undo)
                step_loss += loss.detach()
            procon.end(optimizer)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            logged, loss = procon.log(step), accelerator.reduce(step_loss).item()
            alpha, penalty = logged["procon/alpha"], logged.get("procon/penalty", 0.0)
            accelerator.print(f"step {step}/{total_steps}  alpha {alpha:g}  loss {loss:.6g}  penalty {penalty:.6g}")
    procon.close()

    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir, state_dict=weights)
        tokenizer.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
