"""Where anchors come from: live ones train as recorded ones do, probes hold their prompts, and sources combine."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import ProcessorMixin, set_seed

from procon.anchors import LiveAnchors, Probes
from procon.anchors.probes import PROBES
from procon.constraint import ProjectionConstraint, probe_penalty
from procon.data import flattening_collator, padding_collator
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import find_decoder, observe_last_state, observe_sites, origin_of
from procon.training import ProConConfig, ProConTrainer
from procon.training.record import read_record, write_record

QUIET = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1, "use_cpu": True}
PROMPTS = ["count to three", "say it again, and louder", "why"]


def lora(model, seed: int = 0):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"))


@pytest.fixture
def trainer(tiny_model, tokenizer, random_directions, samples, tmp_path):
    """``trainer(source, **settings)`` of a tiny model, with an adapter unless ``full``."""

    def make(source, *, full=False, model=None, data=None, collator=None, given=True, **settings):
        base = tiny_model() if model is None else model
        directions = random_directions(base)
        folder = settings.pop("output_dir", str(tmp_path / source.replace("+", "-")))
        config = {
            **QUIET,
            "procon_anchors": source,
            "procon_schedule": "procon_s:1",
            "procon_penalty": "squared",
            "max_steps": 20,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 2,
            "output_dir": folder,
        }
        set_seed(0)
        return ProConTrainer(
            base if full else lora(base),
            ProConConfig(**config | settings),
            directions=directions if given else None,
            train_dataset=Dataset.from_list(samples) if data is None else data,
            data_collator=(collator or padding_collator)(tokenizer),
            processing_class=tokenizer,
        )

    return make


def losses(run) -> torch.Tensor:
    """Those of all micro-batches, unlike the logged ones not rounded."""
    found, step = [], run.training_step

    def training_step(*args, **kwargs):
        found.append(step(*args, **kwargs).double())
        return found[-1].float()

    run.training_step = training_step
    run.train()
    return torch.stack(found)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"full": True, "learning_rate": 1e-3},
        {"collator": lambda _tokenizer: flattening_collator()},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"procon_reduction": "sequence", "procon_scope": "response"},
    ],
    ids=["LoRA", "full", "packed", "accumulated", "checkpointed", "by sequence"],
)
def test_live_anchors_train_as_recorded_ones_do(trainer, settings):
    """Losses within 1e-6, relative, over 20 steps; what is logged of the penalty, too."""
    recorded, live = trainer("recorded", **settings), trainer("live", **settings)
    expected, found = losses(recorded), losses(live)
    assert len(expected) == 20 * settings.get("gradient_accumulation_steps", 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    penalties = [
        torch.tensor([row["procon/penalty"] for row in run.state.log_history if "loss" in row])
        for run in (recorded, live)
    ]
    torch.testing.assert_close(penalties[1], penalties[0], rtol=1e-4, atol=1e-9)
    assert penalties[1].max() > 1e-4
    assert (live._live.start == "adapters off") is not settings.get("full", False)


def test_live_anchors_of_an_adapter_that_was_trained_before(trainer, tiny_model):
    """Switching it off would not be the start, so what trains is copied."""
    model = lora(tiny_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    run = trainer("live", full=True, model=model, max_steps=2)
    run.train()
    assert run._live.start != "adapters off"
    assert run.state.log_history[0]["procon/penalty"] < 1e-9 < run.state.log_history[1]["procon/penalty"]


@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "full"])
@pytest.mark.parametrize("source", ["live", "live+probes", "probes", "recorded+probes"])
def test_resumed_is_uninterrupted(trainer, source, full, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "procon_probe_every": 2, "max_steps": 6, "full": full}
    saving |= {"procon_probe_count": 3, "procon_probe_batch": 2, "procon_probe_reply_tokens": 4}
    whole = trainer(source, output_dir=str(tmp_path / "whole"), **saving)
    whole.train()
    again = trainer(source, output_dir=str(tmp_path / "whole"), **saving)
    again.train(str(tmp_path / "whole" / "checkpoint-3"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_of_before_probes_went_round(trainer, tmp_path):
    """All of them ran at a time."""
    saving = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "procon_probe_every": 1}
    saving |= {"procon_probe_count": 3, "procon_probe_batch": 3, "max_steps": 2}
    trainer("probes", **saving).train()
    checkpoint = tmp_path / "checkpoint-1"
    record = read_record(checkpoint)
    del record["probing"]["batch"]
    record.pop("checksum", None)
    write_record(checkpoint, record)
    with pytest.raises(ProConError, match=r"'batch': 3.*'batch': 2"):
        trainer("probes", **{**saving, "procon_probe_batch": 2}).train(str(checkpoint))
    trainer("probes", **saving).train(str(checkpoint))


def test_a_resumed_run_has_the_start_of_the_interrupted_one(trainer, tiny_model, tmp_path):
    saving = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "full": True,
        "output_dir": str(tmp_path / "a"),
    }
    trainer("live", **saving).train()
    other = tiny_model()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    with pytest.raises(ProConError, match="began from another starting model than the one given"):
        trainer("live", model=other, **saving).train(str(tmp_path / "a" / "checkpoint-2"))
    with pytest.raises(ProConError, match="was trained with anchors_from 'live', not 'recorded'"):
        trainer("recorded", **saving).train(str(tmp_path / "a" / "checkpoint-2"))


def test_a_stream_trains_with_live_anchors_and_with_probes(trainer, samples):
    def rows():
        while True:
            yield from samples

    for source in ("live", "probes"):
        run = trainer(source, data=IterableDataset.from_generator(rows), max_steps=3)
        run.train()
        assert run.evidence.constrained_steps == (3 if source == "live" else 1)
    with pytest.raises(
        ProConError, match="a streamed one cannot be recorded beforehand, so take procon_anchors 'live'"
    ):
        trainer("recorded", data=IterableDataset.from_generator(rows), max_steps=3).train()


def at_kept_tokens(model, probes):
    """All sites' hidden states and the last one, at the tokens that are kept, in the precision of the model."""
    decoder, found, last = find_decoder(model), {}, []
    batch = probes.batch()
    rows = probes.kept
    with (
        observe_sites(decoder, lambda site, h: found.update({site: h[rows]})),
        observe_last_state(decoder, last.append),
    ):
        decoder.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return found, last[0][rows]


