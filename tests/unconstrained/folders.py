"""Output folders that others have used or use, and the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from resuming import SAVES
from setting import (
    Outcome,
    directions,
    equal,
    lora,
    model,
    refused,
    rows,
    scenario,
    trainer,
    warnings_of_procon,
    weights,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from procon.cli import main
from procon.models import load_model
from procon.training import run_folder
from procon.training.run_folder import locked


def save(built: Any) -> Any:
    built.train()
    built.save_model()
    return built


def claims(folder: Path) -> bool:
    """Whether anything in ``folder`` says that its model was constrained."""
    card, record = folder / "README.md", folder / "procon.json"
    said = card.exists() and "Refusal anchored with ProCon" in card.read_text()
    return said or (record.exists() and json.loads(record.read_text()).get("constrained", True))


@scenario("a plain run into the folder of a constrained one", "output folder", short=True)
def plain_over_constrained(folder: Path) -> Outcome:
    save(trainer(folder, start=lora()))
    return refused(lambda: save(trainer(folder, "0", start=lora())), "the old card stands")


@scenario("all weights into the folder of an adapter", "output folder", short=True)
def full_over_lora(folder: Path) -> Outcome:
    save(trainer(folder, start=lora()))
    return refused(lambda: save(trainer(folder)), "loads as the old adapter on the old base")


@scenario("another alpha into the folder of a constrained run", "output folder")
def other_alpha(folder: Path) -> Outcome:
    save(trainer(folder, start=lora()))
    return refused(lambda: save(trainer(folder, 1.0, start=lora())))


@scenario("other data into the folder of a constrained run", "output folder")
def other_data(folder: Path) -> Outcome:
    save(trainer(folder, start=lora()))
    return refused(lambda: save(trainer(folder, start=lora(), data=Dataset.from_list(rows(seed=2)))))


@scenario("into a folder with checkpoints of another run", "output folder")
def over_checkpoints(folder: Path) -> Outcome:
    trainer(folder, start=lora(), **SAVES).train()
    return refused(lambda: trainer(folder, 1.0, start=lora(), **SAVES).train())


@scenario("the same run again", "output folder")
def again(folder: Path) -> Outcome:
    one = weights(save(trainer(folder, start=lora(), **SAVES)).model)
    two = weights(save(trainer(folder, start=lora(), **SAVES)).model)
    return Outcome("same" if equal(one, two) else "SILENT")


@scenario("into a folder with someone's weights", "output folder")
def over_weights(folder: Path) -> Outcome:
    model().save_pretrained(folder)
    return refused(lambda: save(trainer(folder, start=lora())), "two models in one folder")


@scenario("a model saved before it is trained", "output folder")
def untrained(folder: Path) -> Outcome:
    trainer(folder, start=lora()).save_model()
    return Outcome("SILENT", "claims a constraint") if claims(folder) else Outcome("said", "nothing is claimed")


@scenario("a model saved after its training was refused", "output folder")
def saved_after_refusal(folder: Path) -> Outcome:
    built = trainer(folder, "0@100steps,5", start=lora())
    found = refused(built.train)
    built.save_model()
    return Outcome("SILENT", "claims a constraint") if claims(folder) else found


def in_another_process(folder: Path, work: Callable[[], int]) -> int:
    """The exit code of a forked process that does ``work`` while this one holds the folder."""
    with locked(folder):
        child = os.fork()
        if not child:
            code = 70
            try:
                run_folder._held.clear()  # what a process of its own would not know
                code = work()
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@scenario("two trainings in one folder", "output folder", short=True)
def two_at_once(folder: Path) -> Outcome:
    def work() -> int:
        found = refused(trainer(folder, start=lora()).train)
        return 0 if found.outcome == "refused" and "is in use by another" in found.detail else 1

    code = in_another_process(folder, work)
    return Outcome("refused", "is in use") if code == 0 else Outcome("SILENT", f"exit code {code}")


@scenario("two trainings in one folder, one of which goes on", "output folder")
def two_at_once_resumed(folder: Path) -> Outcome:
    trainer(folder, start=lora(), **SAVES).train()

    def work() -> int:
        built = trainer(folder, start=lora(), **SAVES)
        found = refused(lambda: built.train(resume_from_checkpoint=True))
        return 0 if found.outcome == "refused" and "is in use by another" in found.detail else 1

    code = in_another_process(folder, work)
    return Outcome("refused", "is in use") if code == 0 else Outcome("SILENT", f"exit code {code}")


# The command line

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


def place(folder: Path) -> None:
    """A model with a chat template, data and directions."""
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    model(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))}) for n in range(1, 5)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    directions().save(folder / "directions.safetensors")


def command(folder: Path, *more: str) -> tuple[int, str]:
    """``procon train`` in ``folder``; its exit code and what it wrote."""
    before = Path.cwd()
    os.chdir(folder)
    text = StringIO()
    try:
        with redirect_stdout(text), redirect_stderr(text), warnings_of_procon() as warned:
            code = main(
                [
                    *("train", "--model", "model", "--data", "data.jsonl", "--output_dir", "out", "--dtype", "float32"),
                    *("--directions", "directions.safetensors", "--drift_steps", "0", "--disable_tqdm", "true"),
                    *("--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--use_cpu", "true"),
                    *("--save_strategy", "no", *more),
                ]
            )
    finally:
        os.chdir(before)
    return code, text.getvalue() + "\n".join(warned)


def by_command(name: str, *more: str, short: bool = False) -> None:
    """A command that should be refused, and should leave no model that claims a constraint."""

    def run(folder: Path) -> Outcome:
        place(folder)
        code, text = command(folder, *more)
        if code == 2:
            return Outcome("refused", text.strip().rpartition("\n")[2])
        return Outcome("SILENT", "trains")

    scenario(name, "procon train", short=short)(run)


by_command("--num_train_epochs -1", "--num_train_epochs", "-1", short=True)
by_command("--num_train_epochs 0", "--num_train_epochs", "0")
by_command("--num_train_epochs -1 --procon_schedule 0", "--num_train_epochs", "-1", "--procon_schedule", "0")
by_command("--procon_schedule 0@1000steps,5", "--procon_schedule", "0@1000steps,5", "--max_steps", "3")
by_command("--procon_schedule 0@2ep,5", "--procon_schedule", "0@2ep,5", "--num_train_epochs", "2")
by_command("--procon_schedule procon_s:1e-300", "--procon_schedule", "procon_s:1e-300")
by_command("--procon_schedule procon_wu:0@4ep", "--procon_schedule", "procon_wu:0@4ep")
by_command("--procon_penalty l2", "--procon_penalty", "l2")
by_command("--procon_blocks 7", "--procon_blocks", "7")


@scenario("as it is meant", "procon train")
def meant(folder: Path) -> Outcome:
    place(folder)
    code, text = command(folder, "--max_steps", "2")
    record = json.loads((folder / "out" / "procon.json").read_text())
    acts = code == 0 and record["did"]["constrained_steps"] == 2 and "2 of 2 steps were under the constraint" in text
    return Outcome("acts" if acts else "SILENT", str(record["did"]))


@scenario("--procon_blocks 1", "procon train", short=True)
def block_one(folder: Path) -> Outcome:
    place(folder)
    command(folder, "--max_steps", "1", "--procon_blocks", "1")
    blocks = json.loads((folder / "out" / "procon.json").read_text())["blocks"]
    return Outcome("acts" if blocks == [1] else "SILENT", f"blocks {blocks}")


@scenario("--procon_schedule procon_wu:1@0.0000001ep", "procon train")
def tiny_phase(folder: Path) -> Outcome:
    place(folder)
    command(folder, "--max_steps", "2", "--procon_schedule", "procon_wu:1@0.0000001ep")
    did = json.loads((folder / "out" / "procon.json").read_text())["did"]
    return Outcome("acts" if did["constrained_steps"] == 1 else "SILENT", str(did))


@scenario("--procon_schedule 0 on purpose", "procon train")
def plain(folder: Path) -> Outcome:
    place(folder)
    code, text = command(folder, "--max_steps", "2", "--procon_schedule", "0")
    said = code == 0 and not claims(folder / "out") and "Trained without the constraint" in text
    return Outcome("said" if said else "SILENT", "procon.json, card and console")


def after_a_run(name: str, *more: str, short: bool = False, saves: bool = True) -> None:
    """A command in the folder of one that was constrained."""

    def run(folder: Path) -> Outcome:
        place(folder)
        saving = ("--save_strategy", "steps", "--save_steps", "2") if saves else ()
        command(folder, "--max_steps", "2", *saving)
        code, text = command(folder, "--max_steps", "4", *(["--resume"] if name.startswith("--resume") else []), *more)
        if code == 2:
            return Outcome("refused", text.strip().rpartition("\n")[2])
        return Outcome("SILENT", text)

    scenario(name, "procon train", short=short)(run)


after_a_run("--resume --procon_schedule 0", "--procon_schedule", "0")
after_a_run("--resume --seed 7", "--seed", "7")
after_a_run("--resume --method full", "--method", "full")
after_a_run("without --resume")
after_a_run("again, without the constraint", "--procon_schedule", "0", saves=False)
after_a_run("again, all weights", "--method", "full", saves=False)


@scenario("--resume --model OTHER", "procon train", short=True)
def other_base(folder: Path) -> Outcome:
    place(folder)
    command(folder, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2")
    start, _ = load_model(str(folder / "model"), dtype=torch.float32)
    with torch.no_grad():
        start.model.layers[0].mlp.up_proj.weight.normal_()
    start.save_pretrained(folder / "model")
    code, text = command(folder, "--max_steps", "4", "--resume")
    return Outcome("refused" if code == 2 else "SILENT", text.strip().rpartition("\n")[2])
