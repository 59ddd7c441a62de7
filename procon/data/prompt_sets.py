"""Published prompt sets by name: fetched from the hub by ``datasets``, kept in its cache, never bundled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import datasets
from datasets import DatasetDict

from procon.chat import ContrastPrompts, builtin_prompts
from procon.errors import ProConError


@dataclass(frozen=True)
class PromptSet:
    """Where a set is, and what of it is asked.

    Attributes:
        source: its name on the hub.
        column: where a row has its prompt; of a list of turns the first one is.
        parts: how ``datasets`` loads the prompts of a kind, ``malicious`` ones, which ought to be refused, or
            ``benign`` ones: ``config``, ``split`` (``train`` if not given), and ``where`` for the column by whose value
            rows are chosen.
    """

    source: str
    column: str
    parts: Mapping[str, Mapping[str, Any]]


#: Sets by name. Columns, configurations and splits are as published in 2026; no commit is known that would stay, so the
#: revision is ``main`` unless one is given, and the evaluation says which commit that was.
PROMPT_SETS = {
    "harmbench": PromptSet("walledai/HarmBench", "prompt", {"malicious": {"config": "standard"}}),
    "advbench": PromptSet("walledai/AdvBench", "prompt", {"malicious": {}}),
    "jailbreakbench": PromptSet(
        "JailbreakBench/JBB-Behaviors",
        "Goal",
        {
            "malicious": {"config": "behaviors", "split": "harmful"},
            "benign": {"config": "behaviors", "split": "benign"},
        },
    ),
    # CSV files without a header, one per category.
    "hex-phi": PromptSet("LLM-Tuning-Safety/HEx-PHI", "prompt", {"malicious": {"split": None, "names": ["prompt"]}}),
    "strongreject": PromptSet("walledai/StrongREJECT", "prompt", {"malicious": {}}),
    "sorry-bench": PromptSet(
        "sorry-bench/sorry-bench-202503", "turns", {"malicious": {"where": ("prompt_style", "base")}}
    ),
    "xstest": PromptSet(
        "Paul/XSTest",
        "prompt",
        {"malicious": {"where": ("label", "unsafe")}, "benign": {"where": ("label", "safe")}},
    ),
    "or-bench": PromptSet(
        "bench-llm/or-bench",
        "prompt",
        {"malicious": {"config": "or-bench-toxic"}, "benign": {"config": "or-bench-hard-1k"}},
    ),
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
    chosen = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    for name in chosen:
        if name.partition("@")[0] not in PROMPT_SETS:
            raise ProConError(f"there is no prompt set {name!r:.60}: choose {', '.join(PROMPT_SETS)}")
    prompts, sources = {}, {}
    for kind in ("malicious", "benign"):
        giver = next((name for name in chosen if kind in PROMPT_SETS[name.partition("@")[0]].parts), None)
        if giver is None:
            prompts[kind] = getattr(builtin_prompts("held_out"), kind)
            sources[kind] = {"set": "built-in", "split": "held_out", "prompts": len(prompts[kind])}
        else:
            prompts[kind], sources[kind] = _load(giver, kind, most)
    return ContrastPrompts(**prompts), sources


def _load(name: str, kind: str, most: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    name, _, revision = name.partition("@")
    chosen, revision = PROMPT_SETS[name], revision or "main"
    options = {"config": None, "split": "train", "where": None, **chosen.parts[kind]}
    config, split, where = (options.pop(option) for option in ("config", "split", "where"))
    try:
        builder = datasets.load_dataset_builder(chosen.source, config, revision=revision, **options)
        builder.download_and_prepare()
        found = builder.as_dataset(split=split)
        rows = datasets.concatenate_datasets([*found.values()] if isinstance(found, DatasetDict) else [found])
        prompts = [
            row[chosen.column]
            for row in cast("Iterable[dict[str, Any]]", rows)
            if where is None or row[where[0]] == where[1]
        ]
        texts = [(prompt[0] if isinstance(prompt, list) else prompt).strip() for prompt in prompts]
        if not (texts and all(texts)):
            raise ValueError(f"it has no {kind} prompts, or empty ones")
    except Exception as error:  # of many libraries
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise ProConError(
            f"prompt set {name!r} ({chosen.source} at revision {revision!r:.60}) cannot be loaded ({reason:.200}): "
            "check the network and the revision; for a gated set, ask for access at "
            f"https://huggingface.co/datasets/{chosen.source}, then log in with `hf auth login`; or give files with "
            "--malicious and --benign"
        ) from error
    taken = [texts[place * len(texts) // most] for place in range(most)] if 0 < most < len(texts) else texts
    commit = builder.hash if re.fullmatch("[0-9a-f]{40}", builder.hash or "") else None
    source = {"set": name, "source": chosen.source, "revision": revision, "commit": commit}
    return tuple(taken), {**source, "prompts": len(taken), "of": len(texts)}
