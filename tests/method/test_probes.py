"""Probes: what is recorded of the starting model, the penalty by definition, turns, replies, and files."""

from dataclasses import replace

import pytest
import torch

from procon.chat import builtin_probe_pairs, generate_replies, render, user_turn
from procon.errors import ProConError
from procon.method import Probes
from procon.method.probes import PROBES_FILE
from procon.models import DecoderForward, find_decoder, observe_last_state
from procon.settings import ProConSettings

PROMPTS = ["count to three", "say it again, and louder", "why"]


@pytest.fixture
def record(tiny_model, tokenizer):
    """``record(model, reply_tokens)`` of three prompts, on a tiny model if none is given."""

    def make(model=None, reply_tokens=0, prompts=PROMPTS) -> Probes:
        model = tiny_model() if model is None else model
        settings = ProConSettings(probe_reply_tokens=reply_tokens)
        return Probes.record(model, tokenizer, prompts, settings=settings, progress=False)

    return make


def move(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter += 0.05 * noise.to(parameter.dtype)


def states_at(model, probes: Probes) -> torch.Tensor:
    """Last hidden states at the tokens that are kept, in the precision of the model."""
    last: list[torch.Tensor] = []
    mask = torch.arange(probes.input_ids.shape[1]) < probes.lengths[:, None]
    with observe_last_state(find_decoder(model), last.append):
        model(input_ids=probes.input_ids, attention_mask=mask.long())
    return last[0][probes.kept]


def predictions_at(model, probes: Probes) -> torch.Tensor:
    """Log-probabilities of all tokens at those that are kept, in the precision of the model."""
    mask = torch.arange(probes.input_ids.shape[1]) < probes.lengths[:, None]
    return model(input_ids=probes.input_ids, attention_mask=mask.long()).logits[probes.kept].log_softmax(-1)


def assert_recorded(model, probes: Probes, **tolerance) -> None:
    """What is kept is what ``model`` makes of the probes."""
    with torch.no_grad():
        if found := probes.tokens.shape[1]:
            predicted = predictions_at(model.eval(), probes)
            likely = predicted.topk(found)
            rest = predicted.scatter(1, likely.indices, -torch.inf).logsumexp(1, keepdim=True)
            torch.testing.assert_close(probes.states, torch.cat([likely.values, rest], 1), **tolerance)
            assert (probes.tokens == likely.indices).float().mean() > 0.9  # some are as likely as others
        else:
            torch.testing.assert_close(probes.states, states_at(model.eval(), probes), **tolerance)


@pytest.mark.parametrize("reply_tokens", [0, 4])
def test_the_penalty_and_its_gradient_are_those_by_definition(tiny_model, record, reply_tokens):
    model = tiny_model().double()
    probes = record(model, reply_tokens)
    start = predictions_at(model, probes).detach()
    move(model)
    penalty = probes.departure(DecoderForward(model))
    penalty.backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    if reply_tokens:
        likely = start.topk(32).indices
        now, then = (
            torch.cat([part.gather(1, likely), part.scatter(1, likely, -torch.inf).logsumexp(1, keepdim=True)], 1)
            for part in (predictions_at(model, probes), start)
        )
        divergence = (then.exp() * (then - now)).sum(1)
        begins = probes.kept.nonzero()[:, 1] == (probes.prompts - 1).repeat_interleave(probes.kept.sum(1))
        assert begins.sum() == len(probes)
        expected = divergence.mean() + divergence[begins].mean()
    else:
        expected = (states_at(model, probes) - probes.states.double()).square().mean()
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=0)
    expected.backward()
    by_definition = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for one, other in zip(found, by_definition, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_a_model_that_does_not_train_is_refused(tiny_model, record):
    model = tiny_model()
    probes = record(model)
    with pytest.raises(ProConError, match="nothing below the last hidden state trains"):
        probes.departure(DecoderForward(model.requires_grad_(False)))
    with torch.no_grad():
        assert probes.departure(DecoderForward(model)) < 1e-12


def test_they_are_kept_and_read_again(tiny_model, record, tmp_path):
    model = tiny_model()
    for reply_tokens in (0, 3):
        probes = record(model, reply_tokens)
        path = probes.save(tmp_path / PROBES_FILE)
        assert Probes.load(path).hash == probes.hash
        assert_recorded(model, probes, rtol=0, atol=1e-6)
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ProConError, match="are damaged: resume from another checkpoint"):
        Probes.load(path)
    with pytest.raises(ProConError, match="cannot be read"):
        Probes.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": torch.tensor([1, 1])},
        {"lengths": torch.tensor([99, 99, 99])},
        {"prompts": torch.tensor([0, 1, 1])},
        {"states": torch.zeros(2, 32)},
        {"states": torch.zeros(3, 32).double()},
        {"states": torch.zeros(3, 32).bfloat16()},
        {"input_ids": torch.zeros(3, 4, 4).long()},
        {"shared": torch.tensor(99)},
        {"tokens": torch.zeros(3, 5).long()},
        {"tokens": torch.zeros(2, 0).long()},
        {"tokens": torch.full((3, 31), -1)},
        {"states": torch.full((3, 32), torch.nan)},
        {"states": torch.full((3, 32), torch.inf)},
    ],
)
def test_a_forged_file_is_refused(record, tmp_path, change):
    """Its hash is right, and what it holds does not belong together."""
    whole = record()
    forged = Probes(**{**whole._tensors(), **change})
    path = forged.save(tmp_path / PROBES_FILE)
    with pytest.raises(ProConError, match="are damaged"):
        Probes.load(path)


