"""Request heads and chunked bodies: what is parsed, and what is refused because it is malformed or ambiguous."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malformed_http import FIELDS, NOT_CHUNKED, REQUEST_LINES, SERVER_POOL, head
from proxy.http.framing import (
    CHUNK_FRAMING_BYTES,
    MAX_HEAD_BYTES,
    ChunkedBody,
    find_end_of_head,
    parse_head,
    skip_empty_lines,
)
from proxy.problems import BadRequest


def status_of(text: bytes) -> int:
    """The status with which a head is refused; 200 if it is not."""
    try:
        parse_head(text)
    except BadRequest as error:
        return error.problem.status
    return 200


def test_a_head_is_parsed() -> None:
    read = parse_head(head("POST /p%20a?q=1 HTTP/1.1", "Content-Length: 12", "X-Thing:  b ", "Expect: 100-Continue"))
    assert read._asdict() == {
        "method": "POST",
        "path": b"/p%20a",
        "query": b"q=1",
        "version": "1.1",
        "headers": [(b"host", b"h"), (b"content-length", b"12"), (b"x-thing", b"b "), (b"expect", b"100-Continue")],
        "content_length": 12,
        "keep_alive": True,
        "expects_continue": True,
    }


@pytest.mark.parametrize(
    ("line", "path", "query"),
    [
        ("GET / HTTP/1.1", b"/", b""),
        ("GET http://other:80/p?q HTTP/1.1", b"/p", b"q"),
        ("GET http://other HTTP/1.1", b"/", b""),
        ("OPTIONS * HTTP/1.1", b"*", b""),
        ("GET //h/p HTTP/1.1", b"//h/p", b""),
        ("GET /?a?b HTTP/1.1", b"/", b"a?b"),
    ],
)
def test_targets_are_split_into_path_and_query(line: str, path: bytes, query: bytes) -> None:
    read = parse_head(head(line))
    assert (read.path, read.query) == (path, query)


@pytest.mark.parametrize(("line", "status"), REQUEST_LINES)
def test_request_lines(line: str, status: int) -> None:
    assert status_of(head(line)) == status


@pytest.mark.parametrize(("host", "status"), SERVER_POOL)
def test_hosts(host: str | None, status: int) -> None:
    assert status_of(head(host=host)) == status


def test_http_1_0_may_leave_out_the_host_but_not_send_two() -> None:
    assert status_of(head("GET / HTTP/1.0", host=None)) == 200
    assert status_of(head("GET / HTTP/1.0", "Host: h")) == 400
    assert status_of(head("GET / HTTP/1.1", "Host: h")) == 400


@pytest.mark.parametrize(("fields", "status"), FIELDS)
@pytest.mark.parametrize("offer", [[], ["Connection: Upgrade", "Upgrade: h2c"]])
def test_header_fields(fields: list[str], status: int, offer: list[str]) -> None:
    assert status_of(head("POST / HTTP/1.1", *fields, *offer)) == status
    assert status_of(head("POST / HTTP/1.1", *offer, *fields)) == status


def test_http_1_0_has_no_transfer_codings() -> None:
    assert status_of(head("POST / HTTP/1.0", "Transfer-Encoding: chunked")) == 400
    assert status_of(head("POST / HTTP/1.0", "Transfer-Encoding: gzip")) == 400


@pytest.mark.parametrize("text", [head().replace(b"Host: h\r\n", b"Host: h\n"), b"GET / HTTP/1.1\nHost: h\r\n\r\n"])
def test_lines_must_end_with_crlf(text: bytes) -> None:
    assert status_of(text) == 400
    assert status_of(text.replace(b"\n", b"\r", 1)) == 400


@pytest.mark.parametrize(
    ("line", "fields", "kept"),
    [
        ("GET / HTTP/1.1", [], True),
        ("GET / HTTP/1.1", ["Connection: close"], False),
        ("GET / HTTP/1.1", ["Connection: Upgrade, Close", "Upgrade: h2c"], False),
        ("GET / HTTP/1.1", ["Connection: upgrade", "Connection: close"], False),
        ("GET / HTTP/1.1", ["Connection: closed"], True),
        ("GET / HTTP/1.0", [], False),
        ("GET / HTTP/1.0", ["Connection: keep-alive"], False),
    ],
)
def test_which_connections_are_kept(line: str, fields: list[str], *, kept: bool) -> None:
    assert parse_head(head(line, *fields)).keep_alive is kept


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "TLS/1.2"])
def test_an_offered_upgrade_is_ignored(upgrade: str) -> None:
    offer = ["Connection: Upgrade, HTTP2-Settings", f"Upgrade: {upgrade}", "HTTP2-Settings: AAMAAABkAAQAAP__"]
    for framing, length in (("Content-Length: 7", 7), ("Transfer-Encoding: chunked", None)):
        read = parse_head(head("POST / HTTP/1.1", *offer, framing))
        assert (read.content_length, read.keep_alive) == (length, True)


def test_only_http_1_1_expects_a_continue() -> None:
    assert not parse_head(head("POST / HTTP/1.0", "Expect: 100-continue")).expects_continue
    assert not parse_head(head("POST / HTTP/1.1", "Expect: something")).expects_continue


def test_empty_lines_before_a_request_are_skipped() -> None:
    assert skip_empty_lines(b"\r\n\r\nGET") == b"GET"
    assert skip_empty_lines(b"\r") == b"\r"
    assert skip_empty_lines(b"\nGET") == b"\nGET"


@given(st.lists(st.integers(1, 40), min_size=1))
def test_the_end_of_a_head_is_found_however_it_is_split(sizes: list[int]) -> None:
    text, received, searched, position = head() + b"[\n]", b"", 0, 0
    for size in [*sizes, len(text)]:
        received, position = received + text[position : position + size], position + size
        end = find_end_of_head(received, searched)
        assert end == (len(head()) if len(received) >= len(head()) else None)
        if end is not None:
            return
        searched = len(received)


@pytest.mark.parametrize(
    ("beginning", "status"),
    [
        (b"", 200),
        (b"GET", 200),
        (b"GET /", 200),
        (b"GET / HTT", 200),
        (b"GET / HTTP/1.1\r", 200),
        (b"GET / HTTP/1.1\r\nHo", 200),
        (b"\x16\x03\x01", 400),
        (b"GET /\r\n", 400),
        (b"GET / HTTP/2.0\r\n", 505),
        (b"FOO / HTTP/1.1\r\n", 501),
        (b"GET / HTTP/1.1\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\n", 400),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * MAX_HEAD_BYTES, 431),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
    ],
)
def test_bytes_that_cannot_become_a_head_are_refused_at_once(beginning: bytes, status: int) -> None:
    try:
        assert find_end_of_head(beginning, 0) is None
        found = 200
    except BadRequest as error:
        found = error.problem.status
    assert found == status


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


def fed(body: ChunkedBody, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """The decoded bytes, and the bytes after the end."""
    decoded, left = b"", b""
    for piece in pieces:
        if body.complete:
            left += piece
        else:
            part, left = body.feed(piece)
            decoded += part
    return decoded, left


parts = st.lists(st.one_of(st.binary(min_size=1, max_size=9), st.just(b"\r\n\r\n"), st.just(b"0\r\n\r\n")), max_size=5)


@given(
    parts,
    st.sampled_from([b"", b"A: b\r\n", b"X-API-KEY: c\r\nHost: d\r\n"]),
    st.sampled_from([b"", b"GET / HTTP/1.1\r\n\r\n", b"\r\n\r\n"]),
    st.data(),
)
def test_a_chunked_body_is_decoded_however_it_is_split(
    chunks: list[bytes], trailers: bytes, after: bytes, data: st.DataObject
) -> None:
    text = b"".join(map(chunk, chunks)) + b"0\r\n" + trailers + b"\r\n" + after
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=5))})
    body = ChunkedBody(budget=1000)
    decoded = fed(body, [text[begin:end] for begin, end in pairwise(cuts)])
    assert decoded == (b"".join(chunks), after)
    assert body.complete


@pytest.mark.parametrize("text", NOT_CHUNKED)
def test_malformed_chunks_are_refused(text: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        fed(ChunkedBody(budget=1000), [text])
    assert refused.value.problem.status == 400


@pytest.mark.parametrize(
    "flood",
    [
        chunk(b"[]", b";" + b"a" * 200),
        chunk(b"[]", b";a=b" * 60),
        b"0" * 200 + b"2\r\n[]\r\n",
        b"0\r\nA: " + b"b" * 200,
        b"0\r\n" + b"A: b\r\n" * 50,
    ],
)
def test_trailers_and_extensions_are_limited(flood: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        fed(ChunkedBody(budget=100), [flood])
    assert refused.value.problem.status == 431
    fed(ChunkedBody(budget=1000), [flood])


def test_small_chunks_do_not_count_against_the_limit() -> None:
    pieces = [chunk(b"x")] * 10_000
    assert fed(ChunkedBody(budget=CHUNK_FRAMING_BYTES), [*pieces, b"0\r\n\r\n"]) == (b"x" * 10_000, b"")


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_splitting_never_changes_the_result(text: bytes, places: list[int]) -> None:
    def outcome(pieces: list[bytes]) -> Any:
        try:
            return fed(ChunkedBody(budget=50), pieces)
        except BadRequest as error:
            return error.problem

    cuts = sorted({0, len(text), *(place for place in places if place < len(text))})
    in_pieces = outcome([text[begin:end] for begin, end in pairwise(cuts)])
    assert in_pieces == outcome([text])
