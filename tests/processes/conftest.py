"""Fixtures of the tests that start gateways as processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import empty_environment, run
from coverage_pause import coverage_paused
from gateway_fixture import UpstreamFixture
from gateway_process import GatewayRunner, gateway_runner
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

__all__ = [
    "any_store_url",
    "close_servers",
    "coverage_paused",
    "empty_environment",
    "gateway",
    "open_gateway",
    "quick_gateways",
    "run",
    "server",
    "simulator",
    "store_proxy",
    "upstream",
    "valkey_url",
]


@pytest.fixture
def runner(tmp_path: Path, upstream: UpstreamFixture) -> Iterator[GatewayRunner]:
    """Starts the gateways of one test as processes."""
    with gateway_runner(tmp_path, upstream.url) as opened:
        yield opened
