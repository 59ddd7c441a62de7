"""``forward_mode.py FOLDER TESTS BATCH_SIZE``: the first gradients of the launched ranks; rank 0 writes them.

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

rows = json.loads((FOLDER / "rows.json").read_text())
tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")


def first_gradient(rows, callback, **settings):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "model").double()
    return tests.first_gradient(
        model,
        rows,
        padding_collator(tokenizer),
        FOLDER,
        procon=[callback(model)],
        processing_class=tokenizer,
        per_device_train_batch_size=int(sys.argv[3]),
        gradient_accumulation_steps=2,
        use_cpu=True,
        ddp_backend="gloo",
        **settings,
    )


def probes(model):
    return tests.ProConCallback(probes=str(FOLDER / "probes.txt"), probe_every=1, probe_reply_tokens=3)


# Of rows that are all the same, cross-entropy has the same gradient however ranks are averaged.
alike = {
    averaged: first_gradient(rows[:1] * 8, probes, average_tokens_across_devices=averaged) for averaged in (True, False)
}
found = {"tokens": first_gradient(rows, tests.callback), "probes": alike}
if os.environ["RANK"] == "0":
    torch.save(found, FOLDER / "gradients.pt")
gloo.stop()
