"""Noise, precisions and adapters under which the constraint might act less than it says.

Each is measured by drift: how far the training tokens' projections are from the start in the end, in evaluation mode;
under probes alone, how far the probes' states are. One that holds less than it should beside plain training, and says
nothing, is SILENT.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from schedules import by_callback
from setting import BLOCKS, WIDTH, Outcome, chat_tokenizer, directions, rows, scenario, trainer, warnings_of_procon
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from procon import ProConError
from procon.anchors.recording import project_block_inputs
from procon.data import padding_collator
from procon.method import Probes
from procon.models import evaluating, find_decoder

#: Training with the constraint must drift less than this share of what it drifts without.
HELD = 0.9

#: So much that it holds the drift of a few steps.
ALPHA = 50.0

PROBES = {"procon_probe_every": 2, "procon_probe_batch": 4}


def sources(anchors: str) -> dict[str, str]:
    """Settings for "recorded", "live", "probes", or two of them."""
    tokens = [name for name in ("recorded", "live") if name in anchors]
    if not tokens:
        return {"procon_terms": "probes"}
    return {"procon_terms": "both" if "probes" in anchors else "tokens", "procon_anchors": tokens[0]}


Build = Callable[..., Any]


def projections(module: nn.Module) -> Tensor:
    """Of the training tokens, in evaluation mode."""
    batch = padding_collator(chat_tokenizer())(rows())
    decoder, basis = find_decoder(module), directions().basis
    run = partial(decoder.module, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with evaluating(module), torch.no_grad():
        found = project_block_inputs(run, decoder, basis, tuple(range(BLOCKS)), rows=4, device="cpu")[1]
    return found[batch["attention_mask"] > 0]


def states(module: nn.Module) -> Tensor:
    """Of the probes, the last hidden ones, as probes alone hold those and no others."""
    return Probes.record(module, chat_tokenizer(), progress=False).states


def drift(build: Build, folder: Path, alpha: float | str) -> float:
    built = build(folder, alpha)
    of_probes = getattr(getattr(built, "args", None), "procon_terms", None) == "probes"
    measure = states if of_probes else projections
    before = measure(built.model)
    built.train()
    return float((measure(built.model) - before).square().mean())


def held(build: Build, folder: Path) -> Outcome:
    with warnings_of_procon() as warned:
        try:
            constrained = drift(build, folder / "constrained", ALPHA)
        except ProConError as error:
            return Outcome("refused", str(error))
    plain = drift(build, folder / "plain", "0")
    told = "; ".join([f"drift {constrained / plain:.2g} of plain training's" if plain else "nothing drifts", *warned])
    if not plain:
        return Outcome("harmless", told)
    if constrained < HELD * plain:
        return Outcome("acts", told)
    return Outcome("warned" if warned else "SILENT", told)


def row(name: str, build: Build, *, door: str = "ProConTrainer", short: bool = False) -> None:
    scenario(name, door, short=short)(partial(held, build))


def base(family: str = "llama", **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": len(chat_tokenizer()),
        "hidden_size": WIDTH,
        "n_inner" if family == "gpt2" else "intermediate_size": 32,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family != "gpt2":
        settings |= {"num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings | changes))


def made(start: Callable[[], nn.Module], extra: dict[str, Any] | None = None, **settings: Any) -> Build:
    """A ProConTrainer of ``start()``."""

    def build(folder: Path, alpha: float | str) -> Any:
        own = {"processing_class": chat_tokenizer(), **(extra or {})}
        return trainer(folder, alpha, start=start(), extra=own, **{"num_train_epochs": 6, **settings})

    return build


def adapted(kind: str = "Lora", **settings: Any) -> Callable[[], nn.Module]:
    def start() -> nn.Module:
        torch.manual_seed(0)
        return peft.get_peft_model(base(), getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **settings))

    return start


LORA = {"r": 4, "target_modules": ["q_proj", "o_proj", "down_proj"]}

# Noise. Each kind beside recorded and live anchors, and probes alone.

NOISE: dict[str, Callable[[], nn.Module]] = {
    "attention dropout": partial(base, attention_dropout=0.1),
    "residual dropout": partial(base, "gpt2", resid_pdrop=0.2, embd_pdrop=0.0, attn_pdrop=0.0),
    "embedding dropout": partial(base, "gpt2", resid_pdrop=0.0, embd_pdrop=0.2, attn_pdrop=0.0),
    "router jitter": partial(base, "mixtral", num_local_experts=4, router_jitter_noise=0.5),
    "LoRA dropout": adapted(**LORA, lora_dropout=0.3),
}

for _name, _start in NOISE.items():
    row(f"{_name}, recorded", made(_start))
    row(f"{_name}, live", made(_start, **sources("live")))
    row(f"{_name}, recorded and probes", made(_start, **sources("recorded+probes"), **PROBES))
for _anchors in ("recorded", "live", "probes", "recorded+probes"):
    row(f"NEFTune, {_anchors}", made(base, **sources(_anchors), neftune_noise_alpha=5.0), short=_anchors == "live")
row("NEFTune", partial(by_callback, neftune_noise_alpha=5.0), door="ProConCallback")
row("attention dropout", lambda *given: by_callback(*given, start=base(attention_dropout=0.1)), door="ProConCallback")


# Precision, and what runs otherwise without being noise

row("bf16 weights", made(lambda: base().bfloat16()))

_ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
for _name, _settings in {
    "label smoothing, live": {"label_smoothing_factor": 0.1, **sources("live")},
    "accumulation, live": _ACCUMULATED | sources("live"),
    "SGD": {"optim": "sgd", "learning_rate": 0.3},
    "Adafactor": {"optim": "adafactor"},
    "evaluation at each step": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    "lengths grouped": {"train_sampling_strategy": "group_by_length"},
    "deterministic": {"full_determinism": True},
    "compiled, aot_eager": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "absolute penalty": {"procon_penalty": "absolute"},
}.items():
    row(
        _name,
        made(base, {"eval_dataset": Dataset.from_list(rows())} if "eval_strategy" in _settings else None, **_settings),
    )
for _name, _kwargs in {
    "": {},
    " without random state": {"preserve_rng_state": False},
    " without checks": {"determinism_check": "none"},
}.items():
    _checkpointed = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False, **_kwargs},
    }
    row(f"checkpoints{_name} and attention dropout", made(partial(base, attention_dropout=0.1), **_checkpointed))

# Adapters

for _name, _start in {
    "DoRA": adapted(**LORA, use_dora=True),
    "PiSSA": adapted(**LORA, init_lora_weights="pissa"),
    "OLoRA": adapted(**LORA, init_lora_weights="olora"),
    "rsLoRA of random A and B": adapted(**LORA, use_rslora=True, init_lora_weights=False),
    "VeRA": adapted("Vera", r=8, target_modules=["q_proj", "o_proj"]),
    "LoHa": adapted("LoHa", **LORA),
    "LoKr": adapted("LoKr", **LORA),
    "OFT": adapted("OFT", r=0, oft_block_size=4, target_modules=["q_proj", "o_proj"]),
    "FourierFT": adapted("FourierFT", n_frequency=50, target_modules=["q_proj", "o_proj"]),
    "IA3": adapted("IA3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms": adapted("LNTuning", target_modules=["input_layernorm"]),
    "prompt tuning": adapted("PromptTuning", num_virtual_tokens=3),
    "prefix tuning": adapted("PrefixTuning", num_virtual_tokens=3),
    "an adapter on the embeddings": adapted(r=4, target_modules=["q_proj", "embed_tokens"]),
    "trainable tokens": adapted(**LORA, trainable_token_indices=[5, 6, 7]),
}.items():
    # What hardly moves departs by so little that the squared penalty has no gradient to speak of.
    _penalty = "absolute" if _name in ("VeRA", "OFT", "IA3", "norms") else "squared"
    row(f"{_name}, live", made(_start, **sources("live"), procon_penalty=_penalty))
row(
    "an adapter on the embeddings, probes",
    made(adapted(r=4, target_modules=["embed_tokens"]), **sources("probes"), **PROBES),
)


def quantised(**how: Any) -> Callable[[], nn.Module]:
    def start() -> nn.Module:
        with tempfile.TemporaryDirectory() as place:
            base().save_pretrained(place)
            loaded = LlamaForCausalLM.from_pretrained(place, quantization_config=BitsAndBytesConfig(**how))
        torch.manual_seed(0)
        return peft.get_peft_model(
            peft.prepare_model_for_kbit_training(loaded, gradient_checkpointing_kwargs={"use_reentrant": False}),
            peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
        )

    return start


row("4-bit base, recorded", made(quantised(load_in_4bit=True)))
row("4-bit base, live", made(quantised(load_in_4bit=True, bnb_4bit_quant_type="nf4"), **sources("live")))
row("8-bit base, recorded", made(quantised(load_in_8bit=True)))

# Micro-batches in evaluation mode


def resting(build: Build) -> Build:
    def rest(*given: Any) -> Any:
        built = build(*given)

        class Rests(type(built)):
            calls = 0

            def compute_loss(self, model, *args, **kwargs):
                self.calls += 1
                model.train(self.calls % 2 == 0)
                return super().compute_loss(model, *args, **kwargs)

        built.__class__ = Rests
        return built

    return rest


row("every second micro-batch in evaluation mode", resting(made(base, **_ACCUMULATED)), short=True)
row("every second micro-batch in evaluation mode", resting(partial(by_callback, **_ACCUMULATED)), door="ProConCallback")
