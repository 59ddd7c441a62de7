"""Where anchors come from: live ones train as recorded ones do, probes hold their prompts, and sources combine."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import ProcessorMixin, set_seed

from procon.anchors import LiveAnchors
from procon.data import flattening_collator, padding_collator
from procon.directions import Directions
from procon.errors import ProConError
from procon.method import Probes, ProbeTerm
from procon.method.record import read_record
from procon.models import DecoderForward, find_decoder, origin_of
from procon.settings import ProConSettings
from procon.training import ProConConfig, ProConTrainer

QUIET = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1, "use_cpu": True}
PROMPTS = ["count to three", "say it again, and louder", "why"]


def sources(source: str, prompts=None) -> dict[str, str]:
    """Settings for "recorded", "live", "probes", or two of them; the probes' prompts go into a file."""
    tokens = [name for name in ("recorded", "live") if name in source]
    kept = {"procon_terms": "tokens"}
    if "probes" in source:
        prompts = "builtin" if prompts is None else str(prompts)
        kept = {"procon_terms": "both" if tokens else "probes", "procon_probes": prompts}
    return kept | ({"procon_anchors": tokens[0], "procon_penalty": "squared"} if tokens else {})


def lora(model, seed: int = 0):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"))


@pytest.fixture
def trainer(tiny_model, tokenizer, random_directions, samples, tmp_path):
    """``trainer(source, **settings)`` of a tiny model, with an adapter unless ``full``."""

    def make(source, *, full=False, model=None, data=None, collator=None, given=True, probes=None, **settings):
        base = tiny_model() if model is None else model
        directions = random_directions(base)
        folder = settings.pop("output_dir", str(tmp_path / source.replace("+", "-")))
        config = {
            **QUIET,
            **sources(source, probes),
            "procon_schedule": "procon_s:1",
            "max_steps": 20,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 2,
            "output_dir": folder,
        }
        set_seed(0)
        return ProConTrainer(
            base if full else lora(base),
            ProConConfig(**config | settings),
            directions=directions if given and config["procon_terms"] != "probes" else None,
            train_dataset=Dataset.from_list(samples) if data is None else data,
            data_collator=(collator or padding_collator)(tokenizer),
            processing_class=tokenizer,
        )

    return make


@pytest.fixture
def three(tmp_path) -> Path:
    """A file of three prompts."""
    file = tmp_path / "three.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


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
        {"procon_scope": "response"},
    ],
    ids=["LoRA", "full", "packed", "accumulated", "checkpointed", "response"],
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
    assert (live.procon.tokens.live.start == "adapters off") is not settings.get("full", False)