@pytest.mark.parametrize("hold", ["projections", "state", "both"])
@pytest.mark.parametrize(("fuse", "reply_tokens"), [("auto", 0), ("never", 0), ("auto", 4)])
def test_the_probes_penalty_and_its_gradient_are_those_by_definition(
    tiny_model, tokenizer, random_directions, hold, fuse, reply_tokens
):
    model = tiny_model().double()
    directions = random_directions(model)
    directions.gaps[:, 0] = torch.tensor([1.0, 2.0, 0.5])
    probes = Probes.record(model, tokenizer, directions, PROMPTS, blocks=(0, 1, 2), reply_tokens=reply_tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    with ProjectionConstraint(directions).attach(model, fuse=fuse) as constraint:
        penalty = probe_penalty(constraint, probes.batch(), hold=hold)
        penalty.backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()

    sites, last = at_kept_tokens(model, probes)
    expected = torch.zeros(()).double()
    if hold != "projections":
        expected = expected + (last - probes.states.double()).square().mean()
    if hold != "state":
        shifts = [
            ((sites[block] @ directions.basis[block, 0].double()) - probes.anchors[:, block].double())
            / directions.gaps[block, 0].double()
            for block in (0, 1, 2)
        ]
        expected = expected + torch.stack(shifts).square().mean()
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=0)
    expected.backward()
    by_definition = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for one, other in zip(found, by_definition, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_probes_are_kept_and_read_again(tiny_model, tokenizer, random_directions, tmp_path):
    model = tiny_model()
    probes = Probes.record(model, tokenizer, random_directions(model), PROMPTS, blocks=(1, 2), reply_tokens=3)
    path = probes.save(tmp_path / PROBES)
    assert Probes.load(path).hash == probes.hash
    sites, last = at_kept_tokens(model.eval(), probes)
    torch.testing.assert_close(probes.states, last.detach(), rtol=0, atol=1e-6)
    expected = torch.stack([sites[block] @ random_directions(model).basis[block, 0] for block in (1, 2)], 1)
    torch.testing.assert_close(probes.anchors, expected.detach(), rtol=0, atol=1e-5)
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ProConError, match="are damaged: resume from another checkpoint"):
        Probes.load(path)
    with pytest.raises(ProConError, match="cannot be read"):
        Probes.load(tmp_path / "nothing")


