"""Sharded or not, two gloo ranks train as one process does; what would go wrong is refused on every rank."""

import itertools
import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from forked import run_python, run_ranks

from procon.data import padding_collator
from procon.directions import Directions
from procon.errors import ProConError
from procon.training import ProConConfig, ProConTrainer

WORKERS = Path(__file__).parents[1] / "workers"

#: By case, what shows that it ran as it says: Accelerate's kind of set-up, the classes of a parameter and of a block.
SHARDED = {
    "ddp": ("MULTI_CPU", "Parameter", "LlamaDecoderLayer"),
    "ddp_resumed": ("MULTI_CPU", "Parameter", "LlamaDecoderLayer"),
    "fsdp2": ("FSDP", "DTensor", "FSDPLlamaDecoderLayer"),
    "fsdp2_resumed": ("FSDP", "DTensor", "FSDPLlamaDecoderLayer"),
    "fsdp2_checkpointed": ("FSDP", "DTensor", "FSDPCheckpointWrapper"),
    "fsdp2_lora": ("FSDP", "DTensor", "FSDPLlamaDecoderLayer"),
    "ddp_live": ("MULTI_CPU", "Parameter", "LlamaDecoderLayer"),
    "fsdp2_lora_live": ("FSDP", "DTensor", "FSDPLlamaDecoderLayer"),
    "ddp_probes": ("MULTI_CPU", "Parameter", "LlamaDecoderLayer"),
    "fsdp2_probes": ("FSDP", "DTensor", "FSDPLlamaDecoderLayer"),
    "fsdp2_main_only": ("FSDP", "DTensor", "FSDPLlamaDecoderLayer"),
    "fsdp2_at_load": ("MULTI_NPU", "DTensor", "FSDPLlamaDecoderLayer"),
    "tensor_parallel": ("MULTI_NPU", "DTensor", "LlamaDecoderLayer"),
    "context_parallel": ("FSDP", "DTensor", "FSDPLlamaDecoderLayer"),
    "zero2": ("DEEPSPEED", "Parameter", "LlamaDecoderLayer"),
    "zero2_probes": ("DEEPSPEED", "Parameter", "LlamaDecoderLayer"),
    "zero2_bfloat16": ("DEEPSPEED", "Parameter", "LlamaDecoderLayer"),
    "zero3": ("DEEPSPEED", "Parameter", "LlamaDecoderLayer"),
    "zero3_lora": ("DEEPSPEED", "Parameter", "LlamaDecoderLayer"),
    "zero3_lora_live": ("DEEPSPEED", "Parameter", "LlamaDecoderLayer"),
}
LIVE = {"ddp_live", "fsdp2_lora_live", "zero3_lora_live"}
PROBES = {"ddp_probes", "fsdp2_probes", "tensor_parallel", "zero2_probes"}
#: Cases of three steps; the others have all ten, in two epochs.
SHORT = {"fsdp2_lora", "fsdp2_main_only", "fsdp2_at_load", "context_parallel", "zero3_lora"}
SHORT |= LIVE | PROBES
#: The run on one rank that a case is compared with, if not with the one under ProCon_s.
EXPECTED = {"fsdp2_checkpointed": "ddp_warm_up", "zero3": "ddp_warm_up"}
EXPECTED |= {case: "lora" for case in SHORT if "lora" in case} | dict.fromkeys(PROBES, "probes")

#: By case, a part of what every rank reports.
REFUSED = {
    "probes_reentrant": "the ranks would no longer train one model: set use_reentrant=False",
    "probes_beyond_the_batch": "set ddp_find_unused_parameters=False, or procon_terms 'tokens'",
    "not_a_number": "penalty became nan by step 1",
    "zero3_probes": "probes are a second one: take procon_terms",
    "live_copies": "the starting model cannot be copied, as its parameters are sharded",
    "first_version": "set version 2 in fsdp_config",
    "partitioned_extraction": "extract directions beforehand",
    "ulysses": "use context parallelism",
}


def launch(folder: Path, ranks: int, cases: list[str], *, group: bool = True) -> dict:
    """What ``workers/trainer.py`` finds."""
    script = [WORKERS / "trainer.py", folder, *cases]
    if group:
        run_ranks(ranks, *script)
    else:
        run_python(*script)
    return json.loads((folder / f"{ranks}.json").read_text())


def steps(found: dict) -> list[dict]:
    """Of a run's log, what the steps had."""
    names = ("loss", "procon/penalty", "procon/alpha")
    return [{name: row[name] for name in names if name in row} for row in found["log"] if "loss" in row]


def drift(found: dict) -> list[float]:
    return [row["procon/drift_cos"] for row in found["log"] if "procon/drift_cos" in row]


def assert_same_run(case: str, found: dict, expected: dict) -> None:
    assert "error" not in found, f"{case}: {found['error']}"
    assert (found["kind"], found["parameter"], found["block"]) == SHARDED[case], case
    assert found["fused"] == [0, 1, 2], case
    assert found["target"] == ["torch.float32", False], case
    if case not in LIVE:
        assert found["recorded"] == 40, case
        assert found["fingerprint"] == expected["fingerprint"], case
    wanted = steps(expected)[: 3 if case in SHORT else 10]
    assert len(steps(found)) == len(wanted), case
    for ours, theirs in zip(steps(found), wanted, strict=True):
        # Squared rounding errors, as long as nothing has moved.
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-12), case


