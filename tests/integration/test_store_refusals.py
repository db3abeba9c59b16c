"""A store that refuses writes counts as down in estimates, readiness, gauge and log, until it recovers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import redis

from gateway_fixture import GatewayFixture, UpstreamFixture, code_of, running_gateway, settings
from scripted_simulator import Simulator
from serving import free_port, wait_until
from topologies import LOCAL, Member, server_group

Refusal = Callable[[Member], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def _frequent_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes checks of a down store frequent."""
    monkeypatch.setattr("proxy.store.client.WRITE_CHECK_AFTER_S", 0.3)
    monkeypatch.setattr("proxy.store.client.HEALTH_CHECK_S", 0.1)


@pytest.fixture(scope="module", params=["valkey", "redis"])
def member(request: pytest.FixtureRequest) -> Iterator[Member]:
    with server_group(request.param) as group:
        member = group.member()
        wait_until(member.answers)
        yield member


@contextmanager
def configured(member: Member, **values: str) -> Iterator[None]:
    """Changes settings of the server for a while."""
    before = {name: str(member.client.config_get(name)[name]) for name in values}
    for name, value in values.items():
        member.client.config_set(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            member.client.config_set(name, value)


@contextmanager
def full(member: Member) -> Iterator[None]:
    with configured(member, **{"maxmemory-policy": "noeviction", "maxmemory": "1"}):
        yield


@contextmanager
def without_replicas(member: Member) -> Iterator[None]:
    with configured(member, **{"min-replicas-to-write": "1"}):
        yield


@contextmanager
def replica(member: Member) -> Iterator[None]:
    member.client.replicaof(LOCAL, str(free_port()))
    try:
        yield
    finally:
        member.client.replicaof("NO", "ONE")


@contextmanager
def without_a_disk(member: Member) -> Iterator[None]:
    """Makes snapshots fail: a folder has the name of the file."""
    obstacle = member.folder / "dump.rdb"
    with configured(member, save="3600 1"):
        obstacle.mkdir()
        saved(member, "err")
        try:
            yield
        finally:
            obstacle.rmdir()
            saved(member, "ok")
    obstacle.unlink()


def saved(member: Member, status: str) -> None:
    member.client.bgsave()
    wait_until(lambda: not member.info("persistence", "rdb_bgsave_in_progress"))
    assert member.info("persistence", "rdb_last_bgsave_status") == status


def denied(*rules: str) -> Refusal:
    @contextmanager
    def deny(member: Member) -> Iterator[None]:
        member.ask("ACL", "SETUSER", "default", *rules)
        try:
            yield
        finally:
            member.ask("ACL", "SETUSER", "default", "allkeys", "+@all")

    return deny


KEYS, CALLS, INSIDE = denied("resetkeys", "~other:*"), denied("-evalsha"), denied("-hincrby")

REFUSALS: dict[str, tuple[Refusal, str, str]] = {
    "full": (full, "writing fails: OOM command not allowed", ": raise maxmemory"),
    "replica": (replica, "writing fails: READONLY You can't write", ": check that the URL leads to the primary"),
    "without replicas": (without_replicas, "writing fails: NOREPLICAS Not enough", ": restore its replicas"),
    "without a disk": (without_a_disk, "writing fails: MISCONF ", "persist to disk: check the server's log"),
    "keys denied": (KEYS, "ledger_decide fails: NOPERM ", ": allow this user the scripts and keys"),
    "calls denied": (CALLS, "ledger_decide fails: NOPERM ", ": allow this user the scripts and keys"),
}


@pytest.fixture
def gateway(member: Member, upstream: UpstreamFixture, simulator: Simulator) -> Iterator[GatewayFixture]:
    member.client.flushall()
    url = f"redis://{LOCAL}:{member.port}"
    with running_gateway(settings(url, upstream.url), url, simulator) as opened:
        assert opened.ask().status_code == 200
        assert (degraded(opened), is_up(opened)) == ([], True)
        yield opened


def degraded(gateway: GatewayFixture) -> list[str]:
    return list(gateway.client.get("/readyz").json()["degraded"])


def is_up(gateway: GatewayFixture) -> bool:
    value = gateway.metrics.registry.get_sample_value("estimate_proxy_store_up", {"role": "ledger"})
    assert value is not None
    return bool(value)


def assert_refused(gateway: GatewayFixture) -> None:
    for _ in range(5):
        assert code_of(gateway.ask()) == "store-unavailable"
    assert "ledger" in degraded(gateway)
    assert not is_up(gateway)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_ledger_that_refuses_writes_is_down_until_it_recovers_even_without_requests(
    gateway: GatewayFixture, member: Member, refusal: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "proxy.store.health")
    refuses, reason, remedy = REFUSALS[refusal]
    with refuses(member):
        assert_refused(gateway)
        (message,) = (message for message in caplog.messages if message.startswith("the ledger's "))
        assert message.startswith(f"the ledger's {reason}")
        assert remedy in message
    wait_until(lambda: is_up(gateway) and not degraded(gateway))
    assert gateway.ask().status_code == 200
    assert len([message for message in caplog.messages if message.startswith("the ledger's ")]) == 2


def test_a_right_that_only_a_script_needs_is_noticed_by_the_script(
    gateway: GatewayFixture, member: Member, caplog: pytest.LogCaptureFixture
) -> None:
    with INSIDE(member):
        assert_refused(gateway)
        (message,) = (message for message in caplog.messages if message.startswith("the ledger's "))
        assert message.startswith("the ledger's ledger_decide fails: ")
        assert ": allow this user the scripts and keys" in message
    assert gateway.ask().status_code == 200
    assert (degraded(gateway), is_up(gateway)) == ([], True)


def test_a_price_book_that_refuses_writes_serves_its_stored_prices(
    member: Member, valkey_url: str, upstream: UpstreamFixture, simulator: Simulator
) -> None:
    member.client.flushall()
    redis.Redis.from_url(valkey_url).flushall()
    book = {"url": f"redis://{LOCAL}:{member.port}"}
    with running_gateway(settings(valkey_url, upstream.url, cache=book), valkey_url, simulator) as gateway:
        assert gateway.ask().status_code == 200
        with full(member):
            assert (
                gateway.ask(b'[{"model":"new"}]').headers["cache-status"] == "estimate-proxy; fwd=miss; fwd-status=200"
            )
            assert "; hit; " in gateway.ask().headers["cache-status"]
            assert degraded(gateway) == ["price-book"]
            assert is_up(gateway)
        wait_until(lambda: not degraded(gateway))