def test_probes_go_round(tiny_model, tokenizer, random_directions):
    """Two at a time of three: after three runs each has been there twice, so their mean penalty is that of all."""
    model = tiny_model()
    probes = Probes.record(model, tokenizer, random_directions(model), PROMPTS[:3], blocks=(1, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    turns = [probes.turn(number, 2) for number in range(4)]
    assert [turn.lengths.tolist() for turn in turns[:3]] == [
        probes.lengths[rows].tolist() for rows in ([0, 1], [2, 0], [1, 2])
    ]
    assert turns[3].hash == turns[0].hash != turns[1].hash
    assert turns[0].input_ids.shape[1] == int(turns[0].lengths.max())
    assert probes.turn(5, 3) is probes
    with ProjectionConstraint(random_directions(model), blocks=[1, 2]).attach(model) as constraint:
        for hold in ("state", "both"):
            found = [probe_penalty(constraint, turn.batch(), hold=hold).item() for turn in turns[:3]]
            expected = probe_penalty(constraint, probes.batch(), hold=hold).item()
            assert sum(found) / 3 == pytest.approx(expected, rel=1e-4)
            assert max(found) > 1.001 * min(found)


def test_a_trainer_runs_the_probes_in_turn(trainer):
    run, seen = trainer("recorded+probes", max_steps=6, procon_probe_count=3, procon_probe_batch=2), []
    decoder = find_decoder(run.model).module

    def keep(_: object, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled():  # or they are being recorded
            seen.append(kwargs["input_ids"])

    decoder.register_forward_pre_hook(keep, with_kwargs=True)
    run.train()
    asked = [ids for ids in seen if any(ids.equal(run._probes.turn(turn, 2).input_ids) for turn in range(3))]
    assert len(asked) == 3
    for turn, ids in enumerate(asked):
        assert ids.equal(run._probes.turn(turn, 2).input_ids)


def test_probes_alone_leave_the_training_batch_free(trainer):
    """Under checkpointing too, where blocks of both forwards run again in one backward."""
    plain, held = trainer("recorded", procon_schedule="0", max_steps=4), None
    expected = losses(plain)
    for checkpointing in (False, True):
        held = trainer(
            "probes",
            max_steps=4,
            procon_probe_every=3,
            procon_probe_weight=1e-20,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        torch.testing.assert_close(losses(held), expected, rtol=1e-5, atol=0)
        assert held.evidence.constrained_steps == 1
    with pytest.raises(
        ProConError, match=r"^procon_probe_every is 5, more than all steps of training, 4, so the probes would"
    ):
        trainer("probes", max_steps=4, procon_probe_every=5).train()


def test_probes_begin_once_the_model_has_moved(trainer, caplog):
    """At the first step their gradient would be rounding noise, and Adam makes whole steps of that."""
    first = trainer("probes", max_steps=1, full=True, procon_probe_every=1)
    other = trainer("recorded", max_steps=1, full=True, procon_schedule="0")
    for run in (first, other):
        run.train()
    (noisy, plain) = (run.model.get_input_embeddings().weight for run in (first, other))
    assert (noisy - plain).abs().max() > 0.5 * first.args.learning_rate  # what the pause is for

    held = trainer("recorded+probes", max_steps=2, full=True, lr_scheduler_type="constant")
    held.train()
    penalties = [row["procon/penalty"] for row in held.state.log_history if "procon/penalty" in row]
    assert penalties[0] < 1e-10 < 1e-4 < penalties[1]
    with caplog.at_level("WARNING"):
        trainer("recorded+probes", max_steps=1).train()
    assert "procon_probe_every is 2, more than all steps of training, 1, so the probes never run" in caplog.text


def test_probes_hold_what_plain_training_moves(trainer):
    def drift(run):
        run.train()
        sites, _ = at_kept_tokens(run.model.eval(), run._probes or kept)
        found = torch.stack([sites[b] @ directions.basis[b, 0] for b in (1, 2)], 1)
        return (found - (run._probes or kept).anchors[:, 1:]).square().mean().item()

    settings = {"procon_probe_hold": "projections", "procon_probe_every": 1}
    held = trainer("probes", procon_schedule="procon_s:100", max_steps=30, **settings)
    directions = held._directions
    after = drift(held)
    kept = held._probes
    assert after < 0.1 * drift(trainer("recorded", procon_schedule="0", max_steps=30))
    held.save_model()
    record = json.loads((Path(held.args.output_dir) / "procon.json").read_text())
    assert record["anchors_from"] == "probes"
    assert (record["probing"]["count"], record["probing"]["batch"]) == (128, 8)
    card = (Path(held.args.output_dir) / "README.md").read_text()
    assert "| constrained tokens | the probes' last ones |" in card
    assert (
        "| projections at the last token of up to 128 probe prompts, at most 8 every 1 steps, with weight 15 |" in card
    )


def test_another_source_is_another_training(trainer, tmp_path):
    settings = {"output_dir": str(tmp_path), "max_steps": 3, "procon_probe_every": 1}
    held = trainer("probes", **settings)
    held.train()
    held.save_model()
    for other in ({"source": "recorded"}, {"source": "probes", "procon_probe_weight": 3.0}):
        with pytest.raises(ProConError, match="of another training: give another output_dir"):
            trainer(**{**settings, **other}).train()
    recorded = trainer("recorded", procon_overwrite=True, **settings)
    recorded.train()
    recorded.save_model()
    assert not (tmp_path / PROBES).exists()


def test_every_source_refuses_directions_of_another_model(tiny_model, tokenizer, random_directions):
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        other.get_input_embeddings().weight.normal_()
    directions = replace(random_directions(model), provenance={"origin": origin_of(other)})
    for record in (
        lambda: LiveAnchors(model, directions),
        lambda: Probes.record(model, tokenizer, directions, PROMPTS, blocks=(0, 1, 2)),
    ):
        with pytest.raises(ProConError, match=r"^directions were extracted from another model"):
            record()


def test_bad_input(trainer, tokenizer, tiny_model, random_directions, tmp_path):
    tokenizer.chat_template = None
    with pytest.raises(ProConError, match=r"^procon_anchors is 'probes', and processing_class has no chat template"):
        trainer("probes")
    with pytest.raises(ProConError, match="tokenizer has no chat template: pass the tokenizer of a chat model"):
        Probes.record(tiny_model(), tokenizer, random_directions(tiny_model()), PROMPTS, blocks=(1,))
    for setting, value in {
        "procon_anchors": "remembered",
        "procon_probe_count": 0,
        "procon_probe_every": 1.5,
        "procon_probe_weight": float("nan"),
        "procon_probe_hold": "everything",
        "procon_probes": 3,
    }.items():
        with pytest.raises(ProConError, match=f"^{setting} is "):
            ProConConfig(output_dir=str(tmp_path), **{setting: value})
    merged = lora(tiny_model())
    merged.merge_adapter()
    with pytest.raises(ProConError, match="the adapter is merged into the model"):
        LiveAnchors(merged, random_directions(merged))
    off = lora(tiny_model())
    off.base_model.disable_adapter_layers()
    with pytest.raises(ProConError, match=r"nothing in the model trains|the adapter is switched off"):
        LiveAnchors(off, random_directions(off))


def test_strength_that_sets_itself_goes_by_training_tokens_whatever_their_source(trainer):
    def rows(source: str) -> list[tuple[float, float]]:
        # Probes kept at their projections would be what it goes by.
        run = trainer(source, procon_schedule="hold:0.001", max_steps=10, procon_probe_hold="state")
        run.train()
        return [(row["procon/alpha"], row["procon/shift"]) for row in run.state.log_history if "procon/shift" in row]

    recorded, live, both = (torch.tensor(rows(source)) for source in ("recorded", "live", "recorded+probes"))
    assert recorded.shape == (10, 2)
    assert torch.allclose(recorded, live, rtol=1e-4, atol=1e-9)
    # The probes act along with the tokens, and are not in the measure: at step 1 nothing has moved.
    assert both[0, 1] == recorded[0, 1] < 1e-6 < both[-1, 1]


# Directions of other concepts


@pytest.fixture
def probe(tiny_model) -> Directions:
    """A vector at one block and at the last output, without a unit."""
    vectors = {1: torch.ones(32), "last": torch.arange(32.0)}
    return Directions.from_vectors(tiny_model(), vectors, name="honesty")


@pytest.mark.parametrize("source", ["recorded", "live"])
def test_given_vectors_are_trained_along(trainer, probe, source):
    both = Directions.combine(Directions(torch.eye(4, 32)[:, None], torch.ones(4, 1), last_output=True), probe)
    run = trainer(source, given=False, max_steps=2, procon_blocks="all,last")
    run._make_constraint(both)
    run.train()
    assert run.constraint.blocks == (0, 1, 2, 3)
    assert run.evidence.did(2)["blocks_acted"] == [1, 2, 3]
    assert run._record()["concepts"] == ["refusal", "honesty"]


def test_probes_need_a_unit_for_each_vector(trainer, probe):
    run = trainer("probes", given=False, procon_probe_hold="projections")
    with pytest.raises(ProConError, match=r"^the direction of 'honesty' at block 1 has no unit, which units 'gap'"):
        run._make_constraint(probe)
    assert trainer("probes", given=False)._make_constraint(probe).blocks == (1,)


def test_what_is_of_the_gap_is_refused_for_other_concepts(trainer, probe):
    with pytest.raises(ProConError, match=r"^shifts are counted in units of the gap, and directions at one block"):
        trainer("recorded", given=False, procon_schedule="hold")._make_constraint(probe)


def test_a_processor_asks_by_its_tokenizer(trainer, tokenizer):
    """As TRL gives one for text alone, if the model could take images too."""

    class Processor(ProcessorMixin):
        def __init__(self, tokenizer):
            super().__init__(tokenizer)

    run = trainer("recorded+probes", max_steps=1)
    expected = run._record_probes(run._make_constraint(run._directions))
    run.processing_class = Processor(tokenizer)
    assert run._record_probes(run.constraint).hash == expected.hash
    assert len(run._chat_tokenizer("one")["input_ids"]) == len(tokenizer("one")["input_ids"])


@pytest.mark.parametrize("schedule", ["procon_s:0.5", "0.5@2steps,0"])
@pytest.mark.parametrize("source", ["live", "probes", "recorded+probes"])
def test_what_acts_is_not_taken_for_unused(trainer, source, schedule, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(source, procon_schedule=schedule, procon_probe_hold="state", max_steps=4).train()
    assert "nothing was constrained" not in caplog.text
    assert "never under it" not in caplog.text
