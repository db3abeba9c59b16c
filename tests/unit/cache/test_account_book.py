"""Snapshots of account books and cached balances: what they say about prices, and which of two balances is newer."""

from dataclasses import replace

import pytest

from proxy.cache.account_book import BOOK_REREAD_S, BookSnapshot, CachedBalance
from proxy.cache.memory import MemoryEntry
from proxy.cache.prices import Generations, Price, PriceRecord

T = 1000.0
GENERATIONS = Generations(b"p1", b"r1")
BOOK = BookSnapshot(GENERATIONS, invalidations=7, repriced_ago_ms=None, now_ms=1_000_000, read_at=T)
RECORD = PriceRecord(Price(b"5", b""), 1_000_000, 60_000, GENERATIONS, b"d1")
CACHED = MemoryEntry(RECORD, now_ms=1_002_000, read_at=T, invalidations=7)


@pytest.mark.parametrize(("age_s", "current"), [(0, True), (BOOK_REREAD_S - 0.001, True), (BOOK_REREAD_S, False)])
def test_a_snapshot_is_current_for_a_limited_time(age_s: float, current: bool) -> None:  # noqa: FBT001 -- a row of a table
    assert BOOK.is_current(T + age_s) is current


def test_an_invalidation_or_a_purge_invalidates_a_cached_price_and_a_repricing_does_not() -> None:
    assert not BOOK.is_invalidated(CACHED)
    assert replace(BOOK, invalidations=8).is_invalidated(CACHED)
    assert replace(BOOK, generations=Generations(b"p2", b"r1")).is_invalidated(CACHED)
    assert not replace(BOOK, generations=Generations(b"p1", b"r2")).is_invalidated(CACHED)


@pytest.mark.parametrize(
    ("generations", "put_at_ms", "may_lag"),
    [
        (GENERATIONS, 1_000_001, False),
        (Generations(b"p2", b"r1"), 999_999, False),
        (Generations(b"p2", b"r1"), 1_000_000, True),
        (Generations(b"p1", b"r2"), 1_000_001, True),
    ],
)
def test_a_snapshot_may_lag_only_behind_a_later_record_of_other_generations(
    generations: Generations, put_at_ms: int, *, may_lag: bool
) -> None:
    assert BOOK.may_lag(replace(RECORD, generations=generations, put_at_ms=put_at_ms)) is may_lag


def test_a_cached_price_ages_with_this_process_and_so_does_the_repricing() -> None:
    stored = BOOK.as_of(CACHED, T + 3)
    assert stored is not None
    assert (stored.age_s, stored.ttl_s) == (5, 55)
    repriced = replace(BOOK, generations=Generations(b"p1", b"r2"), repriced_ago_ms=1_000)
    stored = repriced.as_of(CACHED, T + 3)
    assert stored is not None
    assert (stored.age_s, stored.ttl_s) == (5, -4)
    assert replace(BOOK, generations=Generations(b"p2", b"r1")).as_of(CACHED, T) is None


@pytest.mark.parametrize(
    ("cached", "read", "replaced"),
    [
        ((T, 500), (T - 1, 500), True),
        ((T, 500), (T - 1, 501), True),
        ((T, 500), (T + 1, 499), False),
        ((T, None), (T + 0.001, 500), True),
        ((T, None), (T, 500), False),
    ],
)
def test_the_stores_time_decides_which_balance_is_newer_and_without_it_the_processs(
    cached: tuple[float, int | None], read: tuple[float, int | None], *, replaced: bool
) -> None:
    assert CachedBalance(b"20", *cached).is_replaced_by(CachedBalance(b"19", *read)) is replaced


def test_no_balance_has_a_negative_age() -> None:
    assert CachedBalance(b"20", T, None).as_of(T - 1).age_s == 0
    assert CachedBalance(b"20", T, None).as_of(T + 2).age_s == 2
