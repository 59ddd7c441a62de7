"""A training's anchors: where they lie, that a resumed training finds them, and what it is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from procon.anchors.starting_state import StartingState, check_resumed, require_length
from procon.data import padding_collator
from procon.errors import ProConError


@pytest.fixture
def recorded(tiny_model, tokenizer, random_directions, samples, tmp_path):
    """``recorded(precision)``: those of a tiny model under ``out``."""
    model = tiny_model()
    loader = [padding_collator(tokenizer)(samples[:2])]

    def record(precision: str = "no", scope: str = "all", blocks=(0, 2)):
        settings = {"blocks": blocks, "scope": scope, "precision": precision, "progress": False}
        state = StartingState(None, tmp_path / "out")
        return state.record(model, loader, random_directions(model), **settings)

    return record


def test_the_folder_is_the_users_or_one_that_is_not_published(tmp_path):
    assert StartingState(None, tmp_path).root == tmp_path / "_anchors"
    assert StartingState(None, str(tmp_path)).root == tmp_path / "_anchors"
    assert StartingState("mine", tmp_path).root == Path("mine")
    assert StartingState(Path("mine"), tmp_path).root == Path("mine")


def test_recorded_anchors_are_found_again(recorded, tmp_path):
    found = recorded()
    assert Path(found.path).parent == tmp_path / "out" / "_anchors"
    assert (found.blocks, found.scope) == ((0, 2), "all")
    again = StartingState(None, tmp_path / "out").reopen(Path(found.path).name)
    assert again.fingerprint == found.fingerprint == Path(found.path).name
    assert len(again) == len(found) == 2


def test_each_state_has_a_folder(recorded):
    folders = [recorded().path, recorded(precision="bf16").path, recorded(scope="response").path]
    folders += [recorded(blocks=(0, 1)).path, recorded().path]
    assert len(set(folders)) == 4
    assert folders[0] == folders[-1]


def test_others_under_the_same_name_are_refused(recorded, tmp_path):
    one, other = recorded(), recorded(precision="bf16")
    shutil.rmtree(one.path)
    shutil.copytree(other.path, one.path)
    message = rf"^anchors in '.*' have the fingerprint {other.fingerprint}: they were put there from another folder"
    with pytest.raises(ProConError, match=message):
        StartingState(None, tmp_path / "out").reopen(one.fingerprint)
    with pytest.raises(ProConError):
        StartingState(None, tmp_path / "out").reopen("no such state")


def test_a_resumed_training_has_the_settings_of_the_one_before():
    kept = {"alpha": 0.2, "scope": "all", "nothing": None, "of no concern": 1}
    check_resumed(kept, {"alpha": 0.2, "scope": "all", "nothing": None}, "checkpoint-4")
    check_resumed(kept, {}, "checkpoint-4")
    with pytest.raises(ProConError, match=r"^checkpoint-4 was trained with scope 'all', not 'response': resume with"):
        check_resumed(kept, {"alpha": 0.2, "scope": "response"}, "checkpoint-4")
    with pytest.raises(ProConError, match=r"^checkpoint-4 was trained with penalty None, not 'huber': resume with"):
        check_resumed(kept, {"penalty": "huber"}, "checkpoint-4")
    check_resumed(json.loads(json.dumps(kept)), kept, "checkpoint-4")


def test_a_stream_is_refused():
    require_length([], "training set")
    require_length(torch.utils.data.TensorDataset(torch.zeros(3)), "training set")
    for stream in (None, iter([1, 2])):
        with pytest.raises(ProConError, match=r"^recorded anchors need a training set with a length: "):
            require_length(stream, "training set")
