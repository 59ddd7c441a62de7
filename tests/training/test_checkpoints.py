"""What a killed training may leave, without training: half checkpoints, half deletions, half a card."""

import json
from contextlib import suppress

import pytest

from procon.errors import ProConError
from procon.method.record import RECORD, begin, read_record, write_record
from procon.training.checkpoints import Checkpoint, delete_superseded, has_checkpoints, latest, open_checkpoint, seal
from procon.version import __version__


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
    "name",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "scaler.pt",
        "rng_state.pth",
        "other/adapter_model.safetensors",
        "pytorch_model_fsdp_0/__0_0.distcp",
    ],
)
def test_weights_that_a_checkpoint_did_not_have_are_named(tmp_path, name):
    """transformers reads some of them before those that are checked, or in their place."""
    for step in (2, 4):
        place = made(tmp_path / f"checkpoint-{step}", "adapter_model.safetensors", "trainer_state.json")
        seal(place, {"resumable": True})
    (place / "notes.md").write_text("mine")
    assert open_checkpoint(place) == latest(tmp_path)
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_text("{}")
    for attempt in (lambda: open_checkpoint(place), lambda: latest(tmp_path)):
        # Not passed over: training would go on from the one before, and delete the file with the checkpoint.
        with pytest.raises(ProConError, match=f"checkpoint-4/{name}' was put there after the checkpoint was saved"):
            attempt()


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


def test_no_bit_of_the_checksum_makes_a_record_one_of_an_older_version(tmp_path):
    write_record(tmp_path, {"version": __version__, "schedule": "0.2"})
    file, before = tmp_path / RECORD, read_record(tmp_path)
    data = file.read_bytes()
    start = data.index(b'"checksum"')
    for bit in range(8 * start, 8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with suppress(ProConError):
            assert read_record(tmp_path) == before, f"bit {bit}"
