"""The in-process cache: eviction by entries and bytes, expiry, order of replies, and its byte count."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.cache.memory import MAX_AGE_S, MAX_BYTES, MAX_ENTRIES, OVERHEAD_BYTES, MemoryCache, MemoryEntry
from proxy.cache.prices import Generations, Price, PriceRecord

T = 1000.0


def entry_of(size: int = 1, read_at: float = T, put_at_ms: int = 1_000_000) -> MemoryEntry:
    """An entry whose price has `size` bytes, `estimated` and `rest` together; the overhead comes on top."""
    price = Price(b"5", b"x" * (size - 1))
    return MemoryEntry(PriceRecord(price, put_at_ms, 60_000, Generations(b"p", b"r"), b"d"), 1_000_500, read_at, 0)


def cache_of(*, entries: int = 1000, in_bytes: int = 2**20) -> MemoryCache:
    return MemoryCache(max_entries=entries, max_bytes=in_bytes)


def kept(prices: MemoryCache, keys: str, now: float = T) -> str:
    """The keys that are cached."""
    return "".join(key for key in keys if prices.get(key, now) is not None)


def test_a_new_cache_is_empty() -> None:
    prices = MemoryCache()
    assert len(prices) == 0
    assert prices.get("a", T) is None
    prices.drop("a")
    assert prices._bytes == 0


def test_an_entry_that_was_put_is_found() -> None:
    prices, one, other = MemoryCache(), entry_of(), entry_of()
    prices.put("a", one, T)
    prices.put("b", other, T)
    assert prices.get("a", T) is one
    assert prices.get("b", T) is other
    assert prices.get("c", T) is None
    assert len(prices) == 2


# --- expiry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("age_s", "there"), [(-1, True), (0, True), (MAX_AGE_S, True), (MAX_AGE_S + 0.001, False)])
def test_an_entry_expires(age_s: float, there: bool) -> None:  # noqa: FBT001 -- a row of a table
    prices = MemoryCache()
    prices.put("a", entry_of(), T)
    assert (prices.get("a", T + age_s) is not None) is there
    assert len(prices) == there
    assert (prices._bytes > 0) is there


def test_reads_do_not_prolong_an_entry() -> None:
    prices = MemoryCache()
    prices.put("a", entry_of(), T)
    assert [prices.get("a", T + part * MAX_AGE_S) is not None for part in (0.25, 0.5, 0.75, 1, 1.25)] == [True] * 4 + [
        False
    ]


# --- entries ----------------------------------------------------------------------------------------------------


def test_the_entry_that_was_put_first_is_evicted_first() -> None:
    prices = cache_of(entries=3)
    for key in "abcd":
        prices.put(key, entry_of(), T)
    assert kept(prices, "abcd") == "bcd"
    assert len(prices) == 3


def test_reads_do_not_delay_eviction() -> None:
    prices = cache_of(entries=3)
    for key in "abc":
        prices.put(key, entry_of(), T)
    for key in "az":
        prices.get(key, T)
    prices.put("d", entry_of(), T)
    assert kept(prices, "abcdz") == "bcd"


def test_putting_an_entry_again_delays_its_eviction() -> None:
    prices = cache_of(entries=3)
    for key in "abcad":
        prices.put(key, entry_of(), T)
    assert kept(prices, "abcd") == "acd"
    assert len(prices) == 3


# --- bytes ------------------------------------------------------------------------------------------------------


def test_the_byte_limit_includes_the_overhead_of_each_entry() -> None:
    prices = cache_of(in_bytes=3 * (OVERHEAD_BYTES + 10))
    for key in "abc":
        prices.put(key, entry_of(10), T)
    assert kept(prices, "abc") == "abc"
    prices.put("c", entry_of(11), T)
    assert kept(prices, "abc") == "bc"


def test_a_large_entry_evicts_several() -> None:
    prices = cache_of(in_bytes=4 * OVERHEAD_BYTES + 20)
    for key in "abc":
        prices.put(key, entry_of(10), T)
    prices.put("d", entry_of(2 * OVERHEAD_BYTES), T)
    assert kept(prices, "abcd") == "cd"


def test_an_entry_larger_than_the_limit_is_not_kept() -> None:
    prices = cache_of(in_bytes=OVERHEAD_BYTES + 10)
    prices.put("a", entry_of(11), T)
    assert len(prices) == prices._bytes == 0
    prices.put("a", entry_of(10), T)
    assert kept(prices, "a") == "a"


def test_a_replaced_entry_is_not_counted() -> None:
    prices = cache_of(in_bytes=2 * OVERHEAD_BYTES + 200)
    for size in (100, 150, 1, 100) * 100:
        prices.put("a", entry_of(size), T)
    assert prices._bytes == OVERHEAD_BYTES + 100
    prices.put("b", entry_of(100), T)
    assert kept(prices, "ab") == "ab"


def test_a_dropped_entry_is_not_counted() -> None:
    prices = MemoryCache()
    prices.put("a", entry_of(100), T)
    prices.drop("a")
    prices.drop("a")
    assert len(prices) == prices._bytes == 0
    assert prices.get("a", T) is None


def test_both_default_limits_can_be_reached() -> None:
    """The overhead of `MAX_ENTRIES` entries is less than `MAX_BYTES`."""
    assert MAX_ENTRIES * OVERHEAD_BYTES < MAX_BYTES
    prices = MemoryCache()
    for number in range(MAX_ENTRIES + 10):
        prices.put(str(number), entry_of(), T)
    assert len(prices) == MAX_ENTRIES


# --- order of replies ------------------------------------------------------------------------------------------


def test_an_entry_does_not_replace_one_that_was_read_later() -> None:
    prices, newer = MemoryCache(), entry_of(read_at=T + 0.2)
    prices.put("a", newer, T + 0.2)
    prices.put("a", entry_of(50, read_at=T), T + 0.2)
    assert prices.get("a", T + 0.2) is newer
    newest = entry_of(read_at=T + 0.2)
    prices.put("a", newest, T + 0.2)
    assert prices.get("a", T + 0.2) is newest


def test_an_older_price_does_not_replace_a_newer_one_even_if_it_was_read_later() -> None:
    prices, newer = MemoryCache(), entry_of(put_at_ms=1_000_001)
    prices.put("a", newer, T)
    prices.put("a", entry_of(read_at=T + 0.2), T + 0.2)
    assert prices.get("a", T + 0.2) is newer


def test_an_expired_price_does_not_keep_an_older_one_out() -> None:
    prices, after = MemoryCache(), T + MAX_AGE_S + 1
    prices.put("a", entry_of(put_at_ms=1_000_001), T)
    older = entry_of(read_at=after)
    prices.put("a", older, after)
    assert prices.get("a", after) is older


# --- the model --------------------------------------------------------------------------------------------------

keys = st.sampled_from("abcd")
puts = st.tuples(st.just("put"), keys, st.integers(1, 900), st.integers(-3, 0))
others = st.tuples(st.sampled_from(["get", "drop"]), keys, st.just(0), st.just(0))


class Model:
    """A list of keys with size and time, in the order of their puts."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self.bounds = (max_entries, max_bytes)
        self.rows: list[tuple[str, int, float]] = []

    @property
    def total(self) -> int:
        return sum(size + OVERHEAD_BYTES for _, size, _ in self.rows)

    def row(self, key: str) -> tuple[str, int, float] | None:
        return next((row for row in self.rows if row[0] == key), None)

    def drop(self, key: str) -> None:
        self.rows = [row for row in self.rows if row[0] != key]

    def put(self, key: str, size: int, read_at: float, now: float) -> None:
        self.get(key, now)
        known = self.row(key)
        if known is not None and known[2] > read_at:
            return
        self.drop(key)
        self.rows.append((key, size, read_at))
        while len(self.rows) > self.bounds[0] or self.total > self.bounds[1]:
            self.rows = self.rows[1:]

    def get(self, key: str, now: float) -> int | None:
        known = self.row(key)
        if known is not None and now - known[2] > MAX_AGE_S:
            self.drop(key)
            return None
        return None if known is None else known[1]


