"""What does the constraint add to a training step?

A step is zero_grad, forward, loss, backward and AdamW. All contenders train the same parameters with the same optimiser
on the same batch; each has module objects of its own around them, so that hooks of one are not in another's way.

- ``plain``: the loss of transformers; ``plain_liger``: with Liger's RMSNorm in place of each of transformers'.
- ``naive``: the method as one would write it: ``output_hidden_states`` of the model and, each step, of the frozen
  start (for LoRA the same model without its adapter), and the penalty in eager float32.
- ``pass_through``, ``fused``: ours at the block inputs, and inside the norms that read them; anchors are given.
- ``plain_compiled``, ``fused_compiled``: the same with the whole model under ``torch.compile``.

Anchors come from one recording of the data (bench_anchors.py). A step pays only for their use.
"""

import copy
import gc
from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from statistics import median
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.harness.agreement import check_agreement
from benchmarks.harness.interleaved import Samples, interleave
from benchmarks.harness.machine import COMPILED, DEVICE, PAIRS, SMOKE
from benchmarks.harness.peers import why_left_out
from benchmarks.harness.shapes import make_batch, make_directions, make_model, make_optimizer
from benchmarks.harness.timers import wall_time
from procon import ProjectionConstraint
from procon.models import find_decoder

CONTENDERS = ("plain", "plain_liger", "naive", "pass_through", "fused", "plain_compiled", "fused_compiled")
BASELINE = "plain"
ALPHA = 0.1


class Case(NamedTuple):
    shape: str
    training: str
    dtype: torch.dtype
    rows: int
    length: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape}-{self.training}-{dtype}-{self.rows}x{self.length}"


