"""The files that are damaged, in which regions, and how each is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from procon.anchors import Anchors, fingerprint
from procon.directions import DIRECTIONS_FILE, Directions
from procon.method.record import RECORD
from procon.models import find_decoder, origin_of
from procon.training.run_folder import Checkpoint, latest, open_checkpoint, seal

BLOCKS, WIDTH = 3, 32


@dataclass(frozen=True)
class Subject:
    """A file and a use of it.

    Attributes:
        name: of the file's kind.
        use: reads it as the library does; gives what must come out.
        way: in a word, how.
        regions: parts of the file by name: first byte and the one after the last.
        instead: gives what may come in its place, with a warning.
    """

    name: str
    file: Path
    way: str
    use: Callable[[], Any]
    regions: dict[str, tuple[int, int]]
    instead: Callable[[], Any] | None = None


def model_of(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


def directions_of(seed: int = 0, model: LlamaForCausalLM | None = None) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    first = torch.nn.functional.normalize(torch.randn(BLOCKS, WIDTH, generator=generator), dim=-1)
    provenance = {"model": "tiny", "counts": {"positive": 3, "negative": 4}, "refusal_rate": 0.5}
    provenance |= {} if model is None else {"origin": origin_of(model)}
    return Directions(first[:, None], torch.rand(BLOCKS, 1, generator=generator) + 0.5, provenance=provenance)


def batch() -> dict[str, torch.Tensor]:
    """Eight sequences of unequal length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([12, 7, 23, 5, 9, 16, 3, 24])
    mask = (torch.arange(24) < lengths[:, None]).long()
    ids = torch.randint(5, 60, (8, 24), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class AnchorsFolder:
    """Anchors of a tiny model, and both ways to them."""

    def __init__(self, folder: Path, seed: int = 0, directions: int = 0, **settings: Any) -> None:
        self.folder = folder
        self.model, self.directions = model_of(seed, **settings), directions_of(directions)
        self.state = fingerprint(self.model, self.directions, range(BLOCKS), "all")
        self.record()
        (self.shard,) = folder.glob("*.safetensors")
        self.manifest = folder / "anchors.json"

    def open(self) -> bytes:
        return _bytes(Anchors(self.folder))

    def record(self) -> bytes:
        return _bytes(
            Anchors.record(
                self.model,
                [batch()],
                self.directions,
                self.folder,
                progress=False,
                fingerprint=self.state,
            )
        )

    def subjects(self) -> Iterator[Subject]:
        for way, use in (("opened", self.open), ("recorded again", self.record)):
            yield Subject("anchors file", self.shard, way, use, tensor_regions(self.shard))
            yield Subject("anchors manifest", self.manifest, way, use, {"all": (0, self.manifest.stat().st_size)})


def directions_subject(folder: Path) -> Subject:
    file = directions_of(model=model_of()).save(folder / "directions.safetensors")

    def load() -> tuple:
        found = Directions.load(file)
        tensors = (found.basis, found.gaps, found.auroc, found.positive, found.negative)
        return [tensor.numpy().tobytes() for tensor in tensors], found.provenance

    return Subject("directions", file, "loaded", load, tensor_regions(file))


class Checkpoints:
    """Two sealed checkpoints: if the later one is damaged, training goes on from the one before."""

    FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = torch.Generator().manual_seed(0)
        settings = {"penalty": "absolute", "schedule": "procon_s:0.2", "blocks": [0, 1], "steps_per_epoch": 12}
        did = {"steps": 4, "constrained_steps": 4, "penalty_sum": 0.0321}
        for step in (2, 4):
            place = folder / f"checkpoint-{step}"
            place.mkdir(parents=True)
            for name in self.FILES:
                (place / name).write_bytes(bytes(torch.randint(256, (400,), generator=generator).tolist()))
            directions_of().save(place / DIRECTIONS_FILE)
            seal(place, {"version": "0", "constrained": True, **settings, "did": did, "resumable": True})
        self.place = place

    def resume(self) -> list:
        """The checkpoint that is gone on from, all of it."""
        return self._content(latest(self.folder))

    def before(self) -> list:
        return self._content(open_checkpoint(self.folder / "checkpoint-2"))

    def named(self) -> list:
        return self._content(open_checkpoint(self.place))

    def subjects(self) -> Iterator[Subject]:
        for name in (*self.FILES, DIRECTIONS_FILE, RECORD):
            file = self.place / name
            for way, use, instead in (("latest", self.resume, self.before), ("by name", self.named, None)):
                yield Subject(f"checkpoint's {name}", file, way, use, {"all": (0, file.stat().st_size)}, instead)

    @staticmethod
    def _content(checkpoint: Checkpoint | None) -> list:
        assert checkpoint is not None
        files = sorted(checkpoint.path.iterdir())
        return [checkpoint.record, *((file.name, file.read_bytes()) for file in files if file.name != RECORD)]


def tensor_regions(file: Path) -> dict[str, tuple[int, int]]:
    """Of a safetensors file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    places = {name: tuple(8 + length + place for place in entry["data_offsets"]) for name, entry in header.items()}
    return {"header": (0, 8 + length), **places}


def swaps(folder: Path) -> Iterator[tuple[str, Callable[[], Any], Any]]:
    """Files of other anchors or another model in the place of ours: what, how it is used, and what must come out."""
    others = {
        "another model": AnchorsFolder(folder / "model", seed=1),
        "other directions": AnchorsFolder(folder / "directions", directions=1),
        "another configuration": AnchorsFolder(folder / "settings", rms_norm_eps=0.3),
    }
    for what, other in others.items():
        for name in ("its own name", "our name"):
            for way in ("opened", "recorded again"):
                ours = AnchorsFolder(folder / f"{what} {name} {way}")
                expected = ours.open()
                shutil.copy(other.shard, ours.shard if name == "our name" else ours.folder)
                yield f"anchors file of {what}, {name}", ours.open if way == "opened" else ours.record, expected
        ours = AnchorsFolder(folder / f"{what} manifest")
        expected = ours.open()
        shutil.copy(other.manifest, ours.manifest)
        yield f"anchors manifest of {what}", ours.open, expected
        yield f"anchors manifest of {what}", ours.record, expected
    file = directions_of(model=model_of(seed=1)).save(folder / "other.safetensors")

    def fit() -> None:
        found, model = Directions.load(file), model_of()
        found.check_fits(find_decoder(model))
        found.check_origin(model)

    yield "directions of another model", fit, "a refusal"


def _bytes(anchors: Anchors) -> bytes:
    return anchors.annotate(batch())["anchors"].numpy().tobytes()
