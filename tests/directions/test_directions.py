"""Directions of any concept: from prompts, from given vectors, several at once, and the file that they are kept in."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from procon.chat import ContrastPrompts
from procon.directions import (
    Directions,
    RefusalDirections,
    auroc,
    load_directions,
    load_vectors,
    project_on_all,
)
from procon.directions.concepts import hold_out
from procon.directions.file import CONCEPT_TENSORS
from procon.errors import ProConError
from procon.models import find_decoder

POSITIVE = ("merci beaucoup", "bonjour", "le chat dort sur le lit", "oui")
NEGATIVE = ("thank you so much", "hello", "the cat sleeps", "yes", "no")


@pytest.fixture
def model(tiny_model):
    return tiny_model().eval()


def extract(model, tokenizer, name: str = "french", **settings) -> Directions:
    return Directions.extract(model, tokenizer, POSITIVE, NEGATIVE, name=name, progress=False, **settings)


def random_vectors(rows: int, seed: int = 0, width: int = 32) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def refusal(k: int = 1) -> RefusalDirections:
    q = torch.linalg.qr(random_vectors(3 * 32).view(3, 32, 32)).Q[:, :k]
    gap = torch.tensor([0.0, 1.5, 2.0])
    first, further = q[:, 0] * (gap > 0)[:, None], q[:, 1:] * (gap > 0)[:, None, None]
    return RefusalDirections(first, gap, gap / 4, gap + 1, gap + 2, {"model": "m"}, further if k > 1 else None)


def test_prompts_give_what_they_give_for_refusal(model, tokenizer):
    """The difference in means is the same; nothing is generated."""
    found = extract(model, tokenizer)
    sides = ContrastPrompts(POSITIVE, NEGATIVE)
    same = RefusalDirections.extract(model, tokenizer, sides, held_out=sides, check_refusal=False, progress=False)
    assert torch.equal(found.vectors[:, 0], same.first)
    assert torch.equal(found.scale[:, 0], same.gap)
    assert torch.equal(found.positive[:, 0], same.malicious)
    assert torch.equal(found.negative[:, 0], same.benign)
    assert found.names == found.concepts == ("french",)
    assert torch.equal(found.usable, same.usable)
    assert found.last_output
    assert (found.k, found.block_count) == (1, 3)
    assert found.auroc.isnan().all()  # too few prompts to hold any out
    known = found.provenance["concepts"]["french"]
    assert known["counts"] == {"positive": 4, "negative": 5}
    assert known["prompts"] == sides.hash
    assert found.check_origin(model) == "same"
    measured = extract(model, tokenizer, held_out=sides)
    torch.testing.assert_close(measured.auroc[1:, 0], same.auroc[1:])


def test_every_fifth_prompt_is_held_out_if_there_are_ten(model, tokenizer):
    many = [f"bonjour {n}" for n in range(11)], [f"hello {n}" for n in range(10)]
    kept, out = hold_out(ContrastPrompts(*map(tuple, many)))
    assert out == ContrastPrompts(("bonjour 4", "bonjour 9"), ("hello 4", "hello 9"))
    assert sorted(kept.malicious + out.malicious) == sorted(many[0])
    assert len(kept.benign) == 8
    assert hold_out(kept)[1] is None
    found = Directions.extract(model, tokenizer, *many, name="french", progress=False)
    z = [project_on_all(model, tokenizer, found.vectors, side, progress=False) for side in (out.malicious, out.benign)]
    torch.testing.assert_close(found.auroc[1:], auroc(*z)[1:])
    assert found.auroc[0].isnan().all()  # no direction there
    assert found.provenance["concepts"]["french"]["held_out_prompts"] == out.hash


def test_given_vectors_are_unit_vectors_with_their_length(model):
    """A probe's score is length * <unit, x> + bias: of any vector, bias and state."""
    given = {1: 3 * random_vectors(1)[0].double(), "last": random_vectors(1, 1)[0].bfloat16()}
    found = Directions.from_vectors(model, given, name="probe", bias={1: 0.25, "last": -2}, threshold=0.5)
    assert found.usable.tolist() == [False, True, False, True]
    state = random_vectors(1, 2)[0].double()
    for row, vector, bias in ((1, given[1], 0.25), (3, given["last"].double(), -2)):
        assert found.vectors[row, 0].norm() == pytest.approx(1, abs=2**-22)
        score = found.length[row, 0].double() * (found.vectors[row, 0].double() @ state) + found.bias[row, 0]
        assert score.item() == pytest.approx((vector.double() @ state).item() + bias, rel=1e-5, abs=1e-5)
    assert found.threshold[:, 0].tolist() == [pytest.approx(x, nan_ok=True) for x in (math.nan, 0.5, math.nan, 0.5)]
    assert found.length[[0, 2]].tolist() == [[0], [0]]
    assert found.scale[[1, 3]].isnan().all()  # no unit without prompts
    assert found.scale[[0, 2]].tolist() == [[0], [0]]
    found.check_fits(find_decoder(model))


