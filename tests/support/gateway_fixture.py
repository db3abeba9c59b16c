"""A gateway in this process: real sockets, a real store, the simulator as upstream."""

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import http_sf
import httpx2
import redis
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy.app import build
from proxy.auth import digest_of, token_of
from proxy.demo.simulator import Responder
from proxy.gateway.in_flight import InFlightTracker
from proxy.settings.schema import Settings
from proxy.telemetry.metrics import Metrics
from scripted_simulator import Simulator
from serving import NO_TLS, serving

PATH = "/pub/v1/generations/estimate"
API_KEY = "rn-canary/+key"
PLENTY = {"per_s": 10_000, "burst": 10_000}
"""A rate for tests that are about something else."""

DESIGN, MARKETING, RETIRED, EXPIRED = (token_of(letter * 32) for letter in "dmre")


class UpstreamFixture:
    """The upstream that tests share: passes each request to the current test's simulator. `url` is where it is served.

    It is an ASGI application.
    """

    def __init__(self) -> None:
        self.url = ""
        self.simulator = Simulator(api_key=API_KEY)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.simulator.app(scope, receive, send)


@dataclass
class GatewayFixture:
    """A running gateway and what surrounds it. `client` sends the token of the team `design`."""

    url: str
    client: httpx2.Client
    simulator: Simulator
    store: redis.Redis
    tracker: InFlightTracker
    metrics: Metrics

    def ask(self, content: bytes | str = b'[{"model":"Flux"}]', **headers: str) -> httpx2.Response:
        """An estimate, asked by `design` unless `headers` say otherwise (`x_api_key=…`)."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(PATH, content=content, headers={"content-type": "application/json", **named})

    def connect(self) -> socket.socket:
        """A bare connection to the gateway."""
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname or "", address.port or 0), timeout=5)

    def age(self, seconds: float) -> None:
        """Makes everything in the store older: prices, and the times in the account books."""
        for key in self.store.keys("ep1:*:price"):
            encoding, put_at, rest = self.store.get(key).decode().split(" ", 2)  # type: ignore[union-attr] # it is there
            self.store.set(key, f"{encoding} {int(put_at) - round(seconds * 1000)} {rest}", keepttl=True)
        for book in self.store.keys("ep1:book:*"):
            times = {n: int(v) for n, v in self.store.hgetall(book).items() if n.endswith(b"_at_ms")}  # type: ignore[arg-type] # bytes
            if times:
                self.store.hset(book, mapping={n: t - round(seconds * 1000) for n, t in times.items()})

    def raw(self, request: bytes) -> bytes:
        """Sends these bytes and returns what the gateway sends until it closes the connection."""
        with self.connect() as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))


OpenGateway = Callable[..., GatewayFixture]


def settings(store_url: str, upstream_url: str, **sections: dict[str, Any]) -> Settings:
    """Settings of three teams; `sections` are laid over them."""
    tree: dict[str, Any] = {
        "upstream": {"base_url": upstream_url, "timeout_s": 2.0},
        "accounts": {"default": {"api_key": API_KEY}, "second": {"api_key": "rn-second-key"}},
        "store": {"url": store_url, "data_dir": "/nonexistent"},
        "team_defaults": {"rate": PLENTY},
        "teams": {
            "design": {"tokens": [digest_of(DESIGN), {"sha256": digest_of(EXPIRED), "expires": "2026-01-31"}]},
            "marketing": {"tokens": [digest_of(MARKETING)]},
            "retired": {"tokens": [digest_of(RETIRED)], "disabled": True},
        },
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return Settings.model_validate(tree)


@contextmanager
def running_gateway(configured: Settings, store_url: str, simulator: Simulator) -> Iterator[GatewayFixture]:
    """Runs the gateway that `configured` describes."""
    tracker, metrics = InFlightTracker(), Metrics(configured.teams, configured.accounts)
    with (
        serving(build(configured, {}, tracker, metrics)) as url,
        httpx2.Client(
            base_url=url, trust_env=False, verify=NO_TLS, headers={"x-api-key": DESIGN}, timeout=10
        ) as client,
        redis.Redis.from_url(store_url) as store,
    ):
        yield GatewayFixture(url, client, simulator, store, tracker, metrics)


def break_off(connection: socket.socket) -> None:
    """Resets a connection. After a plain close the client could still read an answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def cache_status(response: httpx2.Response) -> str:
    """The value of `Cache-Status`. Asserts that it is a list of structured fields (RFC 9211 §2)."""
    value = response.headers["cache-status"]
    http_sf.parse(value.encode(), tltype="list")
    return value.removeprefix("estimate-proxy; ")


def code_of(response: httpx2.Response) -> str:
    """The code of a problem. Asserts that the document is well formed in both envelopes."""
    problem = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    assert problem["status"] == response.status_code
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["type"] == f"urn:estimate-proxy:problem:{problem['error']['code']}"
    assert problem["error"]["message"] == problem["detail"]
    assert problem["data"] is None
    return str(problem["error"]["code"])


def answers(body: bytes, status: int = 200, **headers: str) -> Responder:
    """For `Simulator.script`: exactly this answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: Response(body, status, named)
