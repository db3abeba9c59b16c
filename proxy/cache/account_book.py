"""Account books: one hash per account in the store, with the state that all prices of the account share.

* Generations: two random ids in the account's book. A price is stored with the ids that were current when upstream was
  asked. A new purge generation removes all older prices; a new reprice generation makes them stale. If the store evicts
  a book, the next read creates it with new generations, so every older price is gone, purged or not.
* Invalidations: a count of questions that were purged, or whose price changed while it was fresh. When the count grows,
  processes stop serving the account's prices from memory.
* The newest balance. A balance belongs to an account, never to a price.
* Audits and repricing: which process may audit now, and which prices have changed lately.

Each process keeps a snapshot of each book, and reads it again after `BOOK_REREAD_S`.
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
"""Limits the age of a snapshot, and so the time for which a process may miss a purge or a changed price."""

CHANGES_TO_REPRICE = 3
"""Bodies whose price must have changed within `CHANGES_WITHIN_S` before the whole account is repriced."""

CHANGES_WITHIN_S = 3600
REPRICE_EVERY_S = 600
"""The least time between two repricings of an account: each makes all of its prices stale."""

_BOOK_GET = Script("proxy.cache", "book_get", repeatable=True)
_BOOK_PURGE, _BOOK_DROP = Script("proxy.cache", "book_purge"), Script("proxy.cache", "book_drop")
_BALANCE_PUT = Script("proxy.cache", "balance_put")
_AUDIT_TAKE, _AUDIT_CHANGED = Script("proxy.cache", "audit_take"), Script("proxy.cache", "audit_changed")


@dataclass(frozen=True, slots=True)
class BookSnapshot:
    """An account's book as this process read it.

    repriced_ago_ms: time between the last repricing and `now_ms`; None if there was none.
    now_ms: the store's clock when it ran the read.
    read_at: this process's monotonic clock before the read was sent.
    """

    generations: Generations
    invalidations: int
    repriced_ago_ms: int | None
    now_ms: int
    read_at: float

    def is_current(self, now: float) -> bool:
        """Whether it need not be read again yet."""
        return now - self.read_at < BOOK_REREAD_S

    def is_invalidated(self, cached: MemoryEntry) -> bool:
        """Whether the price may have been purged or replaced since it was read. Then it must be read again."""
        return cached.invalidations != self.invalidations or cached.record.generations.purge != self.generations.purge

    def may_lag(self, record: PriceRecord) -> bool:
        """Whether the record's generations may be newer than this snapshot."""
        return record.generations != self.generations and record.put_at_ms >= self.now_ms

    def as_of(self, cached: MemoryEntry, now: float) -> StoredPrice | None:
        """The price with its age at `now` (monotonic); None if it was purged."""
        repriced_ago_ms = self.repriced_ago_ms
        if repriced_ago_ms is not None:
            repriced_ago_ms += round((now - self.read_at) * 1000)
        now_ms = cached.now_ms + round((now - cached.read_at) * 1000)
        return as_of(cached.record, now_ms, self.generations, repriced_ago_ms)


@dataclass(frozen=True, slots=True)
class CachedBalance:
    """A balance in this process's memory.

    born: when upstream reported it, on the monotonic clock.
    at_ms: when the store received it, on the store's clock; None until that is known.
    """

    amount: bytes
    born: float
    at_ms: int | None

    def as_of(self, now: float) -> Balance:
        return Balance(self.amount, max(0.0, now - self.born))

    def is_replaced_by(self, read: "CachedBalance") -> bool:
        """Whether `read`, which comes from the store, is newer or the same.

        `at_ms` decides if both have it: the round trip to the store makes `born` imprecise.
        """
        if self.at_ms is None or read.at_ms is None:
            return read.born > self.born
        return read.at_ms >= self.at_ms


