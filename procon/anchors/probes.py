"""Probe anchors: a few fixed prompts at which a model is kept near its start, where a reply begins or all along it.

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
from procon.chat import builtin_probes, continue_tokens, load_instructions, pad_token_id, render, user_turn
from procon.directions import BlockDirections
from procon.errors import ProConError
from procon.files import whole_file
from procon.models import decoder_forward, evaluating, find_decoder, model_device, observe_last_state, unwrapped
from procon.settings import DEFAULTS, AnchorSettings, Backend, ChatSettings, check_setting

#: The file's name where it stands beside a model or in a checkpoint.
PROBES = "probe-anchors.safetensors"

_TENSORS = ("input_ids", "prompts", "lengths", "anchors", "states")


@dataclass(frozen=True)
class Probes:
    """Prompts, with replies or without, and what the starting model makes of the tokens at which it is kept.

    These are the last one of each prompt and all of the reply: those from which a token of the reply, or its end, is
    predicted. There are N of them in all, prompt by prompt.

    Attributes:
        input_ids: ``[n, T]`` int64, padded on the right.
        prompts: ``[n]`` int64, tokens of each prompt.
        lengths: ``[n]`` int64, tokens of each prompt and its reply.
        anchors: ``[N, sites * K]`` fp32, projections at the kept tokens.
        states: ``[N, D]`` fp32, last hidden states there, after the final norm.
    """

    input_ids: Tensor
    prompts: Tensor
    lengths: Tensor
    anchors: Tensor
    states: Tensor

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.lengths)

    @property
    def kept(self) -> Tensor:
        """``[n, T]`` bool, the tokens at which the model is kept."""
        place = torch.arange(self.input_ids.shape[1])
        return (place >= self.prompts[:, None] - 1) & (place < self.lengths[:, None])

    @property
    def hash(self) -> str:
        """A short hash of the tokens and of what is kept at them: of names, types, shapes and values."""
        digest = hashlib.sha256()
        for name in _TENSORS:
            tensor = getattr(self, name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def turn(self, number: int, size: int) -> Probes:
        """The ``size`` prompts that the ``number``-th run takes, from 0: they go round. All, if there are no more."""
        if size >= len(self):
            return self
        rows = (number * size + torch.arange(size)) % len(self)
        prompts, lengths = self.prompts[rows], self.lengths[rows]
        counts = (self.lengths - self.prompts + 1).tolist()
        of_prompts = [kept.split(counts) for kept in (self.anchors, self.states)]
        anchors, states = (torch.cat([kept[row] for row in rows]) for kept in of_prompts)
        return Probes(self.input_ids[rows, : int(lengths.max())], prompts, lengths, anchors, states)

    def batch(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What :func:`procon.constraint.probe_penalty` takes: inputs, anchors, mask and states, on ``device``."""
        count, width = self.input_ids.shape
        anchors = torch.zeros(count, width, self.anchors.shape[1])
        anchors[self.kept] = self.anchors
        batch = {
            "input_ids": self.input_ids,
            "attention_mask": (torch.arange(width) < self.lengths[:, None]).long(),
            "anchors": anchors,
            "constraint_mask": self.kept.float(),
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
        reply_tokens: int = AnchorSettings.probe_reply_tokens,
        chat: ChatSettings | None = None,
        backend: Backend = DEFAULTS.backend,
        progress: bool = True,
    ) -> Probes:
        """Run the prompts through ``model`` as it now is. If parameters are sharded, all ranks must call.

        Args:
            prompts: texts, or a file of them; the built-in malicious ones if not given.
            blocks: those of the constraint, in its order.
            count: the first so many; all of them if not given.
            batch: prompts of one forward.
            reply_tokens: each prompt goes on with the model's own greedy reply, up to so many tokens of it, thoughts
                included, and the model is kept at each of them too; 0 for prompts alone.
            chat: how the model is asked: system prompt and variables of its chat template.
            progress: whether a bar shows how far replies are generated.

        Raises:
            ProConError: for a wrong setting, a tokenizer without a chat template, no prompts, or directions of another
                model.
        """
        check_setting("backend", backend)
        check_setting("probe_batch", batch, "batch")
        check_setting("probe_reply_tokens", reply_tokens, "reply_tokens")
        if count is not None:
            check_setting("probe_count", count, "count")
        texts = _texts(prompts, count)
        if getattr(tokenizer, "chat_template", None) is None:
            raise ProConError(
                "probes are prompts in the model's chat format, and its tokenizer has no chat template: pass the "
                "tokenizer of a chat model, or take recorded or live anchors"
            )
        model = unwrapped(model)
        decoder = find_decoder(model)
        blocks = checked_blocks(model, directions, blocks)
        rows = [render(tokenizer, user_turn(text), generation_prompt=True, chat=chat) for text in texts]
        prompt_lengths = torch.tensor([len(row) for row in rows])
        if reply_tokens:
            replies = continue_tokens(
                model, tokenizer, rows, max_new_tokens=reply_tokens, description="probe replies", progress=progress
            )
            rows = [[*row, *reply] for row, reply in zip(rows, replies, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), pad_token_id(tokenizer))
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        device = model_device(model)
        basis, forward = directions.basis.to(device), decoder_forward(model)
        anchors: list[Tensor] = []
        states: list[Tensor] = []
        with evaluating(model):
            for part in torch.arange(len(ids)).split(batch):
                width = int(lengths[part].max())
                mask = torch.arange(width) < lengths[part, None]
                inputs = {"input_ids": ids[part, :width].to(device), "attention_mask": mask.long().to(device)}
                kept, seen = mask & (torch.arange(width) >= prompt_lengths[part, None] - 1), []
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
                anchors.append(projected[kept])
                states.append(seen[0].cpu().float()[kept])
        found = cls(ids, prompt_lengths, lengths, torch.cat(anchors), torch.cat(states))
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
                found = cls(*map(file.get_tensor, _TENSORS))
                whole = found._fits() and (file.metadata() or {}).get("hash") == found.hash
        except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name that no file can have
            raise ProConError(
                f"probe anchors in {str(path)!r} cannot be read ({error}): resume from another checkpoint, or start "
                "afresh"
            ) from error
        if not whole:
            raise ProConError(
                f"probe anchors in {str(path)!r} are damaged: resume from another checkpoint, or start afresh"
            )
        return found

    def _fits(self) -> bool:
        """Whether the tensors have the types and the shapes that belong together."""
        of_prompts, of_tokens = (self.input_ids, self.prompts, self.lengths), (self.anchors, self.states)
        types = [tensor.dtype for tensor in (*of_prompts, *of_tokens)]
        if types != [torch.int64] * 3 + [torch.float32] * 2 or [tensor.ndim for tensor in of_prompts] != [2, 1, 1]:
            return False
        count, width = self.input_ids.shape
        if not count or any(tensor.shape != (count,) for tensor in of_prompts[1:]) or (self.input_ids < 0).any():
            return False
        if not ((self.prompts >= 1) & (self.prompts <= self.lengths) & (self.lengths <= width)).all():
            return False
        kept = int((self.lengths - self.prompts + 1).sum())
        return all(tensor.ndim == 2 and len(tensor) == kept for tensor in of_tokens)


def _texts(prompts: Sequence[str] | str | Path | None, count: int | None) -> tuple[str, ...]:
    if prompts is None:
        return builtin_probes()[:count]
    texts = load_instructions(prompts) if isinstance(prompts, str | Path) else tuple(prompts)
    if not texts:
        raise ProConError("no probe prompts given: at least one is needed")
    return texts[:count]
