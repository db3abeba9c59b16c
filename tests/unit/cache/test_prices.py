"""Prices as they are kept and shown: what one is worth at a time and in a book, and each number as it was spelled."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.prices import (
    ENCODING,
    Balance,
    Generations,
    Price,
    PriceRecord,
    StoredPrice,
    as_of,
    decode_price,
    document,
    encode_price,
)
from proxy.upstream.replies import Priced, read_reply

ANSWER = b'{"data":{"estimated":5,"balance":20},"error":{}}'
BOOK = Generations(b"p1", b"r1")
REPRICED = Generations(b"p1", b"r2")
RECORD = PriceRecord(Price(b"5", b""), put_at_ms=1_000_000, ttl_ms=60_000, generations=BOOK, body_digest=b"d1")

amounts = st.sampled_from([b"5", b"5.0", b"0.10", b"1e2"]) | st.integers(0, 10**9).map(lambda n: str(n).encode())
members = st.dictionaries(
    st.text().filter(lambda name: name not in ("estimated", "balance")), st.text() | st.integers()
)
prices = st.builds(Price, amounts, members.map(lambda rest: json.dumps(rest, ensure_ascii=False)[1:-1].encode()))
words = st.text("abcXYZ019-_", min_size=1, max_size=12).map(str.encode)
books = st.builds(Generations, words, words)
times = st.integers(0, 2**45)
records = st.builds(PriceRecord, prices, times, st.integers(1, 2**40), books, words)


def with_spelled_numbers(text: bytes) -> Any:
    return json.loads(text, parse_int=lambda number: ("number", number), parse_float=lambda number: ("number", number))


def kept(record: PriceRecord) -> bytes:
    """The text in the store, as the script that puts it there writes it."""
    encoded = encode_price(
        record.price, ttl_ms=record.ttl_ms, generations=record.generations, body_digest=record.body_digest
    )
    return b"%s %d %s" % (ENCODING, record.put_at_ms, encoded)


# --- as they are kept -------------------------------------------------------------------------------------------


@given(records)
def test_a_price_comes_back_as_it_was(record: PriceRecord) -> None:
    assert decode_price(kept(record)) == record


def test_a_kept_price_is_what_it_was() -> None:
    """Others have written prices like this one: a change of it needs another `ENCODING`."""
    price = Price(b"0.10", b'"plan":"a b","n":1')
    assert ENCODING == b"2"
    encoded = encode_price(price, ttl_ms=3_600_000, generations=Generations(b"pu", b"re"), body_digest=b"d1")
    assert encoded == b'3600000 pu re d1 0.10 "plan":"a b","n":1'
    stored = b'2 1700000000000 3600000 pu re d1 0.10 "plan":"a b","n":1'
    assert decode_price(stored) == PriceRecord(price, 1_700_000_000_000, 3_600_000, Generations(b"pu", b"re"), b"d1")


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"2",
        b"2 5 1000 pu re d1 5",  # a space short
        b"1 5 1000 pu re d1 5 ",
        b"3 5 1000 pu re d1 5 ",
        b"22 5 1000 pu re d1 5 ",
        b" 2 5 1000 pu re d1 5 ",
        b"2  1000 pu re d1 5 ",
        b"2 5  pu re d1 5 ",
        b"2 5.0 1000 pu re d1 5 ",
        b"2 5 1e3 pu re d1 5 ",
        b'{"estimated":5}',
        b'1700000000000 1 3600000 0.10 "plan":"a b"',  # the encoding before this one
        b"\xff\x00",
    ],
)
def test_a_price_in_another_encoding_is_not_found(stored: bytes) -> None:
    assert decode_price(stored) is None


@given(st.binary(max_size=60))
def test_what_others_wrote_is_a_price_or_none(stored: bytes) -> None:
    decode_price(stored)
    decode_price(b"2 " + stored)


# --- what they are worth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age_ms", "age_s", "ttl_s"),
    [
        (0, 0, 60),
        (1, 0.001, 59.999),
        (59_999, 59.999, 0.001),
        (60_000, 60, 0),
        (60_001, 60.001, -0.001),
        (10**9, 10**6, -999_940),
    ],
)
def test_a_price_has_its_age_and_what_is_left(age_ms: int, age_s: float, ttl_s: float) -> None:
    expected = StoredPrice(RECORD.price, age_s, ttl_s, b"d1")
    assert as_of(RECORD, RECORD.put_at_ms + age_ms, BOOK, None) == expected
    assert as_of(RECORD, RECORD.put_at_ms + age_ms, BOOK, 0) == expected
    assert as_of(RECORD, RECORD.put_at_ms + age_ms, BOOK, 5) == expected  # asked after the repricing: not its business


@given(records, times, books, st.none() | st.integers(-(2**40), 2**40))
def test_a_price_of_another_purge_is_gone(
    record: PriceRecord, now_ms: int, book: Generations, ago_ms: int | None
) -> None:
    assert (as_of(record, now_ms, book, ago_ms) is None) == (record.generations.purge != book.purge)


@pytest.mark.parametrize(
    ("age_ms", "repriced_ago_ms", "ttl_s"),
    [
        (10_000, 0, 0),
        (10_000, 1, -0.001),
        (10_000, 3_000, -3),
        (60_000, 3_000, -3),
        (62_000, 3_000, -3),
        (63_000, 3_000, -3),
        (64_000, 3_000, -4),  # its time was over before the repricing
        (1_000, 5_000, -5),  # put after a repricing, but asked before it
        (10_000, None, 0),  # the book does not know when
        (70_000, None, -10),
        (10_000, -5_000, 0),  # the store's clock has gone back
        (70_000, -5_000, -10),
    ],
)
def test_a_repriced_price_is_stale_since_the_repricing(age_ms: int, repriced_ago_ms: int | None, ttl_s: float) -> None:
    stored = as_of(RECORD, RECORD.put_at_ms + age_ms, REPRICED, repriced_ago_ms)
    assert stored == StoredPrice(RECORD.price, age_ms / 1000, ttl_s, b"d1")


@given(records, times, words, st.none() | st.integers(-(2**40), 2**40))
def test_a_repriced_price_is_never_fresh(record: PriceRecord, now_ms: int, reprice: bytes, ago_ms: int | None) -> None:
    book = Generations(record.generations.purge, reprice)
    stored, unrepriced = as_of(record, now_ms, book, ago_ms), as_of(record, now_ms, record.generations, ago_ms)
    assert stored is not None
    assert unrepriced is not None
    if reprice != record.generations.reprice:
        assert stored.ttl_s <= 0
        assert stored.ttl_s <= unrepriced.ttl_s
        assert stored.age_s == unrepriced.age_s


@given(records, st.integers(1, 2**40))
def test_a_clock_that_went_back_makes_nothing_younger_than_new(record: PriceRecord, ahead_ms: int) -> None:
    stored = as_of(record, record.put_at_ms - ahead_ms, record.generations, None)
    assert stored == StoredPrice(record.price, 0, record.ttl_ms / 1000, record.body_digest)


# --- as they are shown ------------------------------------------------------------------------------------------


@given(prices, st.none() | st.builds(Balance, amounts, st.floats(0)))
def test_a_document_has_the_numbers_as_they_are(price: Price, balance: Balance | None) -> None:
    shown = with_spelled_numbers(document(price, balance))
    rest = with_spelled_numbers(b"{" + price.rest + b"}")
    numbers = {"estimated": ("number", price.estimated.decode())}
    if balance is not None:
        numbers["balance"] = ("number", balance.amount.decode())
    assert shown == {"data": {**numbers, **rest}, "error": {}}


def test_a_document_without_more_is_upstreams_own() -> None:
    assert document(Price(b"5", b""), Balance(b"20", 3.5)) == ANSWER


@given(prices)
def test_what_was_answered_is_shown_again_with_the_newest_balance(price: Price) -> None:
    answered = document(price, Balance(b"20", 0))
    priced = read_reply(200, answered, secret="rn-canary", now=datetime(2026, 11, 22, tzinfo=UTC))
    assert isinstance(priced, Priced)
    assert priced.balance == b"20"
    newest = Balance(b"19.5", 0)
    assert with_spelled_numbers(document(priced.price, newest)) == with_spelled_numbers(document(price, newest))
