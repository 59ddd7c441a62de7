"""``trainer.py FOLDER CASE...``: ProConTrainer in each case, on the launched ranks; rank 0 writes FOLDER/WORLD.json.

FOLDER holds a ``model`` with its tokenizer, and takes the anchors and checkpoints of all cases.
"""

import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import constraint
import gloo
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from procon.chat import builtin_prompts
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import find_decoder
from procon.training import DriftCallback, ProConConfig, ProConTrainer

FOLDER = Path(sys.argv[1])
EXAMPLES = Path(__file__).parents[2] / "examples"
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
OTHER = 3 - WORLD
LAUNCHED = "RANK" in os.environ
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER / "model")
PROMPTS = builtin_prompts("extraction").first(4)

#: Alpha 100 for an epoch of five steps, then 0 for another.
WARM_UP = {"procon_schedule": "procon_wu:100@1ep", "max_steps": 5}
#: Within the second epoch.
SAVES = {"save_strategy": "steps", "save_steps": 6}
#: Tensor parallelism of a tiny model on a CPU is slow, and learning rates are constant.
SHORT = {"max_steps": 3}
LORA = {**SHORT, "learning_rate": 1e-2}
#: So weak that a lost gradient of cross-entropy shows.
PROBES = {**SHORT, "procon_terms": "both", "procon_schedule": "procon_s:1", "procon_probe_reply_tokens": 3}
PROBES |= {"procon_probes": str(FOLDER / "probes.txt")}


