"""Probe anchors: a few fixed prompts at whose last token a model is kept near its start.

Nothing is recorded for the training data. Kept at a probe are the projections on the directions; or the whole last
hidden state, which is the method SBR (arXiv 2605.05995).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from procon.anchors.checked_blocks import checked_blocks
from procon.anchors.projections import project_sites
from procon.chat import builtin_probes, load_instructions, pad_token_id, render, user_turn
from procon.directions import BlockDirections
from procon.errors import ProConError
from procon.files import whole_file
from procon.models import decoder_forward, evaluating, find_decoder, model_device, observe_last_state, unwrapped
from procon.settings import DEFAULTS, AnchorSettings, Backend, ChatSettings, check_setting

#: The file's name where it stands beside a model or in a checkpoint.
PROBES = "probe-anchors.safetensors"

_TENSORS = ("input_ids", "lengths", "anchors", "states")


@dataclass(frozen=True)
class Probes:
    """Prompts, and what the starting model makes of their last tokens.

    Attributes:
        input_ids: ``[n, T]`` int64, padded on the right.
        lengths: ``[n]`` int64, tokens of each prompt.
        anchors: ``[n, sites * K]`` fp32, projections at the last token.
        states: ``[n, D]`` fp32, last hidden states there, after the final norm.
    """

    input_ids: Tensor
    lengths: Tensor
    anchors: Tensor
    states: Tensor

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.lengths)

    @property
    def hash(self) -> str:
        """A short hash of the tokens and of what is kept at them."""
        digest = hashlib.sha256()
        for name in _TENSORS:
            digest.update(getattr(self, name).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def turn(self, number: int, size: int) -> Probes:
        """The ``size`` prompts that the ``number``-th run takes, from 0: they go round. All, if there are no more."""
        if size >= len(self):
            return self
        rows = (number * size + torch.arange(size)) % len(self)
        lengths = self.lengths[rows]
        return Probes(self.input_ids[rows, : int(lengths.max())], lengths, self.anchors[rows], self.states[rows])

    def batch(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What :func:`procon.constraint.probe_penalty` takes: inputs, anchors, mask and states, on ``device``."""
        count, width = self.input_ids.shape
        rows, last = torch.arange(count), self.lengths - 1
        anchors = torch.zeros(count, width, self.anchors.shape[1])
        anchors[rows, last] = self.anchors
        mask = torch.zeros(count, width)
        mask[rows, last] = 1.0
        batch = {
            "input_ids": self.input_ids,
            "attention_mask": (torch.arange(width) < self.lengths[:, None]).long(),
            "anchors": anchors,
            "constraint_mask": mask,
            "states": self.states,
        }
        return {name: tensor.to(device) for name, tensor in batch.items()}

    @classmethod
    def record(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        directions: BlockDirections,
        prompts: Sequence[str] | str | Path | None = None,
        *,
        blocks: Sequence[int],
        count: int | None = None,
        batch: int = AnchorSettings.probe_batch,
        chat: ChatSettings | None = None,
        backend: Backend = DEFAULTS.backend,
    ) -> Probes:
        """Run the prompts through ``model`` as it now is. If parameters are sharded, all ranks must call.

        Args:
            prompts: texts, or a file of them; the built-in malicious ones if not given.
            blocks: those of the constraint, in its order.
            count: the first so many; all of them if not given.
            batch: prompts of one forward.
            chat: how the model is asked: system prompt and variables of its chat template.

        Raises:
            ProConError: for a wrong setting, a tokenizer without a chat template, no prompts, or directions of another
                model.
        """
        check_setting("backend", backend)
        check_setting("probe_batch", batch, "batch")
        if count is not None:
            check_setting("probe_count", count, "count")
        texts = _texts(prompts, count)
        if getattr(tokenizer, "chat_template", None) is None:
            raise ProConError(
                "probes are prompts in the model's chat format, and its tokenizer has no chat template: pass the "
                "tokenizer of a chat model, or take recorded or live anchors"
            )
        rows = [render(tokenizer, user_turn(text), generation_prompt=True, chat=chat) for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), pad_token_id(tokenizer))
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        model = unwrapped(model)
        decoder = find_decoder(model)
        blocks = checked_blocks(model, directions, blocks)
        device = model_device(model)
        basis, forward = directions.basis.to(device), decoder_forward(model)
        anchors: list[Tensor] = []
        states: list[Tensor] = []
        with evaluating(model):
            for part in torch.arange(len(ids)).split(batch):
                width = int(lengths[part].max())
                mask = torch.arange(width) < lengths[part, None]
                inputs = {"input_ids": ids[part, :width].to(device), "attention_mask": mask.long().to(device)}
                last, seen = (torch.arange(len(part)), lengths[part] - 1), []
                with observe_last_state(decoder, seen.append):
                    _, projected = project_sites(
                        partial(forward, **inputs),
                        decoder,
                        basis,
                        blocks,
                        rows=len(part),
                        backend=backend,
                        device="cpu",
                    )
                anchors.append(projected[last])
                states.append(seen[0].cpu().float()[last])
        found = cls(ids, lengths, torch.cat(anchors), torch.cat(states))
        if not (torch.isfinite(found.anchors).all() and torch.isfinite(found.states).all()):
            raise ProConError(
                "hidden states at the probes are NaN or infinite: load the model in bfloat16 or float32, and check its "
                "weights"
            )
        return found

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with a checksum in its header; returns its path."""
        with whole_file(Path(path)) as partial:
            tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
            save_file(tensors, partial, metadata={"hash": self.hash})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Probes:
        """Read what :meth:`save` wrote; ProConError if it is missing or damaged."""
        path = Path(path)
        try:
            with safe_open(path, "pt") as file:
                found = cls(**{name: file.get_tensor(name) for name in _TENSORS})
                whole = (file.metadata() or {}).get("hash") == found.hash
        except (OSError, SafetensorError, TypeError) as error:
            raise ProConError(
                f"probe anchors in {str(path)!r} cannot be read ({error}): resume from another checkpoint, or start "
                "afresh"
            ) from error
        if not whole:
            raise ProConError(
                f"probe anchors in {str(path)!r} are damaged: resume from another checkpoint, or start afresh"
            )
        return found


def _texts(prompts: Sequence[str] | str | Path | None, count: int | None) -> tuple[str, ...]:
    if prompts is None:
        return builtin_probes()[:count]
    texts = load_instructions(prompts) if isinstance(prompts, str | Path) else tuple(prompts)
    if not texts:
        raise ProConError("no probe prompts given: at least one is needed")
    return texts[:count]
