"""How the kernels are launched: what a program of RMSNorm backward keeps, and what it copies ahead, has room."""

import pytest

pytest.importorskip("triton", reason="the kernels are written in it")

from procon.kernels import launch

TARGETS = [
    launch.Target("sm_75", 32, 40),
    launch.Target("sm_80", 32, 108),
    launch.Target("sm_90", 32, 132),
    launch.Target("sm_120", 32, 170),
    launch.Target("gfx942", 64, 304),
]
#: Widths of models.
MODELS = (576, 896, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)
#: Bytes that a program can have on the GPU that has the least of those that copy ahead (sm_86, sm_89, sm_120).
SHARED = 99 * 1024


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.architecture)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("size", [8, 576, 2048, 4096, 5120, 8192, 16384])
def test_a_stream_has_room(size, itemsize, target):
    for directions in range(9):
        stream = launch.row_stream(size, itemsize, directions, target)
        case = (directions, stream)
        columns, threads = stream.taken.columns, stream.taken.threads
        assert columns >= size, case
        assert 32 <= threads <= 1024, case
        assert stream.kept <= stream.held, case
        if stream.kept:  # one block of 512 threads has 128 registers for each
            assert columns // threads * (5 + (itemsize > 2) + directions) <= 112, case
            assert threads <= (512 if target.family == "cuda" else 1024), case
        if stream.stages > 1:
            # All loads of the loop are copied ahead: the two rows, and directions that do not stay.
            rows = 2 + (0 if stream.kept else directions)
            assert (stream.stages - 1) * rows * columns * itemsize <= SHARED, case
            assert int(target.architecture.removeprefix("sm_")) >= 80, case


@pytest.mark.parametrize("size", MODELS)
def test_rows_of_usual_models_stream(size):
    for directions in (0, 1, 2):
        stream = launch.row_stream(size, 2, directions, TARGETS[2])
        assert (stream.taken.rows, stream.held, stream.kept, stream.stages) == (1, True, directions > 0, 3)
        # Two blocks of 256 threads, or as many threads in blocks of another size.
        assert stream.programs * stream.taken.threads == 512


@pytest.mark.parametrize("directions", [1, 4, 8])
@pytest.mark.parametrize("size", MODELS)
def test_no_lane_is_idle(size, directions):
    for itemsize in (2, 4):
        forward = launch.forward_rows(size, itemsize, directions, TARGETS[2])
        backward = launch.row_stream(size, itemsize, directions, TARGETS[2]).taken
        for each in (forward, backward):
            assert each.columns - size <= 0.1 * each.columns, each
            assert {width * itemsize for _, width in each.pieces} <= {2, 4, 8, 16}, each
        patch = launch.patch_tile(size)
        assert -size % patch.columns <= 0.1 * size, patch


@pytest.mark.parametrize(("size", "itemsize"), [(1, 2), (7, 4), (333, 2), (3585, 4), (32768, 2)])
def test_pieces_make_a_row(size, itemsize):
    for threads in (32, 256, 1024):
        pieces = launch.cut(size, threads, itemsize)
        ends = [first + threads * width for first, width in pieces]
        assert [0, *ends[:-1]] == [first for first, _ in pieces]
        assert ends[-1] >= size > pieces[-1][0]


def test_many_directions_stay_in_registers_up_to_the_width_of_a_model_of_7b():
    assert launch.row_stream(4096, 2, 8, TARGETS[2]).kept
    assert not launch.row_stream(8192, 2, 8, TARGETS[2]).kept


def test_many_directions_are_read_once_for_several_rows():
    assert launch.forward_rows(4096, 2, 3, TARGETS[2]).rows == 1
    assert launch.forward_rows(4096, 2, 4, TARGETS[2]).rows == 4
    assert launch.forward_rows(16384, 2, 8, TARGETS[2]).rows == 1  # more would not fit the registers
    assert launch.row_stream(5120, 2, 8, TARGETS[2]).taken.rows == 2


@pytest.mark.parametrize("size", MODELS)
def test_sums_for_the_weight_are_few_bytes(size):
    """Of few rows the tensors are read again from the cache; of many, each program adds up many of them."""
    stream = launch.row_stream(size, 2, 1, TARGETS[2])
    for rows in (1, 37, 320, 1024, 16384):
        assert 8 * launch.summing_programs(rows, size, 2, stream, TARGETS[2]) <= 0.1 * 3 * 2 * rows
        tile = launch.sum_tile(size, TARGETS[2])
        assert -(-size // tile.columns) >= min(132, size // 16)
        assert 1 <= launch.sum_splits(rows, size, tile, TARGETS[2]) <= max(1, rows // tile.rows)
