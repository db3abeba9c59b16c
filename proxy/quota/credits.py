"""Converts amounts of credits between RenderNet's JSON numbers, whole micro-credits and decimal text, exactly."""

from decimal import ROUND_CEILING, Context, Decimal
from functools import lru_cache

MICRO = 1_000_000
"""Micro-credits in a credit."""

_UP = Context(rounding=ROUND_CEILING)
"""Limits digits and exponents. Rounding up to these limits, and then to an integer, equals rounding up to the integer
at once, so numbers of many digits are right, too, and a tiny number does not become 0."""


@lru_cache(maxsize=1000)
def micro_of(number: bytes) -> int:
    """A JSON number of credits in micro-credits, rounded up. `proxy.upstream.replies` must have accepted it before."""
    if number.isdigit():
        return int(number) * MICRO
    return int(Decimal(number.decode()).scaleb(6, _UP).to_integral_value(context=_UP))


def text_of(micro: int) -> str:
    """Micro-credits as a decimal number of credits, without needless zeros."""
    whole, part = divmod(abs(micro), MICRO)
    sign = "-" if micro < 0 else ""
    return f"{sign}{whole}.{part:06}".rstrip("0").rstrip(".") if part else f"{sign}{whole}"


def percent_text(part: int, whole: int) -> str:
    """`part` as a percentage of `whole`, rounded to one decimal; empty if `whole` is 0.

    A part that is smaller than the whole is at most 99.9, so that 100 always means all of it.
    """
    if whole == 0:
        return ""
    tenths = (2000 * part + whole) // (2 * whole)
    return text_of((min(tenths, 999) if part < whole else tenths) * MICRO // 10)
