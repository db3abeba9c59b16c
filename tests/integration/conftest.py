"""Fixtures of the integration tests: gateways in this process, and their ledgers, on real stores."""

import time

import pytest

from gateway_fixture import DESIGN, PLENTY, Opened, Scene
from ledger_fixture import COOLDOWN_S, Skewed
from processes import Tree
from proxy.auth import digest_of
from quota_scenes import ADMIN, Limited, team
from serving import wait_until
from shared_fixtures import (
    any_store_url,
    close_servers,
    immediate_metrics,
    open_gateway,
    scene,
    server,
    simulator,
    upstream,
    valkey_url,
    way,
)
from watching import GUARD

__all__ = [
    "any_store_url",
    "close_servers",
    "immediate_metrics",
    "open_gateway",
    "scene",
    "server",
    "simulator",
    "upstream",
    "valkey_url",
    "way",
]


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process keeps no prices or books in memory: it reads the store for each request."""
    monkeypatch.setattr("proxy.cache.memory.MAX_AGE_S", -1.0)
    monkeypatch.setattr("proxy.cache.account_book.BOOK_REREAD_S", -1.0)


@pytest.fixture
def watched(open_gateway: Opened) -> Opened:
    """Opens gateways that may be scraped."""

    def enter(**sections: Tree) -> Scene:
        return open_gateway(**{**GUARD, **sections})

    return enter


@pytest.fixture
def within_a_minute() -> None:
    """Starts the test at least 5 seconds before the next whole minute, when windows begin and end."""
    wait_until(lambda: time.time() % 60 < 55)


@pytest.fixture
def limited(open_gateway: Opened) -> Limited:
    """Opens a gateway whose team `design` has the given quotas; `ADMIN` is an operator's token."""

    def enter(*quotas: Tree, rate: Tree = PLENTY, teams: Tree | None = None, **sections: Tree) -> Scene:
        sections["teams"] = {"design": team(DESIGN, *quotas, rate=rate)} | (teams or {})
        return open_gateway(admin={"tokens": [digest_of(ADMIN)]}, **sections)

    return enter


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses after an outage."""
    monkeypatch.setattr("proxy.store.health.COOLDOWN_S", COOLDOWN_S)
    monkeypatch.setattr("proxy.quota.ledger.FLUSH_EVERY_S", 0.02)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Skewed:
    skewed = Skewed()
    monkeypatch.setattr("proxy.quota.batches.time_ns", skewed)
    return skewed
