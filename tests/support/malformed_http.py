"""Requests that two servers could read in two ways, and neighbours of theirs that are well-formed.

Each table has the status with which a request is refused; 200 means that it is not.
"""


def head(line: str = "POST /p?q=1 HTTP/1.1", *fields: str, host: str | None = "h") -> bytes:
    lines = [line, *([] if host is None else [f"Host: {host}"]), *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1")


REQUEST_LINES = [
    ("GET / HTTP/1.0", 200),
    ("GET / HTTP/2.0", 505),
    ("PRI * HTTP/2.0", 505),
    ("GET / HTTP/0.9", 505),
    ("GET / HTTP/1.2", 505),
    ("GET / HTTP/1", 400),
    ("GET / HTTP/11.1", 400),
    ("GET / http/1.1", 400),
    ("GET / HTTPS/1.1", 400),
    ("GET /", 400),
    ("GET", 400),
    ("", 400),
    ("GET  / HTTP/1.1", 400),
    ("GET\t/ HTTP/1.1", 400),
    ("GET / HTTP/1.1 ", 400),
    ("G(T / HTTP/1.1", 400),
    ("FOO / HTTP/1.1", 501),
    ("get / HTTP/1.1", 501),
    ("CONNECT h:443 HTTP/1.1", 501),
    ("GET * HTTP/1.1", 200),
    ("GET h:443 HTTP/1.1", 400),
    ("GET p HTTP/1.1", 400),
    ("GET /p#f HTTP/1.1", 400),
    ("GET /\x80 HTTP/1.1", 400),
    ("GET /a\x7f HTTP/1.1", 400),
]

SERVER_POOL: list[tuple[str | None, int]] = [
    ("h", 200),
    ("", 200),
    ("h:8080", 200),
    ("h:", 200),
    (" h\t", 200),
    ("[::1]:80", 200),
    ("1.2.3.4", 200),
    ("a%20b", 200),
    ("h, g", 400),
    ("h g", 400),
    ("h/p", 400),
    ("u@h", 400),
    ("h:80:80", 400),
    ("h:a", 400),
    ("h#", 400),
    ("a%2", 400),
    ("[::1", 400),
    ("é", 400),
    (None, 400),
]

FIELDS = [
    (["Transfer-Encoding: chunked"], 200),
    (["Transfer-Encoding: Chunked"], 200),
    (["Transfer-Encoding: gzip"], 501),
    (["Transfer-Encoding: gzip, chunked"], 501),
    (["Transfer-Encoding: chunked, gzip"], 501),
    (["Transfer-Encoding: chunked, chunked"], 501),
    (["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], 501),
    (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], 501),
    (["Transfer-Encoding: identity"], 501),
    (["Transfer-Encoding: chunked;a=b"], 501),
    (["Transfer-Encoding: chunked "], 501),
    (["Transfer-Encoding: \x0bchunked"], 400),
    (["Transfer-Encoding : chunked"], 400),
    (["Transfer-Encoding:"], 400),
    (["Transfer-Encoding: chunked", "Content-Length: 2"], 400),
    (["Content-Length: 2", "Transfer-Encoding: chunked"], 400),
    (["Content-Length: 2", "Content-Length: 2"], 400),
    (["Content-Length: 2, 2"], 400),
    (["Content-Length: +2"], 400),
    (["Content-Length: -2"], 400),
    (["Content-Length: 0x2"], 400),
    (["Content-Length: 2_0"], 400),
    (["Content-Length: 99999999999999999999"], 400),
    (["Content-Length:"], 400),
    (["A: b", " c"], 400),
    (["A"], 400),
    ([": b"], 400),
    (["A B: c"], 400),
    (["A: b\0c"], 400),
    (["A: \x80"], 200),
]

NOT_CHUNKED = [
    b"2\r\n[]\n0\r\n\r\n",
    b"2\n[]\r\n0\r\n\r\n",
    b"g\r\n",
    b"-2\r\n[]\r\n",
    b"0x2\r\n[]\r\n",
    b" 2\r\n[]\r\n",
    b"2 \r\n[]\r\n",
    b"2\r\n[]]\r\n",
    b"2\r\n[]0\r\n\r\n",
    b"ffffffffffffffffff\r\n",
    b"0\r\nA B: c\r\n\r\n",
    b"0\r\nContent-Length: 9\r\n\r\n",
    b"0\r\nA: b\n\r\n",
    b"0\r\n\n",
]


def refused_heads() -> dict[bytes, int]:
    """All of the heads that are refused, with their statuses."""
    every = {head(line): status for line, status in REQUEST_LINES}
    every |= {head(host=host): status for host, status in SERVER_POOL}
    every |= {head("POST / HTTP/1.1", *fields): status for fields, status in FIELDS}
    every |= {head("POST / HTTP/1.0", "Transfer-Encoding: chunked"): 400, head().replace(b"\r\n", b"\n", 1): 400}
    return {text: status for text, status in every.items() if status != 200}
