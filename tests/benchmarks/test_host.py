"""Python's share of a step is counted, so that it cannot grow unseen; what a step costs, on paper."""

from benchmarks.host import calls, share
from benchmarks.price import main


def test_pythons_share_of_a_step(tmp_path):
    """At most half of the 7,644 calls that it was at 3c86f5e."""
    assert 0 < share(calls, str(tmp_path)) <= 7644 / 2


def test_the_price_on_paper(capsys):
    main(["--paper"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 6
    prices = {line.split(":")[0].split()[-1]: float(line.split(": ")[1].split(";")[0]) for line in lines}
    assert 1 < prices["512"] < 1.04 < prices["64"] < 1.3