@pytest.mark.parametrize("rows", [3, 4])
def test_a_matrix_of_vectors_is_one_for_each_block(model, rows):
    matrix = random_vectors(rows)
    matrix[1] = 0
    found = Directions.from_vectors(model, matrix, name="sae", bias=torch.arange(rows).float())
    assert found.usable.tolist() == [True, False, True, rows == 4]
    torch.testing.assert_close(found.vectors[0, 0], matrix[0] / matrix[0].norm())
    assert found.bias[:, 0].tolist() == [0, 0, 2, 3 if rows == 4 else 0]


def test_prompts_give_given_vectors_their_unit(model, tokenizer):
    """The distance between the two means along the vector, whichever way it points."""
    vectors = random_vectors(4)
    found, turned = (
        Directions.from_vectors(
            model, v, name="probe", tokenizer=tokenizer, positive=POSITIVE, negative=NEGATIVE, progress=False
        )
        for v in (vectors, -2 * vectors)
    )
    z = [project_on_all(model, tokenizer, found.vectors, side, progress=False) for side in (POSITIVE, NEGATIVE)]
    expected = (z[0].mean(0) - z[1].mean(0)).abs()
    assert found.scale[0].isnan()  # the first block's input is one and the same embedding
    torch.testing.assert_close(found.scale[1:], expected[1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(turned.scale, found.scale, equal_nan=True)
    torch.testing.assert_close(found.auroc, auroc(*z))
    torch.testing.assert_close(found.positive, z[0].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned.auroc[1:], 1 - found.auroc[1:])


def test_concepts_are_combined_by_name(model, tokenizer):
    probe = Directions.from_vectors(model, {2: random_vectors(1)[0]}, name="probe", bias=1.0, threshold=2.0)
    both = Directions.combine(refusal(k=2), probe, extract(model, tokenizer))
    assert both.names == ("refusal", "refusal_2", "probe", "french")
    assert both.vectors.shape == (4, 4, 32)
    assert torch.equal(both.vectors[:3, :2], refusal(k=2).basis)
    assert torch.equal(both.scale[:3, :2], refusal(k=2).gaps)
    assert torch.equal(both.vectors[:, 2:3], probe.vectors)
    assert both.vectors[3, :3].count_nonzero() == 0  # files of earlier versions have no row for the last output
    assert both.vectors[0].count_nonzero() == 0
    assert both.usable.tolist() == [False, True, True, True]
    assert both.bias[2].tolist() == [0, 0, 1, 0]
    assert both.threshold[2].isnan().tolist() == [True, True, False, True]
    assert both.auroc[1, 0] == refusal().auroc[1]
    assert both.auroc[:, 1].isnan().all()
    assert list(both.provenance["concepts"]) == list(both.names)
    assert both.provenance["concepts"]["refusal"] == {"model": "m"}
    assert both.check_origin(model) == "unknown"  # of refusal it is not known
    assert Directions.combine(probe, extract(model, tokenizer)).check_origin(model) == "same"
    assert both.hash != Directions.combine(probe, refusal(k=2), extract(model, tokenizer)).hash


def test_what_cannot_be_combined(model, tiny_model):
    parts = [Directions.from_vectors(model, random_vectors(3, n), name=f"c{n}", bias=float(n)) for n in range(9)]
    wide = Directions.from_vectors(tiny_model(hidden_size=64), random_vectors(3, width=64), name="wide")
    assert Directions.combine(*parts[:8]).k == 8
    for given, message in (
        (parts, r"^9 concepts are too many: combine 8 at most$"),
        ((parts[0], parts[1], replace(parts[2], names=("c0",))), r"^two concepts are named 'c0': give each a name of"),
        ((parts[0], wide), r"^directions for 3 blocks of width 32 and 3 blocks of width 64 cannot be combined: take"),
        ((), r"^no directions to combine: give one part at least$"),
    ):
        with pytest.raises(ProConError, match=message):
            Directions.combine(*given)


@pytest.mark.parametrize(
    ("vectors", "settings", "message"),
    [
        (
            torch.ones(3, 16),
            {},
            r"the vector of block 0 has shape \(16,\), but the model has hidden states of w",
        ),
        ({1: torch.ones(16)}, {}, r"the vector of block 1 has shape \(16,\)"),
        ({"last": torch.ones(1, 32)}, {}, r"the vector of the last block's output has shape \(1, 32\)"),
        ({1: torch.zeros(32)}, {}, "the vector of block 1 is zero: leave the block out"),
        (torch.zeros(3, 32), {}, "no vectors are given, or zeros alone: give a vector for at least one block"),
        ({}, {}, "no vectors are given, or zeros alone"),
        ({1: torch.full((32,), torch.nan)}, {}, "the vector of block 1 is NaN or infinite: give finite numbers"),
        ({1: torch.full((32,), torch.inf)}, {}, "the vector of block 1 is NaN or infinite"),
        ({9: torch.ones(32)}, {}, "vectors names block 9, but the model has 3: give indices below 3, or 'last' for"),
        ({-1: torch.ones(32)}, {}, "vectors names block -1, but the model has 3"),
        ({True: torch.ones(32)}, {}, "vectors names block True, but the model has 3"),
        ({"first": torch.ones(32)}, {}, "vectors names block 'first', but the model has 3"),
        (
            torch.ones(5, 32),
            {},
            "vectors has 5 rows, but the model has 3 blocks: give one for each, or name",
        ),
        (torch.tensor(1.0), {}, "vectors has 0 rows, but the model has 3 blocks"),
        ({1: torch.ones(32)}, {"bias": math.nan}, "bias is nan: give a finite number"),
        ({1: torch.ones(32)}, {"bias": {1: "x"}}, "bias is 'x': give a finite number"),
        ({1: torch.ones(32)}, {"threshold": {1: torch.ones(2)}}, r"threshold is tensor.*: give a finite number"),
        ({1: torch.ones(32)}, {"threshold": {2: 0.5}}, "threshold is given for block 2, which has no vector: leave it"),
        ({1: torch.ones(32)}, {"name": "a concept"}, "the name of a concept is 'a concept': give 1 to 40 letters"),
        ({1: torch.ones(32)}, {"name": ""}, "the name of a concept is ''"),
        ({1: torch.ones(32)}, {"name": 41 * "a"}, "the name of a concept is 'aaa"),
        ({1: torch.ones(32)}, {"positive": ("a",)}, "prompts are given without a tokenizer: pass tokenizer as well"),
    ],
)
def test_given_vectors_that_cannot_be_directions(model, vectors, settings, message):
    with pytest.raises(ProConError, match=f"^{message}"):
        Directions.from_vectors(model, vectors, **{"name": "probe"} | settings)


def test_prompts_that_give_no_direction(model, tokenizer):
    for sides, message in (
        ((POSITIVE, ()), "no negative prompts given: at least one is needed"),
        (((), NEGATIVE), "no positive prompts given: at least one is needed"),
        ((POSITIVE, POSITIVE), "positive and negative prompts of 'c' give the same hidden states: pass others"),
    ):
        with pytest.raises(ProConError, match=f"^{message}$"):
            Directions.extract(model, tokenizer, *sides, name="c", progress=False)
    with pytest.raises(ProConError, match=r"^no negative prompts given"):
        Directions.from_vectors(model, random_vectors(3), name="c", tokenizer=tokenizer, positive=POSITIVE)


def test_save_and_load(model, tokenizer, tmp_path):
    found = Directions.combine(refusal(), extract(model, tokenizer))
    path = found.save(tmp_path / "d.safetensors")
    loaded = Directions.load(path)
    assert loaded.names == ("refusal", "french")
    for name in CONCEPT_TENSORS:
        torch.testing.assert_close(getattr(loaded, name), getattr(found, name), rtol=0, atol=0, equal_nan=True)
    assert loaded.last_output
    assert loaded.provenance == found.provenance
    assert loaded.hash == found.hash
    assert loaded.at_block_inputs.vectors.shape == (3, 2, 32)
    assert not Directions.load(found.at_block_inputs.save(tmp_path / "e.safetensors")).last_output
    assert isinstance(load_directions(path), Directions)
    with pytest.raises(ProConError, match=r"d.safetensors' holds directions of other concepts: load it with procon.D"):
        RefusalDirections.load(path)


def test_files_of_refusal_directions_are_read_as_such(tmp_path):
    path = refusal(k=2).save(tmp_path / "refusal-directions.safetensors")
    assert isinstance(load_directions(tmp_path), RefusalDirections)
    assert load_directions(path).hash == refusal(k=2).hash
    assert Directions.load(tmp_path).names == ("refusal", "refusal_2")
    with pytest.raises(ProConError, match=r"directions file '.*none' does not exist: make it with"):
        load_directions(tmp_path / "none")


@pytest.mark.filterwarnings("ignore:directions file")  # has no checksum
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": torch.zeros(4, 1, 32)}, "no direction for any block"),
        ({"vectors": torch.arange(4.0)[:, None, None].repeat(1, 1, 32)}, r"a vector of length 5\.\d+ for block 1"),
        ({"vectors": torch.full((4, 1, 32), torch.nan)}, "NaN or infinite values"),
        ({"vectors": torch.zeros(4, 2, 32)}, r"not \[L, K, D\] and \[L, K\] of K concepts with names, K at most 8"),
        ({"scale": torch.zeros(4)}, r"not \[L, K, D\] and \[L, K\]"),
        ({"scale": torch.full((4, 1), -1.0)}, "a unit that is no positive number"),
        ({"scale": torch.full((4, 1), torch.inf)}, "a unit that is no positive number"),
        ({"scale": torch.zeros(4, 1)}, "a unit that is no positive number"),
        ({"bias": None}, "damaged or not one of ProCon's"),
    ],
)
def test_another_file(model, tokenizer, tmp_path, change, message):
    path = extract(model, tokenizer).save(tmp_path / "d.safetensors")
    tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    save_file(tensors, path, {"procon": '{"concepts": {"french": {}}}'})
    with pytest.raises(ProConError, match=message):
        Directions.load(path)
    save_file(load_file(path), path, {"procon": '{"concepts": {"fr ench": {}}}'})
    with pytest.raises(ProConError, match=r"^(directions file|the name of a concept is 'fr ench')"):
        Directions.load(path)


