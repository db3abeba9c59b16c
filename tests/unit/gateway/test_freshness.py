"""Freshness decisions: a table of all stored prices and directives, and generated cases against a small model."""

from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.cache.prices import Balance, Lookup, Price, StoredPrice
from proxy.gateway.freshness import Choice, Directives, Forward, NotCached, Serve, StaleLimits, choose

STALE_LIMITS = StaleLimits(stale_while_revalidate_s=30, stale_if_error_s=600)
BALANCE = Balance(b"20", 3.5)
TTL_S = 300.0


def stored(ttl_s: float, age_s: float | None = None) -> StoredPrice:
    return StoredPrice(Price(b"5", b""), TTL_S - ttl_s if age_s is None else age_s, ttl_s, b"d1")


def described(choice: Choice, kept: StoredPrice | None) -> str:
    """A choice in words, checked to use the stored price and balance."""
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
LOOKUPS: dict[str, Lookup | None] = {
    "out of reach": None,
    "nothing": Lookup(None, BALANCE, None),
    "nothing at all": Lookup(None, None, None),
    "purged": Lookup(None, BALANCE, 17),
    "fresh, no balance": Lookup(PRICES["fresh"], None, 17),
    "stale, no balance": Lookup(PRICES["stale"], None, 17),
    **{name: Lookup(price, BALANCE, 17) for name, price in PRICES.items()},
}
DIRECTIVES = {
    "anything": Directives(),
    "no older than now": Directives(max_age_s=0),
    "young": Directives(max_age_s=250),
    "of any age": Directives(max_age_s=2**31),
    "new": Directives(no_cache=True),
    "new, not kept": Directives(no_store=True),
    "both": Directives(no_cache=True, no_store=True),
    "new, or young": Directives(no_cache=True, max_age_s=250),
}
# The choice for each look-up: for `anything` and `of any age`, for `young`, and for `no older than now`.
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


def expected_choice(lookup: str, wanted: str) -> str:
    directives = DIRECTIVES[wanted]
    if directives.no_cache or directives.no_store:
        return "bypass" if lookup == "out of reach" else "request"
    return TABLE[lookup][["of any age", "young", "no older than now"].index(wanted.replace("anything", "of any age"))]


def test_the_table_is_complete() -> None:
    assert list(TABLE) == list(LOOKUPS)


@pytest.mark.parametrize(("lookup", "wanted"), list(product(LOOKUPS, DIRECTIVES)))
def test_a_row_of_the_table(lookup: str, wanted: str) -> None:
    price = PRICES.get(lookup)
    assert described(choose(LOOKUPS[lookup], DIRECTIVES[wanted], STALE_LIMITS), price) == expected_choice(
        lookup, wanted
    )


@pytest.mark.parametrize(("lookup", "wanted"), list(product(LOOKUPS, DIRECTIVES)))
def test_only_if_cached_gets_a_stored_price_or_not_cached(lookup: str, wanted: str) -> None:
    directives = DIRECTIVES[wanted]
    silent = Directives(directives.no_cache, directives.no_store, only_if_cached=True, max_age_s=directives.max_age_s)
    expected = expected_choice(lookup, wanted)
    given_ = described(choose(LOOKUPS[lookup], silent, STALE_LIMITS), PRICES.get(lookup))
    assert given_ == (expected if expected.startswith("serve") else "not cached")


@pytest.mark.parametrize(("age_s", "expected"), [(249.999, "serve"), (250.0, "serve"), (250.001, "request")])
def test_max_age_includes_its_own_value(age_s: float, expected: str) -> None:
    price = stored(5, age_s)
    assert described(choose(Lookup(price, BALANCE, 17), Directives(max_age_s=250), STALE_LIMITS), price) == expected


def test_max_age_0_accepts_a_price_of_age_0() -> None:
    price = stored(TTL_S, 0)
    assert described(choose(Lookup(price, BALANCE, 17), Directives(max_age_s=0), STALE_LIMITS), price) == "serve"


def test_a_young_price_may_still_be_stale() -> None:
    """After a repricing, for example. `max-age` only limits the age."""
    price = stored(-10, age_s=20)
    assert (
        described(choose(Lookup(price, BALANCE, 17), Directives(max_age_s=250), STALE_LIMITS), price) == "serve stale"
    )


@pytest.mark.parametrize(
    ("stale_limits", "expected"),
    [
        (StaleLimits(0, 0), "stale"),
        (StaleLimits(0, 600), "stale or fall back"),
        (StaleLimits(30, 0), "serve stale"),
        (StaleLimits(30, 10), "serve stale"),
    ],
)
def test_stale_limits_of_zero(stale_limits: StaleLimits, expected: str) -> None:
    price = stored(-0.001)
    assert described(choose(Lookup(price, BALANCE, 17), Directives(), stale_limits), price) == expected


def test_the_limit_for_errors_may_be_the_shorter_one() -> None:
    for ttl_s, expected in [(-29.0, "serve stale"), (-30.0, "serve stale"), (-31.0, "stale")]:
        price = stored(ttl_s)
        assert described(choose(Lookup(price, BALANCE, 17), Directives(), StaleLimits(30, 10)), price) == expected


# --- the model --------------------------------------------------------------------------------------------------


def model(lookup: Lookup | None, directives: Directives, stale_limits: StaleLimits) -> str:
    """Lists which choices are allowed, best first, and takes the first."""
    price = lookup.stored if lookup is not None and lookup.balance is not None else None
    limit = float("inf") if directives.max_age_s is None else float(directives.max_age_s)
    is_usable = price is not None and not (directives.no_cache or directives.no_store) and not price.age_s > limit
    late_s = 0.0 if price is None else -price.ttl_s
    usable = {
        "serve": is_usable and late_s < 0,
        "serve stale": is_usable and 0 <= late_s <= stale_limits.stale_while_revalidate_s,
        "not cached": directives.only_if_cached,
        "bypass": lookup is None,
        "request": directives.no_cache or directives.no_store or (price is not None and not is_usable),
        "miss": price is None,
        "stale or fall back": 0 <= late_s <= stale_limits.stale_if_error_s,
        "stale": True,
    }
    return next(choice for choice, applies in usable.items() if applies)


seconds = st.integers(0, 6).map(float) | st.floats(0, 6)
stored_prices = st.builds(stored, st.integers(-6, 6).map(float) | st.floats(-6, 6), seconds)
lookups = st.none() | st.builds(
    Lookup, st.none() | stored_prices, st.none() | st.just(BALANCE), st.none() | st.just(17)
)
directive_sets = st.builds(Directives, st.booleans(), st.booleans(), st.booleans(), st.none() | st.integers(0, 6))


@given(lookups, directive_sets, st.builds(StaleLimits, seconds, seconds))
@example(Lookup(stored(0, 0), BALANCE, 17), Directives(max_age_s=0), StaleLimits(0, 0))
@example(Lookup(stored(-1, 5), BALANCE, 17), Directives(), StaleLimits(1, 1))
def test_choices_equal_those_of_the_model(
    lookup: Lookup | None, directives: Directives, stale_limits: StaleLimits
) -> None:
    choice = choose(lookup, directives, stale_limits)
    assert described(choice, None if lookup is None else lookup.stored) == model(lookup, directives, stale_limits)
