"""Compares upstream's answers: two agree if their `data` is equal, apart from the balance."""

from contextlib import suppress
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from hashlib import blake2b

from proxy.cache.canonical import canonical_items, load
from proxy.cache.prices import Price
from proxy.problems import BadRequest

_EXACT = Context(prec=64, Emax=MAX_EMAX, Emin=MIN_EMIN)
"""For amounts of up to 64 characters: see `proxy.upstream.replies.MAX_NUMBER_CHARACTERS`."""


def data_digest(price: Price) -> str:
    """A digest that only answers have that agree: as JSON values, whatever their spelling or the order of members."""
    rest = b"{" + price.rest + b"}"
    with suppress(BadRequest):  # numbers that have no canonical form are compared as upstream wrote them
        rest = canonical_items([load(rest)])
    estimated = _EXACT.normalize(Decimal(price.estimated.decode()).copy_abs())
    return blake2b(str(estimated).encode() + b" " + rest, digest_size=12).hexdigest()
