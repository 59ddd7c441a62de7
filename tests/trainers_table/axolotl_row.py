"""The axolotl row: one optimiser step by axolotl's own path, from the keys of a YAML file to its trainer."""

from __future__ import annotations

import json
import os
from pathlib import Path

# Before anything imports axolotl, which else reports to its makers, and has processes of its own for data, which import
# everything again.
os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "AXOLOTL_DATASET_NUM_PROC": "0"}

import axolotl.utils.trainer
import setting
import torch
from accelerate import ParallelismConfig, PartialState
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.train import setup_model_and_trainer
from axolotl.utils.dict import DictDefault
from rows import COMPILER, RANK, WORLD, FirstStep, Found, constraint_settings, supervised
from setting import Mode

# Several ranks are GPUs to axolotl: it asks whether they reach each other, and puts the mesh of FSDP2 on them.
axolotl.utils.trainer.check_cuda_p2p_ib_support = lambda: True
on_device = ParallelismConfig.build_device_mesh
ParallelismConfig.build_device_mesh = lambda self, _device: on_device(self, "cpu")


def save_start(mode: Mode, folder: Path) -> None:
    """The model that a run starts from, its tokenizer, directions and data, as files."""
    start = setting.model(mode.parameters, folder)
    if mode.parameters != "full":
        # An adapter that exists already: its weights are those of setting.model, not axolotl's draw.
        start.save_pretrained(folder / "adapter")
    if mode.parameters != "QLoRA":  # of which setting.model leaves the base there
        (start.unload() if mode.parameters == "LoRA" else start).save_pretrained(folder / "base")
    setting.tokenizer().save_pretrained(folder / "base")
    setting.directions().save(folder / "directions.safetensors")
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in setting.samples()]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def adapter(mode: Mode, folder: Path) -> dict:
    """The keys that have axolotl load the adapter, and quantise as setting.model does."""
    if mode.parameters == "full":
        return {}
    keys = {
        "adapter": "qlora" if mode.parameters == "QLoRA" else "lora",
        "lora_model_dir": str(folder / "adapter"),
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "v_proj", "o_proj"],
        # Triton kernels, for GPUs only.
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "lora_mlp_kernel": False,
    }
    if mode.parameters == "QLoRA":
        # axolotl's own choice is nf4, quantised twice, stored as bfloat16.
        quantization = {
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
        }
        keys |= {"load_in_4bit": True, "bnb_config_kwargs": quantization}
    return keys


def config(mode: Mode, folder: Path, alpha: float) -> dict:
    keys = {
        "base_model": str(folder / "base"),
        # Tokenised already: no prompt strategy.
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "special_tokens": {"pad_token": "<pad>", "eos_token": "<end>"},
        "sequence_len": 64,
        "pad_to_sequence_len": False,
        "micro_batch_size": len(setting.samples()) // mode.accumulation // WORLD,
        "gradient_accumulation_steps": mode.accumulation,
        "max_steps": 1,
        "num_epochs": 1,
        "max_grad_norm": 0.0,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": mode.checkpointing != "off",
        "save_strategy": "no",
        "val_set_size": 0,
        "dataset_num_proc": 0,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "include_tkps": False,
        # In the order of the file: axolotl averages CE rank by rank, so it depends on who gets which sample.
        "curriculum_sampling": True,
        **adapter(mode, folder),
    }
    if mode.checkpointing != "off":
        keys["gradient_checkpointing_kwargs"] = {"use_reentrant": mode.checkpointing == "reentrant"}
    if mode.batches == "packed":
        # In the order of the file, row after row until one is full: the rows of setting.packed_samples().
        keys |= {
            "sample_packing": True,
            "sequence_len": setting.PACKED_LENGTH,
            "micro_batch_size": 2 // mode.accumulation // WORLD,
            "sample_packing_sequentially": True,
        }
    if mode.batches == "padding-free":
        # axolotl flattens for attention of its varlen list only; there is none of it on a CPU.
        keys |= {"batch_flattening": True, "attn_implementation": "flash_attention_2"}
    if mode.compiled:
        keys |= {"torch_compile": True, "torch_compile_backend": COMPILER}
    if mode.ranks == "FSDP2":
        keys |= {
            "fsdp_version": 2,
            "fsdp_config": {
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
                "state_dict_type": "FULL_STATE_DICT",
                "reshard_after_forward": True,
            },
        }
    if alpha:
        keys |= {
            "plugins": ["procon.integrations.axolotl.ProConPlugin"],
            "procon_directions": str(folder / "directions.safetensors"),
            **constraint_settings(mode, folder, alpha),
        }
    return keys


def build(mode: Mode, folder: Path, alpha: float):
    """axolotl's trainer, by what ``axolotl train`` runs: config, data, model, builder, plugins."""
    PartialState()  # which axolotl asks, and which the start of a cell takes away
    cfg = load_cfg(DictDefault(config(mode, folder, alpha)))
    cfg.device_map = {"": "cpu"}
    if mode.batches == "padding-free":
        cfg.attn_implementation = "sdpa"
    return setup_model_and_trainer(cfg, load_datasets(cfg=cfg))[0]


def axolotl_trainer(mode: Mode, folder: Path, alpha: float) -> Found:
    folder = folder / f"alpha-{alpha:g}"
    folder.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        save_start(mode, folder)
    if WORLD > 1:
        torch.distributed.barrier()
    trainer = build(mode, folder, alpha)
    step = FirstStep(mode)
    trainer.add_callback(step)
    trainer.train()
    return Found(step.gradients, supervised())
