"""``PROCON_GOLDEN=FILE pytest tests/golden.py``: what a change of structure must leave bit for bit.

The first call records them in the file; later ones, of other commits on the same machine, compare: weights after twenty
steps from each source of anchors, the directions, and the labels under each family's template. Not collected by itself,
since other processors round otherwise.
"""

import hashlib
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import set_seed

import procon
from procon.chat import response_mask
from procon.data import flattening_collator, padding_collator
from procon.errors import ProConError
from procon.training import ProConConfig, ProConTrainer

FILE = Path(os.environ["PROCON_GOLDEN"])

SOURCES = ("recorded", "live", "probes", "recorded+probes")
LAYOUTS = {"padded": {}, "packed": {}, "accumulation 4": {"gradient_accumulation_steps": 4}}

_spec = importlib.util.spec_from_file_location("test_masks", Path(__file__).parent / "chat" / "test_masks.py")
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)


def check(name: str, value: object) -> None:
    """Record a value, or compare it with the one that is recorded."""
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    if name in kept:
        assert kept[name] == value, name
    else:
        FILE.write_text(json.dumps({**kept, name: value}, indent=1, sort_keys=True))


def digest(tensors) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture
def directions(tiny_model, tokenizer):
    kind = getattr(procon, "RefusalDirections", None) or procon.Directions
    return kind.extract(tiny_model(), tokenizer, progress=False)


def test_directions(directions):
    check("directions", digest([directions.basis]))


def source_settings(source: str) -> dict[str, str]:
    """Settings of this commit for a source of anchors; of those before, whose one setting named both."""
    if "procon_probe_count" in ProConConfig.__dataclass_fields__:
        return {"procon_anchors": source}
    tokens, _, probes = source.partition("+")
    return {"procon_terms": "both" if probes else "tokens", "procon_anchors": tokens} if tokens != "probes" else {}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tuning", ["full", "LoRA"])
@pytest.mark.parametrize("source", SOURCES)
def test_weights(source, tuning, layout, tiny_model, tokenizer, samples, directions, tmp_path):
    set_seed(0)
    model = tiny_model()
    if tuning == "LoRA":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    start = digest(parameter for parameter in model.parameters() if parameter.requires_grad)
    trainer = ProConTrainer(
        model,
        ProConConfig(
            output_dir=str(tmp_path / "out"),
            **source_settings(source),
            procon_schedule="0.5",
            max_steps=20,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **LAYOUTS[layout],
        ),
        directions=directions,
        train_dataset=Dataset.from_list(samples),
        data_collator=flattening_collator() if layout == "packed" else padding_collator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    end = digest(parameter for parameter in model.parameters() if parameter.requires_grad)
    assert end != start
    check(f"{source}, {tuning}, {layout}", end)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_labels(family, tokenizer):
    tokenizer.chat_template = families.template_of(family)
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    system = {"role": "system", "content": "Be kind."}
    found = []
    cases = ((families.ONE, None), ([system, *families.TWO], None), (families.WITH_TOOLS, families.TOOLS))
    for messages, tools in cases:
        try:
            found.append([list(map(int, part)) for part in response_mask(tokenizer, messages, tools=tools)])
        except ProConError:
            found.append("refused")
    check(f"labels of {family}", hashlib.sha256(json.dumps(found).encode()).hexdigest())
