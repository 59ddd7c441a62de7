"""What reaches the experiment trackers, read back from what each of them wrote."""

import json
import math
import struct
from collections.abc import Iterator

import pytest
from transformers import Trainer, TrainerCallback

from procon.chat import builtin_prompts
from procon.training import DriftCallback, JsonlCallback

#: What drift is logged as, of a model of three blocks of which the first has no direction.
DRIFT = {
    "train/procon/drift_cos",
    "train/procon/drift_cos_block/01",
    "train/procon/drift_cos_block/02",
    "train/procon/drift_shift_malicious",
    "train/procon/drift_shift_benign",
}
#: As trackers show them: transformers puts `train/` before what has no `eval_`.
NAMES = {"train/loss", "train/procon/alpha", "train/procon/penalty", "eval/loss", "train/procon/drift_gate"} | DRIFT


class Stop(TrainerCallback):
    """As if killed while it runs the step after ``step``: what was logged is on disk, nothing is cleaned up."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def make(make_trainer, tokenizer):
    """``make(base="Trainer", **settings)``: a constrained trainer of six steps that logs, probes and evaluates.

    Any drift falls below its gate, and ``first`` are callbacks to come before the probe.
    """
    prompts = builtin_prompts("extraction").first(2)

    def build(base: str = "Trainer", *, first=(), gate=0.9999, **settings) -> Trainer:
        six = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
        trainer = make_trainer(base, "1@4steps,0", **{**six, **settings})
        for callback in (*first, DriftCallback(trainer, tokenizer, steps=2, prompts=prompts, gate=gate)):
            trainer.add_callback(callback)
        return trainer

    return build


def series(rows: list[dict], name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in rows if name in row}


def expected(trainer) -> dict[str, dict[int, float]]:
    """What the trainer logged, by the trackers' names."""
    found = {}
    for name in NAMES:
        own = name.removeprefix("train/").replace("eval/", "eval_")
        found[name] = series(trainer.state.log_history, own)
    assert list(found["train/loss"]) == [1, 2, 3, 4, 5, 6]  # those of probed steps, too
    assert list(found["train/procon/alpha"].values()) == [1, 1, 1, 1, 0, 0]
    assert list(found["train/procon/penalty"]) == [1, 2, 3, 4]
    assert all(list(found[name]) == [0, 2, 4, 6] for name in DRIFT)
    assert found["train/procon/drift_gate"] == {2: 1}
    assert list(found["eval/loss"]) == [3, 6]
    return found


@pytest.mark.parametrize("base", ["Trainer", "SFTTrainer"])
def test_tensorboard(make, tmp_path, monkeypatch, base):
    reason = "tensorboard comes with the extra `trackers`"
    pytest.importorskip("tensorboard", reason=reason)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make(base, report_to=["tensorboard"])
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for name, values in expected(trainer).items():
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(values, rel=1e-6), name  # it keeps fp32


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format, as W&B keeps a run: blocks of 32 KiB, and a record in one part or more."""
    block, header = 32768, struct.Struct("<IHB")  # checksum, length, and 1 whole, 2 first, 3 middle or 4 last
    at, parts = header.size, b""  # W&B's own header is as long as a record's
    while at + header.size <= len(data):
        if block - at % block < header.size:
            at += block - at % block
            continue
        _, length, kind = header.unpack_from(data, at)
        at += header.size
        parts += data[at : at + length]
        at += length
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.parametrize("base", ["Trainer", "SFTTrainer"])
def test_wandb_offline(make, tmp_path, monkeypatch, base):
    wandb = pytest.importorskip("wandb", reason="wandb comes with the extra `trackers`")
    from wandb.proto import wandb_internal_pb2

    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONFIG_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer = make(base, report_to=["wandb"])
    trainer.train()
    wandb.finish()
    wandb.teardown()  # or the next run of this process would be kept where this one was

    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({**row, "step": row.get("train/global_step")})
    for name, values in expected(trainer).items():
        assert series(rows, name) == pytest.approx(values), name


@pytest.mark.parametrize("base", ["Trainer", "SFTTrainer"])
def test_json_lines(make, tmp_path, base):
    trainer = make(base)
    trainer.add_callback(JsonlCallback())
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    for name, values in expected(trainer).items():
        assert series(rows, name) == values, name
    assert len(rows) == len(trainer.state.log_history)


@pytest.mark.parametrize("first", ["probe", "log"])
def test_json_lines_of_a_resumed_run_have_no_step_twice(make, tmp_path, first):
    def trainer(*callbacks, **settings):
        log = JsonlCallback(tmp_path / "logs" / "run.jsonl")
        # A resumed run that is below its gate warns again.
        made = make(first=[log] if first == "log" else [], gate=None, **settings)
        for callback in [*([log] if first == "probe" else []), *callbacks]:
            made.add_callback(callback)
        return made

    file = tmp_path / "logs" / "run.jsonl"
    trainer().train()
    whole = [json.loads(line) for line in file.read_text().splitlines()]

    with pytest.raises(KeyboardInterrupt):
        trainer(Stop(5), save_steps=3).train()
    steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert steps[0] == 0  # the run's own: the one before is gone
    assert steps[-1] == 4  # past the checkpoint of step 3
    file.write_text(file.read_text()[:-7])  # as a kill in the middle of a line leaves it
    # Not from the last: that is the whole run's.
    trainer(save_steps=3).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    resumed = [json.loads(line) for line in file.read_text().splitlines()]

    def comparable(rows):  # all but timings, and what the Trainer averages over the resumed part alone
        timed = ("runtime", "per_second", "_seconds", "train_loss", "total_flos")
        return [{k: v for k, v in row.items() if not any(word in k for word in timed)} for row in rows]

    assert comparable(resumed) == comparable(whole)


def test_probes_leave_trls_own_metrics_to_the_rows_of_the_loss(make):
    trainer = make("SFTTrainer")
    trainer.train()
    rows = trainer.state.log_history
    steps = {row["step"] for row in rows if "procon/drift_cos" in row}
    assert steps & {row["step"] for row in rows if "loss" in row}
    for row in rows:
        assert ("mean_token_accuracy" in row) == ("loss" in row)
        assert ("entropy" in row) == ("loss" in row)


def test_json_lines_are_strict_json(make, tmp_path):
    trainer = make(max_steps=1, eval_strategy="no", save_strategy="no")
    trainer.add_callback(JsonlCallback())
    trainer.train()
    trainer.log({"loss": math.nan, "eval_top": math.inf})

    def refuse(constant):
        raise AssertionError(constant)

    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    last = json.loads(lines[-1], parse_constant=refuse)
    assert last["train/loss"] is None
    assert last["eval/top"] is None


def test_progress_shows_the_penalty(make, capsys):
    make(disable_tqdm=False, max_steps=2, eval_strategy="no", save_strategy="no").train()
    shown = capsys.readouterr().out
    assert shown.count("'procon/penalty'") == 2
    assert "'procon/alpha': '1'" in shown
    assert shown.count("'procon/drift_cos'") == 2
