"""Published prompt sets by name: fetched from the hub by ``datasets``, kept in its cache, never bundled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
from datasets import Dataset, DatasetDict

from procon.chat import ContrastPrompts, builtin_prompts
from procon.data.conversations import _quiet
from procon.errors import ProConError
from procon.files import MAX_TEXT

Kind = Literal["malicious", "benign"]


@dataclass(frozen=True)
class Part:
    """The prompts of one kind in a set.

    Attributes:
        config, split: by which ``datasets`` loads them; None for the only ones, or for all splits.
        where: values that columns of a row must have.
    """

    config: str | None = None
    split: str | None = "train"
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """Where a set is, and what of it is asked.

    Attributes:
        name: by which it is chosen.
        source: its name on the hub.
        column: where a row has its prompt; of a list of turns the first one is.
        parts: which kinds it has: malicious prompts ought to be refused, benign ones not.
        options: for ``datasets``, if the files do not speak for themselves.
    """

    name: str
    source: str
    column: str
    parts: Mapping[Kind, Part]
    options: Mapping[str, Any] = field(default_factory=dict)


#: Sets by name. Columns, configurations and splits are as published in 2026; no commit is known that would stay, so the
#: revision is ``main`` unless one is given, and the evaluation says which commit that was.
PROMPT_SETS = {
    each.name: each
    for each in (
        PromptSet("harmbench", "walledai/HarmBench", "prompt", {"malicious": Part("standard")}),
        PromptSet("advbench", "walledai/AdvBench", "prompt", {"malicious": Part()}),
        PromptSet(
            "jailbreakbench",
            "JailbreakBench/JBB-Behaviors",
            "Goal",
            {"malicious": Part("behaviors", "harmful"), "benign": Part("behaviors", "benign")},
        ),
        # CSV files without a header, one per category.
        PromptSet(
            "hex-phi", "LLM-Tuning-Safety/HEx-PHI", "prompt", {"malicious": Part(split=None)}, {"names": ["prompt"]}
        ),
        PromptSet("strongreject", "walledai/StrongREJECT", "prompt", {"malicious": Part()}),
        PromptSet(
            "sorry-bench",
            "sorry-bench/sorry-bench-202503",
            "turns",
            {"malicious": Part(where={"prompt_style": "base"})},
        ),
        PromptSet(
            "xstest",
            "Paul/XSTest",
            "prompt",
            {"malicious": Part(where={"label": "unsafe"}), "benign": Part(where={"label": "safe"})},
        ),
        PromptSet(
            "or-bench",
            "bench-llm/or-bench",
            "prompt",
            {"malicious": Part("or-bench-toxic"), "benign": Part("or-bench-hard-1k")},
        ),
    )
}


def load_prompt_sets(names: str | Sequence[str], *, most: int = 0) -> tuple[ContrastPrompts, dict[str, dict[str, Any]]]:
    """Malicious and benign prompts of sets by name, and where each kind comes from.

    Of several sets, the first one that has prompts of a kind gives them: ``harmbench,xstest`` takes the malicious ones
    from HarmBench and the benign ones from XSTest. What no set has, the built-in held-out prompts are.

    Args:
        names: of :data:`PROMPT_SETS`, in a text joined by commas or in a list; ``NAME@REVISION`` for a commit, tag or
            branch other than ``main``.
        most: at most so many prompts of each kind, spread evenly over the set; 0 for all.

    Raises:
        ProConError: if there is no such set, it cannot be loaded, or access has to be asked for.
    """
    chosen = [_find(name.strip()) for name in (names.split(",") if isinstance(names, str) else names)]
    prompts: dict[Kind, tuple[str, ...]] = {}
    sources: dict[str, dict[str, Any]] = {}
    builtin = builtin_prompts("held_out")
    for kind in ("malicious", "benign"):
        giver = next(((each, revision) for each, revision in chosen if kind in each.parts), None)
        if giver is None:
            prompts[kind] = getattr(builtin, kind)
            sources[kind] = {"set": "built-in", "split": "held_out", "prompts": len(prompts[kind])}
        else:
            prompts[kind], sources[kind] = _load(*giver, kind, most)
    return ContrastPrompts(prompts["malicious"], prompts["benign"]), sources


def _find(name: str) -> tuple[PromptSet, str]:
    base, _, revision = name.partition("@")
    if base not in PROMPT_SETS:
        raise ProConError(f"there is no prompt set {name!r:.60}: choose {', '.join(PROMPT_SETS)}")
    return PROMPT_SETS[base], revision or "main"


def _load(chosen: PromptSet, revision: str, kind: Kind, most: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    part = chosen.parts[kind]
    rows, commit = _rows(chosen, part, revision)
    for column in (chosen.column, *part.where):
        if column not in rows.column_names:
            raise ProConError(
                f"prompt set {chosen.name!r} has no column {column!r} at revision {revision!r:.60}, but "
                f"{sorted(rows.column_names)!r:.200}: give the revision that has it, as in {chosen.name}@REVISION"
            )
    for column, value in part.where.items():
        rows = rows.select([place for place, found in enumerate(rows[column]) if found == value])
    texts = tuple(_prompt(chosen, value) for value in rows[chosen.column])
    if not texts:
        raise ProConError(
            f"prompt set {chosen.name!r} has no {kind} prompts at revision {revision!r:.60}: give another"
        )
    taken = texts
    if 0 < most < len(texts):
        taken = tuple(texts[place * len(texts) // most] for place in range(most))
    source = {
        "set": chosen.name,
        "source": chosen.source,
        "config": part.config,
        "split": part.split,
        "column": chosen.column,
        "where": dict(part.where),
        "revision": revision,
        "commit": commit,
        "prompts": len(taken),
        "of": len(texts),
    }
    return taken, source


def _prompt(chosen: PromptSet, value: object) -> str:
    if isinstance(value, list) and value:  # turns
        value = value[0]
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT:
        raise ProConError(f"prompt set {chosen.name!r} has the prompt {value!r:.60}: give a revision with texts")
    return value.strip()


def _rows(chosen: PromptSet, part: Part, revision: str) -> tuple[Dataset, str | None]:
    """The rows, and the commit that they are of, if the hub said which."""
    try:
        with _quiet():
            builder = datasets.load_dataset_builder(chosen.source, part.config, revision=revision, **chosen.options)
            builder.download_and_prepare()
            found = builder.as_dataset(split=part.split)
    except Exception as error:  # of many libraries
        raise _unloadable(chosen, revision, error) from error
    if isinstance(found, DatasetDict):
        found = datasets.concatenate_datasets(list(found.values()))
    if not isinstance(found, Dataset):
        raise ProConError(f"prompt set {chosen.name!r} is no table at revision {revision!r:.60}: give another")
    commit = builder.hash
    return found, commit if commit and re.fullmatch("[0-9a-f]{40}", commit) else None


def _unloadable(chosen: PromptSet, revision: str, error: Exception) -> ProConError:
    cause = error.__cause__ or error
    said = f"{error} {cause}".lower()
    if "gated" in said or "401" in said or "403" in said:
        return ProConError(
            f"prompt set {chosen.name!r} is gated: ask for access at https://huggingface.co/datasets/{chosen.source}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return ProConError(
        f"prompt set {chosen.name!r} ({chosen.source} at revision {revision!r:.60}) cannot be loaded ({reason:.200}): "
        "check the network and the revision, or give files with --malicious and --benign"
    )
