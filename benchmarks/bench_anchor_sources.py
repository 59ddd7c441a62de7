"""What do live anchors and probes add to a training step, and live anchors to one of DPO?

A step is zero_grad, forward, loss, backward and AdamW of a LoRA adapter, on one batch.

- ``plain``: the loss of transformers; ``recorded``: with the penalty, anchors given.
- ``live``: the anchors come from a forward of the model with its adapter off.
- ``probes``: eight prompts in a forward of their own, kept at their last states, and no penalty on the batch: the step
  that runs them. In use that is every second or fourth step, so a training pays a half or a quarter of what is shown.
- ``both``: with the penalty, anchors given, and the probes kept at their last state (``procon_terms="both"``); again
  the step that runs them, and the other steps are those of ``recorded``.
- ``dpo``: TRL's DPOTrainer, whose reference is the model with its adapter off; ``dpo_live``: ProConDPOTrainer, which
  takes live anchors from that same forward.

Beside the times stands how far tensors' memory rises in one step, as ``peak_rise_bytes``.

On two cores the supervised steps take 31 minutes and those of DPO 18: two commands, with ``-k supervised`` and
``-k preference``.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from statistics import median
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.harness.allocations import peak_rise
from benchmarks.harness.interleaved import Samples, interleave
from benchmarks.harness.machine import DEVICE, PAIRS, SMOKE
from benchmarks.harness.shapes import SHAPES, make_batch, make_directions, make_model, make_optimizer
from benchmarks.harness.timers import wall_time
from procon import Probes, ProjectionConstraint
from procon.anchors import LiveAnchors
from procon.models import DecoderForward
from procon.training.preferences import ProConDPOConfig, ProConDPOTrainer

SUPERVISED = ("plain", "recorded", "live", "probes", "both")
PREFERENCES = ("dpo", "dpo_live")
ALPHA = 0.1
PROBES, PROBE_TOKENS = 8, 40


class Case(NamedTuple):
    shape: str
    dtype: torch.dtype
    rows: int
    length: int

    def __str__(self) -> str:
        return f"{self.shape}-{str(self.dtype).removeprefix('torch.')}-{self.rows}x{self.length}"


def _case() -> Case:
    if SMOKE:
        return Case("smoke", torch.float32, 2, 12)
    if DEVICE == "cuda":
        return Case("Llama-3-8B", torch.bfloat16, 8, 512)
    return Case("SmolLM2-135M", torch.float32, 8, 512)


CASE = _case()


class _Step:
    """One contender on the shared model."""

    def __init__(self, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, after: Callable[[], None]):
        self._loss, self._optimizer, self._after = loss, optimizer, after

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        self._loss().backward()
        self._after()
        self._optimizer.step()


class _Result(NamedTuple):
    samples: Samples
    peaks: dict[str, int]

    def replay(self, replay, group: str, contender: str, baseline: str) -> None:
        replay(
            f"{group} {CASE}",
            self.samples,
            contender,
            baseline,
            tokens_per_second=CASE.rows * CASE.length / median(self.samples.seconds[contender]),
            peak_rise_bytes=self.peaks[contender],
        )


def _peaks(steps: dict[str, _Step]) -> dict[str, int]:
    """Of a second step in a row of each: the first frees what the one before it left."""
    peaks = {}
    for name, step in steps.items():
        step()
        peaks[name] = peak_rise(step)
    return peaks


def _probes(directions) -> Probes:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(SHAPES[CASE.shape]["vocab_size"], (PROBES, PROBE_TOKENS), generator=generator)
    size = directions.basis.shape[-1]
    lengths = torch.full((PROBES,), PROBE_TOKENS)
    return Probes(ids, lengths, lengths, torch.zeros(PROBES, size), torch.zeros(PROBES, 0).long(), torch.tensor(0))


@cache
def _supervised() -> _Result:
    model, directions = make_model(CASE.shape, CASE.dtype, "lora"), make_directions(CASE.shape)
    optimizer = make_optimizer(model.parameters())
    batch = make_batch(CASE.shape, CASE.rows, CASE.length, packed=False)
    mask = torch.ones(batch["input_ids"].shape, device=DEVICE)
    constraint = ProjectionConstraint(directions).attach(model)
    live = LiveAnchors(model, directions, blocks=constraint.blocks)
    anchors, probes, forward = live(batch), _probes(directions), DecoderForward(model)

    def plain() -> Tensor:
        constraint.enabled = False
        return model(**batch).loss

    def constrained(given: Callable[[], Tensor]) -> Tensor:
        constraint.enabled = True
        constraint.set_target(given(), mask)
        return model(**batch).loss + ALPHA * constraint.penalty()

    def probed() -> Tensor:
        constraint.enabled = False
        return model(**batch).loss + ALPHA * probes.departure(forward)

    def both() -> Tensor:
        loss = constrained(lambda: anchors)
        constraint.rest()
        return loss + ALPHA * probes.departure(forward)

    losses = {
        "plain": plain,
        "recorded": partial(constrained, lambda: anchors),
        "live": partial(constrained, partial(live, batch)),
        "probes": probed,
        "both": both,
    }
    steps = {name: _Step(loss, optimizer, constraint.release) for name, loss in losses.items()}
    try:
        return _Result(interleave(steps, wall_time, rounds=PAIRS, warmup=1), _peaks(steps))
    finally:
        constraint.detach()


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(SHAPES[CASE.shape]["vocab_size"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), pad_token="w0", eos_token="w1", bos_token="w2"
    )


@cache
def _preferences() -> _Result:
    """The trainers' own losses, on one batch of as many pairs as make the same number of tokens."""
    tokenizer, pairs = _tokenizer(), max(1, CASE.rows // 2)
    ids = torch.randint(3, SHAPES[CASE.shape]["vocab_size"], (pairs, 2, CASE.length // 2))
    text = [[" ".join(f"w{token}" for token in side) for side in pair] for pair in ids.tolist()]
    prompt = " ".join(f"w{token}" for token in ids[0, 0].tolist())
    rows = [{"prompt": prompt, "chosen": f" {one}", "rejected": f" {other}"} for one, other in text]
    model = make_model(CASE.shape, CASE.dtype, "lora")
    optimizer = make_optimizer(model.parameters())
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings = {"output_dir": folder, "per_device_train_batch_size": pairs, "report_to": [], "bf16": False}
        settings |= {"max_length": None, "gradient_checkpointing": False, "use_cpu": DEVICE == "cpu"}
        # Of alpha 0 it is TRL's own: the same code path and the same model for both.
        trainer = ProConDPOTrainer(
            model,
            args=ProConDPOConfig(procon_anchors="live", procon_terms="tokens", **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            directions=make_directions(CASE.shape),
        )
        procon = trainer.procon
        procon.attach()
        stack.callback(procon.detach)
        procon.record(trainer._recording_dataloader)
        procon.begin_step(0)
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        plain = {name: value for name, value in batch.items() if name != "constraint_mask"}

        def loss(constrained: bool) -> Tensor:
            if constrained:
                return trainer.compute_loss(model, dict(batch))
            procon.pause(True)
            return super(ProConDPOTrainer, trainer)._compute_loss(model, dict(plain), False)

        steps = {name: _Step(partial(loss, name == "dpo_live"), optimizer, procon.release) for name in PREFERENCES}
        return _Result(interleave(steps, wall_time, rounds=PAIRS, warmup=1), _peaks(steps))


@pytest.mark.parametrize("contender", SUPERVISED)
def test_supervised_step(replay, contender: str):
    _supervised().replay(replay, "training step", contender, "plain")


@pytest.mark.parametrize("contender", PREFERENCES)
def test_preference_step(replay, contender: str):
    _preferences().replay(replay, "DPO step", contender, "dpo")
