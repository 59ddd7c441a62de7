"""What every scenario shares: a tiny model, four samples, directions, and how it shows whether the constraint acted."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed

from procon import Directions, ProConConfig, ProConError, ProConTrainer
from procon.data import padding_collator

VOCABULARY, WIDTH, BLOCKS = 64, 16, 3

#: So much that a constrained run ends in other weights than the same one without the constraint.
ALPHA = 50.0

#: Share of the way that training goes by which two runs may differ that round differently: within a norm, for one.
ROUNDING = 1e-3

#: Of two optimiser steps each.
EPOCHS = 3


@dataclass
class Outcome:
    """How a scenario ended: ``acts``, ``refused``, ``warned``, ``said`` (asked for, and the record says so),
    ``harmless`` (nothing could move), ``same`` (resumed as if nothing had happened) or ``SILENT``."""

    outcome: str
    detail: str = ""


@dataclass
class Scenario:
    """A way to train, or to go on training, that might lose the constraint.

    Attributes:
        door: the trainer, or what else it goes through.
        run: takes an empty folder, and says how it ended.
        short: whether it is part of the short form.
    """

    name: str
    door: str
    run: Callable[[Path], Outcome]
    short: bool = False


SCENARIOS: list[Scenario] = []


def scenario(name: str, door: str, *, short: bool = False) -> Callable[[Callable[[Path], Outcome]], Callable]:
    def add(run: Callable[[Path], Outcome]) -> Callable[[Path], Outcome]:
        SCENARIOS.append(Scenario(name, door, run, short))
        return run

    return add


def model(**config: Any) -> LlamaForCausalLM:
    """The same at every call."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config}))


def lora(base: nn.Module | None = None, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    defaults = {"r": 2, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(model() if base is None else base, LoraConfig(**{**defaults, **settings}))


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<end>": 1, **{f"w{token}": token for token in range(2, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="<end>"
    )


_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with a chat template."""
    words = ["<|pad|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = _CHATML
    return tokenizer


def rows(seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in (8, 6, 9, 5):
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return found


def directions(seed: int = 0) -> Directions:
    unit = nn.functional.normalize(torch.randn(BLOCKS, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1)
    return Directions(unit[:, None], torch.ones(BLOCKS, 1))


def config(folder: Path, alpha: float | str = ALPHA, *, made_by: type = ProConConfig, **settings: Any) -> Any:
    defaults = {
        "output_dir": str(folder),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "procon_terms": "tokens",  # training tokens alone: probes would act where these do not
        "procon_schedule": str(alpha),
    }
    if settings.get("procon_terms") != "probes":
        defaults["procon_penalty"] = "squared"
    return made_by(**{**defaults, **settings})


def trainer(
    folder: Path,
    alpha: float | str = ALPHA,
    *,
    kind: type = ProConTrainer,
    start: nn.Module | None = None,
    data: Any = None,
    given: Directions | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    extra: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    set_seed(0)
    start = model() if start is None else start
    args = config(folder, alpha, **settings)
    return kind(
        start,
        args,
        directions=given or directions(),
        train_dataset=Dataset.from_list(rows()) if data is None else data,
        data_collator=padding_collator(tokenizer()),
        callbacks=list(callbacks),
        **(extra or {}),
    )


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def warnings_of_procon() -> Iterator[list[str]]:
    """What the library warns of within the context."""
    handler, logger = _Warnings(), logging.getLogger("procon")
    logger.addHandler(handler)
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)


Trained = Callable[[Path, float | str], nn.Module]


def against_plain(run: Trained, folder: Path) -> Outcome:
    """Train by ``run`` under ``ALPHA``, and under none: the weights tell whether the constraint acted."""
    with warnings_of_procon() as warned:
        try:
            constrained = weights(run(folder / "constrained", ALPHA))
        except ProConError as error:
            return Outcome("refused", str(error))
    plain = weights(run(folder / "plain", "0"))
    start = weights(lora() if any("lora_" in name for name in plain) else model())
    moved = _distance(plain, start)
    if moved == 0:
        return Outcome("harmless", "nothing moves")
    share = _distance(constrained, plain) / moved
    if share > ROUNDING and _distance(constrained, start) > 0:
        return Outcome("acts", "; ".join([f"{share:.2g} of the way that training goes", *warned]))
    if warned:
        return Outcome("warned", "; ".join(warned))
    return Outcome("SILENT", f"the weights are those of training without the constraint, but for {share:.1g}")


def _distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    names = [name for name in one if name in two and one[name].shape == two[name].shape]
    return float(sum((one[name] - two[name]).float().square().sum() for name in names)) ** 0.5


def train(built: Any) -> nn.Module:
    built.train()
    return built.model


def refused(call: Callable[[], Any], otherwise: str = "no error") -> Outcome:
    """That ``call`` ends in a ProConError."""
    with warnings_of_procon() as warned:
        try:
            call()
        except ProConError as error:
            return Outcome("refused", str(error))
    return Outcome("warned", "; ".join(warned)) if warned else Outcome("SILENT", otherwise)


def clean(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