class AccountBooks:
    """The books of all accounts of one upstream. Methods that call the store raise `StoreUnavailable`.

    snapshots, cached_balances: by account. Public for `PriceBook.get_local`, which must not await.
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
        """The snapshot, if it is current."""
        book = self.snapshots.get(account)
        return book if book is not None and book.is_current(monotonic()) else None

    def invalidations(self, account: str) -> int:
        """The snapshot's count; -1 if there is no snapshot."""
        book = self.snapshots.get(account)
        return -1 if book is None else book.invalidations

    async def get(self, account: str) -> BookSnapshot:
        """The current snapshot. Reads the book if necessary; concurrent callers share one read."""
        book = self.current(account)
        if book is None:
            book, _ = await self._reads.do(account, lambda: self.read(account))
        return book

    async def get_for_cached_price(self, account: str) -> BookSnapshot:
        """Like `get`, but with the store unavailable an old snapshot is used for as long as cached prices are."""
        previous = self.snapshots.get(account)
        try:
            return await self.get(account)
        except StoreUnavailable:
            if previous is None or monotonic() - previous.read_at > BOOK_REREAD_S + MAX_AGE_S:
                raise
            return previous

    async def read(self, account: str) -> BookSnapshot:
        """Reads the book, with the balance, from the store, even if the snapshot is current.

        Creates a book that does not exist, with new generations.
        """
        read_at = monotonic()
        purge, reprice, now_ms, repriced_ago_ms, amount, age_ms, invalidations = await self._store.call(
            _BOOK_GET, self._key(account), args=(_new_generation(), _new_generation())
        )
        if amount is not None and age_ms is not None:
            balance = CachedBalance(amount, read_at - age_ms / 1000, now_ms - age_ms)
            known = self.cached_balances.get(account)
            if known is None or known.is_replaced_by(balance):
                self.cached_balances[account] = balance
        book = BookSnapshot(Generations(purge, reprice), invalidations, repriced_ago_ms, now_ms, read_at)
        previous = self.snapshots.get(account)
        if previous is None or previous.read_at <= read_at:
            self.snapshots[account] = book
        return book

    def read_in_turn(self, account: str) -> Awaitable[BookSnapshot]:
        """Like `read`, but callers in one iteration of the event loop share one read. The result must be awaited."""
        return self._same_turn_reads.share(account, lambda: self.read(account))

    async def invalidate(self, account: str) -> None:
        """Makes every process read the account's cached prices from the store again, within `BOOK_REREAD_S`."""
        await self._store.call(_BOOK_DROP, self._key(account))

    async def purge(self, account: str) -> None:
        """Removes all prices of the account, for every process within `BOOK_REREAD_S`, by new generations."""
        await self._store.call(_BOOK_PURGE, self._key(account), args=(_new_generation(), _new_generation()))
        self.snapshots.pop(account, None)

    def balance(self, account: str) -> Balance | None:
        """The newest balance in this process's memory."""
        cached = self.cached_balances.get(account)
        return None if cached is None else cached.as_of(monotonic())

    async def balances(self, accounts: Collection[str]) -> dict[str, Balance]:
        """The newest balance of each account that has one, as the store had it at most `BOOK_REREAD_S` ago."""
        await asyncio.gather(*(self.get(account) for account in accounts))
        return {account: balance for account in accounts if (balance := self.balance(account)) is not None}

    def record_balance(self, account: str, amount: bytes) -> Awaitable[None]:
        """Records a balance that upstream has just reported. The result must be awaited.

        This process has it at once, the store when the awaitable is done. A repeated amount is written once per
        iteration of the event loop.
        """
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

    async def claim_audit(self, account: str, *, max_age_s: float, for_s: float) -> bool:
        """Claims the account's next audit for this process and for `for_s`.

        False if another process has claimed it, or the balance in the store is younger than `max_age_s`.
        """
        args = (round(max_age_s * 1000), round(for_s * 1000))
        return bool(await self._store.call(_AUDIT_TAKE, self._key(account), args=args))

    async def record_price_change(self, account: str, key: str) -> bool:
        """Records that the price of a question has changed. True if that has repriced the account."""
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
