"""Prices and balances: what the price book keeps of upstream's answers, and what clients get to see of it.

Amounts stay the JSON numbers that upstream wrote, in bytes. What is made anew for every hit is not frozen, which
would take three times as long.
"""

from dataclasses import dataclass
from typing import NamedTuple

ENCODING = b"2"
"""Counts changes of `encode_price`; a price stored in another encoding is not found."""


@dataclass(frozen=True, slots=True)
class Price:
    """An estimate for one canonical body, as upstream gave it.

    estimated: the JSON number.
    rest: the other members of `data` as JSON text without the braces, empty if there are none.
    """

    estimated: bytes
    rest: bytes


class Generations(NamedTuple):
    """The nonces of an account's book: prices of another `purge` are gone, those of another `reprice` are stale."""

    purge: bytes
    reprice: bytes


@dataclass(frozen=True, slots=True)
class PriceRecord:
    """A price as the book keeps it. Times are the store's.

    nonces: of the book when upstream was asked.
    body_digest: of the full canonical body that was asked, members that the key ignores included.
    """

    price: Price
    put_at_ms: int
    ttl_ms: int
    generations: Generations
    body_digest: bytes


@dataclass(slots=True)
class StoredPrice:
    """A price as it stands now. `ttl_s` is what is left of its time, negative once it is stale."""

    price: Price
    age_s: float
    ttl_s: float
    body_digest: bytes


@dataclass(slots=True)
class Balance:
    """An account's balance, as a JSON number, and how long ago upstream said it."""

    amount: bytes
    age_s: float


@dataclass(slots=True)
class Lookup:
    """What is known for a question. `version` says when the text in the store was put there, whatever it is worth."""

    stored: StoredPrice | None
    balance: Balance | None
    version: int | None


def store_keys(key: str) -> tuple[str, str]:
    """The store's keys of a question's price and of its lease, in one slot."""
    return f"ep1:{{{key}}}:price", f"ep1:{{{key}}}:lease"


def encode_price(price: Price, *, ttl_ms: int, generations: Generations, body_digest: bytes) -> bytes:
    """The text that the price book keeps, behind its encoding and the time at which it was put there."""
    fields = (str(ttl_ms).encode(), generations.purge, generations.reprice, body_digest, price.estimated, price.rest)
    return b" ".join(fields)


def decode_price(stored: bytes) -> PriceRecord | None:
    """A price out of `<encoding> <time in ms> <encoded price>`; None if it was written otherwise, or by others."""
    try:
        encoding, put_at_ms, ttl_ms, purge, reprice, body_digest, estimated, rest = stored.split(b" ", 7)
        times = int(put_at_ms), int(ttl_ms)
    except ValueError:
        return None
    if encoding != ENCODING:
        return None
    return PriceRecord(Price(estimated, rest), *times, Generations(purge, reprice), body_digest)


def as_of(
    record: PriceRecord, now_ms: int, generations: Generations, repriced_ago_ms: int | None
) -> StoredPrice | None:
    """The price as it stands at `now_ms` in a book with these nonces; None if it has been purged.

    The store's clock may have gone back: nothing is younger than new, nor fresh again once it was repriced.
    """
    age_ms = max(0, now_ms - record.put_at_ms)
    left_ms = record.ttl_ms - age_ms
    if record.generations.purge != generations.purge:
        return None
    if record.generations.reprice != generations.reprice:
        left_ms = min(left_ms, -max(0, repriced_ago_ms or 0))
    return StoredPrice(record.price, age_ms / 1000, left_ms / 1000, record.body_digest)


def document(price: Price, balance: Balance | None) -> bytes:
    """The answer a client gets: upstream's envelope with the newest balance known."""
    shown = b"" if balance is None else b',"balance":' + balance.amount
    rest = price.rest and b"," + price.rest
    return b'{"data":{"estimated":%b%b%b},"error":{}}' % (price.estimated, shown, rest)
