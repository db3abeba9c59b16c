"""Fixtures for tests that need servers: a store, an upstream, a gateway on both.

The conftest.py of a folder imports those that its tests use. Each test finds an empty store and its own simulator.
"""

import os
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from faulty_proxy import FaultyProxy, proxy_to
from fleet import store_process
from gateway_fixture import API_KEY, GatewayFixture, OpenGateway, UpstreamFixture, running_gateway, settings
from programs import program
from proxy.upstream.http_client import _tls_context as make_tls_context
from scripted_simulator import Simulator
from serving import SERVER_POOL, serving, wait_until


@pytest.fixture(scope="session", autouse=True)
def close_servers() -> Iterator[None]:
    """Stops the servers in threads of this process after the last test."""
    yield
    SERVER_POOL.close()


@pytest.fixture(scope="session", autouse=True)
def quick_gateways() -> Iterator[None]:
    """Gateways in this process count an event in the next turn of their loop, and share TLS contexts.

    Making such a context takes longer than most tests.
    """
    contexts: dict[tuple[object, ...], ssl.SSLContext] = {}

    def tls_context(ca_file: Path | None) -> ssl.SSLContext:
        key = ca_file, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
        if key not in contexts:
            contexts[key] = make_tls_context(ca_file)
        return contexts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxy.telemetry.metrics.FLUSH_AFTER_S", 0)
        patch.setattr("proxy.upstream.http_client._tls_context", tls_context)
        yield


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """One Valkey for prices and ledger, as in a small installation; it does not evict, because of the ledger.

    It writes nothing to disk, so it is never late because the disk is.
    """
    with store_process(appendonly="no") as store:
        store.start()
        yield store.url


@contextmanager
def debian_redis() -> Iterator[str]:
    """The URL of a running redis-server from the machine's packages."""
    redis_server = program("redis-server", "nothing was tested on Redis 7.0")
    with tempfile.TemporaryDirectory(prefix="ep-redis-") as directory:
        path = Path(directory) / "redis.sock"
        command = [redis_server, "--port", "0", "--unixsocket", str(path), "--dir", directory, "--save", ""]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                with redis.Redis(unix_socket_path=str(path)) as client:
                    wait_until(lambda: _answers(client))
                yield f"unix://{path}"
            finally:
                process.terminate()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.fixture(scope="session", params=["valkey", "redis"])
def any_store_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on the embedded Valkey and on Debian's Redis."""
    if request.param == "valkey":
        yield request.getfixturevalue("valkey_url")
        return
    with debian_redis() as url:
        yield url


@pytest.fixture
def server(any_store_url: str) -> Iterator[redis.Redis]:
    """A client of the store, which is empty."""
    with redis.Redis.from_url(any_store_url) as client:
        client.flushall()
        client.config_resetstat()
        yield client


@pytest.fixture
def store_proxy(any_store_url: str) -> Iterator[FaultyProxy]:
    with proxy_to(any_store_url) as found:
        yield found


@pytest.fixture(scope="session")
def upstream() -> Iterator[UpstreamFixture]:
    fixture = UpstreamFixture()
    with serving(fixture) as fixture.url:
        yield fixture


@pytest.fixture
def simulator(upstream: UpstreamFixture) -> Simulator:
    upstream.simulator = Simulator(api_key=API_KEY, spend_every=0)
    return upstream.simulator


@pytest.fixture
def open_gateway(valkey_url: str, upstream: UpstreamFixture, simulator: Simulator) -> Iterator[OpenGateway]:
    """Opens gateways with the given sections of settings, and closes them after the test."""
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    with ExitStack() as opened:

        def enter(**sections: dict[str, Any]) -> GatewayFixture:
            configured = settings(valkey_url, upstream.url, **sections)
            gateway: AbstractContextManager[GatewayFixture] = running_gateway(configured, valkey_url, simulator)
            return opened.enter_context(gateway)

        yield enter


@pytest.fixture
def gateway(open_gateway: OpenGateway) -> GatewayFixture:
    return open_gateway()
