"""What the gateway is compared with, on the server and with the settings that it runs on itself.

Run as `python -m bench.bare <listener fd> starlette|asgi|forward [upstream URL]`: a plain Starlette route with a
constant answer; a constant answer without Starlette; a Starlette route that passes every body on to upstream and does
nothing else, as a proxy of ten lines would.
"""

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bench.traffic import ANSWER
from proxy.server import Server
from scene import PATH

_JSON = "application/json"
_MAX_CONNECTIONS = 1000


def starlette_route() -> ASGIApp:
    """Reads nothing, and answers as many bytes as the gateway does."""

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


def forward(upstream_url: str) -> ASGIApp:
    """A proxy without any of what a gateway is for."""
    limits = httpx2.Limits(max_connections=_MAX_CONNECTIONS, max_keepalive_connections=_MAX_CONNECTIONS)
    client = httpx2.AsyncClient(base_url=upstream_url, limits=limits, trust_env=False)

    async def endpoint(request: Request) -> Response:
        headers = {"content-type": _JSON, "x-api-key": "rn-bench"}
        answer = await client.post(PATH, content=await request.body(), headers=headers)
        return Response(answer.content, answer.status_code, media_type=_JSON)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    return Starlette(routes=[Route(PATH, endpoint, methods=["POST"])], lifespan=lifespan)


def main() -> None:
    fd, kind, *rest = sys.argv[1:]
    match kind:
        case "starlette":
            app = starlette_route()
        case "asgi":
            app = asgi()
        case _:
            app = forward(*rest)
    with socket.socket(fileno=int(fd)) as listener:
        Server(app, head_timeout_s=10, drain_s=1, announce=lambda: None).run([listener])


if __name__ == "__main__":
    main()
