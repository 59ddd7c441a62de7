"""What every cell of the table shares: the data, a tiny model, its directions, and what is read of a training."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from procon.directions import Directions

VOCABULARY, WIDTH, BLOCKS = 64, 64, 3

#: Of the probes' penalty beside that of training tokens, and what alpha multiplies.
PROBE_WEIGHT = 2.0

#: Along how many tokens of replies to probes predictions are kept, and what ends a reply.
REPLY_TOKENS, END = 5, 1

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
    source: str | None = None
    """Where anchors come from; the row's own way if None."""


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
    "recorded": Mode(source="recorded"),
    "live": Mode(source="live"),
    "probes": Mode(source="probes"),
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


def pairs() -> list[dict[str, list[int]]]:
    """Preferences ``prompt``, ``chosen`` and ``rejected``, as token ids."""
    prompts, completions = [], []
    for row in samples():
        cut = row["labels"].count(-100)
        prompts.append(row["input_ids"][:cut])
        completions.append(row["input_ids"][cut:])
    return [
        {"prompt": prompts[number], "chosen": completions[number], "rejected": completions[-1 - number]}
        for number in range(len(prompts) // 2)
    ]


def text(ids: list[int]) -> str:
    """What the tokenizer makes these ids of; it ends in a space, so that another text may follow."""
    return "".join(f"w{token} " for token in ids)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words are ``w2``, ``w3`` and so on; a conversation is its texts between ``w2`` and ``w3``, and then ``w4``."""
    words = {"<pad>": 0, "<end>": 1, **{f"w{token}": token for token in range(2, VOCABULARY)}}
    model = Tokenizer(models.WordLevel(words, "<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<end>")
    messages = "{% for message in messages %}w2 {{ message.content }} w3 {% endfor %}"
    made.chat_template = messages + "{% if add_generation_prompt %}w4{% endif %}"
    return made


def probes() -> list[list[int]]:
    """Probe prompts, as token ids."""
    return [row["input_ids"] for row in samples()[:3]]


def rendered(prompt: list[int]) -> list[int]:
    """What the chat template makes of a prompt."""
    return [2, *prompt, 3, 4]


def probe_file(folder: Path) -> Path:
    path = folder / "probes.txt"
    path.write_text("".join(text(prompt).strip() + "\n" for prompt in probes()))
    return path


def directions() -> Directions:
    generator = torch.Generator().manual_seed(0)
    unit = nn.functional.normalize(torch.randn(BLOCKS, WIDTH, generator=generator), dim=1)
    return Directions(unit[:, None], torch.ones(BLOCKS, 1))


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
            eos_token_id=END,
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
    for part in module.modules():
        if isinstance(part, FSDPModule):  # recording may have left its parameters gathered
            part.reshard()
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
