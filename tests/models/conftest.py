"""Fixtures of the state machines."""

from collections.abc import Iterator

import pytest

from ledger_stage import World, open_world
from shared_fixtures import any_store_url, close_servers, immediate_metrics, upstream, valkey_url

__all__ = ["any_store_url", "close_servers", "immediate_metrics", "upstream", "valkey_url"]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, any_store_url: str) -> Iterator[World]:
    with open_world(any_store_url, monkeypatch) as opened:
        yield opened
