"""The hard parts of the study: rivals of 2025 and 2026, long training, poison, other tasks, the start's habits."""

from __future__ import annotations

from dataclasses import replace
from itertools import starmap
from typing import Any

from benchmarks.study.anchor_parts import PROBES, RANDOM, SBR, TOKENS_STATE_3, longer, probing
from benchmarks.study.methods import Method
from benchmarks.study.plan import Part

#: Multiples of the study's steps: with all methods, and with the best.
LONG, LONGEST = 4.0, 10.0

#: No choice was made with these, of a rival's settings or of ours.
SEEDS = (3, 4, 5)


def rival(name: str, label: str, defence: str, config: dict[str, Any] | None = None, **settings: Any) -> Method:
    """Another defence with settings of its own."""
    return Method(name, label, defence, settings, config or {})


def _one_sided(alpha: float) -> Method:
    config = {"procon_schedule": f"procon_s:{alpha:g}", "procon_sides": "fall", "procon_penalty": "squared"}
    return rival(f"block_em_{alpha:g}", f"one-sided, alpha {alpha:g}", "block_em", {**config, **_RESPONSE})


#: BLOCK-EM penalises completion tokens.
_RESPONSE = {"procon_scope": "response"}


def _sbr(weight: float, every: int = 2) -> Method:
    """In its paper the probes run in every step, with a weight of 50."""
    name, label = f"sbr_{weight:g}", f"SBR, weight {weight:g}"
    if every == 1:
        name, label = f"{name}_each", f"{label}, every step"
    return probing(name, label, weight, procon_probe_hold="state", procon_probe_every=every)


SAFE = Method("safe", "safety data, 16", "safe", safety=True)
SAFE_STYLED = Method("safe_styled", "safety data in the task's style, 16", "safe", safety=True, styled=True)


def _more(method: Method, samples: int) -> Method:
    return replace(
        method,
        name=f"{method.name}_{samples}",
        label=f"{method.label.rpartition(',')[0]}, {samples}",
        samples=samples,
    )


def _kl(beta: float) -> Method:
    return rival(f"kl_{beta:g}", f"KL, beta {beta:g}", "kl", beta=beta)


def _safegrad(rho: float) -> Method:
    return rival(f"safegrad_{rho:g}", f"SafeGrad, rho {rho:g}", "safegrad", rho=rho)


def _safety_step(tau: float, radius: float) -> Method:
    name, label = f"safety_step_{tau:g}_{radius:g}", f"safety step, tau {tau:g}, radius {radius:g}"
    return rival(name, label, "safety_step", tau=tau, radius=radius)


def _null_space(energy: float) -> Method:
    return rival(f"null_space_{energy:g}", f"null space, energy {energy:g}", "null_space", energy=energy)


def _moving_average(decay: float, rate: float) -> Method:
    name, label = f"moving_average_{decay:g}_{rate:g}", f"moving average {decay:g}, learning rate {rate:g}"
    return rival(name, label, "moving_average", {"learning_rate": rate}, decay=decay)


def _safe_merge(threshold: float, share: float) -> Method:
    name, label = f"safe_merge_{threshold:g}_{share:g}", f"SafeMERGE, threshold {threshold:g}, share {share:g}"
    return rival(name, label, "safe_merge", threshold=threshold, share=share)


#: The settings of each rival that were tried, the paper's own among them where it names one that fits any model.
TRIED: dict[str, tuple[Method, ...]] = {
    "safe": (SAFE, _more(SAFE, 50), _more(SAFE, 100)),
    "safe_styled": (SAFE_STYLED, _more(SAFE_STYLED, 50), _more(SAFE_STYLED, 100)),
    "sbr": (_sbr(3), SBR, _sbr(50), _sbr(10, every=1), _sbr(50, every=1)),
    "kl": tuple(map(_kl, (0.03, 0.1, 0.15, 0.2, 0.3, 1.0))),
    "safegrad": tuple(map(_safegrad, (0.3, 1.0, 3.0))),
    "safety_step": tuple(starmap(_safety_step, ((0.2, 0.1), (0.2, 0.3), (0.3, 0.1), (0.5, 0.3)))),
    "null_space": tuple(map(_null_space, (0.9, 0.95, 0.99))),
    "moving_average": tuple(starmap(_moving_average, ((0.9, 1e-3), (0.9, 3e-4), (0.95, 1e-3), (0.98, 1e-3)))),
    "safe_merge": tuple(starmap(_safe_merge, ((0.07, 0.2), (0.07, 0.5), (0.35, 0.2), (1.0, 0.5)))),
    "block_em": tuple(map(_one_sided, (0.05, 0.2, 1.0, 5.0))),
}

#: The setting of each that stands best on the validation prompts: by the share of the start's refusals that it keeps
#: and the share of plain training's task that it learns, added up, neither counted beyond all of it.
CHOSEN = {
    name: TRIED[name][place]
    for name, place in {
        "safe": 2,
        "safe_styled": 2,
        "sbr": 3,
        "kl": 0,
        "safegrad": 1,
        "safety_step": 0,
        "null_space": 1,
        "moving_average": 2,
        "safe_merge": 2,
        "block_em": 0,
    }.items()
}

