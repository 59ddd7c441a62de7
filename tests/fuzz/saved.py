"""What the library itself saves, forged: well-formed files whose content is nonsense, and readers of one name."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from safetensors.torch import save_file
from texts import as_json, changed, damaged, encoded, text, value

from procon.anchors import Anchors
from procon.anchors.store import MANIFEST
from procon.chat import load_instructions
from procon.cli import launcher
from procon.cli.arguments import TrainArguments
from procon.data import load_conversations
from procon.directions import Directions
from procon.directions.directions import _TENSORS, _checksum, load_vectors, rows_of
from procon.errors import ProConError
from procon.evaluation import FORMATS, Evaluation, endpoint, load_judge
from procon.files import json_checksum
from procon.method import Probes
from procon.method.record import read_record
from procon.report import print_table, read_runs, write_html
from procon.settings import check_name

REPLY = {"kind": "malicious", "prompt": "a", "reply": "No.", "refused": True, "degenerate": False}
RATE = {"hits": 1, "total": 2}
ROW = {"step": 1, "loss": 0.5, "procon/drift_cos": 0.9, "train_runtime": 1.0}


def make_reported(random: Random) -> dict[str, bytes]:
    """Files by their names; of a training folder, or one alone."""
    evaluation = dict.fromkeys(("refusal_malicious", "refusal_benign", "degenerate", "unfinished"), RATE)
    evaluation |= {
        "label": "x",
        "task": random.choice((None, RATE)),
        "replies": [{**REPLY, "reply": text(random)}],
        "judge": "k",
    }
    evaluation["chat"] = {"system_prompt": None}
    record: dict[str, Any] = {"schedule": "0.2", "run": {"seed": 1}, "arguments": {"learning_rate": 1e-3}}
    record["checksum"] = json_checksum(record)
    alone = [
        {"mean_cosine": 0.5, "cosine": [None, 0.5]},
        evaluation,
    ]
    log = {"trainer_state.json": {"log_history": [ROW, ROW]}}
    files = random.choice(({"procon.json": record, "eval.json": evaluation, **log}, {"r.json": random.choice(alone)}))
    return {
        name: damaged(random, encoded(random, as_json(changed(random, data) if random.random() < 0.5 else data)))
        for name, data in files.items()
    }


def take_reported(files: dict[str, bytes]) -> None:
    folder = Path("reported")
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with suppress(ProConError):
        read_record(folder)
    runs = read_runs([folder / "r.json" if "r.json" in files else folder] * 2)
    print_table(runs, console := Console(file=io.StringIO(), width=120))
    assert "\x1b" not in console.file.getvalue()
    if len(files["eval.json" if "eval.json" in files else "r.json"]) % 100 == 0:  # plots take long
        page = write_html(runs, folder / "report.html", title=runs[0].label, notes=[runs[0].label])
        assert "<script>alert" not in page.read_text()


def make_accelerate(random: Random) -> bytes:
    lines = [f"distributed_type: {random.choice(('NO', 'FSDP', 'MULTI_GPU', text(random)))}"]
    number = random.choice((str(random.randrange(-1, 4)), ".inf", "two", "[2]", "~", as_json(value(random))))
    return damaged(random, encoded(random, "\n".join([*lines, f"num_processes: {number}"])))


def take_accelerate(content: bytes) -> None:
    path = Path("accelerate.yaml")
    path.write_bytes(content)
    arguments = TrainArguments(model="m", data="d", accelerate_config=str(path))
    for devices in (2, 0):
        assert launcher._processes(arguments, path, devices) >= 1


@cache
def _good(kind: str) -> dict[str, torch.Tensor]:
    unit = torch.nn.functional.normalize(torch.ones(3, 4), dim=-1)
    if kind == "probes":
        lengths = torch.tensor([2, 3])
        return {
            "input_ids": torch.ones(2, 3, dtype=torch.int64),
            "prompts": lengths - 1,
            "lengths": lengths,
            "states": torch.ones(4, 5),
        }
    if kind == "vectors":
        return {"0": unit[0], "2": unit[2], "last": unit[1], "bias": torch.zeros(3)}
    return {"basis": unit[:, None], **{name: torch.ones(3, 1) for name in _TENSORS[1:]}}


def make_tensors(random: Random) -> tuple[str, dict[str, torch.Tensor], Any, bytes]:
    kind = random.choice(("probes", "vectors", "directions"))
    tensors = dict(_good(kind))
    for name in random.sample(sorted(tensors), random.choice((0, 0, 1, 1, 2))):
        sizes = [random.randrange(4) for _ in range(random.randrange(4))]
        dtype = random.choice((torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.uint8))
        fill = random.choice((0, 1, -1, 3, float("nan"), float("inf"), 2**31))
        other = torch.full(sizes, fill, dtype=torch.float64).to(dtype)
        tensors[random.choice((name, name, name, text(random, 8)))] = other
    about = {"concepts": ["c"], "provenance": {}, "last_output": random.choice((True, False))}
    return kind, tensors, changed(random, about), random.randbytes(8) if random.random() < 0.2 else b""


def take_tensors(given: tuple[str, dict[str, torch.Tensor], Any, bytes]) -> None:
    kind, tensors, about, noise = given
    path = Path("forged.safetensors")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.unlink(missing_ok=True)
    with suppress(UnicodeEncodeError, TypeError):  # no file has such a name; no probes are of bfloat16
        if kind == "probes" and tensors.keys() == _good(kind).keys():
            Probes(**tensors).save(path)
        elif kind in ("vectors", "probes"):
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        else:
            given = {**about, "checksum": _checksum(tensors, about)} if isinstance(about, dict) else about
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"procon": json.dumps(given)})
    if noise and path.exists():
        data = bytearray(path.read_bytes())
        at = noise[0] * len(data) // 256
        data[at : at + noise[1] % 8] = noise[2:]
        path.write_bytes(data)
    if kind == "probes":
        Probes.load(path)
    elif kind == "vectors":
        rows_of(load_vectors(path), 3, 4)
    else:
        Directions.load(path)


def make_manifest(random: Random) -> bytes:
    content = {"fingerprint": "0123456789abcdef", "blocks": [0, 1], "scope": "all", "k": 1}
    content = changed(random, {**content, "checksum": json_checksum(content)})
    return damaged(random, as_json(content).encode(errors="replace"))


def take_manifest(content: bytes) -> None:
    Path(MANIFEST).write_bytes(content)
    Anchors(Path())


#: All that take the name of a file, a folder or a model.
BY_NAME = (load_conversations, load_instructions, load_vectors, lambda name: read_runs([name]), check_name)
BY_NAME += (Probes.load, Evaluation.load, Directions.load)


def make_name(random: Random) -> tuple[int, str]:
    name = text(random) * random.choice((1, 1, 200))
    return random.randrange(len(BY_NAME)), name + random.choice(("", "/", ".jsonl", ".txt", ".safetensors"))


def take_name(given: tuple[int, str]) -> None:
    with mock.patch("datasets.load_dataset", side_effect=ProConError("not on this machine")):
        BY_NAME[given[0]](given[1])


def make_judges(random: Random) -> tuple[str, bytes]:
    host = random.choice(("h:80", "[s9", "[::1]", "h:x", "u:p@h", "", text(random)))
    url = f"{random.choice(('http', 'https', 'file'))}://{host}/v1{random.choice(('', '#m', '?q'))}"
    name = random.choice((url, url, "keywords", f"llama-guard:{url}", "llama-guard", text(random)))
    said = random.choice(("refused", "unsafe\nS2", "<think>a</think> complied", text(random)))
    answer = {"choices": [{"message": {"content": said}}], "data": [{"id": "m"}]}
    return name, damaged(random, encoded(random, as_json(changed(random, answer))))


def take_judges(given: tuple[str, bytes]) -> None:
    names, answer = given
    for each in FORMATS.values():
        each.verdict(answer.decode(errors="replace"))
    with (
        mock.patch.object(endpoint._OPENER, "open", side_effect=lambda *_, **__: io.BytesIO(answer)),
        mock.patch.object(endpoint.time, "sleep"),
        mock.patch("procon.evaluation.endpoint.load_model", side_effect=ProConError("not on this machine")),
    ):
        load_judge(names)
