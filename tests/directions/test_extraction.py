"""Directions from prompts: difference in means by definition, whatever the batch; one per block, or several."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from procon.chat import ContrastPrompts, builtin_prompts, render, template_hash, user_turn
from procon.directions import ContrastMeans, Directions, auroc, project_last_token
from procon.directions import directions as module
from procon.directions.extraction import DEAD_GAP, further_directions, hold_out
from procon.errors import ProConError
from procon.models import origin_of

#: Unequal lengths and unequal sides, so that padding or a wrong divisor shows.
PROMPTS = ContrastPrompts(
    malicious=("steal it", "forge a passport for me tonight", "rob", "break the window of the old house", "spy on her"),
    benign=("paint it", "wash the car for me", "sing about the window of the old house tonight"),
)
HELD_OUT = ContrastPrompts(malicious=("burn the barn", "poison", "cheat them all"), benign=("bake", "mend the barn"))

#: Unequal categories, not in order.
BY_CATEGORY = ContrastPrompts(
    malicious=("steal it", "forge a passport for me tonight", "rob", "poison the well", "spy on her", "burn it down"),
    benign=("paint it", "wash the car for me", "sing", "dig the well", "wait for her at noon", "light the candle"),
    categories=("theft", "fraud", "theft", "harm", "fraud", "theft"),
)

ROPE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox")


def by_definition(model, tokenizer, prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """``[prompts, L, D]``: what enters each block at the last prompt token of each prompt."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([render(tokenizer, user_turn(prompt), generation_prompt=True)])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        rows.append(torch.stack([state[0, -1] for state in states[:-1]]))  # the last is the final norm's output
    return torch.stack(rows)


def extract(model, tokenizer, prompts: ContrastPrompts | None = PROMPTS, **settings) -> Directions:
    settings = {"held_out": HELD_OUT, "check_refusal": False, "progress": False} | settings
    return Directions.extract(model, tokenizer, prompts, **settings)


@pytest.mark.parametrize("family", [*ROPE_FAMILIES, "gpt2"])
def test_difference_in_means_by_definition(tiny_model, tokenizer, family):
    """In fp64, where only the order of the sums differs: 1e-12 of the states' size is thousands of roundings."""
    model = tiny_model(family).double().eval()
    found = ContrastMeans.measure(model, tokenizer, PROMPTS, batch_size=3, progress=False)
    malicious, benign = (by_definition(model, tokenizer, side) for side in (PROMPTS.malicious, PROMPTS.benign))
    size = malicious.abs().max().item()
    torch.testing.assert_close(found.malicious, malicious.mean(0), rtol=0, atol=1e-12 * size)
    torch.testing.assert_close(found.benign, benign.mean(0), rtol=0, atol=1e-12 * size)

    difference = malicious.mean(0) - benign.mean(0)
    gap = difference.norm(dim=-1)
    first = 0 if family == "gpt2" else 1
    directions = Directions.from_means(found)
    assert directions.usable.tolist() == [block >= first for block in range(3)]
    assert directions.block_count == 3
    assert directions.basis.dtype == directions.gaps.dtype == torch.float32
    unit = difference[first:] / gap[first:, None]
    # One rounding to fp32 of a number below 1, and as much again for the means, whose error is nothing beside the gap.
    assert 1e-12 * size < 2**-25 * gap[first:].min()
    torch.testing.assert_close(directions.basis[first:, 0].double(), unit, rtol=0, atol=2**-24)
    torch.testing.assert_close(directions.gaps[first:, 0].double(), gap[first:], rtol=2**-23, atol=0)
    for side, states in ((directions.positive[:, 0], malicious), (directions.negative[:, 0], benign)):
        expected = (states.mean(0)[first:] * unit).sum(-1)
        torch.testing.assert_close(side[first:].double(), expected, rtol=2**-23, atol=1e-12 * size)