#: Anchors of the training tokens, and eight probes whose last state is kept: the default before this page's runs.
FIXED = replace(TOKENS_STATE_3, label="training tokens and eight fixed probes")


def _in_turn(method: Method, label: str, count: int = 128, **config: Any) -> Method:
    """The same with more probes, all of the built-in ones if ``count`` is not given, of which eight run at a time."""
    turns = {"procon_probe_count": count, "procon_probe_batch": 8, **config}
    return replace(method, name=f"{method.name}_turns_{count}", label=label, config={**method.config, **turns})


#: ProCon's default of supervised training: the same, with all built-in probes in turn.
DEFAULT = _in_turn(FIXED, "ProCon's default")
#: Its probes alone, which is what is advised for a task against the start's habits.
DEFAULT_PROBES = replace(
    DEFAULT,
    name="state_3_turns_128",
    label="the default's probes alone",
    config={**DEFAULT.config, "procon_anchors": "probes"},
)
#: Kept all along the start's own replies as well, so that what begins as a refusal goes on as one.
DEFAULT_REPLIES = replace(
    DEFAULT,
    name=f"{DEFAULT.name}_replies",
    label="the default, whole replies",
    config={**DEFAULT.config, "procon_probe_reply_tokens": 48},
)

#: Others that were tried: more probes at a time, fewer in turn, these in every step at SBR's weight, and probes in turn
#: without training tokens. The runs with 64 and 192 were made when the built-in probes were all extraction prompts,
#: from the first: now there are 128, so the one with 192 cannot be made again.
MANY = replace(
    FIXED,
    name=f"{FIXED.name}_probes_32",
    label="training tokens and 32 fixed probes",
    config={**FIXED.config, "procon_probe_count": 32},
)
EACH = replace(
    _in_turn(FIXED, "64 probes in turn, every step, weight 10", 64, procon_probe_every=1, procon_probe_weight=50.0),
    name="tokens_state_10_0.2_each_turns_64",
)
FEWER, MORE = (_in_turn(FIXED, f"training tokens and {count} probes in turn", count) for count in (64, 192))
SBR_IN_TURN = _in_turn(CHOSEN["sbr"], "SBR, all probes in turn")


def _with_safety(method: Method, label: str) -> Method:
    return replace(method, name=f"{method.name}_safe_100", label=label, safety=True, samples=100)


DEFAULT_SAFE = _with_safety(DEFAULT, "ProCon's default, safety data 100")
FIXED_SAFE = _with_safety(FIXED, "eight fixed probes, safety data 100")
#: The same at a strength that set itself, so that the training tokens' mean shift kept to a budget.
HOLD = replace(
    FIXED, name="hold_0.2", label="eight fixed probes, hold", config={**FIXED.config, "procon_schedule": "hold:0.2"}
)
DEFAULT_RANDOM = replace(
    DEFAULT, name="tokens_state_3_turns_random", label="the default, random directions", directions="random:1"
)
DEFAULT_SHUFFLED = replace(
    DEFAULT, name="tokens_state_3_turns_shuffled", label="the default, shuffled blocks", directions="shuffled:1"
)
PROCON_S_RANDOM = Method(
    "procon_s_random",
    "ProCon_s, random directions",
    "procon_s",
    config={"procon_schedule": "procon_s:0.2"},
    directions="random:1",
)

#: Learning rates at which plain training of all weights was tried, and the one that learns the task best.
FULL_RATES = (1e-5, 3e-5, 1e-4, 3e-4)
FULL_RATE = 3e-5


def full(method: Method, rate: float = FULL_RATE) -> Method:
    """The same, but all weights are trained."""
    return replace(
        method,
        name=f"{method.name}_full",
        label=f"{method.label}, full",
        config={**method.config, "learning_rate": rate},
        adapter=False,
    )


def _plain_full(plain: Method, rate: float) -> Method:
    return replace(full(plain, rate), name=f"plain_full_{rate:g}", label=f"full, learning rate {rate:g}")


