"""Several directions per block: how they are found, kept, recorded and penalised, each by a definition written out."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from procon.anchors import AnchoredCollator, Anchors
from procon.chat import ContrastPrompts, builtin_prompts, render, user_turn
from procon.cli import main
from procon.constraint import ProjectionConstraint
from procon.data import flattening_collator, padding_collator
from procon.directions import ContrastMeans, RefusalDirections
from procon.directions.subspace import further_directions, orthonormalised
from procon.errors import ProConError
from procon.models import find_decoder
from procon.training.model_card import describe

#: Unequal categories, not in order.
PROMPTS = ContrastPrompts(
    malicious=("steal it", "forge a passport for me tonight", "rob", "poison the well", "spy on her", "burn it down"),
    benign=("paint it", "wash the car for me", "sing", "dig the well", "wait for her at noon", "light the candle"),
    categories=("theft", "fraud", "theft", "harm", "fraud", "theft"),
)
HELD_OUT = ContrastPrompts(malicious=("burn the barn", "poison", "cheat them all"), benign=("bake", "mend the barn"))


def extract(model, tokenizer, k: int, prompts: ContrastPrompts = PROMPTS) -> RefusalDirections:
    settings = {"held_out": HELD_OUT, "check_refusal": False, "progress": False}
    return RefusalDirections.extract(model, tokenizer, prompts, k=k, **settings)


def random_subspaces(k: int, blocks: int = 3, width: int = 32) -> RefusalDirections:
    generator = torch.Generator().manual_seed(0)
    basis = orthonormalised(torch.randn(blocks, k, width, generator=generator)).float()
    gap = torch.rand(blocks, generator=generator) + 0.5
    return RefusalDirections(basis[:, 0], gap, gap, gap, gap, further=basis[:, 1:])


def assert_orthonormal(basis: torch.Tensor) -> None:
    product = basis.double() @ basis.double().mT
    # Each number is rounded to fp32 once.
    torch.testing.assert_close(product, torch.eye(basis.shape[1]).double().expand_as(product), rtol=0, atol=2**-22)


def assert_same_up_to_sign(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    sign = (found.double() * expected.double()).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(found.double(), expected.double() * sign, rtol=0, atol=tolerance)


def one_by_one(first: torch.Tensor, differences: torch.Tensor, count: int) -> torch.Tensor:
    """``[count, D]`` for one block: the main axis of what is left of ``differences [C, D]``, removed, and again."""
    left = differences - torch.outer(differences @ first, first)
    found = []
    for _ in range(count):
        axis = torch.linalg.eigh(left.T @ left).eigenvectors[:, -1]
        found.append(axis)
        left = left - torch.outer(left @ axis, axis)
    return torch.stack(found)


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


def test_categories_that_do_not_differ_further_give_no_direction():
    first = torch.eye(8)[:1].double()
    differences = torch.zeros(3, 1, 8).double()
    differences[:, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    differences[:, 0, 3] = torch.tensor([-0.5, 0.0, 0.6])
    found = further_directions(first, differences, 2, torch.tensor([1e-5]))
    torch.testing.assert_close(found[0], torch.eye(8).double()[[3, 0]] * torch.tensor([[1.0], [0.0]]))


def last_token(model, tokenizer, prompt: str) -> torch.Tensor:
    """``[L + 1, D]``: what enters each block, and leaves the last, at the last prompt token."""
    ids = torch.tensor([render(tokenizer, user_turn(prompt), generation_prompt=True)])
    left = []
    hook = find_decoder(model).blocks[-1].register_forward_hook(lambda _module, _args, output: left.append(output))
    with torch.no_grad():
        states = list(model(ids, output_hidden_states=True).hidden_states)
    hook.remove()
    states[-1] = left[0] if isinstance(left[0], torch.Tensor) else left[0][0]
    return torch.stack([state[0, -1] for state in states])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_extracted_from_the_categories_of_the_prompts(tiny_model, tokenizer, family):
    model = tiny_model(family).double().eval()
    means = ContrastMeans.measure(model, tokenizer, PROMPTS, by_category=True, batch_size=4, progress=False)
    found = RefusalDirections.from_means(means, 3)
    pairs = torch.stack(
        [
            last_token(model, tokenizer, malicious) - last_token(model, tokenizer, benign)
            for malicious, benign in zip(PROMPTS.malicious, PROMPTS.benign, strict=True)
        ]
    )
    rows = [[i for i, name in enumerate(PROMPTS.categories) if name == one] for one in ("fraud", "harm", "theft")]
    differences = torch.stack([pairs[members].mean(0) for members in rows])
    size = means.scale.max().item()
    torch.testing.assert_close(means.differences, differences, rtol=0, atol=1e-12 * size)
    usable = found.usable.nonzero().flatten().tolist()
    assert usable == ([1, 2, 3] if family == "llama" else [0, 1, 2, 3])
    for block in usable:
        first = pairs.mean(0)[block] / pairs.mean(0)[block].norm()
        torch.testing.assert_close(found.first[block].double(), first, rtol=0, atol=2**-24)
        assert_same_up_to_sign(found.further[block], one_by_one(first, differences[:, block], 2), 2**-23)
    assert_orthonormal(found.basis[usable])


def test_one_of_several_is_the_one(tiny_model, tokenizer):
    model = tiny_model()
    alone, bare, three = (
        extract(model, tokenizer, k, prompts)
        for k, prompts in ((1, PROMPTS), (1, replace(PROMPTS, categories=())), (3, PROMPTS))
    )
    assert alone.further is None
    assert (alone.k, three.k) == (1, 3)
    assert alone.hash == bare.hash != three.hash
    assert alone.provenance == bare.provenance
    assert three.provenance == {**alone.provenance, "directions_a_block": 3}
    for name in ("first", "gap", "auroc", "malicious", "benign"):
        assert torch.equal(getattr(alone, name), getattr(three, name))
    assert torch.equal(alone.basis, alone.first[:, None])
    # The first block of this family has no direction.
    assert three.basis[0].count_nonzero() == 0
    assert torch.equal(three.cosine(alone).isnan(), torch.tensor([True, False, False]))


@pytest.mark.parametrize(
    ("k", "prompts", "message"),
    [
        (0, PROMPTS, "k is 0: give 1 to 8"),
        (9, PROMPTS, "k is 9: give 1 to 8"),
        (4, PROMPTS, "k is 4, but the prompts have 3 categories"),
        (2, replace(PROMPTS, categories=()), "k is 2, but the prompts have 0 categories"),
    ],
)
def test_a_k_that_the_prompts_do_not_give(k, prompts, message):
    with pytest.raises(ProConError, match=message):
        RefusalDirections.extract(None, None, prompts, k=k)


def test_categories_are_those_of_pairs():
    builtin = builtin_prompts("extraction")
    assert len(set(builtin.categories)) == 16
    assert len(builtin.first(40).categories) == 40
    assert builtin.hash == replace(builtin, categories=()).hash
    with pytest.raises(ProConError, match="there are 6 categories for 6 malicious and 5 benign prompts"):
        ContrastPrompts(PROMPTS.malicious, PROMPTS.benign[:5], PROMPTS.categories)


def test_save_and_load(tmp_path):
    found = random_subspaces(4)
    loaded = RefusalDirections.load(found.save(tmp_path / "d.safetensors"))
    assert torch.equal(loaded.basis, found.basis)
    assert loaded.hash == found.hash
    turned = found.further.clone()
    turned[2, 1, 5] += 1e-3
    assert replace(found, further=turned).hash != found.hash
    assert set(load_file(replace(found, further=None).save(tmp_path / "one"))) == set(
        load_file(tmp_path / "d.safetensors")
    ) - {"further"}


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (torch.zeros(3, 32), r"not \[L, D\] and \[L\], or \[L, K - 1, D\]"),
        (torch.zeros(2, 1, 32), r"\[L, K - 1, D\]"),
        (torch.zeros(3, 1, 16), r"\[L, K - 1, D\]"),
        (torch.zeros(3, 0, 32), r"\[L, K - 1, D\]"),
        (torch.zeros(3, 8, 32), "K at most 8"),
        (torch.full((3, 1, 32), torch.nan), "NaN or infinite"),
    ],
)
@pytest.mark.filterwarnings("ignore:directions file")  # has no checksum
def test_another_file(tmp_path, further, message):
    path = random_subspaces(2).save(tmp_path / "d.safetensors")
    save_file({**load_file(path), "further": further}, path)
    with pytest.raises(ProConError, match=message):
        RefusalDirections.load(path)


def test_subspace_cosine():
    found = random_subspaces(3)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1))).Q
    turned = rotation @ found.basis
    same = replace(found, first=turned[:, 0], further=turned[:, 1:])
    torch.testing.assert_close(found.subspace_cosine(same), torch.ones(3), rtol=0, atol=2**-20)
    assert found.cosine(same).abs().max() < 0.99

    # Two of three axes turned, by 60 and 90 degrees: (1 + 1/4 + 0) / 3.
    eye = torch.eye(32).expand(3, 32, 32)
    one = replace(found, first=eye[:, 0], further=eye[:, 1:3])
    slanted = 0.5 * eye[:, 1] + 0.75**0.5 * eye[:, 7]
    other = replace(found, first=slanted, further=torch.stack([eye[:, 0], eye[:, 9]], 1))
    torch.testing.assert_close(one.subspace_cosine(other), torch.full((3,), 1.25 / 3), rtol=2**-22, atol=0)

    alone = replace(one, further=None, gap=torch.tensor([0.0, 1.0, 1.0]))
    squared = alone.cosine(replace(other, further=None)).square()
    torch.testing.assert_close(alone.subspace_cosine(replace(other, further=None)), squared, equal_nan=True)
    with pytest.raises(ProConError, match="span no subspaces to compare"):
        one.subspace_cosine(alone)


@pytest.mark.parametrize("control", ["randomized", "within", "shuffled"])
def test_controls_have_as_many_directions(control):
    gap = torch.tensor([0.0, 1.0, 2.0, 3.0])
    found = replace(random_subspaces(3, blocks=4), gap=gap)
    states = torch.randn(20, 4, 32, generator=torch.Generator().manual_seed(2))
    make = {"randomized": found.randomized, "shuffled": found.shuffled}
    make["within"] = lambda seed: found.randomized_within(states, seed)
    made = make[control](seed=5)
    assert made.k == 3
    assert torch.equal(made.gap, gap)
    assert_orthonormal(made.basis[1:])
    if control == "shuffled":
        for block in (1, 2, 3):
            assert torch.equal(made.basis[block], found.basis[made.provenance["source_blocks"][block]])
    else:
        assert made.basis[0].count_nonzero() == 0
        assert made.subspace_cosine(found)[1:].max() < 0.5


@pytest.fixture
def model(tiny_model):
    return tiny_model().double().eval()


def projections(model, directions: RefusalDirections, sample: dict) -> torch.Tensor:
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
            error = error / directions.gap.double()[:, None]
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

    def record(found: RefusalDirections, folder: str, **settings) -> Anchors:
        return Anchors.record(model, loader, found, tmp_path / folder, progress=False, **settings)

    anchors = record(directions, "three", blocks=(0, 2))
    assert anchors.k == Anchors(tmp_path / "three").k == 3
    batch = anchors.annotate(dict(padding_collator(tokenizer)(samples[:1])))
    live = torch.tensor(samples[0]["labels"]) != -100
    with torch.no_grad():
        expected = projections(model, directions, samples[0])[live][:, [0, 2]].flatten(1)
    # A dot product rounded to fp32.
    torch.testing.assert_close(batch["anchors"][0][live].double(), expected, rtol=2**-20, atol=2**-20)

    one = replace(directions, further=None)
    two = replace(directions, further=directions.further[:, :1])
    assert (
        len({record(found, f"{found.k}", blocks=(0, 2)).fingerprint for found in (one, two)} | {anchors.fingerprint})
        == 3
    )
    assert json.loads((tmp_path / "1" / "anchors.json").read_text())["k"] == 1
    with pytest.raises(ProConError, match="recorded for another model state or precision, directions"):
        record(two, "three", blocks=(0, 2))
    with pytest.raises(
        ProConError, match="recorded for another model state or precision, other adapters or directions"
    ):
        anchors.check_fits(model, two)


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
    def trainer(folder: str, directions: RefusalDirections):
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
    assert RefusalDirections.load(checkpoint).hash == directions.hash
    with pytest.raises(ProConError, match="was trained with directions"):
        trainer("out", replace(directions, further=None)).train(resume_from_checkpoint=checkpoint)


def test_the_model_card_tells_how_many(tmp_path):
    settings = {
        "version": "1",
        "schedule": "procon_s:1",
        "scope": "response",
        "penalty": "squared",
        "units": "raw",
        "blocks": [0, 1, 2],
        "directions": "abc",
        "anchors": "def",
        "anchors_from": "recorded",
        "starting_model": None,
        "probing": None,
        "did": {"steps": 3, "constrained_steps": 3, "blocks_acted": [1, 2], "mean_penalty": 0.5},
    }
    found = random_subspaces(3)
    assert "(`abc`), 3 a block" in describe(settings, found, [])
    assert "(`abc`), 3 a block, those of another block each (seed 2): a control" in describe(
        settings, found.shuffled(2), []
    )
    assert "a block" not in describe(settings, replace(found, further=None), []).split("directions |")[1].split("\n")[0]


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
    found = RefusalDirections.load("d.safetensors")
    assert found.k == 3
    assert_orthonormal(found.basis[1:])

    train = ["train", "--model", "model", "--data", "data.jsonl", "--output_dir", "out", "--max_steps", "2"]
    train += ["--directions", "d.safetensors", "--procon_schedule", "procon_s", "--dtype", "float32", "--use_cpu"]
    assert main([*train, "--drift_steps", "1", "--per_device_train_batch_size", "2"]) == 0
    assert RefusalDirections.load("out").hash == found.hash
    assert "3 a block" in (place / "out" / "README.md").read_text()
