"""RenderNet for the bench: one constant answer, as cheap as possible, so that it is never the limit.

Run as `python -m bench.upstream <listener fd>`. `PUT /delay/50` delays all later answers by 50 ms; `GET /` returns the
number of estimates received. It handles one request at a time on a connection.
"""

import asyncio
import socket
import sys
from typing import cast

import httptools
import uvloop

from bench.traffic import ANSWER


def _response(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    return head + body


_ESTIMATE = _response(ANSWER)


class _Upstream:
    """The state that all connections share."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.estimates = 0


class _Connection(asyncio.Protocol):
    def __init__(self, upstream: _Upstream) -> None:
        self._upstream = upstream
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_message_complete(self) -> None:
        match self._parser.get_method():
            case b"POST":
                self._estimate()
            case b"PUT":
                self._upstream.delay_s = int(self._url.rpartition(b"/")[2]) / 1000
                self._transport.write(_response(b"{}"))
            case _:
                self._transport.write(_response(b"%d" % self._upstream.estimates))

    def _estimate(self) -> None:
        self._upstream.estimates += 1
        if self._upstream.delay_s:
            self._loop.call_later(self._upstream.delay_s, self._transport.write, _ESTIMATE)
        else:
            self._transport.write(_ESTIMATE)


async def serve(listener: socket.socket) -> None:
    upstream = _Upstream()
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(upstream), sock=listener)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(socket.socket(fileno=int(sys.argv[1]))))
