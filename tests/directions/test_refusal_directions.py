"""Refusal directions: difference in means by definition, whatever the batch, and the file that they are kept in."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from procon.chat import ContrastPrompts, render, template_hash, user_turn
from procon.directions import ContrastMeans, RefusalDirections, auroc, project_last_token
from procon.directions import refusal_directions as module
from procon.errors import ProConError
from procon.models import find_decoder, origin_of

#: Unequal lengths and unequal sides, so that padding or a wrong divisor shows.
PROMPTS = ContrastPrompts(
    malicious=("steal it", "forge a passport for me tonight", "rob", "break the window of the old house", "spy on her"),
    benign=("paint it", "wash the car for me", "sing about the window of the old house tonight"),
)
HELD_OUT = ContrastPrompts(malicious=("burn the barn", "poison", "cheat them all"), benign=("bake", "mend the barn"))

ROPE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox")


def by_definition(model, tokenizer, prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """``[prompts, L + 1, D]``: what enters each block, and leaves the last, at the last prompt token of each prompt."""
    rows, left = [], []
    hook = find_decoder(model).blocks[-1].register_forward_hook(lambda _module, _args, output: left.append(output))
    for prompt in prompts:
        ids = torch.tensor([render(tokenizer, user_turn(prompt), generation_prompt=True)])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        # The last of them has passed the final norm.
        states = [*states[:-1], left[-1] if isinstance(left[-1], torch.Tensor) else left[-1][0]]
        rows.append(torch.stack([state[0, -1] for state in states]))
    hook.remove()
    return torch.stack(rows)


def extract(model, tokenizer, **settings) -> RefusalDirections:
    settings = {"held_out": HELD_OUT, "check_refusal": False, "progress": False} | settings
    return RefusalDirections.extract(model, tokenizer, PROMPTS, **settings)


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
    directions = RefusalDirections.from_means(found)
    assert directions.usable.tolist() == [site >= first for site in range(4)]
    assert directions.last_output
    assert directions.block_count == 3
    assert directions.first.dtype == directions.gap.dtype == torch.float32
    unit = difference[first:] / gap[first:, None]
    # One rounding to fp32 of a number below 1, and as much again for the means, whose error is nothing beside the gap.
    assert 1e-12 * size < 2**-25 * gap[first:].min()
    torch.testing.assert_close(directions.first[first:].double(), unit, rtol=0, atol=2**-24)
    torch.testing.assert_close(directions.gap[first:].double(), gap[first:], rtol=2**-23, atol=0)
    for side, states in ((directions.malicious, malicious), (directions.benign, benign)):
        expected = (states.mean(0)[first:] * unit).sum(-1)
        torch.testing.assert_close(side[first:].double(), expected, rtol=2**-23, atol=1e-12 * size)


@pytest.mark.parametrize("family", ROPE_FAMILIES)
def test_the_first_block_of_a_model_without_learned_positions_has_no_direction(tiny_model, tokenizer, family):
    """Its input at the last prompt token is one embedding, the same for every prompt."""
    found = extract(tiny_model(family), tokenizer)
    assert found.usable.tolist() == [False, True, True, True]
    assert found.gap[0] == 0
    assert found.first[0].count_nonzero() == 0
    assert found.auroc[0] == 0.5
    torch.testing.assert_close(found.first[1:].norm(dim=-1), torch.ones(3), rtol=2**-22, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_batches_and_padding_change_nothing(tiny_model, tokenizer, family):
    model = tiny_model(family).double()
    one, eight = (ContrastMeans.measure(model, tokenizer, PROMPTS, batch_size=n, progress=False) for n in (1, 8))
    for name in ("malicious", "benign", "scale"):
        torch.testing.assert_close(getattr(one, name), getattr(eight, name), rtol=1e-12, atol=1e-14)
    directions = RefusalDirections.from_means(one)
    z = [project_last_token(model, tokenizer, directions, PROMPTS.benign, batch_size=n, progress=False) for n in (1, 8)]
    torch.testing.assert_close(*z, rtol=2**-22, atol=1e-8)


def test_projections_of_held_out_prompts(tiny_model, tokenizer):
    model = tiny_model().eval()
    found = extract(model, tokenizer)
    sides = []
    for side in (HELD_OUT.malicious, HELD_OUT.benign):
        states = by_definition(model, tokenizer, side).double()
        expected = (states * found.first.double()).sum(-1)
        # A dot product of 32 fp32 terms, whose terms add up to at most |h| for a unit direction.
        bound = 64 * 2**-24 * states.norm(dim=-1).max().item()
        z = project_last_token(model, tokenizer, found, side, progress=False)
        torch.testing.assert_close(z.double(), expected, rtol=0, atol=bound)
        sides.append(z)
    torch.testing.assert_close(found.auroc, auroc(*sides), rtol=0, atol=0)
    means = found.malicious - found.benign
    torch.testing.assert_close(means, found.gap, rtol=2**-20, atol=0)


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
    for ratio, usable in ((0.9 * module.DEAD_GAP, False), (1.1 * module.DEAD_GAP, True)):
        shifted = replace(means, malicious=means.benign + ratio * unit)
        if usable:
            assert RefusalDirections.from_means(shifted).usable.all()
        else:
            with pytest.raises(ProConError, match="give the same hidden states: pass prompts that differ"):
                RefusalDirections.from_means(shifted)


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


def test_cosine_is_signed_and_nan_without_a_direction(tiny_model, tokenizer):
    found = extract(tiny_model(), tokenizer)
    torch.testing.assert_close(found.cosine(found)[1:], torch.ones(2), rtol=0, atol=2**-22)
    assert math.isnan(found.cosine(found)[0])
    torch.testing.assert_close(
        found.cosine(replace(found, first=-found.first))[1:], -torch.ones(2), rtol=0, atol=2**-22
    )
    narrow = replace(found, first=found.first[:, :16])
    with pytest.raises(ProConError, match=r"shape \(3, 32\) and \(3, 16\) cannot be compared"):
        found.cosine(narrow)


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


def test_no_chat_template(tiny_model, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ProConError, match="has no chat template"):
        extract(tiny_model(), tokenizer)


def test_a_model_that_refuses_nothing_is_warned_of(tiny_model, tokenizer):
    with pytest.warns(UserWarning, match="refuses 0% of malicious prompts"):
        found = extract(tiny_model(), tokenizer, check_refusal=True)
    assert found.provenance["refusal_rate"] == 0


@pytest.fixture
def found(tiny_model, tokenizer) -> RefusalDirections:
    model = tiny_model()
    model.config._name_or_path = "some/model"
    return extract(model, tokenizer)


def test_provenance(found, tiny_model, tokenizer):
    assert found.provenance | {"versions": None} == {
        "model": "some/model",
        "revision": None,
        "origin": origin_of(tiny_model()),
        "dtype": "torch.float32",
        "chat_template": template_hash(tokenizer),
        "chat": {"system_prompt": None, "template_kwargs": {}},
        "prompts": PROMPTS.hash,
        "held_out_prompts": HELD_OUT.hash,
        "counts": {"malicious": 5, "benign": 3},
        "position": "last prompt token",
        "refusal_rate": None,
        "versions": None,
    }
    assert found.provenance["versions"]["torch"] == torch.__version__


def test_save_and_load(found, tmp_path):
    path = found.save(tmp_path / "new" / "d.safetensors")
    loaded = RefusalDirections.load(str(path))
    for name in ("first", "gap", "auroc", "malicious", "benign"):
        assert torch.equal(getattr(loaded, name), getattr(found, name))
    assert loaded.provenance == found.provenance
    assert loaded.hash == found.hash
    assert [file.name for file in path.parent.iterdir()] == ["d.safetensors"]


def test_files_of_block_inputs_alone_stay_readable_and_usable(found, tmp_path, tiny_model):
    """As earlier versions wrote them; and what they lack is not in their header either."""
    earlier = found.at_block_inputs
    path = earlier.save(tmp_path / "d.safetensors")
    assert b"last_output" not in path.read_bytes()
    loaded = RefusalDirections.load(path)
    assert loaded.first.shape == (3, 32)
    assert not loaded.last_output
    assert loaded.hash == earlier.hash != found.hash
    loaded.check_fits(find_decoder(tiny_model()))
    torch.testing.assert_close(loaded.cosine(found), found.cosine(found), equal_nan=True)
    torch.testing.assert_close(loaded.subspace_cosine(found), found.subspace_cosine(found), equal_nan=True)


def test_a_row_too_many_is_not_taken_for_the_last_blocks_output(found, tiny_model):
    decoder = find_decoder(tiny_model())
    with pytest.raises(ProConError, match="directions are for 4 blocks of width 32, but the model has 3 blocks"):
        replace(found, last_output=False).check_fits(decoder)
    with pytest.raises(ProConError, match="directions are for 2 blocks of width 32, but the model has 3 blocks"):
        replace(found.at_block_inputs, last_output=True).check_fits(decoder)


@pytest.mark.parametrize("control", ["randomized", "within", "shuffled"])
def test_controls_of_block_inputs_do_not_depend_on_the_last_output(found, control):
    states = torch.randn(9, 4, 32, generator=torch.Generator().manual_seed(1))
    make = {
        "randomized": lambda directions, _: directions.randomized(3),
        "within": lambda directions, states: directions.randomized_within(states, 3),
        "shuffled": lambda directions, _: directions.shuffled(3),
    }[control]
    whole, inputs = make(found, states), make(found.at_block_inputs, states[:, :3])
    assert whole.last_output
    assert torch.equal(whole.first[:3], inputs.first)
    assert whole.first[3].norm() == pytest.approx(1, abs=2**-20)
    assert not torch.allclose(whole.first[3], found.first[3])
    if control == "within":
        assert make(found, states[:, :3]).hash == inputs.hash


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    ones = torch.ones(2)
    path = RefusalDirections(torch.eye(2).T, ones, ones, ones, ones).save(tmp_path / "d.safetensors")
    assert torch.equal(RefusalDirections.load(path).malicious, ones)


def test_the_hash_follows_directions_and_gaps(found):
    turned = found.first.clone()
    turned[2, 31] += 1e-3
    assert len({found.hash, replace(found, first=turned).hash, replace(found, gap=found.gap * 2).hash}) == 3


def test_unmeasured_quality_can_be_saved(found, tmp_path):
    unmeasured = replace(found, auroc=torch.full((4,), torch.nan))
    assert RefusalDirections.load(unmeasured.save(tmp_path / "d.safetensors")).auroc.isnan().all()


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file(found, tmp_path, length):
    path = found.save(tmp_path / "d.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ProConError, match=r"d\.safetensors' is damaged or not one of ProCon's .*: extract it again"):
        RefusalDirections.load(path)


@pytest.mark.filterwarnings("ignore:directions file")  # has no checksum
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gap": None}, "damaged or not one of ProCon's"),
        ({"directions": torch.zeros(3)}, r"not \[L, D\] and \[L\]"),
        ({"directions": torch.zeros(1, 3, 32)}, r"not \[L, D\] and \[L\]"),
        ({"gap": torch.zeros(2)}, r"not \[L, D\] and \[L\]"),
        ({"auroc": torch.zeros(3, 1)}, r"not \[L, D\] and \[L\]"),
        ({"directions": torch.full((4, 32), torch.nan)}, "NaN or infinite"),
        ({"gap": torch.tensor([0.0, torch.inf, 1.0, 1.0])}, "NaN or infinite"),
        ({"malicious": torch.tensor([0.0, torch.nan, 1.0, 1.0])}, "NaN or infinite"),
        ({"directions": torch.zeros(4, 32)}, "a vector of length 0 for block 1, not a unit vector"),
        ({"directions": 1000 * torch.eye(4, 32)}, "a vector of length 1000 for block 0, not a unit vector"),
        ({"gap": torch.zeros(4)}, "no direction for any block"),
        ({"gap": torch.tensor([0.0, -1.0, 1.0, 1.0])}, "a negative gap"),
        ({"further": torch.eye(4, 32)[:, None]}, "directions for block . that are not orthogonal"),
        ({"gap": torch.ones(4, dtype=torch.int64)}, "it holds other values"),
        ({"weight": torch.ones(3)}, "it holds auroc, benign, directions, gap, malicious, weight"),
    ],
)
def test_another_file(found, tmp_path, change, message):
    path = found.save(tmp_path / "d.safetensors")
    tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    save_file(tensors, path)
    with pytest.raises(ProConError, match=message) as caught:
        RefusalDirections.load(path)
    assert "d.safetensors" in str(caught.value)


def test_a_file_of_a_version_without_checksums_is_read_with_a_warning(found, tmp_path):
    path = found.save(tmp_path / "d.safetensors")
    save_file(load_file(path), path, {"procon": json.dumps(found.provenance)})
    with pytest.warns(UserWarning, match=r"d.safetensors' has no checksum, so damage would go unnoticed: load it"):
        loaded = RefusalDirections.load(path)
    assert loaded.hash == found.hash
    loaded.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RefusalDirections.load(path)


def test_any_change_to_the_file_is_found(found, tmp_path):
    path = found.save(tmp_path / "d.safetensors")
    data = path.read_bytes()
    for old, new in ((b"some/model", b"some/m0del"), (b"llama", b"lIama"), (data[-4:], b"\0\0\0\0")):
        path.write_bytes(data.replace(old, new))
        with pytest.raises(ProConError, match=r"damaged or not one of ProCon's .its checksum differs.: extract it"):
            RefusalDirections.load(path)


def test_what_is_loaded_does_not_follow_the_file(found, tmp_path):
    """Not mapped into memory: a copy over the file changes nothing that is loaded."""
    path = found.save(tmp_path / "d.safetensors")
    loaded = RefusalDirections.load(path)
    with path.open("r+b") as file:
        file.seek(8)
        file.write(bytes(path.stat().st_size - 8))
        file.truncate(8)
    assert loaded.hash == found.hash


def test_directions_that_cannot_act_do_not_fit(found, tiny_model):
    decoder = find_decoder(tiny_model())
    for first, message in ((found.first * 1000, "length 1000"), (found.first * 0, "length 0 for block 1")):
        with pytest.raises(ProConError, match=f"directions hold a vector of {message}.*: extract them again"):
            replace(found, first=first).check_fits(decoder)
    rounded = replace(found, first=found.first.bfloat16().float())
    rounded.check_fits(decoder)


def test_directions_of_the_same_model_have_its_origin(found, tiny_model):
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert found.check_origin(model) == "same"
        assert found.check_origin(tiny_model().bfloat16()) == "same"
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=None))
        assert found.check_origin(adapted) == "same"
        assert replace(found, provenance={}).check_origin(model) == "unknown"


def test_directions_of_other_weights_of_the_model_are_used_with_a_warning(found, tiny_model):
    def trained(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator))
        return model

    generator = torch.Generator().manual_seed(0)
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    for model in (trained(tiny_model()), adapted, adapted.merge_and_unload()):
        with pytest.warns(UserWarning, match="extracted from other weights .'some/model'. than the model's"):
            assert found.check_origin(model) == "other weights"


def test_directions_of_another_model_of_the_same_shape_are_refused(found, tiny_model):
    torch.manual_seed(1)
    other = tiny_model()
    other.apply(other._init_weights)
    with torch.no_grad():
        other.get_input_embeddings().weight.normal_()
    for model in (other, tiny_model("mistral")):
        found.check_fits(find_decoder(model))
        with pytest.raises(ProConError, match=r"another model .'some/model'., whose embeddings are unrelated"):
            found.check_origin(model)


@pytest.mark.parametrize(
    "kept", [None, [], {}, 5, {"embedding": "x"}, {"embedding": [[1], [2, 3]]}, {"embedding": [1]}]
)
def test_an_origin_that_is_none_is_unknown(found, tiny_model, kept):
    assert replace(found, provenance={"origin": kept}).check_origin(tiny_model()) == "unknown"


def test_no_file(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ProConError, match="does not exist: make it with 'procon directions'"):
            RefusalDirections.load(path)


def test_directions_fit_their_model_only(found, tiny_model):
    found.check_fits(find_decoder(tiny_model()))
    for settings, size in (({"num_hidden_layers": 2}, "2 blocks of width 32"), ({"hidden_size": 64}, "of width 64")):
        with pytest.raises(ProConError, match=f"for 3 blocks of width 32, but the model has .*{size}"):
            found.check_fits(find_decoder(tiny_model(**settings)))


def test_randomized_directions_are_unit_and_leave_dead_blocks_out():
    gap = torch.tensor([0.0, 1.0, 2.0])
    found = RefusalDirections(torch.eye(3, 16), gap, gap, gap, gap).randomized(seed=4)
    torch.testing.assert_close(found.first.norm(dim=-1), torch.tensor([0.0, 1.0, 1.0]))
    assert torch.equal(found.gap, gap)
    assert found.cosine(found.randomized(seed=5))[1:].abs().max() < 0.9


def test_a_randomized_seed_stays_what_it_was():
    gap = torch.ones(3)
    found = RefusalDirections(torch.eye(3, 16), gap, gap, gap, gap).randomized(seed=4)
    drawn = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found.first, torch.nn.functional.normalize(drawn, dim=-1))
    assert found.provenance == {"random_seed": 4}
    assert found.hash == "097f63e79dc36f9c"


def test_shuffled_directions_are_a_derangement_of_the_usable_ones(tmp_path):
    gap = torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0, 4.0])
    found = RefusalDirections(torch.eye(6, 16) * (gap > 0)[:, None], gap, gap + 1, gap + 2, gap + 3)
    orders = set()
    for seed in range(100):
        made = found.shuffled(seed)
        order = made.provenance["source_blocks"]
        assert [order[block] for block in (0, 3)] == [0, 3]
        assert sorted(order) == list(range(6))
        assert all(order[block] != block for block in (1, 2, 4, 5))
        assert torch.equal(made.first, torch.stack([found.first[block] for block in order]))
        for name in ("gap", "auroc", "malicious", "benign"):
            assert torch.equal(getattr(made, name), getattr(found, name))
        assert made.provenance["shuffled_seed"] == seed
        assert made.hash == found.shuffled(seed).hash != found.hash
        orders.add(tuple(order))
    assert len(orders) == 9  # all that there are of four
    assert RefusalDirections.load(made.save(tmp_path / "d.safetensors")).provenance == made.provenance


def test_one_block_alone_cannot_be_shuffled():
    gap = torch.tensor([0.0, 1.0])
    with pytest.raises(ProConError, match="only one block has a direction"):
        RefusalDirections(torch.eye(2), gap, gap, gap, gap).shuffled(seed=0)


def test_random_directions_within_the_states_have_their_covariance():
    """In a plane with standard deviations a and b, a normal draw's squared cosine to the first axis is a / (a + b)."""
    gap = torch.tensor([0.0, 1.0, 1.0])
    found = RefusalDirections(torch.eye(3, 16), gap, gap, gap, gap)
    plane = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plane = torch.linalg.qr(plane - plane.mean(0)).Q * torch.tensor([3.0, 1.0])  # exactly so in the sample, too
    states = torch.full((50, 3, 16), 100.0, dtype=torch.float64)  # a mean far away, which is not to be drawn
    states[..., 4] += plane[:, :1]
    states[..., 9] += plane[:, 1:]
    states[:, 2, 12] = states[:, 2, 4]  # at the last block, the first axis is another one, twice as long
    draws = [found.randomized_within(states, seed) for seed in range(500)]
    drawn = torch.stack([made.first for made in draws])
    assert drawn[:, 0].count_nonzero() == 0
    torch.testing.assert_close(drawn[:, 1:].norm(dim=-1), torch.ones(500, 2), rtol=0, atol=2**-22)
    others = [axis for axis in range(16) if axis not in (4, 9, 12)]
    assert drawn[:, :, others].abs().max() < 1e-6
    assert drawn[:, 1, 12].abs().max() < 1e-6
    # The square of a cosine lies in [0, 1], so its standard deviation is at most 1/2.
    assert drawn[:, 1, 4].square().mean().item() == pytest.approx(3 / 4, abs=4 * 0.5 / 500**0.5)
    # One combination of the same states at all blocks: coordinates keep their proportions.
    torch.testing.assert_close(drawn[:, 2, 4] * drawn[:, 1, 9], drawn[:, 2, 9] * drawn[:, 1, 4], rtol=0, atol=1e-6)
    assert torch.equal(draws[0].gap, gap)
    assert draws[7].provenance == {"random_within_seed": 7}
    assert found.randomized_within(states, 7).hash == draws[7].hash


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (torch.randn(5, 2, 16), r"hidden_states have shape \(5, 2, 16\): give \[n, 3, 16\] with n above 1"),
        (torch.randn(3, 16), "hidden_states have shape"),
        (torch.randn(1, 3, 16), "with n above 1"),
        (torch.randn(1, 3, 16).expand(5, 3, 16), "hidden_states of block 1 do not vary"),
        (torch.randn(5, 3, 16).index_fill(1, torch.tensor(2), torch.nan), "block 2 do not vary, or are not finite"),
        (torch.randn(5, 3, 16).index_fill(1, torch.tensor(0), torch.inf), "block 0 do not vary, or are not finite"),
    ],
)
def test_states_to_draw_from(states, message):
    gap = torch.tensor([0.0, 1.0, 1.0])
    with pytest.raises(ProConError, match=message):
        RefusalDirections(torch.eye(3, 16), gap, gap, gap, gap).randomized_within(states, seed=0)


def test_equal_directions_make_equal_files(tmp_path):
    provenance = {"model": "é", "counts": {"malicious": 3, "benign": 4}}
    given = RefusalDirections(torch.eye(3, 32), *torch.ones(4, 3), provenance)
    files = {given.save(tmp_path / f"{number}.safetensors").read_bytes() for number in range(8)}
    assert len(files) == 1
    assert RefusalDirections.load(tmp_path / "0.safetensors").provenance == provenance
