"""Directions of any concept: what fits a model, given vectors, several at once, and the file that they are kept in."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from procon.chat import ContrastPrompts
from procon.directions import DIRECTIONS_FILE, Directions, randomized
from procon.directions import directions as module
from procon.errors import ProConError
from procon.models import find_decoder

SIDES = ContrastPrompts(
    ("merci beaucoup", "bonjour", "le chat dort sur le lit", "oui"),
    ("thank you so much", "hello", "the cat sleeps", "yes", "no"),
)
TENSORS = ("basis", "gaps", "auroc", "positive", "negative")


@pytest.fixture
def model(tiny_model):
    return tiny_model().eval()


def extract(model, tokenizer, name: str = "french") -> Directions:
    return Directions.extract(model, tokenizer, SIDES, name=name, check_refusal=False, progress=False)


@pytest.fixture
def found(model, tokenizer) -> Directions:
    model.config._name_or_path = "some/model"
    return extract(model, tokenizer)


def random_vectors(rows: int, seed: int = 0, width: int = 32) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def refusal(k: int = 1) -> Directions:
    """Of four rows, the first without a direction."""
    gaps = torch.tensor([0.0, 1.5, 2.0, 1.0])[:, None].expand(4, k)
    basis = torch.linalg.qr(random_vectors(4 * 32).view(4, 32, 32)).Q[:, :k] * (gaps > 0)[..., None]
    return Directions(basis, gaps, gaps / 4, gaps + 1, gaps + 2, provenance={"model": "m"})


def test_directions_without_names_are_of_refusal():
    assert refusal().concepts == ("refusal",)
    assert refusal(3).concepts == ("refusal", "refusal_2", "refusal_3")
    assert refusal(3).of_refusal
    assert not replace(refusal(), concepts=("french",)).of_refusal
    bare = Directions(torch.eye(4)[:, None], torch.ones(4, 1))
    for values in (bare.auroc, bare.positive, bare.negative):
        assert values.shape == (4, 1)
        assert values.isnan().all()


def test_cosine_is_signed_and_nan_without_a_direction(found):
    torch.testing.assert_close(found.cosine(found)[1:], torch.ones(2), rtol=0, atol=2**-22)
    assert math.isnan(found.cosine(found)[0])
    torch.testing.assert_close(
        found.cosine(replace(found, basis=-found.basis))[1:], -torch.ones(2), rtol=0, atol=2**-22
    )
    with pytest.raises(ProConError, match=r"shape \(3, 32\) and \(3, 16\) cannot be compared"):
        found.cosine(replace(found, basis=found.basis[..., :16]))


# The model that they are of


def test_directions_fit_their_model_only(found, tiny_model):
    decoder = find_decoder(tiny_model())
    found.check_fits(decoder)
    replace(found, basis=found.basis.bfloat16().float()).check_fits(decoder)
    for settings, size in (({"num_hidden_layers": 2}, "2 blocks of width 32"), ({"hidden_size": 64}, "of width 64")):
        with pytest.raises(ProConError, match=f"for 3 blocks of width 32, but the model has .*{size}"):
            found.check_fits(find_decoder(tiny_model(**settings)))


BAD_VALUES = [
    ({"basis": torch.zeros(3, 1, 32)}, "no unit vector beside a gap, or a vector beside none, for block 1"),
    ({"basis": 1000 * torch.eye(3, 32)[:, None]}, "no unit vector beside a gap, or a vector beside none, for block 0"),
    ({"basis": torch.full((3, 1, 32), torch.nan)}, "NaN, infinite or negative values"),
    ({"gaps": torch.tensor([[0.0], [torch.inf], [1.0]])}, "NaN, infinite or negative values"),
    ({"gaps": torch.tensor([[0.0], [-1.0], [1.0]])}, "NaN, infinite or negative values"),
    ({"gaps": torch.zeros(3, 1)}, "no direction for any block"),
    ({"concepts": ("a", "b")}, r"tensors of shape \(3, 1, 32\) and \(3, 1\) for 2 concepts, not \[L, K, D\] and \[L"),
    ({"basis": torch.zeros(2, 1, 32)}, r"tensors of shape \(2, 1, 32\) and \(3, 1\) for 1 concepts"),
]


@pytest.mark.parametrize(("change", "message"), BAD_VALUES)
def test_directions_that_cannot_act_neither_fit_nor_load(found, tiny_model, tmp_path, change, message):
    bad = replace(found, **change)
    if len(bad.basis) == 3:
        with pytest.raises(ProConError, match=f"^directions hold {message}.*: extract them again"):
            bad.check_fits(find_decoder(tiny_model()))
    path = bad.save(tmp_path / "d.safetensors")
    with pytest.raises(ProConError, match=rf"d.safetensors' is damaged or not one of ProCon's \(it holds {message}"):
        Directions.load(path)


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


# Given vectors


def test_given_vectors_are_unit_vectors(model):
    given = {0: 3 * random_vectors(1)[0].double(), 2: random_vectors(1, 1)[0].bfloat16()}
    found = Directions.from_vectors(model, given, name="probe")
    assert found.usable.tolist() == [True, False, True]
    for block, vector in given.items():
        unit = vector.double() / vector.double().norm()
        torch.testing.assert_close(found.basis[block, 0].double(), unit, rtol=0, atol=2**-24)
    assert found.gaps[[0, 2]].isnan().all()  # no unit without prompts
    assert found.gaps[1].tolist() == [0]
    found.check_fits(find_decoder(model))


def test_a_matrix_of_vectors_is_one_for_each_block(model):
    matrix = random_vectors(3)
    matrix[1] = 0
    found = Directions.from_vectors(model, matrix, name="sae")
    assert found.usable.tolist() == [True, False, True]
    torch.testing.assert_close(found.basis[0, 0], matrix[0] / matrix[0].norm())


@pytest.mark.parametrize(
    ("vectors", "name", "message"),
    [
        (torch.ones(3, 16), "probe", r"the vector of block 0 has shape \(16,\) or is not finite, and the model has 3"),
        ({1: torch.ones(1, 32)}, "probe", r"the vector of block 1 has shape \(1, 32\)"),
        ({1: torch.full((32,), torch.nan)}, "probe", "the vector of block 1 has shape .* or is not finite"),
        ({3: torch.ones(32)}, "probe", "the vector of block 3 has .* 3 blocks of width 32: give .* indices below 3"),
        ({-1: torch.ones(32)}, "probe", "the vector of block -1 has"),
        ({"last": torch.ones(32)}, "probe", "the vector of block 'last' has"),
        (torch.ones(4, 32), "probe", "the vector of block 3 has"),
        (torch.ones(2, 32), "probe", "too few vectors are given, or zeros alone: name blocks, or give 3 rows"),
        (torch.zeros(3, 32), "probe", "too few vectors are given, or zeros alone"),
        ({}, "probe", "too few vectors are given, or zeros alone"),
        ({1: torch.ones(32)}, "a concept", "the name of a concept is 'a concept': give 1 to 40 letters"),
        ({1: torch.ones(32)}, 41 * "a", "the name of a concept is 'aaa"),
    ],
)
def test_given_vectors_that_cannot_be_directions(model, vectors, name, message):
    with pytest.raises(ProConError, match=f"^{message}"):
        Directions.from_vectors(model, vectors, name=name)


def test_vectors_by_block_and_for_all(model):
    one = random_vectors(3)
    by_block = Directions.from_vectors(model, {1: one[1], 2: one[2]}, name="probe")
    assert by_block.usable.tolist() == [False, True, True]
    torch.testing.assert_close(Directions.from_vectors(model, one, name="probe").basis[1:], by_block.basis[1:])


# The file


@pytest.mark.parametrize("which", ["of refusal", "of another concept"])
def test_save_and_load(found, tmp_path, which):
    given = {"of refusal": refusal(3), "of another concept": found}[which]
    path = given.save(tmp_path / "new" / DIRECTIONS_FILE)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    for loaded in (Directions.load(str(path)), Directions.load(path.parent)):
        for name in TENSORS:
            torch.testing.assert_close(getattr(loaded, name), getattr(given, name), rtol=0, atol=0, equal_nan=True)
        for name in ("concepts", "provenance", "hash"):
            assert getattr(loaded, name) == getattr(given, name)


def test_equal_directions_make_equal_files(tmp_path):
    given = replace(refusal(), provenance={"model": "é", "counts": {"positive": 3, "negative": 4}})
    assert len({given.save(tmp_path / f"{number}").read_bytes() for number in range(8)}) == 1
    assert Directions.load(tmp_path / "0").provenance == given.provenance


def test_no_file(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ProConError, match="does not exist: make it with 'procon directions'"):
            Directions.load(path)


def test_any_change_to_the_file_is_found(found, tmp_path):
    path = found.save(tmp_path / "d.safetensors")
    data = path.read_bytes()
    for old, new in ((b"some/model", b"some/m0del"), (b"french", b"frencg"), (data[-4:], b"\0\0\0\0")):
        path.write_bytes(data.replace(old, new))
        with pytest.raises(ProConError, match=r"damaged or not one of ProCon's .its checksum differs.: extract it"):
            Directions.load(path)
    for length in (0, 4, 100, -1):
        path.write_bytes(data[:length])
        with pytest.raises(
            ProConError, match=r"d\.safetensors' is damaged or not one of ProCon's .*: extract it again"
        ):
            Directions.load(path)


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        ({"gaps": None}, {}, "gaps"),
        ({}, {"concepts": ["fr ench"]}, "the name of a concept is 'fr ench'"),
        ({}, {"concepts": 9 * ["french"]}, "for 9 concepts"),
        ({}, {"concepts": []}, ""),
        ({}, {"provenance": None}, "it holds other values"),
        ({}, {"last_output": True}, "unexpected keyword argument 'last_output'"),
        ({"auroc": torch.zeros(3)}, {}, ""),
        ({"basis": torch.tensor(1.0)}, {}, ""),
    ],
)
def test_another_file(found, tmp_path, tensors, about, message):
    """With a checksum that is right."""
    path = found.save(tmp_path / "d.safetensors")
    made = {name: tensor for name, tensor in (load_file(path) | tensors).items() if tensor is not None}
    kept = {"concepts": ["french"], "provenance": {}} | about
    save_file(made, path, {"procon": json.dumps(kept | {"checksum": module._checksum(made, kept)})})
    with pytest.raises(ProConError, match=f"d.safetensors' is damaged or not one of ProCon's .*{message}"):
        Directions.load(path)


# A control


def test_a_randomized_seed_stays_what_it_was():
    gap = torch.ones(3)
    found = randomized(Directions(torch.eye(3, 16)[:, None], gap[:, None]), seed=4)
    drawn = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found.basis[:, 0], torch.nn.functional.normalize(drawn, dim=-1))
    assert found.provenance == {"random_seed": 4}
    assert found.hash == "097f63e79dc36f9c"
