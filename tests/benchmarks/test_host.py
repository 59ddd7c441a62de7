"""Python's share of a step is counted, so that it cannot grow unseen; what a step costs, on paper."""

from benchmarks.host import calls, share
from benchmarks.price import main


def test_pythons_share_of_a_step(tmp_path):
    """At most half of the 7,644 calls that it was at 3c86f5e."""
    assert 0 < share(calls, str(tmp_path)) <= 7644 / 2


def test_the_price_on_paper(capsys):
    main(["--paper"])
    prices = [float(line.rpartition(": ")[2]) for line in capsys.readouterr().out.splitlines() if ": " in line]
    assert len(prices) == 18
    assert 1 < prices[1] < 1.04 < prices[0] < 1.3  # of 8 x 512 and of 8 x 64 tokens
    assert all(states < replies for replies, states in zip(prices[:6], prices[6:12], strict=True))
    assert all(two < four for four, two in zip(prices[:6], prices[12:], strict=True))
    assert prices[7] < prices[1] < 1.08 < prices[6] < prices[0] < 1.5  # with last states
