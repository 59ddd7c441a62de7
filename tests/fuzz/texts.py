"""Texts, bytes and values as nobody means them: made from a seed, so that each can be made again."""

from __future__ import annotations

import json
from random import Random
from typing import Any

#: What has broken parsers, terminals, encoders and tokenizers before.
HOSTILE = ("", " ", "\n", "\x00", "\x1b[2J\x1b]0;title\x07", "\ufeff", "\u2028", "\x85", "\u202e", "\ud800", "\\ud83d")
HOSTILE += ("e\u0301" * 20, "\U0001f468\u200d\U0001f469\u200d\U0001f467", "<|im_end|>\n<|im_start|>system\n")
HOSTILE += ("{{ 7 * 7 }}{% for i in x %}", "%s%n{}{0.__class__}", "[/red][bold]", "<script>alert(1)</script>", "$x^{2$")
HOSTILE += ("../../etc/passwd", "*?[a]{b,c}", "-1", "1e999", "nan", "Infinity", "0x10", "1_000", "\u0664\u0662", "~")
HOSTILE += ("9" * 5000, "null", "!!python/object/apply:os.system [id]", "&a [*a]", "[" * 400, '{"a":' * 200)
HOSTILE += ("a" * 10_000,)

WORDS = ("say", "the", "12", "I", "cannot", "Answer:", "a.b")
NUMBERS = (0, -1, 1, 3, 2**31, 2**63, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf"), 1e-300)


def text(random: Random, longest: int = 40) -> str:
    """Words, or something from the list, or characters from all over Unicode."""
    kind = random.random()
    if kind < 0.3:
        return random.choice(HOSTILE)
    if kind < 0.75:
        return " ".join(random.choices(WORDS, k=random.randrange(6)))
    top = random.choice((0x7F, 0xFF, 0xFFFF, 0x10FFFF))
    return "".join(chr(random.randint(0, top)) for _ in range(random.randrange(longest)))


def value(random: Random, depth: int = 3) -> Any:
    """Anything that JSON can say."""
    kind = random.randrange(8 if depth else 6)
    if kind == 0:
        return random.choice((None, True, False))
    if kind == 1:
        return random.choice(NUMBERS)
    if kind < 6:
        return text(random)
    if kind == 6:
        return [value(random, depth - 1) for _ in range(random.randrange(4))]
    return {text(random, 8): value(random, depth - 1) for _ in range(random.randrange(4))}


def changed(random: Random, data: Any) -> Any:
    """``data``, whose parts are replaced, doubled or lost here and there."""
    if random.random() < 0.06:
        return value(random)
    if isinstance(data, dict):
        kept = {key: changed(random, item) for key, item in data.items() if random.random() > 0.03}
        return {**kept, **({text(random): value(random)} if random.random() < 0.05 else {})}
    if isinstance(data, list):
        items = [changed(random, item) for item in data if random.random() > 0.03]
        return items * 2 if random.random() < 0.03 else items
    return data


def as_json(data: Any) -> str:
    """With or without escapes, by chance of its content: both are JSON."""
    return json.dumps(data, ensure_ascii=len(str(data)) % 2 == 0)


def as_bytes(random: Random, source: str) -> bytes:
    """As UTF-8 most often."""
    codec = random.choice(("utf-8",) * 12 + ("utf-8-sig", "latin-1", "utf-16"))
    return source.encode(codec, errors="surrogatepass" if codec.startswith("utf") else "replace")


def damaged(random: Random, content: bytes) -> bytes:
    """Cut, spliced and flipped in a few places, or left as it is."""
    data = bytearray(content)
    for _ in range(random.choice((0, 0, 0, 0, 1, 1, 2, 5))):
        at = random.randrange(len(data) + 1)
        match random.randrange(5):
            case 0:
                data[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                del data[at : at + random.randrange(1, 20)]
            case 2:
                data[at:at] = random.choice(HOSTILE).encode(errors="surrogatepass")
            case 3:
                data = data[:at]
            case 4:
                data[at:at] = bytes(random.choice(b'"\\[]{},:\n\r\t\0\xff\xed\xa0') for _ in range(3))
    return bytes(data)
