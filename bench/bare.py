"""Servers that the gateway is compared with, on the same HTTP server with the same settings.

Run as `python -m bench.bare <listener fd> starlette|asgi|httpx2|aiohttp [upstream URL]`: a plain Starlette route with a
constant answer; a constant answer without Starlette; a Starlette route that passes every body on to upstream with that
client and does nothing else, like a proxy of ten lines.
"""

import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import httpx2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bench.traffic import ANSWER
from gateway_fixture import PATH
from proxy.http.server import Server

_JSON = "application/json"
_HEADERS = {"content-type": _JSON, "x-api-key": "rn-bench"}
_MAX_CONNECTIONS = 1000


def starlette_route() -> ASGIApp:
    """Answers as many bytes as the gateway, without reading the body."""

    async def endpoint(_: Request) -> Response:
        return Response(ANSWER, media_type=_JSON)

    return Starlette(routes=[Route(PATH, endpoint, methods=["POST"])])


def asgi() -> ASGIApp:
    headers = [(b"content-type", _JSON.encode()), (b"content-length", str(len(ANSWER)).encode())]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await Starlette()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": ANSWER})

    return app


def httpx2_route(upstream_url: str) -> ASGIApp:
    """A proxy without any feature of the gateway, with httpx2."""
    limits = httpx2.Limits(max_connections=_MAX_CONNECTIONS, max_keepalive_connections=_MAX_CONNECTIONS)
    client = httpx2.AsyncClient(base_url=upstream_url, limits=limits, trust_env=False)

    async def endpoint(request: Request) -> Response:
        answer = await client.post(PATH, content=await request.body(), headers=_HEADERS)
        return Response(answer.content, answer.status_code, media_type=_JSON)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    return Starlette(routes=[Route(PATH, endpoint, methods=["POST"])], lifespan=lifespan)


def aiohttp_route(upstream_url: str) -> ASGIApp:
    """The same with aiohttp."""

    async def endpoint(request: Request) -> Response:
        async with request.state.client.post(PATH, data=await request.body(), headers=_HEADERS) as answer:
            return Response(await answer.read(), answer.status, media_type=_JSON)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, aiohttp.ClientSession]]:
        connector = aiohttp.TCPConnector(limit=_MAX_CONNECTIONS)
        jar = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(upstream_url, connector=connector, cookie_jar=jar) as client:
            yield {"client": client}

    return Starlette(routes=[Route(PATH, endpoint, methods=["POST"])], lifespan=lifespan)


_APPS: dict[str, Callable[..., ASGIApp]] = {
    "starlette": starlette_route,
    "asgi": asgi,
    "httpx2": httpx2_route,
    "aiohttp": aiohttp_route,
}


def main() -> None:
    fd, kind, *rest = sys.argv[1:]
    app = _APPS[kind](*rest)
    with socket.socket(fileno=int(fd)) as listener:
        Server(app, head_timeout_s=10, drain_s=1, announce=lambda: None).run([listener])


if __name__ == "__main__":
    main()
