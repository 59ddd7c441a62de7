"""``forward_mode.py FOLDER TESTS BATCH_SIZE``: the first gradient of the launched ranks; rank 0 writes it.

TESTS is the test module, whose own set-up is used. FOLDER holds a ``model`` and ``rows.json``.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import gloo
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from procon.data import padding_collator

FOLDER = Path(sys.argv[1])

spec = importlib.util.spec_from_file_location("forward_mode", sys.argv[2])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)

model = AutoModelForCausalLM.from_pretrained(FOLDER / "model").double()
found = tests.first_gradient(
    model,
    json.loads((FOLDER / "rows.json").read_text()),
    padding_collator(AutoTokenizer.from_pretrained(FOLDER / "model")),
    FOLDER,
    procon=[tests.callback(model)],
    per_device_train_batch_size=int(sys.argv[3]),
    gradient_accumulation_steps=2,
    use_cpu=True,
    ddp_backend="gloo",
)
if os.environ["RANK"] == "0":
    torch.save(found, FOLDER / "gradients.pt")
gloo.stop()
