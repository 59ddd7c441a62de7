"""A system prompt and template variables reach every prompt that is asked, and stand in what comes out."""

import copy

import pytest
import torch

from procon.chat import ContrastPrompts, measure_refusal
from procon.directions import ContrastMeans, Directions
from procon.errors import ProConError
from procon.evaluation import (
    evaluate,
    measure_drift,
)
from procon.method import Probes
from procon.settings import ChatSettings

PROMPTS = ContrastPrompts(("steal the car", "forge it"), ("wash the car now", "paint it"))
ASKED = {"system_prompt": "Be kind.", "template_kwargs": {"mood": "calm"}}
CHAT = ChatSettings(ASKED["system_prompt"], ASKED["template_kwargs"])
QUIET = {"progress": False}

_ROUNDS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
_OPEN = "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def tokenizers(tokenizer):
    """One that has to be given settings, and one whose template has them in it."""
    given, fixed = tokenizer, copy.deepcopy(tokenizer)
    given.chat_template = "{{ mood }}" + _ROUNDS + _OPEN
    fixed.chat_template = "calm<system>Be kind.</>" + _ROUNDS + _OPEN
    return given, fixed


def probes(model, tokenizer, _, chat):
    found = Probes.record(model, tokenizer, ["steal the car"], chat=chat)
    return [found.input_ids, found.states]


def refusal(model, tokenizer, _, chat):
    found = Directions.extract(model, tokenizer, PROMPTS, held_out=PROMPTS, chat=chat, check_refusal=False, **QUIET)
    return [found.basis, found.auroc]


def replies(model, tokenizer, _, chat):
    said = [row["reply"] for row in evaluate(model, tokenizer, prompts=PROMPTS, chat=chat, **QUIET).replies]
    return [torch.tensor([*map(ord, reply)]) for reply in said]


ASKING = {
    "means": lambda m, t, d, c: [ContrastMeans.measure(m, t, PROMPTS, chat=c, **QUIET).malicious],
    "directions": refusal,
    "probes": probes,
    "replies": replies,
    "drift": lambda m, t, d, c: [measure_drift(m, t, d, PROMPTS, chat=c, **QUIET).malicious_shift],
}


@pytest.mark.parametrize("name", ASKING)
def test_settings_reach_every_prompt(tiny_model, tokenizers, random_directions, name):
    given, fixed = tokenizers
    model = tiny_model("llama", num_hidden_layers=2, initializer_range=0.5) if name == "replies" else tiny_model()
    ask, directions = ASKING[name], random_directions(model)
    found, expected, otherwise = (
        ask(model, tokenizer, directions, chat) for tokenizer, chat in ((given, CHAT), (fixed, None), (given, None))
    )
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    assert any(one.shape != two.shape or not torch.equal(one, two) for one, two in zip(found, otherwise, strict=True))


@pytest.mark.filterwarnings("ignore:the model refuses 0%")
def test_settings_stand_in_what_comes_out(tiny_model, tokenizers, monkeypatch):
    given, _ = tokenizers
    model = tiny_model()
    settings = {"prompts": PROMPTS, "held_out": PROMPTS, "progress": False}
    assert Directions.extract(model, given, chat=CHAT, **settings).provenance["chat"] == ASKED
    assert evaluate(model, given, prompts=PROMPTS, chat=CHAT, progress=False).chat == ASKED
    assert measure_refusal(model, given, PROMPTS.malicious, chat=CHAT, progress=False) == 0


def test_a_run_is_resumed_only_if_it_asks_as_before(make_trainer, tokenizers):
    def trainer(**settings):
        made = make_trainer("Trainer", "0.5", **settings)
        made.procon.run.chat = CHAT
        return made

    trainer(max_steps=2).train()
    first = trainer()
    first.train(resume_from_checkpoint=True)
    assert first._record()["chat"] == ASKED
    other = trainer()
    other.procon.run.chat = ChatSettings("Be brief.", {"mood": "calm"})
    with pytest.raises(ProConError, match=r"was trained with chat .*Be kind.*not .*Be brief.*same settings"):
        other.train(resume_from_checkpoint=True)
