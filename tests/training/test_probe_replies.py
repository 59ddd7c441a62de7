"""Probes that go on with the starting model's own replies, and are kept all along these."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import set_seed

from procon.anchors import Probes
from procon.anchors.probes import PROBES
from procon.chat import generate_replies, render, user_turn
from procon.constraint import probe_departure
from procon.data import padding_collator
from procon.errors import ProConError
from procon.training import ProConConfig, ProConTrainer
from procon.training.record import read_record, write_record

PROMPTS = ["count to three", "say it again, and louder", "why"]


@pytest.fixture
def record(tiny_model, tokenizer, random_directions):
    """``record(model, reply_tokens)`` of three prompts, on a tiny model if none is given."""

    def make(model=None, reply_tokens=0, prompts=PROMPTS):
        model = tiny_model() if model is None else model
        directions = random_directions(model)
        given = {"blocks": (1, 2), "reply_tokens": reply_tokens, "progress": False}
        return Probes.record(model, tokenizer, directions, prompts, **given)

    return make


def ending(model, tokenizer, prompt: str, after: int) -> None:
    """Have ``model`` take for the end of a reply what it says to ``prompt`` after so many tokens."""
    ids = torch.tensor([render(tokenizer, user_turn(prompt), generation_prompt=True)])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=after + 1, do_sample=False)
    model.generation_config.eos_token_id = int(said[0, -1])


def test_a_probe_is_its_prompt_and_the_reply_that_the_model_gives(record, tiny_model, tokenizer):
    model = tiny_model()
    alone, probes = record(model), record(model, reply_tokens=5)
    assert alone.prompts.equal(alone.lengths)
    assert probes.prompts.equal(alone.lengths)
    replies = generate_replies(model, tokenizer, [user_turn(text) for text in PROMPTS], max_new_tokens=5)
    for row, (begins, ends) in enumerate(zip(probes.prompts.tolist(), probes.lengths.tolist(), strict=True)):
        assert probes.input_ids[row, :begins].tolist() == render(
            tokenizer, user_turn(PROMPTS[row]), generation_prompt=True
        )
        reply = probes.input_ids[row, begins:ends]
        assert tokenizer.decode(reply, skip_special_tokens=True).strip() == replies[row]
        assert probes.kept[row].nonzero().squeeze(1).tolist() == list(range(begins - 1, ends))
    assert len(probes.states) == len(probes.anchors) == int(probes.kept.sum()) > 6
    *others, _ = (probes.lengths - probes.prompts + 1).cumsum(0).tolist()
    first = [0, *others]
    torch.testing.assert_close(probes.states[first], alone.states, rtol=0, atol=1e-5)
    torch.testing.assert_close(probes.anchors[first], alone.anchors, rtol=0, atol=1e-5)


def test_a_turn_has_what_its_prompts_are_kept_at(record, tiny_model, tokenizer):
    """Replies of several lengths."""
    model = tiny_model()
    ending(model, tokenizer, PROMPTS[0], 2)
    probes = record(model, reply_tokens=6)
    assert len(set((probes.lengths - probes.prompts).tolist())) > 1
    for number in range(3):
        turn = probes.turn(number, 2)
        texts = [PROMPTS[row % 3] for row in (2 * number, 2 * number + 1)]
        expected = record(model, reply_tokens=6, prompts=texts)
        assert turn.input_ids.equal(expected.input_ids)
        assert turn.prompts.equal(expected.prompts)
        torch.testing.assert_close(turn.states, expected.states, rtol=0, atol=1e-5)
        torch.testing.assert_close(turn.anchors, expected.anchors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("after", [0, 2])
def test_a_reply_goes_up_to_its_end(record, tiny_model, tokenizer, after):
    """What ends it is not in it; of one that ends at once nothing is kept but where it begins."""
    model = tiny_model()
    ending(model, tokenizer, PROMPTS[0], after)
    probes = record(model, reply_tokens=8, prompts=PROMPTS[:1])
    assert 0 <= int(probes.lengths - probes.prompts) <= after  # the end may have been said before
    assert model.generation_config.eos_token_id not in probes.input_ids[0, probes.prompts[0] :]
    if after == 0:
        assert probes.hash == record(model, prompts=PROMPTS[:1]).hash


@pytest.mark.parametrize(
    "forged",
    [
        {"lengths": torch.tensor([3.0])},
        {"lengths": torch.tensor(3)},
        {"lengths": torch.tensor([9_000, 2, 2])},
        {"prompts": torch.tensor([0, 0, 0])},
        {"input_ids": torch.full((3, 30), -1)},
        {"anchors": torch.zeros(2, 3)},
        {"states": torch.zeros(3, 32, dtype=torch.float64)},
        {"states": torch.zeros(3, 8, 4)},
        {name: torch.zeros(0, dtype=torch.int64) for name in ("prompts", "lengths")},
    ],
)
def test_a_file_that_is_whole_and_no_probes(record, tmp_path, forged):
    with pytest.raises(ProConError, match="are damaged"):
        Probes.load(replace(record(), **forged).save(tmp_path / PROBES))


def test_the_hash_is_of_shapes_and_types_too(record):
    probes = record()
    others = [{"states": probes.states.reshape(len(probes), -1, 2)}, {"lengths": probes.lengths.view(torch.float64)}]
    assert len({probes.hash, *(replace(probes, **other).hash for other in others)}) == 3


@pytest.fixture
def trainer(tiny_model, tokenizer, random_directions, samples, tmp_path):
    def make(**settings) -> ProConTrainer:
        model = tiny_model()
        config = {
            "output_dir": str(tmp_path / "out"),
            "procon_anchors": "probes",
            "procon_schedule": "procon_s:1",
            "procon_probe_count": 3,
            "procon_probe_reply_tokens": 4,
            "max_steps": 2,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "use_cpu": True,
        }
        set_seed(0)
        return ProConTrainer(
            model,
            ProConConfig(**config | settings),
            directions=random_directions(model),
            train_dataset=Dataset.from_list(samples),
            data_collator=padding_collator(tokenizer),
            processing_class=tokenizer,
        )

    return make


@pytest.mark.parametrize(("reply_tokens", "kept"), [(0, 1), (4, 5)])
def test_the_weight_is_that_of_each_token(trainer, monkeypatch, reply_tokens, kept):
    """So that where a reply begins counts no less if the rest of it is kept too."""
    found = []

    def noted(*args, **kwargs):
        found.append(probe_departure(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr("procon.training.mixin.probe_departure", noted)
    run = trainer(procon_probe_reply_tokens=reply_tokens, procon_probe_weight=5.0)
    run.train()
    assert len(run._probes.states) == kept * len(run._probes)
    (logged,) = [row["procon/penalty"] for row in run.state.log_history if row.get("procon/penalty")]
    assert len(found) == 1
    assert logged == pytest.approx(kept * 5.0 * found[0].penalty.item(), rel=1e-3)
    assert logged > 1e-9


def test_replies_are_held(trainer):
    """A tenth of what is left of them without."""

    def departure(reply_tokens: int) -> float:
        run = trainer(
            procon_probe_reply_tokens=reply_tokens,
            procon_schedule="procon_s:100",
            procon_probe_every=1,
            max_steps=20,
            learning_rate=1e-2,
        )
        given = {"blocks": (1,), "count": 3, "reply_tokens": 4, "progress": False}
        start = Probes.record(run.model, run.processing_class, run._directions, **given).batch()
        run.train()
        with run.constraint.attach(run.model) as constraint, torch.no_grad():
            return probe_departure(constraint, start, hold="state").penalty.item()

    assert departure(4) < 0.1 * departure(0)


def test_the_model_says_what_it_was_kept_at(trainer):
    run = trainer()
    run.train()
    run.save_model()
    folder = Path(run.args.output_dir)
    assert (
        "at the last token and all along the starting model's own reply of up to 3 probe prompts"
        in (folder / "README.md").read_text()
    )
    assert read_record(folder)["probing"]["reply_tokens"] == 4
    with safe_open(folder / PROBES, "pt") as file:
        assert (file.get_tensor("lengths") - file.get_tensor("prompts")).tolist() == [4, 4, 4]


def test_a_checkpoint_of_before_replies_goes_on_without(trainer):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(procon_probe_reply_tokens=0, **saving).train()
    checkpoint = Path(trainer().args.output_dir) / "checkpoint-2"
    record = read_record(checkpoint)
    del record["probing"]["reply_tokens"]
    record.pop("checksum", None)
    write_record(checkpoint, record)
    with pytest.raises(ProConError, match=r"'reply_tokens': 0.*'reply_tokens': 4"):
        trainer(**saving).train(str(checkpoint))
    trainer(procon_probe_reply_tokens=0, **saving).train(str(checkpoint))
