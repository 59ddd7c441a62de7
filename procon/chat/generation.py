"""Batched greedy generation with a progress bar; thoughts are kept apart from replies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from procon.chat.reply_budget import SLACK, ReplyBudget
from procon.chat.template import Message, ids_of, pad_token_id, render, render_text
from procon.chat.thinking import KNOWN_MARKERS, Markers, Reply, opens_thought, split_thoughts, thinking_markers
from procon.models import evaluating, in_batches, model_device
from procon.settings import ChatSettings


def left_padded_batches(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    batch_size: int,
    chat: ChatSettings | None = None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Indices, token ids and attention mask ``[B, T]`` int64 of conversations that await a reply, the longest first.

    All end in the last column, where the reply begins.
    """
    prompts = [render(tokenizer, conversation, generation_prompt=True, chat=chat) for conversation in conversations]
    pad = pad_token_id(tokenizer)
    order = _longest_first(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, *_padded([prompts[i] for i in rows], pad)


def _longest_first(prompts: Sequence[Sequence[int]]) -> list[int]:
    return sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))


def _padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask of a batch that begins with its longest prompt."""
    width = len(prompts[0])
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    chat: ChatSettings | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    description: str = "generating",
    progress: bool = True,
) -> list[Reply]:
    """The model's greedy reply to each conversation, in the order given, with what it thought before.

    Prompts are batched by length, padded on the left; the model's mode and the tokenizer are left as they were. When
    memory runs out, fewer are run at a time.

    Args:
        chat: system prompt, template variables, markers of thoughts and their budget.
        max_new_tokens: length of a reply, counted from the end of the thought if the model thinks.
    """
    chat = chat or ChatSettings()
    markers = thinking_markers(tokenizer, chat)
    texts = [render_text(tokenizer, turns, generation_prompt=True, chat=chat) for turns in conversations]
    opened = [opens_thought(text, markers) for text in texts]

    def stopping(rows: list[int], width: int) -> StoppingCriteriaList | None:
        if not markers:
            return None
        thinking = [opened[i] for i in rows]
        return StoppingCriteriaList(
            [ReplyBudget(tokenizer, markers, thinking, width, max_new_tokens, chat.thinking_tokens)]
        )

    generated = continue_tokens(
        model,
        tokenizer,
        [ids_of(tokenizer, text) for text in texts],
        max_new_tokens=max_new_tokens + (chat.thinking_tokens + SLACK if markers else 0),
        batch_size=batch_size,
        description=description,
        progress=progress,
        stopping=stopping,
    )
    return [_reply(tokenizer, ids, markers, begun) for ids, begun in zip(generated, opened, strict=True)]


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
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    generated = continue_tokens(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
        progress=progress,
    )
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in generated]


def continue_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    description: str = "generating",
    progress: bool = True,
    stopping: Callable[[list[int], int], StoppingCriteriaList | None] = lambda rows, width: None,
) -> list[list[int]]:
    """How the model goes on from the token ids of each prompt, greedily: token ids without what ends them.

    Args:
        stopping: of the prompts of a batch, by their indices, and its width: when it ends early.
    """
    pad = pad_token_id(tokenizer)
    eos = getattr(model.generation_config, "eos_token_id", None) or tokenizer.eos_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=eos)
    found: list[list[int]] = [[]] * len(prompts)
    device = model_device(model)

    def run(rows: Sequence[int]) -> None:
        ids, mask = _padded([prompts[i] for i in rows], pad)
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if criteria := stopping(list(rows), ids.shape[1]):
            inputs["stopping_criteria"] = criteria
        # To torch's stub, an attribute that nn.Module itself has not is a tensor or a module.
        output = model.generate(**inputs, generation_config=config)  # pyright: ignore[reportCallIssue]
        for i, generated in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
            found[i] = _up_to_end(generated, eos)
        bar.update(len(rows))

    with evaluating(model), tqdm(total=len(prompts), desc=description, unit="reply", disable=not progress) as bar:
        in_batches(_longest_first(prompts), batch_size, run)
    return found


def generate_replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    **settings: Any,
) -> list[str]:
    """The texts alone of what :func:`generate` returns; nothing for a reply whose thought did not end."""
    return [reply.text for reply in generate(model, tokenizer, conversations, **settings)]


def _up_to_end(ids: list[int], eos: Any) -> list[int]:
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]


def _reply(tokenizer: PreTrainedTokenizerBase, ids: list[int], markers: Sequence[Markers], opened: bool) -> Reply:
    """Special tokens are dropped after the thoughts are, as they may be what marks these."""
    text = str(tokenizer.decode(ids))
    # Known markers that neither template nor vocabulary has were learned as ordinary text.
    found = split_thoughts(text, markers or KNOWN_MARKERS, opened=opened)
    if found == Reply(text.strip()):
        return Reply(str(tokenizer.decode(ids, skip_special_tokens=True)).strip())
    return Reply(_without(tokenizer, found.text), _without(tokenizer, found.thought), found.finished)


def _without(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """``text`` without the tokenizer's special tokens."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(str(token), "")
    return text.strip()