@given(
    st.lists(
        st.tuples(puts | others, st.sampled_from([0, 0, MAX_AGE_S / 4, MAX_AGE_S / 2, 1.5 * MAX_AGE_S])), max_size=40
    ),
    st.integers(1, 4),
    st.integers(1, 4000),
)
@example([(("put", "a", 5, 0), 0.0), (("put", "a", 900, 0), 0.0), (("put", "b", 5, 0), 0.0)], 2, 2200)
def test_the_cache_behaves_like_its_model(
    steps: list[tuple[tuple[str, str, int, int], float]], max_entries: int, max_bytes: int
) -> None:
    prices, model, now = cache_of(entries=max_entries, in_bytes=max_bytes), Model(max_entries, max_bytes), T
    for (what, key, size, lag_s), later_s in steps:
        now += later_s
        if what == "put":
            prices.put(key, entry_of(size, now + lag_s), now)
            model.put(key, size, now + lag_s, now)
        elif what == "drop":
            prices.drop(key)
            model.drop(key)
        else:
            found = prices.get(key, now)
            assert (None if found is None else 1 + len(found.record.price.rest)) == model.get(key, now)
        assert list(prices._entries) == [row[0] for row in model.rows]
        assert prices._bytes == model.total <= max_bytes
        assert len(prices) == len(model.rows) <= max_entries
