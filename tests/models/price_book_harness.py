"""Two real gateways on one store and one upstream, for the state machine of the price book."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx2
import pytest
import redis
from starlette.applications import Starlette

import proxy.app
from gateway_fixture import API_KEY, DESIGN, UpstreamFixture, settings
from harness import Clock, use_clocked_scripts
from price_book_fleet import BALANCE_MAX_AGE_MS, IF_ERROR_MS, REVALIDATE_MS, TTL_MS
from price_book_requests import KEYS, content
from price_book_upstream import PROBE_MS, Body
from proxy.auth import digest_of, token_of
from proxy.cache.prices import Lookup
from proxy.gateway.audits import Auditor
from proxy.gateway.canonical_request import CanonicalRequest
from proxy.gateway.fetcher import Fetcher, FetchResult
from proxy.gateway.in_flight import InFlightTracker
from proxy.settings.schema import Settings
from proxy.telemetry.metrics import Metrics
from proxy.upstream.circuit_breaker import CircuitBreaker, Decision, Transition
from scripted_simulator import Simulator
from serving import NO_TLS, serving

ADMIN = token_of("a" * 32)

START_MS = 1_700_000_000_000


def wait_briefly_until(condition: Callable[[], bool]) -> None:
    """Like `wait_until`, with shorter pauses."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.0005)


class CountingFetcher(Fetcher):
    """Counts the requests that join or follow a fetch."""

    joined = 0
    followed = 0

    async def fetch(self, question: CanonicalRequest, lookup: Lookup | None) -> FetchResult:
        self.joined += 1
        return await super().fetch(question, lookup)

    async def _follow(self, question: CanonicalRequest, lookup: Lookup, deadline: float) -> FetchResult | None:
        self.followed += 1
        return await super()._follow(question, lookup, deadline)


class Replica:
    """One gateway of the fleet; it can be restarted."""

    fetcher: CountingFetcher
    auditor: Auditor

    def __init__(self, make: Callable[[], tuple[Starlette, Auditor]], client: httpx2.Client) -> None:
        self._make = make
        self._gateway = ExitStack()
        self.client = client

    def restart(self) -> None:
        """Replaces the gateway by a new one."""
        self.close()
        app, self.auditor = self._make()
        assert isinstance(self.auditor._fetcher, CountingFetcher)
        self.fetcher = self.auditor._fetcher
        self.client.base_url = self._gateway.enter_context(serving(app))

    def close(self) -> None:
        self._gateway.close()

    def wait_for_fetches(self, fetches: int) -> None:
        """Waits until this number of fetches is running."""
        wait_briefly_until(lambda: len(self.fetcher.running) + len(self.auditor._audits) == fetches)


class Harness:
    """The servers and the clock that all examples share."""

    def __init__(
        self,
        upstream: UpstreamFixture,
        store: redis.Redis,
        clock: Clock,
        replicas: list[Replica],
        pool: ThreadPoolExecutor,
    ) -> None:
        self.upstream = upstream
        self.store = store
        self.replicas = replicas
        self.pool = pool
        self._clock = clock
        self.keys: list[str] = []
        self.book_key = ""

    def reset(self) -> None:
        """Empties the store, and starts new gateways."""
        self.store.flushall()
        self.set_clock(START_MS)
        for replica in self.replicas:
            replica.restart()
        self.upstream.simulator = Simulator(api_key=API_KEY)

    def set_clock(self, ms: int) -> None:
        self._clock.set(ms * 1000)

    def learn_keys(self) -> None:
        """Learns the store keys of all requests, without a call of upstream."""
        self.reset()
        documents = (self.replicas[0].client.post("/v1/explain", content=content(Body(key, 0))) for key in range(KEYS))
        self.keys = [document.json()["key"] for document in documents]
        assert len(set(self.keys)) == KEYS
        (book,) = self.store.scan_iter("ep1:book:*")
        self.book_key = book.decode()

    def stored_prices(self) -> dict[int, bytes]:
        """Returns the stored prices."""
        prices: Any = self.store.mget([self.price_key(key) for key in range(KEYS)])
        return {key: price for key, price in enumerate(prices) if price is not None}

    def price_key(self, key: int) -> str:
        return f"ep1:{{{self.keys[key]}}}:price"


def _configured(store_url: str, upstream_url: str) -> Settings:
    return settings(
        store_url,
        upstream_url,
        admin={"tokens": [digest_of(ADMIN)]},
        cache={
            "ttl_s": TTL_MS / 1000,
            "stale_while_revalidate_s": REVALIDATE_MS / 1000,
            "stale_if_error_s": IF_ERROR_MS / 1000,
            "balance_max_age_s": BALANCE_MAX_AGE_MS / 1000,
            "ignore": ["seed"],
        },
        upstream={"base_url": upstream_url, "timeout_s": PROBE_MS / 1000},
        store={"url": store_url, "timeout_s": 10},
    )


def _clocked(clock: Clock) -> type[CircuitBreaker]:
    """Returns a circuit breaker that uses `clock` instead of the event loop's clock."""

    class ClockedCircuitBreaker(CircuitBreaker):
        def admit(self, _: float, *, probe_s: float) -> Decision:
            return super().admit(clock.time(), probe_s=probe_s)

        def wait_s(self, _: float) -> float:
            return super().wait_s(clock.time())

        def back_off(self, _: float, seconds: float) -> None:
            super().back_off(clock.time(), seconds)

        def record(self, _: float, *, failed: bool) -> Transition | None:
            return super().record(clock.time(), failed=failed)

        def open_s(self, _: float) -> float:
            return super().open_s(clock.time())

    return ClockedCircuitBreaker


@contextmanager
def open_harness(valkey_url: str, monkeypatch: pytest.MonkeyPatch, upstream: UpstreamFixture) -> Iterator[Harness]:
    """Gateways, circuit breakers and the store share one clock, so no timeout depends on how busy the machine is."""
    monkeypatch.setattr("proxy.gateway.audits.AUDIT_PAUSE_S", 0)
    auditors: list[Auditor] = []

    def recorded(*args: Any) -> Auditor:
        auditors.append(Auditor(*args))
        return auditors[-1]

    def make() -> tuple[Starlette, Auditor]:
        app = proxy.app.build(_configured(valkey_url, upstream.url), {}, InFlightTracker(), Metrics())
        return app, auditors.pop()

    monkeypatch.setattr("proxy.app.Fetcher", CountingFetcher)
    monkeypatch.setattr("proxy.app.Auditor", recorded)
    with ExitStack() as opened:
        store = opened.enter_context(redis.Redis.from_url(valkey_url))
        clock = Clock(store, START_MS * 1000)
        for module in ("account_book", "leases", "price_book"):
            monkeypatch.setattr(f"proxy.cache.{module}.monotonic", clock.time)
        monkeypatch.setattr("proxy.upstream.client.CircuitBreaker", _clocked(clock))
        use_clocked_scripts(monkeypatch)
        clients = [
            httpx2.Client(trust_env=False, verify=NO_TLS, headers={"x-api-key": DESIGN}, timeout=30) for _ in range(2)
        ]
        replicas = [Replica(make, opened.enter_context(client)) for client in clients]
        for replica in replicas:
            opened.callback(replica.close)
        pool = opened.enter_context(ThreadPoolExecutor(8))
        harness = Harness(upstream, store, clock, replicas, pool)
        harness.learn_keys()
        yield harness
