"""What every cell of the table shares: eight samples, a tiny model, its directions, and the gradient by definition."""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from procon.directions import RefusalDirections
from procon.models import find_decoder, observe_block_inputs

VOCABULARY, WIDTH, BLOCKS = 64, 64, 3

#: So much that the penalty's gradient outweighs that of CE, from which a difference separates it.
ALPHA = 100.0

#: Two groups of four whose lengths add up alike: a row each where sequences are packed.
LENGTHS = ((12, 7, 23, 10), (9, 16, 3, 24))
PACKED_LENGTH = sum(LENGTHS[0])


@dataclass(frozen=True)
class Mode:
    """One column of the table: the plain way of training, but for one thing."""

    batches: str = "padded"
    accumulation: int = 1
    checkpointing: str = "off"
    parameters: str = "full"
    ranks: str = "1"
    compiled: bool = False


#: Columns in the order of the table. Several name the plain way, each for what the others in its group differ from.
MODES = {
    "padded": Mode(),
    "packed": Mode(batches="packed"),
    "padding-free": Mode(batches="padding-free"),
    "accumulation 1": Mode(),
    "accumulation 4": Mode(accumulation=4),
    "checkpointing off": Mode(),
    "non-reentrant": Mode(checkpointing="non-reentrant"),
    "reentrant": Mode(checkpointing="reentrant"),
    "LoRA": Mode(parameters="LoRA"),
    "full": Mode(),
    "QLoRA": Mode(parameters="QLoRA"),
    "1 rank": Mode(),
    "2 ranks DDP": Mode(ranks="DDP"),
    "2 ranks FSDP2": Mode(ranks="FSDP2"),
    "compiled": Mode(compiled=True),
}


def samples() -> list[dict]:
    """Rows ``input_ids`` and ``labels``; the last third of each is the response."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (length for group in LENGTHS for length in group):
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        prompt = length - length // 3
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def packed_samples() -> list[dict]:
    """The same, four to a row, with positions that start again at each."""
    rows, four = samples(), len(LENGTHS[0])
    packed = []
    for group in (rows[:four], rows[four:]):
        packed.append(
            {
                "input_ids": [token for row in group for token in row["input_ids"]],
                "labels": [label for row in group for label in (-100, *row["labels"][1:])],
                "position_ids": [place for row in group for place in range(len(row["input_ids"]))],
            }
        )
    return packed


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<end>": 1, **{f"w{token}": token for token in range(2, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="<end>"
    )


def directions() -> RefusalDirections:
    generator = torch.Generator().manual_seed(0)
    unit = nn.functional.normalize(torch.randn(BLOCKS, WIDTH, generator=generator), dim=1)
    ones = torch.ones(BLOCKS)
    return RefusalDirections(unit, ones, ones, ones, ones)


def model(parameters: str, folder: Path) -> nn.Module:
    """The model that a run starts from, the same at every call; ``folder`` is where a quantised one is loaded from."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=128,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
    if parameters == "full":
        return base
    if parameters == "QLoRA":
        base.save_pretrained(folder / "base")
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(
            folder / "base", quantization_config=quantization, dtype=torch.float32
        )
    torch.manual_seed(0)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    )
    for parameter in trained(adapted).values():
        # TRL casts adapters of quantised models to bfloat16: let that change nothing.
        parameter.data = parameter.data.bfloat16().float()
    return adapted


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, under the names that they have without any wrapper."""
    wrappers = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")
    found = {}
    for name, parameter in module.named_parameters():
        for wrapper in wrappers:
            name = name.replace(wrapper, "")
        if parameter.requires_grad:
            found[name] = parameter
    return found


@torch.no_grad()
def move(module: nn.Module) -> None:
    """Take a model off its anchors, each parameter in the same way however it is wrapped or sharded."""
    for name, parameter in trained(module).items():
        if parameter.dtype == torch.bfloat16:  # by TRL
            parameter.data = parameter.data.float()
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        step = 0.05 * torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            step = distribute_tensor(step, parameter.device_mesh, parameter.placements)
        parameter += step


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients that an optimiser step would use, whole and in float64."""
    found = {}
    for name, parameter in trained(module).items():
        if parameter.grad is not None:
            whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            found[name] = whole.detach().double().cpu().clone()
    return found


def expected_gradients(parameters: str, folder: Path) -> dict[str, Tensor]:
    """The gradient of ``ALPHA`` * constraint by its definition: float64, one unpadded sample at a time."""
    start = _plain(model(parameters, folder)).double().eval()
    moved = copy.deepcopy(start)
    move(moved)
    unit = directions().first.double()
    total, tokens = torch.zeros(()).double(), 0
    for row in samples():
        response = torch.tensor(row["labels"]) != -100
        tokens += int(response.sum())
        with torch.no_grad():
            anchors = _projections(start, row, unit)
        total = total + (_projections(moved, row, unit) - anchors)[:, response].square().sum()
    (ALPHA * total / (tokens * BLOCKS)).backward()
    return gradients(moved)


def _projections(module: nn.Module, row: dict, unit: Tensor) -> Tensor:
    """``[BLOCKS, T]``."""
    inputs = [None] * BLOCKS
    with observe_block_inputs(find_decoder(module), lambda block, hidden: inputs.__setitem__(block, hidden[0])):
        module(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    return torch.stack([hidden @ unit[block] for block, hidden in enumerate(inputs)])


def _plain(module: nn.Module) -> nn.Module:
    """Quantised layers as the linear layers that they stand for."""
    for name, child in list(module.named_children()):
        if isinstance(child, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
            linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
            linear.weight = nn.Parameter(weight.float(), requires_grad=False)
            setattr(module, name, linear)
        else:
            _plain(child)
    return module
