"""The price book: what upstream said, kept for everybody who asks the same.

* Ages are counted by the store's clock alone, so that gateways whose clocks differ tell the same.
* A balance belongs to an account, never to a price: the newest one that any answer has shown goes with every estimate.
* Whoever asks upstream in order to store the answer takes the question's lease first. Leases are fenced: a price is
  stored only by who still holds the lease, so an older answer never replaces a newer one, and one that was asked
  before a purge stays out.
* A price bears the nonces that its account's book had when upstream was asked. A book that the store has evicted gets
  new nonces, so what was stored before is gone, purged or not. Whoever is about to ask reads the book anew: with
  nonces of a moment ago its answer would count as purged, and be asked again by everybody else.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic

from proxy.cache.memory import MAX_AGE_S, MemoryCache, MemoryEntry
from proxy.cache.prices import (
    ENCODING,
    Balance,
    Entry,
    Generations,
    Lookup,
    Price,
    StoredPrice,
    as_of,
    decode_price,
    encode_price,
)
from proxy.cache.single_flight import SameTurn, SingleFlight
from proxy.problems import StoreUnavailable
from proxy.store.client import Script, Store

BOOK_REREAD_S = 1.0
"""How long a process may miss what another one did to a book, or which prices it has purged or changed."""

LEASE_S = 2.0
"""After so long a leader that died is replaced. It is renewed every quarter of that while its holder lives."""

FAILURE_TTL_S = 2.0
"""How long a leader's word of failure waits for those who wait."""

CHANGES_TO_REPRICE = 3
CHANGES_WITHIN_S = 3600
REPRICE_EVERY_S = 600

_PRICE_GET = Script("proxy.cache", "price_get", repeatable=True)
_PRICE_PUT, _PRICE_PURGE = Script("proxy.cache", "price_put"), Script("proxy.cache", "price_purge")
_LEASE_TAKE, _LEASE_WATCH = Script("proxy.cache", "lease_take"), Script("proxy.cache", "lease_watch", repeatable=True)
_LEASE_KEEP, _LEASE_END = Script("proxy.cache", "lease_keep"), Script("proxy.cache", "lease_end")
_BOOK_GET = Script("proxy.cache", "book_get", repeatable=True)
_BOOK_PURGE, _BOOK_DROP, _BALANCE_PUT = (
    Script("proxy.cache", "book_purge"),
    Script("proxy.cache", "book_drop"),
    Script("proxy.cache", "balance_put"),
)
_AUDIT_TAKE, _AUDIT_CHANGED = Script("proxy.cache", "audit_take"), Script("proxy.cache", "audit_changed")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to ask upstream for a key and to store the answer."""

    key: str
    account: str
    token: str
    generations: Generations


@dataclass(frozen=True, slots=True)
class LeaseHeld:
    """Somebody else has the lease: whose it is."""

    token: str


@dataclass(frozen=True, slots=True)
class LeaderFailure:
    """What a leader left who got no price."""

    text: bytes


@dataclass(frozen=True, slots=True)
class _Book:
    """An account's book as this process read it, at `now_ms` of the store and `read_at` on its own monotonic clock.

    drops: counts the questions that have been purged, or have got another price before their time, so that no process
        goes on serving the old one from memory.
    """

    generations: Generations
    invalidations: int
    repriced_ago_ms: int | None
    now_ms: int
    read_at: float

    def is_invalidated(self, hot: MemoryEntry) -> bool:
        """Whether the price may have been purged or replaced since, so that only the store can tell."""
        return hot.invalidations != self.invalidations or hot.entry.generations.purge != self.generations.purge

    def is_behind(self, entry: Entry) -> bool:
        """Whether `entry` may have nonces that the account's book has got since."""
        return entry.generations != self.generations and entry.put_at_ms >= self.now_ms


@dataclass(frozen=True, slots=True)
class _SeenBalance:
    """`at_ms` is when the store heard of it, by its clock; None while it may not have. `born` is monotonic."""

    amount: bytes
    born: float
    at_ms: int | None

    def as_of(self, now: float) -> Balance:
        return Balance(self.amount, max(0.0, now - self.born))

    def is_replaced_by(self, read: "_SeenBalance") -> bool:
        """By what the store has, of two that came at almost the same time: the round trip blurs `born`."""
        if self.at_ms is None or read.at_ms is None:
            return read.born > self.born
        return read.at_ms >= self.at_ms


