"""Python's share of a step is counted, so that it cannot grow unseen; what a step costs, on paper."""

from benchmarks.host import calls, share
from benchmarks.price import TURNS, main


def test_pythons_share_of_a_step(tmp_path):
    """At most half of the 7,644 calls that it was at 3c86f5e."""
    assert 0 < share(calls, str(tmp_path)) <= 7644 / 2


def test_the_price_on_paper(capsys):
    main(["--paper"])
    prices = [float(line.rpartition(": ")[2]) for line in capsys.readouterr().out.splitlines() if ": " in line]
    assert len(prices) == 30
    of = {setting: prices[6 * place : 6 * place + 6] for place, setting in enumerate(TURNS)}
    assert 1 < of["default"][1] < 1.04 < of["default"][0] < 1.3  # of 8 x 512 and of 8 x 64 tokens
    for less, more in (
        ("last states", "default"),
        ("two probes at a time", "default, on each of two ranks"),
        ("default, on each of two ranks", "default"),
        ("default, on each of four ranks", "two probes at a time"),
    ):
        assert all(one < other for one, other in zip(of[less], of[more], strict=True)), less
    assert of["last states"][1] < of["default"][1] < 1.08 < of["last states"][0] < of["default"][0] < 1.5
