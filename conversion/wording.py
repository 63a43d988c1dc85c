"""Figures of a conversion in words."""

import os


def last_part(path: str) -> str:
    """Of a local path what may be published: the folders above may name a person or a customer."""
    return os.path.basename(os.path.abspath(os.path.expanduser(path)))


def megabytes(count: int) -> str:
    """Bytes as decimal megabytes, small ones as kilobytes."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds."""
    return f"{_digits(seconds * 1e3)} ms"


def ratio(before: float, after: float, less: str, more: str) -> str:
    """How many times `after` is less or more than `before`: `"16.4x smaller"`."""
    if after <= before:
        return f"{_digits(before / after)}x {less}"
    return f"{_digits(after / before)}x {more}"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent for large values."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def speeds(times: dict[str, float], layer: str = "quantised") -> str:
    """A layer's speed against the dense ones: `"20x / 16x faster"`."""
    first, second = (
        ratio(times[f"dense_{name}"], times[layer], "faster", "slower")
        for name in ("float32", "bfloat16")
    )
    factor, word = first.split()
    return f"{factor if second.endswith(word) else first} / {second}"
