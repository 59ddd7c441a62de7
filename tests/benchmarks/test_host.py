"""Python's share of a step is counted, so that it cannot grow unseen; what a step costs, on paper."""

from benchmarks.host import calls, share
from benchmarks.price import main


def test_pythons_share_of_a_step(tmp_path):
    """Half of the 7,644 calls that it was at 3c86f5e, and no more than before between two counts."""
    counted = share(calls, str(tmp_path))
    assert 0 < counted < 7644 / 2
    assert abs(share(calls, str(tmp_path)) - counted) < 0.1 * counted


def test_the_price_on_paper(capsys):
    main(["--paper"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 6
    assert all(1 < float(line.split(": ")[1].split(",")[0]) <= 1.05 for line in lines)
