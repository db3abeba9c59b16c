"""The HTTP protocol without a socket: requests in any pieces are read and answered in order."""

import asyncio
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.http.connection import MAX_CACHED_HEAD_BYTES, MAX_CACHED_HEADS, SCOPE_BODY, SCOPE_HEADERS
from proxy.http.request_cycle import SCOPE_REPLY, Delivery
from proxy.http.server import Server

FIELDS = tuple(
    f"{field}\r\n"
    for field in ("X-API-KEY: a", "Connection: keep-alive", "Connection: close", "Expect: 100-continue", "B:  c ")
)
TURNS = 40
"""Iterations of the event loop, more than any answer needs."""

ONE_ID = re.compile(rb"[0-9a-f]{32}")


def post(body: bytes = b"[{}]", *, fields: str = "", path: str = "/p?q=1", declared: int | None = None) -> bytes:
    length = len(body) if declared is None else declared
    return f"POST {path} HTTP/1.1\r\nHost: h\r\n{fields}Content-Length: {length}\r\n\r\n".encode() + body


CHUNKED = b"POST /p HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\nX-API-KEY: b\r\n\r\n"
UPGRADE = b"GET /p HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
OLD = b"GET /p HTTP/1.0\r\n\r\n"
TWICE = b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n[]"

requests = st.one_of(
    st.builds(
        post,
        st.sampled_from([b"", b"[]", b"[{}]", b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"]),
        fields=st.lists(st.sampled_from(FIELDS), max_size=2).map("".join),
        path=st.sampled_from(["/%70?q", "/early", "/late"]),
    ),
    st.sampled_from(
        [
            CHUNKED,
            UPGRADE,
            OLD,
            TWICE,
            b"GET /p HTTP/1.1\r\nHost: h\r\n\r\n",
            b"HEAD /p HTTP/1.1\r\nHost: h\r\n\r\n",
            b"\r\n",
            b"?",
        ]
    ),
)


class Transport(asyncio.Transport):
    """A transport that records the written bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ARG002 -- this transport has no extra info
        return default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Marks the end of the written bytes."""

    def pause_reading(self) -> None:
        """Does nothing: the test feeds all pieces."""

    def resume_reading(self) -> None:
        """Does nothing: the test feeds all pieces."""


class NoCache(dict[bytes, Any]):
    def __setitem__(self, head: bytes, cached: Any) -> None:
        """Stores nothing."""


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with everything that a request contains, at once or a few iterations later."""
    body, more = b"", scope["path"] != "/early"
    if scope["path"] == "/late":
        await _iterate(3)
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    assert scope["path"] == "/early" or scope.get(SCOPE_BODY, body) == body
    seen = [scope[name] for name in ("method", "path", "raw_path", "query_string", "http_version", "headers", "state")]
    received = repr((seen, scope[SCOPE_HEADERS].token, body)).encode()
    if scope[SCOPE_REPLY](200, [], received, close=False) is Delivery.BY_MESSAGES:
        assert scope["method"] == "HEAD"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


class Connection:
    """A connection of a server with the given cache of heads."""

    def __init__(self, head_cache: dict[bytes, Any], app: ASGIApp) -> None:
        server = Server(app, head_timeout_s=10, drain_s=1, announce=lambda: None)
        server.config.load()
        make: Any = server.config.http_protocol_class
        self._tasks = server.server_state.tasks
        self._protocol: Any = make.func(
            server.config, server.server_state, {}, **{**make.keywords, "head_cache": head_cache}
        )
        self._transport = Transport()
        self._protocol.connection_made(self._transport)

    async def feed(self, piece: bytes, *, turns: int) -> None:
        """Feeds one piece, and then runs a number of iterations of the event loop."""
        if not self._transport.closed:
            self._protocol.data_received(piece)
        await _iterate(turns)

    async def end(self) -> tuple[bytes, bool]:
        """Returns the received bytes, and whether the connection was closed."""
        await _iterate(TURNS)
        received = ONE_ID.sub(b"<id>", self._transport.written), self._transport.closed
        self._protocol.connection_lost(None)
        await _iterate(TURNS)
        assert not self._tasks
        return received


async def _iterate(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


async def answers(
    head_cache: dict[bytes, Any], pieces: list[tuple[bytes, int]], app: ASGIApp = echo
) -> tuple[bytes, bool]:
    connection = Connection(head_cache, app)
    for piece, turns in pieces:
        await connection.feed(piece, turns=turns)
    return await connection.end()


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[bytes, int]]:
    """Draws requests that mostly arrive whole, one by one, else cut and joined anywhere."""
    sent = draw(st.lists(requests, min_size=1, max_size=8))
    if draw(st.booleans()):
        return [(piece, TURNS) for piece in sent]
    stream = b"".join(sent)
    cuts = sorted({0, len(stream), *draw(st.lists(st.integers(0, len(stream)), max_size=5))})
    turns = draw(st.lists(st.sampled_from([0, 1, TURNS]), min_size=len(cuts), max_size=len(cuts)))
    return [(stream[begin:end], waits) for begin, end, waits in zip(cuts, cuts[1:], turns, strict=False)]


@given(st.lists(conversations(), min_size=1, max_size=3))
@example([[(post(), TURNS)] * 3])
@example([[(post(), TURNS), (post() + post(), TURNS), (post()[:-1], TURNS), (post()[-1:], TURNS)]])
@example([[(post(), TURNS), (post(declared=5), TURNS), (b"x" * 1, TURNS)]])
@example([[(post(path="/late"), TURNS), (post(), TURNS), (post(path="/late"), 1), (post(), TURNS)]])
@example([[(post(), TURNS), (post(path="/early", declared=99), TURNS), (post(), TURNS)]])
@example([[(CHUNKED, TURNS)] * 2, [(UPGRADE, TURNS), (post(), TURNS)], [(b"\r\n" + post(), TURNS)] * 2])
def test_a_cached_head_is_parsed_like_a_new_one(talks: list[list[tuple[bytes, int]]]) -> None:
    async def both() -> None:
        head_cache: dict[bytes, Any] = {}
        for pieces in talks:
            assert await answers(head_cache, pieces) == await answers(NoCache(), pieces)

    asyncio.run(both())


def heads_of(*sent: bytes) -> list[bytes]:
    """Returns the heads that are cached after these requests."""
    head_cache: dict[bytes, Any] = {}
    asyncio.run(answers(head_cache, [(piece, TURNS) for piece in sent]))
    return list(head_cache)


def test_a_head_is_cached_however_it_arrives() -> None:
    head = post(b"")
    assert heads_of(head) == heads_of(head, head) == heads_of(head + head) == heads_of(b"\r\n" + head) == [head]
    assert heads_of(head[:-1], head[-1:]) == [head]
    assert heads_of(OLD, b"?") == [OLD]
    assert heads_of(TWICE) == []


def test_the_size_of_the_head_cache_is_limited() -> None:
    assert heads_of(post(fields=f"B: {'b' * MAX_CACHED_HEAD_BYTES}\r\n")) == []
    many = [post(path=f"/{number}") for number in range(MAX_CACHED_HEADS + 1)]
    found = heads_of(*many)
    assert len(found) == MAX_CACHED_HEADS
    assert many[0][:-4] not in found
    assert many[-1][:-4] in found


@pytest.mark.parametrize("line", [b"a: b\r\nc: d", b"a: b\nc: d", b"a: b\rc: d", b"a: b\0"])
def test_a_header_that_would_break_the_head_is_an_error(line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, _: Receive, __: Send) -> None:
        scope[SCOPE_REPLY](200, [line], b"", close=False)

    received, _ = asyncio.run(answers({}, [(post(), TURNS)], app))
    assert received.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert line not in received
    assert "a response header contains a line break or NUL" in caplog.text


def test_an_application_without_a_response_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    async def app(_: Scope, __: Receive, ___: Send) -> None:
        pass

    received, closed = asyncio.run(answers({}, [(post(), TURNS)], app))
    assert received.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert closed
    assert "a request ended without a response" in caplog.text


def test_an_incomplete_answer_closes_the_connection() -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": b"[", "more_body": True})

    assert asyncio.run(answers({}, [(post(), TURNS)], app)) == (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n[", True)
