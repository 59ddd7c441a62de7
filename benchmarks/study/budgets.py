"""The budgets: ``smoke`` for continuous integration, ``full`` for GPUs, and the others for CPUs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.study.anchor_parts import source_parts
from benchmarks.study.hard_parts import hard_parts, qwen_parts
from benchmarks.study.methods import Method
from benchmarks.study.plan import Budget, Part, Size

#: The seed that choices are made with; no reported run has it.
DEVELOPMENT = 9
_development = partial(Part, seeds=(DEVELOPMENT,), split="validation")

#: Chosen on the validation prompts: the largest strength at which the task is learned as well as without it.
ALPHA = 0.2
BLOCKS = 29  # of SmolLM2-135M's 30: the first one's input does not move


def constrained(name: str, label: str, schedule: str, *, directions: str = "refusal", **config: Any) -> Method:
    """ProCon as it was chosen on validation prompts, except for ``config``."""
    chosen = {"procon_penalty": "absolute", "procon_scope": "all", "procon_schedule": schedule}
    return Method(name, label, "procon_s", config={**chosen, **config}, directions=directions)


def with_safety(method: Method) -> Method:
    """The same, with safety samples mixed in."""
    return replace(method, name=f"{method.name}_safe", label=f"{method.label}_safe", safety=True)


START = Method("start", "start", length=0)
PLAIN = Method("plain", "IFT")
PLAIN_LONG = Method("plain_long", "IFT, as long as ProCon_wu", length=1.5)
SAFE = Method("safe", "IFT_safe", "safe", safety=True)
# Of the settings in BASELINES, those that keep most at a task accuracy that is worth having.
OTHERS = (
    Method("sppft", "SPPFT", "sppft"),
    Method("constrained_sft", "constrained SFT", "constrained_sft"),
    Method("safe_lora", "SafeLoRA", "safe_lora", {"threshold": 0.07}),
    Method("lisa", "Lisa", "lisa", {"alignment_steps": 1, "user_steps": 4}),
    Method("steering", "preventative steering", "steering", {"strength": 0.5}),
    Method("hidden_states", "hidden states, L2", "hidden_states", {"alpha": 0.1, "scope": "all"}),
)
PROCON_S = constrained("procon_s", "ProCon_s", f"procon_s:{ALPHA}")
PROCON_WU = constrained("procon_wu", "ProCon_wu", "procon_wu:2@20steps")

TABLE = Part(
    "table",
    "Refusal and task after fine-tuning",
    "What does each defence keep, and at what price? (The paper's Tables I to IV.)",
    (
        START,
        PLAIN,
        SAFE,
        PROCON_S,
        PROCON_WU,
        with_safety(PROCON_S),
        with_safety(PROCON_WU),
        *OTHERS,
    ),
    ("arithmetic", "poisoned"),
)

# The paper sums over blocks, and the constraint here takes their mean: the same strength per block is alpha times the
# share of the blocks.
LAYERS = Part(
    "layers",
    "Which blocks are constrained",
    "Does the last block suffice? (The paper's Table V: the same strength per block.)",
    (
        PLAIN,
        constrained("last_block", "last block", f"procon_s:{ALPHA / BLOCKS:.4f}", procon_blocks="-1"),
        constrained("deep_half", "deep half", f"procon_s:{ALPHA * 15 / BLOCKS:.4f}", procon_blocks="0.5"),
        PROCON_S,
    ),
)


def _strength(alpha: float, directions: str = "refusal", units: str = "raw") -> Method:
    kind, _, draw = directions.partition(":")
    name = f"{units}_{alpha:g}_{kind}{draw}"
    label = f"{kind} {draw}".strip() + f", alpha {alpha:g}" + (", gap units" if units == "gap" else "")
    return constrained(name, label, f"procon_s:{alpha:g}", directions=directions, procon_units=units)


STRENGTH = _development(
    "strength",
    "The refusal direction against others, by strength",
    "What is special to the refusal direction?",
    (
        PLAIN,
        *(_strength(alpha) for alpha in (0.01, 0.03, 0.1, 0.3, 1.0)),
        *(_strength(alpha, "random:1") for alpha in (0.03, 0.1, 0.3, 1.0)),
        *(_strength(alpha, "random:2") for alpha in (0.1, 0.3)),
        *(_strength(0.3, control) for control in ("within:1", "shuffled:1")),
        *(_strength(10.0, kind, "gap") for kind in ("refusal", "random:1")),
    ),
)

CONTROL = Part(
    "control",
    "The refusal direction against random ones",
    "Is it the direction, or would any do? At the strengths where they differ most on the validation prompts.",
    (
        PLAIN,
        *(_strength(alpha, directions) for alpha in (0.1, 0.3) for directions in ("refusal", "random:1", "random:2")),
    ),
)

DEPTH = _development(
    "depth",
    "By depth",
    "Where does the direction matter? A third of the blocks at a time, at the strength per block of alpha 0.3 for all.",
    (
        PLAIN,
        *(
            replace(
                constrained(
                    f"{third}_{kind.replace(':', '')}",
                    f"{third} third, {kind.replace(':', ' ')}",
                    "procon_s:0.1",
                    procon_blocks=",".join(map(str, blocks)),
                ),
                directions=kind,
            )
            for third, blocks in (
                ("first", range(1, 11)),
                ("middle", range(11, 20)),
                ("last", range(20, 30)),
            )
            for kind in ("refusal", "random:1")
        ),
        constrained("last_block_strong", "last block, as strong as a third", "procon_s:0.1", procon_blocks="-1"),
    ),
)

CONVERGENCE = _development(
    "convergence",
    "Trained for longer",
    "Does a difference between the directions last? Twice the steps.",
    tuple(
        replace(method, name=f"{method.name}_twice", label=f"{method.label}, twice as long", length=2.0)
        for method in (PLAIN, _strength(0.3), _strength(0.3, "random:1"))
    ),
)

SUBSPACE = _development(
    "subspace",
    "Several directions per block",
    "Do directions by category keep more than their mean? At a strength that leaves room.",
    (_strength(0.1), *(_strength(0.1, f"k:{k}") for k in (2, 8))),
)

CHOICE = _development(
    "choice",
    "Scope, penalty and strength",
    "Which settings keep refusals and learn the task? ProCon_s is alpha 0.2, absolute, on all tokens; the others are "
    "named after what differs.",
    (
        START,
        PLAIN,
        _strength(0.1),
        PROCON_S,
        _strength(0.3),
        constrained("response", "response tokens", f"procon_s:{ALPHA}", procon_scope="response"),
        constrained("prompt", "prompt tokens", f"procon_s:{ALPHA}", procon_scope="prompt"),
        constrained("huber", "huber", f"procon_s:{ALPHA}", procon_penalty="huber"),
        constrained("squared", "squared", f"procon_s:{ALPHA}", procon_penalty="squared"),
        constrained("squared_weak", "squared, alpha 0.02", "procon_s:0.02", procon_penalty="squared"),
    ),
)

WARMUP = _development(
    "warmup",
    "Warm-up, and what comes after it",
    "How long should the warm-up be, and should a light constraint stay on? (The paper's Table VI.)",
    (
        PLAIN,
        PLAIN_LONG,
        constrained("wu_10", "10 steps, then none", "procon_wu:2@10steps"),
        PROCON_WU,
        constrained("wu_40", "40 steps, then none", "procon_wu:2@40steps"),
        replace(constrained("wu_20_0.1", "20 steps, then 0.1", "2@20steps,0.1"), length=1.5),
    ),
)

BASELINES = _development(
    "baselines",
    "Settings of the other defences",
    "Which settings are fair to them on this model?",
    (
        START,
        PLAIN,
        *OTHERS,
        Method("safe_lora_0.05", "SafeLoRA, threshold 0.05", "safe_lora", {"threshold": 0.05}),
        Method("safe_lora_0.1", "SafeLoRA, threshold 0.1", "safe_lora", {"threshold": 0.1}),
        Method("safe_lora_0.35", "SafeLoRA, threshold 0.35", "safe_lora", {"threshold": 0.35}),
        Method("lisa_4_16", "Lisa, 4 and 16 steps", "lisa", {"alignment_steps": 4, "user_steps": 16}),
        Method("steering_0.3", "preventative steering, 0.3", "steering", {"strength": 0.3}),
        Method("steering_1", "preventative steering, 1", "steering", {"strength": 1.0}),
        Method("hidden_states_1", "hidden states, alpha 1", "hidden_states", {"alpha": 1.0, "scope": "all"}),
        Method("sppft_deep", "SPPFT, the deep half", "sppft", {"blocks": [0.5, 1.0]}),
    ),
)

FORMAT = Part(
    "format",
    "Another task",
    "Is it the same for a task of format? (The paper's Table IV has a second task.)",
    (START, PLAIN, SAFE, PROCON_S, with_safety(PROCON_WU)),
    ("extraction",),
)

# The other runs of ProCon_s were made before the absolute penalty was a parabola within the rounding of the hidden
# states. The settings are the same.
ROUNDED = replace(PROCON_S, name="procon_s_rounded", label="ProCon_s, a parabola within rounding")
ROUNDING = Part(
    "rounding",
    "The absolute penalty without noise",
    "Do the defaults keep what they kept, now that a departure within rounding is not pushed at full strength?",
    (START, PLAIN, PROCON_S, ROUNDED),
    ("arithmetic", "poisoned"),
)

# On GPUs: the papers' tasks, longer training, the paper's warm-up of four epochs, and every choice again at that size.
_PAPER_WU = constrained("procon_wu", "ProCon_wu", "procon_wu:2@4ep")
_FULL_TABLE = replace(
    TABLE,
    methods=tuple(
        {"procon_wu": _PAPER_WU, "procon_wu_safe": with_safety(_PAPER_WU)}.get(method.name, method)
        for method in TABLE.methods
    ),
    jobs=("gsm8k", "sst2", "dolly", "gsm8k_poisoned_10"),
    seeds=(0, 1, 2, 3, 4),
)

# Fifteen steps, after each fifth of which the loss is logged, of as few samples as show the effect.
_FEW_SAMPLES = {"per_device_train_batch_size": 2}
SMOKE = Part(
    "smoke",
    "Does the constraint keep refusals?",
    "The direction of the effect, in minutes.",
    (START, *(replace(method, config={**method.config, **_FEW_SAMPLES}) for method in (PLAIN, PROCON_S))),
    seeds=(0,),
    split="validation",
)

# Of the attentions it is the fastest on CPUs for sequences as short as these.
_EAGER = {"attn_implementation": "eager"}

# And in the dtype in which adapters are usually trained.
_QUICK = {"dtype": "bfloat16", **_EAGER}

_HARD = Size(fresh=64, chosen_on=("arithmetic",))

BUDGETS: dict[str, Budget] = {
    "table": Budget(
        (TABLE, LAYERS, STRENGTH, CONTROL, CHOICE, BASELINES, WARMUP, DEPTH, CONVERGENCE, SUBSPACE, FORMAT, ROUNDING),
        Size(),
    ),
    "anchors": Budget(source_parts(START, PLAIN, PROCON_S), Size()),
    "hard": Budget(hard_parts(START, PLAIN, PROCON_S, DEVELOPMENT), _HARD, loading=_QUICK),
    "qwen": Budget(qwen_parts(START, PLAIN), _HARD, "qwen", _QUICK),
    "full": Budget(
        (_FULL_TABLE, LAYERS, STRENGTH, CONTROL, CHOICE, SUBSPACE),
        Size(train=6400, test=384, epochs=10, pairs=192, poisoned=100, safety=1000),
    ),
    "smoke": Budget((SMOKE,), Size(train=30, test=4, prompts=8, extraction=24, pairs=8), loading=_EAGER),
}
