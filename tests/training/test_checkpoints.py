"""What a killed training may leave, without training: half checkpoints, and damaged ones."""

from contextlib import suppress

import pytest

from procon.errors import ProConError
from procon.method.record import RECORD, read_record, write_record
from procon.training.run_folder import has_checkpoints, latest, open_checkpoint, seal


@pytest.fixture
def sealed(tmp_path):
    """Checkpoints of the steps 2 and 10."""
    folders = [tmp_path / f"checkpoint-{step}" for step in (2, 10)]
    for folder in folders:
        (folder / "shards").mkdir(parents=True)
        for name in ("adapter_model.safetensors", "shards/0.distcp", "trainer_state.json"):
            (folder / name).write_text("{}")
        seal(folder, {"resumable": True})
    return folders


def test_half_a_checkpoint_is_none_and_a_new_training_may_begin(tmp_path):
    half = tmp_path / "checkpoint-2"
    half.mkdir()
    (half / "trainer_state.json").write_text("{}")
    write_record(half, {"complete": False})
    assert not has_checkpoints(tmp_path)
    assert latest(tmp_path) is None
    seal(half, {"resumable": True})
    assert has_checkpoints(tmp_path)
    assert latest(tmp_path).path == half


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "shards/0.distcp", RECORD])
@pytest.mark.parametrize("damage", ["missing", "cut", "another", "a folder"])
def test_a_damaged_checkpoint_is_passed_over(sealed, tmp_path, caplog, name, damage):
    first, last = sealed
    file = last / name
    text = file.read_text()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "missing":
        file.write_text(text[:-2] + ("x" if damage == "another" else ""))
    with pytest.raises(ProConError):
        open_checkpoint(last)
    assert latest(tmp_path).path == first
    assert "passed over checkpoint-10" in caplog.text


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
def test_weights_that_a_checkpoint_did_not_have_are_named(sealed, tmp_path, name):
    """transformers reads some of them before those that are checked, or in their place."""
    last = sealed[-1]
    (last / "notes.md").write_text("mine")
    assert open_checkpoint(last) == latest(tmp_path)
    (last / name).parent.mkdir(exist_ok=True)
    (last / name).write_text("{}")
    for attempt in (lambda: open_checkpoint(last), lambda: latest(tmp_path)):
        # Not passed over: training would go on from the one before, and delete the file with the checkpoint.
        with pytest.raises(ProConError, match=f"checkpoint-10/{name}' was put there after the checkpoint was saved"):
            attempt()


def test_a_checkpoint_without_the_optimiser_is_for_looking_back_alone(sealed):
    seal(sealed[0], {"resumable": False})
    with pytest.raises(ProConError, match="saved without the optimiser's state"):
        open_checkpoint(sealed[0])
    assert open_checkpoint(sealed[0], resumes=False).record["resumable"] is False


def test_every_bit_of_a_record_is_checked(tmp_path):
    write_record(tmp_path, {"schedule": "0.2"})
    file, before = tmp_path / RECORD, read_record(tmp_path)
    data = file.read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with suppress(ProConError):
            assert read_record(tmp_path) == before, f"bit {bit}"
