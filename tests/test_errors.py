"""An error is one line, whatever it quotes."""

import pickle

import pytest

from procon.errors import ProConError, printable


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("as it is: 'caf\u00e9' \u2713 \U0001f600", "as it is: 'caf\u00e9' \u2713 \U0001f600"),
        ("two\r\n\nlines\tone", "two lines one"),
        ("\x1b[31mred\x1b]0;title\x07\x9b2J", r"\x1b[31mred\x1b]0;title\x07\x9b2J"),
        ("a\u202eb\u2066c\u2028d", r"a\u202eb\u2066c\u2028d"),
        ("half \ud800", r"half \ud800"),
        ("x" * 3000 + "remedy", "x" * 1300 + " ... " + "x" * 694 + "remedy"),
    ],
)
def test_a_message_is_one_printable_line(text, line):
    error = ProConError(text)
    assert str(error) == printable(text) == line
    assert str(pickle.loads(pickle.dumps(error))) == line
    assert line.isprintable()