def test_live_anchors_of_an_adapter_that_was_trained_before(trainer, tiny_model):
    """Switching it off would not be the start, so what trains is copied."""
    model = lora(tiny_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    run = trainer("live", full=True, model=model, max_steps=2)
    run.train()
    assert run.procon.tokens.live.start != "adapters off"
    assert run.state.log_history[0]["procon/penalty"] < 1e-9 < run.state.log_history[1]["procon/penalty"]


@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "full"])
@pytest.mark.parametrize("source", ["live", "live+probes", "probes", "recorded+probes"])
def test_resumed_is_uninterrupted(trainer, source, full, three, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "full": full}
    if "probes" in source:
        saving |= {"probes": three, "procon_probe_batch": 2, "procon_probe_reply_tokens": 4}
    whole = trainer(source, output_dir=str(tmp_path / "whole"), **saving)
    whole.train()
    again = trainer(source, output_dir=str(tmp_path / "whole"), **saving)
    again.train(str(tmp_path / "whole" / "checkpoint-3"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


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
    with pytest.raises(ProConError, match="was trained with anchors 'live', not 'recorded'"):
        trainer("recorded", **saving).train(str(tmp_path / "a" / "checkpoint-2"))


def test_a_stream_trains_with_live_anchors_and_with_probes(trainer, samples):
    def rows():
        while True:
            yield from samples

    for source in ("live", "probes"):
        run = trainer(source, data=IterableDataset.from_generator(rows), max_steps=3)
        run.train()
        assert run.procon.evidence.constrained_steps == (3 if source == "live" else 1)
        with pytest.raises(ProConError, match="'1@1ep,0' counts in epochs, which a stream does not have"):
            trainer(source, data=run.train_dataset, max_steps=3, procon_schedule="1@1ep,0").train()
    with pytest.raises(
        ProConError, match="a streamed one cannot be recorded beforehand, so take procon_anchors 'live'"
    ):
        trainer("recorded", data=IterableDataset.from_generator(rows), max_steps=3).train()


def test_a_trainer_runs_the_probes_in_turn(trainer, three):
    run, seen = trainer("recorded+probes", max_steps=6, probes=three, procon_probe_batch=2), []
    decoder = find_decoder(run.model).module

    def keep(_: object, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled():  # or they are being recorded
            seen.append(kwargs["input_ids"])

    decoder.register_forward_pre_hook(keep, with_kwargs=True)
    run.train()
    probes = run.procon.term(ProbeTerm).probes
    asked = [ids for ids in seen if any(ids.equal(probes.turn(turn, 2).inputs()[0]["input_ids"]) for turn in range(3))]
    assert len(asked) == 3
    for turn, ids in enumerate(asked):
        assert ids.equal(probes.turn(turn, 2).inputs()[0]["input_ids"])


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
        assert held.procon.evidence.constrained_steps == 1
    with pytest.raises(
        ProConError, match=r"^in none of the 4 steps under .* would probes act: probe_every is 5, so give"
    ):
        trainer("probes", max_steps=4, procon_probe_every=5).train()


def test_probes_begin_once_the_model_has_moved(trainer, caplog):
    held = trainer("recorded+probes", max_steps=2, full=True, lr_scheduler_type="constant")
    held.train()
    penalties = [row["procon/penalty"] for row in held.state.log_history if "procon/penalty" in row]
    assert penalties[0] < 1e-10 < 1e-4 < penalties[1]
    with caplog.at_level("WARNING"):
        trainer("recorded+probes", max_steps=1).train()
    assert "of 1, would probes act: probe_every is 2" in caplog.text


def test_what_is_constrained_is_said_before_the_first_step(trainer, three, tiny_model, tokenizer, capsys):
    trainer("recorded+probes", probes=three, max_steps=1, disable_tqdm=False, procon_probe_every=1).train()
    said = capsys.readouterr().err
    assert "ProCon: alpha 1\n" in said
    assert re.search(r"along the refusal direction \(.* lie [\d.]+ apart\), at all tokens; anchors recorded for", said)
    assert "probes: predictions along replies to 3 prompts, 4 at a time, every 1 steps" in said
    trainer("probes", max_steps=2, disable_tqdm=False).train()
    said = capsys.readouterr().err
    assert "ProCon: alpha 1; the starting model refuses 0% of malicious prompts" in said
    assert re.search("4 at a time, every 2 steps\n.*; measure the result with: procon eval FOLDER", said)


def test_probes_keep_what_plain_training_moves(trainer):
    def departure(run) -> float:
        run.train()
        with torch.no_grad():
            return kept.departure(DecoderForward(run.model.eval())).item()

    held = trainer("probes", procon_schedule="procon_s:100", max_steps=30, procon_probe_every=1)
    held.train()
    kept = held.procon.term(ProbeTerm).probes
    with torch.no_grad():
        after = kept.departure(DecoderForward(held.model.eval())).item()
    assert after < 0.1 * departure(trainer("recorded", procon_schedule="0", max_steps=30))
    held.save_model()
    record = read_record(Path(held.args.output_dir))
    assert (record["terms"], record["probes"], record["probe_batch"]) == ("probes", "builtin", 4)
    assert record["directions"] is None  # what works along none asks for none
    card = (Path(held.args.output_dir) / "README.md").read_text()
    assert "| constrained tokens |" not in card
    assert (
        "| what it predicts along 48 tokens of the starting model's own replies to probe prompts (builtin), at most 4 "
        "every 1 steps, with weight 15 |" in card
    )


@pytest.mark.parametrize(("reply_tokens", "kept"), [(0, 1), (4, 5)])
def test_the_weight_is_that_of_the_mean_over_tokens(trainer, three, monkeypatch, reply_tokens, kept):
    found, departure = [], Probes.departure

    def noted(*args, **kwargs):
        found.append(departure(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(Probes, "departure", noted)
    settings = {"procon_probe_reply_tokens": reply_tokens, "procon_probe_weight": 5.0, "full": True, "max_steps": 2}
    run = trainer("probes", probes=three, **settings)
    run.train()
    probes = run.procon.term(ProbeTerm).probes
    assert len(probes.states) == kept * len(probes)
    (logged,) = [row["procon/penalty"] for row in run.state.log_history if row.get("procon/penalty")]
    *at_start, last = found
    assert max(at_start) < 1e-6
    assert logged == pytest.approx(5.0 * last.item(), rel=1e-3)
    assert logged > 1e-9


def test_replies_are_kept(trainer, three):
    """A tenth of what is left of them without."""

    def departure(reply_tokens: int) -> float:
        run = trainer(
            "probes",
            probes=three,
            full=True,
            procon_probe_reply_tokens=reply_tokens,
            procon_schedule="procon_s:100",
            procon_probe_every=1,
        )
        replies = ProConSettings(probe_reply_tokens=4)
        start = Probes.record(run.model, run.processing_class, three, settings=replies, progress=False)
        run.train()
        with torch.no_grad():
            return start.departure(DecoderForward(run.model)).item()

    assert departure(4) < 0.1 * departure(0)


def test_another_source_is_another_training(trainer, tmp_path):
    settings = {"output_dir": str(tmp_path), "max_steps": 3}
    held = trainer("probes", **settings)
    held.train()
    held.save_model()
    for other in ({"source": "recorded"}, {"source": "probes", "procon_probe_weight": 3.0}):
        with pytest.raises(ProConError, match="of another training: give another output_dir"):
            trainer(**{**settings, **other}).train()


def test_live_anchors_refuse_directions_of_another_model(tiny_model, random_directions):
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        other.get_input_embeddings().weight.normal_()
    directions = replace(random_directions(model), provenance={"origin": origin_of(other)})
    with pytest.raises(ProConError, match=r"^directions were extracted from another model"):
        LiveAnchors(model, directions)


def test_bad_input(trainer, tokenizer, tiny_model, random_directions, tmp_path):
    tokenizer.chat_template = None
    with pytest.raises(ProConError, match="tokenizer has no chat template: pass the tokenizer of a chat model"):
        trainer("probes")
    for setting, value in {
        "procon_anchors": "remembered",
        "procon_probe_every": 1.5,
        "procon_probe_weight": float("nan"),
        "procon_probes": 3,
    }.items():
        with pytest.raises(ProConError, match=f"^{setting} is "):
            ProConConfig(output_dir=str(tmp_path), **{setting: value})
    merged = lora(tiny_model())
    merged.merge_adapter()
    with pytest.raises(ProConError, match="the adapter is switched off or merged into the model"):
        LiveAnchors(merged, random_directions(merged))
    off = lora(tiny_model())
    off.base_model.disable_adapter_layers()
    with pytest.raises(ProConError, match=r"nothing in the model trains|the adapter is switched off"):
        LiveAnchors(off, random_directions(off))


# Directions of other concepts


@pytest.fixture
def probe(tiny_model) -> Directions:
    """Vectors at two of three blocks, without a unit."""
    vectors = {1: torch.ones(32), 2: torch.arange(32.0)}
    return Directions.from_vectors(tiny_model(), vectors, name="honesty")


@pytest.mark.parametrize("source", ["recorded", "live"])
def test_given_vectors_are_trained_along(trainer, probe, source):
    run = trainer(source, given=False, max_steps=2)
    run.procon.use(probe)
    run.train()
    assert run.procon.constraint.blocks == (1, 2)
    assert run.procon.evidence.did(2)["blocks_acted"] == [1, 2]


def test_a_processor_asks_by_its_tokenizer(trainer, tokenizer):
    """As TRL gives one for text alone, if the model could take images too."""

    class Processor(ProcessorMixin):
        def __init__(self, tokenizer):
            super().__init__(tokenizer)

    run = trainer("recorded+probes", max_steps=1)
    run.processing_class = Processor(tokenizer)
    assert run.procon.run.tokenizer is tokenizer
    run.train()


@pytest.mark.parametrize("schedule", ["procon_s:0.5", "0.5@2steps,0"])
@pytest.mark.parametrize("source", ["live", "probes", "recorded+probes"])
def test_what_acts_is_not_taken_for_unused(trainer, source, schedule, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(source, procon_schedule=schedule, max_steps=4).train()
    assert "nothing was constrained" not in caplog.text