def _cases() -> list[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    if SMOKE:
        return [Case("smoke", training, fp32, 2, 12) for training in ("lora", "full")]
    if DEVICE == "cuda":
        shapes = ("SmolLM2-135M", "Llama-3.2-1B", "Llama-2-7B", "Llama-3-8B")
        return [Case(shape, training, bf16, 8, 512) for training in ("lora", "full") for shape in shapes]
    return [Case("SmolLM2-135M", training, dtype, 8, 96) for training in ("lora", "full") for dtype in (fp32, bf16)]


def _why_left_out() -> dict[str, str]:
    reasons = {}
    if reason := why_left_out("liger"):
        reasons["plain_liger"] = reason
    if COMPILED != "models":
        reason = "compiling a whole model is left out: PROCON_BENCHMARK_COMPILE=models tries it"
        reasons |= dict.fromkeys(("plain_compiled", "fused_compiled"), reason)
    return reasons


LEFT_OUT = _why_left_out()


class Loss(NamedTuple):
    """Cross-entropy and penalty of one forward."""

    cross_entropy: Tensor
    penalty: Tensor | None


def _sharing_tensors(model: nn.Module) -> nn.Module:
    """Module objects of their own around the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def _with_liger_norms(model: nn.Module) -> nn.Module:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            settings = (module.weight, module.variance_epsilon)
            module.forward = lambda hidden, settings=settings: LigerRMSNormFunction.apply(hidden, *settings)
    return model


def _block_inputs(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of every block, without the LM head and without gradients."""
    with torch.no_grad():
        # The last entry comes after the final norm.
        return find_decoder(model).module(**inputs, output_hidden_states=True).hidden_states[:-1]


class _Training:
    """One model, one optimiser, and the losses of all contenders."""

    def __init__(self, case: Case):
        self._model = make_model(case.shape, case.dtype, case.training)
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = make_optimizer(self._trained)
        self._batch = make_batch(case.shape, case.rows, case.length, packed=SMOKE or DEVICE == "cuda")
        self._inputs = {name: value for name, value in self._batch.items() if name != "labels"}
        self._mask = (self._batch["labels"] != -100).float()
        self._directions = make_directions(case.shape)
        self._vectors = self._directions.basis[:, 0].to(DEVICE)
        inputs = zip(_block_inputs(self._model, self._inputs), self._vectors, strict=True)
        self._anchors = torch.stack([hidden.float() @ direction for hidden, direction in inputs], dim=-1)
        self._constraints: dict[str, ProjectionConstraint] = {}
        self.losses: dict[str, Callable[[], Loss]] = {
            "plain": self._plain(self._model),
            "pass_through": self._constrained("pass_through", fuse="never"),
            "fused": self._constrained("fused", fuse="auto"),
        }
        if "plain_liger" not in LEFT_OUT:
            self.losses["plain_liger"] = self._plain(_with_liger_norms(_sharing_tensors(self._model)))
        if "plain_compiled" not in LEFT_OUT:
            self.losses["plain_compiled"] = self._plain(torch.compile(_sharing_tensors(self._model)))
            self.losses["fused_compiled"] = self._constrained("fused_compiled", fuse="auto", wrap=torch.compile)
        self.losses["naive"] = self._naive(case.training)

    def _plain(self, model: nn.Module) -> Callable[[], Loss]:
        return lambda: Loss(model(**self._batch).loss, None)

    def _constrained(
        self, name: str, fuse: str, wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    ) -> Callable[[], Loss]:
        model = _sharing_tensors(self._model)
        constraint = self._constraints[name] = ProjectionConstraint(self._directions, penalty="squared").attach(
            model, fuse=fuse
        )
        if len(constraint.fused) != (len(constraint.blocks) if fuse == "auto" else 0):
            raise AssertionError(f"{name} is not what it says: only blocks {constraint.fused} are fused")
        model = wrap(model)

        def loss() -> Loss:
            constraint.set_target(self._anchors, self._mask)
            return Loss(model(**self._batch).loss, constraint.penalty())

        return loss

    def _naive(self, training: str) -> Callable[[], Loss]:
        if training == "lora":

            def initial_inputs() -> tuple[Tensor, ...]:
                with self._model.disable_adapter():
                    return _block_inputs(self._model, self._inputs)
        else:
            start = copy.deepcopy(self._model).cpu()

            @cache
            def start_in_place() -> nn.Module:
                # When it is first used, so that the memory of the other contenders is measured without it.
                return start.to(DEVICE)

            def initial_inputs() -> tuple[Tensor, ...]:
                return _block_inputs(start_in_place(), self._inputs)

        def loss() -> Loss:
            output = self._model(**self._batch, output_hidden_states=True)
            states = zip(output.hidden_states[:-1], initial_inputs(), self._vectors, strict=True)
            total = 0
            for hidden, initial, direction in states:
                distance = hidden.float() @ direction - initial.float() @ direction
                total = total + (distance.square() * self._mask).sum()
            return Loss(output.loss, total / (self._mask.sum() * len(self._vectors)))

        return loss

    def step(self, contender: str) -> None:
        self._optimizer.zero_grad()
        loss = self.losses[contender]()
        (loss.cross_entropy if loss.penalty is None else loss.cross_entropy + ALPHA * loss.penalty).backward()
        self._optimizer.step()
        if contender in self._constraints:
            self._constraints[contender].release()

    def check(self, tolerance: float) -> None:
        """Losses agree, and so do the penalty's gradients in the first block, away from the start."""
        with torch.no_grad():
            for parameter in self._trained:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        probe = next(p for p in find_decoder(self._model).blocks[0].parameters() if p.requires_grad)
        cross_entropies, penalties = {}, {}
        for name, compute in self.losses.items():
            loss = compute()
            cross_entropies[name] = [loss.cross_entropy]
            if loss.penalty is not None:
                penalties[name] = [loss.penalty, *torch.autograd.grad(loss.penalty, probe)]
        check_agreement(cross_entropies, tolerance)
        check_agreement(penalties, tolerance)

    def drop(self, contender: str) -> None:
        del self.losses[contender]
        self._constraints.pop(contender, None)


class _Result(NamedTuple):
    samples: Samples
    peak_memory: dict[str, int]
    too_large: set[str]


def _free_memory() -> None:
    """Of models that hooks, cycles and compiled code may still hold."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _peak_memory(step: Callable[[], None]) -> int:
    """Bytes of GPU memory that the second step takes at most; the first makes the optimiser's state."""
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@cache
def _measure(case: Case) -> _Result:
    _free_memory()
    training = _Training(case)
    peak_memory, too_large = {}, set()
    if DEVICE == "cuda":
        for name in list(training.losses):
            try:
                peak_memory[name] = _peak_memory(lambda name=name: training.step(name))
            except torch.cuda.OutOfMemoryError:
                too_large.add(name)
                training.drop(name)
                _free_memory()
    if BASELINE in too_large:
        return _Result(Samples({}), {}, set(CONTENDERS))
    training.check(1e-3 if case.dtype == torch.float32 else 5e-2)
    steps = {name: partial(training.step, name) for name in CONTENDERS if name in training.losses}
    samples = interleave(steps, wall_time, rounds=PAIRS, warmup=1)
    return _Result(samples, peak_memory, too_large)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", _cases(), ids=str)
def test_training_step(replay, case: Case, contender: str):
    if contender in LEFT_OUT:
        pytest.skip(LEFT_OUT[contender])
    result = _measure(case)
    if contender in result.too_large:
        pytest.skip("does not fit into the memory of this GPU")
    work = {"tokens_per_second": case.rows * case.length / median(result.samples.seconds[contender])}
    if contender in result.peak_memory:
        work["peak_memory_bytes"] = result.peak_memory[contender]
    if contender != BASELINE:
        ratio = result.samples.ratio(contender, BASELINE)
        work["overhead_percent"] = {name: 100 * (value - 1) for name, value in ratio._asdict().items()}
    replay(f"training step {case}", result.samples, contender, BASELINE, **work)
