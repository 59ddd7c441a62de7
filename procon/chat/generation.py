"""Batched greedy generation with a progress bar; thoughts are kept apart from replies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from procon.chat.template import Message, ids_of, pad_token_id, render_text
from procon.chat.thinking import KNOWN_MARKERS, Markers, Reply, opens_thought, split_thoughts, thinking_markers
from procon.errors import ProConError
from procon.models import (
    evaluating,
    in_batches,
    learned_positions,
    model_device,
    transformers_model,
    without_routers,
)
from procon.settings import ChatSettings

#: Tokens that are decoded to look for a marker, more than any has; and how many a marker may take beyond the budgets.
_SLACK = 32


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    chat: ChatSettings | None = None,
    max_new_tokens: int = 48,
    **settings: Any,
) -> list[Reply]:
    """The model's greedy reply to each conversation, in the order given, with what it thought before.

    Args:
        chat: system prompt, template variables, markers of thoughts and their budget.
        max_new_tokens: length of a reply, counted from the end of the thought if the model thinks.
        settings: ``batch_size``, ``description`` and ``progress``, as :func:`continue_tokens` takes them.
    """
    chat = chat or ChatSettings()
    markers = thinking_markers(tokenizer, chat)
    texts = [render_text(tokenizer, turns, chat, add_generation_prompt=True) for turns in conversations]
    opened = [opens_thought(text, markers) for text in texts]
    longest = max_new_tokens
    if markers:
        longest += chat.thinking_tokens + _SLACK
        most = {True: chat.thinking_tokens, False: max_new_tokens}
        settings["stopping"] = lambda rows, width: reply_budget(
            tokenizer, markers, [opened[i] for i in rows], width, most
        )
    prompts = [ids_of(tokenizer, text) for text in texts]
    generated = continue_tokens(model, tokenizer, prompts, max_new_tokens=longest, **settings)
    return [
        _reply(tokenizer, ids, markers, begun)._replace(ended=len(ids) < max_new_tokens)
        for ids, begun in zip(generated, opened, strict=True)
    ]


def generate_replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    **settings: Any,
) -> list[str]:
    """The texts alone of what :func:`generate` returns; nothing for a reply whose thought did not end."""
    return [reply.text for reply in generate(model, tokenizer, conversations, **settings)]


def continue_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    description: str = "generating",
    progress: bool = True,
    stopping: Callable[[Sequence[int], int], Callable[..., Tensor]] | None = None,
) -> list[list[int]]:
    """How the model goes on from the token ids of each prompt, greedily: token ids without what ends them.

    Prompts are batched by length, padded on the left; the model's mode and the tokenizer are left as they were. When
    memory runs out, half as many are run at a time.

    Args:
        stopping: when a batch ends early, from the indices of its prompts and its width.

    Raises:
        ProConError: for a prompt that leaves no position for a reply, in a model that has learned so many.
    """
    pad = pad_token_id(tokenizer)
    if (positions := learned_positions(model)) is not None:
        longest = max(map(len, prompts), default=0)
        max_new_tokens = min(max_new_tokens, positions - longest)
        if max_new_tokens < 1:
            raise ProConError(
                f"a prompt has {longest} tokens in the model's chat format, and the model takes {positions} positions, "
                "prompt and reply together: give shorter prompts"
            )
    ends = _ends(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, pad_token_id=pad, eos_token_id=[*ends] or None
    )
    found: list[list[int]] = [[]] * len(prompts)
    device, quiet = model_device(model), without_routers(model)

    def run(rows: Sequence[int]) -> None:
        tokens = [torch.tensor(prompts[i], dtype=torch.long) for i in rows]
        ids = pad_sequence(tokens, batch_first=True, padding_value=pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True, padding_side="left")
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), **quiet}
        if stopping is not None:
            inputs["stopping_criteria"] = StoppingCriteriaList([stopping(rows, ids.shape[1])])
        # To torch's stub, an attribute that nn.Module itself has not is a tensor or a module.
        output = model.generate(**inputs, generation_config=config)  # pyright: ignore[reportCallIssue]
        for i, generated in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
            found[i] = generated[: next((at for at, token in enumerate(generated) if token in ends), None)]
        bar.update(len(rows))

    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    bar = tqdm(total=len(prompts), desc=description, unit="reply", disable=not progress)
    with evaluating(model), _with_settings(model, config), bar:
        in_batches(longest_first, batch_size, run)
    return found


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    """What ends a reply: a fine-tuned model's own settings may lack what its chat template ends a turn with."""
    own: int | Sequence[int] | None = getattr(model.generation_config, "eos_token_id", None)
    return {*([own] if isinstance(own, int) else own or ()), tokenizer.eos_token_id} - {None}


@contextmanager
def _with_settings(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """The model has ``config`` for its own settings of generation, of which ``generate`` takes what a call leaves open.

    Qwen2.5 has a penalty on repetitions, and what was trained with gradient checkpointing often no cache.
    """
    bare = transformers_model(model)
    own, bare.generation_config = bare.generation_config, config
    try:
        yield
    finally:
        bare.generation_config = own


def reply_budget(
    tokenizer: PreTrainedTokenizerBase,
    markers: Sequence[Markers],
    opened: Sequence[bool],
    width: int,
    most: dict[bool, int],
) -> Callable[..., Tensor]:
    """A stopping criterion that ends each sequence by itself: after so many tokens of thought, or so many of reply.

    Args:
        opened: for each sequence, whether its prompt ends within a thought.
        width: tokens of the padded prompts.
        most: how many tokens of thought (True) and of reply (False) a sequence may have.
    """
    thinks = list(opened)
    since = [0] * len(opened)  # tokens that each had when its thought or its reply began

    def is_spent(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        count = input_ids.shape[1] - width
        for row, latest in enumerate(input_ids[:, width:][:, -_SLACK:].tolist()):
            text = str(tokenizer.decode(latest[-(count - since[row]) :]))
            if any((each.end if thinks[row] else each.start or "\0") in text for each in markers):
                thinks[row], since[row] = not thinks[row], count
        spent = [count - begun >= most[thought] for begun, thought in zip(since, thinks, strict=True)]
        return torch.tensor(spent, device=input_ids.device)

    return is_spent


def _reply(tokenizer: PreTrainedTokenizerBase, ids: list[int], markers: Sequence[Markers], opened: bool) -> Reply:
    """Special tokens are dropped after the thoughts are, as they may be what marks these."""
    text = str(tokenizer.decode(ids))
    # Known markers that neither template nor vocabulary has were learned as ordinary text.
    found = split_thoughts(text, markers or KNOWN_MARKERS, opened=opened)
    if found == Reply(text.strip()):
        return Reply(str(tokenizer.decode(ids, skip_special_tokens=True)).strip())
    special = re.compile("|".join(map(re.escape, map(str, tokenizer.all_special_tokens))))
    return Reply(special.sub("", found.text).strip(), special.sub("", found.thought).strip(), found.finished)
