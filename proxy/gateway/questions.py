"""What is asked: a body read as a question, and those of a moment ago remembered by their bytes.

A client's body arrives in the same spelling again and again. To recognise its bytes takes a fiftieth of reading them.
No body is kept, only its digest and what was read: the key and the name of what is priced.
"""

from collections import OrderedDict
from hashlib import blake2b, sha256
from typing import NamedTuple

from proxy.cache.canonical import canonicalise
from proxy.quota.model_names import model_of
from proxy.upstream.address import Address

MAX_REMEMBERED = 10_000
"""Some 5 MB. Beyond it, those that were read longest ago are forgotten, and read again."""


class ParsedBody(NamedTuple):
    """What was read from a body and its query string.

    query: as sent upstream. model: the name under which its credits are counted.
    """

    query: str
    key: str
    model: str


class CanonicalRequest:
    """A body on its way: everything that its key is taken from.

    ignored: members that do not count, as dotted paths inside each item.
    """

    __slots__ = ("_canonical", "_raw", "account", "ignored", "key", "model", "query")

    def __init__(
        self, parsed: ParsedBody, raw: bytes, *, account: str, ignored: tuple[str, ...], canonical: bytes | None = None
    ) -> None:
        self.query, self.key, self.model = parsed
        self.account = account
        self.ignored = ignored
        self._raw = raw
        self._canonical = canonical

    @property
    def canonical(self) -> bytes:
        """The canonical body: worked out only now where the question was recognised."""
        if self._canonical is None:
            self._canonical = canonicalise(self._raw)
        return self._canonical

    @property
    def body_digest(self) -> bytes:
        """Of the full body, members that the key ignores included."""
        return blake2b(self.canonical, digest_size=8).hexdigest().encode()


class RequestParser:
    """Reads bodies as questions that are asked at one address."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._parsed: OrderedDict[tuple[object, ...], ParsedBody] = OrderedDict()

    def read(self, raw: bytes, *, account: str, query: bytes, ignored: tuple[str, ...]) -> CanonicalRequest:
        """The question in a body. Raises `BadRequest` (`invalid-body`)."""
        spelling = (sha256(raw).digest(), account, query, ignored)
        parsed = self._parsed.get(spelling)
        if parsed is not None:
            return CanonicalRequest(parsed, raw, account=account, ignored=ignored)
        question = self.of(canonicalise(raw), account=account, query=query, ignored=ignored)
        self._parsed[spelling] = ParsedBody(question.query, question.key, question.model)
        if len(self._parsed) > MAX_REMEMBERED:
            self._parsed.popitem(last=False)
        return question

    def of(self, canonical: bytes, *, account: str, query: bytes, ignored: tuple[str, ...]) -> CanonicalRequest:
        """The question of a canonical body."""
        sent = self._address.query_as_sent(query)
        key = self._address.key_of(canonical, account=account, query=sent, ignored=ignored)
        parsed = ParsedBody(sent, key, model_of(canonical))
        return CanonicalRequest(parsed, canonical, account=account, ignored=ignored, canonical=canonical)
