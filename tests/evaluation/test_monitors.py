"""Monitors before and after: what a probe reads by definition, and the sign and size of changes that are planted."""

import math

import pytest
import torch

from procon.chat import ContrastPrompts, render, user_turn
from procon.directions import Directions
from procon.errors import ProConError
from procon.evaluation import compare_monitors, measure_monitors

PROMPTS = ContrastPrompts(
    ("merci beaucoup", "bonjour", "le chat dort sur le lit", "oui"), ("thank you", "hello", "the cat sleeps")
)
OTHERS = ContrastPrompts(("one", "two and three"), ("steal", "rob her", "spy on him"))


@pytest.fixture
def model(tiny_model):
    # Blocks' outputs have biases here, and no positions enter the residual stream.
    return tiny_model("gpt_neox").double().eval()


@pytest.fixture
def monitors(model) -> Directions:
    random = torch.Generator().manual_seed(0)
    make = lambda: torch.randn(32, generator=random).double()  # noqa: E731
    language = Directions.from_vectors(model, {1: make(), 2: make()}, name="language", bias=0.25, threshold=0.3)
    return Directions.combine(language, Directions.from_vectors(model, {2: make(), "last": make()}, name="other"))


def read(model, tokenizer, monitors, prompts=None):
    prompts = prompts or {"language": PROMPTS, "other": OTHERS}
    return measure_monitors(model, tokenizer, monitors, prompts, batch_size=2, progress=False)


