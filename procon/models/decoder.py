"""The decoder inside a causal language model, found by structure and not by a list of model names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from procon.errors import ProConError
from procon.models.lm_head import Float32Head
from procon.models.noise import Noise


@dataclass(frozen=True)
class Decoder:
    """The residual stream of a causal LM.

    Attributes:
        module: the base decoder, whose forward ends before the LM head.
        blocks: its ``L`` decoder blocks, in order.
        hidden_size: ``D``, the width of the residual stream.
    """

    module: nn.Module
    blocks: nn.ModuleList
    hidden_size: int

    @property
    def attn_implementation(self) -> str | None:
        """What its attention runs on, by transformers' name."""
        return transformers_model(self.module).config._attn_implementation


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without what runs it on several devices; an adapter's wrapper stays."""
    return extract_model_from_parallel(model)  # pyright: ignore[reportReturnType]  # accelerate does not annotate it


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """``model`` as transformers made it, without the wrapper that an adapter brings."""
    # To torch's stub, an attribute that nn.Module itself has not is a tensor or a module.
    if hasattr(model, "get_base_model"):
        return model.get_base_model()  # pyright: ignore[reportCallIssue]
    return model  # pyright: ignore[reportReturnType]


def token_embedding(model: nn.Module) -> nn.Embedding:
    """Where tokens become hidden states; its weight is on the device that inputs go to."""
    return transformers_model(model).get_input_embeddings()  # pyright: ignore[reportReturnType]  # it has a weight


