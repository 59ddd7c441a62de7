"""The method as one object: what every trainer, callback and loop holds, and nothing else of ours."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm
from transformers.trainer_utils import has_length

from procon.chat import builtin_prompts, describe_chat, measure_refusal
from procon.constraint import ProjectionConstraint, constrained_tokens
from procon.constraint.proof import check_finite, refuse_noise
from procon.directions import DIRECTIONS_FILE, Directions
from procon.errors import ProConError
from procon.method.evidence import Evidence
from procon.method.probes import ProbeTerm, check_tokenizer
from procon.method.record import check_resumed, read_record, write_record
from procon.method.term import Batches, Collator, Run, Step, Term
from procon.method.tokens import TokenTerm
from procon.models import find_decoder, is_sharded, token_embedding
from procon.ranks import are_ranks, is_main
from procon.schedule import AlphaSchedule
from procon.settings import ChatSettings, Fuse, ProConSettings, check_setting
from procon.version import __version__, say_untested

logger = logging.getLogger(__name__)

#: An alpha so small serves to log the penalty, and not to constrain.
_ONLY_MEASURES = 1e-6


def make_terms(settings: ProConSettings, fuse: Fuse = "auto") -> list[Term]:
    """What the loss is a sum of, under these settings."""
    terms: list[Term] = []
    if settings.has_tokens:
        terms.append(TokenTerm(settings, fuse=fuse))
    if settings.has_probes:
        terms.append(ProbeTerm(settings))
    return terms


class ProCon:
    """Keeps a model's refusals while it is fine-tuned: ``loss + alpha * (sum of terms)``.

    In a loop of one's own::

        procon = ProCon(model, tokenizer)
        loader = procon.prepare(loader)  # what the terms need, from the model as it now is
        for batch in loader:
            procon.begin(batch)
            loss = model(**batch).loss + procon.loss()
            loss.backward()
            procon.end(optimizer)  # once per optimiser step, before it
            optimizer.step()
            optimizer.zero_grad()
        procon.close()

    Args:
        model: a transformers causal LM, bare or within PEFT; or a :class:`Run`, which a trainer's door makes.
        tokenizer: with a chat template: directions are extracted with it, and probes asked.
        settings: of the method.
        directions: of this model, or the file that they were saved in; extracted if not given and a term needs them.
        chat: how the model is asked: system prompt, and variables of its chat template.
        folder: where recorded anchors are kept.
        progress: whether bars show how far preparing is.
        fuse: ``"never"`` leaves the blocks' norms alone, ``"auto"`` has them do the work.

    Attributes:
        settings, schedule: as given, and the strength over training.
        terms: what the loss is a sum of; a list that may be added to before :meth:`prepare`.
        tokens: the term of the training tokens, None without one.
        batch_keys: what the terms' collators add to a batch, once they are attached.
        directions: once they are found; None if no term needs any.
        evidence: what the constraint has done so far.
        step: the current optimiser step.
        accumulation: micro-batches per optimiser step, where a loop takes means over them.
        at_start: whether the model is still the one that anchors were recorded of.

    Raises:
        ProConError: for wrong settings or directions, or a tokenizer without a chat template where one is needed.
    """

    def __init__(
        self,
        model: nn.Module | Run,
        tokenizer: Any = None,
        settings: ProConSettings | None = None,
        directions: Directions | str | Path | None = None,
        *,
        chat: ChatSettings | None = None,
        folder: str | Path = "procon-output",
        progress: bool = True,
        fuse: Fuse = "auto",
    ) -> None:
        check_setting("fuse", fuse)
        say_untested()
        self.settings = settings or ProConSettings()
        self.schedule = AlphaSchedule.parse(self.settings.schedule)
        if not isinstance(model, Run):
            model = Run(model, tokenizer, chat=chat, folder=folder, progress=progress)
        self.run = model
        self.terms = make_terms(self.settings, fuse) if self.schedule.active else []
        self.directions: Directions | None = None
        self.evidence = Evidence()
        self.step = Step()
        self.steps_per_epoch = 1
        self.accumulation = 1
        self.tokens: TokenTerm | None = self.term(TokenTerm)
        self.batch_keys: tuple[str, ...] = ()
        self._paused = self._attached = False
        self._begun, self._most = 0, 1
        self._after: RemovableHandle | None = None  # of an optimiser step that has ended, and is not yet taken
        self.at_start = True
        self._is_start_checked = False
        self._penalty_sum: Tensor | None = None
        self._penalty_steps = 0
        self._carried = 0.0  # the penalty of a window that a checkpoint has cut
        self._resumed: dict[str, Any] = {}
        self._refused: float | None = None  # a share of malicious prompts, where directions do not have it
        if directions is not None and not isinstance(directions, Directions):
            directions = Directions.load(directions)
        self._given = directions
        if directions is not None and self.needs_directions:
            self.use(directions)
        elif directions is not None and self.active:
            logger.warning(
                "directions are given, and terms %r use none: the paper's method is terms 'tokens'", self.settings.terms
            )
        if (self.needs_directions and directions is None) or self.term(ProbeTerm) is not None:
            check_tokenizer(self.run.tokenizer)

    # ---------------------------------------------------------------- what it is

    @property
    def active(self) -> bool:
        """Whether anything is constrained at any time."""
        return bool(self.terms)

    @property
    def needs_directions(self) -> bool:
        """Whether a term works along refusal directions."""
        return any(term.needs_directions for term in self.terms)

    def term(self, kind: type[Any]) -> Any:
        """The term of a class, None without one."""
        return next((term for term in self.terms if isinstance(term, kind)), None)

    @property
    def constraint(self) -> ProjectionConstraint | None:
        """That of the training tokens, once there are directions."""
        return None if self.tokens is None or self.directions is None else self.tokens.constraint

    @property
    def alpha(self) -> float:
        """Strength at the current optimiser step."""
        return self.step.alpha

    def alpha_at(self, step: int) -> float:
        """Strength at optimiser step ``step``, from 0."""
        return self.schedule.alpha(max(step, 0), self.steps_per_epoch)

    @property
    def ready(self) -> bool:
        """Whether every term has recorded or restored what it needs."""
        return all(term.ready for term in self.terms)

    # ---------------------------------------------------------------- before training

    def use(self, directions: Directions) -> None:
        """Work along ``directions``; ProConError if a term cannot."""
        self.directions = directions
        for term in self.terms:
            if term.needs_directions:
                term.use(directions)

    def find(self, checkpoint: Path | None = None, record: Mapping[str, Any] | None = None) -> None:
        """Find directions if a term needs them and none are given, and take what a checkpoint has of the terms.

        Args:
            checkpoint: the folder of one, of a run that goes on.
            record: what :meth:`facts` and :meth:`state` gave there.

        Raises:
            ProConError: if the checkpoint is of other settings, or of training without the constraint.
        """
        name = f"checkpoint {str(checkpoint)!r}"
        self._resumed = dict(record or {})
        self.at_start = checkpoint is None
        if checkpoint and "states" not in self._resumed:
            raise ProConError(
                f"{name} is of training without the constraint: resume with schedule '0', or start afresh"
            )
        if checkpoint:  # first, as other terms keep other files
            check_resumed(self._resumed, {"terms": self.settings.terms}, name)
        if self.directions is None and self.needs_directions:
            found = self._given  # before a term was added that needs them
            if found is None:
                found = Directions.load(checkpoint / DIRECTIONS_FILE) if checkpoint else self._extract()
            self.use(found)
        if checkpoint:
            check_resumed(self._resumed, self.facts(), name)
            for term in self.terms:
                term.restore(self._resumed["states"][term.name], checkpoint, self.run)

    def attach(self) -> None:
        """Put on the model what the terms need there, unless it is there."""
        if self._attached:
            return
        # As transformers sets it; the forwards of all terms would have it.
        refuse_noise(getattr(token_embedding(self.run.model), "neftune_noise_alpha", None))
        if self.terms:
            find_decoder(self.run.model)  # before anything is generated: it says what is not supported
        self._attached = True
        try:
            for term in self.terms:
                term.attach(self.run)
                term.pause(self._paused)
                self.batch_keys += term.batch_keys
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """The model is as it was."""
        self._attached, self.batch_keys = False, ()
        for term in self.terms:
            term.detach()

    def collator(self, collate: Collator) -> Collator:
        """``collate``, with what the terms add to a batch."""
        for term in self.terms:
            collate = term.collator(collate, self.run)
        return collate

    def record(self, batches: Batches) -> None:
        """Record what the starting model is, unless a checkpoint has it: the model is where it will train.

        What was done is counted on from there, or from nothing. If it fails, the model is as it was.

        Args:
            batches: makes a loader of the training set, each rank's share once, for a term that records it.
        """
        window = self._resumed.get("window", {})
        self.evidence.restore(self._resumed.get("did"))
        self._penalty_sum = None
        self._carried = float(window.get("penalty", 0.0))
        self._penalty_steps = int(window.get("steps", 0))
        try:
            if self.active and not self.needs_directions and self.at_start and self.settings.probe_file is None:
                # Elsewhere asked as directions are found, or prompts given: what is kept is what is there.
                prompts = builtin_prompts("extraction").malicious
                asked = {"chat": self.run.chat, "progress": self.run.progress}
                model = self.run.model
                self._refused = self.run.once(
                    lambda: measure_refusal(model, self.run.tokenizer, prompts, **asked), all_call=is_sharded(model)
                )
            for term in self.terms:
                term.prepare(self.run, batches)
        except BaseException:
            self.detach()
            raise
        if self.active and self.run.progress and is_main():
            tqdm.write("\n".join(self.summary()), file=sys.stderr)

    def summary(self) -> list[str]:
        """What is constrained, a line for each part, for people."""
        rate = self.directions.provenance.get("refusal_rate") if self.directions else self._refused
        start = "" if rate is None else f"; the starting model refuses {rate:.0%} of malicious prompts"
        return [
            f"ProCon: alpha {self.schedule}{start}",
            *(f"  {term.name}: {term.summary()}" for term in self.terms),
            "  logged as procon/penalty and procon/alpha; measure the result with: procon eval FOLDER",
        ]

    def prepare(self, loader: DataLoader, *, accumulation: int = 1, resume: str | Path | None = None) -> DataLoader:
        """All that comes before training in a plain loop; returns ``loader``, whose batches then have what terms need.

        Args:
            loader: of the training set, with a collator that gives ``input_ids`` and ``labels``; before Accelerate
                prepares it.
            accumulation: micro-batches per optimiser step, by which the loop divides its loss.
            resume: a folder of :meth:`save`, to go on from. The model is then still the one that training began with:
                load its trained weights afterwards.

        Raises:
            ProConError: if the data cannot be recorded, or the checkpoint is of other settings.
        """
        self.accumulation = accumulation
        if not self.active:
            return loader
        folder = Path(resume) if resume else None
        record = _read(folder) if folder else {}
        self.find(folder, record)
        # Ranks share the batches out: a sampler of theirs has done so already, Accelerate does afterwards.
        shares = 1 if hasattr(loader.sampler, "num_replicas") else self.run.groups
        self.set_steps_per_epoch(self.steps_in(loader, shares * accumulation))
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if are_ranks() else (0, 1)
        collate, size = loader.collate_fn, loader.batch_size or 1
        anchored = self.collator(collate)
        self.attach()
        self.record(lambda: once_through(loader.dataset, collate, size, rank=rank, ranks=ranks))
        loader.collate_fn = anchored
        self.begin_step(int(record.get("step", 0)))
        return loader

    def save(self, folder: str | Path) -> None:
        """Write what :meth:`prepare` takes to resume a plain loop, between two optimiser steps; all ranks must call."""
        if self._after is not None:  # the optimiser has skipped its step
            self.begin_step(self.step.number + 1)
        self.penalty()  # of all ranks

        def write() -> None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.save_files(Path(folder))
            record = {"version": __version__, "step": self.step.number, **self.facts(), **self.state()}
            write_record(Path(folder), record)

        self.run.once(write)

    def steps_in(self, loader: DataLoader, batches: int) -> int:
        """Optimiser steps of ``batches`` batches in an epoch; 1 of a stream, whose schedule cannot count in epochs."""
        if has_length(loader):
            return max(1, -(-len(loader) // batches))
        if any(phase.length is not None and phase.unit == "ep" for phase in self.schedule.phases):
            raise ProConError(
                f"schedule '{self.schedule}' counts in epochs, which a stream does not have: give steps (1@200steps,0)"
            )
        return 1

    def set_steps_per_epoch(self, number: int) -> None:
        """How many optimiser steps an epoch has, by which the schedule counts.

        Raises:
            ProConError: if a resumed run would go through the schedule at another pace. Another number of ranks goes on
                as the interrupted run would have, if its steps are as large.
        """
        self.steps_per_epoch = number
        before = self._resumed.get("steps_per_epoch")
        if before is None or all(phase.steps(before) == phase.steps(number) for phase in self.schedule.phases):
            return
        raise ProConError(
            f"the checkpoint was trained with {before} steps per epoch, not {number}, and the schedule counts in "
            "epochs: keep ranks times batch size times gradient accumulation steps as it was"
        )

    def check_acts(self, steps: int) -> None:
        """Look at the schedule before a training of ``steps`` optimiser steps; warn of a phase that does nothing.

        Raises:
            ProConError: if none of the steps would be under the constraint.
        """
        schedule, per_epoch = self.schedule, self.steps_per_epoch
        if steps < 1:
            raise ProConError("the training has no steps: give num_train_epochs or max_steps above 0, and data")
        constrained = schedule.constrained_steps(steps, per_epoch)
        if not constrained:
            raise ProConError(
                f"schedule {str(schedule)!r} has alpha 0 in each of the {steps} steps of this training "
                f"({per_epoch} in an epoch), so nothing would be constrained: begin the constraint earlier, train "
                "longer, or give schedule '0' to train without it"
            )
        idle = [
            f"in none of the {constrained} steps under the constraint, of {steps}, would {term.name} act: {term.idle()}"
            for term in self.terms
            if not any(self.alpha_at(number) > 0 and term.acts(Step(number)) for number in range(steps))
        ]
        if len(idle) == len(self.terms):
            raise ProConError(idle[0])
        for said in idle:
            logger.warning("%s", said)
        if steps > 1 and constrained == 1 and schedule.phases[0].alpha > 0:
            logger.warning(
                "schedule %s constrains the first of %d steps alone, when the model is still at its anchors, so it "
                "constrains next to nothing",
                schedule,
                steps,
            )
        strongest = max(phase.alpha for phase in schedule.phases)
        if strongest < _ONLY_MEASURES:
            logger.warning("alpha is at most %g: the penalty is logged, but constrains next to nothing", strongest)
        begin = 0.0
        for phase in schedule.phases:
            if begin >= steps:
                logger.warning(
                    "phase %s of schedule %s is never reached: it begins after step %d, and training has %d steps",
                    phase,
                    schedule,
                    begin,
                    steps,
                )
            begin += phase.steps(per_epoch)

    # ---------------------------------------------------------------- in training

    def begin_step(
        self,
        number: int,
        batches: Sequence[Mapping[str, Tensor]] | None = None,
        *,
        tokens: Tensor | None = None,
        parts: int | None = None,
    ) -> None:
        """Begin an optimiser step.

        Args:
            number: of the step, from 0.
            batches: its micro-batches of this rank, to divide by the constrained tokens of all ranks' together.
            tokens: their number, if known.
            parts: without either, how many means over a micro-batch make up the step, over all ranks.
        """
        self._most = sys.maxsize if tokens is not None or parts is not None else self.accumulation
        if batches is not None:
            parts, self._most = 1, len(batches)
            if self.tokens is not None and tokens is None:
                tokens = constrained_tokens(batches, self.run.total, device=self.run.device)
        self._forget_after()
        self.step = Step(number, self.alpha_at(number), tokens, parts or self.accumulation * self.run.groups)
        self._begun = 0
        self.evidence.begin_step()
        if self.constraint is not None:
            self.constraint.note_departures(self.at_start and number == 0 and self.step.alpha > 0)

    @property
    def acts(self) -> bool:
        """Whether this optimiser step has a penalty: alpha is above 0, and a term has a share of it."""
        return self.step.alpha > 0 and any(term.acts(self.step) for term in self.terms)

    def begin(self, batch: dict[str, Any]) -> None:
        """Before a training forward on ``batch``, of which what the collator added is taken out."""
        if self._after is not None:  # a GradScaler has skipped the optimiser's step, and its own is over too
            self.begin_step(self.step.number + 1)
        constrains = self.step.alpha > 0
        self._begun += 1
        self.pause(not constrains)
        for term in self.terms:
            if constrains:
                term.begin(batch, self.run)
            else:
                term.discard(batch)

    def skip(self, batch: dict[str, Any]) -> None:
        """Before any other forward, such as one of an evaluation: it is not constrained."""
        self.pause(True)
        for term in self.terms:
            term.discard(batch)

    def pause(self, paused: bool) -> None:
        """Whether forwards run at plain speed from now on."""
        if paused != self._paused:
            self._paused = paused
            for term in self.terms if self._attached else ():
                term.pause(paused)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Within the context, forwards are not constrained."""
        paused = self._paused
        self.pause(True)
        try:
            yield
        finally:
            self.pause(paused)

    def added(self, scale: float | Tensor, expected: float | None = None) -> Tensor | None:
        """After the forward, what this micro-batch adds to the loss: ``alpha * scale * share``; None if nothing.

        Args:
            scale: what the loss is divided by before or in backward, over micro-batches and ranks.
            expected: what the share's gradient should be, for :attr:`evidence`; None if that is not known.
        """
        found: list[Tensor] = []
        for term in self.terms if self.step.alpha > 0 else ():
            if not term.acts(self.step):
                continue
            self._stand_aside(term)
            share = term.share(self.step, self.run)
            if share is not None:
                found.append(share.to(found[0].device) if found else share)
        self._check_start()
        if not found:
            return None
        share = torch.stack(found).sum()
        kept = share.detach()
        self._penalty_sum = kept if self._penalty_sum is None else self._penalty_sum + kept
        self.evidence.watch(share, expected)
        return self.step.alpha * scale * share

    def _stand_aside(self, term: Term) -> None:
        """Before a term runs the model: that forward is none of the others'."""
        for other in self.terms if term.runs_the_model else ():
            if other is not term:
                other.aside()

    def _check_start(self) -> None:
        """Once, after the first forward of a training, of which the optimiser has taken no step yet."""
        if self._is_start_checked or not self.at_start or self.step.number or not torch.is_grad_enabled():
            return
        self._is_start_checked = True
        for term in self.terms:
            self._stand_aside(term)
            term.check_start(self.run)

    def loss(self) -> Tensor | float:
        """After the forward, what a plain loop adds to its loss; 0 if nothing.

        The loss is a mean over a micro-batch, divided by their number; or, after :meth:`begin_step` with all
        micro-batches of the step, a sum over tokens that is divided by their number in the whole step.

        Raises:
            ProConError: if the step has more micro-batches than it should have: it was not ended.
        """
        if self._begun > self._most:
            raise ProConError(
                f"an optimiser step of {self._most} micro-batches has begun another one, as none was ended: call "
                "end(optimizer) before each optimizer.step(), and give prepare the accumulation"
            )
        found = self.added(1.0 if self.step.tokens is not None else self.step.parts)
        return 0.0 if found is None else found

    def release(self) -> None:
        """After backward: a later forward is none that this one's anchors are for."""
        for term in self.terms:
            term.release()

    def before_optimizer(self) -> None:
        """The step's gradient is complete, and not yet clipped."""
        for term in self.terms if self.step.alpha > 0 else ():
            term.before_optimizer(self.step, self.run)

    def end_step(self, optimizer: torch.optim.Optimizer | None, model: nn.Module | None = None) -> None:
        """Before the optimiser's step: ProConError if this step's penalty has not reached what it trains."""
        if self.acts:
            model = self.run.model if model is None else model
            self.evidence.end_step(self.constraint, optimizer, model, each=self.tokens is not None)
            self._penalty_steps += 1

    def after_optimizer(self) -> None:
        """The optimiser has taken its step."""
        for term in self.terms if self.step.alpha > 0 else ():
            term.after_optimizer(self.step, self.run)

    def end(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """End an optimiser step of a plain loop, after its last backward and before ``optimizer.step()``.

        Args:
            optimizer: torch's, or Accelerate's around it; terms with a step of their own take it after this one's.

        Raises:
            ProConError: if the constraint did not act on it.
        """
        self.release()
        self.before_optimizer()
        self.evidence.expect(self._begun)
        self.end_step(optimizer)
        stepped: Any = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(stepped, torch.optim.Optimizer):
            if stepped is not None:  # DeepSpeed's, which has taken its step within backward
                self.after_optimizer()
            self.begin_step(self.step.number + 1)
            return

        def after(*_: object) -> None:
            self.after_optimizer()
            self.begin_step(self.step.number + 1)

        self._after = stepped.register_step_post_hook(after)

    def _forget_after(self) -> None:
        if self._after is not None:
            self._after.remove()
            self._after = None

    def close(self) -> None:
        """End training in a plain loop: the model is as it was; ProConError if no step was under the constraint."""
        self._forget_after()
        self.detach()
        if self.active:
            self.evidence.check_acted(self.step.number, self.schedule)

    # ---------------------------------------------------------------- what it did

    def penalty(self) -> float:
        """The penalty summed over the logging window and the ranks; stops a run whose hidden states went bad."""
        own = self._penalty_sum if self._penalty_sum is not None else torch.zeros((), device=self.run.device)
        total = float(self.run.total(own)) + self._carried
        check_finite(total, self.step.number + 1)
        self.evidence.window = total
        return total

    def log(self, step: int) -> dict[str, float]:
        """Alpha of the step before ``step`` and the mean penalty since the last call."""
        found = {"procon/alpha": self.alpha_at(step - 1)}
        if self._penalty_steps:
            total = self.penalty()
            found["procon/penalty"] = total / self._penalty_steps
            self.evidence.penalty += total
            self.evidence.window = 0.0
            self._penalty_sum, self._penalty_steps, self._carried = None, 0, 0.0
        return found

    def facts(self) -> dict[str, Any]:
        """What a resumed run must share, as JSON: settings as they came out, and the directions' hash."""
        settings = {name: value for name, value in asdict(self.settings).items() if name != "anchors_dir"}
        settings["schedule"] = str(self.schedule)
        for term in self.terms:
            settings.update(term.describe())
        return {
            **settings,
            "directions": self.directions.hash if self.directions else None,
            "concepts": list(self.directions.concepts) if self.directions else [],
            "chat": describe_chat(self.run.tokenizer, self.run.chat),
        }

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from, as JSON, beside the files of :meth:`save_files`."""
        return {
            "states": {term.name: term.state() for term in self.terms},
            "did": self.did(),
            "window": {"penalty": self.evidence.window, "steps": self._penalty_steps},
            "steps_per_epoch": self.steps_per_epoch,
        }

    def did(self, steps: int | None = None) -> dict[str, Any]:
        """What was measured of ``steps`` optimiser steps; of those so far, if not given."""
        return self.evidence.did(self.step.number if steps is None else steps)

    def save_files(self, folder: Path) -> None:
        """The directions, and what the terms keep, beside a model or in a checkpoint."""
        if self.directions is not None:
            self.directions.save(folder / DIRECTIONS_FILE)
        for term in self.terms:
            term.save(folder)

    def _extract(self) -> Directions:
        """The directions of the model as it is; of the main process if there are several."""
        run = self.run
        return run.once(
            # Ranks round differently, and anchors belong to one set of directions.
            lambda: Directions.extract(run.model, run.tokenizer, chat=run.chat, progress=run.progress),
            all_call=run.is_loaded_in_parts,
        )


def makes_batches(loader: Any) -> bool:
    """Whether a loader makes a batch; of a stream it is not known beforehand."""
    return not has_length(loader) or len(loader) > 0


def check_batches(made: bool, dataset: Any) -> None:
    """Raise ProConError if a training made no batch of its data, or would make none."""
    if not made:
        rows = f"the {len(dataset)} rows of " if hasattr(dataset, "__len__") else ""
        raise ProConError(
            f"no batch was made of {rows}the training set: with dataloader_drop_last or sample packing, fewer (packed) "
            "rows than per_device_train_batch_size (axolotl: micro_batch_size) make none, so lower it or give more data"
        )


def _read(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    if record is None or "step" not in record:
        raise ProConError(f"{str(folder)!r} is no checkpoint of a loop: give a folder that ProCon.save wrote")
    return record


def once_through(
    dataset: Any, collate: Collator, batch_size: int, *, rank: int = 0, ranks: int = 1, name: str = "training set"
) -> DataLoader:
    """A loader that runs through a training set once, longest samples first; this rank's share of them.

    Raises:
        ProConError: for a dataset without a length.
    """
    require_length(dataset, name)
    order = sorted(range(len(dataset)), key=lambda number: -_tokens(dataset[number]))
    # A generator of its own: without one, iterating would draw from the global random state of training.
    return DataLoader(Subset(dataset, order[rank::ranks]), batch_size, collate_fn=collate, generator=torch.Generator())


def require_length(dataset: object, name: str) -> None:
    """Raise ProConError unless the training set can be run through before training starts."""
    if dataset is None or not hasattr(dataset, "__len__"):
        raise ProConError(
            f"recorded anchors need a {name} with a length: a streamed one cannot be recorded beforehand, so take "
            "procon_anchors 'live' in a ProConTrainer, or procon_terms 'probes'"
        )


def _tokens(row: Any) -> int:
    """Length of a row; of preference data, that of its parts together."""
    if not isinstance(row, Mapping):
        return 0
    if "input_ids" in row:
        return len(row["input_ids"])
    return sum(len(part) for name, part in row.items() if name.endswith("_ids"))
