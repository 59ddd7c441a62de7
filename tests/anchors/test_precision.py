"""Anchors of one precision are not those of another: not in a loop either."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator

from procon.anchors import Anchors
from procon.anchors.precision import running_precision
from procon.data import padding_collator
from procon.errors import ProConError


@pytest.fixture
def record(tokenizer, random_directions, samples, tmp_path):
    """``record(model)``: its anchors, always in one folder."""
    batch = padding_collator(tokenizer)(samples[:2])

    def make(model) -> Anchors:
        return Anchors.record(model, [batch], random_directions(model), tmp_path / "anchors", progress=False)

    return make


def test_another_precision_is_refused_in_a_loop(record, tiny_model, random_directions):
    """Of a model that Accelerate has prepared, of autocast around the loop, and of the weights' dtype."""
    plain = record(tiny_model())
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(tiny_model())
    rounded = tiny_model().to(torch.bfloat16)
    refused = "another model state or precision"
    for model, around in ((prepared, nullcontext()), (tiny_model(), torch.autocast("cpu", torch.bfloat16))):
        with around:
            assert running_precision(model) == "bf16"
            with pytest.raises(ProConError, match=refused):
                record(model)
            with pytest.raises(ProConError, match=refused):
                plain.check_fits(model, random_directions(model))
    with pytest.raises(ProConError, match=refused):
        record(rounded)
    assert running_precision(rounded) == "no"
    assert record(tiny_model()).fingerprint == plain.fingerprint
    plain.check_fits(tiny_model(), random_directions(tiny_model()))


def test_the_same_precision_finds_them_again(record, tiny_model):
    with torch.autocast("cpu", torch.bfloat16):
        first = record(tiny_model())
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(tiny_model())
    assert record(prepared).fingerprint == first.fingerprint


def test_hidden_states_in_another_dtype_than_the_embedding_s(tiny_model):
    """As FSDP2 has them, which casts parameters as it gathers them."""
    model = tiny_model()
    model.model.embed_tokens.register_forward_hook(lambda *found: found[-1].bfloat16())
    model.model.layers.to(torch.bfloat16)
    model.model.norm.to(torch.bfloat16)
    assert running_precision(model) == "hidden states torch.bfloat16"
