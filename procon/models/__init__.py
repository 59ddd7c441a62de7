"""What is known of transformers' models: where their blocks are, how they run, which weights they have and had.

In: a causal LM, bare or wrapped, or its name.
Out: its decoder, block inputs, its attention, the model as it was when training started; hashes of weights and
configuration, and the origin by which two models are compared.
May import: the leaves. It knows no directions and no anchors.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.models.batches import first_batch_size, in_batches
from procon.models.decoder import (
    Decoder,
    DecoderForward,
    active_adapters,
    adapter_layer,
    block_input,
    find_decoder,
    first_moving_block,
    is_sharded,
    learned_positions,
    model_device,
    observe_block_inputs,
    observe_last_state,
    refuse_unprepared,
    token_embedding,
    transformers_model,
    unwrapped,
    without_routers,
)
from procon.models.eval_mode import evaluating, keep_quantised
from procon.models.loading import best_attention, default_dtype, load_model, spread, use_best_attention
from procon.models.starting_model import StartingModel
from procon.models.weights import Relation, compare_origin, configuration_hash, origin_of, weights_hash

__all__ = [
    "Decoder",
    "DecoderForward",
    "Relation",
    "StartingModel",
    "active_adapters",
    "adapter_layer",
    "best_attention",
    "block_input",
    "compare_origin",
    "configuration_hash",
    "default_dtype",
    "evaluating",
    "find_decoder",
    "first_batch_size",
    "first_moving_block",
    "in_batches",
    "is_sharded",
    "keep_quantised",
    "learned_positions",
    "load_model",
    "model_device",
    "observe_block_inputs",
    "observe_last_state",
    "origin_of",
    "refuse_unprepared",
    "spread",
    "token_embedding",
    "transformers_model",
    "unwrapped",
    "use_best_attention",
    "weights_hash",
    "without_routers",
]
