"""Amounts of credits: any JSON number becomes exact micro-credits, and these become exact text."""

import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.quota.credits import MICRO, Currency, micro_of, percent_text, text_of
from proxy.upstream.replies import MAX_ESTIMATE, MAX_NUMBER_CHARACTERS, Priced, read_reply


def usable(number: bytes) -> bool:
    """Whether an upstream answer with this estimate is priced."""
    body = b'{"data":{"estimated":' + number + b'},"error":{}}'
    return isinstance(read_reply(200, body, secret="none of it", now=datetime.now(UTC)), Priced)


@st.composite
def numbers(draw: st.DrawFn) -> tuple[bytes, Fraction]:
    """A JSON number of at most 64 characters from 0 to 10**6, and its value."""
    digits = str(draw(st.integers(0, 10 ** draw(st.integers(1, 60)))))
    exponent = draw(st.integers(6 - len(digits) - draw(st.sampled_from([3, 20, 500])), 6 - len(digits)))
    plain = len(digits) + exponent  # with the point here it takes no exponent
    point = plain if 0 < plain < len(digits) and draw(st.booleans()) else draw(st.integers(0, len(digits)))
    whole, part = digits[:point] or "0", digits[point:]
    shift = exponent + len(part)
    sign = draw(st.sampled_from(["", "+", "+0"])) if shift >= 0 else "-"
    power = f"{draw(st.sampled_from('eE'))}{sign}{abs(shift)}" if shift or draw(st.booleans()) else ""
    text = f"{whole}{'.' * bool(part)}{part}{power}".encode()
    return text, int(digits) * Fraction(10) ** exponent


@given(numbers().filter(lambda number: len(number[0]) <= MAX_NUMBER_CHARACTERS))
@example((b"0", Fraction(0)))
@example((b"1000000", Fraction(10**6)))
@example((b"1e6", Fraction(10**6)))
@example((b"2.75", Fraction(11, 4)))
def test_an_amount_is_exact_or_the_next_micro_credit(number: tuple[bytes, Fraction]) -> None:
    text, value = number
    assert usable(text)
    assert json.loads(text) == pytest.approx(float(value))
    assert micro_of(text) == ceil(value * 10**6)


@pytest.mark.parametrize(
    ("number", "micro"),
    [
        (b"0", 0),
        (b"-0", 0),
        (b"0.0", 0),
        (b"-0.0", 0),
        (b"0e0", 0),
        (b"0E-999999999999999999", 0),
        (b"0e999999999999999999", 0),
        (b"5", 5_000_000),
        (b"5.0", 5_000_000),
        (b"0.10", 100_000),
        (b"0.3", 300_000),
        (b"0.000001", 1),
        (b"0.0000001", 1),
        (b"0.0000011", 2),
        (b"12.1000000000000000000000000000000000000000000000000000000000001", 12_100_001),
        (b"999999.9999999999999999999999999999999999999999999999999999999", 10**12),
        (b"1E+6", 10**12),
        (b"1e-400", 1),
        (b"1e-1000000", 1),
        (b"1e-999999999999999999", 1),
        (b"1e-1000000000000000500", 1),
        (b"1e-1999999999999999990", 1),
    ],
)
def test_amounts_in_micro_credits(number: bytes, micro: int) -> None:
    assert usable(number)
    assert micro_of(number) == micro


@given(numbers(), numbers())
def test_a_larger_number_is_never_fewer_micro_credits(
    one: tuple[bytes, Fraction], other: tuple[bytes, Fraction]
) -> None:
    (less, _), (more, _) = sorted((one, other), key=lambda number: number[1])
    assert 0 <= micro_of(less) <= micro_of(more) <= MAX_ESTIMATE * MICRO


SHORTEST = re.compile(r"(?!-0$)-?(0|[1-9][0-9]*)(\.[0-9]{0,5}[1-9])?")


@given(st.integers(-(2**63), 2**63) | st.integers(-3 * MICRO, 3 * MICRO))
def test_text_is_exact_and_the_shortest(micro: int) -> None:
    text = text_of(micro)
    assert Fraction(Decimal(text)) == Fraction(micro, 10**6)
    assert SHORTEST.fullmatch(text)


@given(st.integers(0, MAX_ESTIMATE * MICRO))
def test_text_is_a_json_number_that_means_the_same_amount(micro: int) -> None:
    text = text_of(micro)
    assert json.loads(text, parse_float=Decimal) == Decimal(micro).scaleb(-6)
    assert micro_of(text.encode()) == micro


@pytest.mark.parametrize(
    ("micro", "text"),
    [
        (0, "0"),
        (1, "0.000001"),
        (100_000, "0.1"),
        (1_000_000, "1"),
        (10_000_000, "10"),
        (12_100_000, "12.1"),
        (-1, "-0.000001"),
        (-1_500_000, "-1.5"),
        (-20_000_000, "-20"),
        (9 * 10**15, "9000000000"),
    ],
)
def test_amounts_as_text(micro: int, text: str) -> None:
    assert text_of(micro) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        *((0, 3, "0"), (1, 3, "33.3"), (2, 3, "66.7"), (3, 3, "100"), (4, 3, "133.3"), (1, 8, "12.5")),
        *((9999, 10_000, "99.9"), (10_001, 10_000, "100"), (10**30 + 1, 10**30, "100"), (1, 2000, "0.1"), (5, 0, "")),
    ],
)
def test_percentages_have_one_decimal_and_100_means_all(part: int, whole: int, text: str) -> None:
    assert percent_text(part, whole) == text


@pytest.mark.parametrize(
    ("per_credit", "micro", "exact", "rounded"),
    [
        ("0.002", 76_500_000, "0.153", "0.15"),
        ("0.000000000001", 1, "0.000000000000000001", "0.00"),
        ("1", 5_000, "0.005", "0.01"),
        ("2.5", 10**30, "2500000000000000000000000", "2500000000000000000000000.00"),
        ("0.002", 0, "0", "0.00"),
    ],
)
def test_money_is_exact_or_rounded_to_two_decimals(per_credit: str, micro: int, exact: str, rounded: str) -> None:
    currency = Currency("EUR", Decimal(per_credit))
    assert (currency.exact_text(micro), currency.rounded_text(micro)) == (exact, rounded)
