"""When memory runs out, fewer prompts are run at a time, and nothing else changes."""

import copy

import pytest
import torch

from procon.chat import ContrastPrompts, continue_tokens, generate_replies
from procon.directions import ContrastMeans
from procon.errors import ProConError
from procon.models import first_batch_size, in_batches

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
PROMPTS = [f"Count to {n}." + " Please." * (n % 4) for n in range(9)]


@pytest.fixture
def cramped(tiny_model):
    """A model whose last block has memory for two prompts, and the sizes of the batches that it was given."""
    model, sizes = tiny_model(), []

    def allocate(module, args, kwargs) -> None:
        rows = len(args[0] if args else kwargs["hidden_states"])
        sizes.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    model.model.layers[-1].register_forward_pre_hook(allocate, with_kwargs=True)
    return model, sizes


def test_means_of_prompts_are_counted_once(cramped, tiny_model, tokenizer):
    """Also those that went through the first blocks before memory ran out."""
    model, sizes = cramped
    prompts = ContrastPrompts(tuple(PROMPTS), tuple(PROMPTS[::-1][:5]))
    found = ContrastMeans.measure(model, tokenizer, prompts, batch_size=8, progress=False)
    expected = ContrastMeans.measure(tiny_model(), tokenizer, prompts, batch_size=2, progress=False)
    assert torch.equal(found.malicious, expected.malicious)
    assert torch.equal(found.benign, expected.benign)
    assert sizes == [8, 7, 6, 5, 4, 3, 2, 2, 2, 2, 1, 5, 4, 3, 2, 2, 1]


def test_replies_stay_in_their_places(cramped, tiny_model, tokenizer):
    model, _ = cramped
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    settings = {"max_new_tokens": 3, "progress": False}
    found = generate_replies(model, tokenizer, turns, batch_size=64, **settings)
    assert found == generate_replies(tiny_model(), tokenizer, turns, batch_size=2, **settings)


@pytest.mark.parametrize(
    "publisher",
    [
        {"use_cache": False},
        {"repetition_penalty": 9.0},
        {"num_beams": 3},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a"]},
        {"suppress_tokens": [*range(300)]},
    ],
)
def test_replies_are_greedy_and_cached_whatever_the_model_comes_with(tiny_model, tokenizer, publisher):
    """Qwen2.5 comes with a penalty on repetitions, and what was trained with checkpointing often without its cache."""
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:2]]
    settings = {"max_new_tokens": 8, "progress": False}
    expected = generate_replies(tiny_model(), tokenizer, turns, **settings)
    model, shapes = tiny_model(), []
    model.generation_config.update(**publisher)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    assert generate_replies(model, tokenizer, turns, **settings) == expected
    assert shapes[1:] == [(2, 1)] * 7
    assert all(getattr(model.generation_config, name) == value for name, value in publisher.items())


def test_a_reply_ends_where_the_model_or_its_tokenizer_ends_it(tiny_model, tokenizer):
    model, prompt = tiny_model(), [[5, 6, 7, 8]]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    whole = continue_tokens(model, tokenizer, prompt, max_new_tokens=9, progress=False)[0]
    first, second = whole[2], whole[4]
    model.generation_config.eos_token_id = [first]
    assert continue_tokens(model, tokenizer, prompt, max_new_tokens=9, progress=False) == [whole[: whole.index(first)]]
    model.generation_config.eos_token_id = 0
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token_id = second
    assert continue_tokens(model, tokenizer, prompt, max_new_tokens=9, progress=False) == [whole[: whole.index(second)]]


def test_one_that_does_not_fit(tiny_model):
    def full(batch) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    with pytest.raises(ProConError, match="memory ran out with one prompt at a time: load the model in fewer bits"):
        in_batches([1, 2, 3], 2, full)
    with pytest.raises(RuntimeError, match="another"):
        in_batches([1], 1, lambda batch: (_ for _ in ()).throw(RuntimeError("another error")))
    assert (first_batch_size("auto", tiny_model()), first_batch_size(7, tiny_model())) == (32, 7)
