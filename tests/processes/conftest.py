"""Fixtures of the tests that start several processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_fixture import UpstreamFixture
from processes import House, house
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
def home(tmp_path: Path, upstream: UpstreamFixture) -> Iterator[House]:
    """Starts gateways of one test, as processes."""
    with house(tmp_path, upstream.url) as opened:
        yield opened
