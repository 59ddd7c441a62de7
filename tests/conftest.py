"""Set-up shared by all tests.

Triton's interpreter where there is no GPU, poisoned allocations, the fp64 oracle, a tokenizer and tiny models. What the
tests of the op use of it needs torch and pytest alone: `.ci/run packages` runs them in the light core.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

# Processes that run tests side by side have a core each, and lose more than they win by more threads than that.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor

# Triton reads it when a kernel is declared, its own ones included, so it has to be there before anything imports
# triton; transformers does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from procon.version import say_untested

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

# The benchmarks are not installed. They alone are made importable, and not the folder that they are in: its kernels/
# would pass for Hugging Face's package of that name.
_BENCHMARKS = importlib.util.spec_from_file_location(
    "benchmarks", Path(__file__).parent.parent / "benchmarks" / "__init__.py"
)
sys.modules["benchmarks"] = importlib.util.module_from_spec(_BENCHMARKS)

# And what tests run in processes of their own: those processes find it there too.
sys.path.append(str(Path(__file__).parent / "workers"))


def _modules_of(item: pytest.Item) -> set[str]:
    """Those that what a test's module imported comes from."""
    return {getattr(value, "__module__", "") for value in vars(getattr(item, "module", item)).values()}


def pytest_configure(config: pytest.Config) -> None:
    say_untested()  # nothing is loaded yet: newer versions say nothing in tests, which read what is said
    # ``pytest -n 2`` deals tests out in fixed shares, of which one has all that are long: what is left of it can be
    # taken over. Not an option in pyproject.toml, which pytest without xdist would refuse.
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "worksteal"


def pytest_collection_finish() -> None:
    # Accelerate collects garbage whenever a training begins, and so looks at every object of every module: a third of
    # a second. What is there before the first test stays, so it need not be looked at.
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Long tests first: at the end, one process would wait for the other's. With them those that fork (forked.py): what
    # they fork from takes seconds to start, in each process of xdist that has any of them.
    items.sort(key=lambda item: "slow" not in item.keywords and "forked" not in _modules_of(item))
    if importlib.util.find_spec("triton") is None:
        for item in items:
            if {"triton", "kernels"} & set(
                map(str, item.callspec.params.values() if hasattr(item, "callspec") else ())
            ):
                item.add_marker(pytest.mark.skip(reason="Triton is not installed, which the kernels are written in"))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU; this machine has none"))


@pytest.fixture(autouse=True)
def _no_backend_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROCON_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def _no_settings_of_another_test() -> Iterator[None]:
    """Training arguments leave their precision and plugins in the environment and in Accelerate's shared state."""
    with mock.patch.dict(os.environ):
        yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def device() -> str:
    """Where the kernels can run: the GPU, or the CPU through Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the library takes uninitialised holds NaN, so that an element it forgets to write shows."""

    def poison(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args, **kwargs) -> Tensor:
            tensor = original(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.split(".")[0] == "procon" and tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


class Expected(NamedTuple):
    """What the fused op should give, in float64."""

    projection: Tensor  # [N, K]
    scale: Tensor  # [N, K]: sum of |h||r|, to which rounding errors of the projection are proportional
    token_penalty: Tensor  # [N]
    coefficient: Tensor  # [N, K]
    gradient: Tensor  # [N, D], of the sum of the penalties alone


@pytest.fixture
def oracle() -> Callable[..., Expected]:
    """The op by definition in float64, its gradient from autograd, over the live tokens only."""

    def compute(
        hidden: Tensor,
        direction: Tensor,
        anchor: Tensor | None,
        weight: Tensor | None,
        penalty: str = "squared",
        rounding: float = 0.0,
    ) -> Expected:
        h, r = hidden.detach().double().cpu(), direction.double().cpu()
        a = torch.zeros(len(h), len(r)).double() if anchor is None else anchor.double().cpu()
        w = torch.ones(len(h)).double() if weight is None else weight.double().cpu()
        live = w.nonzero().squeeze(1)
        x = h[live].requires_grad_()
        z = (x[:, None, :] * r).sum(-1)
        z.retain_grad()
        e = z - a[live]
        reach = rounding * x.detach().norm(dim=1)[:, None] * r.norm(dim=1)
        phi = {
            "squared": e.square(),
            "absolute": torch.where(e.abs() < reach, e.square() / (2 * reach).clamp(min=1e-300), e.abs() - reach / 2),
        }[penalty]
        tokens = w[live] * phi.sum(-1)
        tokens.sum().backward()

        def scatter(values: Tensor) -> Tensor:
            return torch.zeros(len(h), *values.shape[1:]).double().index_copy(0, live, values.detach())

        return Expected(
            (h[:, None, :] * r).sum(-1),
            (h.abs()[:, None, :] * r.abs()).sum(-1),
            scatter(tokens),
            scatter(z.grad),
            scatter(x.grad),
        )

    return compute


_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

#: Families whose language model has a configuration of its own.
_TEXT_CONFIGS = {"gemma3": "gemma3_text"}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones (ids 0 to 2); conversations in ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|pad|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        padding_side="right",
    )
    tokenizer.chat_template = _CHATML
    return tokenizer


