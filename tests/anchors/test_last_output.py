"""Anchors of the output of the last block, which is the input of no block."""

import pytest
import torch
from torch.utils.data import DataLoader

from procon.anchors import Anchors
from procon.data import padding_collator
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import find_decoder


@pytest.fixture
def directions() -> Directions:
    unit = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    return Directions(torch.nn.functional.normalize(unit, dim=-1)[:, None], torch.ones(4, 1), last_output=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recorded_if_it_is_asked_for(tiny_model, directions, samples, tokenizer, tmp_path, family):
    model = tiny_model(family).eval()
    loader = DataLoader(samples, batch_size=3, collate_fn=padding_collator(tokenizer))
    asked = Anchors.record(model, loader, directions, tmp_path / "asked", blocks=[1, 3], progress=False)
    default = Anchors.record(model, loader, directions, tmp_path / "default", progress=False)
    assert default.blocks == (0, 1, 2)  # block inputs, as with directions of earlier versions

    seen = {}

    def keep(_module, _args, output) -> None:
        seen["left"] = output if isinstance(output, torch.Tensor) else output[0]

    find_decoder(model).blocks[-1].register_forward_hook(keep)
    for sample in samples:
        with torch.no_grad():
            inputs = model(torch.tensor([sample["input_ids"]]), output_hidden_states=True).hidden_states
        expected = torch.stack([inputs[1][0] @ directions.basis[1, 0], seen["left"][0] @ directions.basis[3, 0]], -1)
        batch = dict(padding_collator(tokenizer)([sample]))
        found = asked.annotate(batch)
        live = found["constraint_mask"][0] > 0
        # Batched and single forwards sum in another order: a few ulp of values of order 1.
        torch.testing.assert_close(found["anchors"][0][live], expected[live], rtol=0, atol=1e-5)
        torch.testing.assert_close(default.annotate(batch)["anchors"][..., 1], found["anchors"][..., 0])


def test_states_that_leave_the_last_block_and_are_not_finite(tiny_model, directions, samples, tokenizer, tmp_path):
    model = tiny_model().eval()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(torch.inf)
    loader = DataLoader(samples, batch_size=3, collate_fn=padding_collator(tokenizer))
    with pytest.raises(ProConError, match="hidden states leaving the last block are NaN or infinite on the sample of"):
        Anchors.record(model, loader, directions, tmp_path, blocks=[1, 3], progress=False)
