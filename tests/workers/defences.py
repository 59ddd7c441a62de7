"""``defences.py FOLDER NAME...``: each defence on the launched ranks; rank 0 writes FOLDER/WORLD.pt.

FOLDER holds a ``model``. All data are in every optimiser step, so that no order of theirs matters.
"""

import importlib.util
import os
import sys
from pathlib import Path

import gloo
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from procon.data import padding_collator
from procon.directions import Directions
from procon.training import ProConConfig

# As in conftest.py: the folder that the benchmarks are in is not put on the path.
_BENCHMARKS = importlib.util.spec_from_file_location(
    "benchmarks", Path(__file__).parents[2] / "benchmarks" / "__init__.py"
)
sys.modules["benchmarks"] = importlib.util.module_from_spec(_BENCHMARKS)

from benchmarks.study.defences import build_trainer  # noqa: E402

FOLDER = Path(sys.argv[1])
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
SETTINGS = {
    "kl": {"beta": 100.0},
    "safegrad": {"rho": 3.0},
}


def rows(seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 30, (8,), generator=generator).tolist()
    ids = [torch.randint(5, 60, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_list([{"input_ids": row, "labels": [-100] * (len(row) - 3) + row[-3:]} for row in ids])


def trained(name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The trainable parameters before and after three steps, in float64."""
    gloo.start(sharding=False)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "model").double()
    unit = torch.nn.functional.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).double()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = build_trainer(
        name,
        model,
        ProConConfig(
            output_dir=str(FOLDER / "out"),
            max_steps=3,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            per_device_train_batch_size=4 // WORLD,
            gradient_accumulation_steps=2,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        settings=SETTINGS.get(name),
        directions=Directions(unit[:, None], torch.ones(3, 1)),
        alignment_dataset=rows(2),
        train_dataset=rows(1),
        data_collator=padding_collator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    return {n: (before[n], p.detach().clone()) for n, p in model.named_parameters() if n in before}


def main() -> None:
    found = {name: trained(name) for name in sys.argv[2:]}
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, FOLDER / f"{WORLD}.pt")
    gloo.stop()


if __name__ == "__main__":
    main()
