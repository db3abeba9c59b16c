"""Whether two answers agree."""

import pytest

from proxy.cache.prices import Price
from proxy.learning.answers import data_digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Price(b"5", b""), Price(b"5.0", b"")),
        (Price(b"0.5", b""), Price(b"5e-1", b"")),
        (Price(b"0", b""), Price(b"-0", b"")),
        (Price(b"5", b'"a":1,"b":[2.0]'), Price(b"5", b'"b":[2],"a":1.0')),
    ],
)
def test_answers_with_equal_data_agree(one: Price, other: Price) -> None:
    assert data_digest(one) == data_digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Price(b"5", b""), Price(b"6", b"")),
        (Price(b"5", b""), Price(b"5", b'"a":1')),
        (Price(b"0", b""), Price(b"1e-999999999", b"")),
        (Price(b"0.1", b""), Price(b"0.1000000000000000000001", b"")),
        (Price(b"5", b'"a":18446744073709551617'), Price(b"5", b'"a":18446744073709551618')),
    ],
)
def test_answers_with_other_data_do_not(one: Price, other: Price) -> None:
    assert data_digest(one) != data_digest(other)
