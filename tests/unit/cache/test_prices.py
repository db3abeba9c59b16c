"""Prices: their encoding in the store, their age under generations and clocks, and the response body."""

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

amounts = st.sampled_from([b"5", b"5.0", b"0.10", b"1e2"]) | st.integers(0, 10**6).map(lambda n: str(n).encode())
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
    """The text in the store, as `price_put.lua` writes it."""
    encoded = encode_price(
        record.price, ttl_ms=record.ttl_ms, generations=record.generations, body_digest=record.body_digest
    )
    return b"%s %d %s" % (ENCODING, record.put_at_ms, encoded)


# --- encoding ---------------------------------------------------------------------------------------------------


@given(records)
def test_a_price_is_decoded_as_it_was_encoded(record: PriceRecord) -> None:
    assert decode_price(kept(record)) == record


def test_the_encoding_does_not_change() -> None:
    """Stores have prices in this format: a change of it needs another `ENCODING`."""
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
        b"2 5 1000 pu re d1 5",  # a space is missing
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
def test_decoding_any_bytes_raises_nothing(stored: bytes) -> None:
    decode_price(stored)
    decode_price(b"2 " + stored)


# --- age and generations ----------------------------------------------------------------------------------------


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
def test_age_and_ttl_follow_from_the_time_of_storing(age_ms: int, age_s: float, ttl_s: float) -> None:
    expected = StoredPrice(RECORD.price, age_s, ttl_s, b"d1")
    assert as_of(RECORD, RECORD.put_at_ms + age_ms, BOOK, None) == expected
    assert as_of(RECORD, RECORD.put_at_ms + age_ms, BOOK, 0) == expected
    assert as_of(RECORD, RECORD.put_at_ms + age_ms, BOOK, 5) == expected  # requested after the repricing


@given(records, times, books, st.none() | st.integers(-(2**40), 2**40))
def test_a_price_with_another_purge_generation_is_gone(
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
        (64_000, 3_000, -4),  # stale before the repricing
        (1_000, 5_000, -5),  # stored after the repricing, requested before it
        (10_000, None, 0),  # the time of the repricing is unknown
        (70_000, None, -10),
        (10_000, -5_000, 0),  # the store's clock went back
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
def test_no_age_is_negative_after_the_clock_went_back(record: PriceRecord, ahead_ms: int) -> None:
    stored = as_of(record, record.put_at_ms - ahead_ms, record.generations, None)
    assert stored == StoredPrice(record.price, 0, record.ttl_ms / 1000, record.body_digest)


# --- response bodies --------------------------------------------------------------------------------------------


@given(prices, st.none() | st.builds(Balance, amounts, st.floats(0)))
def test_a_response_body_has_the_numbers_as_upstream_wrote_them(price: Price, balance: Balance | None) -> None:
    shown = with_spelled_numbers(document(price, balance))
    rest = with_spelled_numbers(b"{" + price.rest + b"}")
    numbers = {"estimated": ("number", price.estimated.decode())}
    if balance is not None:
        numbers["balance"] = ("number", balance.amount.decode())
    assert shown == {"data": {**numbers, **rest}, "error": {}}


def test_a_response_body_without_other_members_equals_upstreams() -> None:
    assert document(Price(b"5", b""), Balance(b"20", 3.5)) == ANSWER


@given(prices)
def test_a_stored_answer_is_served_with_the_newest_balance(price: Price) -> None:
    answered = document(price, Balance(b"20", 0))
    priced = read_reply(200, answered, secret="rn-canary", now=datetime(2026, 11, 22, tzinfo=UTC))
    assert isinstance(priced, Priced)
    assert priced.balance == b"20"
    newest = Balance(b"19.5", 0)
    assert with_spelled_numbers(document(priced.price, newest)) == with_spelled_numbers(document(price, newest))
