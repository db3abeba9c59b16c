"""What to do with what is known: serve it, serve it stale, or ask upstream."""

from dataclasses import dataclass

from proxy.cache.prices import Balance, Known, StoredPrice
from proxy.gateway.cache_control import Directives


@dataclass(frozen=True, slots=True)
class Windows:
    """How long behind its expiry a price may still serve, in seconds."""

    stale_while_revalidate_s: float
    stale_if_error_s: float


@dataclass(slots=True)
class Serve:
    """A stored price will do; a stale one is to be refreshed behind the answer."""

    stored: StoredPrice
    balance: Balance
    stale: bool


@dataclass(frozen=True, slots=True)
class Forward:
    """Upstream is to be asked. `reason` as RFC 9211 §2.2 names it; `fallback` serves if that fails."""

    reason: str
    fallback: StoredPrice | None = None


@dataclass(frozen=True, slots=True)
class NotCached:
    """Upstream would have to be asked, and the client does not want that."""


Choice = Serve | Forward | NotCached


def choose(known: Known | None, wants: Directives, windows: Windows) -> Choice:
    """What to do for a client that `wants`; `known` is None when the store is out of reach."""
    choice = _choose(known, wants, windows)
    return NotCached() if wants.only_if_cached and isinstance(choice, Forward) else choice


def _choose(known: Known | None, wants: Directives, windows: Windows) -> Serve | Forward:  # noqa: PLR0911 -- a line a case
    if known is None:
        return Forward("bypass")
    if wants.no_cache or wants.no_store:
        return Forward("request")
    stored, balance = known.stored, known.balance
    if stored is None or balance is None:  # a price is never shown without the account's balance
        return Forward("miss")
    if wants.max_age_s is not None and not wants.accepts(stored.age_s):
        return Forward("request")
    if stored.ttl_s > 0:
        return Serve(stored, balance, stale=False)
    if -stored.ttl_s <= windows.stale_while_revalidate_s:
        return Serve(stored, balance, stale=True)
    return Forward("stale", stored if -stored.ttl_s <= windows.stale_if_error_s else None)
