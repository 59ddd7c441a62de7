"""``python tests/trainers_table FILE [--ranks 1|DDP|FSDP2]``: run those cells of the table, write what they gave."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["ACCELERATE_USE_CPU"] = "true"

os.environ["HF_HUB_OFFLINE"] = "1"

import rows
import setting
import torch
from accelerate import DistributedType, PartialState

from procon.errors import ProConError

if find_spec("axolotl"):
    from axolotl_row import axolotl_trainer

    rows.ROWS["axolotl"] = axolotl_trainer


def relative_error(found: dict, expected: dict) -> float:
    """Of two gradients, over all parameters that have one."""
    difference = sum((found.get(name, torch.zeros(())) - expected[name]).square().sum() for name in expected)
    return float((difference / sum(value.square().sum() for value in expected.values())).sqrt())


def run_cell(row: str, mode: setting.Mode, expected: dict, folder: Path) -> dict:
    """``{"error": relative error of the penalty's gradient}``, or ``{"refused": why}``."""
    step = rows.ROWS[row]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        constrained = step(mode, folder, setting.ALPHA)
    except ProConError as refusal:
        return {"refused": str(refusal)}
    assert mode.compiled == bool(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    plain = step(mode, folder, 0.0)
    return {"error": relative_error({name: constrained[name] - plain[name] for name in plain}, expected)}


def is_identical(row: str, mode: setting.Mode, folder: Path) -> bool:
    """Whether alpha 0 gives the same losses and bitwise the same weights as the class that is extended."""
    (losses, weights), (our_losses, our_weights) = (run(mode, folder) for run in rows.EXTENDED[row])
    moved = any((value != 0).any() for value in weights.values())
    same = weights.keys() == our_weights.keys() and all(torch.equal(weights[n], our_weights[n]) for n in weights)
    return moved and len(losses) == 20 and losses == our_losses and same


def shard_on_cpus() -> None:
    """Accelerate leaves several CPU ranks to DDP and shards on accelerators only: say that these are some."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    set_up = PartialState.__init__

    def set_up_as_accelerators(self, *args, **kwargs) -> None:
        set_up(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_NPU

    PartialState.__init__ = set_up_as_accelerators


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--ranks", choices=["1", "DDP", "FSDP2"], default="1")
    parser.add_argument("--rows", nargs="+", choices=list(rows.ROWS), default=list(rows.ROWS))
    parser.add_argument("--columns", nargs="+", choices=list(setting.MODES), default=list(setting.MODES))
    chosen = parser.parse_args()
    if chosen.ranks != "1":
        torch.distributed.init_process_group("gloo")
    if chosen.ranks == "FSDP2":
        shard_on_cpus()
    torch.set_num_threads(1)
    modes = {name: setting.MODES[name] for name in chosen.columns if setting.MODES[name].ranks == chosen.ranks}
    shared = Path(os.environ.get("PROCON_TABLE_FOLDER") or tempfile.mkdtemp())
    # All of them first, and axolotl's row last: it patches transformers' classes.
    expected = {
        parameters: setting.expected_gradients(parameters, shared)
        for parameters in {mode.parameters for mode in modes.values()}
    }
    cells = {}
    for row in chosen.rows:
        by_mode = {}
        for column, mode in modes.items():
            if mode not in by_mode:
                folder = shared / f"{row}-{column}".replace(" ", "-")
                folder.mkdir(exist_ok=True)
                with mock.patch.dict(os.environ):  # in which TrainingArguments leave settings for what comes after
                    by_mode[mode] = run_cell(row, mode, expected[mode.parameters], folder)
                    if row in rows.EXTENDED:
                        by_mode[mode]["identical"] = is_identical(row, mode, folder)
                print(row, column, by_mode[mode], file=sys.stderr, flush=True)
            cells.setdefault(row, {})[column] = by_mode[mode]
    if rows.RANK == 0:
        chosen.file.write_text(json.dumps(cells, indent=1))
    if torch.distributed.is_initialized():
        # A rank that leaves while gloo's threads still run may be aborted at exit.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


main()
