"""One request on its own connection, to check a server's answer before a measurement."""

import socket
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from urllib.parse import urlsplit

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    cache_status: str
    body: bytes


def send(url: str, request: bytes) -> Response:
    """Raises `OSError` if there is no answer."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=_TIMEOUT_S) as connection:
        connection.sendall(request)
        response = HTTPResponse(connection)
        try:
            response.begin()
            return Response(response.status, response.headers.get("cache-status", ""), response.read())
        except HTTPException as error:
            raise OSError(f"no HTTP: {error}") from None


def get(url: str, path: str, method: str = "GET") -> Response:
    """Like `send`, for a path."""
    return send(url, f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())


def answers(url: str, path: str) -> bool:
    """Returns whether the answer is a 200."""
    try:
        return get(url, path).status == 200
    except OSError:
        return False


def responds(url: str) -> bool:
    """Returns whether there is any answer."""
    try:
        return get(url, "/").status > 0
    except OSError:
        return False