def find_decoder(model: nn.Module) -> Decoder:
    """Return the decoder of ``model``: the module that directly owns the token embedding and the block list.

    Works through PEFT, DDP, ``torch.compile`` and FSDP2, for Llama-, Mistral-, Qwen-, Gemma-, Phi-3-, GPT-2- and
    GPT-NeoX-style models, and for the language side of a vision-language model.

    Raises:
        ProConError: for encoder-decoders, prompt-learning adapters, and models without such a module.
    """
    model = unwrapped(model)
    adapter: Any = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ProConError(
            f"adapter type {adapter.peft_type.value} lengthens the sequence with virtual tokens, which have no "
            "anchors: use LoRA, DoRA, IA3 or full fine-tuning"
        )
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise ProConError(f"model is a {type(model).__name__}, not a transformers causal LM: pass a PreTrainedModel")
    if getattr(config, "is_encoder_decoder", False):
        raise ProConError(
            f"{type(model).__name__} is an encoder-decoder: the constraint is defined for decoder-only LMs"
        )
    text_config = config.get_text_config(decoder=True)
    embedding = token_embedding(model)
    for module in model.modules():
        children = list(module.children())
        for child in children if any(child is embedding for child in children) else ():
            if isinstance(child, nn.ModuleList) and len(child) == text_config.num_hidden_layers:
                return Decoder(module, child, text_config.hidden_size)
    raise ProConError(
        f"no decoder found in {type(model).__name__}: expected one module that owns the token embedding and a "
        f"ModuleList of {text_config.num_hidden_layers} blocks; please report the model class"
    )


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream ``[..., D]`` that a decoder block was called with."""
    return args[0] if args else kwargs["hidden_states"]


def first_moving_block(decoder: Decoder) -> int:
    """Index of the first block whose input training can move: something that feeds it has a gradient; ``L`` if none.

    A hidden state that requires a gradient does not say so: with checkpointing, PEFT asks for that of the embeddings'.
    What else the decoder holds counts as feeding the first block, except a norm of the last block's output.
    """
    width = (decoder.hidden_size,)
    children = list(decoder.module.children())
    place = children.index(decoder.blocks)
    after = [child for child in children[place + 1 :] if {p.shape for p in child.parameters()} != {width}]
    feeding = [*children[:place], *after]
    for index, part in enumerate([nn.ModuleList(feeding), *decoder.blocks]):
        for parameter in part.parameters():
            if parameter.requires_grad:
                return index
    return len(decoder.blocks)


def adapter_layer(decoder: Decoder) -> BaseTunerLayer | None:
    """One of the layers that have adapters: PEFT switches them all together. None if none has."""
    return next((module for module in decoder.module.modules() if isinstance(module, BaseTunerLayer)), None)


def active_adapters(layer: BaseTunerLayer | None) -> tuple[str, ...]:
    """Names of the adapters that are on."""
    return () if layer is None or layer.disable_adapters else tuple(layer.active_adapters)


@contextmanager
def observe_block_inputs(decoder: Decoder, observe: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within the context, call ``observe(block index, hidden_states)`` on the input of every block.

    Raises:
        ProConError: from the forward, if a block runs twice in it, or reads anything but one residual stream.
    """
    seen: set[int] = set()

    def pre_forward(index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = block_input(args, kwargs)
        if hidden.dim() != 3 or hidden.shape[-1] != decoder.hidden_size:
            raise ProConError(
                f"block {index} reads hidden states of shape {tuple(hidden.shape)}, not [batch, tokens, "
                f"{decoder.hidden_size}]: decoders with several residual streams are not supported"
            )
        if index in seen:
            raise ProConError(f"block {index} runs twice in one forward: looped decoders are not supported")
        seen.add(index)
        observe(index, hidden)

    with ExitStack() as hooks:
        hooks.enter_context(decoder.module.register_forward_pre_hook(lambda *_: seen.clear()))
        for index, block in enumerate(decoder.blocks):
            hooks.enter_context(block.register_forward_pre_hook(partial(pre_forward, index), with_kwargs=True))
        yield


@contextmanager
def observe_last_state(decoder: Decoder, observe: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context, call ``observe(hidden_states)`` on what each forward of the decoder gives to the LM head."""
    with decoder.module.register_forward_hook(lambda _module, _args, output: observe(output[0])):
        yield


def learned_positions(model: nn.Module) -> int | None:
    """How many positions ``model`` has an embedding for, beyond which it cannot run; None if positions have none."""
    base = transformers_model(unwrapped(model))
    positions = getattr(getattr(base, "config", None), "max_position_embeddings", None)
    others = (
        child for child in base.modules() if isinstance(child, nn.Embedding) and child is not token_embedding(base)
    )
    # Some leave out the first two of them, for padding.
    learned = positions and any(0 <= child.num_embeddings - positions <= 2 for child in others)
    return positions if learned else None


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward needs the other ranks: FSDP2's and tensor-parallel parameters, or those of ZeRO-3."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


class DecoderForward:
    """The least forward that passes all blocks of a model as training does, looked for once.

    That of the base decoder, without the LM head. Or of the whole model, one token through the LM head, if
    Accelerate has put autocast around it, or parameters are sharded: FSDP2 gathers what its root holds in no other.

    It is without dropout and other noise, whatever the model's mode.

    Attributes:
        decoder: of the model.
        device: where its inputs go.
        dtype: of its weights, outside of autocast.
        least: what :meth:`run` calls, as a module and its arguments.
        takes_places: whether :meth:`predict` takes the places whose logits it is to give, as ``logits_to_keep``.

    Raises:
        ProConError: as :func:`find_decoder` and :func:`refuse_unprepared`.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_unprepared(model)
        self.decoder, self.device = find_decoder(model), model_device(model)
        base = transformers_model(unwrapped(model))
        self.dtype = base.dtype
        self._noise = Noise(base)
        self._head = Float32Head(base.get_output_embeddings())
        self.least: partial[Any] = partial(self.decoder.module, use_cache=False)
        self._whole: partial[Any] = partial(model, use_cache=False, **without_routers(model))
        self.takes_places = _takes(model, "logits_to_keep")
        if is_sharded(model) or hasattr(model, "_original_forward"):
            self.least = partial(self._whole, **({"logits_to_keep": 1} if self.takes_places else {}))

    def run(self, **inputs: Tensor) -> Any:
        """The least forward."""
        with self._noise.off():
            return self.least(**inputs)

    def predict(self, **inputs: Tensor) -> Any:
        """The whole model's forward, whose logits are in float32."""
        with self._noise.off(), self._head.used():
            return self._whole(**inputs)


def without_routers(model: nn.Module) -> dict[str, Any]:
    """What keeps a mixture of experts from balancing its routers in a forward that is none of the training's own.

    TRL switches that on. It fails behind a cache or a mask that is not ``[B, T]``.
    """
    return {"output_router_logits": False} if _takes(model, "output_router_logits") else {}


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the causal LM's forward has an argument of that name."""
    return name in inspect.signature(transformers_model(unwrapped(model)).forward).parameters


def refuse_unprepared(model: nn.Module) -> None:
    """Raise ProConError if DeepSpeed ZeRO-3 has partitioned the model, but nothing gathers it yet."""
    embedding = token_embedding(model)
    if hasattr(embedding.weight, "ds_id") and not embedding._forward_pre_hooks:
        raise ProConError(
            "DeepSpeed ZeRO-3 holds this model in parts and has not prepared it, so it cannot run: prepare it first; "
            "of the term tokens, extract directions beforehand with 'procon directions', and pass their file"
        )


def model_device(model: nn.Module) -> torch.device:
    """The device that inputs of ``model`` go to."""
    embedding: Any = token_embedding(model)
    # A device map may have put the embedding on none; Accelerate's hook says where it computes.
    return torch.device(embedding._hf_hook.execution_device) if embedding.weight.is_meta else embedding.weight.device
