"""The cases: the server, the requests, and the expected answers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from bench.gateways import BROKE, HASTY
from bench.servers import Servers
from bench.sites import Site
from bench.traffic import UNKNOWN_TOKEN, Listed, Traffic, fresh, hot, token, zipf

ZIPF_BODIES = 10_000
ZIPF_TURNS = 100_000


@dataclass(frozen=True, slots=True)
class Expected:
    """Status and `Cache-Status` of every answer, and whether each request causes an upstream call."""

    status: int = 200
    cache: str = ""
    calls_upstream: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """warm: requests that are sent once before each measurement. delay_ms: upstream's delay.

    least_s: minimum duration of a measurement.
    """

    name: str
    title: str
    site: Callable[[Servers], Site]
    traffic: Callable[[], Traffic]
    expected: Expected = field(default_factory=Expected)
    connections: int = 32
    delay_ms: int = 0
    least_s: float = 0.0
    warm: Callable[[], Listed] | None = None

    def at(self, name: str, **changes: Any) -> "Case":
        """Returns a copy with another name and other changes."""
        return replace(self, name=name, **changes)


DESIGN = token("design")
_HIT = Expected(cache="hit")
_MISS = Expected(cache="fwd=miss", calls_upstream=True)
_PASSED = Expected(calls_upstream=True)


@cache
def _zipf() -> Listed:
    return zipf(ZIPF_BODIES, ZIPF_TURNS)


def _hot() -> Listed:
    return hot(DESIGN)


CASES: tuple[Case, ...] = (
    Case("bare", "bare Starlette route", lambda servers: servers.starlette, _hot),
    Case("asgi", "bare ASGI application", lambda servers: servers.asgi, _hot),
    Case("peer", "nginx + Lua + Redis, hit", lambda servers: servers.peer, _hot, _HIT, warm=_hot),
    Case("hit", "hit, one hot body, quotas in two scopes", lambda servers: servers.full, _hot, _HIT, warm=_hot),
    Case("hit-logged", "hit, with its log line in a file", lambda servers: servers.logged, _hot, _HIT, warm=_hot),
    Case("hit-free", "hit, one hot body, no quotas", lambda servers: servers.without_quotas, _hot, _HIT, warm=_hot),
    Case("zipf", "hit, Zipf over 10,000 bodies, three teams", lambda servers: servers.full, _zipf, _HIT, warm=_zipf),
    Case("401", "refused: unknown token", lambda servers: servers.full, lambda: hot(UNKNOWN_TOKEN), Expected(401)),
    Case("402", "refused: quota", lambda servers: servers.full, lambda: hot(token(BROKE)), Expected(402), warm=_hot),
    Case("429", "refused: rate", lambda servers: servers.full, lambda: hot(token(HASTY)), Expected(429), warm=_hot),
    Case("miss", "miss, upstream at 0 ms", lambda servers: servers.full, lambda: fresh(DESIGN), _MISS),
    Case("miss-50", "miss, upstream at 50 ms", lambda servers: servers.full, lambda: fresh(DESIGN), _MISS, delay_ms=50),
    Case("forward", "bare httpx2 proxy route, 0 ms", lambda servers: servers.forward, lambda: fresh(DESIGN), _PASSED),
    Case("aiohttp", "bare aiohttp proxy route, 0 ms", lambda servers: servers.aiohttp, lambda: fresh(DESIGN), _PASSED),
    Case("nginx", "nginx proxy_pass, 0 ms", lambda servers: servers.nginx, lambda: fresh(DESIGN), _PASSED),
    Case("direct", "upstream itself, 0 ms", lambda servers: servers.upstream.site, _hot, _PASSED),
)
