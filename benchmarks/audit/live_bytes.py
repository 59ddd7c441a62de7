"""Live bytes at the peak of one training step of a 16-block Llama: plain, naive, and under the constraint.

Counted are the storages that operations make within the step and that are still alive: activations, gradients and
temporaries, and the reference model's activations. Weights, those of the reference too, were there before and are
reported separately. The naive way is the paper's loss as one would write it: a frozen copy of the model runs the batch
first without gradients, ``output_hidden_states=True`` keeps the block inputs, and the loss is
``((h.float() @ r - a) ** 2)``.
"""

import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from procon.constraint import ProjectionConstraint
from procon.directions import Directions

BLOCKS, TOKENS, WIDTH, SEQUENCES = 16, 512, 576, 8
DTYPES = (torch.float32, torch.bfloat16)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are still alive; ``peak`` is their maximum."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            self._know(leaf, counted=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._know(leaf, counted=True)
        return result

    def _know(self, leaf: object, *, counted: bool) -> None:
        if not isinstance(leaf, Tensor):
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0

        def freed(_reference, key=key, size=size):
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True)
class Record:
    way: str
    dtype: str
    blocks: int
    unit_bytes: int  # U, one [N, D] tensor in the model's dtype
    peak_bytes: int
    over_plain: float
    extra_units: float  # (peak - plain peak) / U
    weight_bytes: int  # of all models that the way needs, not part of the peak


def run() -> list[dict]:
    return [asdict(record) for dtype in DTYPES for record in _records(dtype)]


def _records(dtype: torch.dtype) -> list[Record]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=BLOCKS,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    model = LlamaForCausalLM(config).to(dtype).train()
    reference = deepcopy(model).eval().requires_grad_(False)
    unit = torch.nn.functional.normalize(torch.randn(BLOCKS, WIDTH), dim=1)
    ids = torch.randint(0, config.vocab_size, (SEQUENCES, TOKENS // SEQUENCES))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    peaks = {
        "plain": (_peak(model, lambda: _plain(model, ids)), weights),
        "naive": (_peak(model, lambda: _naive(model, reference, unit, ids)), 2 * weights),
        "pass-through": (_peak(model, lambda: _constrained(model, unit, ids, "never")), weights),
        "fused": (_peak(model, lambda: _constrained(model, unit, ids, "auto")), weights),
    }
    unit_bytes = TOKENS * WIDTH * dtype.itemsize
    plain, _ = peaks["plain"]
    return [
        Record(
            way=way,
            dtype=str(dtype).removeprefix("torch."),
            blocks=BLOCKS,
            unit_bytes=unit_bytes,
            peak_bytes=peak,
            over_plain=peak / plain,
            extra_units=(peak - plain) / unit_bytes,
            weight_bytes=weight_bytes,
        )
        for way, (peak, weight_bytes) in peaks.items()
    ]


def _peak(model: LlamaForCausalLM, step: Callable[[], None]) -> int:
    model.zero_grad()
    with LiveBytes() as counter:
        step()
    return counter.peak


def _plain(model: LlamaForCausalLM, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def _naive(model: LlamaForCausalLM, reference: LlamaForCausalLM, unit: Tensor, ids: Tensor) -> None:
    with torch.no_grad():
        hidden_states = reference(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        anchors = [h.float() @ r for h, r in zip(hidden_states[:-1], unit, strict=True)]
        del hidden_states
    output = model(input_ids=ids, labels=ids, use_cache=False, output_hidden_states=True)
    terms = [
        ((h.float() @ r - a) ** 2).mean() for h, r, a in zip(output.hidden_states[:-1], unit, anchors, strict=True)
    ]
    (output.loss + torch.stack(terms).mean()).backward()


def _constrained(model: LlamaForCausalLM, unit: Tensor, ids: Tensor, fuse: str) -> None:
    ones = torch.ones(BLOCKS)
    with ProjectionConstraint(Directions(unit[:, None], ones[:, None]), penalty="squared").attach(
        model, fuse
    ) as constraint:
        assert len(constraint.fused) == (BLOCKS if fuse == "auto" else 0)
        constraint.set_target(torch.randn(*ids.shape, BLOCKS), torch.ones(ids.shape))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss + constraint.penalty()).backward()


def show(records: list[dict]) -> None:
    table = Table(title=f"Live bytes of a step: {BLOCKS} blocks, {TOKENS} tokens of width {WIDTH}")
    table.add_column("way")
    table.add_column("dtype")
    for heading in ("peak, MiB", "over plain", "more than plain, U", "weights, MiB"):
        table.add_column(heading, justify="right")
    for record in records:
        table.add_row(
            record["way"],
            record["dtype"],
            f"{record['peak_bytes'] / 2**20:.1f}",
            f"{record['over_plain']:.3f}",
            f"{record['extra_units']:.1f}",
            f"{record['weight_bytes'] / 2**20:.1f}",
        )
    Console().print(table)