@pytest.fixture
def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """``tiny_model(family, **config)``: a random causal LM of 3 blocks and width 32, the same at every call."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    def make(family: str = "llama", **config) -> PreTrainedModel:
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "n_inner" if family == "gpt2" else "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        if family in ("gpt2", "gpt_neox"):  # they would take these as unknown extras
            del settings["num_key_value_heads"], settings["head_dim"]
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[_TEXT_CONFIGS.get(family, family)](**settings | config))

    return make


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per category one pair to measure drift on, one probe, and one pair of other splits: tiny models show no more."""
    from procon.chat import prompts

    def few(name: str) -> list[dict[str, str]]:
        ends = ("-01", "-02", "-13", "-17")
        return [row for row in whole(name) if row.get("split", "safety") == "safety" or row["id"].endswith(ends)]

    whole = prompts.asset_lines
    monkeypatch.setattr(prompts, "_DRIFT_PAIRS", 16)
    monkeypatch.setattr(prompts, "asset_lines", few)


@pytest.fixture
def make_trainer(tiny_model, tokenizer, tmp_path, few_prompts) -> Callable[..., Trainer]:
    """``make_trainer(base, schedule, **settings)``: a ``"Trainer"`` or ``"SFTTrainer"`` of few steps on a tiny model.

    Ours under a ``schedule``, with directions as if extracted from it; the plain one if that is None. Settings are
    those of its configuration; ``model``, ``lora``, ``folder`` and ``compute_metrics`` are taken out of them.
    """
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments, set_seed

    from procon.data import padding_collator
    from procon.directions import Directions
    from procon.training import ProConConfig, ProConTrainer

    def counting(numbers: range) -> list[dict[str, str]]:
        return [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))} for n in numbers]

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        prompt, completion = (tokenizer(row[part])["input_ids"] for part in ("prompt", "completion"))
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    def directions(model: PreTrainedModel) -> Directions:
        blocks, width = model.config.num_hidden_layers, model.config.hidden_size
        provenance = {"model": "/data/models/tiny", "counts": {"positive": 3, "negative": 4}, "refusal_rate": 0.955}
        return Directions(torch.full((blocks, 1, width), width**-0.5), torch.ones(blocks, 1), provenance=provenance)

    def make(base: str, schedule: str | None, *, model=None, lora=None, folder="out", compute_metrics=None, **settings):
        model = tiny_model() if model is None else model
        settings = {
            "output_dir": str(tmp_path / folder),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": [],
            "disable_tqdm": True,
            "bf16": False,
            **settings,
        }
        extra = {}
        if schedule is not None:
            of_tokens = {"procon_scope": "response", "procon_penalty": "squared"}
            terms = settings.setdefault("procon_terms", "both")
            settings = {**(of_tokens if terms != "probes" else {}), **settings, "procon_schedule": schedule}
            if terms != "probes":
                extra["directions"] = directions(model)
        train, evaluation = (Dataset.from_list(counting(numbers)) for numbers in (range(2, 6), range(6, 10)))
        set_seed(0)
        if base == "SFTTrainer":
            trl = pytest.importorskip("trl", reason="SFTTrainer is TRL's")
            from procon.training.sft import ProConSFTConfig, ProConSFTTrainer

            plain, ours = (trl.SFTTrainer, trl.SFTConfig), (ProConSFTTrainer, ProConSFTConfig)
            extra["peft_config"] = lora
        else:
            plain, ours = (Trainer, TrainingArguments), (ProConTrainer, ProConConfig)
            model = get_peft_model(model, lora) if lora else model
            train, evaluation = (data.map(tokenize, remove_columns=data.column_names) for data in (train, evaluation))
            extra["data_collator"] = padding_collator(tokenizer)
        trainer_class, config_class = plain if schedule is None else ours
        return trainer_class(
            model,
            config_class(**settings),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            **extra,
        )

    return make


