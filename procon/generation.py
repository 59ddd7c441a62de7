"""Batched greedy generation with a progress bar."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from procon.chat import Message, pad_token_id, render
from procon.decoder import evaluating, model_device


def generate_replies(
    model: PreTrainedModel,
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
    prompts = [render(tokenizer, conversation, generation_prompt=True) for conversation in conversations]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    pad = pad_token_id(tokenizer)
    eos = getattr(model.generation_config, "eos_token_id", None) or tokenizer.eos_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=eos)
    replies = [""] * len(prompts)
    with evaluating(model), tqdm(total=len(prompts), desc=description, unit="reply", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = len(prompts[rows[0]])
            ids = torch.full((len(rows), width), pad)
            mask = torch.zeros((len(rows), width), dtype=torch.long)
            for row, i in enumerate(rows):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            device = model_device(model)
            output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                replies[i] = text.strip()
            bar.update(len(rows))
    return replies