def states(model, tokenizer, prompts) -> torch.Tensor:
    """``[n, L, D]`` fp64, block inputs at each prompt's last token."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([render(tokenizer, user_turn(prompt), generation_prompt=True)])
        with torch.no_grad():
            found = model(input_ids=ids, output_hidden_states=True).hidden_states
        rows.append(torch.stack([state[0, -1] for state in found[:3]]))
    return torch.stack(rows)


def test_readings_by_definition(model, monitors, tokenizer):
    found = read(model, tokenizer, monitors)
    for number, (name, prompts) in enumerate({"language": PROMPTS, "other": OTHERS}.items()):
        weight = monitors.vectors[:, number].double() * monitors.length[:, number, None]
        sides = [
            (states(model, tokenizer, side) * weight[:3]).sum(-1) + monitors.bias[:3, number]
            for side in (prompts.malicious, prompts.benign)
        ]
        for row in weight[:3].any(-1).nonzero().flatten().tolist():
            positive, negative = (side[:, row] for side in sides)
            pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
            assert found[name].auroc[row].item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
            assert found[name].positive[row].item() == pytest.approx(positive.mean().item(), abs=1e-5)
            assert found[name].negative[row].item() == pytest.approx(negative.mean().item(), abs=1e-5)
            for scores, expected in zip(found[name].scores, (positive, negative), strict=True):
                torch.testing.assert_close(scores[:, row].double(), expected, atol=1e-5, rtol=0)
            if name == "language":
                assert found[name].caught[row].item() == pytest.approx((positive > 0.3).double().mean().item())
                assert found[name].false_alarms[row].item() == pytest.approx((negative > 0.3).double().mean().item())
            else:
                assert found[name].caught[row].isnan()
    for name, there in (("language", [False, True, True, False]), ("other", [False, False, True, True])):
        for values in (found[name].auroc, found[name].positive, found[name].negative):
            assert (~values.isnan()).tolist() == there
        for scores in found[name].scores:
            assert (~scores.isnan()).all(0).tolist() == (~scores.isnan()).any(0).tolist() == there


def test_an_unchanged_model_reads_alike(model, monitors, tokenizer):
    before = read(model, tokenizer, monitors)
    changes = compare_monitors(before, read(model, tokenizer, monitors))
    assert list(changes) == ["language", "other"]
    for change in changes.values():
        there = ~change.before.auroc.isnan()
        assert torch.equal(change.before.auroc[there], change.after.auroc[there])
        assert not change.positive_shift[there].any()
        assert not change.negative_shift[there].any()
        assert change.positive_shift[~there].isnan().all()


@pytest.mark.parametrize("amount", [-1.0, 0.5])
def test_a_shift_along_the_vector_is_seen_in_the_scores_alone(model, monitors, tokenizer, amount):
    """Both sides move alike, by so many distances between them: their order stays, the threshold is off."""
    before = read(model, tokenizer, monitors)
    distance = (before["language"].positive - before["language"].negative).abs()[2]
    with torch.no_grad():
        step = amount * distance / monitors.length[2, 0] * monitors.vectors[2, 0]
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.bias += step
    change = compare_monitors(before, read(model, tokenizer, monitors))["language"]
    # Scores are kept as fp32, and the distance between the sides is what they count in.
    allowed = 2**-18 * max(1.0, (change.before.positive[2].abs() / distance).item())
    for shift in (change.positive_shift, change.negative_shift):
        assert shift[1] == 0
        assert shift[2].item() == pytest.approx(amount, abs=allowed)
    assert change.after.auroc[2] == change.before.auroc[2]


def test_a_stream_without_the_direction_cannot_be_read(model, monitors, tokenizer):
    """What is taken out of the states is gone for the probe: both sides have the same score, that of the bias."""
    before = read(model, tokenizer, monitors)
    unit = monitors.vectors[2, 0].double()
    model.gpt_neox.layers[1].register_forward_hook(
        lambda _module, _args, output: output - (output @ unit)[..., None] * unit / (unit @ unit)
    )
    change = compare_monitors(before, read(model, tokenizer, monitors))["language"]
    after = change.after
    assert after.positive[2].item() == pytest.approx(after.negative[2].item(), abs=1e-5)
    assert after.positive[2].item() == pytest.approx(0.25, abs=1e-5)  # the bias is left
    assert after.auroc[1] == change.before.auroc[1]


def test_rows_for_reports(model, monitors, tokenizer):
    readings = read(model, tokenizer, monitors)
    changes = compare_monitors(readings, readings)
    rows = [row for name, change in changes.items() for row in change.rows(name)]
    assert [(row["monitor"], row["block"]) for row in rows] == [
        ("language", 1),
        ("language", 2),
        ("other", 2),
        ("other", "last"),
    ]
    for name, change in changes.items():
        best = [row["block"] for row in rows if row["monitor"] == name and row["best"]]
        auroc = {row["block"]: row["auroc_before"] for row in rows if row["monitor"] == name}
        assert len(best) == 1
        assert auroc[best[0]] == max(auroc.values())
        assert change.best == (3 if best == ["last"] else best[0])
    assert all(row["caught_before"] is None for row in rows if row["monitor"] == "other")
    assert all(0 <= row["caught_after"] <= 1 for row in rows if row["monitor"] == "language")


def test_refusal_directions_are_monitors_too(model, tokenizer):
    found = Directions.extract(model, tokenizer, PROMPTS, held_out=OTHERS, check_refusal=False, progress=False)
    readings = read(model, tokenizer, found, OTHERS)
    torch.testing.assert_close(readings["refusal"].auroc[1:], found.auroc[1:])
    assert math.isnan(readings["refusal"].auroc[0])
    earlier = read(model, tokenizer, found.at_block_inputs, OTHERS)["refusal"]
    torch.testing.assert_close(earlier.auroc, readings["refusal"].auroc[:3], equal_nan=True)
    assert compare_monitors({"r": earlier}, {"r": earlier})["r"].rows("r")[-1]["block"] == 2


def test_monitors_that_cannot_read(model, tiny_model, monitors, tokenizer):
    with pytest.raises(ProConError, match=r"^monitor 'other' has no prompts: give labelled ones for each of the mon"):
        read(model, tokenizer, monitors, {"language": PROMPTS})
    with pytest.raises(ProConError, match=r"^directions are for 3 blocks of width 32, but the model has 2"):
        read(tiny_model("gpt_neox", num_hidden_layers=2), tokenizer, monitors)
    model.gpt_neox.layers[1].register_forward_hook(lambda _module, _args, output: output * torch.nan)
    with pytest.raises(ProConError, match=r"^scores of monitor 'language' are NaN or infinite: load the model in bfl"):
        read(model, tokenizer, monitors)
