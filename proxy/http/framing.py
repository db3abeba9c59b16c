"""HTTP/1.1 message framing (RFC 9112): parses request heads and chunked bodies. No I/O.

* A head is parsed as a whole, up to its empty line. Parsing is strict: what two servers could interpret differently is
  refused, because it allows request smuggling.
* An offered upgrade is ignored (RFC 9110 §7.8): the body is framed as the other fields say.
* The head, trailers, chunk extensions, and all else in a message but the body share one size limit.

httptools (llhttp) parses header fields and chunks. Where it tolerates more than the gateway should, this module checks.
"""

import re
from typing import NamedTuple

import httptools

from proxy.problems import BadRequest, Code

MAX_HEAD_BYTES = 64 * 2**10
"""Limits a message without its body: request line, header fields, trailers and chunk extensions together."""

CHUNK_FRAMING_BYTES = 12
"""Size and line breaks of each chunk up to this length do not count against the limit: small chunks are legal."""

END_OF_HEAD = b"\r\n\r\n"

Headers = list[tuple[bytes, bytes]]

_METHODS = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH"))
"""RFC 9110 §9.3 and RFC 5789, without CONNECT: the gateway is not a tunnel, and its target is not a path."""

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_REQUEST_LINE = re.compile(rb"(%b+) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % _TOKEN)
_PARTIAL_REQUEST_LINE = re.compile(rb"%b*(?: (?:[\x21-\x7e]+(?: [HTP/.0-9]{0,8})?)?)?" % _TOKEN)
_NOT_A_REQUEST_LINE = (
    "The request line is malformed: it must be a method, a path and HTTP/1.1. The gateway speaks plain HTTP, not TLS."
)

# RFC 3986 §3.2.2 and §3.2.3: a name, an address in brackets, or nothing; and a port.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-fvV:.]+\]|(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?")

_EMPTY_LINES = re.compile(rb"(?:\r\n)+")
_BARE_LINE_BREAK = re.compile(rb"(?<!\r)\n|\r(?=[^\n])")

_TOO_LARGE = (
    f"The request line, headers, trailers and chunk extensions are larger than {MAX_HEAD_BYTES} bytes together: "
    "shorten them."
)


class RequestHead(NamedTuple):
    """A request line and header fields, names in lower case.

    content_length: length of the body in bytes; None if the body is chunked.
    """

    method: str
    path: bytes
    query: bytes
    version: str
    headers: Headers
    content_length: int | None
    keep_alive: bool
    expects_continue: bool


def skip_empty_lines(received: bytes) -> bytes:
    """`received` less the empty lines that a client may send before a request line (RFC 9112 §2.2)."""
    return received[empty.end() :] if (empty := _EMPTY_LINES.match(received)) else received


def find_end_of_head(received: bytes, begin: int) -> int | None:
    """The length of the head at the start of `received`; None if the head is incomplete.

    begin: where to begin searching; an earlier call has searched the bytes before it.
    Raises `BadRequest` as soon as the bytes cannot become a valid head: the client may wait for a response instead of
    sending more.
    """
    begin = max(0, begin - len(END_OF_HEAD) + 1)
    found = received.find(END_OF_HEAD, begin)
    size = len(received) if found < 0 else found + len(END_OF_HEAD)
    if size > MAX_HEAD_BYTES:
        raise BadRequest(Code.HEADERS_TOO_LARGE, _TOO_LARGE)
    if found >= 0:
        return size
    _check_lines(received, begin)
    _check_beginning(received)
    return None


def parse_head(head: bytes) -> RequestHead:
    """Parses a request's head, which must include the empty line at its end.

    Raises `BadRequest`: with 505 for a version other than 1.0 and 1.1, with 501 for an unknown method or transfer
    coding, else with 400.
    """
    _check_lines(head)
    method, target, version = _parse_request_line(head[: head.index(b"\r\n")])
    url = _parse_target(method, target)
    headers = _parse_fields(head)
    is_chunked = _is_chunked(headers, version)
    _check_host(headers, version)
    length = next((int(value) for name, value in headers if name == b"content-length"), 0)
    return RequestHead(
        method=method.decode(),
        path=url[0],
        query=url[1],
        version=version,
        headers=headers,
        content_length=None if is_chunked else length,
        keep_alive=version == "1.1" and not _has_token(headers, b"connection", b"close"),
        expects_continue=version == "1.1" and _has_token(headers, b"expect", b"100-continue"),
    )


class ChunkedBody:
    """Decodes one chunked body (RFC 9112 §7.1). `complete` becomes True at its end.

    budget: how many bytes trailers, chunk extensions and leading zeros may have together. Trailers are dropped: the
    gateway uses none.
    """

    def __init__(self, budget: int) -> None:
        self.complete = False
        self._budget = budget
        self._pieces: list[bytes] = []
        self._tail = b""
        """The last bytes of the data fed so far: the end of the body may begin in them."""
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Returns the part of the body in `data`, and the bytes after the message. Raises `BadRequest`.

        A chunked body ends with an empty line. So the parser is fed up to one empty line at a time: it must not see the
        next request.
        """
        joined, begin = self._tail + data, len(self._tail)
        while begin < len(joined) and not self.complete:
            end = joined.find(END_OF_HEAD, max(0, begin - len(END_OF_HEAD) + 1)) + len(END_OF_HEAD)
            end = len(joined) if end < len(END_OF_HEAD) else end
            self._feed(joined[begin:end])
            begin = end
        self._tail = joined[-len(END_OF_HEAD) + 1 :]
        body = b"".join(self._pieces)
        self._pieces.clear()
        return body, joined[begin:]

    def _feed(self, data: bytes) -> None:
        self._budget -= len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            raise BadRequest(Code.INVALID_REQUEST, "The body's chunked coding is malformed (RFC 9112 §7.1).") from None
        if self._budget < 0:
            raise BadRequest(Code.HEADERS_TOO_LARGE, _TOO_LARGE)

    def on_chunk_header(self) -> None:
        self._budget += CHUNK_FRAMING_BYTES

    def on_body(self, piece: bytes) -> None:
        self._budget += len(piece)
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        self.complete = True


class _Fields:
    """Collects header fields from httptools."""

    def __init__(self) -> None:
        self.headers: Headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))


def _check_lines(head: bytes, begin: int = 0) -> None:
    if _BARE_LINE_BREAK.search(head, begin):
        raise BadRequest(
            Code.INVALID_REQUEST, "A line of the request's head ends with CR or LF alone: end each line with CRLF."
        )


def _check_beginning(received: bytes) -> None:
    """Raises `BadRequest` if the bytes cannot become a request line, for example because they are TLS."""
    line, line_break, _ = received.partition(b"\r")
    if line_break:
        _parse_request_line(line)
    elif not _PARTIAL_REQUEST_LINE.fullmatch(line):
        raise BadRequest(Code.INVALID_REQUEST, _NOT_A_REQUEST_LINE)


def _parse_request_line(line: bytes) -> tuple[bytes, bytes, str]:
    parts = _REQUEST_LINE.fullmatch(line)
    if parts is None:
        raise BadRequest(Code.INVALID_REQUEST, _NOT_A_REQUEST_LINE)
    method, target, version = parts[1], parts[2], f"{parts[3].decode()}.{parts[4].decode()}"
    if version not in {"1.0", "1.1"}:
        raise BadRequest(Code.VERSION_NOT_SUPPORTED, f"HTTP/{version} is not supported: use HTTP/1.1.")
    if method not in _METHODS:
        raise BadRequest(Code.NOT_IMPLEMENTED, "The request's method is not supported.")
    return method, target, version


def _parse_target(method: bytes, target: bytes) -> tuple[bytes, bytes]:
    """Path and query of a request's target (RFC 9112 §3.2), which is a path, a URL, or `*` for OPTIONS."""
    if target == b"*" and method == b"OPTIONS":
        return target, b""
    try:
        url = None if b"#" in target else httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        url = None
    if url is None:
        raise BadRequest(Code.INVALID_REQUEST, "The target in the request line must be a path without a fragment (#).")
    return url.path or b"/", url.query or b""


def _parse_fields(head: bytes) -> Headers:
    fields = _Fields()
    parser = httptools.HttpRequestParser(fields)
    parser.set_dangerous_leniencies(lenient_transfer_encoding=True)  # `_is_chunked` checks the coding
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass  # an offered upgrade is ignored
    except httptools.HttpParserError as error:
        raise BadRequest(Code.INVALID_REQUEST, f"The request's header fields are malformed: {error}.") from None
    return fields.headers


def _is_chunked(headers: Headers, version: str) -> bool:
    """Whether the body is chunked. Raises `BadRequest` for other transfer codings (RFC 9112 §6.1)."""
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and version == "1.0":
        raise BadRequest(
            Code.INVALID_REQUEST, "HTTP/1.0 has no transfer codings: send Content-Length, or use HTTP/1.1."
        )
    if codings not in ([], [b"chunked"]):
        raise BadRequest(
            Code.NOT_IMPLEMENTED,
            "The transfer coding is not supported: send Content-Length, or Transfer-Encoding: chunked.",
        )
    return bool(codings)


def _has_token(headers: Headers, field: bytes, token: bytes) -> bool:
    """Whether a list field (RFC 9110 §5.6.1) contains `token`."""
    lists = (value.lower().split(b",") for name, value in headers if name == field)
    return any(token == one.strip(b" \t") for tokens in lists for one in tokens)


def _check_host(headers: Headers, version: str) -> None:
    """One well-formed `Host` (RFC 9112 §3.2). HTTP/1.0, which some load balancers use for checks, may leave it out."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise BadRequest(Code.INVALID_REQUEST, "The request must have exactly one Host header.")
    if hosts and not _HOST.fullmatch(hosts[0].strip(b" \t")):
        raise BadRequest(Code.INVALID_REQUEST, "The Host header is malformed: it must be a host, and a port if needed.")
