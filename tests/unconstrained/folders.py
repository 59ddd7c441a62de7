"""Output folders that others have used or use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from resuming import SAVES
from setting import ALPHA, Outcome, equal, lora, model, refused, rows, scenario, trainer, weights

from procon.training import run_folder
from procon.training.run_folder import locked


def made(folder: Path, alpha: float | str = ALPHA, start: Callable[[], Any] = lora, **settings: Any) -> Any:
    return trainer(folder, alpha, start=start(), **settings)


def save(built: Any) -> Any:
    built.train()
    built.save_model()
    return built


def claims(folder: Path) -> bool:
    """Whether anything in ``folder`` says that its model was constrained."""
    card, record = folder / "README.md", folder / "procon.json"
    said = card.exists() and "Refusal anchored with ProCon" in card.read_text()
    return said or (record.exists() and json.loads(record.read_text()).get("constrained", True))


def into(name: str, before: Callable[[Path], object], after: Callable[[Path], Any], *, short: bool = False) -> None:
    """A training in a folder in which something is already."""

    def run(folder: Path) -> Outcome:
        before(folder)
        return refused(lambda: save(after(folder)), "trains over what is there")

    scenario(name, "output folder", short=short)(run)


def constrained(folder: Path) -> None:
    save(made(folder))


into("a plain run into the folder of a constrained one", constrained, partial(made, alpha="0"), short=True)
into("all weights into the folder of an adapter", constrained, partial(made, start=model), short=True)
into("another alpha into the folder of a constrained run", constrained, partial(made, alpha=1.0))
into(
    "other data into the folder of a constrained run",
    constrained,
    lambda folder: made(folder, data=Dataset.from_list(rows(seed=2))),
)
into(
    "into a folder with checkpoints of another run",
    lambda folder: made(folder, **SAVES).train(),
    partial(made, alpha=1.0, **SAVES),
)
into("into a folder with someone's weights", lambda folder: model().save_pretrained(folder), made, short=True)


@scenario("the same run again", "output folder")
def again(folder: Path) -> Outcome:
    one, two = (weights(save(made(folder, **SAVES)).model) for _ in range(2))
    return Outcome("same" if equal(one, two) else "SILENT")


@scenario("a model saved before it is trained", "output folder")
def untrained(folder: Path) -> Outcome:
    made(folder).save_model()
    return Outcome("SILENT", "claims a constraint") if claims(folder) else Outcome("said", "nothing is claimed")


@scenario("a model saved after its training was refused", "output folder")
def saved_after_refusal(folder: Path) -> Outcome:
    built = made(folder, "0@100steps,5")
    found = refused(built.train)
    built.save_model()
    return Outcome("SILENT", "claims a constraint") if claims(folder) else found


def two_at_once(folder: Path, *, resume: bool) -> Outcome:
    """A forked process trains in the folder that this one holds."""
    if resume:
        made(folder, **SAVES).train()
    with locked(folder):
        child = os.fork()
        if not child:
            code = 70
            try:
                run_folder._held.clear()  # what a process of its own would not know
                built = made(folder, **SAVES)
                found = refused(lambda: built.train(resume_from_checkpoint=resume))
                code = 0 if found.outcome == "refused" and "is in use by another" in found.detail else 1
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Outcome("refused", "is in use") if code == 0 else Outcome("SILENT", f"exit code {code}")


scenario("two trainings in one folder", "output folder", short=True)(partial(two_at_once, resume=False))
scenario("two trainings in one folder, one of which goes on", "output folder")(partial(two_at_once, resume=True))
