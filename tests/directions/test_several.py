"""Several directions per block: recorded and penalised, by a definition written out."""

import pytest
import torch
from torch.utils.data import DataLoader

from procon.anchors import AnchoredCollator, Anchors
from procon.constraint import ProjectionConstraint
from procon.data import flattening_collator, padding_collator
from procon.directions import Directions
from procon.errors import ProConError


def random_subspaces(k: int, blocks: int = 3, width: int = 32) -> Directions:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(blocks, width, k, generator=generator)).Q.mT.contiguous()
    gap = torch.rand(blocks, 1, generator=generator) + 0.5
    return Directions(basis, gap.expand(blocks, k).contiguous())


def first_of(directions: Directions, k: int) -> Directions:
    return Directions(directions.basis[:, :k].contiguous(), directions.gaps[:, :k].contiguous())


@pytest.fixture
def model(tiny_model):
    return tiny_model().double().eval()


def projections(model, directions: Directions, sample: dict) -> torch.Tensor:
    """``[T, L, K]``: projections of one unpadded sample by definition, differentiable."""
    states = model(torch.tensor([sample["input_ids"]]), output_hidden_states=True).hidden_states[:-1]
    return torch.einsum("ltd,lkd->tlk", torch.stack(states).squeeze(1), directions.basis.to(states[0].dtype))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("fuse", ["auto", "never"])
def test_value_and_gradient_by_definition(model, samples, tokenizer, tmp_path, layout, fuse):
    """Anchors are recorded, the model is changed, and the penalty is that of each sample by itself, in float64."""
    directions = random_subspaces(3)
    collator = padding_collator(tokenizer) if layout == "padded" else flattening_collator()
    anchors = Anchors.record(
        model, DataLoader(samples, 3, collate_fn=collator), directions, tmp_path, progress=False, scope="response"
    )
    with torch.no_grad():
        start = [projections(model, directions, sample) for sample in samples]
        generator = torch.Generator().manual_seed(4)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)

    total, tokens = 0.0, 0
    for sample, before in zip(samples, start, strict=True):
        error = projections(model, directions, sample) - before
        live = torch.tensor(sample["labels"]) != -100
        total = total + error[live].square().sum()
        tokens += int(live.sum())
    expected = total / (tokens * 3)
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()

    batch = AnchoredCollator(collator, anchors)(samples)
    with ProjectionConstraint(directions, penalty="squared").attach(model, fuse=fuse) as constraint:
        assert constraint.fused == ((0, 1, 2) if fuse == "auto" else ())
        constraint.set_target(batch.pop("anchors"), batch.pop("constraint_mask"))
        model(**batch)
        found = constraint.penalty()
        found.backward()
    # Anchors and directions are kept in fp32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    largest = max(gradient.norm() for gradient in wanted.values())
    assert largest > 0
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert (parameter.grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-7 * largest, name


def test_anchors_of_several_directions(model, samples, tokenizer, tmp_path):
    directions = random_subspaces(3)
    loader = DataLoader(samples, 3, collate_fn=padding_collator(tokenizer))

    def record(found: Directions, folder: str, **settings) -> Anchors:
        return Anchors.record(model, loader, found, tmp_path / folder, progress=False, **settings)

    anchors = record(directions, "three", blocks=(0, 2))
    assert anchors.k == Anchors(tmp_path / "three").k == 3
    batch = anchors.annotate(dict(padding_collator(tokenizer)(samples[:1])))
    live = torch.tensor(samples[0]["labels"]) != -100
    with torch.no_grad():
        expected = projections(model, directions, samples[0])[live][:, [0, 2]].flatten(1)
    # A dot product rounded to fp32.
    torch.testing.assert_close(batch["anchors"][0][live].double(), expected, rtol=2**-20, atol=2**-20)

    one, two = first_of(directions, 1), first_of(directions, 2)
    assert (
        len({record(found, f"{found.k}", blocks=(0, 2)).fingerprint for found in (one, two)} | {anchors.fingerprint})
        == 3
    )
    with pytest.raises(ProConError, match="recorded for another model state"):
        record(two, "three", blocks=(0, 2))
