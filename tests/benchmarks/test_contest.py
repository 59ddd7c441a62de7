"""What the static contest counts, on kernels of which is known what they do; and its record and page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.audit.contest import assembly, ttgir
from benchmarks.audit.contest.page import PAGE, page
from benchmarks.audit.contest.record import SIDES, kept, rounded
from benchmarks.audit.contest.roofline import estimate
from benchmarks.audit.contest.table import shape_of

ROOT = Path(__file__).parents[2]
#: What is built again, to compare the record with it.
CALL, TARGET, SIZE = "fused backward", "sm_90", 4096


def output(*command: str | Path) -> str:
    # Triton chooses between compiler and interpreter when a kernel is declared.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def counted():
    return json.loads(output("-m", "tests.workers.contest_kernels"))


@pytest.mark.slow
class TestCounts:
    def test_rows_and_turns(self, counted):
        for name, rows in (("plain", 1), ("laid again", 2), ("in pieces", 1)):
            assert counted[name]["rows_per_turn"] == rows
            assert counted[name]["rows_per_turn"] * counted[name]["turns"] * counted[name]["programs"] == 1000

    def test_bytes(self, counted):
        plain = counted["plain"]
        # Each of 8 programs loads the weight once for its 125 rows.
        assert plain["loaded_bytes_per_row"] == {"x": 2048, "norm_weight": 8 * 2048 / 1000}
        assert plain["stored_bytes_per_row"] == {"y": 2048}
        assert plain["memory_bytes"] == 2 * 1000 * 2048 + 2048
        assert counted["padded"]["loaded_bytes_per_row"] == {"x": 1152, "norm_weight": 8 * 1152 / 1000}
        assert counted["in pieces"]["loaded_bytes_per_row"] == {"x": 2 * 8192}
        assert counted["in pieces"]["memory_bytes"] == 2 * 1000 * 8192

    def test_what_is_copied_ahead_is_counted_once(self, counted):
        plain, prefetched = counted["plain"], counted["prefetched"]
        assert (plain["asynchronous_copies_in_loop"], plain["asynchronous_bytes_in_loop"]) == (0, 0)
        # 16 bytes for each of 128 threads.
        assert (prefetched["asynchronous_copies_in_loop"], prefetched["asynchronous_bytes_in_loop"]) == (1, 2048)
        assert prefetched["loaded_bytes_per_row"] == plain["loaded_bytes_per_row"]
        assert prefetched["shared_bytes"] >= plain["shared_bytes"] + 2048

    def test_shared_loads_and_relayouts(self, counted):
        assert counted["plain"]["loads_in_loop"] == {}
        assert counted["weight in the loop"]["loads_in_loop"] == {"norm_weight": 1}
        assert counted["weight in the loop"]["loaded_bytes_per_row"]["norm_weight"] == 2048
        assert counted["laid again"]["wide_relayouts_in_loop"] == 1
        assert counted["plain"]["wide_relayouts_in_loop"] == 0

    def test_sums(self, counted):
        # Over 32 lanes and then over 4 warps: five shuffles and two.
        assert counted["plain"]["shuffles_in_loop"] == 7
        assert counted["two sums"]["shuffles_in_loop"] == 14
        assert counted["two sums"]["barriers_in_loop"] > counted["plain"]["barriers_in_loop"] > 0
        assert counted["in pieces"]["barriers_in_loop"] == counted["in pieces"]["barriers_per_row"] > 0
        # Two loops of 32 turns, in each of which four warps load, convert and add, or multiply, convert and store.
        assert counted["in pieces"]["instructions_per_row"] > 4 * 32 * (3 + 3)
        assert counted["two sums"]["instructions_per_row"] > counted["plain"]["instructions_per_row"] > 4 * 8

    def test_spills(self, counted):
        assert counted["plain"]["spilled_bytes"] == 0
        assert counted["too few registers"]["spilled_bytes"] > 0
        assert counted["too few registers"]["registers"] == 32
        assert counted["too few registers"]["blocks_per_multiprocessor"] == 16


def test_a_loop_unrolled_by_the_assembler_counts_by_turn():
    program = ttgir.Program([ttgir.Loop(turns=100, outer=None, fixed=False)], [], [])
    ptx = assembly.in_ptx(
        """
        ld.param.b64 %rd1, [f_param_0];
        @%p1 bra $L__BB0_3;
        $L__BB0_2:
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        bar.sync 0;
        st.global.b32 [ %rd2 + 0 ], { %r1 };
        @%p2 bra $L__BB0_2;
        $L__BB0_3:
        ret;
        """.replace("        ", "")
    )
    turn = ["LDG.E.128 R4, [R2]", "BAR.SYNC.DEFER_BLOCKING 0x0", "FADD R0, R0, R4", "STG.E [R2], R0"]
    body = [*turn * 4, "@!P0 BRA `(.L_x_1)"]
    rest = [*turn, "@P1 BRA `(.L_x_2)"]
    lines = ["MOV R1, c[0x0][0x28]", ".L_x_1:", *body, ".L_x_2:", *rest, "EXIT", ".L_x_3:", "BRA `(.L_x_3)", "NOP"]
    code = "\n".join(line if line[0] == "." else f"/*{8 * n:04x}*/ {line} ;" for n, line in enumerate(lines))
    outside, loop = assembly.per_turn(ptx, assembly.in_sass(code), program)
    assert (loop["instructions"], loop["barriers"], loop["loads"]) == ((4 * 4 + 1) / 4, 1, 1)
    assert outside["instructions"] == 2


def test_a_loop_of_unknown_turns_is_refused():
    code = """
    tt.func public @f(%n: i32) attributes {noinline = false} {
      %x = tt.load %n : !tt.ptr<i32>
      scf.for %i = %x to %n step %x  : i32 {
      }
      tt.return
    }"""
    launch = type("Launch", (), {"grid": (2,), "arguments": {"n": 5}})
    with pytest.raises(RuntimeError, match="bounds are not known"):
        ttgir.read(code, launch, ["n"])


def test_estimate():
    launch = {
        "loaded_bytes_per_row": {"x": 8192.0},
        "stored_bytes_per_row": {"y": 8192.0},
        "memory_bytes": 16384 * 8192,
        "blocks_per_multiprocessor": 1,
        "programs": 132,
        "turns": 8192 / 132,
        "instructions_per_row": 1000.0,
        "asynchronous_bytes_in_loop": 0,
    }
    found = estimate(launch, "sm_90", 8192)
    assert found.memory == pytest.approx(16384 * 8192 / 3.35e12)
    # A turn waits, and then moves its bytes; with the next turn's copied meanwhile, it only moves them.
    assert found.bound == "waiting"
    assert found.waiting == pytest.approx(found.memory + 8192 / 132 * 0.8e-6)
    prefetched = estimate(launch | {"asynchronous_bytes_in_loop": 8192}, "sm_90", 8192)
    assert prefetched.waiting == pytest.approx(8192 / 132 * 0.8e-6)


def test_page_is_the_record():
    assert page({side: kept(side) for side in SIDES}) == PAGE.read_text()


def test_our_backward_streams():
    """As recorded, on every GPU: weight and directions are loaded once, rows ahead of their use."""
    backward = [r for r in kept("after")["records"] if r["call"].startswith(("norm backward", "fused backward"))]
    assert {record["target"] for record in backward} == {"sm_80", "sm_90", "sm_100"}
    for record in backward:
        case = (*shape_of(record), record["directions"], record["call"])
        loop, *_ = record["launches"]
        assert len(record["launches"]) == (1 if "frozen" in record["call"] else 2), case
        spilled = max(launch["spilled_bytes"] for launch in record["launches"])
        assert spilled <= (8 if (record["size"], record["directions"]) == (8192, 4) else 0), case
        assert max(launch["idle"] for launch in record["launches"]) <= 0.1, case
        assert loop["barriers_in_loop"] <= 4, case
        assert loop["wide_relayouts_in_loop"] == 0, case
        if record["size"] > 4096 and record["size"] * record["directions"] >= 4096 * 8:
            continue  # the directions alone would fill the registers of a multiprocessor
        assert loop["asynchronous_copies_in_loop"] > 0, case
        assert loop["loads_in_loop"] == {}, case
        if record["size"] * max(record["directions"], 1) <= 4096:
            assert loop["blocks_per_multiprocessor"] >= 2, case


@pytest.mark.slow
def test_record_is_of_these_kernels(tmp_path):
    """Nothing of a compiler's choice is compared."""
    file = tmp_path / "records.json"
    command = ["--who", "ours", "--call", CALL, "--target", TARGET, "--size", str(SIZE), "--json", file]
    output("-m", "benchmarks.audit", "contest", *command)
    recorded = (kept("after") or kept("before"))["records"]

    def known(records: list[dict]) -> dict:
        return {
            (record["call"], record["directions"]): [
                {key: launch[key] for key in ("kernel", "programs", "warps", "loads_in_loop", "loaded_bytes_per_row")}
                for launch in record["launches"]
            ]
            for record in records
            if record["call"].startswith(CALL) and shape_of(record) == (TARGET, SIZE, 16384)
        }

    found = rounded(json.loads(file.read_text()))
    assert len(known(found)) == 6
    assert known(found) == known(recorded), "python -m benchmarks.audit contest --record after"
