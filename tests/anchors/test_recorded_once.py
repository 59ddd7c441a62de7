"""A sequence is recorded once, and under a name that says all that its anchors depend on."""

import copy

import pytest
import torch

from procon.anchors import Anchors
from procon.anchors.store import fingerprint
from procon.data import padding_collator
from procon.directions import randomized
from procon.sequences import split_batch


def test_the_same_sequence_again_costs_no_forward(tiny_model, tokenizer, random_directions, samples, tmp_path):
    model, forwards = tiny_model(), []
    model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    collate = padding_collator(tokenizer)
    batches = [collate(copy.deepcopy(samples[begin:end])) for begin, end in ((0, 2), (0, 2), (1, 3), (0, 3))]
    settings = {"scope": "response", "progress": False}
    found = Anchors.record(model, batches, random_directions(model), tmp_path, **settings)
    assert len(found) == 3
    assert len(forwards) == 3  # one of a token, which shows the precision
    again = Anchors.record(model, batches[:2], random_directions(model), tmp_path, **settings)
    assert len(again) == 3
    assert len(forwards) == 4


def test_what_the_fingerprint_follows(tiny_model, random_directions):
    model = tiny_model().bfloat16()
    directions = random_directions(model)
    usual = fingerprint(model, directions, (0, 1), "all")
    assert usual == fingerprint(copy.deepcopy(model), directions, [0, 1], "all", "no")
    assert len(usual) == 16
    int(usual, 16)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        next(moved.parameters())[0, 0] += 1
    others = [
        fingerprint(moved, directions, (0, 1), "all"),
        fingerprint(copy.deepcopy(model).float(), directions, (0, 1), "all"),  # the same values
        fingerprint(model, randomized(directions, 1), (0, 1), "all"),
        fingerprint(model, directions, (0, 2), "all"),
        fingerprint(model, directions, (0, 1), "response"),
        fingerprint(model, directions, (0, 1), "all", "bf16"),
        fingerprint(model, directions, (0, 1), "all", "fp16"),
    ]
    assert len({usual, *others}) == len(others) + 1


def test_progress_is_shown_unless_it_is_not_wanted(tiny_model, tokenizer, random_directions, samples, tmp_path, capsys):
    model = tiny_model()
    batch = padding_collator(tokenizer)(samples[:2])
    Anchors.record(model, [batch], random_directions(model), tmp_path / "quiet", progress=False)
    assert capsys.readouterr().err == ""
    Anchors.record(model, [batch], random_directions(model), tmp_path / "shown")
    assert "anchors: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("blocks", [None, (0, 2), [1]])
def test_what_anchors_know_of_themselves(tiny_model, tokenizer, random_directions, samples, tmp_path, blocks):
    model = tiny_model()
    batch = padding_collator(tokenizer)(samples[:2])
    directions = random_directions(model)
    found = Anchors.record(model, [batch], directions, tmp_path, blocks=blocks, scope="prompt", progress=False)
    expected = (0, 1, 2) if blocks is None else tuple(blocks)
    assert found.blocks == expected
    assert found.scope == "prompt"
    assert found.k == 1
    assert found.fingerprint == fingerprint(model, directions, expected, "prompt")
    assert all(sequence in found for sequence in split_batch(batch))
    other = padding_collator(tokenizer)(samples[2:4])
    assert not any(sequence in found for sequence in split_batch(other))
    annotated = found.annotate(batch)
    assert annotated["anchors"].shape == (*batch["input_ids"].shape, len(expected))
