"""What ``procon eval`` asks, and what it prints of its judges."""

from __future__ import annotations

from typing import Any

from procon.chat import ContrastPrompts, builtin_prompts, load_instructions
from procon.cli.arguments import EvalArguments
from procon.data import load_prompt_sets
from procon.errors import ProConError
from procon.evaluation import Evaluation


def evaluation_prompts(arguments: EvalArguments) -> tuple[ContrastPrompts, dict[str, dict[str, Any]]]:
    """The prompts, and where each kind comes from; a file goes before a set, and a set before the built-in ones."""
    sources: dict[str, dict[str, Any]] = {}
    if arguments.prompts:
        prompts, sources = load_prompt_sets(arguments.prompts, most=arguments.max_prompts)
    elif arguments.max_prompts:
        raise ProConError(
            f"max_prompts is {arguments.max_prompts}, and there is no set to take them from: give --prompts"
        )
    else:
        prompts = builtin_prompts("held_out")
    given = {"malicious": arguments.malicious, "benign": arguments.benign}
    files = {kind: load_instructions(path) for kind, path in given.items() if path}
    if not files:
        return prompts, sources
    sources |= {kind: {"set": "file", "source": given[kind], "prompts": len(found)} for kind, found in files.items()}
    return ContrastPrompts(files.get("malicious", prompts.malicious), files.get("benign", prompts.benign)), sources


def judging_lines(found: Evaluation) -> list[str]:
    """Who judged, and where the prompts are from; nothing of an evaluation as by default."""
    lines = []
    for kind, source in found.sources.items():
        if source["set"] not in ("built-in", "file"):
            commit = source["commit"] or f"revision {source['revision']}, whose commit is not known"
            lines.append(f"{kind} prompts: {source['prompts']} of {source['of']} of {source['set']}, {commit}.")
    if found.judge != "keywords":
        benign = "" if found.judge_benign == found.judge else f"; replies to benign prompts by {found.judge_benign}"
        lines.append(f"Refusals are judged by {found.judge}{benign}.")
    return lines