@pytest.fixture
def samples() -> list[dict]:
    """Eight tokenised samples of unequal length, the last third of each labelled."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (12, 7, 23, 5, 9, 16, 3, 30):
        ids = torch.randint(5, 60, (length,), generator=generator).tolist()
        prompt = length - length // 3
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


@pytest.fixture
def few_probes(monkeypatch):
    """The first pairs alone of those that own replies are to: all take seconds."""
    from procon.chat import builtin_probe_pairs

    pairs = builtin_probe_pairs().first(4)
    monkeypatch.setattr("procon.data.conversations.builtin_probe_pairs", lambda: pairs)
    return pairs


@pytest.fixture
def place(tiny_model, tokenizer, tmp_path, monkeypatch) -> Path:
    """The current folder, with a model and data in it."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))} for n in range(1, 17)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def random_directions() -> Callable[..., Any]:
    """``random_directions(model)``: unit directions for the blocks of a model, the same at every call."""
    from procon.directions import Directions
    from procon.models import find_decoder

    def make(model: PreTrainedModel) -> Directions:
        decoder = find_decoder(model)
        shape = (len(decoder.blocks), decoder.hidden_size)
        directions = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        ones = torch.ones(len(directions))
        return Directions(torch.nn.functional.normalize(directions, dim=-1)[:, None], ones[:, None])

    return make


@pytest.fixture
def assert_penalty(random_directions) -> Callable[..., None]:
    """``assert_penalty(model, batch)``: value and gradient of its penalty are those by definition, in float64.

    Anchors are the model's own projections and noise; without noise at the first ``still`` blocks, whose inputs nothing
    moves. The definition is computed on ``reference``, a copy of the model in float64 if not given, from the block
    inputs that plain hooks see.
    """
    from procon.constraint import ProjectionConstraint
    from procon.models import find_decoder

    def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad()
        return {name: gradient.double() for name, gradient in found.items()}

    def projections(model: PreTrainedModel, batch: dict[str, Tensor], directions: Tensor) -> Tensor:
        blocks, inputs = find_decoder(model).blocks, {}

        def keep(block: int):
            def hook(_module, args, kwargs) -> None:
                inputs[block] = args[0] if args else kwargs["hidden_states"]

            return hook

        hooks = [block.register_forward_pre_hook(keep(i), with_kwargs=True) for i, block in enumerate(blocks)]
        model(**batch)
        for hook in hooks:
            hook.remove()
        return torch.stack([inputs[i].double() @ directions[i].double() for i in range(len(blocks))], -1)

    def check(model, batch, *, reference=None, still: int = 0, fuse: str = "auto", relative: float = 1e-4) -> None:
        reference = copy.deepcopy(model).double() if reference is None else reference
        directions = random_directions(model)
        random = torch.Generator().manual_seed(0)
        mask = (torch.rand(batch["input_ids"].shape, generator=random) < 0.6).float()

        z = projections(reference, batch, directions.basis[:, 0])
        anchors = z.detach().float() + torch.randn(z.shape, generator=random) * (torch.arange(z.shape[-1]) >= still)
        expected = ((z - anchors.double()).square() * mask[..., None]).sum() / (mask.sum() * z.shape[-1])
        expected.backward()

        with ProjectionConstraint(directions, penalty="squared").attach(model, fuse=fuse) as constraint:
            constraint.set_target(anchors, mask)
            model(**batch)
            found = constraint.penalty()
            found.backward()
        torch.testing.assert_close(found.double(), expected, rtol=relative, atol=0)
        ours, theirs = gradients(model), gradients(reference)
        assert ours.keys() == theirs.keys()
        assert ours
        largest = max(gradient.norm() for gradient in theirs.values())
        assert largest > 0
        for name, gradient in theirs.items():
            difference = (ours[name] - gradient).norm()
            assert difference <= relative * gradient.norm() + 1e-2 * relative * largest, name

    return check
