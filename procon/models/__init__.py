"""What is known of transformers' models: where their blocks are, how they run, which weights they have and had.

In: a causal LM, bare or wrapped, or its name.
Out: its decoder, block inputs and last block's output, its attention, the model as it was when training started; hashes
of weights and configuration, and the origin by which two models are compared.
May import: the leaves. It knows no directions and no anchors.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.models.adapter_targets import adapter_targets
from procon.models.attention import best_attention, use_best_attention
from procon.models.batches import first_batch_size, in_batches
from procon.models.decoder import (
    Decoder,
    active_adapters,
    adapter_layer,
    block_input,
    block_output,
    decoder_forward,
    final_norms,
    find_decoder,
    first_moving_block,
    is_sharded,
    model_device,
    observe_block_inputs,
    observe_last_state,
    observe_sites,
    refuse_unprepared,
    site_name,
    token_embedding,
    transformers_model,
    unwrapped,
)
from procon.models.devices import default_device, spread
from procon.models.eval_mode import evaluating, keep_quantised
from procon.models.hub import check_model_name, check_name
from procon.models.loading import check_loading, default_dtype, load_model, parse_dtype
from procon.models.origin import compare_origin, origin_of
from procon.models.shared_prefix import SharedPrefix, same_states
from procon.models.starting_model import StartingModel, without_adapters
from procon.models.weights import configuration_hash, frozen_hash, weights_hash

__all__ = [
    "Decoder",
    "SharedPrefix",
    "StartingModel",
    "active_adapters",
    "adapter_layer",
    "adapter_targets",
    "best_attention",
    "block_input",
    "block_output",
    "check_loading",
    "check_model_name",
    "check_name",
    "compare_origin",
    "configuration_hash",
    "decoder_forward",
    "default_device",
    "default_dtype",
    "evaluating",
    "final_norms",
    "find_decoder",
    "first_batch_size",
    "first_moving_block",
    "frozen_hash",
    "in_batches",
    "is_sharded",
    "keep_quantised",
    "load_model",
    "model_device",
    "observe_block_inputs",
    "observe_last_state",
    "observe_sites",
    "origin_of",
    "parse_dtype",
    "refuse_unprepared",
    "same_states",
    "site_name",
    "spread",
    "token_embedding",
    "transformers_model",
    "unwrapped",
    "use_best_attention",
    "weights_hash",
    "without_adapters",
]