@pytest.mark.parametrize("family", ROPE_FAMILIES)
def test_the_first_block_of_a_model_without_learned_positions_has_no_direction(tiny_model, tokenizer, family):
    """Its input at the last prompt token is one embedding, the same for every prompt."""
    found = extract(tiny_model(family), tokenizer)
    assert found.usable.tolist() == [False, True, True]
    assert found.gaps[0] == 0
    assert found.basis[0].count_nonzero() == 0
    assert found.auroc[0].isnan()
    torch.testing.assert_close(found.basis[1:, 0].norm(dim=-1), torch.ones(2), rtol=2**-22, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_batches_and_padding_change_nothing(tiny_model, tokenizer, family):
    model = tiny_model(family).double()
    one, eight = (ContrastMeans.measure(model, tokenizer, PROMPTS, batch_size=n, progress=False) for n in (1, 8))
    for name in ("malicious", "benign", "scale"):
        torch.testing.assert_close(getattr(one, name), getattr(eight, name), rtol=1e-12, atol=1e-14)
    basis = Directions.from_means(one).basis
    z = [project_last_token(model, tokenizer, basis, PROMPTS.benign, batch_size=n, progress=False) for n in (1, 8)]
    torch.testing.assert_close(*z, rtol=2**-22, atol=1e-8)


def test_projections_of_held_out_prompts(tiny_model, tokenizer):
    model = tiny_model().eval()
    found = extract(model, tokenizer)
    sides = []
    for side in (HELD_OUT.malicious, HELD_OUT.benign):
        states = by_definition(model, tokenizer, side).double()
        expected = (states * found.basis[:, 0].double()).sum(-1, keepdim=True)
        # A dot product of 32 fp32 terms, whose terms add up to at most |h| for a unit direction.
        bound = 64 * 2**-24 * states.norm(dim=-1).max().item()
        z = project_last_token(model, tokenizer, found.basis, side, progress=False)
        torch.testing.assert_close(z.double(), expected, rtol=0, atol=bound)
        sides.append(z)
    torch.testing.assert_close(found.auroc[1:], auroc(*sides)[1:], rtol=0, atol=0)
    torch.testing.assert_close(found.positive - found.negative, found.gaps, rtol=2**-20, atol=0)


def test_the_model_is_left_as_it_was(tiny_model, tokenizer):
    model = tiny_model("gpt2")
    model.train()
    model.transformer.h[1].eval()
    flags = [m.training for m in model.modules()]
    first, second = extract(model, tokenizer), extract(model, tokenizer)
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert first.hash == second.hash  # GPT-2 drops out in training mode


def test_dead_blocks_are_told_from_weak_ones(tiny_model, tokenizer):
    means = ContrastMeans.measure(tiny_model(), tokenizer, PROMPTS, progress=False)
    unit = torch.zeros_like(means.benign)
    unit[:, 0] = means.scale
    for ratio, usable in ((0.9 * DEAD_GAP, False), (1.1 * DEAD_GAP, True)):
        shifted = replace(means, malicious=means.benign + ratio * unit)
        if usable:
            assert Directions.from_means(shifted).usable.all()
        else:
            with pytest.raises(ProConError, match="give the same hidden states: pass prompts that differ"):
                Directions.from_means(shifted)


def test_auroc_against_counting():
    generator = torch.Generator().manual_seed(0)
    positive = torch.randint(0, 5, (9, 4), generator=generator).float()  # few values, so many ties
    negative = torch.randint(-1, 4, (6, 4), generator=generator).float()
    expected = [
        sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positive[:, c].tolist() for n in negative[:, c].tolist())
        / (9 * 6)
        for c in range(4)
    ]
    assert auroc(positive, negative).tolist() == pytest.approx(expected, abs=2**-22)
    assert auroc(positive + 100, negative).tolist() == [1] * 4
    assert auroc(positive - 100, negative).tolist() == [0] * 4
    assert auroc(positive[:1], positive[:1]).tolist() == [0.5] * 4


