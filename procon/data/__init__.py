"""Training data: chat formats in, token ids and response labels out; safety mix and collators.

In: data files, hub names or datasets; a tokenizer.
Out: conversations, tokenised samples and the collators that batch them.
May import: ``chat`` and the leaves.
"""

from procon.data.columns import parse_columns
from procon.data.conversations import load_conversations, mix_safety, safety_conversations, to_conversations
from procon.data.tokens import flattening_collator, padding_collator, tokenize_conversations

__all__ = [
    "flattening_collator",
    "load_conversations",
    "mix_safety",
    "padding_collator",
    "parse_columns",
    "safety_conversations",
    "to_conversations",
    "tokenize_conversations",
]
