"""Servers that tests share. Each test finds an empty store and a simulator of its own."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import redis
from starlette.types import Receive, Scope, Send

from configs import Problems, Read
from faulty_proxy import Relay, relay
from gateway_fixture import API_KEY, DESIGN, PLENTY, Scene, gateway, settings
from ledger_fixture import COOLDOWN_S, Skewed
from ledger_stage import World, open_world
from processes import Tree
from proxy.auth import digest_of
from proxy.demo.simulator import Simulator
from proxy.embedded.stores import EmbeddedStores
from quota_scenes import ADMIN, Limited, team
from serving import HOSTS, serving, wait_until
from watching import GUARD

# A busy machine is slow, not wrong: the suite as a whole has the time limit.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")

Opened = Callable[..., Scene]


class Stage:
    """The upstream server's application: whatever simulator is on."""

    def __init__(self) -> None:
        self.simulator = Simulator(api_key=API_KEY)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.simulator.app(scope, receive, send)


@pytest.fixture(scope="session", autouse=True)
def _hosts() -> Iterator[None]:
    yield
    HOSTS.close()


@pytest.fixture(scope="session", autouse=True)
def _counted_at_once() -> Iterator[None]:
    """Gateways in the tests' own process count what has happened in the next turn of their loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxy.telemetry.metrics.FLUSH_AFTER_S", 0)
        yield


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """One server for prices and ledger alike, as in a small installation: so it must not evict."""
    with tempfile.TemporaryDirectory() as directory:
        stores = EmbeddedStores(Path(directory), ["ledger"])
        stores.start()
        yield stores.urls["ledger"]
        stores.stop()


@contextmanager
def debian_redis() -> Iterator[str]:
    """The URL of a redis-server out of the machine's packages; skips where there is none, never on CI."""
    program = shutil.which("redis-server")
    if program is None:
        assert os.environ.get("CI") != "true", "redis-server is missing, and on CI nothing is skipped"
        pytest.skip("redis-server is not installed: the store was not tried on Redis 7.0")
    with tempfile.TemporaryDirectory(prefix="ep-redis-") as directory:
        path = Path(directory) / "redis.sock"
        command = [program, "--port", "0", "--unixsocket", str(path), "--dir", directory, "--save", ""]
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
    """One after the other: the Valkey that comes along, and Debian's Redis."""
    if request.param == "valkey":
        yield request.getfixturevalue("valkey_url")
        return
    with debian_redis() as url:
        yield url


@pytest.fixture(scope="session")
def upstream() -> Iterator[tuple[Stage, str]]:
    stage = Stage()
    with serving(stage) as url:
        yield stage, url


@pytest.fixture
def simulator(upstream: tuple[Stage, str]) -> Simulator:
    stage, _ = upstream
    stage.simulator = Simulator(api_key=API_KEY, spend_every=0)
    return stage.simulator


@pytest.fixture
def open_gateway(valkey_url: str, upstream: tuple[Stage, str], simulator: Simulator) -> Iterator[Opened]:
    """Opens gateways with the settings' sections given; each is closed behind the test."""
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    with ExitStack() as opened:

        def enter(**sections: dict[str, Any]) -> Scene:
            configured = settings(valkey_url, upstream[1], **sections)
            scene: AbstractContextManager[Scene] = gateway(configured, valkey_url, simulator)
            return opened.enter_context(scene)

        yield enter


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory of prices and books in the process: the store decides each time."""
    monkeypatch.setattr("proxy.cache.memory.MAX_AGE_S", -1.0)
    monkeypatch.setattr("proxy.cache.account_book.BOOK_REREAD_S", -1.0)


@pytest.fixture
def scene(open_gateway: Opened) -> Scene:
    return open_gateway()


@pytest.fixture
def watched(open_gateway: Opened) -> Opened:
    """Opens gateways that may be scraped."""

    def enter(**sections: Tree) -> Scene:
        return open_gateway(**{**GUARD, **sections})

    return enter


@pytest.fixture
def within_a_minute() -> None:
    """Windows begin and end at whole minutes: a test has some seconds without one."""
    wait_until(lambda: time.time() % 60 < 55)


@pytest.fixture
def limited(open_gateway: Opened) -> Limited:
    """Opens a gateway whose team `design` has these quotas; there is a token for its operator."""

    def enter(*quotas: Tree, rate: Tree = PLENTY, teams: Tree | None = None, **sections: Tree) -> Scene:
        sections["teams"] = {"design": team(DESIGN, *quotas, rate=rate)} | (teams or {})
        return open_gateway(admin={"tokens": [digest_of(ADMIN)]}, **sections)

    return enter


@pytest.fixture
def server(any_store_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(any_store_url) as client:
        client.flushall()
        client.config_resetstat()
        yield client


@pytest.fixture
def way(any_store_url: str) -> Iterator[Relay]:
    with relay(any_store_url) as found:
        yield found


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, any_store_url: str) -> Iterator[World]:
    with open_world(any_store_url, monkeypatch) as opened:
        yield opened


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an outage nobody waits for long."""
    monkeypatch.setattr("proxy.store.health.COOLDOWN_S", COOLDOWN_S)
    monkeypatch.setattr("proxy.quota.ledger.FLUSH_EVERY_S", 0.02)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Skewed:
    skewed = Skewed()
    monkeypatch.setattr("proxy.quota.batches.time_ns", skewed)
    return skewed


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return Read(tmp_path)


@pytest.fixture
def problems_of(read: Read) -> Problems:
    return Problems(read)