@pytest.mark.parametrize(("where", "block"), [("embed_tokens", 0), ("layers.0", 1), ("layers.1", 2)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("check_refusal", [True, False])
@pytest.mark.filterwarnings("ignore:the model refuses 0")
def test_states_that_are_not_finite(tiny_model, tokenizer, where, block, value, check_refusal):
    model = tiny_model()
    part = model.model.get_submodule(where)
    next(p for p in part.parameters()).data.fill_(value)
    with pytest.raises(ProConError, match=f"entering block {block} are NaN or infinite: load the model in bfloat16"):
        extract(model, tokenizer, check_refusal=check_refusal)


def test_a_model_that_refuses_nothing_is_warned_of(tiny_model, tokenizer):
    with pytest.warns(UserWarning, match="refuses 0% of malicious prompts"):
        found = extract(tiny_model(), tokenizer, check_refusal=True)
    assert found.provenance["refusal_rate"] == 0


def test_provenance(tiny_model, tokenizer):
    model = tiny_model()
    model.config._name_or_path = "some/model"
    found = extract(model, tokenizer)
    assert found.provenance | {"versions": None} == {
        "model": "some/model",
        "revision": None,
        "origin": origin_of(tiny_model()),
        "dtype": "torch.float32",
        "chat_template": template_hash(tokenizer),
        "chat": {"system_prompt": None, "template_kwargs": {}},
        "prompts": PROMPTS.hash,
        "held_out_prompts": HELD_OUT.hash,
        "counts": {"positive": 5, "negative": 3},
        "position": "last prompt token",
        "refusal_rate": None,
        "versions": None,
    }
    assert found.provenance["versions"]["torch"] == torch.__version__


# Several directions per block


def one_by_one(first: torch.Tensor, differences: torch.Tensor, count: int) -> torch.Tensor:
    """``[count, D]`` for one block: the main axis of what is left of ``differences [C, D]``, removed, and again."""
    left = differences - torch.outer(differences @ first, first)
    found = []
    for _ in range(count):
        axis = torch.linalg.eigh(left.T @ left).eigenvectors[:, -1]
        found.append(axis)
        left = left - torch.outer(left @ axis, axis)
    return torch.stack(found)


def assert_orthonormal(basis: torch.Tensor) -> None:
    product = basis.double() @ basis.double().mT
    # Each number is rounded to fp32 once.
    torch.testing.assert_close(product, torch.eye(basis.shape[1]).double().expand_as(product), rtol=0, atol=2**-22)


def assert_same_up_to_sign(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    sign = (found.double() * expected.double()).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(found.double(), expected.double() * sign, rtol=0, atol=tolerance)


def test_further_directions_by_definition():
    generator = torch.Generator().manual_seed(0)
    differences = torch.randn(6, 2, 16, generator=generator, dtype=torch.float64)
    first = torch.nn.functional.normalize(torch.randn(2, 16, generator=generator, dtype=torch.float64), dim=-1)
    found = further_directions(first, differences, 4, torch.zeros(2))
    assert_orthonormal(torch.cat([first[:, None], found], 1))
    for block in range(2):
        assert_same_up_to_sign(found[block], one_by_one(first[block], differences[:, block], 4), 1e-9)
        along = differences[:, block] @ found[block].T
        assert (along.gather(0, along.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_extracted_from_the_categories_of_the_prompts(tiny_model, tokenizer, family):
    model = tiny_model(family).double().eval()
    means = ContrastMeans.measure(model, tokenizer, BY_CATEGORY, by_category=True, batch_size=4, progress=False)
    found = Directions.from_means(means, 3)
    malicious, benign = (by_definition(model, tokenizer, side) for side in (BY_CATEGORY.malicious, BY_CATEGORY.benign))
    pairs = malicious - benign
    rows = [[i for i, name in enumerate(BY_CATEGORY.categories) if name == one] for one in ("fraud", "harm", "theft")]
    differences = torch.stack([pairs[members].mean(0) for members in rows])
    size = means.scale.max().item()
    torch.testing.assert_close(means.differences, differences, rtol=0, atol=1e-12 * size)
    usable = found.usable.nonzero().flatten().tolist()
    assert usable == ([1, 2] if family == "llama" else [0, 1, 2])
    for block in usable:
        first = pairs.mean(0)[block] / pairs.mean(0)[block].norm()
        torch.testing.assert_close(found.basis[block, 0].double(), first, rtol=0, atol=2**-24)
        assert_same_up_to_sign(found.basis[block, 1:], one_by_one(first, differences[:, block], 2), 2**-23)
    assert_orthonormal(found.basis[usable])


def test_one_of_several_is_the_one(tiny_model, tokenizer):
    model = tiny_model()
    alone, bare, three = (
        extract(model, tokenizer, prompts, k=k)
        for k, prompts in ((1, BY_CATEGORY), (1, replace(BY_CATEGORY, categories=())), (3, BY_CATEGORY))
    )
    assert (alone.k, three.k) == (1, 3)
    assert three.concepts == ("refusal", "refusal_2", "refusal_3")
    assert alone.hash == bare.hash != three.hash
    assert alone.provenance == bare.provenance == three.provenance
    for name in ("basis", "gaps", "positive", "negative"):
        assert torch.equal(getattr(alone, name), getattr(three, name)[:, :1])
    torch.testing.assert_close(alone.auroc, three.auroc[:, :1], equal_nan=True)
    assert torch.equal(three.gaps[1:], alone.gaps[1:].expand(2, 3))
    # The first block of this family has no direction.
    assert three.basis[0].count_nonzero() == 0
    assert torch.equal(three.cosine(alone).isnan(), torch.tensor([True, False, False]))


@pytest.mark.parametrize(
    ("k", "prompts", "message"),
    [
        (0, BY_CATEGORY, "k is 0: give 1 to 3"),
        (4, BY_CATEGORY, "k is 4: give 1 to 3"),
        (9, builtin_prompts("extraction"), "k is 9: give 1 to 8"),
        (2, replace(BY_CATEGORY, categories=()), "k is 2: give 1 to 1"),
    ],
)
def test_a_k_that_the_prompts_do_not_give(k, prompts, message):
    with pytest.raises(ProConError, match=message):
        Directions.extract(None, None, prompts, k=k)


# What extraction takes if it is not told, and what it refuses first

SPLITS = {
    "extraction": ContrastPrompts(malicious=("rob her", "spy"), benign=("sing", "bake a cake")),
    "held_out": ContrastPrompts(malicious=("steal it",), benign=("wait", "wash it")),
}


def test_built_in_prompts_are_taken_by_their_purpose(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "builtin_prompts", SPLITS.__getitem__)
    found = extract(tiny_model(), tokenizer, None, held_out=None)
    assert found.provenance["prompts"] == SPLITS["extraction"].hash
    assert found.provenance["held_out_prompts"] == SPLITS["held_out"].hash
    with pytest.raises(ProConError, match=r"^no prompts of 'french' are given: pass ContrastPrompts\(positive, neg"):
        extract(tiny_model(), tokenizer, None, name="french")


def test_prompts_of_another_concept_give_what_they_give_for_refusal(tiny_model, tokenizer):
    """The difference in means is the same; nothing is generated."""
    model = tiny_model().eval()
    found = extract(model, tokenizer, BY_CATEGORY, name="french", k=2, check_refusal=True)
    same = extract(model, tokenizer, BY_CATEGORY, k=2)
    assert found.hash == same.hash
    assert found.concepts == ("french", "french_2")
    assert found.provenance == same.provenance
    few = extract(model, tokenizer, BY_CATEGORY, name="french", held_out=None)
    assert few.provenance["held_out_prompts"] is None
    assert few.auroc.isnan().all()  # too few prompts to hold any out
    with pytest.raises(ProConError, match=r"^the name of a concept is 'two words'"):
        extract(model, tokenizer, BY_CATEGORY, name="two words")


def test_every_fifth_prompt_is_held_out_if_there_are_ten(tiny_model, tokenizer):
    model = tiny_model().eval()
    many = ContrastPrompts(tuple(f"bonjour {n}" for n in range(11)), tuple(f"hello {n}" for n in range(10)))
    kept, out = hold_out(many)
    assert out == ContrastPrompts(("bonjour 4", "bonjour 9"), ("hello 4", "hello 9"))
    assert sorted(kept.malicious + out.malicious) == sorted(many.malicious)
    assert len(kept.benign) == 8
    assert hold_out(kept)[1] is None
    pairs = replace(many.first(10), categories=tuple("abcdefghij"))
    assert [part.categories for part in hold_out(pairs)] == [tuple("abcdfghi"), tuple("ej")]
    found = extract(model, tokenizer, many, name="french", held_out=None)
    same = extract(model, tokenizer, kept, name="french", held_out=out)
    assert (found.hash, found.provenance) == (same.hash, same.provenance)
    assert torch.equal(found.auroc[1:], same.auroc[1:])


def test_a_model_that_is_not_prepared_is_refused_before_it_runs(tiny_model, tokenizer, monkeypatch):
    def refuse(_model: nn.Module) -> None:
        raise ProConError("not prepared")

    monkeypatch.setattr(module, "refuse_unprepared", refuse)
    model = tiny_model()
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(ProConError, match="not prepared"):
        extract(model, tokenizer)
