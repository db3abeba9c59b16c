"""Every combination of what is known and what a client wants, as a table; and its numbers against a small model."""

from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.cache.prices import Balance, Lookup, Price, StoredPrice
from proxy.gateway.freshness import Choice, Directives, Forward, NotCached, Serve, StaleLimits, choose

WINDOWS = StaleLimits(stale_while_revalidate_s=30, stale_if_error_s=600)
BALANCE = Balance(b"20", 3.5)
TTL_S = 300.0


def stored(ttl_s: float, age_s: float | None = None) -> StoredPrice:
    return StoredPrice(Price(b"5", b""), TTL_S - ttl_s if age_s is None else age_s, ttl_s, b"d1")


def said(choice: Choice, kept: StoredPrice | None) -> str:
    """A choice in words, seen to be about what is known and nothing else."""
    match choice:
        case Serve(price, balance, stale):
            assert price is kept
            assert balance is BALANCE
            return "serve stale" if stale else "serve"
        case Forward(reason, None):
            return reason
        case Forward(reason, fallback):
            assert fallback is kept
            return f"{reason} or fall back"
        case NotCached():
            return "not cached"


# --- the table --------------------------------------------------------------------------------------------------

PRICES = {
    "fresh": stored(120),
    "fresh, only just": stored(0.001),
    "stale, from now on": stored(0),
    "stale": stored(-10),
    "stale, only just to be shown": stored(-30),
    "stale, for errors from now on": stored(-30.001),
    "stale for errors": stored(-300),
    "stale for errors, only just": stored(-600),
    "gone from now on": stored(-600.001),
    "gone": stored(-601),
}
KNOWN: dict[str, Lookup | None] = {
    "out of reach": None,
    "nothing": Lookup(None, BALANCE, None),
    "nothing at all": Lookup(None, None, None),
    "purged": Lookup(None, BALANCE, 17),
    "fresh, no balance": Lookup(PRICES["fresh"], None, 17),
    "stale, no balance": Lookup(PRICES["stale"], None, 17),
    **{name: Lookup(price, BALANCE, 17) for name, price in PRICES.items()},
}
WANTED = {
    "anything": Directives(),
    "no older than now": Directives(max_age_s=0),
    "young": Directives(max_age_s=250),
    "of any age": Directives(max_age_s=2**31),
    "new": Directives(no_cache=True),
    "new, not kept": Directives(no_store=True),
    "both": Directives(no_cache=True, no_store=True),
    "new, or young": Directives(no_cache=True, max_age_s=250),
}
# What each of them gets: in order `anything` and `of any age`, `young`, `no older than now`.
TABLE = {
    "out of reach": ("bypass", "bypass", "bypass"),
    "nothing": ("miss", "miss", "miss"),
    "nothing at all": ("miss", "miss", "miss"),
    "purged": ("miss", "miss", "miss"),
    "fresh, no balance": ("miss", "miss", "miss"),
    "stale, no balance": ("miss", "miss", "miss"),
    "fresh": ("serve", "serve", "request"),
    "fresh, only just": ("serve", "request", "request"),
    "stale, from now on": ("serve stale", "request", "request"),
    "stale": ("serve stale", "request", "request"),
    "stale, only just to be shown": ("serve stale", "request", "request"),
    "stale, for errors from now on": ("stale or fall back", "request", "request"),
    "stale for errors": ("stale or fall back", "request", "request"),
    "stale for errors, only just": ("stale or fall back", "request", "request"),
    "gone from now on": ("stale", "request", "request"),
    "gone": ("stale", "request", "request"),
}


def promised(known: str, wanted: str) -> str:
    wants = WANTED[wanted]
    if wants.no_cache or wants.no_store:
        return "bypass" if known == "out of reach" else "request"
    return TABLE[known][["of any age", "young", "no older than now"].index(wanted.replace("anything", "of any age"))]


def test_the_table_is_whole() -> None:
    assert list(TABLE) == list(KNOWN)


@pytest.mark.parametrize(("known", "wanted"), list(product(KNOWN, WANTED)))
def test_a_row_of_the_table(known: str, wanted: str) -> None:
    price = PRICES.get(known)
    assert said(choose(KNOWN[known], WANTED[wanted], WINDOWS), price) == promised(known, wanted)


