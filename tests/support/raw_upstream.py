"""An upstream that writes HTTP by hand, and a proxy on the way to it. Both run in threads, a connection each."""

import json
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

PAUSE_S = 0.05
"""Between the pieces of an answer."""

_CHUNK = 65536


@dataclass(frozen=True)
class Request:
    """`connection` counts from 0."""

    connection: int
    line: bytes
    headers: dict[bytes, bytes]
    body: bytes


@dataclass(frozen=True)
class Turn:
    """What comes back to one request: pieces, and perhaps the end of the connection."""

    pieces: tuple[bytes, ...] = ()
    end: Literal["none", "close", "reset"] = "none"


def answer(estimated: int, *, head: str = "") -> bytes:
    """A whole answer with this price."""
    body = b'{"data":{"estimated":%d,"balance":20},"error":{}}' % estimated
    return b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n%b" % (head.encode(), len(body), body)


class Listener:
    """Serves each connection by `talk` in a thread, and ends them all when it is left."""

    def __init__(self, talk: Callable[[socket.socket, int], None], tls: ssl.SSLContext | None = None) -> None:
        self._talk = talk
        self._tls = tls
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._socket.close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection, len(self.connections) - 1))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        with connection, suppress(OSError):
            if self._tls is None:
                self._talk(connection, number)
            else:
                with self._tls.wrap_socket(connection, server_side=True) as wrapped:
                    self.connections[number] = wrapped
                    self._talk(wrapped, number)


class RawUpstream:
    """Requests get what `script` has for them, in order; all others a price: the `steps` of their first item.

    idle_s: a connection is closed if so long after a response there is no other request.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.idle_s: float | None = None
        self.requests: list[Request] = []
        self.closed = 0
        """Connections that the other side has closed."""
        self._turns = deque[Turn]()
        self._listener = Listener(self._talk, tls)
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self._listener.port}"

    def script(self, *turns: Turn) -> None:
        self._turns.extend(turns)

    def close(self) -> None:
        self._listener.close()

    @property
    def connections(self) -> int:
        return len(self._listener.connections)

    def _talk(self, connection: socket.socket, number: int) -> None:
        while True:
            request = read_request(connection, number)
            if request is None:
                self.closed += 1
                return
            self.requests.append(request)
            if not self._answer(connection, self._turns.popleft() if self._turns else Turn((_price(request),))):
                return
            connection.settimeout(self.idle_s)

    def _answer(self, connection: socket.socket, turn: Turn) -> bool:
        """Whether the connection goes on."""
        for number, piece in enumerate(turn.pieces):
            time.sleep(PAUSE_S * bool(number))
            connection.sendall(piece)
        if turn.end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return turn.end == "none"


class RawProxy:
    """An HTTP proxy: it tunnels, and passes plain requests on. `refuses` is what it says to everybody instead."""

    def __init__(self, tls: ssl.SSLContext | None = None, *, refuses: bytes = b"") -> None:
        self.requests: list[Request] = []
        self._refuses = refuses
        self._listener = Listener(self._talk, tls)
        self.port = self._listener.port

    def close(self) -> None:
        self._listener.close()

    def _talk(self, connection: socket.socket, number: int) -> None:
        while (request := read_request(connection, number)) is not None:
            self.requests.append(request)
            method, target, _ = request.line.decode().split(" ")
            where = urlsplit(target if method == "POST" else f"//{target}")
            if self._refuses:
                connection.sendall(self._refuses)
                return
            with socket.create_connection((where.hostname, where.port)) as onwards:
                if method == "CONNECT":
                    connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    _tunnel(connection, onwards)
                    return
                lines = [b"POST %b HTTP/1.1" % where.path.encode(), b"content-length: %d" % len(request.body), b"", b""]
                onwards.sendall(b"\r\n".join(lines) + request.body)
                connection.sendall(onwards.recv(_CHUNK))


def read_request(connection: socket.socket, number: int) -> Request | None:
    """The next request; None at the end of the connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        try:
            chunk = connection.recv(_CHUNK)
        except ConnectionError:
            chunk = b""
        if not chunk:
            return None
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    line, *fields = head.split(b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(b":") for field in fields)}
    while len(body) < int(headers.get(b"content-length", b"0")):
        body += connection.recv(_CHUNK)
    return Request(number, line, headers, body)


def _price(request: Request) -> bytes:
    return answer(json.loads(request.body)[0]["steps"])


def _tunnel(one: socket.socket, other: socket.socket) -> None:
    back = threading.Thread(target=_pump, args=(other, one))
    back.start()
    _pump(one, other)
    back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(_CHUNK):
            target.sendall(chunk)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def raw_upstream(tls: ssl.SSLContext | None = None) -> Iterator[RawUpstream]:
    with ExitStack() as opened:
        upstream = RawUpstream(tls)
        opened.callback(upstream.close)
        yield upstream


@contextmanager
def raw_proxy(tls: ssl.SSLContext | None = None, *, refuses: bytes = b"") -> Iterator[RawProxy]:
    with ExitStack() as opened:
        proxy = RawProxy(tls, refuses=refuses)
        opened.callback(proxy.close)
        yield proxy
