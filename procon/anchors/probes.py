"""Probe anchors: a few fixed prompts at which a model is kept near its start: where a reply begins, and where it ends.

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

_TENSORS = ("input_ids", "places", "anchors", "states")

#: In a file of before probes could go on with replies: each was kept at its last token alone.
_AT_LAST_TOKENS = ("input_ids", "lengths", "anchors", "states")


@dataclass(frozen=True)
class Probes:
    """Prompts, and what the starting model makes of them where a reply begins and, if they go on with one, ends.

    Attributes:
        input_ids: ``[n, T]`` int64, padded on the right.
        places: ``[n, P]`` int64, the tokens at which the model is kept: each prompt's last; and, if P is 2, the last
            of the reply to it.
        anchors: ``[n, P, sites * K]`` fp32, projections there.
        states: ``[n, P, D]`` fp32, last hidden states there, after the final norm.
    """

    input_ids: Tensor
    places: Tensor
    anchors: Tensor
    states: Tensor

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.input_ids)

    @property
    def lengths(self) -> Tensor:
        """``[n]`` int64, tokens of each prompt and, if it goes on with one, the reply."""
        return self.places[:, -1] + 1

    @property
    def hash(self) -> str:
        """A short hash of the tokens and of what is kept at them."""
        return _hash([getattr(self, name) for name in _TENSORS])

    def turn(self, number: int, size: int) -> Probes:
        """The ``size`` prompts that the ``number``-th run takes, from 0: they go round. All, if there are no more."""
        if size >= len(self):
            return self
        rows = (number * size + torch.arange(size)) % len(self)
        width = int(self.lengths[rows].max())
        return Probes(self.input_ids[rows, :width], self.places[rows], self.anchors[rows], self.states[rows])

    def batch(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What :func:`procon.constraint.probe_penalty` takes, on ``device``: inputs, anchors, mask, places, states."""
        count, width = self.input_ids.shape
        rows = torch.arange(count)[:, None]
        anchors = torch.zeros(count, width, self.anchors.shape[2])
        anchors[rows, self.places] = self.anchors
        mask = torch.zeros(count, width)
        mask[rows, self.places] = 1.0
        batch = {
            "input_ids": self.input_ids,
            "attention_mask": (torch.arange(width) < self.lengths[:, None]).long(),
            "anchors": anchors,
            "constraint_mask": mask,
            "places": self.places,
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
                included, and the model is kept at its end too; 0 for prompts alone.
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
        rows = [render(tokenizer, user_turn(text), generation_prompt=True, chat=chat) for text in texts]
        places = torch.tensor([[len(row) - 1] for row in rows])
        if reply_tokens:
            replies = continue_tokens(
                model, tokenizer, rows, max_new_tokens=reply_tokens, description="probe replies", progress=progress
            )
            rows = [[*row, *reply] for row, reply in zip(rows, replies, strict=True)]
            places = torch.cat([places, torch.tensor([[len(row) - 1] for row in rows])], 1)
        lengths = places[:, -1] + 1
        ids = torch.full((len(rows), int(lengths.max())), pad_token_id(tokenizer))
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
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
                kept, seen = (torch.arange(len(part))[:, None], places[part]), []
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
        found = cls(ids, places, torch.cat(anchors), torch.cat(states))
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
                names = _AT_LAST_TOKENS if "lengths" in file.keys() else _TENSORS  # noqa: SIM118, not a mapping
                tensors = [file.get_tensor(name) for name in names]
                whole = (file.metadata() or {}).get("hash") == _hash(tensors)
        except (OSError, SafetensorError) as error:
            raise ProConError(
                f"probe anchors in {str(path)!r} cannot be read ({error}): resume from another checkpoint, or start "
                "afresh"
            ) from error
        if not whole:
            raise ProConError(
                f"probe anchors in {str(path)!r} are damaged: resume from another checkpoint, or start afresh"
            )
        if names is _AT_LAST_TOKENS:
            ids, lengths, anchors, states = tensors
            return cls(ids, lengths[:, None] - 1, anchors[:, None], states[:, None])
        return cls(*tensors)


def _hash(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _texts(prompts: Sequence[str] | str | Path | None, count: int | None) -> tuple[str, ...]:
    if prompts is None:
        return builtin_probes()[:count]
    texts = load_instructions(prompts) if isinstance(prompts, str | Path) else tuple(prompts)
    if not texts:
        raise ProConError("no probe prompts given: at least one is needed")
    return texts[:count]
