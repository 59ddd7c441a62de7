"""The projection constraint in any trainer that extends transformers' Trainer."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import TrainOutput

from procon.anchors import LiveAnchors
from procon.anchors.probes import PROBES
from procon.chat import load_instructions
from procon.constraint import ProjectionConstraint, constrained_tokens, probe_departure
from procon.constraint.guards import check_finite, refuse_data_parallel, refuse_noise
from procon.directions import DIRECTIONS, BlockDirections, load_directions
from procon.errors import ProConError
from procon.settings import ChatSettings
from procon.training.anchored import NO_ANCHORS, TARGET
from procon.training.block_weights import as_json
from procon.training.checkpoints import Checkpoint
from procon.training.config import ProConArguments
from procon.training.evidence import Evidence
from procon.training.hold import Hold
from procon.training.loss_scale import loss_scale
from procon.training.model_card import describe, write_section
from procon.training.output import output_folder
from procon.training.ranks import on_main
from procon.training.record import write_record
from procon.training.run_facts import prompts_hash
from procon.training.strength import StrengthMixin
from procon.training.watch import Watch, check_batches

logger = logging.getLogger(__name__)


class ProConMixin(StrengthMixin):
    """Makes the loss of a Trainer ``CE + alpha * constraint`` (paper section III-C)::

        class MyProConTrainer(ProConMixin, MyTrainer): ...

    The penalty scales as CE does: its token sum is divided by the constrained tokens of the whole optimiser step, over
    micro-batches and ranks. If alpha is 0, hooks do nothing; a schedule that is 0 throughout records no anchors, and
    the class is the one that it extends.

    Args:
        model, args, train_dataset, ...: as for the trainer that is extended; ``args`` has :class:`ProConArguments`
            among its classes, and the collator must give ``input_ids`` and ``labels`` with -100 on the prompt.
        directions: refusal directions of the model as training starts, or directions of other concepts, or the file
            that they were saved in. If not given, refusal directions are extracted with the built-in prompts when
            training starts, which needs a tokenizer as ``processing_class``, and kept in the output folder.
        chat: how the model is asked as directions, block weights and probes are found: system prompt and variables of
            its chat template. A resumed run must ask in the same way.

    With ``procon_block_weights="causal"`` the blocks' weights are found when training starts, too, with the tokenizer.

    Logs ``procon/penalty`` (mean over the logging window, before alpha) and ``procon/alpha``; under the schedule
    ``hold``, also ``procon/shift``, the moving average that it keeps to its budget.

    What the constraint did is measured: at each step the penalty's gradient must go through backward, and at the first
    one it must reach a parameter that the optimiser trains. A training that ends without such a step ends in an error.

    Attributes:
        evidence: what the constraint has done so far.
        hold: what sets alpha; None if the schedule does.

    Raises:
        ProConError: if directions are missing or do not fit, or the set-up would lose the constraint.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(ProConMixin):
            raise ProConError(
                f"class {cls.__name__} has transformers' Trainer before ProConMixin, so none of its training would be "
                "constrained: name ProConMixin first, as in class Mine(ProConMixin, MyTrainer)"
            )

    def __init__(
        self,
        *trainer_args: Any,
        directions: BlockDirections | str | Path | None = None,
        chat: ChatSettings | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        self.chat = chat or ChatSettings()
        super().__init__(*trainer_args, **trainer_kwargs)
        args = self.args
        if not isinstance(args, ProConArguments):
            raise ProConError(
                f"args is a {type(args).__name__}: pass one that has ProConArguments, such as ProConConfig"
            )
        if self.model_init is not None:
            raise ProConError("anchors belong to one model: pass model, not model_init")
        args.constraint_settings()  # once more, as they may have been set since args was made
        args.anchor_settings()
        self.alpha_schedule = args.schedule()
        self.evidence = Evidence()
        self.hold = None if self.alpha_schedule.hold is None else Hold(self.alpha_schedule, self.args.device)
        self.constraint: ProjectionConstraint | None = None
        self._anchors = self._live = self._probes = None
        self._probed = False
        self._steps_per_epoch = 1
        self._resumed: Checkpoint | None = None
        self._constrained_tokens: Tensor | None = None
        self._penalty_sum = torch.zeros((), device=args.device)
        self._penalty_steps = 0
        if not self.alpha_schedule.active:
            return
        self.add_callback(Watch(self))
        refuse_data_parallel(args.n_gpu)
        refuse_noise(args.neftune_noise_alpha)
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ProConError("FSDP 1 flattens the parameters that identify anchors: set version 2 in fsdp_config")
        if self.get_sp_size() > 1:
            raise ProConError(
                "DeepSpeed's sequence parallelism has ranks average the model's own loss, which leaves the penalty "
                "out: use context parallelism (cp_size)"
            )
        if directions is not None:
            self._make_constraint(
                directions if isinstance(directions, BlockDirections) else load_directions(directions)
            )
        elif getattr(self._chat_tokenizer, "chat_template", None) is None:
            raise ProConError(
                "no refusal directions given, and processing_class has no chat template to extract them with: extract "
                "them with RefusalDirections.extract(model, tokenizer)"
            )
        self._check_sources()

    def train(
        self, resume_from_checkpoint: str | Path | bool | Checkpoint | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train; records anchors first, in the state that training starts from, unless they are there already.

        Raises:
            ProConError: if the schedule puts no step of this training under the constraint, the penalty does not reach
                what trains, or the training ended before the constraint began; and what :class:`ResumableMixin` raises.
        """
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.constraint is not None:
            self.evidence.window = self._check_penalty()
            check_batches(self.state.global_step > 0, self.train_dataset)
            self.evidence.check_acted(self.state.global_step, self.alpha_schedule)
            if self.hold is not None:
                self.hold.warn()
        return output

    def _constraining(self, checkpoint: Checkpoint | None) -> AbstractContextManager[Any]:
        self._resumed = checkpoint
        if not self.alpha_schedule.active:
            return super()._constraining(checkpoint)
        if self.args.use_liger_kernel:  # train() does so later, and would take the norms from the constraint
            apply_liger_kernel(self.model, self.args.liger_kernel_config)
        constraint = self.constraint
        if constraint is None:
            constraint = self._make_constraint(
                load_directions(checkpoint.path / DIRECTIONS) if checkpoint else self._extract()
            )
        self._anchors = self._live = self._probes = None
        if checkpoint:
            self._reopen_anchors(constraint, checkpoint)
        self._weigh_blocks(constraint, checkpoint)
        return constraint.attach(self.model, fuse=self.args.procon_fuse)

    def _run_facts(self) -> dict[str, Any]:
        settings = self.args.anchor_settings()
        file = settings.probes if self.alpha_schedule.active and settings.has_probes else None
        prompts = file and on_main(lambda: prompts_hash(load_instructions(file)))
        return {**super()._run_facts(), "probe_prompts": prompts}

    def begin_evidence(self) -> None:
        """Count from what the checkpoint has counted, or from nothing."""
        record = self._resumed.record if self._resumed else {}
        self.evidence.restore(record.get("did"))
        if self.hold is not None:
            self.hold.restore(record.get("hold"))
        window = record.get("window", {})
        # Divided by that number as it is summed up.
        own = float(window.get("penalty", 0.0)) * self.get_tp_size() if self.args.process_index == 0 else 0.0
        self._penalty_sum.fill_(own)
        self._penalty_steps = int(window.get("steps", 0))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._probed = False
        if self.constraint is not None and self.has_alpha:
            if self.args.anchor_settings().of_tokens:
                self._constrained_tokens = self._count_constrained(batches)
            self._answer()
            self._penalty_steps += self.constrains_this_step
        return batches, num_items_in_batch

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
            self.evidence.check_backward()
            return loss
        finally:
            if self.constraint is not None:
                self.constraint.release()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        anchors, mask = (inputs.pop(name, None) for name in TARGET)
        constraint = self.constraint
        constrains = constraint is not None and model.training and self.has_alpha
        if constraint is not None:
            constraint.enabled = constrains
        if constraint is None or not constrains:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        self._set_target(constraint, inputs, anchors, mask)
        # Outputs only if they are asked for: some trainers run a second forward to make them.
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        loss, outputs = found if isinstance(found, tuple) else (found, None)
        # This micro-batch's share of the mean over the optimiser step; shares of all micro-batches add up to it.
        shares = self._shares(constraint)
        if not shares:
            return (loss, outputs) if return_outputs else loss
        share = torch.stack([share.to(loss.device) for share in shares]).sum()
        self._penalty_sum += share.detach()
        self.evidence.watch(share, None if self.evidence.is_measured else self._gradient_of(self.alpha))
        loss = loss + self._strength(loss.device) * loss_scale(self, num_items_in_batch) * share
        return (loss, outputs) if return_outputs else loss

    @property
    def constrains_this_step(self) -> bool:
        """Whether this optimiser step has a penalty if alpha is above 0: probes alone are not run in every one."""
        return self.args.anchor_settings().of_tokens is not None or self._runs_probes

    @property
    def _runs_probes(self) -> bool:
        """Whether this optimiser step has the probes' penalty: the last of each so many.

        At the first step the model is at its start, and that penalty's gradient is rounding noise. Adam would make
        whole steps of it in what probes alone reach, such as embeddings of tokens that are not in the batch.
        """
        settings = self.args.anchor_settings()
        return settings.has_probes and (self.state.global_step + 1) % settings.probe_every == 0

    def _set_target(
        self, constraint: ProjectionConstraint, inputs: dict[str, Any], anchors: Tensor | None, mask: Tensor | None
    ) -> None:
        """Constrain the coming forward on ``inputs``, if training tokens have anchors."""
        source = self.args.anchor_settings().of_tokens
        if source is None:
            constraint.rest()
            return
        if source == "live" and anchors is None and self._live is not None:
            anchors = self._project_live(self._live, inputs)
        if anchors is None or mask is None:
            raise ProConError(NO_ANCHORS)
        constraint.set_target(anchors, mask)

    def _project_live(self, live: LiveAnchors, inputs: dict[str, Any]) -> Tensor:
        """The anchors of a batch, from a forward of the starting model."""
        return live(inputs)

    def _share_of_tokens(self, constraint: ProjectionConstraint) -> Tensor:
        """This micro-batch's share of the mean over the optimiser step's constrained tokens."""
        return constraint.penalty(self._constrained_tokens)

    def _shift_of_tokens(self, constraint: ProjectionConstraint) -> Tensor:
        """The same of how far the tokens are from their anchors."""
        return constraint.shift(self._constrained_tokens)

    @property
    def _ranks_apart(self) -> int:
        """How many ranks, or groups of them, have a batch of their own."""
        return self.args.world_size // self.get_tp_size()

    def _shares(self, constraint: ProjectionConstraint) -> list[Tensor]:
        """Of the penalties that this micro-batch has a share of: that of its tokens, and the probes'."""
        settings = self.args.anchor_settings()
        shares = [self._share_of_tokens(constraint)] if settings.of_tokens else []
        if self.hold is not None and settings.measured == "tokens":
            self.hold.measure(self._shift_of_tokens(constraint))
        if self._runs_probes and not self._probed:
            if self._probes is None:
                raise ProConError(NO_ANCHORS)
            self._probed = True  # once in an optimiser step
            run = self.state.global_step // settings.probe_every
            probes = self._probes.turn(run, settings.probe_batch)
            batch = probes.batch(self.args.device)
            found = probe_departure(constraint, batch, hold=settings.probe_hold)
            # Ranks that have the same probes have a part each.
            if self.hold is not None and found.projections is not None:
                self.hold.measure(found.projections / self._ranks_apart)
            # Where a reply begins counts no less if the rest of it is kept too.
            weight = self._probe_weight * len(probes.states) / len(probes)
            shares.append(weight / self._ranks_apart * found.penalty)
        return shares

    def _gradient_of(self, alpha: float) -> float | None:
        """What the gradient of a micro-batch's share of the penalty is; None if an engine scales the loss."""
        if self.is_deepspeed_enabled:
            return None
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        return alpha * scale * (self.accelerator.num_processes // self.get_tp_size())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.constraint is not None and "loss" in logs:
            logs["procon/alpha"] = self._alpha_of_last_step()
            if self._penalty_steps:
                total = self._check_penalty()
                if self.hold is not None:
                    logs["procon/shift"] = self.hold.average.item()
                logs["procon/penalty"] = total / self._penalty_steps
                self.evidence.penalty += total
                self.evidence.window = 0.0
                self._penalty_sum.zero_()
                self._penalty_steps = 0
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.constraint is not None:
            self.evidence.window = self._check_penalty()
        if self.args.push_to_hub:
            # Of a checkpoint, the Trainer copies to the folder that it uploads only files that it knows.
            self._describe(output_folder(self.args))
        super()._save_checkpoint(model, trial)

    def _describe(self, folder: Path) -> None:
        """Write beside the model how it was constrained, and how much."""
        if self.constraint is None or not self._has_anchors:
            super()._describe(folder)
        elif self.args.should_save:
            record = self._record()
            self._directions.save(folder / DIRECTIONS)
            if self._probes is not None:
                self._probes.save(folder / PROBES)
            write_section(folder / "README.md", describe(record, self._directions, self.state.log_history))
            write_record(folder, record)

    def _record(self) -> dict[str, Any]:
        args, record = self.args, super()._record()
        if not self.alpha_schedule.active:
            return record
        did = self.best_did or self.evidence.did(self.state.global_step)
        if self.hold is not None:
            did.setdefault("hold", self.hold.did())
            record["hold"] = self.hold.state()
        record |= {
            "constrained": did["constrained_steps"] > 0,
            "schedule": str(self.alpha_schedule),
            "scope": args.procon_scope,
            "penalty": args.procon_penalty,
            "sides": args.procon_sides,
            "units": args.procon_units,
            "block_weights": args.procon_block_weights,
            "reduction": args.procon_reduction,
            "anchors_from": args.procon_anchors,
            "probing": self._probing(),
            "did": did,
            "window": {"penalty": self.evidence.window, "steps": self._penalty_steps},
        }
        if self.constraint is not None:
            record |= {
                "blocks": list(self.constraint.blocks),
                "weights": as_json(self.constraint.weights),
                "directions": self._directions.hash,
                "concepts": list(self._directions.concepts),
                "anchors": self._anchors.fingerprint if self._anchors else None,
                "starting_model": self._live.start if self._live else None,
                "steps_per_epoch": self._steps_per_epoch,
            }
        return record

    def _probing(self) -> dict[str, Any] | None:
        """What a resumed run shares of the probes; None without any."""
        settings = self.args.anchor_settings()
        if not settings.has_probes:
            return None
        return {
            "count": settings.probe_count,
            "batch": settings.probe_batch,
            "every": settings.probe_every,
            "weight": settings.probe_weight,
            "hold": settings.probe_hold,
            "reply_tokens": settings.probe_reply_tokens,
        }

    def _count_constrained(self, batches: list[dict[str, Any]]) -> Tensor | None:
        """Constrained tokens of the optimiser step: all its micro-batches and ranks."""
        reduce = self._sum_over_ranks if self.args.world_size > 1 or self.hold is not None else None
        count = constrained_tokens(batches, reduce, device=self.args.device)
        # As the Trainer does for CE: ranks that share a batch have each counted it.
        return count / (self.get_tp_size() * self.get_cp_size())

    def _check_penalty(self) -> float:
        """The penalty summed over the logging window and the ranks; stops a run whose hidden states went bad."""
        # Each rank of tensor parallelism has the penalty of the whole batch.
        total = self._sum_over_ranks(self._penalty_sum / self.get_tp_size()).item()
        check_finite(total, self.state.global_step)
        return total