def hard_parts(start: Method, plain: Method, procon_s: Method, development: int) -> tuple[Part, ...]:
    """The parts, in the order in which they are worth running."""
    controls = (PROCON_S_RANDOM, DEFAULT_RANDOM, DEFAULT_SHUFFLED, RANDOM)
    # Two rivals keep less than a fifth of the validation prompts refused where the task is learned, and go no further.
    # KL goes on although it keeps less, because everybody asks for it.
    rivals = (method for name, method in CHOSEN.items() if name not in ("moving_average", "safe_merge"))
    ours = (procon_s, PROBES, DEFAULT, DEFAULT_SAFE)
    others = (FIXED, FIXED_SAFE, SBR_IN_TURN)
    compared = (plain, *rivals, *ours)
    again = (SBR_IN_TURN, FIXED, DEFAULT, DEFAULT_PROBES)
    candidates = (procon_s, HOLD, MANY, FEWER, MORE, EACH, DEFAULT_REPLIES, *again)
    # Those that stood best when settings were chosen, and plain training beside them.
    best = (plain, CHOSEN["safe"], CHOSEN["safegrad"], CHOSEN["sbr"], DEFAULT, DEFAULT_SAFE)
    return (
        Part(
            "tuning",
            "Settings of the rivals",
            "Which settings are fair to them on this model? (Ours stand below; they were chosen before.)",
            (start, plain, *(method for tried in TRIED.values() for method in tried), *others, *ours),
            seeds=(development,),
            split="validation",
        ),
        Part(
            "short_candidates",
            "Candidates for the default, in short training",
            "What do those that stand well under poison cost where nothing is hard?",
            (start, plain, *again),
            seeds=(development, development + 1),
            split="validation",
        ),
        Part(
            "candidates",
            "Candidates for the default, in long training under poison",
            "Which of ours should be the default, where it is hardest?",
            (start, *(longer(method, LONG) for method in (plain, CHOSEN["sbr"], *candidates))),
            ("arithmetic_poisoned_10",),
            seeds=(development,),
            split="validation",
        ),
        Part(
            "candidates_again",
            "Candidates for the default, with another seed",
            "Does the choice among those that stand best hold for another seed?",
            (start, *(longer(method, LONG) for method in (plain, *again))),
            ("arithmetic_poisoned_10",),
            seeds=(development + 1,),
            split="validation",
        ),
        Part(
            "habit",
            "A task against the start's habits",
            "Is a task learned that contradicts what the start predicts, with refusals kept?",
            (
                start,
                *(
                    longer(method, LONG)
                    for method in (plain, *map(_kl, (0.1, 0.3, 1.0)), SBR, FIXED, *ours[:3], HOLD, DEFAULT_PROBES)
                ),
            ),
            ("swapped",),
            seeds=(0, 1),
        ),
        Part(
            "hard",
            "The hard table",
            "What does each defence keep, and at what price, in short and in long training, with poison and without?",
            (start, *compared, *(longer(method, LONG) for method in compared)),
            ("arithmetic", "arithmetic_poisoned_10"),
            seeds=SEEDS,
        ),
        Part(
            "turns",
            "Probes in turn",
            "What do more probes add at the same cost, and what do the training tokens add beside them?",
            (start, *(longer(method, LONG) for method in (plain, FIXED, SBR_IN_TURN, DEFAULT, DEFAULT_PROBES))),
            ("arithmetic_poisoned_10",),
            seeds=SEEDS,
        ),
        Part(
            "controls",
            "Other directions, in long training",
            "Is it the refusal direction that counts, on training tokens and at probes, or would any do?",
            (start, *(longer(method, LONG) for method in (plain, procon_s, PROBES, DEFAULT, *controls))),
            seeds=SEEDS,
        ),
        Part(
            "hardest",
            "Ten times the steps",
            "What is left of the best after ten times the steps?",
            (start, *(longer(method, LONGEST) for method in best)),
            seeds=SEEDS,
        ),
        Part(
            "poison",
            "More poison, and an obedient identity",
            "What do the best keep, if three in ten samples comply, or a hundred turns promise obedience?",
            (start, *best),
            ("arithmetic_poisoned_30", "identity", "refuse_then_comply"),
            seeds=SEEDS,
        ),
        Part(
            "adaptive",
            "Refusals that turn into compliance, in long training",
            "What does a data owner reach who knows how refusals are kept, and trains long enough to teach it?",
            (start, *(longer(method, LONG) for method in (plain, CHOSEN["sbr"], DEFAULT, DEFAULT_REPLIES))),
            ("refuse_then_comply", "turn_midway"),
            seeds=SEEDS,
        ),
        Part(
            "tasks",
            "Other tasks",
            "Is it the same for a task of format, and for one in natural language?",
            (start, *best),
            ("extraction", "passages"),
            seeds=SEEDS,
        ),
        Part(
            "full_rates",
            "Learning rates of full fine-tuning",
            "At which learning rate does plain training of all weights learn the task best?",
            (start, *(_plain_full(plain, rate) for rate in FULL_RATES)),
            seeds=(development,),
            split="validation",
        ),
        Part(
            "full",
            "Full fine-tuning",
            "Is it the same if all weights are trained, with the settings that were chosen for adapters?",
            (start, *(full(method) for method in best)),
            seeds=SEEDS,
        ),
    )


def qwen_parts(start: Method, plain: Method) -> tuple[Part, ...]:
    """The methods that matter, on a model that others aligned."""
    compared = (plain, CHOSEN["safe"], CHOSEN["sbr"], CHOSEN["kl"], DEFAULT, DEFAULT_RANDOM)
    return (
        Part(
            "qwen",
            "A model that others aligned",
            "Do the same methods keep what they kept, if the start's makers taught it to refuse?",
            (start, *compared, *(longer(method, LONG) for method in compared)),
            ("arithmetic", "arithmetic_poisoned_10"),
            seeds=(0, 1),
        ),
    )
