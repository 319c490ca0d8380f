"""How numbers are written for people."""

from __future__ import annotations


def human(count: float) -> str:
    """`count` with a decimal prefix and four digits: 7634300000000 -> "7.634 T"."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f} {prefix}"
    return f"{count:.0f}"


def mebibytes(count: int) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:,.1f} MiB"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def three_digits(value: float) -> str:
    """Three significant digits or all before the point, never an exponent: 1,234 or 12.3 or 1.23."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else 2}f}"


def seconds(value: float) -> str:
    return f"{three_digits(value)} s" if value >= 1 else f"{three_digits(value * 1e3)} ms"


def span(times: list[float]) -> str:
    """Fastest to slowest, in the unit that `seconds` would give the fastest."""
    factor = 1 if times[0] >= 1 else 1e3
    return "–".join(three_digits(time * factor) for time in times)