#: Whether a mask of our own says what a token sees, in each layer.
SHARING = {"llama": True, "qwen3": True, "gemma3": True, "gpt2": True, "gpt_neox": True, "mamba2": False, "lfm2": False}


@pytest.mark.parametrize("family", SHARING)
def test_what_all_prompts_begin_with_is_run_once(tiny_model, record, family):
    """Where the model gives the same states so: in one row of the beginning and what each has of its own."""
    special = {"mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 4}}
    special["lfm2"] = {"layer_types": ["conv", "full_attention", "conv"]}
    model = tiny_model(family, **special.get(family, {}))
    probes = record(model, 3)
    assert bool(probes.shared) == SHARING[family]
    assert_recorded(model, probes, rtol=1e-3, atol=1e-5)
    tokens = int((probes.lengths - probes.shared).sum() + probes.shared)
    if probes.shared:
        assert probes.inputs()[0]["input_ids"].shape == (1, tokens)
        assert probes.turn(1, 2).inputs()[0]["position_ids"].max() + 1 == probes.turn(1, 2).lengths.max()
    move(model)
    one_by_one = replace(probes, shared=torch.tensor(0))
    found = [each.departure(DecoderForward(model)).item() for each in (probes, one_by_one)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_that_are_balanced_in_training_keep_the_same(tiny_model, record, family):
    """TRL asks for the routers' logits: their loss knows no cache, and no mask but one of whole rows."""
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = tiny_model(family, **experts)
    expected = record(model, 4)
    model.config.output_router_logits = True
    probes = record(model, 4)
    assert probes.hash == expected.hash
    move(model)
    departure = probes.departure(DecoderForward(model.train()))
    model.config.output_router_logits = False
    assert departure.item() == expected.departure(DecoderForward(model)).item() > 0


def test_a_mask_of_our_own_has_the_models_dtype(tiny_model, record):
    """On a GPU, PyTorch's fused attention refuses or misreads others."""
    model, seen = tiny_model().bfloat16(), []
    model.model.register_forward_pre_hook(lambda _module, _args, given: seen.append(given), with_kwargs=True)
    probes = record(model, 3)
    probes.departure(DecoderForward(model))
    masks = [given["attention_mask"] for given in seen if given["attention_mask"].dim() == 4]
    assert len(masks) > 1
    assert {mask.dtype for mask in masks} == {torch.bfloat16}


def test_attention_that_is_replaced_in_training_runs_them_one_by_one(tiny_model, record, monkeypatch):
    model = tiny_model()
    assert record(model).shared > 0
    attention = type(find_decoder(model).blocks[0].self_attn)
    monkeypatch.setattr(attention.forward, "__module__", "faster.attention")
    assert record(model).shared == 0


def test_they_go_round(tiny_model, record):
    """Two at a time of three: after three runs each has been there twice, so their mean penalty is that of all."""
    model = tiny_model()
    probes = record(model)
    move(model)
    turns = [probes.turn(number, 2) for number in range(4)]
    assert [turn.lengths.tolist() for turn in turns[:3]] == [
        probes.lengths[rows].tolist() for rows in ([0, 1], [2, 0], [1, 2])
    ]
    assert turns[3].hash == turns[0].hash != turns[1].hash
    assert turns[0].input_ids.shape[1] == int(turns[0].lengths.max())
    assert probes.turn(5, 3) is probes
    found = [turn.departure(DecoderForward(model)).item() for turn in turns[:3]]
    assert sum(found) / 3 == pytest.approx(probes.departure(DecoderForward(model)).item(), rel=1e-4)
    assert max(found) > 1.001 * min(found)


@pytest.mark.parametrize("reply_tokens", [0, 3])
@pytest.mark.parametrize("groups", [1, 2, 3, 5, 6])
def test_groups_of_ranks_have_a_part_each(tiny_model, tokenizer, record, groups, reply_tokens):
    """Of three: one each as long as there are enough, and what all give is the whole."""
    model = tiny_model()
    ending(model, tokenizer, PROMPTS[1], 2)
    probes = record(model, reply_tokens)
    move(model)
    parts = [probes.part(group, groups) for group in range(groups)]
    assert sum(len(part) / alike for part, alike in parts) == pytest.approx(3)
    assert sorted({len(part) for part, _ in parts}) == {1: [3], 2: [1, 2]}.get(groups, [1])
    forward = DecoderForward(model)
    found = sum(part.departure(forward, among=probes).item() / alike for part, alike in parts)
    assert found == pytest.approx(probes.departure(forward).item(), rel=1e-4)


def ending(model, tokenizer, prompt: str, after: int) -> None:
    """Have ``model`` take for the end of a reply what it says to ``prompt`` after so many tokens."""
    ids = torch.tensor([render(tokenizer, user_turn(prompt), generation_prompt=True)])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=after + 1, do_sample=False)
    model.generation_config.eos_token_id = int(said[0, -1])


def test_one_with_a_reply_is_its_prompt_and_what_the_model_says(record, tiny_model, tokenizer):
    model = tiny_model()
    alone, probes = record(model), record(model, 5)
    assert alone.prompts.equal(alone.lengths)
    assert probes.prompts.equal(alone.lengths)
    replies = generate_replies(model, tokenizer, [user_turn(text) for text in PROMPTS], max_new_tokens=5)
    for row, (begins, ends) in enumerate(zip(probes.prompts.tolist(), probes.lengths.tolist(), strict=True)):
        prompt = render(tokenizer, user_turn(PROMPTS[row]), generation_prompt=True)
        assert probes.input_ids[row, :begins].tolist() == prompt
        reply = probes.input_ids[row, begins:ends]
        assert tokenizer.decode(reply, skip_special_tokens=True).strip() == replies[row]
        assert probes.kept[row].nonzero().squeeze(1).tolist() == list(range(begins - 1, ends))
    assert len(probes.states) == int(probes.kept.sum()) > 6


def test_a_turn_has_what_its_prompts_are_kept_at(record, tiny_model, tokenizer):
    """Replies of several lengths."""
    model = tiny_model()
    ending(model, tokenizer, PROMPTS[0], 2)
    probes = record(model, 6)
    assert len(set((probes.lengths - probes.prompts).tolist())) > 1
    for number in range(3):
        turn = probes.turn(number, 2)
        expected = record(model, 6, [PROMPTS[row % 3] for row in (2 * number, 2 * number + 1)])
        assert turn.input_ids.equal(expected.input_ids)
        assert turn.prompts.equal(expected.prompts)
        torch.testing.assert_close(turn.states, expected.states, rtol=0, atol=1e-5)


@pytest.mark.parametrize("after", [0, 2])
def test_a_reply_goes_up_to_its_end(record, tiny_model, tokenizer, after):
    """What ends it is not in it; of one that ends at once nothing is kept but where it begins."""
    model = tiny_model()
    ending(model, tokenizer, PROMPTS[0], after)
    probes = record(model, 8, PROMPTS[:1])
    assert 0 <= int(probes.lengths - probes.prompts) <= after  # the end may have been said before
    assert model.generation_config.eos_token_id not in probes.input_ids[0, probes.prompts[0] :]
    if after == 0:
        assert probes.kept.sum() == 1


def test_built_in_ones_have_their_twins_in_turn_if_replies_are_kept(record, tokenizer, monkeypatch):
    pairs = builtin_probe_pairs().first(2)
    (one, other), (its, others) = pairs.malicious, pairs.benign
    monkeypatch.setattr("procon.method.probes.builtin_probe_pairs", lambda: pairs)
    for reply_tokens, texts in ((0, [one, other]), (2, [one, its, other, others])):
        found = record(reply_tokens=reply_tokens, prompts=None)
        asked = [row[:length].tolist() for row, length in zip(found.input_ids, found.prompts.tolist(), strict=True)]
        assert asked == [render(tokenizer, user_turn(text), generation_prompt=True) for text in texts]


def test_bad_input(tokenizer, record):
    with pytest.raises(ProConError, match="no probe prompts given"):
        record(prompts=[])
    tokenizer.chat_template = None
    with pytest.raises(ProConError, match="tokenizer has no chat template: pass the tokenizer of a chat model"):
        record()
