"""The request header fields that this gateway uses.

Repeated fields are joined into a list, as RFC 9110 §5.3 allows. A repeated field that is not a list is refused when it
is used.
"""

import re
from functools import cached_property

from proxy.gateway.freshness import Directives, parse_directives
from proxy.http.framing import Headers
from proxy.problems import BadRequest, Code

Lines = list[bytes]
"""Header fields as complete lines: `name: value`."""

JSON = "application/json"
_JSON = JSON.encode()

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_USED_FIELDS = frozenset(
    (
        b"accept",
        b"access-control-request-method",
        b"authorization",
        b"cache-control",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"estimate-proxy-max-credits",
        b"origin",
        b"x-api-key",
        b"x-request-id",
    )
)
_DEFAULT_TYPES_OF_CLIENTS = frozenset(
    ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/octet-stream")
)
"""What HTTP clients send if the caller sets no content type: fetch, Ruby's Net::HTTP, Perl's LWP, urllib, curl -d."""

_CEILING = re.compile(r"[0-9]+(\.[0-9]{1,6})?")

_CEILING_DIGITS = 18
"""Further digits are dropped: a number with so many is above any price anyway."""

_NO_DIRECTIVES = Directives()


class RequestHeaders:
    """The used fields of a request. Reading a malformed one raises `BadRequest`.

    Each is parsed once: requests with the same head share one `RequestHeaders`, see `proxy.http.connection`.

    headers: with names in lower case.
    """

    def __init__(self, headers: Headers) -> None:
        self._fields: dict[bytes, bytes] = {}
        self._counts: dict[bytes, int] = {}
        fields = self._fields
        for name, value in headers:
            if name not in _USED_FIELDS:
                continue
            if name in fields:
                self._counts[name] = self._counts.get(name, 1) + 1
                value = fields[name] + b", " + value  # noqa: PLW2901 -- the parts of one list
            fields[name] = value

    @cached_property
    def token(self) -> str | None:
        """The client's token: `X-API-KEY`, or else `Authorization: Bearer`."""
        key = self._single(b"x-api-key")
        if b"authorization" not in self._fields:
            return key
        scheme, _, token = (self._single(b"authorization") or "").partition(" ")
        return key if key is not None else token.strip() if scheme.lower() == "bearer" else None

    @cached_property
    def request_id(self) -> str | None:
        """The client's request id, if it is usable."""
        value = self._fields.get(b"x-request-id")
        return value.decode("ascii") if value is not None and _REQUEST_ID.fullmatch(value) else None

    @cached_property
    def directives(self) -> Directives:
        value = self._fields.get(b"cache-control")
        return _NO_DIRECTIVES if value is None else parse_directives(value.decode("latin-1"))

    @cached_property
    def ceiling_micro(self) -> int | None:
        """The highest price that the client accepts, in micro-credits (`Estimate-Proxy-Max-Credits`)."""
        value = self._single(b"estimate-proxy-max-credits")
        if value is None:
            return None
        if not _CEILING.fullmatch(value):
            raise BadRequest(
                Code.INVALID_REQUEST,
                "Estimate-Proxy-Max-Credits must be a number of credits with at most 6 decimals, such as 20 or 2.5.",
            )
        whole, _, decimals = value.partition(".")
        return int(whole.lstrip("0")[:_CEILING_DIGITS] + decimals.ljust(6, "0"))

    @cached_property
    def accept(self) -> str | None:
        value = self._fields.get(b"accept")
        return value.decode("latin-1") if value else None

    @cached_property
    def origin(self) -> str | None:
        """The origin of the page that a browser sends the request for."""
        value = self._fields.get(b"origin")
        return value.decode("latin-1") if value else None

    @property
    def asks_preflight(self) -> bool:
        """Whether an OPTIONS request asks for CORS permission."""
        return b"access-control-request-method" in self._fields

    @cached_property
    def content_length(self) -> int:
        """0 if absent. `proxy.http.framing` has checked that it is one number."""
        return int(self._single(b"content-length") or 0)

    def check_media_type(self) -> None:
        """Raises `BadRequest` unless the body is declared as plain JSON, or not declared at all."""
        if not self._is_plain_json:
            self._check_content_fields()

    @cached_property
    def _is_plain_json(self) -> bool:
        fields = self._fields
        return fields.get(b"content-type", _JSON) == _JSON and b"content-encoding" not in fields and not self._counts

    def _check_content_fields(self) -> None:
        content_type, coding = self._single(b"content-type"), self._single(b"content-encoding")
        media_type = JSON if content_type is None else content_type.partition(";")[0].strip().lower()
        if media_type != JSON:
            detail = f"The body's content type is not supported: send the header Content-Type: {JSON}."
            if media_type in _DEFAULT_TYPES_OF_CLIENTS:
                detail = (
                    f"The request has the header Content-Type: {media_type}, which many HTTP clients send by default: "
                    f"send Content-Type: {JSON} instead."
                )
            raise BadRequest(Code.UNSUPPORTED_MEDIA_TYPE, detail, (b"accept", _JSON))
        if coding is not None and coding.lower() != "identity":
            detail = "The body's content coding is not supported: send it uncompressed, without Content-Encoding."
            raise BadRequest(Code.UNSUPPORTED_MEDIA_TYPE, detail, (b"accept-encoding", b"identity"))

    def _single(self, name: bytes) -> str | None:
        value = self._fields.get(name)
        if value is None:
            return None
        if name in self._counts:
            raise BadRequest(
                Code.INVALID_REQUEST, f"The header {name.decode()} was sent {self._counts[name]} times: send it once."
            )
        return value.decode("latin-1").strip()
