"""Anchors: recorded once, found again by content however the batch is made, and never silently missing."""

import copy
import pickle
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.data.data_collator import DataCollatorWithFlattening

from procon.anchors import AnchoredCollator, Anchors, fingerprint
from procon.anchors.store import running_precision
from procon.data import flattening_collator, padding_collator
from procon.directions import Directions, randomized
from procon.errors import ProConError
from procon.models import find_decoder
from procon.sequences import split_batch

ADDED = ("anchors", "constraint_mask")


def random_directions(blocks: int, width: int, seed: int = 0) -> Directions:
    unit = torch.nn.functional.normalize(
        torch.randn(blocks, width, generator=torch.Generator().manual_seed(seed)), dim=1
    )
    ones = torch.ones(blocks)
    return Directions(unit[:, None], ones[:, None])


@pytest.fixture
def model(tiny_model):
    return tiny_model().eval()


@pytest.fixture
def directions(model):
    decoder = find_decoder(model)
    return random_directions(len(decoder.blocks), decoder.hidden_size)


@pytest.fixture
def anchors(model, directions, samples, tokenizer, tmp_path):
    loader = DataLoader(samples, batch_size=3, collate_fn=padding_collator(tokenizer))
    return Anchors.record(model, loader, directions, tmp_path / "anchors", progress=False, scope="response")


def projections(model, directions, sample) -> torch.Tensor:
    """Projections of the tokens of one unpadded sample, by definition."""
    ids = torch.tensor([sample["input_ids"]])
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    return torch.stack([(states[block][0] @ directions.basis[block, 0]) for block in range(len(states) - 1)], -1)


def test_recorded_projections_are_those_of_the_single_samples(model, directions, samples, tokenizer, anchors):
    assert len(anchors) == len(samples)
    for sample in samples:
        batch = anchors.annotate(dict(padding_collator(tokenizer)([sample])))
        live = batch["constraint_mask"][0] > 0
        assert live.tolist() == [label != -100 for label in sample["labels"]]
        # Batched and single forwards sum in another order: a few ulp of values of order 1.
        expected = projections(model, directions, sample)[live]
        torch.testing.assert_close(batch["anchors"][0][live], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_flattened_batches_get_the_same_anchors(samples, tokenizer, anchors, side):
    tokenizer.padding_side = side
    padded = AnchoredCollator(padding_collator(tokenizer), anchors)(samples)
    flat = AnchoredCollator(flattening_collator(), anchors)(samples)
    assert padded["anchors"].shape[:2] == padded["input_ids"].shape
    assert torch.equal(padded["anchors"][padded["constraint_mask"] > 0], flat["anchors"][flat["constraint_mask"] > 0])
    assert torch.equal(
        padded["input_ids"][padded["constraint_mask"] > 0], flat["input_ids"][flat["constraint_mask"] > 0]
    )


def test_cumulative_lengths_alone_split_a_flattened_batch(samples, anchors):
    flat = dict(flattening_collator()(samples))
    lengths = np.cumsum([0, *(len(sample["input_ids"]) for sample in samples)])
    by_lengths = {"input_ids": flat["input_ids"], "labels": flat["labels"], "cu_seq_lens_q": torch.tensor(lengths)}
    assert torch.equal(anchors.annotate(by_lengths)["anchors"], anchors.annotate(flat)["anchors"])


def test_padding_that_cumulative_lengths_leave_out_is_no_sequence(samples, anchors):
    flat = dict(flattening_collator()(samples))
    lengths = np.cumsum([0, *(len(sample["input_ids"]) for sample in samples)])
    expected = anchors.annotate(flat)
    for bounds in (lengths, [*lengths, lengths[-1], lengths[-1]]):  # of fixed size, filled up with the last
        padded = {
            "input_ids": torch.nn.functional.pad(flat["input_ids"], (0, 6)),
            "labels": torch.nn.functional.pad(flat["labels"], (0, 6), value=-100),
            "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32),
        }
        found = anchors.annotate(padded)
        for name in ADDED:
            assert torch.equal(found[name][:, :-6], expected[name])
            assert not found[name][:, -6:].any()


def test_positions_may_start_anywhere(samples, anchors):
    zero, two = (
        anchors.annotate(dict(DataCollatorWithFlattening(return_tensors="pt", position_ids_start=start)(samples)))
        for start in (0, 2)
    )
    assert torch.equal(zero["anchors"], two["anchors"])
    assert zero["anchors"].any()


@pytest.mark.parametrize("scope", ["response", "prompt", "all"])
def test_padded_padding_free_and_packed_batches_of_trl_get_the_same_anchors(
    model, directions, samples, tokenizer, tmp_path, scope
):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    padding, padding_free = (
        DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=free, pad_to_multiple_of=8)
        for free in (False, True)
    )
    packed = list(trl.pack_dataset(Dataset.from_list(samples), seq_length=40, strategy="bfd"))
    assert 1 < len(packed) < len(samples)
    assert "position_ids" in padding_free(packed)
    collators = {"padded": padding, "padding-free": padding_free, "packed": padding_free}
    rows = {"padded": samples, "padding-free": samples, "packed": packed}
    for recorder in collators:
        loader = DataLoader(rows[recorder], 2, collate_fn=collators[recorder])
        anchors = Anchors.record(model, loader, directions, tmp_path / recorder, scope=scope, progress=False)
        assert len(anchors) == len(samples)
        for reader in collators:
            batch = AnchoredCollator(collators[reader], anchors)(rows[reader])
            found = {
                tuple(sequence.input_ids): [batch[name][sequence.row, sequence.span] for name in ADDED]
                for sequence in split_batch(batch)
            }
            assert len(found) == len(samples)
            tokens = 0
            for sample in samples:
                z, mask = found[tuple(sample["input_ids"])]
                labelled = torch.tensor(sample["labels"]) != -100
                live = {"response": labelled, "prompt": ~labelled, "all": torch.ones_like(labelled)}[scope]
                tokens += int(live.sum())
                assert torch.equal(mask, live.float())
                # Of unlike batches: a few ulp of values of order 1.
                torch.testing.assert_close(z[live], projections(model, directions, sample)[live], rtol=0, atol=1e-5)
            assert batch["constraint_mask"].sum() == tokens  # no padding among them


