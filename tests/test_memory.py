"""What the constraint keeps alive: no reference model, no copies of hidden states."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from procon.constraint import ProjectionConstraint
from procon.directions import RefusalDirections

BLOCKS, TOKENS, WIDTH = 30, 768, 576


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

    def _know(self, leaf, *, counted: bool) -> None:
        if not isinstance(leaf, torch.Tensor):
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


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=BLOCKS,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config).train()


def peak_of_a_step(model, constraint=None, batch_size=8) -> int:
    ids = torch.randint(0, 256, (batch_size, TOKENS // batch_size), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    with LiveBytes() as counter:
        if constraint is not None:
            anchors = torch.randn(*ids.shape, len(constraint.blocks))
            constraint.target(anchors, torch.ones(ids.shape))
            del anchors
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if constraint is not None:
            loss = loss + constraint.penalty()
        loss.backward()
    return counter.peak


def test_peak_memory_of_a_step(model):
    unit = torch.nn.functional.normalize(torch.randn(BLOCKS, WIDTH), dim=1)
    ones = torch.ones(BLOCKS)
    plain = peak_of_a_step(model)
    with ProjectionConstraint(RefusalDirections(unit, ones, ones, ones, ones)).attach(model) as constraint:
        constrained = peak_of_a_step(model, constraint)
    allowed = BLOCKS * TOKENS * 16 + 16 * 2**20
    # One copy of one block input a block would be 53 MB.
    print(f"plain {plain / 2**20:.1f} MiB, constrained {constrained / 2**20:.1f} MiB, allowed +{allowed / 2**20:.1f}")
    assert plain > BLOCKS * TOKENS * WIDTH * 4  # the counter sees activations at all
    assert constrained - plain <= allowed
