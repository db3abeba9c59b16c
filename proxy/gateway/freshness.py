"""Decides whether to serve a stored price, fresh or stale, or to ask upstream.

Parses the request's `Cache-Control` (RFC 9111 §5.2.1) for that decision. No clock, no I/O: the `Lookup` has the ages.
"""

import re
from dataclasses import dataclass

from proxy.cache.prices import Balance, Lookup, StoredPrice
from proxy.learning.verdict import Inferred
from proxy.problems import BadRequest, Code

MAX_SECONDS = 2**31
"""A longer time counts as this one (RFC 9111 §1.2.2)."""

# Text between commas outside of quoted strings (RFC 9110 §5.6.4). A string that does not end takes the rest.
_MEMBER = re.compile(r'(?:[^",]++|"(?:[^"\\]|\\.)*+"?)++', re.DOTALL)
_MAX_DIGITS = len(str(MAX_SECONDS)) + 1


@dataclass(frozen=True, slots=True)
class Directives:
    """The supported directives of a request's `Cache-Control`. `max_age_s` is None if any age is accepted."""

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age_s: int | None = None

    @property
    def bypasses_cache(self) -> bool:
        """Whether no stored answer is accepted, however young."""
        return self.no_cache or self.no_store


def parse_directives(value: str) -> Directives:
    """Parses a `Cache-Control` header. Unsupported directives are ignored; of repeated ones, the first counts.

    Raises `BadRequest` for a `max-age` that is not a whole number.
    """
    found: dict[str, str] = {}
    for member in _MEMBER.findall(value):
        name, _, argument = member.partition("=")
        found.setdefault(name.strip(" \t").lower(), argument.strip(" \t"))
    return Directives(
        no_cache="no-cache" in found,
        no_store="no-store" in found,
        only_if_cached="only-if-cached" in found,
        max_age_s=_seconds(found["max-age"]) if "max-age" in found else None,
    )


def _seconds(argument: str) -> int:
    """Parses a token or a quoted string: recipients should accept both forms (RFC 9111 §5.2)."""
    is_quoted = len(argument) > 1 and argument[0] == argument[-1] == '"'
    digits = argument[1:-1] if is_quoted else argument
    if not (digits.isascii() and digits.isdigit()):
        raise BadRequest(
            Code.INVALID_REQUEST, "Cache-Control: max-age must be a whole number of seconds, such as max-age=60."
        )
    return min(int(digits.lstrip("0")[:_MAX_DIGITS] or "0"), MAX_SECONDS)


@dataclass(frozen=True, slots=True)
class StaleLimits:
    """How long after its expiry a price may still be served, in seconds."""

    stale_while_revalidate_s: float
    stale_if_error_s: float


@dataclass(slots=True)
class Serve:
    """Serve a price. If it is stale, refresh it in the background. `inferred`: None if it is the body's own."""

    stored: StoredPrice
    balance: Balance
    stale: bool
    inferred: Inferred | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """Ask upstream.

    reason: a value of `fwd` (RFC 9211 §2.2).
    fallback: served if upstream fails.
    inferred: how `fallback` is inferred; without a fallback, what is compared with upstream's answer (`observe`).
    """

    reason: str
    fallback: StoredPrice | None = None
    inferred: Inferred | None = None


@dataclass(frozen=True, slots=True)
class NotCached:
    """Refuse: upstream would have to be asked, and the client's `only-if-cached` forbids it."""


Choice = Serve | Forward | NotCached


def choose(lookup: Lookup | None, directives: Directives, stale_limits: StaleLimits) -> Choice:
    """What to do with a request. `lookup` is None if the price book is unavailable."""
    choice = _choose(lookup, directives, stale_limits)
    return NotCached() if directives.only_if_cached and isinstance(choice, Forward) else choice


def _choose(lookup: Lookup | None, directives: Directives, stale_limits: StaleLimits) -> Serve | Forward:  # noqa: PLR0911 -- one line per case
    if lookup is None:
        return Forward("bypass")
    if directives.no_cache or directives.no_store:
        return Forward("request")
    stored, balance = lookup.stored, lookup.balance
    if stored is None or balance is None:  # every answer with a price must show the account's balance
        return Forward("miss")
    if directives.max_age_s is not None and stored.age_s > directives.max_age_s:
        return Forward("request")
    if stored.ttl_s > 0:
        return Serve(stored, balance, stale=False)
    if -stored.ttl_s <= stale_limits.stale_while_revalidate_s:
        return Serve(stored, balance, stale=True)
    return Forward("stale", stored if -stored.ttl_s <= stale_limits.stale_if_error_s else None)
