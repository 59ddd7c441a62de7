"""Training data: chat formats in, token ids and labels out; what is mixed in, and collators; published prompt sets.

In: data files, hub names or datasets; a tokenizer; names of prompt sets.
Out: conversations, tokenised samples and the collators that batch them; contrast prompts.
May import: ``chat`` and the leaves.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.data.conversations import load_conversations, mix_in, own_replies, safety_conversations, to_conversations
from procon.data.formats import parse_columns
from procon.data.prompt_sets import PROMPT_SETS, PromptSet, load_prompt_sets
from procon.data.tokens import flattening_collator, padding_collator, tokenize_conversations

__all__ = [
    "PROMPT_SETS",
    "PromptSet",
    "flattening_collator",
    "load_conversations",
    "load_prompt_sets",
    "mix_in",
    "own_replies",
    "padding_collator",
    "parse_columns",
    "safety_conversations",
    "to_conversations",
    "tokenize_conversations",
]
