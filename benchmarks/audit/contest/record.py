"""What was counted, kept: our kernels before and after, and those of others, in a file each."""

import json
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).with_name("recorded")
#: The record's name, and who is in it.
SIDES = {"before": ("ours",), "after": ("ours",), "peers": ("liger", "compiled")}


def keep(side: str, records: list[dict], commit: str | None) -> None:
    """``commit``: of the kernels, if they are not those of the tree."""
    packages = ("torch", "triton", *(("liger-kernel",) if side == "peers" else ()))
    head = {"commit": commit, "versions": {name: version(name).split("+")[0] for name in packages}}
    # A record a line, so that a change can be read.
    lines = ",\n".join(json.dumps(rounded(record)) for record in records)
    FOLDER.mkdir(exist_ok=True)
    _file(side).write_text(f'{{"made": {json.dumps(head)},\n"records": [\n{lines}\n]}}\n')


def kept(side: str) -> dict | None:
    """``made`` (commit, versions) and ``records``; None if there is no such record yet."""
    return json.loads(_file(side).read_text()) if _file(side).exists() else None


def _file(side: str) -> Path:
    return FOLDER / f"{side}.json"


def rounded(value):
    """Numbers to five digits, as they are recorded."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
