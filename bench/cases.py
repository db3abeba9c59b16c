"""What is measured: who is asked, for what, and what has to be the answer for the number to count."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from bench.gateways import BROKE, HASTY
from bench.sites import Site
from bench.stage import Stage
from bench.traffic import UNKNOWN_TOKEN, Listed, Traffic, fresh, hot, token, zipf

ZIPF_BODIES = 10_000
ZIPF_TURNS = 100_000


@dataclass(frozen=True, slots=True)
class Expected:
    """status: of every answer. cache: what `Cache-Status` says in it. asks: whether each is asked of upstream."""

    status: int = 200
    cache: str = ""
    asks: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """warm: what is asked once, request by request, before each measurement. delay_ms: upstream's.

    least_s: it is measured for no shorter time.
    """

    name: str
    title: str
    site: Callable[[Stage], Site]
    traffic: Callable[[], Traffic]
    expected: Expected = field(default_factory=Expected)
    connections: int = 32
    delay_ms: int = 0
    least_s: float = 0.0
    warm: Callable[[], Listed] | None = None

    def at(self, name: str, **changes: Any) -> "Case":
        """The case with another name, and other things changed."""
        return replace(self, name=name, **changes)


DESIGN = token("design")
_HIT = Expected(cache="hit")
_MISS = Expected(cache="fwd=miss", asks=True)
_PASSED = Expected(asks=True)


@cache
def _zipf() -> Listed:
    return zipf(ZIPF_BODIES, ZIPF_TURNS)


def _hot() -> Listed:
    return hot(DESIGN)


CASES: tuple[Case, ...] = (
    Case("bare", "bare Starlette route", lambda stage: stage.starlette, _hot),
    Case("asgi", "bare ASGI application", lambda stage: stage.asgi, _hot),
    Case("peer", "nginx + Lua + Redis, hit", lambda stage: stage.peer, _hot, _HIT, warm=_hot),
    Case("hit", "hit, one hot body, quotas in two scopes", lambda stage: stage.full, _hot, _HIT, warm=_hot),
    Case("hit-logged", "hit, with its log line in a file", lambda stage: stage.logged, _hot, _HIT, warm=_hot),
    Case("hit-free", "hit, one hot body, no quotas", lambda stage: stage.without_quotas, _hot, _HIT, warm=_hot),
    Case("zipf", "hit, Zipf over 10,000 bodies, three teams", lambda stage: stage.full, _zipf, _HIT, warm=_zipf),
    Case("401", "refused: unknown token", lambda stage: stage.full, lambda: hot(UNKNOWN_TOKEN), Expected(401)),
    Case("402", "refused: quota", lambda stage: stage.full, lambda: hot(token(BROKE)), Expected(402), warm=_hot),
    Case("429", "refused: rate", lambda stage: stage.full, lambda: hot(token(HASTY)), Expected(429), warm=_hot),
    Case("miss", "miss, upstream at 0 ms", lambda stage: stage.full, lambda: fresh(DESIGN), _MISS),
    Case("miss-50", "miss, upstream at 50 ms", lambda stage: stage.full, lambda: fresh(DESIGN), _MISS, delay_ms=50),
    Case("forward", "bare httpx2 proxy route, 0 ms", lambda stage: stage.forward, lambda: fresh(DESIGN), _PASSED),
    Case("aiohttp", "bare aiohttp proxy route, 0 ms", lambda stage: stage.aiohttp, lambda: fresh(DESIGN), _PASSED),
    Case("nginx", "nginx proxy_pass, 0 ms", lambda stage: stage.nginx, lambda: fresh(DESIGN), _PASSED),
    Case("direct", "upstream itself, 0 ms", lambda stage: stage.upstream.site, _hot, _PASSED),
)
