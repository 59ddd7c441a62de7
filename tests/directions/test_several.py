"""Several directions per block: recorded, penalised, resumed with and described, each by a definition written out."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from procon.anchors import AnchoredCollator, Anchors
from procon.cli import main
from procon.constraint import ProjectionConstraint
from procon.data import flattening_collator, padding_collator
from procon.directions import Directions, shuffled
from procon.errors import ProConError
from procon.training.model_card import describe


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
@pytest.mark.parametrize("units", ["raw", "gap"])
@pytest.mark.parametrize("fuse", ["auto", "never"])
def test_value_and_gradient_by_definition(model, samples, tokenizer, tmp_path, layout, units, fuse):
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
        if units == "gap":
            error = error / directions.gaps.double()
        live = torch.tensor(sample["labels"]) != -100
        total = total + error[live].square().sum()
        tokens += int(live.sum())
    expected = total / (tokens * 3)
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()

    batch = AnchoredCollator(collator, anchors)(samples)
    with ProjectionConstraint(directions, units=units, penalty="squared").attach(model, fuse=fuse) as constraint:
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
    assert json.loads((tmp_path / "1" / "anchors.json").read_text())["k"] == 1
    with pytest.raises(ProConError, match="recorded for another model state or precision, directions"):
        record(two, "three", blocks=(0, 2))


def test_anchors_of_another_number_of_directions_are_refused(model):
    mask = torch.ones(2, 5)
    with ProjectionConstraint(random_subspaces(3), penalty="squared").attach(model) as constraint:
        for columns in (3, 8, 10):
            with pytest.raises(ProConError, match=rf"anchors have shape \(2, 5, {columns}\), expected \(2, 5, 9\)"):
                constraint.set_target(torch.zeros(2, 5, columns), mask)
        with pytest.raises(ProConError, match=r"anchors have shape \(2, 5, 3, 3\)"):
            constraint.set_target(torch.zeros(2, 5, 3, 3), mask)


def test_states_that_are_not_finite_are_named_by_their_block(model, samples, tokenizer, tmp_path):
    with torch.no_grad():
        next(model.model.layers[1].parameters()).fill_(torch.nan)
    loader = DataLoader(samples, 3, collate_fn=padding_collator(tokenizer))
    with pytest.raises(ProConError, match="entering block 2 are NaN"):
        Anchors.record(model, loader, random_subspaces(3), tmp_path / "a", progress=False, scope="response")


def test_a_run_is_resumed_with_the_same_directions_only(make_trainer, tokenizer):
    def trainer(folder: str, directions: Directions):
        plain = make_trainer("Trainer", "procon_s:1", folder=folder)
        return type(plain)(
            plain.model,
            plain.args,
            directions=directions,
            train_dataset=plain.train_dataset,
            data_collator=padding_collator(tokenizer),
            processing_class=tokenizer,
        )

    def penalties(done) -> list[float]:
        return [row["procon/penalty"] for row in done.state.log_history if "procon/penalty" in row]

    directions = random_subspaces(2)
    whole = trainer("out", directions)
    whole.train()
    assert min(penalties(whole)[1:]) > 0
    resumed = trainer("out", directions)
    checkpoint = f"{resumed.args.output_dir}/checkpoint-2"
    resumed.train(resume_from_checkpoint=checkpoint)
    assert penalties(resumed) == penalties(whole)
    assert Directions.load(checkpoint).hash == directions.hash
    with pytest.raises(ProConError, match="was trained with directions"):
        trainer("out", first_of(directions, 1)).train(resume_from_checkpoint=checkpoint)


def test_the_model_card_tells_how_many(tmp_path):
    settings = {
        "version": "1",
        "schedule": "procon_s:1",
        "scope": "response",
        "penalty": "squared",
        "units": "raw",
        "blocks": [0, 1, 2],
        "directions": "abc",
        "terms": {"tokens": {"anchors": "def", "starting_model": None}},
        "did": {"steps": 3, "constrained_steps": 3, "blocks_acted": [1, 2], "mean_penalty": 0.5},
    }
    found = random_subspaces(3)
    assert "(`abc`), 3 per block" in describe(settings, found, [])
    assert "(`abc`), 3 per block, those of another block each (seed 2): a control" in describe(
        settings, shuffled(found, 2), []
    )
    assert "per block" not in describe(settings, first_of(found, 1), []).split("directions |")[1].split("\n")[0]


@pytest.mark.filterwarnings("ignore:the model refuses 0")
def test_from_the_command_line(place, capsys):
    extract = ["directions", "--model", "model", "--output", "d.safetensors", "--dtype", "float32"]
    (place / "own.txt").write_text("steal it\npaint it\n")
    for more, message in (
        (["--k", "0"], "k is 0: give 1 to 8"),
        (["--k", "2", "--benign", "own.txt"], "k is 2, but the prompts have 0 categories"),
    ):
        assert main([*extract, *more]) == 2
        assert message in capsys.readouterr().err
    assert main([*extract, "--k", "3"]) == 0
    found = Directions.load("d.safetensors")
    assert found.k == 3
    assert found.basis[1:].norm(dim=-1).min() > 0.99

    train = ["train", "--model", "model", "--data", "data.jsonl", "--output_dir", "out", "--max_steps", "2"]
    train += ["--directions", "d.safetensors", "--procon_schedule", "procon_s", "--dtype", "float32", "--use_cpu"]
    assert main([*train, "--drift_steps", "1", "--per_device_train_batch_size", "2"]) == 0
    assert Directions.load("out").hash == found.hash
    assert "3 per block" in (place / "out" / "README.md").read_text()