@pytest.mark.parametrize(("known", "wanted"), list(product(KNOWN, WANTED)))
def test_who_wants_no_request_to_be_made_gets_what_is_stored_or_nothing(known: str, wanted: str) -> None:
    wants = WANTED[wanted]
    silent = Directives(wants.no_cache, wants.no_store, only_if_cached=True, max_age_s=wants.max_age_s)
    expected = promised(known, wanted)
    given_ = said(choose(KNOWN[known], silent, WINDOWS), PRICES.get(known))
    assert given_ == (expected if expected.startswith("serve") else "not cached")


@pytest.mark.parametrize(("age_s", "expected"), [(249.999, "serve"), (250.0, "serve"), (250.001, "request")])
def test_an_age_may_be_just_what_is_wanted(age_s: float, expected: str) -> None:
    price = stored(5, age_s)
    assert said(choose(Lookup(price, BALANCE, 17), Directives(max_age_s=250), WINDOWS), price) == expected


def test_a_price_of_this_very_moment_is_no_older_than_now() -> None:
    price = stored(TTL_S, 0)
    assert said(choose(Lookup(price, BALANCE, 17), Directives(max_age_s=0), WINDOWS), price) == "serve"


def test_a_young_price_may_still_be_stale() -> None:
    """After a repricing it is. `max-age` is about its age alone."""
    price = stored(-10, age_s=20)
    assert said(choose(Lookup(price, BALANCE, 17), Directives(max_age_s=250), WINDOWS), price) == "serve stale"


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (StaleLimits(0, 0), "stale"),
        (StaleLimits(0, 600), "stale or fall back"),
        (StaleLimits(30, 0), "serve stale"),
        (StaleLimits(30, 10), "serve stale"),
    ],
)
def test_windows_of_no_length(windows: StaleLimits, expected: str) -> None:
    price = stored(-0.001)
    assert said(choose(Lookup(price, BALANCE, 17), Directives(), windows), price) == expected


def test_a_window_for_errors_may_be_the_shorter_one() -> None:
    for ttl_s, expected in [(-29.0, "serve stale"), (-30.0, "serve stale"), (-31.0, "stale")]:
        price = stored(ttl_s)
        assert said(choose(Lookup(price, BALANCE, 17), Directives(), StaleLimits(30, 10)), price) == expected


# --- the model --------------------------------------------------------------------------------------------------


def model(known: Lookup | None, wants: Directives, windows: StaleLimits) -> str:
    """All that would do is listed first; the best of it is taken."""
    price = known.stored if known is not None and known.balance is not None else None
    limit = float("inf") if wants.max_age_s is None else float(wants.max_age_s)
    will_do = price is not None and not (wants.no_cache or wants.no_store) and not price.age_s > limit
    late_s = 0.0 if price is None else -price.ttl_s
    usable = {
        "serve": will_do and late_s < 0,
        "serve stale": will_do and 0 <= late_s <= windows.stale_while_revalidate_s,
        "not cached": wants.only_if_cached,
        "bypass": known is None,
        "request": wants.no_cache or wants.no_store or (price is not None and not will_do),
        "miss": price is None,
        "stale or fall back": 0 <= late_s <= windows.stale_if_error_s,
        "stale": True,
    }
    return next(choice for choice, applies in usable.items() if applies)


seconds = st.integers(0, 6).map(float) | st.floats(0, 6)
stored_prices = st.builds(stored, st.integers(-6, 6).map(float) | st.floats(-6, 6), seconds)
knowns = st.none() | st.builds(Lookup, st.none() | stored_prices, st.none() | st.just(BALANCE), st.none() | st.just(17))
wishes = st.builds(Directives, st.booleans(), st.booleans(), st.booleans(), st.none() | st.integers(0, 6))


@given(knowns, wishes, st.builds(StaleLimits, seconds, seconds))
@example(Lookup(stored(0, 0), BALANCE, 17), Directives(max_age_s=0), StaleLimits(0, 0))
@example(Lookup(stored(-1, 5), BALANCE, 17), Directives(), StaleLimits(1, 1))
def test_a_choice_is_the_models(known: Lookup | None, wants: Directives, windows: StaleLimits) -> None:
    choice = choose(known, wants, windows)
    assert said(choice, None if known is None else known.stored) == model(known, wants, windows)
