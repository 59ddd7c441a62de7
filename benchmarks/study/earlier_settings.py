"""Settings of the methods that were run, as the library has them today.

Run files and plans carry the names that they were run under: one setting for all sources of anchors, a number of
probes, and settings that did not pay and are gone. Methods with one of those can be reported, and not run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from procon.chat import builtin_probes
from procon.errors import ProConError

#: What a setting that is gone has to be for the library to do the same without it.
_GONE = {"procon_sides": "both", "procon_block_weights": "equal", "procon_reduction": "token"}


def settings_now(config: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """``config`` with today's names; probes that are not all of the built-in ones go into a file in ``folder``.

    Raises:
        ProConError: for a method whose code is gone.
    """
    found = dict(config)
    source = found.pop("procon_anchors", "recorded+probes")
    tokens, _, probes = ("none", "", "probes") if source == "probes" else source.partition("+")
    kept, count = found.pop("procon_probe_hold", "state"), found.pop("procon_probe_count", 128)
    gone = {name: found.pop(name) for name in _GONE if name in found}
    retired = [name for name, value in gone.items() if value != _GONE[name]]
    if str(found.get("procon_schedule", "")).startswith("hold"):
        retired.append("procon_schedule")
    if probes and kept != "state":
        retired.append("procon_probe_hold")
    if retired:
        raise ProConError(f"{retired[0]} of this method is gone: run it at the commit that its run file names")
    if probes and "procon_probes" not in found and count < len(builtin_probes()):
        file = Path(folder) / f"probes-{count}.jsonl"
        file.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in builtin_probes()[:count]))
        found["procon_probes"] = str(file)
    return {"procon_probes": "builtin" if probes else "none", **found, "procon_anchors": tokens}
