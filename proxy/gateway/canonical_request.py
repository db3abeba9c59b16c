"""Parses request bodies into canonical requests, with a cache of parsed bodies.

* Clients send the same bytes again and again. Recognising them takes a fiftieth of the time of parsing them.
* The cache keeps no bodies: only a digest of each, and the key and model name that were parsed from it.
"""

from collections import OrderedDict
from hashlib import blake2b, sha256
from typing import NamedTuple

from proxy.cache.canonical import canonicalise
from proxy.learning.verdict import Inferred, NotInferred
from proxy.problems import NO_NAME
from proxy.quota.model_names import model_of
from proxy.upstream.address import UpstreamAddress

MAX_CACHED_BODIES = 10_000
"""Limits the cache to some 5 MB. Evicts in FIFO order."""


class ParsedBody(NamedTuple):
    """What the cache keeps of a body and its query string.

    query: as sent upstream. model: the name under which the body's credits are counted.
    """

    query: str
    key: str
    model: str


class CanonicalRequest:
    """A request body, with everything that its cache key is made from.

    ignored: members that are left out of the key, as dotted paths inside each item.
    team: whose request it is. verdict: what the learner said about it; None if it was not asked.
    """

    __slots__ = ("_canonical", "_raw", "account", "ignored", "key", "model", "query", "team", "verdict")

    def __init__(
        self, parsed: ParsedBody, raw: bytes, *, account: str, ignored: tuple[str, ...], canonical: bytes | None = None
    ) -> None:
        self.query, self.key, self.model = parsed
        self.account = account
        self.ignored = ignored
        self.team = NO_NAME
        self.verdict: Inferred | NotInferred | None = None
        self._raw = raw
        self._canonical = canonical

    @property
    def canonical(self) -> bytes:
        """The canonical body. Computed on first use if the body came from the cache."""
        if self._canonical is None:
            self._canonical = canonicalise(self._raw)
        return self._canonical

    @property
    def body_digest(self) -> bytes:
        """A digest of the full canonical body, including the members that the key ignores."""
        return blake2b(self.canonical, digest_size=8).hexdigest().encode()


class RequestParser:
    """Parses bodies of requests for one upstream address."""

    def __init__(self, address: UpstreamAddress) -> None:
        self._address = address
        self._parsed: OrderedDict[tuple[object, ...], ParsedBody] = OrderedDict()

    def parse(self, raw: bytes, *, account: str, query: bytes, ignored: tuple[str, ...]) -> CanonicalRequest:
        """The canonical request of a body as the client sent it. Raises `BadRequest` (`invalid-body`)."""
        cache_key = (sha256(raw).digest(), account, query, ignored)
        parsed = self._parsed.get(cache_key)
        if parsed is not None:
            return CanonicalRequest(parsed, raw, account=account, ignored=ignored)
        request = self.from_canonical(canonicalise(raw), account=account, query=query, ignored=ignored)
        self._parsed[cache_key] = ParsedBody(request.query, request.key, request.model)
        if len(self._parsed) > MAX_CACHED_BODIES:
            self._parsed.popitem(last=False)
        return request

    def from_canonical(
        self, canonical: bytes, *, account: str, query: bytes, ignored: tuple[str, ...]
    ) -> CanonicalRequest:
        """The canonical request of a body that is canonical already. `query` is as the client sent it."""
        sent = self._address.query_as_sent(query)
        key = self._address.key_of(canonical, account=account, query=sent, ignored=ignored)
        parsed = ParsedBody(sent, key, model_of(canonical))
        return CanonicalRequest(parsed, canonical, account=account, ignored=ignored, canonical=canonical)
