"""The shared state of the price book's model, and its value classes.

These are stored prices and books, a process's copies of them, fetches in flight, and answers to clients.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from price_book_upstream import Body, Failed, Reply, Upstream

TTL_MS, REVALIDATE_MS, IF_ERROR_MS = 95_000, 40_000, 400_000
LIFETIME_MS = TTL_MS + IF_ERROR_MS
BALANCE_MAX_AGE_MS = 25_000
AUDIT_EVERY_MS = 5_000
CHANGES, CHANGES_WITHIN_MS, REPRICE_EVERY_MS = 3, 3_600_000, 600_000


@dataclass(frozen=True)
class Directives:
    """A request's `Cache-Control` directives."""

    header: str | None = None
    bypass_cache: bool = False
    store: bool = True
    only_if_cached: bool = False
    max_age_s: int | None = None


@dataclass(frozen=True)
class Balance:
    amount: int
    at: int


@dataclass(frozen=True)
class Price:
    """A stored answer; `serial` is the number that upstream gave it."""

    serial: int
    amount: int
    body: Body
    put_at: int
    purge: int
    reprice: int


@dataclass
class Book:
    """An account's book. The store may evict it at any time."""

    purge: int | None = None
    reprice: int | None = None
    repriced_at: int | None = None
    balance: Balance | None = None
    audit_until: int = 0
    invalidations: int = 0
    """Number of requests whose price was purged, or was replaced while it was fresh."""
    changed: dict[int, int] = field(default_factory=dict)


@dataclass
class Fleet:
    """The state that all processes share: the store, upstream, and the test's clock.

    memory_ms, book_ms: how long a process may use its copies of prices, and of the book.
    """

    upstream: Upstream
    memory_ms: int
    book_ms: int
    now: int
    prices: dict[int, Price] = field(default_factory=dict)
    book: Book = field(default_factory=Book)
    leases: dict[int, int] = field(default_factory=dict)
    leader_replies: dict[int, Reply] = field(default_factory=dict)
    calls: int = 0
    serial: int = 0
    generations: Iterator[int] = field(default_factory=count)

    def pass_time(self, ms: int) -> None:
        self.now += ms
        self.prices = {key: price for key, price in self.prices.items() if self.now - price.put_at < LIFETIME_MS}

    def purge_request(self, key: int) -> bool:
        self.leases.pop(key, None)
        self.leader_replies.pop(key, None)
        self.invalidate()
        return self.prices.pop(key, None) is not None

    def invalidate(self) -> None:
        """Makes processes read remembered prices again. A recreated book shows that by its generations instead."""
        self.book.invalidations += self.book.purge is not None

    def purge_account(self) -> None:
        self.book.purge, self.book.reprice, self.book.repriced_at = next(self.generations), next(self.generations), None

    def reprice(self) -> None:
        self.book.reprice, self.book.repriced_at = next(self.generations), self.now

    def record_change(self, key: int) -> bool:
        """Returns whether this is a new price list: changes of three bodies in an hour, at most every ten minutes."""
        book = self.book
        book.changed[key] = self.now
        book.changed = {key: at for key, at in book.changed.items() if self.now - at <= CHANGES_WITHIN_MS}
        recently = book.repriced_at is not None and self.now - book.repriced_at < REPRICE_EVERY_MS
        if len(book.changed) < CHANGES or recently:
            return False
        book.changed = {}
        self.reprice()
        return True


@dataclass(frozen=True)
class BookSnapshot:
    """A process's copy of the book."""

    purge: int
    reprice: int
    repriced_at: int | None
    invalidations: int
    read_at: int


@dataclass(frozen=True)
class Lookup:
    """A price with its age and remaining lifetime for one process."""

    price: Price
    age_ms: int
    ttl_ms: int


@dataclass(frozen=True)
class Lease:
    token: int
    purge: int
    reprice: int


@dataclass(frozen=True)
class Answer:
    """The compared parts of a response."""

    status: int
    body: str
    cache_status: str | None = None
    age_s: int | None = None
    balance_age_s: int | None = None
    retry_after_s: int | None = None


@dataclass(frozen=True)
class FetchResult:
    """A fetch's result. `elsewhere`: another process called upstream. `overtaken`: by another lease, or a purge."""

    reply: Reply
    stored: bool = False
    elsewhere: bool = False
    overtaken: bool = False


@dataclass(eq=False)
class Fetch:
    """A fetch. `refusal` is set if upstream is not called; without a `lease` nothing is stored."""

    body: Body
    lease: Lease | None = None
    refusal: Failed | None = None
    follows: bool = False
    known_price: Price | None = None
    audited: Price | None = None
    result: FetchResult | None = None
    """None until the fetch is complete."""

    @property
    def waits(self) -> bool:
        """Returns whether it waits for upstream, or for another process."""
        return self.result is None and (self.follows or self.refusal is None)


@dataclass
class Pending:
    """A request that waits for a fetch."""

    fetch: Fetch
    reason: str
    known_price: Price | None = None
    fallback: Lookup | None = None
    joined: bool = False