def assert_same_gradients(found: dict[tuple, dict]) -> None:
    """Of ``workers/constraint.py``."""

    def assert_same(case: tuple, expected: tuple) -> None:
        assert found[case]["fused"] == ((0, 1, 2) if case[1] == "auto" else ()), case
        gradient, wanted = found[case]["gradient"], found[expected]["gradient"]
        # The fused norm computes in float64, transformers' own in float32 within a float64 model.
        assert (gradient - wanted).norm() <= 1e-6 * wanted.norm(), case

    for world, fuse, checkpointed in itertools.product((1, 2), ("auto", "never"), (False, True)):
        assert_same((f"{world} by fully_shard", fuse, checkpointed), ("1 by fully_shard", "never", False))

    penalty = found["plain", "never"]["penalty"]
    assert penalty > 0.1
    for fuse in ("auto", "never"):
        for placement in ("plain", "replicated", "rows", "tokens"):
            assert_same((placement, fuse), ("plain", "never"))
            assert found[placement, fuse]["penalty"] == pytest.approx(penalty, rel=1e-9)
        for placement, name in (("width", "S(2)"), ("partial", "P(sum)")):
            assert f"block 0 got hidden states with placement {name}" in found[placement, fuse]["refused"]


# The oldest torch restores no optimiser on the numbered CPUs that stand for GPUs here, and its DTensor lacks a rule for
# the views of tensor parallelism.
@pytest.mark.newest
@pytest.mark.slow
def test_two_ranks_train_as_one_does(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "probes.txt").write_text("one\nand another\nthe third of them\n")
    zero = find_spec("deepspeed") is not None

    def among(cases: list[str]) -> list[str]:
        needs_deepspeed = ("zero", "partitioned", "ulysses")
        return [case for case in cases if zero or not case.startswith(needs_deepspeed)]

    one = launch(tmp_path, 1, ["ddp", "ddp_warm_up", "lora", "probes"], group=False)
    others = ["without_trainer", "extracted_once", *REFUSED]
    cases = [*(SHARDED.keys() - {"fsdp2_resumed"}), *others]
    two = launch(tmp_path, 2, among(cases))
    fewer = launch(tmp_path, 1, among(["ddp_resumed", "fsdp2_resumed", "zero2_resumed"]))
    assert not {case: found["error"] for case, found in {**one, **two}.items() if "error" in found}

    # The warning that the penalty acts more or less strongly than alpha says is not for any of these.
    strengths = [value for found in {**one, **two}.values() for value in found.get("strength", ())]
    assert [value for value in strengths if not math.isnan(value) and value != pytest.approx(1, rel=1e-2)] == []
    assert sum(value == value for value in strengths) > 10

    penalties = [row["procon/penalty"] for row in steps(one["ddp"])]
    assert penalties[0] < 1e-12 < 1e-6 < penalties[-1]
    assert [row["procon/alpha"] for row in steps(one["ddp_warm_up"])] == [100.0] * 5 + [0.0] * 5

    for case in among(sorted(SHARDED.keys() - {"fsdp2_resumed", "zero2_bfloat16"})):
        assert two[case]["ranks"] == 2
        assert_same_run(case, two[case], one[EXPECTED.get(case, "ddp")])
    # Of all micro-batches and ranks, and unlike those that are logged not rounded.
    for live, recorded in (("ddp_live", "ddp"), ("fsdp2_lora_live", "fsdp2_lora"), ("zero3_lora_live", "zero3_lora")):
        if live in two:
            for ours, theirs in zip(two[live]["losses"], two[recorded]["losses"], strict=True):
                assert ours == pytest.approx(theirs[: len(ours)], rel=1e-6), live
    assert drift(one["ddp"])[0] == pytest.approx(1)
    assert drift(one["ddp"])[-1] < 0.99
    assert drift(two["fsdp2"]) == pytest.approx(drift(one["ddp"]), rel=1e-3)
    assert two["fsdp2_at_load"]["cosine"] == pytest.approx([1, 1], abs=1e-6)

    for case in ("ddp_resumed", "fsdp2_resumed"):
        assert fewer[case]["ranks"] == 1
        assert_same_run(case, fewer[case], one["ddp"])

    assert_same_gradients(torch.load(tmp_path / "gradients.pt"))

    assert two["extracted_once"]["hashes"] == [two["extracted_once"]["expected"]] * 2
    assert two["extracted_once"]["errors"] == ["no refusals"] * 2
    for case in among(list(REFUSED)):
        assert len(two[case]["errors"]) == 2
        assert all(REFUSED[case] in error for error in two[case]["errors"]), two[case]

    if not zero:
        pytest.skip("all but ZeRO is as it should be: DeepSpeed is not installed")
    # Its model is another, rounded.
    bfloat16 = two["zero2_bfloat16"]
    assert bfloat16["target"] == ["torch.float32", False]
    assert steps(bfloat16)[0]["procon/penalty"] < 1e-12
    assert "DP world size of 2 but the current world size is 1" in fewer["zero2_resumed"]["error"]


def test_resume_with_steps_of_another_size_is_refused(tiny_model, tokenizer, tmp_path):
    unit = torch.nn.functional.normalize(torch.ones(3, 32), dim=1)
    rows = [{"input_ids": [5, 6, 7, number], "labels": [-100, -100, 7, number]} for number in range(10, 18)]

    def trainer(batch_size: int, schedule: str) -> ProConTrainer:
        return ProConTrainer(
            tiny_model(),
            ProConConfig(
                output_dir=str(tmp_path),
                procon_terms="tokens",
                procon_schedule=schedule,
                per_device_train_batch_size=batch_size,
                max_steps=3,
                save_steps=2,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
            ),
            directions=Directions(unit[:, None], torch.ones(3, 1)),
            train_dataset=Dataset.from_list(rows),
            data_collator=padding_collator(tokenizer),
            processing_class=tokenizer,
        )

    trainer(4, "procon_wu:1@1ep").train()
    with pytest.raises(ProConError, match=r"trained with samples_per_step 4, not 2: keep ranks times batch size"):
        trainer(2, "procon_wu:1@1ep").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
