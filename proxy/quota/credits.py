"""Amounts of credits, in whole micro-credits: exact, whatever a number of RenderNet's looks like."""

from decimal import ROUND_CEILING, Context, Decimal
from functools import lru_cache

MICRO = 1_000_000
"""Micro-credits in a credit."""

_UP = Context(rounding=ROUND_CEILING)
"""Rounded up to its digits or its least exponent, and then to an integer, is rounded up to that integer: no number has
too many digits, and none is so small that it becomes 0."""


@lru_cache(maxsize=1000)
def micro_of(number: bytes) -> int:
    """A JSON number of credits in micro-credits, rounded up. `proxy.upstream.replies` must have called it usable."""
    if number.isdigit():
        return int(number) * MICRO
    return int(Decimal(number.decode()).scaleb(6, _UP).to_integral_value(context=_UP))


def text_of(micro: int) -> str:
    """Micro-credits as a decimal number of credits, no digit more than it takes."""
    whole, part = divmod(abs(micro), MICRO)
    sign = "-" if micro < 0 else ""
    return f"{sign}{whole}.{part:06}".rstrip("0").rstrip(".") if part else f"{sign}{whole}"
