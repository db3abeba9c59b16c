"""HTTP/1.1 by hand, on a bare connection."""

import contextlib
import socket
from collections.abc import Iterator
from typing import Self

from gateway_fixture import DESIGN, PATH, GatewayFixture


def post(body: bytes, *fields: str, length: bool = True) -> bytes:
    """An estimate asked by the team `design`."""
    sized = f"Content-Length: {len(body)}\r\n" if length else ""
    lines = "".join(f"{field}\r\n" for field in fields)
    return f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {DESIGN}\r\n{lines}{sized}\r\n".encode() + body


def chunked(body: bytes, *, trailer: bytes = b"") -> bytes:
    half = len(body) // 2
    parts = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:]))
    return parts + b"0\r\n" + trailer + b"\r\n"


class Reader:
    """Takes responses off a connection, one after the other."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def response(self) -> tuple[int, dict[str, str], bytes]:
        status = int(self._file.readline().split()[1])
        headers = {}
        while line := self._file.readline().decode().strip():
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        return status, headers, self._file.read(int(headers.get("content-length", "0")))


@contextlib.contextmanager
def talking(gateway: GatewayFixture) -> Iterator[tuple[socket.socket, Reader]]:
    with gateway.connect() as connection, Reader(connection) as reader:
        yield connection, reader
