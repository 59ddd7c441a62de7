"""What is put under faults: what writes files that are read again later, on a tiny model."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator, set_seed

from procon.anchors import Anchors
from procon.anchors import store as anchors_store
from procon.directions import Directions
from procon.errors import ProConError
from procon.files import load_json, save_json
from procon.training import ProConConfig, ProConTrainer


@dataclass(frozen=True)
class Operation:
    """An operation, run with its root as the current folder.

    Attributes:
        run: writes; after whatever fault, it ends as if nothing had happened.
        read: what the library makes of the files, as text.
        damaged: the files that are damaged, as a pattern; none if nothing protects them.
        before: what was written there earlier.
    """

    name: str
    run: Callable[[], object]
    read: Callable[[], str]
    damaged: str = ""
    before: Callable[[], object] = lambda: None


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_dropout=0.3, **sizes))


@cache
def directions() -> Directions:
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(3, 32, generator=generator), dim=-1)
    return Directions(unit[:, None], torch.ones(3, 1), provenance={"model": "tiny"})


@cache
def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(5, 60, (8, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def save_directions() -> None:
    directions().save("directions.safetensors")


def load_directions() -> str:
    found = Directions.load("directions.safetensors")
    return digest([found.basis, found.gaps]) + str(found.provenance)


def record_anchors() -> None:
    anchors_store.SHARD_BYTES = 100  # a shard for each batch
    batches = [default_data_collator(rows()[first : first + 2]) for first in range(0, 8, 2)]
    Anchors.record(model().eval(), batches, directions(), "anchors", progress=False)


def look_anchors_up() -> str:
    return digest([Anchors("anchors").annotate(default_data_collator(rows()))["anchors"]])


def train(resume: bool) -> str:
    set_seed(0)
    trained = model()
    trainer = ProConTrainer(
        trained,
        ProConConfig(
            output_dir="out",
            procon_schedule="1",
            procon_terms="tokens",
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_steps=2,
            save_total_limit=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        directions=directions(),
        train_dataset=rows(),
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    return digest(trained.parameters())


def resume_training() -> str:
    """The trained weights, from the latest checkpoint."""
    if not list(Path("out").glob("checkpoint-*")):
        raise ProConError("out: no checkpoint")
    return train(resume=True)


def go_on_training() -> None:
    """Train, or resume what was interrupted; start afresh if there is no whole checkpoint."""
    try:
        resume_training()
    except ProConError:
        shutil.rmtree("out", ignore_errors=True)
        train(resume=False)


def digest(tensors) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()[:16]


OPERATIONS = [
    Operation("directions", save_directions, load_directions, "directions.safetensors"),
    Operation(
        "JSON, over an old file",
        lambda: save_json({"a": [1] * 500}, "out.json"),
        lambda: load_json("out.json", str, "run"),
        before=lambda: save_json({"a": [2] * 900}, "out.json"),
    ),
    Operation("anchors", record_anchors, look_anchors_up, "anchors/*"),
    Operation("training", go_on_training, resume_training, "out/checkpoint-4/*"),
]