@pytest.mark.parametrize("scope", ["prompt", "all"])
def test_scope_selects_the_tokens(model, directions, samples, tokenizer, tmp_path, scope):
    loader = DataLoader(samples, batch_size=8, collate_fn=padding_collator(tokenizer))
    anchors = Anchors.record(model, loader, directions, tmp_path / scope, scope=scope, progress=False)
    batch = anchors.annotate(dict(padding_collator(tokenizer)(samples)))
    labelled = sum(label != -100 for sample in samples for label in sample["labels"])
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    assert batch["constraint_mask"].sum() == (tokens if scope == "all" else tokens - labelled)


def test_first_token_counts_as_prompt_even_if_labelled(model, directions, tokenizer, tmp_path):
    sample = {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}
    loader = DataLoader([sample], collate_fn=padding_collator(tokenizer))
    anchors = Anchors.record(model, loader, directions, tmp_path / "a", progress=False, scope="response")
    for collator in (padding_collator(tokenizer), flattening_collator()):
        assert AnchoredCollator(collator, anchors)([sample])["constraint_mask"].tolist() == [[0, 1, 1]]


def test_sequences_of_one_token_are_left_out(model, directions, tokenizer, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in ([7], [8, 9, 10], [11])]
    for collator in (padding_collator(tokenizer), flattening_collator()):
        batch = dict(collator(rows))
        assert [sequence.input_ids.tolist() for sequence in split_batch(batch)] == [[8, 9, 10]]
        anchors = Anchors.record(model, [batch], directions, tmp_path / "all", scope="all", progress=False)
        assert len(anchors) == 1
        mask = anchors.annotate(batch)["constraint_mask"]
        assert batch["input_ids"][mask > 0].tolist() == [8, 9, 10]


