"""What an evaluation costs is measured on a model that has a frozen head and a wide vocabulary."""

import pytest

from benchmarks.evaluation_cost import MEASURED, SHAPES, make, measure
from procon.models import load_model, transformers_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make("smoke", folder)
    return folder


def test_the_head_is_frozen(model):
    loaded, tokenizer = load_model(model)
    head = transformers_model(loaded).get_output_embeddings()
    assert head.weight.shape == (SHAPES["smoke"]["vocab_size"], SHAPES["smoke"]["hidden_size"])
    assert not head.weight.requires_grad
    assert len(tokenizer("How are people kept out of a building?")["input_ids"]) == 8  # a token per word


@pytest.mark.parametrize("name", MEASURED)
def test_two_runs_find_the_same(model, name, capsys):
    one, other = (measure(name, str(model), 4) for _ in range(2))
    assert one["found"] == other["found"]
    assert one["seconds"] > 0
    assert one["peak"] > 2**27  # torch alone has more