class PriceBook:
    """The prices of one upstream, shared by every process on the same store. All raise `StoreUnavailable`."""

    def __init__(self, store: Store, *, origin: str, ttl_s: float, stale_s: float) -> None:
        self._store = store
        self._origin = origin
        self._ttl_ms = round(ttl_s * 1000)
        self._lifetime_ms = self._ttl_ms + round(stale_s * 1000)
        self._hot = MemoryCache()
        self._books: dict[str, _Book] = {}
        self._balances: dict[str, _SeenBalance] = {}
        self._rereads = SingleFlight[_Book]()
        self._readings = SameTurn[_Book]()
        self._puts = SameTurn[None]()

    @property
    def ttl_s(self) -> float:
        return self._ttl_ms / 1000

    def get_local(self, key: str, account: str) -> Lookup | None:
        """What `look_up` would find without asking the store; None if it would ask."""
        now = monotonic()
        hot, book, seen = self._hot.get(key, now), self._books.get(account), self._balances.get(account)
        if hot is None or book is None or seen is None:
            return None
        entry = hot.entry
        if now - book.read_at >= BOOK_REREAD_S or hot.invalidations != book.invalidations:
            return None
        if entry.generations != book.generations:
            is_gone = book.is_invalidated(hot) or book.is_behind(entry)
            return None if is_gone else self._known(now, hot, book, seen)
        age_s = (hot.now_ms - entry.put_at_ms) / 1000 + now - hot.read_at
        if age_s < 0:  # the store's clock has gone back
            return self._known(now, hot, book, seen)
        stored = StoredPrice(entry.price, age_s, entry.ttl_ms / 1000 - age_s, entry.body_digest)
        return Lookup(stored, seen.as_of(now), entry.put_at_ms)

    def _known(self, now: float, hot: MemoryEntry, book: _Book, seen: _SeenBalance) -> Lookup:
        stored = _as_of(now, hot.entry, hot.now_ms, hot.read_at, book)
        return Lookup(stored, seen.as_of(now), hot.entry.put_at_ms)

    async def look_up(self, key: str, account: str) -> Lookup:
        """What is known for `key`, and the account's newest balance."""
        hot = self._hot.get(key, monotonic())
        if hot is not None:
            book = await self._book_for_remembered(account)
            if book.is_invalidated(hot):
                hot = await self._read_price(key, account)
        elif (read := self._book_of_a_moment_ago(account)) is not None:
            hot, book = await self._read_price(key, account), read
        else:
            hot, book = await asyncio.gather(self._read_price(key, account), self._book(account))
        if hot is None:
            return Lookup(None, self.balance(account), None)
        if book.is_behind(hot.entry) or self.balance(account) is None:
            book = await self._read_book(account)  # the nonces were there before the price, the balance came with it
        stored = _as_of(monotonic(), hot.entry, hot.now_ms, hot.read_at, book)
        return Lookup(stored, self.balance(account), hot.entry.put_at_ms)

    async def take_lease(
        self, key: str, account: str, *, version: int | None, force: bool = False
    ) -> Lease | LeaseHeld | StoredPrice:
        """The lease, or whom to wait for, or a fresh price that is another than the one put at `version`."""
        token = secrets.token_urlsafe(9)
        while True:  # each turn has seen another text, and in the end there is none
            read_at, invalidations = monotonic(), self._invalidations(account)
            args = (token, round(LEASE_S * 1000), "" if version is None else version, int(force))
            reading = self._readings.share(account, lambda: self._read_book(account))
            try:
                kind, text, now_ms = await self._store.call(_LEASE_TAKE, *_keys(key), args=args)
            finally:
                book = await reading
            if kind == b"lead":
                return Lease(key, account, token, book.generations)
            if kind == b"wait":
                return LeaseHeld(text.decode())
            if (stored := self._fresh(key, _entry(text, now_ms, read_at, invalidations), book)) is not None:
                return stored
            version = int(text.split(b" ", 2)[1])

    async def watch(
        self, key: str, account: str, *, version: int | None
    ) -> StoredPrice | LeaseHeld | LeaderFailure | None:
        """What became of a question that somebody else asks; None if the lease has gone without a word."""
        book = await self._book(account)
        read_at = monotonic()
        text, lease, now_ms = await self._store.call(_LEASE_WATCH, *_keys(key))
        found = _entry(text, now_ms, read_at, book.invalidations)
        is_other = found is not None and found.entry.put_at_ms != version
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
        return bool(await self._store.call(_LEASE_KEEP, _keys(lease.key)[1], args=args))

    async def put(self, lease: Lease, price: Price, body_digest: bytes) -> bool:
        """Stores a price and ends the lease; False if it was overtaken: by another leader, or by a purge."""
        encoded = encode_price(price, ttl_ms=self._ttl_ms, generations=lease.generations, body_digest=body_digest)
        read_at, invalidations = monotonic(), self._invalidations(lease.account)
        args = (lease.token, ENCODING, encoded, self._lifetime_ms)
        put = await self._store.call(_PRICE_PUT, *_keys(lease.key), args=args)
        if not put:
            return False
        now_ms, is_another = put
        book = self._books.get(lease.account)
        is_purged = book is not None and book.generations.purge != lease.generations.purge
        if not is_purged:
            entry = Entry(price, now_ms, self._ttl_ms, lease.generations, body_digest)
            self._remember(lease.key, MemoryEntry(entry, now_ms, read_at, invalidations))
        if is_another:
            with suppress(StoreUnavailable):  # others go on telling the old one then, for as long as they remember any
                await self._store.call(_BOOK_DROP, self._book_key(lease.account))
        return not is_purged

    async def end(self, lease: Lease, *, word: bytes = b"", end_price: bool = False) -> bool:
        """Gives a lease back: with a word for those who wait, and with the stored price, if that has ended.

        False, and nothing done, if the lease is not held any more.
        """
        args = (lease.token, word, round(FAILURE_TTL_S * 1000), int(end_price))
        ended = bool(await self._store.call(_LEASE_END, *_keys(lease.key), args=args))
        if end_price:  # not before: a look-up that began meanwhile may have brought it back
            self._hot.drop(lease.key)
        return ended

    async def purge_question(self, key: str, account: str) -> bool:
        """Forgets one question, everywhere within `BOOK_REREAD_S`; whether there was a price.

        What fails half-way is to be done again: other processes may have the price in memory.
        """
        found = bool(await self._store.call(_PRICE_PURGE, *_keys(key)))
        self._hot.drop(key)  # not before: a look-up that began meanwhile may have brought it back
        await self._store.call(_BOOK_DROP, self._book_key(account))
        return found

    async def purge_account(self, account: str) -> None:
        """Forgets all prices of an account, everywhere within `BOOK_REREAD_S`."""
        await self._store.call(_BOOK_PURGE, self._book_key(account), args=(_nonce(), _nonce()))
        self._books.pop(account, None)

    def note_balance(self, account: str, amount: bytes) -> Awaitable[None]:
        """Remembers the balance that upstream has just shown: here at once, and in the store when that is awaited."""
        known, seen = self._balances.get(account), _SeenBalance(amount, monotonic(), None)
        self._balances[account] = seen
        is_repeated = known is not None and known.amount == amount
        put = self._puts.share if is_repeated else self._puts.begin
        return put(account, lambda: self._put_balance(account, seen))

    async def _put_balance(self, account: str, seen: _SeenBalance) -> None:
        at_ms = await self._store.call(_BALANCE_PUT, self._book_key(account), args=(seen.amount,))
        newest = self._balances[account]
        if newest.amount == seen.amount:
            self._balances[account] = replace(newest, at_ms=at_ms)

    def balance(self, account: str) -> Balance | None:
        """The newest balance that this process knows of."""
        seen = self._balances.get(account)
        return None if seen is None else seen.as_of(monotonic())

    async def balances(self, accounts: Collection[str]) -> dict[str, Balance]:
        """The newest balances that the fleet knows of."""
        await asyncio.gather(*(self._book(account) for account in accounts))
        return {account: known for account in accounts if (known := self.balance(account)) is not None}

    async def reread(self, account: str) -> None:
        """Reads what another process has just put into the account's book."""
        await self._read_book(account)

    async def claim_audit(self, account: str, *, max_age_s: float, for_s: float) -> bool:
        """Whether this process is the one in the fleet that asks for a fresh balance now."""
        args = (round(max_age_s * 1000), round(for_s * 1000))
        return bool(await self._store.call(_AUDIT_TAKE, self._book_key(account), args=args))

    async def note_change(self, account: str, key: str) -> bool:
        """Notes that a body's price has changed; whether the account has been repriced for it."""
        limits = (CHANGES_TO_REPRICE, CHANGES_WITHIN_S * 1000, REPRICE_EVERY_S * 1000)
        args = (key, *limits, _nonce())
        repriced = bool(await self._store.call(_AUDIT_CHANGED, self._book_key(account), args=args))
        if repriced:
            self._books.pop(account, None)
        return repriced

    async def _read_price(self, key: str, account: str) -> MemoryEntry | None:
        read_at, invalidations = monotonic(), self._invalidations(account)
        text, now_ms = await self._store.call(_PRICE_GET, _keys(key)[0])
        found = _entry(text, now_ms, read_at, invalidations)
        if found is not None:
            self._remember(key, found)
        return found

    def _fresh(self, key: str, found: MemoryEntry | None, book: _Book) -> StoredPrice | None:
        """What another process has stored, if that is fresh; this one keeps it at hand too."""
        if found is None:
            return None
        stored = as_of(found.entry, found.now_ms, book.generations, book.repriced_ago_ms)
        if stored is None or stored.ttl_s <= 0:
            return None
        self._remember(key, found)
        return stored

    def _remember(self, key: str, found: MemoryEntry) -> None:
        """Replies can come in another order than the store gave them: what was read last may be the older price."""
        known = self._hot.get(key, monotonic())
        if known is None or known.entry.put_at_ms <= found.entry.put_at_ms:
            self._hot.put(key, found)

    def _book_of_a_moment_ago(self, account: str) -> _Book | None:
        book = self._books.get(account)
        return book if book is not None and monotonic() - book.read_at < BOOK_REREAD_S else None

    def _invalidations(self, account: str) -> int:
        book = self._books.get(account)
        return -1 if book is None else book.invalidations

    async def _book(self, account: str) -> _Book:
        """One read for all who need it at the same time."""
        book = self._book_of_a_moment_ago(account)
        if book is None:
            book, _ = await self._rereads.join(account, lambda: self._read_book(account))
        return book

    async def _read_book(self, account: str) -> _Book:
        read_at = monotonic()
        purge, reprice, now_ms, repriced_ago_ms, amount, age_ms, invalidations = await self._store.call(
            _BOOK_GET, self._book_key(account), args=(_nonce(), _nonce())
        )
        if amount is not None and age_ms is not None:
            self._take_balance(account, _SeenBalance(amount, read_at - age_ms / 1000, now_ms - age_ms))
        book = _Book(Generations(purge, reprice), invalidations, repriced_ago_ms, now_ms, read_at)
        known = self._books.get(account)
        if known is None or known.read_at <= read_at:
            self._books[account] = book
        return book

    async def _book_for_remembered(self, account: str) -> _Book:
        """While the store is out of reach, a book is good for as long as the hot prices are."""
        known = self._books.get(account)
        try:
            return await self._book(account)
        except StoreUnavailable:
            if known is None or monotonic() - known.read_at > BOOK_REREAD_S + MAX_AGE_S:
                raise
            return known

    def _take_balance(self, account: str, read: _SeenBalance) -> None:
        known = self._balances.get(account)
        if known is None or known.is_replaced_by(read):
            self._balances[account] = read

    def _book_key(self, account: str) -> str:
        return f"ep1:book:{self._origin}:{account}"


def _as_of(now: float, entry: Entry, now_ms: int, read_at: float, book: _Book) -> StoredPrice | None:
    """`now` and `read_at` are monotonic: at `read_at` it was `now_ms` for the store."""
    repriced_ago_ms = book.repriced_ago_ms
    if repriced_ago_ms is not None:
        repriced_ago_ms += round((now - book.read_at) * 1000)
    return as_of(entry, now_ms + round((now - read_at) * 1000), book.generations, repriced_ago_ms)


def _entry(text: bytes | None, now_ms: int, read_at: float, invalidations: int) -> MemoryEntry | None:
    entry = None if text is None else decode_price(text)
    return None if entry is None else MemoryEntry(entry, now_ms, read_at, invalidations)


def _keys(key: str) -> tuple[str, str]:
    """The price's key and its lease's, in one slot."""
    return f"ep1:{{{key}}}:price", f"ep1:{{{key}}}:lease"


def _nonce() -> str:
    return secrets.token_urlsafe(6)