def test_a_sequence_without_constrained_tokens_needs_no_anchors(samples, tokenizer, anchors):
    stranger = {"input_ids": [9, 9, 9, 9], "labels": [-100] * 4}
    batch = AnchoredCollator(padding_collator(tokenizer), anchors)([samples[0], stranger])
    assert batch["constraint_mask"].sum(1).tolist() == [len(samples[0]["input_ids"]) // 3, 0]


def test_a_tokenizer_names_samples_where_the_collator_has_none(tokenizer, anchors):
    stranger = {"input_ids": tokenizer("Hello, you")["input_ids"]}
    stranger["labels"] = stranger["input_ids"]
    with pytest.raises(ProConError, match=r"starting '\[\d+, \d+"):
        AnchoredCollator(flattening_collator(), anchors)([stranger])
    with pytest.raises(ProConError, match="starting 'Hello, you' has no anchors with these labels"):
        AnchoredCollator(flattening_collator(), anchors, tokenizer=tokenizer)([stranger])


def test_unknown_sample_is_named(samples, tokenizer, anchors):
    stranger = {"input_ids": [9, 9, 9, 9], "labels": [-100, -100, 9, 9]}
    with pytest.raises(ProConError, match=r"sample of 4 tokens starting .* has no anchors with these labels") as error:
        AnchoredCollator(padding_collator(tokenizer), anchors)([samples[0], stranger])
    assert repr(tokenizer.decode([9, 9, 9, 9])) in str(error.value)


def test_changed_labels_have_no_anchors(samples, tokenizer, anchors):
    ids = samples[0]["input_ids"]
    relabelled = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    with pytest.raises(ProConError, match="has no anchors with these labels"):
        AnchoredCollator(padding_collator(tokenizer), anchors)([relabelled])


def test_recording_again_runs_nothing_and_a_grown_set_only_what_is_new(
    model, directions, samples, tokenizer, anchors, monkeypatch
):
    collator = padding_collator(tokenizer)
    rows = []
    forward = find_decoder(model).module.forward
    monkeypatch.setattr(
        find_decoder(model).module,
        "forward",
        lambda **inputs: rows.append(len(inputs["input_ids"])) or forward(**inputs),
    )
    Anchors.record(
        model, DataLoader(samples, 3, collate_fn=collator), directions, anchors.path, progress=False, scope="response"
    )
    assert rows == [1]  # of a token, which shows the precision
    extra = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    grown = Anchors.record(
        model,
        DataLoader(samples + extra, 1, collate_fn=collator),
        directions,
        anchors.path,
        progress=False,
        scope="response",
    )
    assert rows == [1, 1, 1]
    assert len(grown) == len(samples) + 1
    assert "labels" in grown.annotate(dict(collator(extra)))


def test_interrupted_recording_goes_on(model, directions, samples, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("procon.anchors.store.SHARD_BYTES", 1)  # one sequence a shard
    loader = DataLoader(samples, 1, collate_fn=padding_collator(tokenizer))

    class Stopped(Exception):
        pass

    def stopping():
        for number, batch in enumerate(loader):
            if number == 5:
                raise Stopped
            yield batch

    with pytest.raises(Stopped):
        Anchors.record(model, stopping(), directions, tmp_path / "a", progress=False, scope="response")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 5
    anchors = Anchors.record(model, loader, directions, tmp_path / "a", progress=False, scope="response")
    assert len(anchors) == len(samples)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == len(samples)


def test_other_model_state_is_refused(tiny_model, directions, samples, tokenizer, anchors):
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    loader = DataLoader(samples, 3, collate_fn=padding_collator(tokenizer))
    with pytest.raises(ProConError, match="another model state"):
        Anchors.record(model, loader, directions, anchors.path, progress=False, scope="response")


def flip(file: Path, place: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


def record(model, directions, rows, tokenizer, path) -> Anchors:
    loader = DataLoader(rows, 3, collate_fn=padding_collator(tokenizer))
    return Anchors.record(model, loader, directions, path, progress=False, scope="response")


@pytest.mark.parametrize(("name", "place"), [("*.safetensors", 3), ("*.safetensors", 300), ("anchors.json", 30)])
def test_a_damaged_folder_is_recorded_again(model, directions, samples, tokenizer, anchors, name, place):
    collator = padding_collator(tokenizer)
    expected = anchors.annotate(dict(collator(samples)))["anchors"]
    (file,) = anchors.path.glob(name)
    flip(file, place)
    with pytest.raises(ProConError, match=f"{file.name}' is damaged"):
        Anchors(anchors.path)
    with pytest.warns(UserWarning, match="is damaged .*; they are recorded again"):
        again = record(model, directions, samples, tokenizer, anchors.path)
    assert torch.equal(again.annotate(dict(collator(samples)))["anchors"], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(model, directions, samples, tokenizer, anchors.path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b"{}", b"[" * 100_000], ids=lambda content: str(content[:4])
)
def test_a_manifest_that_is_none_is_named(anchors, content):
    (anchors.path / "anchors.json").write_bytes(content)
    with pytest.raises(ProConError, match=r"anchors manifest file .*anchors.json' is damaged"):
        Anchors(anchors.path)


def test_a_file_of_another_models_anchors_is_not_used(tiny_model, directions, samples, tokenizer, tmp_path):
    """Of the same data, so that it has the same keys."""
    found = []
    for number in (0, 1):
        model = tiny_model().eval()
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1 + number)
        found.append(record(model, directions, samples, tokenizer, tmp_path / str(number)))
    (ours,), (theirs,) = (list(anchors.path.glob("*.safetensors")) for anchors in found)
    assert ours.name.split("-")[1] == theirs.name.split("-")[1]
    expected = found[1].annotate(dict(padding_collator(tokenizer)(samples)))["anchors"]
    shutil.copy(ours, theirs.parent)
    again = record(model, directions, samples, tokenizer, theirs.parent)
    assert torch.equal(again.annotate(dict(padding_collator(tokenizer)(samples)))["anchors"], expected)
    shutil.copy(ours, theirs)
    with pytest.raises(ProConError, match="or is of other anchors"):
        Anchors(theirs.parent)
    with pytest.warns(UserWarning, match="they are recorded again"):
        again = record(model, directions, samples, tokenizer, theirs.parent)
    assert torch.equal(again.annotate(dict(padding_collator(tokenizer)(samples)))["anchors"], expected)


@pytest.mark.parametrize(
    "settings",
    [{"rms_norm_eps": 0.3}, {"hidden_act": "gelu"}, {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}],
)
def test_another_configuration_of_the_same_weights_is_another_state(
    tiny_model, directions, samples, tokenizer, anchors, settings
):
    model = tiny_model(**settings).eval()
    with pytest.raises(ProConError, match="another model state"):
        record(model, directions, samples, tokenizer, anchors.path)


def test_another_precision_is_another_state(tiny_model, directions, samples, tokenizer, anchors, tmp_path):
    """Of a model that Accelerate has prepared, of autocast around the loop, and of the weights' dtype."""
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(tiny_model())
    plain, autocast = nullcontext(), torch.autocast("cpu", torch.bfloat16)
    for model, around in ((prepared, plain), (tiny_model(), autocast), (tiny_model().to(torch.bfloat16), plain)):
        with around, pytest.raises(ProConError, match="another model state or precision"):
            record(model, directions, samples, tokenizer, anchors.path)
    with autocast:
        found = record(tiny_model(), directions, samples, tokenizer, tmp_path / "bf16")
    assert record(prepared, directions, samples, tokenizer, found.path).fingerprint == found.fingerprint
    assert record(tiny_model(), directions, samples, tokenizer, anchors.path).fingerprint == anchors.fingerprint


def test_hidden_states_in_another_dtype_than_the_embedding_s(tiny_model):
    """As FSDP2 has them, which casts parameters as it gathers them."""
    model = tiny_model()
    model.model.embed_tokens.register_forward_hook(lambda *found: found[-1].bfloat16())
    model.model.layers.to(torch.bfloat16)
    model.model.norm.to(torch.bfloat16)
    assert running_precision(model) == ["torch.float32", "torch.bfloat16"]


def test_what_the_fingerprint_follows(model, directions):
    model = model.bfloat16()
    usual = fingerprint(model, directions, (0, 1), "all")
    assert usual == fingerprint(copy.deepcopy(model), directions, [0, 1], "all")
    assert len(usual) == 16
    int(usual, 16)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        next(moved.parameters())[0, 0] += 1
    others = [
        fingerprint(moved, directions, (0, 1), "all"),
        fingerprint(copy.deepcopy(model).float(), directions, (0, 1), "all"),  # the same values
        fingerprint(model, randomized(directions, 1), (0, 1), "all"),
        fingerprint(model, directions, (0, 2), "all"),
        fingerprint(model, directions, (0, 1), "response"),
    ]
    assert len({usual, *others}) == len(others) + 1


def test_the_same_sequence_again_costs_no_forward(model, directions, samples, tokenizer, tmp_path):
    forwards = []
    model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    collate = padding_collator(tokenizer)
    batches = [collate(copy.deepcopy(samples[begin:end])) for begin, end in ((0, 2), (0, 2), (1, 3), (0, 3))]
    settings = {"scope": "response", "progress": False}
    for count, given in ((3, batches), (4, batches[:2])):  # one of a token, which shows the precision
        assert len(Anchors.record(model, given, directions, tmp_path, **settings)) == 3
        assert len(forwards) == count


@pytest.mark.parametrize("blocks", [None, (0, 2), [1]])
def test_what_anchors_know_of_themselves(model, directions, samples, tokenizer, tmp_path, blocks):
    batch = padding_collator(tokenizer)(samples[:2])
    found = Anchors.record(model, [batch], directions, tmp_path, blocks=blocks, scope="prompt", progress=False)
    expected = (0, 1, 2) if blocks is None else tuple(blocks)
    assert (found.blocks, found.scope, found.k) == (expected, "prompt", 1)
    assert found.fingerprint == fingerprint(model, directions, expected, "prompt")
    assert found.annotate(batch)["anchors"].shape == (*batch["input_ids"].shape, len(expected))


def test_progress_is_shown_unless_it_is_not_wanted(model, directions, samples, tokenizer, tmp_path, capsys):
    batch = padding_collator(tokenizer)(samples[:2])
    Anchors.record(model, [batch], directions, tmp_path / "quiet", progress=False)
    assert capsys.readouterr().err == ""
    Anchors.record(model, [batch], directions, tmp_path / "shown")
    assert "anchors: 100%" in capsys.readouterr().err


def test_missing_store_is_named(tmp_path):
    with pytest.raises(ProConError, match="no anchors in"):
        Anchors(tmp_path / "nowhere")


def test_hidden_states_that_are_not_finite_stop_the_recording(model, directions, samples, tokenizer, tmp_path):
    with torch.no_grad():
        find_decoder(model).blocks[0].mlp.down_proj.weight.fill_(float("nan"))
    loader = DataLoader(samples, 3, collate_fn=padding_collator(tokenizer))
    with pytest.raises(ProConError, match="entering block 1 are NaN or infinite on the sample of"):
        Anchors.record(model, loader, directions, tmp_path / "a", progress=False, scope="response")
    assert not list((tmp_path / "a").glob("*.safetensors"))


def test_foreign_inputs_are_refused(model, directions, samples, tokenizer, tmp_path):
    batch = {**padding_collator(tokenizer)(samples), "pixel_values": torch.zeros(8, 3)}
    with pytest.raises(ProConError, match="pixel_values"):
        Anchors.record(model, [batch], directions, tmp_path / "a", progress=False, scope="response")


def test_gap_in_attention_mask_is_refused(samples, tokenizer, anchors):
    batch = dict(padding_collator(tokenizer)(samples))
    batch["attention_mask"][2, 4] = 0
    with pytest.raises(ProConError, match="attention_mask of row 2 has gaps"):
        anchors.annotate(batch)


def test_given_fingerprint_saves_the_pass_over_the_weights(
    model, directions, samples, tokenizer, tmp_path, monkeypatch
):
    state = fingerprint(model, directions, [0, 2], "all")
    monkeypatch.setattr("procon.anchors.store.weights_hash", lambda model: pytest.fail("hashed again"))
    loader = DataLoader(samples, 3, collate_fn=padding_collator(tokenizer))
    anchors = Anchors.record(
        model, loader, directions, tmp_path, blocks=[0, 2], scope="all", progress=False, state=state
    )
    assert anchors.fingerprint == state
    monkeypatch.undo()
    Anchors.record(model, loader, directions, tmp_path, blocks=[0, 2], scope="all", progress=False)


def test_collator_works_in_loader_workers(samples, tokenizer, anchors):
    collator = pickle.loads(pickle.dumps(AnchoredCollator(padding_collator(tokenizer), anchors)))
    one, two = (
        list(DataLoader(samples, 4, collate_fn=collator, num_workers=workers, multiprocessing_context=context))
        for workers, context in ((0, None), (2, "fork"))
    )
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a["anchors"], b["anchors"])


def test_runs_share_one_store(model, directions, samples, tokenizer, tmp_path):
    for part in (0, 1):
        loader = DataLoader(samples[part::2], 2, collate_fn=padding_collator(tokenizer))
        anchors = Anchors.record(model, loader, directions, tmp_path / "a", progress=False, scope="response")
    assert len(anchors) == len(samples)
    assert len(list(anchors.path.glob("*.safetensors"))) == 2
