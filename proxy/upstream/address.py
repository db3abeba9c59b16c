"""The address of RenderNet's estimate endpoint, and the cache keys of requests to it.

Origin and path are part of each key, so their spelling must never change: a price that is stored under one spelling is
not found under another.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from proxy.cache.canonical import key_of

ESTIMATE_PATH = "/pub/v1/generations/estimate"

_DEFAULT_PORTS = {"http": 80, "https": 443}

# All but the URL standard's path percent-encode set (https://url.spec.whatwg.org/#path-percent-encode-set).
_PATH_CHARACTERS = "".join(set(string.punctuation) - set('"#<>?`{}'))

# RFC 3986 §3.4, the percent sign of existing escapes, and characters that lenient clients do not encode.
_QUERY_CHARACTERS = "%!$&'()*+,;=:@/?-._~[]{}|\\^`"


@dataclass(frozen=True, slots=True)
class UpstreamAddress:
    """An estimate endpoint. `netloc` is host and port as in a `Host` header, `path` is percent-encoded."""

    scheme: str
    netloc: str
    path: str

    @classmethod
    def of(cls, base_url: str) -> "UpstreamAddress":
        """The address below `base_url`, a valid `upstream.base_url`."""
        parts = urlsplit(base_url.rstrip("/") + ESTIMATE_PATH)
        path = quote(_without_dots(parts.path), safe=_PATH_CHARACTERS)
        return cls(parts.scheme, _netloc(parts.netloc, parts.port, base_url.partition(":")[0]), path)

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.netloc}"

    def query_as_sent(self, query: bytes) -> str:
        """A request's query string as it is sent upstream."""
        return quote(query, safe=_QUERY_CHARACTERS)

    def key_of(self, canonical: bytes, *, account: str, query: str, ignored: Sequence[str]) -> str:
        """The cache key of a request to this address. `query` is as sent."""
        return key_of(canonical, origin=self.origin, account=account, path=self.path, query=query, ignored=ignored)


def _netloc(location: str, port: int | None, scheme: str) -> str:
    """A host name in lower case, or an IPv6 address as written, and the port unless it is the scheme's default.

    scheme: as written. Keys that are stored already have `:443` if it was in upper case.
    """
    host = location[: location.index("]") + 1] if location.startswith("[") else location.partition(":")[0].lower()
    return host if port is None or port == _DEFAULT_PORTS.get(scheme) else f"{host}:{port}"


def _without_dots(path: str) -> str:
    """Resolves `.` and `..` segments (RFC 3986 §5.2.4)."""
    kept: list[str] = []
    for segment in path.split("/"):
        if segment not in (".", ".."):
            kept.append(segment)
        elif segment == ".." and kept != [""]:
            kept.pop()
    return "/".join(kept)
