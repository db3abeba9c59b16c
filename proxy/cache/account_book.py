"""Account books: one hash in the store for each account, with what all prices of that account depend on.

* A book holds two generations. Prices put under another purge generation are gone, those of another reprice generation
  are stale. A book that the store has evicted is created again with new generations, so what was stored before is gone,
  whether it was purged or not.
* It holds the newest balance. A balance belongs to an account, never to a price.
* It counts invalidations: questions that were purged, or got another price before their time.
* It decides which process audits a price, and whether enough prices have changed to reprice the account.
* This process keeps a snapshot of each book, and reads it again after `BOOK_REREAD_S`.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Collection
from dataclasses import dataclass, replace
from time import monotonic

from proxy.cache.memory import MAX_AGE_S, MemoryEntry
from proxy.cache.prices import Balance, Generations, PriceRecord, StoredPrice, as_of
from proxy.cache.single_flight import SingleFlight, TurnCoalescer
from proxy.problems import StoreUnavailable
from proxy.store.client import Script, Store

BOOK_REREAD_S = 1.0
"""The age at which a snapshot is read again: so long a process may miss a purge or a changed price."""

CHANGES_TO_REPRICE = 3
CHANGES_WITHIN_S = 3600
REPRICE_EVERY_S = 600

_BOOK_GET = Script("proxy.cache", "book_get", repeatable=True)
_BOOK_PURGE, _BOOK_DROP = Script("proxy.cache", "book_purge"), Script("proxy.cache", "book_drop")
_BALANCE_PUT = Script("proxy.cache", "balance_put")
_AUDIT_TAKE, _AUDIT_CHANGED = Script("proxy.cache", "audit_take"), Script("proxy.cache", "audit_changed")


@dataclass(frozen=True, slots=True)
class BookSnapshot:
    """An account's book as this process read it, at `now_ms` of the store and `read_at` on its own monotonic clock.

    invalidations: counts questions that were purged, or got another price before their time, so that no process goes on
        serving the old price from memory.
    """

    generations: Generations
    invalidations: int
    repriced_ago_ms: int | None
    now_ms: int
    read_at: float

    def is_current(self, now: float) -> bool:
        return now - self.read_at < BOOK_REREAD_S

    def is_invalidated(self, cached: MemoryEntry) -> bool:
        """Whether the price may have been purged or replaced since, so that only the store can tell."""
        return cached.invalidations != self.invalidations or cached.record.generations.purge != self.generations.purge

    def may_lag(self, record: PriceRecord) -> bool:
        """Whether `record` may have generations that the book has got since this snapshot."""
        return record.generations != self.generations and record.put_at_ms >= self.now_ms

    def as_of(self, cached: MemoryEntry, now: float) -> StoredPrice | None:
        """The price at `now` (monotonic); None if it has been purged."""
        repriced_ago_ms = self.repriced_ago_ms
        if repriced_ago_ms is not None:
            repriced_ago_ms += round((now - self.read_at) * 1000)
        now_ms = cached.now_ms + round((now - cached.read_at) * 1000)
        return as_of(cached.record, now_ms, self.generations, repriced_ago_ms)


@dataclass(frozen=True, slots=True)
class CachedBalance:
    """A balance in this process.

    born: when upstream said it, monotonic.
    at_ms: when the store got it, by the store's clock; None while it may not have.
    """

    amount: bytes
    born: float
    at_ms: int | None

    def as_of(self, now: float) -> Balance:
        return Balance(self.amount, max(0.0, now - self.born))

    def is_replaced_by(self, read: "CachedBalance") -> bool:
        """Whether `read`, from the store, is newer.

        The store's times decide where both are known: the round trip makes `born` imprecise.
        """
        if self.at_ms is None or read.at_ms is None:
            return read.born > self.born
        return read.at_ms >= self.at_ms


class AccountBooks:
    """The books of all accounts of one upstream. What calls the store raises `StoreUnavailable`.

    snapshots, cached_balances: by account; for readers that must not wait.
    """

    def __init__(self, store: Store, *, origin: str) -> None:
        self.snapshots: dict[str, BookSnapshot] = {}
        self.cached_balances: dict[str, CachedBalance] = {}
        self._store = store
        self._origin = origin
        self._reads = SingleFlight[BookSnapshot]()
        self._same_turn_reads = TurnCoalescer[BookSnapshot]()
        self._balance_puts = TurnCoalescer[None]()

    def current(self, account: str) -> BookSnapshot | None:
        """The snapshot, if it need not be read again."""
        book = self.snapshots.get(account)
        return book if book is not None and book.is_current(monotonic()) else None

    def invalidations(self, account: str) -> int:
        """The count in the snapshot; -1 without one."""
        book = self.snapshots.get(account)
        return -1 if book is None else book.invalidations

    async def get(self, account: str) -> BookSnapshot:
        """The snapshot, read again if it is not current: one read for all who need it at the same time."""
        book = self.current(account)
        if book is None:
            book, _ = await self._reads.do(account, lambda: self.read(account))
        return book

    async def get_for_cached_price(self, account: str) -> BookSnapshot:
        """As `get`; while the store is out of reach, a snapshot is good for as long as cached prices are."""
        previous = self.snapshots.get(account)
        try:
            return await self.get(account)
        except StoreUnavailable:
            if previous is None or monotonic() - previous.read_at > BOOK_REREAD_S + MAX_AGE_S:
                raise
            return previous

    async def read(self, account: str) -> BookSnapshot:
        """Reads the book from the store, with what another process has just put there."""
        read_at = monotonic()
        purge, reprice, now_ms, repriced_ago_ms, amount, age_ms, invalidations = await self._store.call(
            _BOOK_GET, self._key(account), args=(_new_generation(), _new_generation())
        )
        if amount is not None and age_ms is not None:
            self._cache_balance(account, CachedBalance(amount, read_at - age_ms / 1000, now_ms - age_ms))
        book = BookSnapshot(Generations(purge, reprice), invalidations, repriced_ago_ms, now_ms, read_at)
        previous = self.snapshots.get(account)
        if previous is None or previous.read_at <= read_at:
            self.snapshots[account] = book
        return book

    def read_in_turn(self, account: str) -> Awaitable[BookSnapshot]:
        """As `read`, once for all who ask in the same turn of the event loop. Must be awaited."""
        return self._same_turn_reads.share(account, lambda: self.read(account))

    async def invalidate(self, account: str) -> None:
        """Counts an invalidation: processes that have the account's prices in memory ask the store again."""
        await self._store.call(_BOOK_DROP, self._key(account))

    async def purge(self, account: str) -> None:
        """Begins new generations."""
        await self._store.call(_BOOK_PURGE, self._key(account), args=(_new_generation(), _new_generation()))
        self.snapshots.pop(account, None)

    def balance(self, account: str) -> Balance | None:
        """The newest balance that this process knows of."""
        cached = self.cached_balances.get(account)
        return None if cached is None else cached.as_of(monotonic())

    async def balances(self, accounts: Collection[str]) -> dict[str, Balance]:
        """The newest balances that the fleet knows of."""
        await asyncio.gather(*(self.get(account) for account in accounts))
        return {account: balance for account in accounts if (balance := self.balance(account)) is not None}

    def record_balance(self, account: str, amount: bytes) -> Awaitable[None]:
        """Keeps a balance that upstream has just shown: in this process at once, in the store when that is awaited."""
        previous, seen = self.cached_balances.get(account), CachedBalance(amount, monotonic(), None)
        self.cached_balances[account] = seen
        is_repeated = previous is not None and previous.amount == amount
        put = self._balance_puts.share if is_repeated else self._balance_puts.start
        return put(account, lambda: self._put_balance(account, seen))

    async def _put_balance(self, account: str, seen: CachedBalance) -> None:
        at_ms = await self._store.call(_BALANCE_PUT, self._key(account), args=(seen.amount,))
        newest = self.cached_balances[account]
        if newest.amount == seen.amount:
            self.cached_balances[account] = replace(newest, at_ms=at_ms)

    def _cache_balance(self, account: str, read: CachedBalance) -> None:
        previous = self.cached_balances.get(account)
        if previous is None or previous.is_replaced_by(read):
            self.cached_balances[account] = read

    async def claim_audit(self, account: str, *, max_age_s: float, for_s: float) -> bool:
        """Whether this process is the one in the fleet that asks for a fresh balance now."""
        args = (round(max_age_s * 1000), round(for_s * 1000))
        return bool(await self._store.call(_AUDIT_TAKE, self._key(account), args=args))

    async def record_price_change(self, account: str, key: str) -> bool:
        """Records that a body's price has changed; whether the account has been repriced for it."""
        limits = (CHANGES_TO_REPRICE, CHANGES_WITHIN_S * 1000, REPRICE_EVERY_S * 1000)
        args = (key, *limits, _new_generation())
        repriced = bool(await self._store.call(_AUDIT_CHANGED, self._key(account), args=args))
        if repriced:
            self.snapshots.pop(account, None)
        return repriced

    def _key(self, account: str) -> str:
        return f"ep1:book:{self._origin}:{account}"


def _new_generation() -> str:
    return secrets.token_urlsafe(6)
