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
#: Bytes that a program can have on the GPU that has the least of those that copy ahead (sm_86, sm_89, sm_120).
SHARED = 99 * 1024


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.architecture)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("size", [8, 576, 2048, 4096, 5120, 8192, 16384])
def test_a_stream_has_room(size, itemsize, target):
    for directions in range(9):
        stream = launch.row_stream(size, itemsize, directions, target)
        case = (directions, stream)
        threads = stream.warps * target.warp_size
        assert stream.columns >= size, case
        assert 32 <= threads <= 1024, case
        assert stream.kept <= stream.held, case
        if stream.kept:  # one block of 512 threads has 128 registers for each
            assert stream.columns // threads * (5 + (itemsize > 2) + directions) <= 112, case
            assert threads <= (512 if target.family == "cuda" else 1024), case
        if stream.stages > 1:
            # All loads of the loop are copied ahead: the two rows, and directions that do not stay.
            rows = 2 + (0 if stream.kept else directions)
            assert (stream.stages - 1) * rows * stream.columns * itemsize <= SHARED, case
            assert int(target.architecture.removeprefix("sm_")) >= 80, case


@pytest.mark.parametrize("size", [576, 2048, 4096, 8192])
def test_rows_of_usual_models_stream(size):
    for directions in (0, 1, 2):
        stream = launch.row_stream(size, 2, directions, TARGETS[2])
        assert (stream.held, stream.kept, stream.stages) == (True, directions > 0, 3)
        # Two blocks of 256 threads, or as many threads in blocks of another size.
        assert stream.programs * stream.warps * 32 == 512


def test_many_directions_stay_in_registers_up_to_the_width_of_a_model_of_7b():
    assert launch.row_stream(4096, 2, 8, TARGETS[2]).kept
    assert not launch.row_stream(8192, 2, 8, TARGETS[2]).kept


def test_many_directions_are_read_once_for_two_rows():
    assert launch.forward_tile(4096, 2, 3, TARGETS[2]).rows == 1
    assert launch.forward_tile(4096, 2, 4, TARGETS[2]).rows == 2
    assert launch.forward_tile(16384, 2, 8, TARGETS[2]).rows == 1  # two would not fit the registers
