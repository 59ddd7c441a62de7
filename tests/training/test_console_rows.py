"""Rows of the log fit 80 columns, and the lines before the first step say what trains."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from procon.cli.noise import others_apart
from procon.cli.preface import Preface, describe
from procon.data import padding_collator
from procon.directions import Directions
from procon.training import ProConConfig, ProConTrainer
from procon.training.console_rows import row, show_rows


def test_a_row_is_names_and_numbers_in_an_order():
    logs = {"grad_norm": 2.41, "epoch": 0.25, "loss": 1.77712, "procon/penalty": 0.03813, "total_flos": 3e9, "step": 2}
    assert row(2, logs) == "step 2     loss 1.777  penalty 0.03813  grad norm 2.41  epoch 0.25"


def test_long_rows_go_on_beneath():
    logs = {f"a rather long name {number}": 1.0 for number in range(7)} | {"x" * 100: "text"}
    lines = row(12345, logs).splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert lines[0].startswith("step 12345 a rather")
    assert all(line.startswith(" " * 11) for line in lines[1:])
    assert sum(line.count("a rather long name ") for line in lines) == 7


@pytest.fixture
def made(tiny_model, tokenizer, tmp_path):
    def make(disable_tqdm: bool = False, **settings) -> ProConTrainer:
        rows = [{"input_ids": [1, 2, 3, 4, 5, 6], "labels": [1, 2, 3, 4, 5, 6]}] * 8
        config = ProConConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=disable_tqdm,
            **settings,
        )
        unit = torch.nn.functional.normalize(torch.ones(3, 32))
        trainer = ProConTrainer(
            get_peft_model(tiny_model(), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])),
            config,
            directions=Directions(unit[:, None], torch.ones(3, 1)),
            train_dataset=rows,
            data_collator=padding_collator(tokenizer),
            processing_class=tokenizer,
        )
        show_rows(trainer)
        trainer.add_callback(Preface(trainer, "a [model]"))
        return trainer

    return make


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_what_is_printed(made, capsys, disable_tqdm):
    with others_apart():  # DeepSpeed has a line of its own
        made(disable_tqdm).train()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line.split("  ")[0].strip() for line in lines]
    assert heads[:2] == ["model", "trains"]
    assert lines[0] == "model           a [model], float32, on cpu"
    text = " ".join(" ".join(lines).split())
    assert "LoRA of rank 2 on q_proj" in text
    assert "data 8 samples, 2 per step, 2 steps" in text
    assert "constraint alpha 0.2 training tokens all, penalty absolute, units raw" in text
    assert "blocks 3 under the constraint, of 3; within their norms; training moves 2" in text
    assert "anchors recorded in" in text
    assert "probes the last state of built-in prompts, 8 at a time every 2 steps, weight 15 " in text
    assert [line[:7] for line in lines if line.startswith("step")] == ["step 1 ", "step 2 ", "step 2 "]
    assert "seconds of training" in text
    assert "{" not in text


def test_other_sources_and_none(made):
    trainer = made(procon_anchors="live", procon_probe_reply_tokens=9)
    trainer.procon.attach()
    facts = describe(trainer, "m")
    assert facts["anchors"] == "from a forward of the starting model on each batch"
    assert facts["probes"].startswith("the last state of built-in prompts and their replies (up to 9 tokens), 8 at a")
    assert describe(made(procon_schedule="0"), "m")["constraint"] == "none"
