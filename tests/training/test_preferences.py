"""DPO, KTO and GRPO under the constraint: alpha 0 is TRL's own, live anchors cost no forward, resumes are exact."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from procon.errors import ProConError
from procon.models import find_decoder

pytest.importorskip("trl", reason="TRL is not installed")

from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from procon.training.preferences import (
    KTOConfig,
    KTOTrainer,
    ProConDPOConfig,
    ProConDPOTrainer,
    ProConGRPOConfig,
    ProConGRPOTrainer,
    ProConKTOConfig,
    ProConKTOTrainer,
)

TRAINERS = {
    "DPO": (DPOTrainer, DPOConfig, ProConDPOTrainer, ProConDPOConfig, {}),
    "KTO": (KTOTrainer, KTOConfig, ProConKTOTrainer, ProConKTOConfig, {}),
    "GRPO": (
        GRPOTrainer,
        GRPOConfig,
        ProConGRPOTrainer,
        ProConGRPOConfig,
        {"num_generations": 2, "max_completion_length": 6, "beta": 0.04},
    ),
}


def length(completions, **_kwargs) -> list[float]:
    """A reward that differs between completions."""
    return [float(sum(map(ord, str(completion))) % 7) for completion in completions]


def rows(kind: str) -> Dataset:
    found = []
    for number in range(1, 13):
        row = {"prompt": f"count to {number}"}
        if kind == "DPO":
            row |= {"chosen": " ".join(map(str, range(number))), "rejected": "no " * (1 + number % 3)}
        if kind == "KTO":
            row |= {"completion": " ".join(map(str, range(number))), "label": number % 2 == 0}
        found.append(row)
    return Dataset.from_list(found)


def lora(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"))


@pytest.fixture
def trainer(tiny_model, tokenizer, random_directions, tmp_path):
    """``trainer(kind, constrained, **settings)`` of a tiny model with an adapter."""

    def make(kind, constrained=True, *, full=False, **settings):
        plain, plain_config, ours, our_config, own = TRAINERS[kind]
        base = tiny_model()
        directions = random_directions(base)
        config = {
            "output_dir": str(tmp_path / f"{kind}-{constrained}"),
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 2,
            "gradient_checkpointing": False,
        }
        ours_alone = {"procon_schedule": "procon_s:10"}
        if settings.get("procon_terms") != "probes":
            ours_alone |= {"procon_terms": "tokens", "procon_anchors": "live", "procon_penalty": "squared"}
        extra = ours_alone if constrained else {}
        arguments = (our_config if constrained else plain_config)(**config | own | extra | settings)
        more = {"reward_funcs": length} if kind == "GRPO" else {}
        if full and kind != "GRPO":
            more["ref_model"] = copy.deepcopy(base)
        set_seed(0)
        return (ours if constrained else plain)(
            base if full else lora(base),
            args=arguments,
            train_dataset=rows(kind),
            processing_class=tokenizer,
            **more,
            **({"directions": directions} if arguments.__dict__.get("procon_terms", "probes") != "probes" else {}),
        )

    return make


def state(run) -> dict:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("kind", TRAINERS)
def test_alpha_0_is_the_trainer_that_it_extends(trainer, kind):
    """The same losses, and bitwise the same weights, over ten steps."""
    plain = trainer(kind, False, max_steps=10)
    plain.train()
    ours = trainer(kind, True, max_steps=10, procon_schedule="0")  # made now: GRPO draws from the global random state
    ours.train()
    losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (plain, ours)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10
    assert_same(state(plain), state(ours))


def forwards(run) -> list[int]:
    """Of each forward of the decoder that is trained: how many sequences it had."""
    found = []
    find_decoder(run.model).module.register_forward_pre_hook(
        lambda _module, args, kwargs: found.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    return found


@pytest.mark.parametrize("kind", TRAINERS)
def test_live_anchors_take_no_forward_of_their_own(trainer, kind):
    counts, penalties = [], []
    for constrained in (False, True):
        run = trainer(kind, constrained)
        seen = forwards(run)
        run.train()
        counts.append(len(seen))
        penalties = [row.get("procon/penalty") for row in run.state.log_history if "loss" in row]
    # To see whether switching the adapter off is the start: it on, and off.
    assert counts[1] == counts[0] + 2
    assert penalties[0] < 1e-9 < penalties[1]
    assert run.procon.evidence.departure <= 0.5  # rounding, of which no warning tells


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_live_and_recorded_anchors_train_alike(trainer, kind, accumulation):
    found = []
    for source in ("live", "recorded"):
        run = trainer(kind, procon_anchors=source, gradient_accumulation_steps=accumulation)
        run.train()
        found.append((state(run), [row["procon/penalty"] for row in run.state.log_history if "loss" in row]))
    torch.testing.assert_close(torch.tensor(found[0][1]), torch.tensor(found[1][1]), rtol=1e-3, atol=1e-8)
    assert found[0][1][-1] > 1e-6
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_a_reference_model_gives_the_anchors_in_full_fine_tuning(trainer, kind):
    run = trainer(kind, full=True)
    run.train()
    penalties = [row["procon/penalty"] for row in run.state.log_history if "loss" in row]
    assert penalties[0] < 1e-9 < penalties[1]
    assert run.procon.tokens.live._reference is not None
    moved = trainer(kind, full=True)
    with torch.no_grad():
        next(moved.ref_model.parameters()).add_(0.1)
    with pytest.raises(ProConError, match="the reference model has other weights than the model"):
        moved.train()


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("scope", ["all", "response", "prompt"])
def test_grpo_constrains_what_it_generates(trainer, beta, scope):
    run = trainer("GRPO", beta=beta, procon_scope=scope, max_steps=2, gradient_accumulation_steps=2)
    seen, original = [], run.procon.constraint.set_target

    def set_target(anchors, mask):
        seen.append((anchors, mask))
        original(anchors, mask)

    run.procon.constraint.set_target = set_target
    run.train()
    assert len(seen) == 4
    for anchors, mask in seen:
        assert anchors.shape == (*mask.shape, 3)
        assert torch.isfinite(anchors).all()
        assert mask.sum() > 0
    penalties = [row["procon/penalty"] for row in run.state.log_history if "loss" in row]
    assert penalties[0] < 1e-9 < penalties[1]
    assert run.procon.evidence.constrained_steps == 2


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo_constrains_each_iteration_on_what_it_generated(trainer, beta):
    run = trainer("GRPO", beta=beta, num_iterations=2, max_steps=4)
    run.train()
    penalties = [row["procon/penalty"] for row in run.state.log_history if "loss" in row]
    assert penalties[0] < 1e-9 < penalties[1]
    assert run.procon.evidence.constrained_steps == 4


@pytest.mark.parametrize("kind", TRAINERS)
def test_probes_need_nothing_of_the_data(trainer, kind):
    run = trainer(kind, procon_terms="probes", procon_probe_every=1, procon_probe_batch=2)
    run.train()
    penalties = [row["procon/penalty"] for row in run.state.log_history if "loss" in row]
    assert penalties[0] < 1e-9 < penalties[1]
    assert run.procon.evidence.constrained_steps == 3


def test_bad_input(trainer):
    with pytest.raises(ProConError, match="GRPO generates the tokens that it trains on"):
        trainer("GRPO", procon_anchors="recorded")
    for kind in TRAINERS:
        with pytest.raises(ProConError, match="neftune_noise_alpha is 5, and noise"):
            trainer(kind, neftune_noise_alpha=5.0)
