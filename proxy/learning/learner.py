"""Learns which members decide a price, and infers prices from what was learned.

Signatures first; the bodies follow.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from proxy.cache.prices import Price
from proxy.learning.evidence import Scope
from proxy.learning.ticket import Ticket
from proxy.learning.verdict import Inferred, NotInferred
from proxy.store.client import Store


class Question(Protocol):
    """What is learned from; `proxy.gateway.canonical_request.CanonicalRequest` is one."""

    account: str
    key: str
    query: str
    ignored: tuple[str, ...]

    @property
    def canonical(self) -> bytes: ...


class Counted(StrEnum):
    """What became of a price that was inferred."""

    ANSWERED = "answered"
    RIGHT = "right"
    WRONG = "wrong"


class Effect(StrEnum):
    """What an observed answer did to what is learned."""

    LATE = "late"
    """Ignored: it was asked before a purge, a move of the list, or a doubt."""
    NEW = "new"
    """The first answer of its setting."""
    AGREED = "agreed"
    OUTSIDE = "outside"
    """It does not agree with its setting, but lies outside the range."""
    DOUBT = "doubt"
    """It does not agree with its setting: nothing is inferred in the scope (or account) until that is resolved."""
    LIST_MOVED = "list-moved"
    """It resolved a doubt: the price list has changed. Count it as a changed price (`AccountBooks.record_price_change`)."""
    CONTRADICTED = "contradicted"
    """It resolved a doubt: a member that was left out does decide prices."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The result of `observe`.

    old: the price that the setting had before a doubt or an outside answer; None otherwise.
    suspects: after a contradiction, inferred answers since the last test that agreed; else 0.
    since_ms, until_ms: the time span of those, on the store's clock (Unix time).
    expired: scopes (ids) of the account whose doubt nobody resolved in time, which counts as a contradiction.
    """

    effect: Effect
    scope: str
    setting: str
    old: Price | None = None
    suspects: int = 0
    since_ms: int = 0
    until_ms: int = 0
    expired: tuple[str, ...] = ()


class Learner:
    """One process's view of what the fleet has learned. Scopes are kept in memory for at most a second.

    origin: of upstream. ttl_s: of prices. learn_from, audit_one_in: `cache.learn_from`, `cache.audit_one_in`.
    """

    def __init__(self, store: Store, *, origin: str, ttl_s: float, learn_from: int, audit_one_in: int) -> None: ...

    async def look_up(self, question: Question, never_learn: Collection[str] = ()) -> Inferred | NotInferred:
        """What is known about the price of a body that is not known exactly. Never raises `StoreUnavailable`.

        Call it before upstream is asked; `observe` needs its ticket, also if the answer is only learned from.
        """
        ...

    def count(self, inferred: Inferred, counted: Counted, team: str) -> bool:
        """Counts an inferred price that was answered (or, in observe mode, was compared with upstream's).

        Returns whether this answer must be audited now: ask upstream in the background, then `observe`.
        """
        ...

    def owe_audit(self, inferred: Inferred) -> None:
        """An audit that was due could not be asked: the next price of this setting is not inferred."""
        ...

    async def observe(self, ticket: Ticket, price: Price, *, team: str, is_audit: bool = False) -> Observation:
        """Learns from upstream's answer. Raises `StoreUnavailable`."""
        ...

    async def scopes(self, account: str) -> list[Scope]:
        """What was learned in each scope of an account, the last used first. Raises `StoreUnavailable`."""
        ...

    async def forget(self, account: str, scope: str | None = None) -> int:
        """Forgets a scope, or all of the account's. Returns how many there were. Raises `StoreUnavailable`."""
        ...

    async def drop_setting(self, question: Question, never_learn: Collection[str] = ()) -> None:
        """Drops the price of a body's setting: call it when a question is purged. Raises `StoreUnavailable`."""
        ...

    async def drop_prices(self, account: str) -> None:
        """Drops the prices of all settings: call it when an account is purged or repriced. Raises as `drop_setting`."""
        ...

    async def close(self) -> None:
        """Stores the counts that are still in memory."""
        ...
