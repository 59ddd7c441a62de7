"""What extraction takes if it is not told, what it refuses first, and what it leaves open."""

import pytest
import torch
from torch import nn

from procon.chat import ContrastPrompts
from procon.directions import ContrastMeans, RefusalDirections, project_last_token, refusal_directions
from procon.directions.refusal_directions import check_k
from procon.errors import ProConError

PROMPTS = {
    "extraction": ContrastPrompts(malicious=("rob her", "spy"), benign=("sing", "bake a cake"), categories=("a", "b")),
    "held_out": ContrastPrompts(malicious=("steal it",), benign=("wait", "wash it")),
}
QUIET = {"check_refusal": False, "progress": False}


@pytest.fixture
def means() -> ContrastMeans:
    """Of four blocks; the first one's sides are the same."""
    make = torch.Generator().manual_seed(3)
    malicious, benign = torch.randn(2, 4, 16, generator=make, dtype=torch.float64)
    malicious[0] = benign[0]
    differences = torch.randn(3, 4, 16, generator=make, dtype=torch.float64)
    return ContrastMeans(malicious, benign, malicious.norm(dim=-1), differences)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_directions_of_given_means(means, k):
    found = RefusalDirections.from_means(means, k)
    assert found.k == k
    difference = means.malicious - means.benign
    torch.testing.assert_close(found.gap.double(), difference.norm(dim=-1))
    torch.testing.assert_close(found.first.double() * found.gap[:, None], difference, check_dtype=False)
    for side, projections in ((means.malicious, found.malicious), (means.benign, found.benign)):
        torch.testing.assert_close(projections.double(), (found.first.double() * side).sum(-1))
    assert found.usable.tolist() == [False, True, True, True]
    assert found.auroc.isnan().all()
    assert found.provenance == {}
    product = found.basis.double() @ found.basis.double().mT
    torch.testing.assert_close(product[1:], torch.eye(k).double().expand(3, k, k), rtol=0, atol=1e-6)
    assert not found.basis[0].any()
    tensors = (found.first, found.gap, found.auroc, found.malicious, found.benign, found.basis)
    assert all(tensor.dtype == torch.float32 for tensor in tensors)


def test_built_in_prompts_are_taken_by_their_purpose(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(refusal_directions, "builtin_prompts", PROMPTS.__getitem__)
    found = RefusalDirections.extract(tiny_model(), tokenizer, **QUIET)
    assert found.provenance["prompts"] == PROMPTS["extraction"].hash
    assert found.provenance["held_out_prompts"] == PROMPTS["held_out"].hash
    assert "directions_a_block" not in found.provenance
    given = RefusalDirections.extract(
        tiny_model(), tokenizer, PROMPTS["extraction"], held_out=PROMPTS["held_out"], k=2, batch_size=1, **QUIET
    )
    assert given.provenance["directions_a_block"] == given.k == 2
    torch.testing.assert_close(given.first, found.first, rtol=0, atol=1e-5)


def test_a_model_that_is_not_prepared_is_refused_before_it_runs(tiny_model, tokenizer, monkeypatch):
    def refuse(_model: nn.Module) -> None:
        raise ProConError("not prepared")

    monkeypatch.setattr(refusal_directions, "refuse_unprepared", refuse)
    model = tiny_model()
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(ProConError, match="not prepared"):
        RefusalDirections.extract(model, tokenizer, PROMPTS["extraction"], held_out=PROMPTS["held_out"], **QUIET)


def test_k_is_one_to_eight_and_as_many_as_categories():
    many = ContrastPrompts(malicious=tuple("abcdefghi"), benign=tuple("abcdefghi"), categories=tuple("abcdefghi"))
    none = ContrastPrompts(malicious=("a",), benign=("z",))
    for k in (1, 2, 8):
        check_k(k, many)
    check_k(1, none)
    check_k(2, PROMPTS["extraction"])
    for k in (0, -1, 9):
        with pytest.raises(ProConError, match=f"^k is {k}: give 1 to 8 directions per block$"):
            check_k(k, many)
    with pytest.raises(ProConError, match=r"^k is 3, but the prompts have 2 categories: give prompts with as many"):
        check_k(3, PROMPTS["extraction"])
    with pytest.raises(ProConError, match=r"^k is 2, but the prompts have 0 categories"):
        check_k(2, none)


def test_projections_are_in_the_order_of_the_prompts(tiny_model, tokenizer, random_directions):
    """Batches go by length, which may not show."""
    model = tiny_model()
    prompts = ("a long one, longer than any other", "b", "c is here", "d")
    directions = random_directions(model)
    whole = project_last_token(model, tokenizer, directions, prompts, progress=False)
    assert whole.shape == (4, 3)
    assert whole.dtype == torch.float32
    for row, prompt in enumerate(prompts):
        alone = project_last_token(model, tokenizer, directions, (prompt,), progress=False)
        torch.testing.assert_close(whole[row], alone[0], rtol=1e-4, atol=1e-5)
    by_two = project_last_token(model, tokenizer, directions, prompts, batch_size=2, progress=False)
    torch.testing.assert_close(by_two, whole, rtol=1e-4, atol=1e-5)


def test_progress_is_shown_unless_it_is_not_wanted(tiny_model, tokenizer, capsys):
    settings = {"held_out": PROMPTS["held_out"], "check_refusal": False}
    RefusalDirections.extract(tiny_model(), tokenizer, PROMPTS["extraction"], **settings, progress=False)
    assert capsys.readouterr().err == ""
    RefusalDirections.extract(tiny_model(), tokenizer, PROMPTS["extraction"], **settings)
    shown = capsys.readouterr().err
    for bar in ("malicious prompts: 100%", "benign prompts: 100%", "projections: 100%"):
        assert bar in shown
