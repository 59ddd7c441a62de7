"""The sequences of a batch come back as they went in, however it was padded, packed or flattened."""

import hashlib
import random

import numpy as np
import pytest
import torch

from procon.errors import ProConError
from procon.sequences import DECODER_INPUTS, IGNORE_INDEX, TokenSequence, check_text_only, split_batch

PAD = 3

Samples = list[tuple[list[int], list[int]]]


def samples(seed: int, count: int, shortest: int = 2) -> Samples:
    """Token ids and labels; some tokens without a label, and never all of one token."""
    make = random.Random(seed)
    found = []
    for _ in range(count):
        ids = [make.randint(5, 90) for _ in range(make.randint(shortest, 9))]
        ids[-1] = 91
        found.append((ids, [token if make.random() < 0.6 else IGNORE_INDEX for token in ids]))
    return found


def joined(row: Samples) -> tuple[list[int], list[int]]:
    ids, labels = ([token for sample in row for token in sample[part]] for part in (0, 1))
    return ids, labels


def padded(rows: list[Samples], side: str, packed: bool = False) -> dict[str, torch.Tensor]:
    """A row of each list of samples; those of a list one after the other."""
    width = max(sum(len(ids) for ids, _ in row) for row in rows) + 1
    batch = {name: [] for name in ("input_ids", "labels", "attention_mask", "position_ids")}
    for row in rows:
        ids, labels = joined(row)
        positions = [place for sample, _ in row for place in range(len(sample))]
        for name, values, filler in (
            ("input_ids", ids, PAD),
            ("labels", labels, IGNORE_INDEX),
            ("attention_mask", [1] * len(ids), 0),
            ("position_ids", positions, 0),
        ):
            padding = [filler] * (width - len(ids))
            batch[name].append(values + padding if side == "right" else padding + values)
    if not packed:
        del batch["position_ids"]
    return {name: torch.tensor(values) for name, values in batch.items()}


def flattened(row: Samples, bounds: str) -> dict[str, torch.Tensor]:
    ids, labels = joined(row)
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    lengths = [len(sample) for sample, _ in row]
    if bounds == "position_ids":
        batch["position_ids"] = torch.tensor([[place for length in lengths for place in range(length)]])
    else:
        batch["cu_seq_lens_q"] = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return batch


def assert_are(found: list[TokenSequence], expected: list[Samples], batch: dict[str, torch.Tensor]) -> None:
    """In order, of the right rows and places, the first token never a target."""
    flat = [(row, *sample) for row, samples in enumerate(expected) for sample in samples]
    assert [sequence.row for sequence in found] == [row for row, *_ in flat]
    for sequence, (row, ids, labels) in zip(found, flat, strict=True):
        assert sequence.input_ids.tolist() == ids
        assert sequence.is_response.tolist() == [False, *(label != IGNORE_INDEX for label in labels[1:])]
        assert sequence.span == slice(sequence.start, sequence.start + len(ids))
        assert batch["input_ids"][row, sequence.span].tolist() == ids


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("seed", range(4))
def test_padded(seed, side):
    rows = [samples(10 * seed + row, 1) for row in range(3)]
    batch = padded(rows, side)
    assert_are(list(split_batch(batch)), rows, batch)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("seed", range(4))
def test_packed_and_padded(seed, side):
    rows = [samples(10 * seed + row, 1 + row) for row in range(3)]
    batch = padded(rows, side, packed=True)
    assert_are(list(split_batch(batch)), rows, batch)


