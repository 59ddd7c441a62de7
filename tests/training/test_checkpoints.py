"""What a killed training may leave, without training: half checkpoints, half deletions, half a card."""

import json

import pytest

from procon.method.record import RECORD, begin, read_record, write_record
from procon.training.checkpoints import Checkpoint, delete_superseded, has_checkpoints, seal


def made(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return folder


def test_half_a_checkpoint_is_none_and_a_new_training_may_begin(tmp_path):
    half = made(tmp_path / "checkpoint-2", "adapter_model.safetensors", "trainer_state.json")
    write_record(half, {"complete": False})
    assert not has_checkpoints(tmp_path)
    seal(half, {"resumable": True})
    assert has_checkpoints(tmp_path)


def test_a_plain_checkpoint_is_one(tmp_path):
    made(tmp_path / "checkpoint-2", "trainer_state.json")
    assert has_checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("limit", "left"), [(None, [2, 4, 6, 8]), (0, [2, 4, 6, 8]), (1, [6, 8]), (2, [4, 6, 8]), (3, [2, 4, 6, 8])]
)
def test_what_a_checkpoint_supersedes_is_deleted_and_never_a_later_one(tmp_path, limit, left):
    for step in (2, 4, 6, 8):
        made(tmp_path / f"checkpoint-{step}", "optimizer.pt")
    delete_superseded(Checkpoint(tmp_path / "checkpoint-6", {}), limit)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == left


@pytest.mark.parametrize("found", [{"complete": False}, {"complete": True}, None, "damaged"])
def test_the_card_of_an_interrupted_save_is_begun_again(tmp_path, found):
    folder = made(tmp_path / "out", "README.md", ".tmpa1B2c3")
    if found:
        (folder / RECORD).write_text(found if found == "damaged" else json.dumps(found))
    begin(folder, {"version": "1"})
    assert read_record(folder) == {"version": "1", "complete": False}
    kept = found in ({"complete": True}, None)
    assert (folder / "README.md").exists() == (folder / ".tmpa1B2c3").exists() == kept
