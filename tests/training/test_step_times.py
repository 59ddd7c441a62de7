"""Times of steps are without what callbacks measure beside them, and rows of one callback keep to its own values."""

import time
from types import SimpleNamespace

import pytest
from transformers import ProgressCallback

from procon.data import padding_collator
from procon.training import ProConConfig
from procon.training.callbacks import ProbeCallback
from procon.training.console import leave_out_of_bar
from procon.training.trainer import ProConTrainer


class Slow(ProbeCallback):
    """Takes a fifth of a second at the start and at each step."""

    def begin(self, args, state) -> None:
        time.sleep(0.2)

    def measure(self) -> dict[str, float]:
        time.sleep(0.2)
        return {"slow": 1.0}


class Collecting(ProConTrainer):
    """Adds to its rows what it has collected since the last one, as TRL's SFTTrainer does."""

    collected = 0

    def compute_loss(self, *args, **kwargs):
        self.collected += 1
        return super().compute_loss(*args, **kwargs)

    def log(self, logs, *args, **kwargs) -> None:
        logs["collected"], self.collected = self.collected, 0
        super().log(logs, *args, **kwargs)


@pytest.fixture
def trained(tiny_model, tokenizer, tmp_path):
    ids = [[1, 2, 3, 4, 5, 6]] * 8
    rows = [{"input_ids": row, "labels": row} for row in ids]
    config = ProConConfig(
        output_dir=str(tmp_path),
        procon_schedule="0",
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    made = Collecting(
        tiny_model(),
        config,
        train_dataset=rows,
        data_collator=padding_collator(tokenizer),
    )
    made.add_callback(Slow(made, tokenizer, steps=1))
    made.output = made.train()
    return made


def test_probes_are_left_out(trained):
    """Of four times a fifth of a second, all are beside the training's time."""
    last = trained.state.log_history[-1]
    assert last["probe_seconds"] >= 0.8
    assert last["train_runtime"] == trained.output.metrics["train_runtime"]
    assert last["train_steps_per_second"] == pytest.approx(3 / last["train_runtime"], rel=0.01)
    assert last["step_cpu_seconds"] > 0
    assert last["step_seconds"] <= last["train_runtime"] / 2  # the median of three: two are as long or longer
    assert len(trained._step_times.seconds) == 3


def test_a_probe_takes_nothing_from_other_rows(trained):
    rows = trained.state.log_history
    assert [row["collected"] for row in rows if "loss" in row] == [1, 1, 1]
    assert all("collected" not in row for row in rows if "slow" in row)


def test_the_bar_counts_training_alone():
    bar = ProgressCallback()
    bar.training_bar = SimpleNamespace(start_t=1.0, last_print_t=2.0)
    handler = SimpleNamespace(callbacks=[bar, ProgressCallback(), object()])
    leave_out_of_bar(SimpleNamespace(callback_handler=handler), 5.0)
    assert (bar.training_bar.start_t, bar.training_bar.last_print_t) == (6.0, 7.0)
