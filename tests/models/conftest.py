"""Fixtures of the state machines."""

from collections.abc import Iterator

import pytest

from coverage_pause import coverage_paused
from ledger_harness import Harness, open_harness
from shared_fixtures import any_store_url, close_servers, quick_gateways, upstream, valkey_url

__all__ = ["any_store_url", "close_servers", "coverage_paused", "quick_gateways", "upstream", "valkey_url"]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, any_store_url: str) -> Iterator[Harness]:
    with open_harness(any_store_url, monkeypatch) as opened:
        yield opened
