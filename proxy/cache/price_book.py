"""The price book: a cache of upstream's prices in the shared store, with an in-process cache in front of it.

* Ages are measured on the store's clock only, so gateways whose clocks differ report the same age.
* Only the holder of a question's lease stores its price: see `proxy.cache.leases`.
* The account book, another key in the store, decides whether a stored price is still valid, and has the balance that is
  sent with it: see `proxy.cache.account_book`.
"""

import asyncio
from contextlib import suppress
from time import monotonic
from typing import NamedTuple

from proxy.cache.account_book import AccountBooks, BookSnapshot, CachedBalance
from proxy.cache.leases import Lease, Leases
from proxy.cache.memory import MemoryCache, MemoryEntry, decode_entry
from proxy.cache.prices import ENCODING, Lookup, Price, PriceRecord, StoredPrice, encode_price, store_keys
from proxy.problems import StoreUnavailable
from proxy.store.client import Script, Store

_PRICE_GET = Script("proxy.cache", "price_get", repeatable=True)
_PRICE_PUT, _PRICE_PURGE = Script("proxy.cache", "price_put"), Script("proxy.cache", "price_purge")


class Put(NamedTuple):
    """The result of storing a price.

    is_current: False if the price is superseded, by another leader or by a purge.
    replaced: the estimate that was stored for the very same body before, purged or not; None if there is none.
    """

    is_current: bool
    replaced: bytes | None = None


class PriceBook:
    """The prices of one upstream, shared by all processes on the same store.

    ttl_s: seconds for which a price is fresh. stale_s: seconds for which it is kept after that.
    Methods that call the store raise `StoreUnavailable`.
    """

    def __init__(self, store: Store, *, origin: str, ttl_s: float, stale_s: float) -> None:
        self._store = store
        self._ttl_ms = round(ttl_s * 1000)
        self._lifetime_ms = self._ttl_ms + round(stale_s * 1000)
        self._memory = MemoryCache()
        self.accounts = AccountBooks(store, origin=origin)
        self.leases = Leases(store, self.accounts, self._memory)

    @property
    def ttl_s(self) -> float:
        return self._ttl_ms / 1000

    def get_local(self, key: str, account: str) -> Lookup | None:
        """The result of `look_up` if memory suffices; None if the store must be asked."""
        now, accounts = monotonic(), self.accounts
        cached, book = self._memory.get(key, now), accounts.snapshots.get(account)
        balance = accounts.cached_balances.get(account)
        if cached is None or book is None or balance is None:
            return None
        record = cached.record
        if not book.is_current(now) or cached.invalidations != book.invalidations:
            return None
        if record.generations != book.generations:
            is_gone = book.is_invalidated(cached) or book.may_lag(record)
            return None if is_gone else _lookup(cached, book, balance, now)
        age_s = (cached.now_ms - record.put_at_ms) / 1000 + now - cached.read_at
        if age_s < 0:  # the store's clock went back
            return _lookup(cached, book, balance, now)
        stored = StoredPrice(record.price, age_s, record.ttl_ms / 1000 - age_s, record.body_digest)
        return Lookup(stored, balance.as_of(now), record.put_at_ms)

    async def look_up(self, key: str, account: str) -> Lookup:
        """The stored price for `key`, if there is one, and the account's newest balance."""
        accounts = self.accounts
        cached = self._memory.get(key, monotonic())
        if cached is not None:
            book = await accounts.get_for_cached_price(account)
            if book.is_invalidated(cached):
                cached = await self._read(key, account)
        elif (current := accounts.current(account)) is not None:
            cached, book = await self._read(key, account), current
        else:
            cached, book = await asyncio.gather(self._read(key, account), accounts.get(account))
        if cached is None:
            return Lookup(None, accounts.balance(account), None)
        if book.may_lag(cached.record) or accounts.balance(account) is None:
            # Our snapshot is too old, and one more read is enough: the leader read the book before it stored the price,
            # and stored the balance in the same round trip.
            book = await accounts.read(account)
        return Lookup(book.as_of(cached, monotonic()), accounts.balance(account), cached.record.put_at_ms)

    async def put(self, lease: Lease, price: Price, body_digest: bytes) -> Put:
        """Stores a price and ends the lease."""
        encoded = encode_price(price, ttl_ms=self._ttl_ms, generations=lease.generations, body_digest=body_digest)
        read_at, invalidations = monotonic(), self.accounts.invalidations(lease.account)
        args = (lease.token, ENCODING, encoded, self._lifetime_ms)
        put = await self._store.call(_PRICE_PUT, *store_keys(lease.key), args=args)
        if not put:
            return Put(is_current=False)
        now_ms, is_another, old_digest, old_estimated = put
        book = self.accounts.snapshots.get(lease.account)
        is_purged = book is not None and book.generations.purge != lease.generations.purge
        if not is_purged:
            record = PriceRecord(price, now_ms, self._ttl_ms, lease.generations, body_digest)
            self._memory.put(lease.key, MemoryEntry(record, now_ms, read_at, invalidations), monotonic())
        if is_another:
            with suppress(StoreUnavailable):  # other processes then serve the old price until it leaves their memory
                await self.accounts.invalidate(lease.account)
        return Put(not is_purged, old_estimated if old_digest == body_digest else None)

    async def purge_question(self, key: str, account: str) -> bool:
        """Removes the price of one question, for every process within `BOOK_REREAD_S`. Returns whether there was one.

        If it raises, it must be repeated: other processes may still have the price in memory.
        """
        found = bool(await self._store.call(_PRICE_PURGE, *store_keys(key)))
        self._memory.drop(key)  # after the call: a look-up during the call may have put the price back into memory
        await self.accounts.invalidate(account)
        return found

    async def purge_account(self, account: str) -> None:
        """Removes all prices of an account, for every process within `BOOK_REREAD_S`."""
        await self.accounts.purge(account)

    async def _read(self, key: str, account: str) -> MemoryEntry | None:
        read_at, invalidations = monotonic(), self.accounts.invalidations(account)
        text, now_ms = await self._store.call(_PRICE_GET, store_keys(key)[0])
        found = decode_entry(text, now_ms, read_at, invalidations)
        if found is not None:
            self._memory.put(key, found, monotonic())
        return found


def _lookup(cached: MemoryEntry, book: BookSnapshot, balance: CachedBalance, now: float) -> Lookup:
    return Lookup(book.as_of(cached, now), balance.as_of(now), cached.record.put_at_ms)
