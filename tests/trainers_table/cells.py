"""``python tests/trainers_table/cells.py FILE CELL...``: run those cells of the table, write what they gave.

A cell is named ``ROW:COLUMN``. All of them are of one process, or all of two ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["ACCELERATE_USE_CPU"] = "true"

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))  # a process that was forked does not have it

import definition
import preferences
import rows
import setting
import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

from procon.errors import ProConError

#: axolotl's row last: it patches transformers' classes.
STEPS = {**rows.ROWS, **preferences.ROWS}
EXTENDED = {**rows.EXTENDED, **preferences.EXTENDED}

if find_spec("axolotl"):
    from axolotl_row import axolotl_trainer

    STEPS["axolotl"] = axolotl_trainer


def relative_error(found: dict, expected: dict) -> float:
    """Of two gradients, over all parameters that have one."""
    difference = sum((found.get(name, torch.zeros(())) - expected[name]).square().sum() for name in expected)
    return float((difference / sum(value.square().sum() for value in expected.values())).sqrt())


class Expected:
    """Gradients by definition, each computed once."""

    def __init__(self, folder: Path):
        self.folder, self.found = folder, {}

    def __call__(self, mode: setting.Mode, batches: list[list[definition.Sequence]]) -> dict:
        key = (mode.parameters, "probes" if mode.source == "probes" else str(batches))
        if key not in self.found:
            if mode.source == "probes":
                self.found[key] = definition.of_probes(mode.parameters, self.folder)
            else:
                self.found[key] = definition.of_tokens(mode.parameters, self.folder, batches)
        return self.found[key]


def run_cell(row: str, mode: setting.Mode, expected: Expected, folder: Path) -> dict:
    """``{"error": relative error of the penalty's gradient}``, or ``{"refused": why}``, or ``{"none": why}``."""
    step = STEPS[row]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        constrained = step(mode, folder, setting.ALPHA)
    except ProConError as refusal:
        return {"refused": str(refusal)}
    except preferences.NoSuchModeError as reason:
        return {"none": str(reason)}
    assert mode.compiled == bool(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    plain = step(mode, folder, 0.0)
    assert constrained.batches == plain.batches  # those that were generated, too
    penalty = {name: constrained.gradients[name] - plain.gradients[name] for name in plain.gradients}
    return {"error": relative_error(penalty, expected(mode, plain.batches))}


def is_identical(row: str, mode: setting.Mode, folder: Path) -> bool:
    """Whether alpha 0 gives the same losses and bitwise the same weights as the class that is extended."""
    (losses, weights), (our_losses, our_weights) = (run(mode, folder) for run in EXTENDED[row])
    moved = any((value != 0).any() for value in weights.values())
    same = weights.keys() == our_weights.keys() and all(torch.equal(weights[n], our_weights[n]) for n in weights)
    return moved and len(losses) == rows.LONG["max_steps"] and losses == our_losses and same


@contextmanager
def clean_environment() -> Iterator[None]:
    """TrainingArguments leave settings in the environment for what comes after; beside axolotl it is replaced, too."""
    with mock.patch.object(os, "environ", os.environ), mock.patch.dict(os.environ):
        yield


def start_afresh(mode: setting.Mode) -> None:
    """Set ranks up for a mode: Accelerate keeps those of the mode before.

    It leaves several CPU ranks to DDP and shards on accelerators only, so sharded ones are said to be some.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    if mode.ranks == "FSDP2":
        os.environ["ACCELERATE_USE_FSDP"] = "true"


def shard_on_cpus() -> None:
    set_up = PartialState.__init__

    def set_up_as_accelerators(self, *args, **kwargs) -> None:
        set_up(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and "ACCELERATE_USE_FSDP" in os.environ:
            self.distributed_type = DistributedType.MULTI_NPU

    PartialState.__init__ = set_up_as_accelerators


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("cells", nargs="+", metavar="ROW:COLUMN")
    parser.add_argument("--folder", type=Path, required=True, help="what the cells write goes there")
    parser.add_argument("--source", help="where anchors come from, in columns that do not say so")
    parser.add_argument("--compared", nargs="*", help="cells to compare at alpha 0 with the class that is extended")
    chosen = parser.parse_args()
    if rows.WORLD > 1:
        torch.distributed.init_process_group("gloo")
        shard_on_cpus()
    torch.set_num_threads(1)
    shared = chosen.folder
    expected = Expected(shared)
    found, made, identical = {}, {}, {}
    for cell in chosen.cells:
        row, column = cell.split(":")
        mode = setting.MODES[column]
        mode = replace(mode, source=mode.source or chosen.source)
        folder = shared / cell.replace(" ", "-").replace(":", "-")
        folder.mkdir(exist_ok=True)
        if (row, mode) not in made:
            with clean_environment():
                start_afresh(mode)
                made[row, mode] = run_cell(row, mode, expected, folder)
            own = replace(mode, source=None)
            compared = chosen.compared is None or cell in chosen.compared
            if row in EXTENDED and "none" not in made[row, mode] and compared:
                if (row, own) not in identical:
                    with clean_environment():
                        start_afresh(own)
                        identical[row, own] = is_identical(row, own, folder)
                made[row, mode]["identical"] = identical[row, own]
        print(cell, made[row, mode], file=sys.stderr, flush=True)
        found.setdefault(row, {})[column] = made[row, mode]
    if rows.RANK == 0:
        chosen.file.write_text(json.dumps(found, indent=1))
    if torch.distributed.is_initialized():
        # A rank that leaves while gloo's threads still run may be aborted at exit.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
