"""Fixtures of the integration tests: gateways in this process, and their ledgers, on real stores."""

import time
from collections.abc import Callable, Iterator

import pytest

from browser import browser, chromium
from gateway_fixture import DESIGN, PLENTY, GatewayFixture, OpenGateway
from gateway_process import Tree
from ledger_fixture import COOLDOWN_S, SkewedClock
from metrics_fixture import GUARD
from proxy.auth import digest_of
from quota_fixture import ADMIN, Limited, team
from serving import wait_until
from shared_fixtures import (
    any_store_url,
    close_servers,
    gateway,
    open_gateway,
    quick_gateways,
    server,
    simulator,
    store_proxy,
    upstream,
    valkey_url,
)
from topologies import BRANDS, Cluster, clusters

__all__ = [
    "any_store_url",
    "browser",
    "chromium",
    "close_servers",
    "gateway",
    "open_gateway",
    "quick_gateways",
    "server",
    "simulator",
    "store_proxy",
    "upstream",
    "valkey_url",
]


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables the process's memory: each request reads prices and books from the store."""
    monkeypatch.setattr("proxy.cache.memory.MAX_AGE_S", -1.0)
    monkeypatch.setattr("proxy.cache.account_book.BOOK_REREAD_S", -1.0)


@pytest.fixture
def cold_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learned is seen at once, instead of after a second."""
    monkeypatch.setattr("proxy.learning.snapshots.REREAD_S", -1.0)
    monkeypatch.setattr("proxy.learning.counts.FLUSH_AFTER_S", 0.0)


@pytest.fixture
def open_scraped_gateway(open_gateway: OpenGateway) -> OpenGateway:
    """Opens gateways with a metrics token."""

    def enter(**sections: Tree) -> GatewayFixture:
        return open_gateway(**{**GUARD, **sections})

    return enter


@pytest.fixture
def within_a_minute() -> None:
    """Waits until the next whole minute, where windows begin and end, is at least 5 seconds away."""
    wait_until(lambda: time.time() % 60 < 55)


@pytest.fixture
def limited(open_gateway: OpenGateway) -> Limited:
    """Opens a gateway whose team `design` has the given quotas; `ADMIN` is an operator's token."""

    def enter(*quotas: Tree, rate: Tree = PLENTY, teams: Tree | None = None, **sections: Tree) -> GatewayFixture:
        sections["teams"] = {"design": team(DESIGN, *quotas, rate=rate)} | (teams or {})
        return open_gateway(admin={"tokens": [digest_of(ADMIN)]}, **sections)

    return enter


@pytest.fixture
def fast_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the pauses after an outage short."""
    monkeypatch.setattr("proxy.store.health.COOLDOWN_S", COOLDOWN_S)
    monkeypatch.setattr("proxy.quota.ledger.FLUSH_EVERY_S", 0.02)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SkewedClock:
    skewed = SkewedClock()
    monkeypatch.setattr("proxy.quota.batches.time_ns", skewed)
    return skewed


@pytest.fixture(scope="module")
def new_cluster() -> Iterator[Callable[[str], Cluster]]:
    with clusters(BRANDS) as found:
        yield found


@pytest.fixture(scope="module", params=BRANDS)
def fleet(request: pytest.FixtureRequest, new_cluster: Callable[[str], Cluster]) -> Cluster:
    return new_cluster(request.param)
