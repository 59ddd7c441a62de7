"""The origin of something that was measured on a model: kept beside it, and compared with another model later.

The same weights in float32 and bfloat16 have one origin, so have a model and the same one with an adapter that does
nothing yet. Another model is recognised by a few values of the token embedding: they are unrelated. Those of the same
model (fine-tuned, quantised, with an adapter merged) have hardly moved.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from procon.models.decoder import token_embedding, transformers_model, unwrapped
from procon.models.weights import own_name, value_in

Relation = Literal["same", "other weights", "another model", "unknown"]

#: Values of the token embedding that are kept: rows, all among the first of any vocabulary, and columns.
_ROWS, _COLUMNS, _VOCABULARY = 32, 4, 4096

#: Cosine between the values of one model before and after whatever was done to it, at least. Those of two models
#: have one of 0, give or take a tenth.
_RELATED = 0.5


def origin_of(model: nn.Module) -> dict[str, Any]:
    """What to keep, ready for JSON; if parameters are sharded, all ranks must call."""
    model = unwrapped(model)
    base, adapters = hashlib.sha256(), hashlib.sha256()
    moved = False
    for name, tensor, is_adapter in _parameters(transformers_model(model)):
        values = tensor.reshape(-1)[:: max(1, tensor.numel() // 1024)]
        values = values.to(torch.bfloat16).view(torch.int16) if values.is_floating_point() else values
        part = f"{name}{tuple(tensor.shape)}".encode() + values.cpu().numpy().tobytes()
        (adapters if is_adapter else base).update(part)
        # LoRA starts with zeros in B, and then does nothing. Of other kinds it is not known what does nothing.
        moved |= is_adapter and ("lora_" not in name or ("lora_A" not in name and bool(tensor.any())))
    return {
        "architecture": transformers_model(model).config.get_text_config().model_type,
        "weights": base.hexdigest()[:16],
        "adapters": adapters.hexdigest()[:16] if moved else None,
        "embedding": _embedding_values(model),
    }


def compare_origin(kept: Any, model: nn.Module) -> Relation:
    """How ``model`` is related to the one of which :func:`origin_of` gave ``kept``; "unknown" for anything else."""
    try:
        embedding = torch.tensor(kept["embedding"], dtype=torch.float64)
        before = [kept[name] for name in ("architecture", "weights", "adapters")]
    except (TypeError, KeyError, ValueError, RuntimeError, OverflowError):
        return "unknown"
    now = origin_of(model)
    if before == [now[name] for name in ("architecture", "weights", "adapters")]:
        return "same"
    values = torch.tensor(now["embedding"], dtype=torch.float64)
    related = embedding.shape == values.shape and before[0] == now["architecture"]
    if related and len(values):
        related = float(torch.nn.functional.cosine_similarity(embedding, values, dim=0)) >= _RELATED
    return "other weights" if related else "another model"


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Name as in the model without adapters, whole value, and whether an adapter that is on brought it."""
    tuners = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, parameter in sorted(model.named_parameters()):
        prefix = next((start for start in tuners if name.startswith(start)), None)
        rest = name.removeprefix(prefix or "")
        is_adapter = (prefix is not None and not rest.startswith("base_layer.")) or ".modules_to_save." in name
        if is_adapter and prefix is not None and tuners[prefix].disable_adapters:
            continue
        plain = re.sub(r"\.(base_layer|original_module)(?=\.)", "", own_name(name))
        yield plain, value_in(model, name, parameter), is_adapter


def _embedding_values(model: nn.Module) -> list[float]:
    """A few values with three digits; none if they are not kept as such."""
    embedding = token_embedding(model)
    weight = value_in(embedding, "weight", embedding.weight)
    if not weight.is_floating_point() or weight.dim() != 2:
        return []
    rows = min(len(weight), _VOCABULARY)
    some = weight[:rows][:: max(1, rows // _ROWS), :: max(1, weight.shape[1] // _COLUMNS)][:_ROWS, :_COLUMNS]
    return [float(f"{value:.3g}") if math.isfinite(value) else 0.0 for value in some.flatten().tolist()]