def test_any_change_to_the_file_is_found(model, tokenizer, tmp_path):
    path = extract(model, tokenizer).save(tmp_path / "d.safetensors")
    path.write_bytes(path.read_bytes().replace(b"french", b"frencg"))
    with pytest.raises(ProConError, match="its checksum differs"):
        Directions.load(path)


def test_vectors_from_a_file(model, tmp_path):
    def load(tensors) -> Directions:
        save_file({name: torch.as_tensor(tensor).clone() for name, tensor in tensors.items()}, tmp_path / "v")
        return Directions.from_vectors(model, name="probe", **load_vectors(tmp_path / "v"))

    one = random_vectors(4)
    by_block = load({"1": one[1], "1.bias": torch.tensor(0.5), "last": one[3], "threshold": torch.tensor(0.1)})
    assert by_block.usable.tolist() == [False, True, False, True]
    assert by_block.bias[:, 0].tolist() == [0, 0.5, 0, 0]
    assert by_block.threshold[[1, 3], 0].tolist() == pytest.approx([0.1, 0.1])
    whole = load({"vectors": one, "bias": torch.arange(4.0)})
    assert whole.bias[:, 0].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(whole.vectors[3], by_block.vectors[3])
    for names in (["weight"], ["1", "vectors"], ["1.scale"], ["1", "bias", "1.bias"]):
        with pytest.raises(ProConError, match=r"v' has '.*': name tensors 'vectors', or by the block, such as '14'"):
            load(dict.fromkeys(names, one[1]))
    (tmp_path / "v").write_text("{}")
    with pytest.raises(ProConError, match="v' is no safetensors file"):
        load_vectors(tmp_path / "v")
    with pytest.raises(ProConError, match="w' does not exist"):
        load_vectors(tmp_path / "w")
