"""What the processes of the price book's model share, and the plain values they deal in.

Those are: what is stored, what a process has read of that, what is on its way to upstream, and what clients are told.
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
class Wants:
    """A request's directives."""

    header: str | None = None
    anew: bool = False
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
    """An account's. It may be evicted at any time."""

    purge: int | None = None
    reprice: int | None = None
    repriced_at: int | None = None
    balance: Balance | None = None
    audit_until: int = 0
    drops: int = 0
    """How many questions have been purged, or have got another price before their time."""
    changed: dict[int, int] = field(default_factory=dict)


@dataclass
class Fleet:
    """What all processes see: the store, upstream, and the test's clock.

    hot_ms, book_ms: for how long a process may go by what it remembers of prices, and of the book.
    """

    upstream: Upstream
    hot_ms: int
    book_ms: int
    now: int
    prices: dict[int, Price] = field(default_factory=dict)
    book: Book = field(default_factory=Book)
    leases: dict[int, int] = field(default_factory=dict)
    words: dict[int, Reply] = field(default_factory=dict)
    calls: int = 0
    serial: int = 0
    generations: Iterator[int] = field(default_factory=count)

    def pass_time(self, ms: int) -> None:
        self.now += ms
        self.prices = {key: price for key, price in self.prices.items() if self.now - price.put_at < LIFETIME_MS}

    def purge_question(self, key: int) -> bool:
        self.leases.pop(key, None)
        self.words.pop(key, None)
        self.drop()
        return self.prices.pop(key, None) is not None

    def drop(self) -> None:
        """Whoever remembers a price looks again. A book that is made anew says so by its nonces."""
        self.book.drops += self.book.purge is not None

    def purge_account(self) -> None:
        self.book.purge, self.book.reprice, self.book.repriced_at = next(self.generations), next(self.generations), None

    def reprice(self) -> None:
        self.book.reprice, self.book.repriced_at = next(self.generations), self.now

    def note_change(self, key: int) -> bool:
        """Three bodies within the hour make a new price list, every ten minutes at the most."""
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
class Page:
    """The book, as a process read it."""

    purge: int
    reprice: int
    repriced_at: int | None
    drops: int
    read_at: int


@dataclass(frozen=True)
class Seen:
    """A price as a process sees it."""

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
    """All that a client is told and that is compared."""

    status: int
    body: str
    cache_status: str | None = None
    age_s: int | None = None
    balance_age_s: int | None = None
    retry_after_s: int | None = None


@dataclass(frozen=True)
class Told:
    """What comes of a flight. `elsewhere`: another process asked. `overtaken`: by another lease, or a purge."""

    reply: Reply
    stored: bool = False
    elsewhere: bool = False
    overtaken: bool = False


@dataclass(eq=False)
class Flight:
    """A question on its way. `refusal` is set where upstream is not asked; without a `lease` nothing is stored."""

    body: Body
    lease: Lease | None = None
    refusal: Failed | None = None
    follows: bool = False
    known: Price | None = None
    audited: Price | None = None
    told: Told | None = None
    """Once it has landed."""

    @property
    def waits(self) -> bool:
        """For upstream, or for another process."""
        return self.told is None and (self.follows or self.refusal is None)


@dataclass
class Pending:
    """A request that waits for a flight."""

    flight: Flight
    reason: str
    known: Price | None = None
    fallback: Seen | None = None
    joined: bool = False
