"""One run: train by DPO or GRPO and a method, with a seed; then measure."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from benchmarks.preferences.data import arithmetic_reward, is_right, preference_pairs, score
from benchmarks.study.jobs import JOBS
from benchmarks.study.plan import Budget, Cell, Method, Size
from benchmarks.study.record import provenance
from benchmarks.study.start import Start
from benchmarks.study.trial import adapter, choose_directions, measure, peak_memory, probes_in_file
from procon.chat import user_turn
from procon.demo import Problem
from procon.training.preferences import ProConDPOConfig, ProConDPOTrainer, ProConGRPOConfig, ProConGRPOTrainer

#: Of each training, whatever the algorithm.
_SHARED = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 5,
    "bf16": False,  # no autocast: the model is loaded in what the machine multiplies
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}

#: What those that keep probes share, unless one says otherwise.
_PROBES = {"procon_probe_batch": 8, "procon_probe_reply_tokens": 0}

#: Longest completion under GRPO, in training and when the reward is measured.
COMPLETION = 16

#: Behind each problem of GRPO, so that short replies are among those sampled from the start.
FORMAT = " End with Answer: and the number."


@dataclass(frozen=True)
class Algorithm:
    """One of TRL's trainers.

    Attributes:
        name: in run files.
        plain, constrained: the trainer with its configuration: TRL's, and ours.
        recipe: the same for all methods; what is not in it is TRL's default.
        data: trainer arguments from the start, the problems to train on and held-out ones.
        asked: the problems as they are put to a trained model.
        reply_tokens: longest reply to one.
        logged: what run files keep of the log, beside the constraint's own.
    """

    name: str
    plain: tuple[type[Trainer], type[TrainingArguments]]
    constrained: tuple[type[Trainer], type[TrainingArguments]]
    recipe: dict[str, Any]
    data: Callable[[Start, Sequence[Problem], Sequence[Problem]], dict[str, Any]]
    asked: Callable[[Sequence[Problem]], list[Problem]]
    reply_tokens: int
    logged: tuple[str, ...]

    def trainer(
        self,
        model: PeftModel,
        method: Method,
        start: Start,
        *,
        train: Sequence[Problem],
        held_out: Sequence[Problem],
        **settings: Any,
    ) -> Trainer:
        """The trainer of ``method``, TRL's own if that has no constraint."""
        is_plain = method.defence == "plain"
        trainer, arguments = self.plain if is_plain else self.constrained
        more = {} if is_plain else {"directions": choose_directions(method, start)}
        has_tokens = not is_plain and method.config.get("procon_terms") != "probes"
        anchors = {"procon_terms": "tokens", "procon_anchors": "live"} if has_tokens else {}
        probes = _PROBES if "procon_probes" in method.config else {}
        recipe = {**_SHARED, **anchors, **probes, **self.recipe, **settings, **method.config}
        recipe["max_steps"] = round(recipe["max_steps"] * method.length)
        if not is_plain:
            recipe = probes_in_file(recipe, recipe["output_dir"])
        return trainer(
            model,
            args=arguments(**recipe),
            processing_class=start.tokenizer,
            **self.data(start, train, held_out),
            **more,
        )

    def history(self, trainer: Trainer) -> list[dict[str, float]]:
        """The rows of the trainer's log on training, rounded."""
        return [
            {
                key: float(f"{float(value):.4g}")
                for key, value in row.items()
                if key in ("step", *self.logged) or key.startswith("procon/")
            }
            for row in trainer.state.log_history
            if "loss" in row
        ]


def _pairs(start: Start, train: Sequence[Problem], held_out: Sequence[Problem]) -> dict[str, Any]:
    return {"train_dataset": preference_pairs(train), "eval_dataset": preference_pairs(held_out)}


DPO = Algorithm(
    "dpo",
    (DPOTrainer, DPOConfig),
    (ProConDPOTrainer, ProConDPOConfig),
    {"max_steps": 40, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8},
    _pairs,
    list,
    36,
    ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"),
)


