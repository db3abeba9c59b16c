"""Fenced leases: for each question, one process at a time may ask upstream and store the answer.

* The holder is the leader, processes that wait for its answer are followers.
* Fencing: only the current holder can store a price. So an older answer never replaces a newer one, and an answer that
  was requested before a purge is not stored after it.
* A lease carries the generations that the account's book has when the lease is taken. `take` always reads the book
  again for that: a price stored with old generations would count as purged, and each process would ask upstream again.
* The lease of a leader that died expires after `LEASE_S`; a follower then takes it.
"""

import secrets
from dataclasses import dataclass
from time import monotonic

from proxy.cache.account_book import AccountBooks, BookSnapshot
from proxy.cache.memory import MemoryCache, MemoryEntry, decode_entry
from proxy.cache.prices import Generations, Lookup, StoredPrice, as_of, store_keys
from proxy.store.client import Script, Store

LEASE_S = 2.0
"""Lifetime of a lease, and so the time after which a leader that died is replaced. The leader renews it every quarter
of that."""

FAILURE_TTL_S = 2.0
"""Lifetime of a leader's failure in the store: many times what followers wait between two polls."""

_LEASE_TAKE, _LEASE_WATCH = Script("proxy.cache", "lease_take"), Script("proxy.cache", "lease_watch", repeatable=True)
_LEASE_KEEP, _LEASE_END = Script("proxy.cache", "lease_keep"), Script("proxy.cache", "lease_end")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to ask upstream for the question with this key, and to store the answer."""

    key: str
    account: str
    token: str
    generations: Generations


@dataclass(frozen=True, slots=True)
class LeaseHeld:
    """Another process has the lease. `token` is the holder's."""

    token: str


@dataclass(frozen=True, slots=True)
class LeaderFailure:
    """The leader got no price. `text` is the failure that it left for its followers; empty if it left none."""

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
        """Takes the lease for a question.

        Returns `LeaseHeld` if another process has it, or a fresh price if there is one besides the one that `lookup`
        found. With `force` the lease is taken from its holder, and stored prices do not count.
        """
        token, version = secrets.token_urlsafe(9), _version(lookup)
        while True:  # terminates: each pass skips the record that the last one found stale
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
        """The state of a question that another process asks upstream.

        A price, if there is a fresh one besides the one that `lookup` found; `LeaseHeld` while the leader asks;
        `LeaderFailure` after it failed; None if the lease ended or expired without a result.
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
        """Renews a lease for `LEASE_S`. False if it is no longer held."""
        args = (lease.token, round(LEASE_S * 1000))
        return bool(await self._store.call(_LEASE_KEEP, store_keys(lease.key)[1], args=args))

    async def end(self, lease: Lease, *, failure: bytes = b"", end_price: bool = False) -> bool:
        """Ends a lease without a price. Leaves `failure`, if not empty, for followers.

        end_price: also deletes the stored price.
        Returns False, and changes nothing in the store, if the lease is no longer held.
        """
        args = (lease.token, failure, round(FAILURE_TTL_S * 1000), int(end_price))
        ended = bool(await self._store.call(_LEASE_END, *store_keys(lease.key), args=args))
        if end_price:  # after the call: a look-up during the call may have put the old price back into memory
            self._memory.drop(lease.key)
        return ended

    def _fresh(self, key: str, found: MemoryEntry | None, book: BookSnapshot) -> StoredPrice | None:
        """The price that another process stored, if it is fresh. Puts it into memory."""
        if found is None:
            return None
        stored = as_of(found.record, found.now_ms, book.generations, book.repriced_ago_ms)
        if stored is None or stored.ttl_s <= 0:
            return None
        self._memory.put(key, found, monotonic())
        return stored


def _version(lookup: Lookup | None) -> int | None:
    return None if lookup is None else lookup.version