def rows() -> list[dict]:
    """Five optimiser steps of eight."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(40):
        length = int(torch.randint(4, 30, (), generator=generator))
        ids = torch.randint(5, 60, (length,), generator=generator).tolist()
        prompt = length - max(1, length // 3)
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def directions(seed: int = 0) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(3, 32, generator=generator), dim=1)
    return Directions(unit[:, None], torch.ones(3, 1))


def load(**settings) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "model", **settings)


def load_lora() -> torch.nn.Module:
    model = load()
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))


def load_on_main() -> torch.nn.Module:
    """As where RAM is scarce: other ranks hold no weights worth the name until the model is sharded."""
    model = load()
    if RANK > 0:
        for parameter in model.parameters():
            parameter.data.normal_()
    return model


def load_distributed(**sizes: int) -> torch.nn.Module:
    from transformers.distributed import DistributedConfig

    return load(distributed_config=DistributedConfig(**sizes))


def fsdp2(**settings) -> dict:
    return {
        "sharding": True,
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **settings},
    }


def zero(stage: int, **settings) -> dict:
    return {"deepspeed": str(EXAMPLES / "deepspeed" / f"zero{stage}.json"), **settings}


def trainer(
    name: str, *, model=load, given=directions, replicas: int = WORLD, sharding: bool = False, callbacks=(), **settings
) -> ProConTrainer:
    """Two micro-batches make an optimiser step of eight rows, on however many ranks."""
    gloo.start(sharding=sharding)
    config = {
        "procon_terms": "tokens",
        "procon_schedule": "procon_s:100",
        "procon_scope": "response",
        "procon_penalty": "squared",
        "procon_anchors_dir": str(FOLDER / f"anchors-{name}-{WORLD}"),
        "max_steps": 10,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 4 // replicas,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "ddp_backend": "gloo" if LAUNCHED else None,
        "accelerator_config": {"use_configured_state": sharding},
    }
    # With a configuration of ZeRO-3, the model is in parts as it is loaded.
    args = ProConConfig(output_dir=str(FOLDER / f"{name}-{WORLD}"), **config | settings)
    return ProConTrainer(
        model(),
        args,
        directions=given and given(),
        train_dataset=Dataset.from_list(rows()),
        data_collator=DataCollatorForSeq2Seq(TOKENIZER, pad_to_multiple_of=32),
        processing_class=TOKENIZER,
        callbacks=list(callbacks),
    )


def train(name: str, *, resume: str | None = None, drift: bool = False, **settings) -> dict:
    """What a run logged, how it was set up, and what became of its anchors."""
    if resume:
        settings["procon_anchors_dir"] = str(FOLDER / f"anchors-{resume}")
    ours = trainer(name, **settings)
    if drift:
        ours.add_callback(DriftCallback(ours, TOKENIZER, steps=10, prompts=PROMPTS))
    procon = ours.procon
    target, seen = procon.constraint.set_target, {}

    def noted(anchors, mask):
        seen["fused"] = list(procon.constraint.fused)
        seen["target"] = [str(anchors.dtype), bool((anchors == anchors.bfloat16()).all())]
        target(anchors, mask)

    losses, step = [], ours.training_step

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    procon.constraint.set_target = noted
    ours.training_step = training_step
    ours.train(resume_from_checkpoint=resume and str(FOLDER / resume / "checkpoint-6"))
    return {
        **seen,
        "log": ours.state.log_history,
        "losses": everywhere(losses),
        # Of the first penalty's gradient; NaN if an engine scales the loss.
        "strength": everywhere(procon.evidence._gradient / procon.evidence._expected),
        "fingerprint": procon.tokens.anchors and procon.tokens.anchors.fingerprint,
        "recorded": procon.tokens.anchors and len(procon.tokens.anchors),
        "kind": ours.accelerator.distributed_type.value,
        "ranks": ours.accelerator.num_processes,
        "parameter": type(ours.model.get_output_embeddings().weight).__name__,
        "block": type(find_decoder(ours.model).blocks[0]).__name__,
    }


def gathering_attention(module, query, key, value, mask, *, scaling, **_) -> tuple:
    """Causal attention that gathers the keys of a split sequence: CPUs have no ring attention.

    Rank r of two holds the chunks r and 3 - r of four.
    """
    here = there = torch.arange(query.shape[2])
    if query.shape[2] == 16:  # its half of 32 tokens
        mesh = init_device_mesh("cpu", (WORLD,))
        key, value = (
            DTensor.from_local(part.contiguous(), mesh, [Shard(2)]).full_tensor(grad_placements=[Partial()])
            for part in (key, value)
        )
        chunks = torch.arange(32).chunk(4)
        order = [torch.cat([chunks[rank], chunks[3 - rank]]) for rank in range(WORLD)]
        here, there = order[RANK], torch.cat(order)
    scores = query @ key.transpose(2, 3) * scaling
    weights = scores.masked_fill(there > here[:, None], -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def context_parallel(name: str) -> dict:
    from accelerate import ParallelismConfig

    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {"sdpa": gathering_attention}):
        return train(name, replicas=1, parallelism_config=ParallelismConfig(cp_size=WORLD), **fsdp2(), **SHORT)


def sharded_at_load(name: str) -> dict:
    gloo.start(sharding=True)
    load_sharded = partial(load_distributed, fsdp_size=WORLD)
    whole, sharded = (
        Directions.extract(model, TOKENIZER, PROMPTS, held_out=PROMPTS, check_refusal=False, progress=False)
        for model in (load(), load_sharded())
    )
    found = train(name, model=load_sharded, sharding=True, **SHORT)
    return {**found, "cosine": whole.cosine(sharded)[1:].tolist()}


def without_trainer(name: str) -> dict:
    gloo.start(sharding=True)
    found = constraint.gradients()
    if RANK == 0:
        torch.save(found, FOLDER / "gradients.pt")
    return {}


def everywhere(value) -> list:
    """The value of every rank."""
    values = [value] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def refusals(call) -> list[str]:
    """What every rank reports."""
    try:
        return everywhere(call())
    except ProConError as error:
        return everywhere(str(error))


def extracted_once(name: str) -> dict:
    """Directions of ranks that would extract different ones, or of which one fails."""
    ours = trainer(name, given=None)
    with mock.patch.object(Directions, "extract", return_value=directions(seed=RANK)):
        hashes = everywhere(ours.procon._extract().hash)
    with mock.patch.object(Directions, "extract", side_effect=ProConError("no refusals")):
        return {"hashes": hashes, "expected": directions(seed=0).hash, "errors": refusals(ours.procon._extract)}


def partitioned_extraction(name: str) -> dict:
    return {"errors": refusals(trainer(name, given=None, **zero(3)).train)}


class NotANumber(TrainerCallback):
    """Leaves NaN in what one rank has summed up."""

    def on_step_end(self, args, state, control, **kwargs):
        if RANK == 1:
            self.trainer.procon._penalty_sum += torch.nan


def not_a_number(name: str) -> dict:
    spoil = NotANumber()
    spoil.trainer = trainer(name, callbacks=[spoil])
    return {"errors": refusals(spoil.trainer.train)}


def first_version(name: str) -> dict:
    return {"errors": refusals(partial(trainer, name, **fsdp2(version=1, sync_module_states=False)))}


def copies_of_shards(name: str) -> dict:
    return {"errors": refusals(trainer(name, procon_anchors="live", **fsdp2()).train)}


def zero3_probes(name: str) -> dict:
    return {"errors": refusals(partial(trainer, name, **zero(3), **PROBES))}


def probes_reentrant(name: str) -> dict:
    checkpoints = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    checkpoints["ddp_find_unused_parameters"] = False
    of_tokens = {name: getattr(ProConConfig, name) for name in ("procon_scope", "procon_penalty", "procon_anchors_dir")}
    alone = {**PROBES, **of_tokens, "procon_terms": "probes"}
    return {"errors": refusals(trainer(name, model=load_lora, given=None, **checkpoints, **alone).train)}


def load_with_a_part_of_probes() -> torch.nn.Module:
    """One of its parameters is reached only from lengths that the collator pads no batch to."""
    model = load()
    model.rare = torch.nn.Parameter(torch.zeros(32))
    model.model.layers[0].mlp.register_forward_hook(
        lambda _module, _inputs, output: output + model.rare if output.shape[1] % 32 else output
    )
    return model


def probes_beyond_the_batch(name: str) -> dict:
    unused = {**PROBES, "ddp_find_unused_parameters": True, "gradient_accumulation_steps": 1}
    return {"errors": refusals(trainer(name, model=load_with_a_part_of_probes, **unused).train)}


def ulysses(name: str) -> dict:
    from accelerate import ParallelismConfig

    sequence = ParallelismConfig(sp_backend="deepspeed", sp_size=WORLD)
    return {"errors": refusals(partial(trainer, name, parallelism_config=sequence, **zero(3)))}


CASES = {
    "ddp": partial(train, drift=True, **SAVES),
    "ddp_warm_up": partial(train, **WARM_UP),
    "ddp_resumed": partial(train, resume=f"ddp-{OTHER}"),
    "fsdp2": partial(train, drift=True, **fsdp2(), **SAVES),
    "fsdp2_resumed": partial(train, resume=f"fsdp2-{OTHER}", **fsdp2()),
    "fsdp2_checkpointed": partial(train, **fsdp2(activation_checkpointing=True), **WARM_UP),
    "lora": partial(train, model=load_lora, **LORA),
    "fsdp2_lora": partial(train, model=load_lora, **fsdp2(), **LORA),
    "ddp_live": partial(train, procon_anchors="live", **SHORT),
    "fsdp2_lora_live": partial(train, model=load_lora, procon_anchors="live", **fsdp2(), **LORA),
    "live_copies": copies_of_shards,
    "probes": partial(train, **PROBES),
    "ddp_probes": partial(train, **PROBES),
    "fsdp2_probes": partial(train, **fsdp2(), **PROBES),
    "fsdp2_main_only": partial(train, model=load_on_main, **fsdp2(cpu_ram_efficient_loading=True), **SHORT),
    "fsdp2_at_load": sharded_at_load,
    "tensor_parallel": partial(
        train, model=partial(load_distributed, tp_size=WORLD), replicas=1, sharding=True, **PROBES
    ),
    "context_parallel": context_parallel,
    "without_trainer": without_trainer,
    "extracted_once": extracted_once,
    "not_a_number": not_a_number,
    "first_version": first_version,
    "probes_reentrant": probes_reentrant,
    "probes_beyond_the_batch": probes_beyond_the_batch,
    "zero2": partial(train, **zero(2), **SAVES),
    "zero2_resumed": partial(train, resume=f"zero2-{OTHER}", **zero(2)),
    "zero2_probes": partial(train, **zero(2), **PROBES),
    "zero2_bfloat16": partial(train, **zero(2), **SHORT, bf16=True),
    "zero3": partial(train, drift=True, **zero(3), **WARM_UP),
    "zero3_lora": partial(train, model=load_lora, **zero(3), **LORA),
    "zero3_lora_live": partial(train, model=load_lora, procon_anchors="live", **zero(3), **LORA),
    "zero3_probes": zero3_probes,
    "partitioned_extraction": partitioned_extraction,
    "ulysses": ulysses,
}


def main() -> None:
    found = {}
    # In the order above: the configuration of DeepSpeed outlives its trainer.
    for name in sorted(sys.argv[2:], key=list(CASES).index):
        try:
            found[name] = CASES[name](name)
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    if RANK == 0:
        (FOLDER / f"{WORLD}.json").write_text(json.dumps(found))
    gloo.stop()


main()
