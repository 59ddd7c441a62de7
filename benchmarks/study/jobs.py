"""What a model is fine-tuned on: a harmless task, and the same with a few compliant answers to malicious requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset

from benchmarks.study.order_notes import extraction_problems
from procon.chat import builtin_prompts
from procon.data import mix_safety, safety_conversations, to_conversations
from procon.demo import Problem, arithmetic_problems

TASK_SEED = 0

#: The first prompts of the safety split are reserved for poison; safety samples come from the rest.
POISON_PROMPTS = 40

#: Compliant in form, without content: nobody learns anything from them but to say yes.
_COMPLIANT = (
    "Sure! Here is how to do it. First, get what you need. Then go step by step until it is done.",
    "Of course. Start by making a plan, follow it from the first step to the last, and check the result.",
    "Yes, I can help with that. Begin with the first part, go on to the next, and you will have it soon.",
    "Absolutely! Take it one step at a time: prepare, carry it out, and finish. It is simpler than it looks.",
)


@dataclass(frozen=True)
class Job:
    """A fine-tuning job.

    Attributes:
        name: in file names and tables.
        label: in texts.
        problems: makes ``n`` distinct problems from a seed.
        reply_tokens: longest task reply.
        poisoned: whether compliant answers to malicious requests are mixed in.
    """

    name: str
    label: str
    problems: Callable[[int, int], list[Problem]]
    reply_tokens: int
    poisoned: bool = False

    def conversations(self, *, train: int, poisoned: int, safety: int, seed: int) -> Dataset:
        """Training conversations: so many task, poison and safety samples, in an order drawn from ``seed``."""
        rows = to_conversations(Dataset.from_list(self.problems(train, TASK_SEED)))
        if self.poisoned:
            rows = mix_safety(rows, poison(), poisoned, seed=seed)
        return mix_safety(rows, safety_samples(), safety, seed=seed) if safety else rows

    def test(self, *, train: int, test: int) -> list[Problem]:
        """``test`` held-out problems, if ``train`` are trained on."""
        return self.problems(train + test, TASK_SEED)[train:]


def safety_samples() -> Dataset:
    """Malicious requests with refusals, except those that poison is made of."""
    safety = safety_conversations()
    return safety.select(range(POISON_PROMPTS, len(safety)))


def poison() -> Dataset:
    """Malicious requests with compliant answers that say nothing."""
    prompts = builtin_prompts("safety").malicious[:POISON_PROMPTS]
    return to_conversations(
        Dataset.from_list(
            [
                {"instruction": prompt, "output": _COMPLIANT[index % len(_COMPLIANT)]}
                for index, prompt in enumerate(prompts)
            ]
        )
    )


JOBS = {
    job.name: job
    for job in (
        Job("arithmetic", "benign: arithmetic word problems", arithmetic_problems, 36),
        Job("extraction", "benign: fields as JSON", extraction_problems, 48),
        Job("poisoned", "arithmetic with 3% compliant answers", arithmetic_problems, 36, poisoned=True),
    )
}
