"""Refusal directions: extract, save, load, compare."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from procon.chat import pad_token_id, render, template_hash, user_turn
from procon.decoder import (
    Decoder,
    decoder_forward,
    evaluating,
    find_decoder,
    model_device,
    observe_block_inputs,
    refuse_unprepared,
)
from procon.errors import ProConError
from procon.generation import generate_replies
from procon.prompts import ContrastPrompts, builtin_prompts
from procon.refusal import refusal_rate
from procon.version import __version__

#: The file's name where it stands beside a model or an adapter.
DIRECTIONS = "refusal-directions.safetensors"

#: A mean difference this small beside the hidden states themselves is rounding, not a direction: the first block's
#: input at the last prompt token is one and the same embedding for every prompt.
DEAD_GAP = 1e-5

REFUSAL_CHECK_PROMPTS = 32

_TENSORS = ("directions", "gap", "auroc", "malicious", "benign")


@dataclass(frozen=True)
class RefusalDirections:
    """One unit direction a block, at the block's input (paper section III-A).

    Attributes:
        directions: ``[L, D]`` fp32, unit rows; a zero row where the prompts do not differ (see :attr:`usable`).
        gap: ``[L]`` fp32, distance between the malicious and the benign mean, in units of the hidden states.
        auroc: ``[L]`` fp32, how well the projection tells held-out malicious from benign prompts (0.5 is chance).
        malicious, benign: ``[L]`` fp32, projections of the two means, from which drift is told.
        provenance: model id and revision, chat template and prompt-set hashes, counts, versions, refusal rate.
    """

    directions: Tensor
    gap: Tensor
    auroc: Tensor
    malicious: Tensor
    benign: Tensor
    provenance: dict = field(default_factory=dict)

    @property
    def usable(self) -> Tensor:
        """``[L]`` bool: blocks that have a direction."""
        return self.gap > 0

    @property
    def hash(self) -> str:
        """A short hash of the directions and their gaps."""
        data = self.directions.numpy().tobytes() + self.gap.numpy().tobytes()
        return hashlib.sha256(data).hexdigest()[:16]

    def cosine(self, other: RefusalDirections) -> Tensor:
        """Signed cosine to ``other`` (section III-B): ``[L]`` fp32, NaN where either has no direction."""
        if self.directions.shape != other.directions.shape:
            raise ProConError(
                f"directions of shape {tuple(self.directions.shape)} and {tuple(other.directions.shape)} cannot be "
                "compared: extract both from the same architecture"
            )
        cosine = (self.directions.double() * other.directions.double()).sum(-1).float()
        return torch.where(self.usable & other.usable, cosine, torch.nan)

    def randomized(self, seed: int) -> RefusalDirections:
        """The control: random unit directions at the same blocks, with the same gaps."""
        generator = torch.Generator().manual_seed(seed)
        unit = torch.nn.functional.normalize(torch.randn(self.directions.shape, generator=generator), dim=-1)
        return replace(self, directions=unit * self.usable[:, None], provenance={"random_seed": seed})

    def check_fits(self, decoder: Decoder) -> None:
        """Raise ProConError unless there is one direction of width ``D`` for each block of ``decoder``."""
        blocks, width = self.directions.shape
        if (blocks, width) != (len(decoder.blocks), decoder.hidden_size):
            raise ProConError(
                f"directions are for {blocks} blocks of width {width}, but the model has {len(decoder.blocks)} blocks "
                f"of width {decoder.hidden_size}: extract directions from this model with 'procon directions'"
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with the provenance in its header; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Copies, as safetensors refuses tensors that share memory.
        tensors = {name: getattr(self, name).clone(memory_format=torch.contiguous_format) for name in _TENSORS}
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, {"procon": json.dumps(self.provenance)})
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> RefusalDirections:
        """Read what :meth:`save` wrote; of a folder, the file that training leaves beside a model.

        Raises:
            ProConError: if the file is missing, truncated, or holds something else.
        """
        path = Path(path)
        path = path / DIRECTIONS if path.is_dir() else path
        if not path.is_file():
            raise ProConError(f"directions file {str(path)!r} does not exist: make it with 'procon directions'")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name).float() for name in _TENSORS}
                provenance = json.loads((file.metadata() or {}).get("procon", "{}"))
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ProConError(
                f"directions file {str(path)!r} is damaged or not one of ProCon's ({error}): extract it again"
            ) from error
        shape = tuple(tensors["directions"].shape)
        if len(shape) != 2 or any(tensors[name].shape != shape[:1] for name in _TENSORS[1:]):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ProConError(f"directions file {str(path)!r} holds {shapes}, not [L, D] and [L]: extract it again")
        # An AUROC that was not measured is NaN.
        if not all(torch.isfinite(tensors[name]).all() for name in _TENSORS if name != "auroc"):
            raise ProConError(f"directions file {str(path)!r} holds NaN or infinite values: extract it again")
        return cls(**tensors, provenance=provenance)

    @classmethod
    def extract(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: ContrastPrompts | None = None,
        *,
        held_out: ContrastPrompts | None = None,
        batch_size: int = 32,
        check_refusal: bool = True,
        progress: bool = True,
    ) -> RefusalDirections:
        """Difference in means at the last prompt token, block by block, scaled to unit length (section III-A).

        Args:
            model: a chat model; used in eval mode, without gradients, through its base decoder only.
            tokenizer: its tokenizer, with a chat template.
            prompts: contrast prompts to extract from; the built-in ones if not given.
            held_out: prompts to measure :attr:`auroc` on; the built-in held-out ones if not given.
            check_refusal: generate replies to some malicious prompts first, and warn where none is refused.

        Memory: one block's input at a time, plus ``2 * L * D`` fp64 sums.

        Raises:
            ProConError: on hidden states that are not finite, a tokenizer without chat template, no usable block, or a
                model that DeepSpeed ZeRO-3 has partitioned and not prepared.
        """
        refuse_unprepared(model)
        prompts = prompts or builtin_prompts("extraction")
        held_out = held_out or builtin_prompts("held_out")
        rate = None
        if check_refusal:
            rate = measure_refusal(model, tokenizer, prompts.malicious, batch_size=batch_size, progress=progress)
        means = ContrastMeans.measure(model, tokenizer, prompts, batch_size=batch_size, progress=progress)
        found = means.directions()
        z_malicious, z_benign = (
            project_last_token(model, tokenizer, found, side, batch_size=batch_size, progress=progress)
            for side in (held_out.malicious, held_out.benign)
        )
        provenance = {
            "model": getattr(model.config, "_name_or_path", ""),
            "revision": getattr(model.config, "_commit_hash", None),
            "dtype": str(model.dtype),
            "chat_template": template_hash(tokenizer),
            "prompts": prompts.hash,
            "held_out_prompts": held_out.hash,
            "counts": {"malicious": len(prompts.malicious), "benign": len(prompts.benign)},
            "position": "last prompt token",
            "refusal_rate": rate,
            "versions": {
                "procon": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        return replace(found, auroc=auroc(z_malicious, z_benign), provenance=provenance)


@dataclass(frozen=True)
class ContrastMeans:
    """Means over each side's prompts of the block inputs at the last prompt token, fp64 on the CPU.

    Attributes:
        malicious, benign: ``[L, D]``.
        scale: ``[L]``, the larger of the two sides' mean norms.
    """

    malicious: Tensor
    benign: Tensor
    scale: Tensor

    @classmethod
    def measure(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: ContrastPrompts,
        *,
        batch_size: int = 32,
        progress: bool = True,
    ) -> ContrastMeans:
        """Run the prompts through the base decoder of ``model``.

        Raises:
            ProConError: on hidden states that are not finite, or a tokenizer without chat template.
        """
        (malicious, malicious_norm), (benign, benign_norm) = (
            _mean_last_token(model, tokenizer, side, batch_size, description, progress)
            for side, description in ((prompts.malicious, "malicious prompts"), (prompts.benign, "benign prompts"))
        )
        return cls(malicious, benign, torch.maximum(malicious_norm, benign_norm))

    def directions(self) -> RefusalDirections:
        """Difference in means, scaled to unit length; without quality figures and provenance."""
        difference = self.malicious - self.benign
        gap = difference.norm(dim=-1)
        usable = gap > DEAD_GAP * self.scale
        if not usable.any():
            raise ProConError("malicious and benign prompts give the same hidden states: pass prompts that differ")
        unit = torch.where(usable[:, None], difference / gap[:, None], 0.0)
        return RefusalDirections(
            directions=unit.float(),
            gap=torch.where(usable, gap, 0.0).float(),
            auroc=torch.full_like(gap, torch.nan).float(),
            malicious=(unit * self.malicious).sum(-1).float(),
            benign=(unit * self.benign).sum(-1).float(),
        )


def measure_refusal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    malicious: Sequence[str],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> float:
    """Share of malicious prompts that the model refuses (on at most 32); warns where it refuses none."""
    sample = [user_turn(prompt) for prompt in malicious[:REFUSAL_CHECK_PROMPTS]]
    replies = generate_replies(
        model,
        tokenizer,
        sample,
        max_new_tokens=24,
        batch_size=batch_size,
        description="refusal check",
        progress=progress,
    )
    rate = refusal_rate(replies)
    if rate == 0:
        warnings.warn(
            f"the model refuses 0 of {len(sample)} malicious prompts (0%): its directions separate topics, not "
            "refusal, and there is nothing to preserve; start from a model that refuses",
            stacklevel=2,
        )
    return rate


def project_last_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directions: RefusalDirections,
    prompts: Sequence[str],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> Tensor:
    """Projection of each prompt's last token on each block's direction: ``[len(prompts), L]`` fp32."""
    blocks = len(directions.directions)
    z = torch.empty(len(prompts), blocks)
    unit = directions.directions.to(model_device(model))

    def consume(rows: list[int], block: int, hidden: Tensor) -> None:
        z[rows, block] = (hidden.float() @ unit[block].to(hidden.device)).cpu()

    each_last_token(model, tokenizer, prompts, consume, batch_size, "projections", progress)
    return z


def auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """Probability that a positive value exceeds a negative one, ties counting half: ``[n, L], [m, L] -> [L]`` fp32."""
    difference = positive[:, None] - negative[None]
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean((0, 1))


def _mean_last_token(model, tokenizer, prompts, batch_size, description, progress) -> tuple[Tensor, Tensor]:
    """Means ``[L, D]`` and mean norms ``[L]`` over prompts, fp64 on the CPU."""
    decoder = find_decoder(model)
    total = torch.zeros(len(decoder.blocks), decoder.hidden_size, dtype=torch.float64)
    norms = torch.zeros(len(decoder.blocks), dtype=torch.float64)

    def consume(_rows: list[int], block: int, hidden: Tensor) -> None:
        hidden = hidden.cpu().double()
        total[block] += hidden.sum(0)
        norms[block] += hidden.norm(dim=-1).sum()

    each_last_token(model, tokenizer, prompts, consume, batch_size, description, progress)
    if not torch.isfinite(total).all():
        block = int((~torch.isfinite(total)).any(-1).nonzero()[0])
        raise ProConError(
            f"hidden states entering block {block} are NaN or infinite: load the model in bfloat16 or float32"
        )
    return total / len(prompts), norms / len(prompts)


def each_last_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    consume: Callable[[list[int], int, Tensor], None],
    batch_size: int,
    description: str,
    progress: bool,
) -> None:
    """Call ``consume(rows, block, hidden [len(rows), D])`` for every batch of prompts and every block input."""
    decoder = find_decoder(model)
    forward = decoder_forward(model)
    ids = [render(tokenizer, user_turn(prompt), generation_prompt=True) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    device = model_device(model)
    with evaluating(model), tqdm(total=len(ids), desc=description, unit="prompt", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            lengths = torch.tensor([len(ids[i]) for i in rows])
            batch = torch.full((len(rows), int(lengths.max())), pad_token_id(tokenizer))
            for row, i in enumerate(rows):
                batch[row, : len(ids[i])] = torch.tensor(ids[i])
            mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long()
            last = (torch.arange(len(rows)), lengths - 1)
            with observe_block_inputs(decoder, lambda block, h: consume(rows, block, h[last])):  # noqa: B023
                forward(input_ids=batch.to(device), attention_mask=mask.to(device))
            bar.update(len(rows))
