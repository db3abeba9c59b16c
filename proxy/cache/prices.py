"""Prices and balances: their encoding in the store, their age, and the response body for clients.

* Amounts stay the JSON numbers that upstream wrote, as bytes.
* Classes that every hit instantiates are not frozen: creating a frozen one takes three times as long.
"""

from dataclasses import dataclass
from typing import NamedTuple

ENCODING = b"2"
"""The version of `encode_price`'s format. A price in another encoding is treated as missing."""


@dataclass(frozen=True, slots=True)
class Price:
    """An estimate for one canonical body, as upstream gave it.

    estimated: the JSON number, in credits.
    rest: the other members of `data`, as JSON text without the braces; empty if there are none.
    """

    estimated: bytes
    rest: bytes


class Generations(NamedTuple):
    """Random ids in an account's book. A price with another `purge` is gone, one with another `reprice` is stale."""

    purge: bytes
    reprice: bytes


@dataclass(frozen=True, slots=True)
class PriceRecord:
    """A price as it is stored.

    put_at_ms: when it was stored, on the store's clock.
    generations: those of the account's book when upstream was asked.
    body_digest: of the full canonical body that was sent upstream, with the members that the key ignores.
    """

    price: Price
    put_at_ms: int
    ttl_ms: int
    generations: Generations
    body_digest: bytes


@dataclass(slots=True)
class StoredPrice:
    """A stored price at one moment. `ttl_s` is how long it stays fresh; zero or negative once it is stale."""

    price: Price
    age_s: float
    ttl_s: float
    body_digest: bytes


@dataclass(slots=True)
class Balance:
    """An account's balance, as a JSON number, and the time since upstream reported it."""

    amount: bytes
    age_s: float


@dataclass(slots=True)
class Lookup:
    """The result of a look-up. A fetch uses `version` to recognise a price that was stored after this look-up.

    version: `put_at_ms` of the record in the store, also if that was purged; None if there is no record.
    """

    stored: StoredPrice | None
    balance: Balance | None
    version: int | None


def store_keys(key: str) -> tuple[str, str]:
    """The store's keys of a question's price and lease. Both are in the same cluster slot."""
    return f"ep1:{{{key}}}:price", f"ep1:{{{key}}}:lease"


def encode_price(price: Price, *, ttl_ms: int, generations: Generations, body_digest: bytes) -> bytes:
    """The text of a price. `price_put.lua` puts the encoding and the time of storing before it."""
    fields = (str(ttl_ms).encode(), generations.purge, generations.reprice, body_digest, price.estimated, price.rest)
    return b" ".join(fields)


def decode_price(stored: bytes) -> PriceRecord | None:
    """Decodes `<encoding> <put_at_ms> <encoded price>`; None if the text is in another format or not ours."""
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
    """The price at `now_ms`, given the current generations of its account; None if it was purged.

    If the store's clock went back, no age is negative, and a repriced price does not become fresh again.
    """
    age_ms = max(0, now_ms - record.put_at_ms)
    left_ms = record.ttl_ms - age_ms
    if record.generations.purge != generations.purge:
        return None
    if record.generations.reprice != generations.reprice:
        left_ms = min(left_ms, -max(0, repriced_ago_ms or 0))
    return StoredPrice(record.price, age_ms / 1000, left_ms / 1000, record.body_digest)


def document(price: Price, balance: Balance | None) -> bytes:
    """The response body for a client: upstream's envelope, with the given balance."""
    shown = b"" if balance is None else b',"balance":' + balance.amount
    rest = price.rest and b"," + price.rest
    return b'{"data":{"estimated":%b%b%b},"error":{}}' % (price.estimated, shown, rest)
