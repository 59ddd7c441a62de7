"""Numbers as the page writes them: three digits, and a unit that fits."""

from __future__ import annotations

_BYTES = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_SECONDS = (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))


def digits(value: float, count: int = 3) -> str:
    """``value`` to so many digits, never with an exponent."""
    rounded = float(f"{value:.{count - 1}e}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (count - 1) else f"{rounded:.{count}g}"


def in_bytes(value: float) -> str:
    """In units of 1000."""
    if value == 0:
        return "0"
    for unit, size in _BYTES:
        if float(f"{value:.2e}") >= size:
            return f"{digits(value / size)} {unit}"
    return f"{value:.0f} B"


def in_seconds(value: float) -> str:
    """In the largest unit of which it is one at least, microseconds at the smallest."""
    if value == 0:
        return "0"
    for unit, size in _SECONDS:
        if float(f"{value:.2e}") >= size * (2 if unit == "days" else 1):
            return f"{digits(value / size)} {unit}"
    return f"{digits(value * 1e6)} µs"


def in_percent(value: float) -> str:
    """A share to two digits; 0.01% at the smallest."""
    if 0 < value < 1e-4:
        return "< 0.01%"
    return f"{digits(100 * value, 2)}%"


def in_powers(value: float) -> str:
    """To two digits, as a multiple of a power of ten."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} &times; 10<sup>{int(exponent)}</sup>"


def power(value: int) -> str:
    """A power of ten, as HTML."""
    return f"10<sup>{len(str(value)) - 1}</sup>"
