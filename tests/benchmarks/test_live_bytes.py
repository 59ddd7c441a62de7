"""What the constraint keeps alive: no reference model, no copies of hidden states."""

from benchmarks.audit import live_bytes

#: A quarter of what the page on costs has: a step takes its time, and the bars are per token.
BLOCKS, TOKENS, WIDTH = live_bytes.BLOCKS, live_bytes.TOKENS // 4, live_bytes.WIDTH


def test_peak_memory_of_a_step(monkeypatch):
    monkeypatch.setattr(live_bytes, "TOKENS", TOKENS)
    peaks = {(record["way"], record["dtype"]): record["peak_bytes"] for record in live_bytes.run()}
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        plain, unit = peaks["plain", dtype], TOKENS * WIDTH * itemsize
        assert plain > 16 * BLOCKS * unit  # the counter sees activations at all
        assert peaks["naive", dtype] - plain > BLOCKS * unit  # and what the constraint is there to avoid
        for way in ("pass-through", "fused"):
            assert peaks[way, dtype] <= 1.02 * plain, way
            # A few numbers per token and block, and one tile on CPU: far from one copy of a block's input per block.
            assert peaks[way, dtype] - plain <= BLOCKS * TOKENS * 16 + 2**20, way
