"""What is kept of the model that directions came from."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from procon.chat import describe_chat, template_hash
from procon.models import origin_of, transformers_model
from procon.settings import ChatSettings
from procon.version import __version__


def provenance_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, chat: ChatSettings | None = None
) -> dict[str, Any]:
    """Model, revision, origin and dtype, chat template and how it is rendered, versions; for JSON."""
    described = transformers_model(model)
    return {
        "model": getattr(described.config, "_name_or_path", ""),
        "revision": getattr(described.config, "_commit_hash", None),
        "origin": origin_of(model),
        "dtype": str(described.dtype),
        "chat_template": None if tokenizer is None else template_hash(tokenizer),
        "chat": None if tokenizer is None else describe_chat(tokenizer, chat),
        "versions": {
            "procon": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
