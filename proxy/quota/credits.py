"""Converts amounts of credits between RenderNet's JSON numbers, whole micro-credits and decimal text, exactly."""

from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from functools import lru_cache

MICRO = 1_000_000
"""Micro-credits in a credit."""

PRICE_DECIMALS = 12
"""Of the price of a credit in a currency: a credit can cost a small part of a cent."""

_UP = Context(rounding=ROUND_CEILING)
"""Limits digits and exponents. Rounding up twice gives the same integer as rounding up once, so long numbers are exact
and a tiny one does not become 0."""


@lru_cache(maxsize=1000)
def micro_of(number: bytes) -> int:
    """A JSON number of credits in micro-credits, rounded up. `proxy.upstream.replies` must have accepted it before."""
    if number.isdigit():
        return int(number) * MICRO
    return int(Decimal(number.decode()).scaleb(6, _UP).to_integral_value(context=_UP))


def text_of(micro: int) -> str:
    """Micro-credits as a decimal number of credits, without needless zeros."""
    return _decimal_text(micro, 6)


def percent_text(part: int, whole: int) -> str:
    """`part` as a percentage of `whole`, rounded to one decimal; empty if `whole` is 0.

    A part that is smaller than the whole is at most 99.9, so that 100 always means all of it.
    """
    if whole == 0:
        return ""
    tenths = (2000 * part + whole) // (2 * whole)
    return text_of((min(tenths, 999) if part < whole else tenths) * MICRO // 10)


@dataclass(frozen=True, slots=True)
class Currency:
    """Derives money from estimated credits. `per_credit` has at most `PRICE_DECIMALS` decimals."""

    code: str
    per_credit: Decimal

    def exact_text(self, micro: int) -> str:
        """The price of an amount as an exact decimal number."""
        return _decimal_text(self._units(micro), 6 + PRICE_DECIMALS)

    def rounded_text(self, micro: int) -> str:
        """The price of an amount, rounded to two decimals."""
        hundredth = 10 ** (6 + PRICE_DECIMALS - 2)
        whole, part = divmod((2 * self._units(micro) + hundredth) // (2 * hundredth), 100)
        return f"{whole}.{part:02}"

    def _units(self, micro: int) -> int:
        return micro * int(self.per_credit.scaleb(PRICE_DECIMALS))


def _decimal_text(amount: int, decimals: int) -> str:
    """`amount` / 10**`decimals`, without needless zeros."""
    whole, part = divmod(abs(amount), 10**decimals)
    sign = "-" if amount < 0 else ""
    return f"{sign}{whole}.{part:0{decimals}}".rstrip("0").rstrip(".") if part else f"{sign}{whole}"
