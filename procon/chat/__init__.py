"""What a chat model is asked, what it answers, and whether that was a refusal.

In: instructions and conversations, a tokenizer, a model.
Out: token ids, response masks, replies and refusal rates.
May import: ``models`` and the leaves.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.chat.generation import continue_tokens, generate, generate_replies
from procon.chat.masks import marked_template, response_mask
from procon.chat.prompts import (
    ContrastPrompts,
    Split,
    builtin_drift_pairs,
    builtin_probe_pairs,
    builtin_prompts,
    builtin_refusals,
    json_rows,
    load_instructions,
)
from procon.chat.refusal import ENOUGH_REFUSAL, is_degenerate, is_refusal, measure_refusal, warn_of_low_refusal
from procon.chat.template import Message, describe_chat, pad_token_id, render, template_hash, user_turn
from procon.chat.thinking import Reply, split_thoughts

__all__ = [
    "ENOUGH_REFUSAL",
    "ContrastPrompts",
    "Message",
    "Reply",
    "Split",
    "builtin_drift_pairs",
    "builtin_probe_pairs",
    "builtin_prompts",
    "builtin_refusals",
    "continue_tokens",
    "describe_chat",
    "generate",
    "generate_replies",
    "is_degenerate",
    "is_refusal",
    "json_rows",
    "load_instructions",
    "marked_template",
    "measure_refusal",
    "pad_token_id",
    "render",
    "response_mask",
    "split_thoughts",
    "template_hash",
    "user_turn",
    "warn_of_low_refusal",
]
