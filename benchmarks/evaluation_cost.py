"""What does an evaluation cost? ``python -m benchmarks.evaluation_cost [COMMIT ...]``: seconds and memory of each.

The model has random weights in bfloat16, the vocabulary of Qwen2.5, which is 151,936 tokens, and a LoRA adapter, so
that its head is frozen. Each measurement is a process of its own, on one thread, with the library as of the commit; of
the working tree if none is named.

- ``procon eval``: the command, on built-in prompts; its replies never end early, as random weights do not end them.
- ``drift``: means of the prompts' hidden states, as a drift probe takes them.

Seconds are CPU time without that of loading in the last one, which another process's load hardly moves. Memory is the
peak of the process's resident set, libraries and model included. What was found is named by a hash: replies are
the same if it is, and so are all bits of the means.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness.checkouts import ROOT, environment

#: Qwen2.5-0.5B's, as its configuration has it; "smoke" only shows that everything runs.
SHAPES = {
    "Qwen2.5-0.5B": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "smoke": {
        "vocab_size": 4096,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}

MEASURED = ("procon eval", "drift")

_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_TEMPLATE = (
    "<|im_start|> system " + _SYSTEM + " <|im_end|> {% for message in messages %}"
    "{{ '<|im_start|> ' + message.role + ' ' + message.content + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def make(shape: str, folder: Path) -> None:
    """A model of that shape, and a tokenizer that knows every word of the built-in prompts, in ``folder``."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    from procon.chat import builtin_prompts
    from procon.settings import PAPER_RECIPE

    sides = [side for name in ("held_out", "extraction") for side in _sides(builtin_prompts(name))]
    words = dict.fromkeys(word for side in sides for text in [*side, _SYSTEM] for word in text.split())
    known = ["<|pad|>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant", *words]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(known))}
    split = Tokenizer(models.WordLevel(vocabulary, "<|pad|>"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[shape], pad_token_id=0, eos_token_id=2)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.save_pretrained(folder / "base")
    adapted = get_peft_model(base, LoraConfig(**PAPER_RECIPE.lora()))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder)


def _sides(prompts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return prompts.malicious, prompts.benign


def measure(name: str, model: str, prompts: int) -> dict[str, object]:
    """Run one measurement in this process; what it found, by its hash, and what it cost."""
    from procon.chat import builtin_prompts
    from procon.directions import ContrastMeans
    from procon.models import load_model

    sides = builtin_prompts("held_out").first(prompts)
    began = time.process_time()
    if name == "procon eval":
        from procon.cli import main as run

        with tempfile.TemporaryDirectory() as folder:
            files = {side: Path(folder) / f"{side}.txt" for side in ("malicious", "benign")}
            for file, texts in zip(files.values(), _sides(sides), strict=True):
                file.write_text("\n".join(texts) + "\n")
            output = Path(folder) / "evaluation.json"
            given = [part for side, file in files.items() for part in (f"--{side}", str(file))]
            run(["eval", "--model", model, "--output", str(output), *given])
            found = [reply["reply"] for reply in json.loads(output.read_text())["replies"]]
    else:
        loaded_model, tokenizer = load_model(model, dtype="bfloat16")
        began = time.process_time()
        means = ContrastMeans.measure(loaded_model, tokenizer, sides, progress=False)
        found = [means.malicious.tolist(), means.benign.tolist()]
    return {
        "seconds": time.process_time() - began,
        "peak": _peak(),
        "found": hashlib.sha256(json.dumps(found).encode()).hexdigest()[:8],
    }


def _peak() -> int:
    """Bytes of the largest resident set that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def main(argv: list[str] | None = None) -> None:
    """Print what each measurement costs at each commit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation_cost", description=__doc__)
    parser.add_argument("commits", nargs="*", help="Commits to measure; the working tree if none is named.")
    parser.add_argument("--shape", choices=SHAPES, default="Qwen2.5-0.5B")
    parser.add_argument("--prompts", type=int, default=32, help="Malicious prompts, and as many benign ones.")
    parser.add_argument("--only", choices=MEASURED, action="append", help="One measurement; may be repeated.")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.measure:
        print(json.dumps(measure(chosen.only[0], chosen.measure, chosen.prompts)))
        return
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        model = Path(scratch) / "model"
        make(chosen.shape, model)
        environments = {"working tree": os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}}
        if chosen.commits:
            environments = {}
            for number, commit in enumerate(chosen.commits):
                (Path(scratch) / str(number)).mkdir()
                environments[commit] = environment(commit, Path(scratch) / str(number), stack)
        for name in chosen.only or MEASURED:
            for commit, variables in environments.items():
                arguments = ["--only", name, "--measure", str(model), "--prompts", str(chosen.prompts)]
                command = [sys.executable, "-P", "-m", "benchmarks.evaluation_cost", *arguments]
                done = subprocess.run(command, env=variables, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
                cost = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{name} at {commit}: {cost['seconds']:.1f} s of CPU, peak {cost['peak'] / 2**30:.2f} GiB, "
                    f"found {cost['found']}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
