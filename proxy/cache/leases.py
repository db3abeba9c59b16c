"""Fenced leases: the right to ask upstream for a question and to store the answer, one holder in the fleet.

* A price is stored only by the holder of the lease, so an older answer never replaces a newer one, and one that was
  asked before a purge stays out.
* A lease carries the generations that its account's book had when it was taken. The book is read again for that: under
  generations of a moment ago the answer would count as purged, and every other process would ask again.
* A lease of a holder that died expires after `LEASE_S`, and another process takes it.
"""

import secrets
from dataclasses import dataclass
from time import monotonic

from proxy.cache.account_book import AccountBooks, BookSnapshot
from proxy.cache.memory import MemoryCache, MemoryEntry, decode_entry
from proxy.cache.prices import Generations, Lookup, StoredPrice, as_of, store_keys
from proxy.store.client import Script, Store

LEASE_S = 2.0
"""After so long a leader that died is replaced. It is renewed every quarter of that while its holder lives."""

FAILURE_TTL_S = 2.0
"""How long a leader's failure is kept for its followers."""

_LEASE_TAKE, _LEASE_WATCH = Script("proxy.cache", "lease_take"), Script("proxy.cache", "lease_watch", repeatable=True)
_LEASE_KEEP, _LEASE_END = Script("proxy.cache", "lease_keep"), Script("proxy.cache", "lease_end")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to ask upstream for a key and to store the answer."""

    key: str
    account: str
    token: str
    generations: Generations


@dataclass(frozen=True, slots=True)
class LeaseHeld:
    """Another process has the lease; `token` is the holder's."""

    token: str


@dataclass(frozen=True, slots=True)
class LeaderFailure:
    """What a leader that got no price left for its followers."""

    text: bytes


class Leases:
    """The leases of one price book. All methods raise `StoreUnavailable`."""

    def __init__(self, store: Store, accounts: AccountBooks, memory: MemoryCache) -> None:
        self._store = store
        self._accounts = accounts
        self._memory = memory

    async def take(
        self, key: str, account: str, lookup: Lookup | None = None, *, force: bool = False
    ) -> Lease | LeaseHeld | StoredPrice:
        """The lease, or its holder, or a fresh price that is another than the one `lookup` found."""
        token, version = secrets.token_urlsafe(9), _version(lookup)
        while True:  # each turn has seen another text, and in the end there is none
            read_at, invalidations = monotonic(), self._accounts.invalidations(account)
            args = (token, round(LEASE_S * 1000), "" if version is None else version, int(force))
            reading = self._accounts.read_in_turn(account)
            try:
                kind, text, now_ms = await self._store.call(_LEASE_TAKE, *store_keys(key), args=args)
            finally:
                book = await reading
            if kind == b"lead":
                return Lease(key, account, token, book.generations)
            if kind == b"wait":
                return LeaseHeld(text.decode())
            if (stored := self._fresh(key, decode_entry(text, now_ms, read_at, invalidations), book)) is not None:
                return stored
            version = int(text.split(b" ", 2)[1])

    async def watch(
        self, key: str, account: str, lookup: Lookup | None = None
    ) -> StoredPrice | LeaseHeld | LeaderFailure | None:
        """What became of a question that another process asks; None if the lease has gone without a result.

        A price is returned if it is fresh and another than the one `lookup` found.
        """
        book = await self._accounts.get(account)
        read_at = monotonic()
        text, lease, now_ms = await self._store.call(_LEASE_WATCH, *store_keys(key))
        found = decode_entry(text, now_ms, read_at, book.invalidations)
        is_other = found is not None and found.record.put_at_ms != _version(lookup)
        if is_other and (stored := self._fresh(key, found, book)) is not None:
            return stored
        if lease is None:
            return None
        state, _, rest = lease.partition(b" ")
        if state == b"L":
            return LeaseHeld(rest.decode())
        return LeaderFailure(rest.partition(b" ")[2])

    async def keep(self, lease: Lease) -> bool:
        """Prolongs a lease; False if it is not held any more."""
        args = (lease.token, round(LEASE_S * 1000))
        return bool(await self._store.call(_LEASE_KEEP, store_keys(lease.key)[1], args=args))

    async def end(self, lease: Lease, *, failure: bytes = b"", end_price: bool = False) -> bool:
        """Gives a lease back without a price: leaves `failure` for followers, and deletes the stored price if asked.

        False, and nothing done, if the lease is not held any more.
        """
        args = (lease.token, failure, round(FAILURE_TTL_S * 1000), int(end_price))
        ended = bool(await self._store.call(_LEASE_END, *store_keys(lease.key), args=args))
        if end_price:  # not before: a look-up that began meanwhile may have brought it back
            self._memory.drop(lease.key)
        return ended

    def _fresh(self, key: str, found: MemoryEntry | None, book: BookSnapshot) -> StoredPrice | None:
        """What another process has stored, if that is fresh; this one keeps it in memory too."""
        if found is None:
            return None
        stored = as_of(found.record, found.now_ms, book.generations, book.repriced_ago_ms)
        if stored is None or stored.ttl_s <= 0:
            return None
        self._memory.put(key, found, monotonic())
        return stored


def _version(lookup: Lookup | None) -> int | None:
    return None if lookup is None else lookup.version
