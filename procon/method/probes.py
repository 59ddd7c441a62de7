"""A few fixed prompts, at which the model is kept near what it was: no directions, no hooks.

Along the starting model's own replies to malicious and to benign prompts it is kept what the model would say next: the
divergence from its predictions, as SafeGrad (arXiv 2508.07172) has it on refusals that others wrote, and once more
where replies begin. Or, without replies, the whole last hidden state where they would begin, as SBR has it (arXiv
2605.05995).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from procon.chat import builtin_probe_pairs, continue_tokens, load_instructions, pad_token_id, render, user_turn
from procon.constraint.proof import nodes_before
from procon.errors import ProConError
from procon.files import whole_file
from procon.method.divergence import divergence, log_probabilities
from procon.method.term import Batches, Run, Step, Term
from procon.models import (
    Decoder,
    DecoderForward,
    evaluating,
    find_decoder,
    is_sharded,
    model_device,
    observe_last_state,
    token_embedding,
    transformers_model,
    unwrapped,
)
from procon.ranks import are_ranks, is_main
from procon.settings import ChatSettings, ProConSettings

logger = logging.getLogger(__name__)

#: The file's name beside a model or in a checkpoint. vLLM takes whatever ends in ".safetensors" there for weights.
PROBES_FILE = "probes.procon"

#: Packages whose modules heed the mask that they are given.
_USUAL = ("accelerate", "bitsandbytes", "deepspeed", "liger_kernel", "peft", "procon", "torch", "transformers")

#: Of how many next tokens the predictions are kept; of all others, what they add up to.
_LIKELIEST = 32

#: Before the first step, rounding moves predictions by at most this many nats; or by so many times the square of what
#: the precision of the computation makes of a typical logit. Measured on SmolLM2-135M, between turns of probes in one
#: batch, in several, one by one and on ranks: 2e-11 in float32, and once that square in bfloat16.
_ROUNDING, _SQUARES = 1e-4, 10.0

#: By how much of a state's length rounding moves it at most: of 32 bits, and of 16.
_OFF, _FEW_BITS_OFF = 1e-3, 0.06


@dataclass(frozen=True)
class Probes:
    """Prompts, with replies or without, and what the starting model makes of the tokens that are kept.

    These are the last token of each prompt and all of the reply: those from which a token of the reply, or its end, is
    predicted. There are N of them in all, prompt by prompt.

    Attributes:
        input_ids: ``[n, T]`` int64, padded on the right.
        prompts: ``[n]`` int64, tokens of each prompt.
        lengths: ``[n]`` int64, tokens of each prompt and its reply.
        states: ``[N, k + 1]`` fp32, log-probabilities of the likeliest next tokens and, last, of all others together;
            without replies, ``[N, D]``, last hidden states there, after the final norm.
        tokens: ``[N, k]`` int64, which the likeliest are; k is 0 without replies.
        shared: int64 scalar, tokens that all prompts begin with and that a forward runs once; 0 if each is run whole.
    """

    input_ids: Tensor
    prompts: Tensor
    lengths: Tensor
    states: Tensor
    tokens: Tensor
    shared: Tensor

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.lengths)

    @property
    def kept(self) -> Tensor:
        """``[n, T]`` bool, the tokens at which the model is kept."""
        place = torch.arange(self.input_ids.shape[1])
        return (place >= self.prompts[:, None] - 1) & (place < self.lengths[:, None])

    @property
    def counts(self) -> Tensor:
        """``[n]`` int64, how many of these tokens each prompt has."""
        return self.lengths - self.prompts + 1

    @property
    def hash(self) -> str:
        """A short hash of the tokens and of what is kept at them."""
        digest = hashlib.sha256()
        for name, tensor in self._tensors().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def turn(self, number: int, size: int) -> Probes:
        """The ``size`` prompts that the ``number``-th run takes, from 0: they go round. All, if there are no more."""
        if size >= len(self):
            return self
        return self._of((number * size + torch.arange(size)) % len(self))

    def part(self, group: int, groups: int) -> tuple[Probes, int]:
        """Those that group number ``group`` of ``groups`` runs, and how many of the groups run the same ones.

        Each has its own as long as there are enough.
        """
        parts = min(groups, len(self))
        mine = group % parts
        return self._of(torch.arange(mine, len(self), parts)), len(range(mine, groups, parts))

    def _of(self, rows: Tensor) -> Probes:
        prompts, lengths = self.prompts[rows], self.lengths[rows]
        places = torch.arange(len(self.states)).split(self.counts.tolist())
        kept = torch.cat([places[row] for row in rows])
        ids = self.input_ids[rows, : int(lengths.max())]
        return Probes(ids, prompts, lengths, self.states[kept], self.tokens[kept], self.shared)

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
        """What a forward takes to run the prompts, and at which of its tokens the model is kept.

        A row each, padded. Or all in one row, behind the tokens that they share: each prompt sees those and itself.

        Args:
            dtype: of the model. On a GPU, cuDNN's attention misreads a mask of another one, and the memory-efficient
                one refuses it (PyTorch's pull request 191612).
        """
        if not (shared := int(self.shared)):
            mask = torch.arange(self.input_ids.shape[1]) < self.lengths[:, None]
            return {"input_ids": self.input_ids, "attention_mask": mask.long()}, self.kept
        own = [row[shared:length] for row, length in zip(self.input_ids, self.lengths.tolist(), strict=True)]
        ids = torch.cat([self.input_ids[0, :shared], *own])
        prompt = torch.arange(len(self)).repeat_interleave(self.lengths - shared)
        position = torch.cat([torch.arange(shared), *(shared + torch.arange(len(row)) for row in own)])
        prompt = torch.cat([torch.full((shared,), -1), prompt])
        sees = ((prompt == prompt[:, None]) | (prompt == -1)).tril()
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
        kept = (prompt >= 0) & (position >= self.prompts[prompt] - 1)
        return {"input_ids": ids[None], "position_ids": position[None], "attention_mask": mask[None, None]}, kept[None]

    def run(self, forward: DecoderForward) -> tuple[Tensor, Any]:
        """Last hidden states ``[N, D]`` at the kept tokens, and what the forward gave."""
        found: list[Tensor] = []
        inputs, kept = self.inputs(forward.dtype)
        with observe_last_state(forward.decoder, found.append):
            outputs = forward.run(**{name: tensor.to(forward.device) for name, tensor in inputs.items()})
        return found[0][kept.to(found[0].device)], outputs

    def predict(self, forward: DecoderForward) -> Tensor:
        """Logits ``[N, V]`` at the kept tokens, in fp32."""
        inputs, kept = self.inputs(forward.dtype)
        places = kept.any(0).nonzero().squeeze(1)
        chosen: dict[str, Any] = {"logits_to_keep": places.to(forward.device)} if forward.takes_places else {}
        logits = forward.predict(**{name: part.to(forward.device) for name, part in inputs.items()}, **chosen).logits
        if logits.dtype.itemsize < 4:
            _say_rounded(logits.dtype)
        return logits[kept[:, places if chosen else slice(None)].to(logits.device)].float()

    def size_of_numbers(self, forward: DecoderForward) -> float:
        """The typical size of what is kept: of logits, or without replies of states."""
        if self.tokens.shape[1]:
            return float(self.predict(forward).std(1).mean())
        return float(self.states.square().mean().sqrt())

    def departure(self, forward: DecoderForward, among: Probes | None = None) -> Tensor:
        """How far the model has moved at the kept tokens, on average: a scalar.

        ``KL(start || model)`` of the next token, in nats, over the likeliest ones and all others as one: its mean over
        all kept tokens, and its mean where replies begin. Without replies, the mean squared difference of the states.

        Args:
            forward: of the model in training, which is run once.
            among: those that these are a part of: what all parts give adds up to what the whole gives.

        Raises:
            ProConError: if nothing in the model trains.
        """
        whole = self if among is None else among
        if self.tokens.shape[1]:
            logits = self.predict(forward)
            if torch.is_grad_enabled() and not logits.requires_grad:
                raise ProConError("nothing in the model trains, so the penalty on what it predicts does nothing")
            moved = divergence(self.states.to(logits.device), log_probabilities(logits, self.tokens.to(logits.device)))
            begins = (self.counts.cumsum(0) - self.counts).to(logits.device)
            # Whether a reply refuses is mostly decided where it begins, which is one of its many tokens.
            return moved.sum() / len(whole.states) + moved[begins].sum() / len(whole)
        last, outputs = self.run(forward)
        if torch.is_grad_enabled() and not last.requires_grad:
            raise ProConError("nothing below the last hidden state trains, so the penalty on it does nothing")
        departure = (last.float() - self.states.to(last.device)).square().sum() / whole.states.numel()
        # FSDP2 gathers what its root holds once backward comes to what the root gave: none of it has to come there.
        unused = getattr(outputs, "logits", None)
        return departure if unused is None else departure + unused.flatten()[:0].sum().to(departure)

    @classmethod
    def record(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str] | str | Path | None = None,
        *,
        settings: ProConSettings | None = None,
        chat: ChatSettings | None = None,
        progress: bool = True,
    ) -> Probes:
        """Run the prompts through ``model`` as it now is. If parameters are sharded, all ranks must call.

        Args:
            prompts: texts, or a file of them; those of the settings if not given, the built-in malicious ones, and with
                replies their benign twins.
            settings: ``probe_batch`` prompts have one forward. Each goes on with up to ``probe_reply_tokens`` of the
                model's own greedy reply, thoughts included, along which its predictions are kept.
            chat: how the model is asked: system prompt and variables of its chat template.
            progress: whether a bar shows how far replies are generated.

        Raises:
            ProConError: for a tokenizer without a chat template, or no prompts.
        """
        settings = settings or ProConSettings()
        texts = _texts(settings.probe_file if prompts is None else prompts, twins=settings.probe_reply_tokens > 0)
        check_tokenizer(tokenizer)
        model = unwrapped(model)
        forward = DecoderForward(model)
        rows = [render(tokenizer, user_turn(text), generation_prompt=True, chat=chat) for text in texts]
        prompt_lengths = torch.tensor([len(row) for row in rows])
        if reply_tokens := settings.probe_reply_tokens:
            replies = continue_tokens(
                model, tokenizer, rows, max_new_tokens=reply_tokens, description="probe replies", progress=progress
            )
            rows = [[*row, *reply] for row, reply in zip(rows, replies, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), pad_token_id(tokenizer))
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        nothing = torch.zeros(int((lengths - prompt_lengths + 1).sum()), 0)
        found = cls(ids, prompt_lengths, lengths, nothing, nothing.long(), torch.tensor(0))
        with evaluating(model):
            found = found._together(forward, settings.probe_batch)
            found = (found._predicted if reply_tokens else found._recorded)(forward, settings.probe_batch)
        if not torch.isfinite(found.states).all():
            raise ProConError(
                "what the model computes at the probes is NaN or infinite: load it in bfloat16 or float32, and check "
                "its weights"
            )
        return found

    def _together(self, forward: DecoderForward, size: int) -> Probes:
        """In one row behind the tokens that they share, if the model gives the first turn the same states so.

        Attention kernels without such masks do not, nor layers that read a row from end to end.
        """
        shared = torch.tensor(_common_beginning(self))
        if not shared or not _heeds_masks(forward.decoder):
            return self
        first = self.turn(0, size)
        alone = first.run(forward)[0].float()
        try:
            together = replace(first, shared=shared).run(forward)[0].float()
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            logger.info("probes are run one by one: their shared beginning cannot be run once (%s)", error)
            return self
        off = ((together - alone).norm(dim=1) / alone.norm(dim=1)).max()
        # Rounding alone, or another computation.
        few_bits = torch.is_autocast_enabled(forward.device.type) or forward.dtype.itemsize < 4
        if not off < (_FEW_BITS_OFF if few_bits else _OFF):
            logger.info("probes are run one by one: behind a shared beginning their states are off by %.2g", off)
            return self
        return replace(self, shared=shared)

    def _recorded(self, forward: DecoderForward, size: int) -> Probes:
        """With the last hidden states as they are now, of ``size`` prompts at a time."""
        states = [turn.run(forward)[0].cpu().float() for turn in self._turns(size)]
        return replace(self, states=torch.cat(states)[: len(self.states)])  # the last turn goes round

    def _turns(self, size: int) -> Iterator[Probes]:
        """All of them, ``size`` at a time."""
        return (self.turn(number, size) for number in range(-(-len(self) // size)))

    def _predicted(self, forward: DecoderForward, size: int) -> Probes:
        """With what the model says next."""
        likely, tokens = [], []
        for turn in self._turns(size):
            logits = turn.predict(forward)
            chosen = logits.topk(min(_LIKELIEST, logits.shape[1])).indices
            # Of a vocabulary that has no others, or of tokens that can never be said, what a file can hold.
            likely.append(log_probabilities(logits, chosen).clamp_min(torch.finfo(torch.float32).min).cpu())
            tokens.append(chosen.cpu())
        count = len(self.states)
        return replace(self, states=torch.cat(likely)[:count], tokens=torch.cat(tokens)[:count])

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with a checksum in its header; returns its path."""
        with whole_file(Path(path)) as partial:
            tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
            save_file(tensors, partial, metadata={"hash": self.hash})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Probes:
        """Read what :meth:`save` wrote; ProConError if it is missing or damaged."""
        path = Path(path)
        try:
            with safe_open(path, "pt") as file:
                found = cls(**{field.name: file.get_tensor(field.name) for field in fields(cls)})
                expected = (file.metadata() or {}).get("hash")
        except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name that no file can have
            raise ProConError(
                f"probes in {str(path)!r} cannot be read ({error}): resume from another checkpoint, or start afresh"
            ) from error
        if found.hash != expected or not found._fits():
            raise ProConError(f"probes in {str(path)!r} are damaged: resume from another checkpoint, or start afresh")
        return found

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _fits(self) -> bool:
        """Whether the tensors belong together: what a file says may be anything."""
        numbers = (self.input_ids, self.prompts, self.lengths, self.tokens, self.shared)
        if any(tensor.dtype != torch.int64 for tensor in numbers) or self.states.dtype != torch.float32:
            return False
        if [tensor.dim() for tensor in (*numbers, self.states)] != [2, 1, 1, 2, 0, 2] or not len(self.lengths):
            return False
        rows, width = self.input_ids.shape
        if not rows == len(self.prompts) == len(self.lengths) or any(bool((part < 0).any()) for part in numbers):
            return False
        if not bool(((self.prompts >= 1) & (self.prompts <= self.lengths) & (self.lengths <= width)).all()):
            return False
        if not 0 <= int(self.shared) <= _common_beginning(self):
            return False
        if len(self.tokens) != len(self.states) or self.tokens.shape[1] not in (0, self.states.shape[1] - 1):
            return False
        if not bool(self.states.isfinite().all()):
            return False
        return int(self.counts.sum()) == len(self.states)


class ProbeTerm(Term):
    """``weight`` times how far the model has moved at a few probes, in turn: :meth:`Probes.departure`.

    Attributes:
        probes: once they are recorded.
    """

    name: ClassVar[str] = "probes"
    runs_the_model: ClassVar[bool] = True

    def __init__(self, settings: ProConSettings) -> None:
        self._settings = settings
        self.probes: Probes | None = None
        self._forward: DecoderForward | None = None
        self._is_looked_at = False
        self._recorded_in: set[torch.dtype] = set()  # on the rank that has recorded them

    def attach(self, run: Run) -> None:
        if isinstance(token_embedding(run.model), BaseTunerLayer):
            # Of rows that probes alone reach, Adam makes whole steps however small their gradient is.
            logger.warning(
                "an adapter is on the embeddings, and probes may move what they should keep there, more than training "
                "without them would: leave the embeddings out of target_modules, or set terms to 'tokens'"
            )

    def prepare(self, run: Run, batches: Batches) -> None:
        self._forward, self._is_looked_at = None, False
        if self.probes is not None:
            return
        asked: dict[str, Any] = {"settings": self._settings, "chat": run.chat, "progress": run.progress}
        with run.autocast(), _precisions(run.model, self._recorded_in):
            self.probes = run.once(  # ranks round differently
                lambda: Probes.record(run.model, run.tokenizer, **asked),
                all_call=is_sharded(run.model),
            )

    @property
    def ready(self) -> bool:
        return self.probes is not None

    def acts(self, step: Step) -> bool:
        """In the last of each so many steps.

        At the first step the model is at its start, and the penalty's gradient is rounding noise. Adam would make
        whole steps of it in what probes alone reach, such as embeddings of tokens that are not in the batch.
        """
        return (step.number + 1) % self._settings.probe_every == 0

    def idle(self) -> str:
        return f"probe_every is {self._settings.probe_every}, so give a smaller number, or train longer"

    def share(self, step: Step, run: Run) -> Tensor | None:
        if self.name in step.done:  # once in an optimiser step
            return None
        step.done.add(self.name)
        settings = self._settings
        turn = self._recorded().turn(step.number // settings.probe_every, settings.probe_batch)
        mine, alike = turn.part(run.group, run.groups)
        departure = mine.departure(self._in_training(run), among=turn)
        if not self._is_looked_at:
            _refuse_reentrant(departure)
            self._is_looked_at = True
        return settings.probe_weight / alike * departure

    def _in_training(self, run: Run) -> DecoderForward:
        if self._forward is None:  # now that the model is wrapped as it trains
            self._forward = DecoderForward(run.model)
        return self._forward

    def check_start(self, run: Run) -> None:
        """A turn of probes gives what was recorded, in training's own forward, or a line says by how much it does not.

        Another precision is said however little it moves: on a peaked model it moves more.
        """
        turn = self._recorded().turn(0, self._settings.probe_batch)
        mine, alike = turn.part(run.group, run.groups)
        forward, found = self._in_training(run), set()
        with torch.no_grad(), _precisions(run.model, found):
            twice = []
            for seed in range(2):  # such as other dropout, if any is left
                with torch.random.fork_rng(devices=[]):
                    torch.random.default_generator.manual_seed(seed)
                    twice.append(float(run.total(mine.departure(forward, among=turn) / alike)))
            departure, again = twice
            coarse = max((torch.finfo(dtype).eps for dtype in found), default=0.0)
            most = max(_ROUNDING, _SQUARES * (coarse * mine.size_of_numbers(forward)) ** 2)
        recorded = self._recorded_in
        if recorded and found != recorded:
            then, now = (" and ".join(sorted(str(each)[6:] for each in dtypes)) for dtypes in (recorded, found))
            reason = (
                f"they were recorded in {then}, and training runs in {now}: prepare as training runs (autocast, dtype)"
            )
        elif departure <= most:
            return
        elif departure != again:
            reason = "two forwards differ in training: leave out what draws random numbers in them"
        else:
            reason = "the model has other weights or other kernels than when they were recorded: prepare it last"
        if is_main():
            logger.warning(
                "before the first step, the model is %.3g nats away from its recorded predictions at the probes, of "
                "which rounding explains %.1g: %s",
                departure,
                most,
                reason,
            )

    def _recorded(self) -> Probes:
        if self.probes is None:
            raise ProConError("probes are not recorded yet: call prepare before training")
        return self.probes

    def save(self, folder: Path) -> None:
        if self.probes is not None:
            self.probes.save(folder / PROBES_FILE)

    def restore(self, state: Mapping[str, Any], folder: Path, run: Run) -> None:
        found = Probes.load(folder / PROBES_FILE)
        if found.hash != state.get("probes"):
            raise ProConError(
                f"the probes in {str(folder / PROBES_FILE)!r} are those of another run: resume from a whole "
                "checkpoint, or start afresh"
            )
        vocabulary = token_embedding(run.model).num_embeddings
        if max(int(part.max()) for part in (found.input_ids, found.tokens) if part.numel()) >= vocabulary:
            raise ProConError(
                f"the probes in {str(folder / PROBES_FILE)!r} have tokens that the model, of {vocabulary}, does not: "
                "load the model that the run began with"
            )
        self.probes = found

    def state(self) -> dict[str, Any]:
        return {"probes": self.probes.hash if self.probes else None}

    def summary(self) -> str:
        settings = self._settings
        often = f"{settings.probe_batch} at a time, every {settings.probe_every} steps"
        kept = "predictions along replies to" if settings.probe_reply_tokens else "last states at"
        return f"{kept} {len(self._recorded())} prompts, {often}"

    def describe(self) -> dict[str, Any]:
        if self._settings.probe_file is None:
            return {}
        texts = _texts(self._settings.probe_file)  # another file, or another text in it, are other probes
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
        return {"probes": f"{len(texts)} prompts, {digest}"}


def _common_beginning(probes: Probes) -> int:
    """Tokens that all prompts begin with, short of the last one of any: those of the chat template."""
    width = int(probes.prompts.min()) - 1
    ids = probes.input_ids[:, :width]
    return int((ids == ids[0]).all(0).long().cumprod(0).sum())


def _refuse_reentrant(departure: Tensor) -> None:
    """Raise ProConError where ranks add up gradients as a backward comes to them, and each has a backward within."""
    several = are_ranks() and dist.get_world_size() > 1
    if several and any("CheckpointFunction" in node.name() for node in nodes_before([departure.grad_fn])):
        raise ProConError(
            "gradient checkpointing with use_reentrant=True has a backward of its own in each block, and with that of "
            "the probes the ranks would no longer train one model: set use_reentrant=False"
        )


@contextmanager
def _precisions(model: nn.Module, found: set[torch.dtype]) -> Iterator[None]:
    """Within the context, adds to ``found`` what forwards compute in: autocast's dtype, or the model's."""
    kind, dtype = model_device(model).type, transformers_model(unwrapped(model)).dtype

    def look(_state: Tensor) -> None:
        found.add(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype)

    with observe_last_state(find_decoder(model), look):
        yield


def _heeds_masks(decoder: Decoder) -> bool:
    """Whether a mask says what a token sees in every layer: in training too, where some replace the attention."""
    config: Any = decoder.module.config
    layers = set(getattr(config, "layer_types", None) or ())
    if decoder.attn_implementation not in ("eager", "sdpa") or not layers <= {"full_attention", "sliding_attention"}:
        return False
    forwards = (getattr(module.forward, "__module__", "") or "" for module in decoder.module.modules())
    return all(name.split(".")[0] in _USUAL for name in forwards)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ProConError if the tokenizer has no chat template to ask probes with, or to extract directions."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ProConError(
            "probes and directions take prompts in the model's chat format, and its tokenizer has no chat template: "
            "pass the tokenizer of a chat model, or set terms to 'tokens' and give directions"
        )


@cache
def _say_rounded(dtype: torch.dtype) -> None:
    logger.warning(
        "the model gives its logits in %s, as its forward does not call its LM head or rounds afterwards: as long as "
        "the model has hardly moved, the gradient of the probes is mostly rounding",
        str(dtype).removeprefix("torch."),
    )


def _texts(prompts: Sequence[str] | str | Path | None, *, twins: bool = False) -> tuple[str, ...]:
    if prompts is None:
        pairs = builtin_probe_pairs()
        # In turn, so that each forward has both.
        return tuple(chain(*zip(pairs.malicious, pairs.benign, strict=True))) if twins else pairs.malicious
    texts = load_instructions(prompts) if isinstance(prompts, str | Path) else tuple(prompts)
    if not texts:
        raise ProConError("no probe prompts given: at least one is needed")
    return texts