@pytest.mark.parametrize("bounds", ["position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("seed", range(4))
def test_flattened(seed, bounds):
    row = samples(seed, 4)
    batch = flattened(row, bounds)
    assert_are(list(split_batch(batch)), [row], batch)


def test_a_row_without_mask_or_positions_is_one_sequence():
    rows = [samples(row, 1) for row in range(2)]
    for row in rows:
        del row[0][0][2:], row[0][1][2:]  # of one length
    batch = padded(rows, "right")
    batch = {name: batch[name][:, :2] for name in ("input_ids", "labels")}
    assert_are(list(split_batch(batch)), rows, batch)


def test_rows_of_a_batch_may_not_share_bounds():
    """Bounds of a flattened row say nothing of a batch of several rows."""
    rows = [samples(row, 1) for row in range(2)]
    batch = padded(rows, "right") | {"cu_seq_lens_q": torch.tensor([0, 1, 2])}
    assert_are(list(split_batch(batch)), rows, batch)


def test_an_empty_row_is_passed_over():
    rows = [samples(1, 1), [], samples(2, 1)]
    batch = padded(rows, "right")
    assert_are(list(split_batch(batch)), rows, batch)


def test_single_tokens_are_left_out():
    row = [samples(1, 1)[0], ([7], [7]), samples(2, 1)[0], ([8], [IGNORE_INDEX]), samples(3, 1, shortest=9)[0]]
    for bounds in ("position_ids", "cu_seq_lens_q"):
        batch = flattened(row, bounds)
        assert_are(list(split_batch(batch)), [row[::2]], batch)


def test_repeated_padding_is_left_out_and_what_has_a_label_is_not():
    sample, padding = samples(1, 1)[0], ([PAD] * 4, [IGNORE_INDEX] * 4)
    laughter = ([9] * 4, [IGNORE_INDEX, 9, 9, 9])
    unlabelled = ([4, 5, 4], [IGNORE_INDEX] * 3)
    # What is left out does not end the row.
    row = [padding, sample, laughter, padding, unlabelled]
    batch = flattened(row, "position_ids")
    assert_are(list(split_batch(batch)), [[sample, laughter, unlabelled]], batch)


def test_the_batch_keeps_its_labels():
    batch = flattened([([4, 5], [4, 5]), ([6, 7], [6, 7])], "position_ids")
    before = batch["labels"].clone()
    assert len(list(split_batch(batch))) == 2
    assert torch.equal(batch["labels"], before)


@pytest.mark.parametrize(("row", "mask"), [(0, [1, 0, 1, 1]), (1, [0, 1, 0, 1])])
def test_a_mask_with_gaps_is_refused(row, mask):
    masks = [[1, 1, 1, 0], [1, 1, 1, 1]]
    masks[row] = mask
    ids = torch.arange(8).view(2, 4)
    with pytest.raises(ProConError, match=f"^attention_mask of row {row} has gaps: pad on one side only$"):
        list(split_batch({"input_ids": ids, "labels": ids, "attention_mask": torch.tensor(masks)}))


def test_what_is_refused():
    ids = torch.arange(8).view(2, 4)
    with pytest.raises(ProConError, match=r"^the batch has no 'labels': the constraint needs them"):
        list(split_batch({"input_ids": ids}))
    mask = torch.ones(2, 1, 4, 4)
    message = r"^attention_mask has shape \(2, 1, 4, 4\), input_ids \(2, 4\): pass a mask of the same shape, or none"
    with pytest.raises(ProConError, match=message):
        list(split_batch({"input_ids": ids, "labels": ids, "attention_mask": mask}))


@pytest.mark.parametrize(
    ("scope", "tokens"), [("response", [0, 0, 1, 1]), ("prompt", [1, 1, 0, 0]), ("all", [1, 1, 1, 1])]
)
def test_tokens_in_scope(scope, tokens):
    sequence = TokenSequence(0, 0, np.arange(4), np.array([False, False, True, True]))
    assert sequence.in_scope(scope).dtype == np.bool_
    assert sequence.in_scope(scope).tolist() == tokens


class TestKey:
    def test_definition(self):
        ids, response = np.array([4, 5, 600], dtype=np.int64), np.array([False, True, True])
        content = ids.tobytes() + response.tobytes()
        expected = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        assert TokenSequence(0, 0, ids, response).key() == expected
        assert TokenSequence(0, 0, ids, ~response).key() != expected

    def test_same_sequence_however_it_is_batched(self):
        rows = [samples(5, 1), samples(6, 1)]
        keys = [[sequence.key() for sequence in split_batch(padded(rows, side))] for side in ("left", "right")]
        row = [rows[0][0], rows[1][0]]
        keys += [[s.key() for s in split_batch(flattened(row, bounds))] for bounds in ("position_ids", "cu_seq_lens_q")]
        assert keys[0] == keys[1] == keys[2] == keys[3]
        assert len(set(keys[0])) == 2


class TestTextOnly:
    def test_what_a_decoder_takes(self):
        check_text_only(dict.fromkeys([*DECODER_INPUTS, "labels", "shift_labels", "num_items_in_batch"], 0))
        assert "input_ids" in DECODER_INPUTS

    def test_marks_of_text_alone_pass(self):
        check_text_only({"input_ids": torch.ones(2, 3), "mm_token_type_ids": torch.zeros(2, 3)})

    @pytest.mark.parametrize(
        ("more", "named"),
        [
            ({"mm_token_type_ids": torch.tensor([[0, 1]])}, r"\['mm_token_type_ids'\]"),
            ({"pixel_values": 0}, r"\['pixel_values'\]"),
            ({"pixel_values": 0, "audio": 0}, r"\['audio', 'pixel_values'\]"),
            ({"pixel_values": 0, "mm_token_type_ids": torch.tensor([[0, 0]])}, r"\['pixel_values'\]"),
        ],
    )
    def test_what_it_does_not_take_is_named(self, more, named):
        with pytest.raises(ProConError, match=f"^the batch has {named}, which a text decoder does not take: leave it"):
            check_text_only({"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2), **more})