def formatted(problems: Sequence[Problem]) -> list[Problem]:
    """The problems with the format that is asked for."""
    return [{**problem, "instruction": problem["instruction"] + FORMAT} for problem in problems]


def _prompts(start: Start, train: Sequence[Problem], held_out: Sequence[Problem]) -> dict[str, Any]:
    rows = [{"prompt": user_turn(problem["instruction"]), "output": problem["output"]} for problem in formatted(train)]
    return {"train_dataset": Dataset.from_list(rows), "reward_funcs": arithmetic_reward(start.tokenizer)}


GRPO = Algorithm(
    "grpo",
    (GRPOTrainer, GRPOConfig),
    (ProConGRPOTrainer, ProConGRPOConfig),
    {
        "max_steps": 40,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": COMPLETION,
    },
    _prompts,
    formatted,
    COMPLETION,
    ("loss", "reward", "reward_std", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio"),
)

ALGORITHMS = {algorithm.name: algorithm for algorithm in (DPO, GRPO)}


def run_trial(start: Start, budget: Budget, cell: Cell) -> dict[str, Any]:
    """Train, and measure on the contrast prompts of the cell's split; returns the run."""
    began = time.monotonic()
    method, algorithm, size, task = budget.method(cell.method), ALGORITHMS[cell.job], budget.size, JOBS["arithmetic"]
    job = replace(
        task, problems=lambda n, seed: algorithm.asked(task.problems(n, seed)), reply_tokens=algorithm.reply_tokens
    )
    held_out = task.test(train=size.train, test=size.test)
    model = start.model()
    trained: dict = {"train_seconds": 0.0}
    if method.length:
        trained = _train(start, model, method, algorithm, held_out, cell.seed, size)
    measured = measure(start, model, job, cell.split, size)
    rate(measured["replies"]["task"], held_out, start.tokenizer, algorithm.reply_tokens)
    made = {"made": provenance(("trl",)), "seconds": round(time.monotonic() - began, 1)}
    return {"job": cell.job, "method": asdict(method), "seed": cell.seed, **made, **trained, **measured}


def _train(
    start: Start,
    model: PreTrainedModel,
    method: Method,
    algorithm: Algorithm,
    held_out: Sequence[Problem],
    seed: int,
    size: Size,
) -> dict:
    """Train; ``model`` then has an adapter."""
    problems = JOBS["arithmetic"].test(train=0, test=size.train)
    set_seed(seed)
    tuned = get_peft_model(model, adapter(model))
    with tempfile.TemporaryDirectory() as folder:
        trainer = algorithm.trainer(
            tuned, method, start, train=problems, held_out=held_out, output_dir=folder, seed=seed
        )
        with peak_memory() as peak:
            began = time.monotonic()
            trainer.train()
            seconds, peak_mb = time.monotonic() - began, peak()
        history = algorithm.history(trainer)
        pairs = _held_out_pairs(trainer)
    return {
        "steps": trainer.state.global_step,
        "train_seconds": round(seconds, 1),
        "peak_memory_mb": peak_mb,
        "history": history,
        **pairs,
    }


def _held_out_pairs(trainer: Trainer) -> dict:
    """How well pairs that were not trained on are separated, if there are any."""
    if trainer.eval_dataset is None:
        return {}
    found = trainer.evaluate()
    return {"pairs": {name: round(found[f"eval_rewards/{name}"], 4) for name in ("accuracies", "margins")}}


def rate(replies: Sequence[dict], problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    """Give each reply to a problem its reward, and count it right by its last number alone.

    A reply of as many tokens as the limit was cut off.
    """
    for reply, problem in zip(replies, problems, strict=True):
        finished = len(tokenizer(reply["reply"], add_special_tokens=False)["input_ids"]) < limit
        reply["correct"] = is_right(reply["reply"], problem["output"])
        reply["reward"] = score(reply["reply"], problem["output"], finished=finished)
