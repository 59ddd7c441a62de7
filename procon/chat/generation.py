"""Batched greedy generation with a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from procon.chat.template import Message, pad_token_id, render
from procon.models import evaluating, model_device


def left_padded_batches(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Indices, token ids and attention mask ``[B, T]`` int64 of conversations that await a reply, the longest first.

    All end in the last column, where the reply begins.
    """
    prompts = [render(tokenizer, conversation, generation_prompt=True) for conversation in conversations]
    yield from _left_padded(prompts, pad_token_id(tokenizer), batch_size)


def _left_padded(prompts: Sequence[list[int]], pad: int, batch_size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = len(prompts[rows[0]])
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for row, i in enumerate(rows):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        yield rows, ids, mask


def generate_replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    description: str = "generating",
    progress: bool = True,
) -> list[str]:
    """The model's greedy reply to each conversation, in the order given.

    Prompts are batched by length, padded on the left; the model's mode and the tokenizer are left as they were.
    """
    batches = left_padded_batches(tokenizer, conversations, batch_size)
    return _continued(model, tokenizer, batches, len(conversations), max_new_tokens, description, progress)


def continue_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    description: str = "generating",
    progress: bool = True,
) -> list[str]:
    """How the model goes on from each text, greedily and without a chat template; else as :func:`generate_replies`."""
    batches = _left_padded([tokenizer(text)["input_ids"] for text in texts], pad_token_id(tokenizer), batch_size)
    return _continued(model, tokenizer, batches, len(texts), max_new_tokens, description, progress)


def _continued(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[tuple[list[int], Tensor, Tensor]],
    count: int,
    max_new_tokens: int,
    description: str,
    progress: bool,
) -> list[str]:
    pad = pad_token_id(tokenizer)
    eos = getattr(model.generation_config, "eos_token_id", None) or tokenizer.eos_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=eos)
    replies = [""] * count
    device = model_device(model)
    with evaluating(model), tqdm(total=len(replies), desc=description, unit="reply", disable=not progress) as bar:
        for rows, ids, mask in batches:
            inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            # To torch's stub, an attribute that nn.Module itself has not is a tensor or a module.
            output = model.generate(**inputs, generation_config=config)  # pyright: ignore[reportCallIssue]
            texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                replies[i] = text.strip()
            bar.update(len(rows))
    return replies
