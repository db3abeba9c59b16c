"""Remote stores: TLS and passwords at 100 ms latency, and firewalls that drop idle connections."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from certificates import Certificates, make_certificates
from faulty_proxy import Conditions, FaultyProxy, proxy_to
from gateway_fixture import UpstreamFixture, running_gateway, settings
from lateness import LateError
from proxy.cli.direct import read_quotas
from proxy.settings.schema import Settings
from proxy.store.client import Script, Store
from proxy.store.connection_pool import HEALTH_CHECK_S, MIN_CONNECTIONS
from scripted_simulator import Simulator
from serving import wait_until
from topologies import LOCAL, Member, server_group

PUT = Script("proxy.cache", "price_purge")
PASSWORD = "pa:ss"
ROUND_TRIP_S = 0.1
LOAD_S = 1.5
FASTER = 2.5


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def guarded(certified: Certificates) -> Iterator[Member]:
    """Starts a Redis with TLS only, and a password."""
    with server_group("redis") as group:
        lines = (
            f"tls-cert-file {certified.cert('server')}",
            f"tls-key-file {certified.key('server')}",
            f"tls-ca-cert-file {certified.ca}",
            "tls-auth-clients no",
            f"requirepass {PASSWORD}",
        )
        server = group.member(*lines, ssl=True, ssl_ca_certs=str(certified.ca), password=PASSWORD)
        wait_until(server.answers)
        yield server


@pytest.fixture
def far(guarded: Member) -> Iterator[FaultyProxy]:
    guarded.client.flushall()
    with proxy_to(f"rediss://{LOCAL}:{guarded.port}") as store_proxy:
        store_proxy.set_conditions(Conditions(latency_s=ROUND_TRIP_S))
        yield store_proxy


@pytest.fixture
def configured(far: FaultyProxy, certified: Certificates, upstream: UpstreamFixture) -> Settings:
    store = {"url": far.url, "password": PASSWORD, "ca_file": str(certified.ca)}
    return settings(far.url, upstream.url, store=store)


def test_a_store_100_ms_away_with_tls_and_a_password(
    configured: Settings, simulator: Simulator, valkey_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Serves hits and misses from the first request on, one and eight at a time."""
    with running_gateway(configured, valkey_url, simulator) as gateway, ThreadPoolExecutor(8) as pool:
        assert gateway.ask().status_code == 200
        until = time.monotonic() + LOAD_S

        def send_requests(lane: int) -> Counter[str]:
            results: Counter[str] = Counter()
            while time.monotonic() < until:
                body = b'[{"model":"Flux","seed":%d}]' % (results.total() if lane % 2 else 0)
                answer = gateway.ask(body)
                results[f"{answer.status_code} {answer.headers.get('cache-status', answer.text)}"] += 1
            return results

        results = sum(pool.map(send_requests, range(8)), Counter[str]())
        priced = sum(count for text, count in results.items() if text.startswith("200 "))
        if priced < results.total():  # a call may take two and a half round trips, also when it sends the script first
            raise LateError(
                f"{results.total() - priced} of {results.total()} were not priced: {results}; {caplog.text}"
            )
        assert not any("bypass" in text for text in results), results
        assert results.total() > 13 * LOAD_S
        assert gateway.metrics.registry.get_sample_value("estimate_proxy_unanswered_debits_total") == 0


def test_the_command_line_reads_a_ledger_that_is_far_away(configured: Settings) -> None:
    states, _ = asyncio.run(read_quotas(configured, "design"))
    assert len(states) == 1


def test_a_longer_store_timeout_is_respected(far: FaultyProxy, configured: Settings) -> None:
    far.set_conditions(Conditions(latency_s=0.4))
    patient = configured.model_copy(
        update={"store": configured.store.model_copy(update={"timeout_s": 1.0, "connect_timeout_s": 4.0})}
    )
    states, _ = asyncio.run(read_quotas(patient, "design"))
    assert len(states) == 1


# Idle connections


def run_scenario(
    store_proxy: FaultyProxy, count: int, scenario: Callable[[list[Store]], Coroutine[object, object, None]]
) -> None:
    """Runs a scenario with `count` stores."""

    async def tell() -> None:
        stores = [Store(store_proxy.url, "ledger") for _ in range(count)]
        try:
            await asyncio.gather(*(store.open() for store in stores))
            await scenario(stores)
        finally:
            await asyncio.gather(*(store.close() for store in stores))

    asyncio.run(tell())


async def put(store: Store) -> None:
    await store.call(PUT, "ep1:{idle}:price", "ep1:{idle}:lease")


def test_keepalive_holds_connections_through_a_firewall_with_a_five_second_timeout(
    store_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an idle period, none of 100 calls is refused, and each gets an answer. All times are `FASTER`."""
    monkeypatch.setattr("proxy.store.client.HEALTH_CHECK_S", HEALTH_CHECK_S / FASTER)
    monkeypatch.setattr("proxy.store.topology.HEALTH_CHECK_S", HEALTH_CHECK_S / FASTER)

    async def scenario(stores: list[Store]) -> None:
        store_proxy.set_conditions(Conditions(patience_s=5 / FASTER))
        await asyncio.sleep(6 / FASTER)
        putting = []
        for _ in range(10):
            putting += [asyncio.create_task(put(store)) for store in stores]
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # one iteration of the event loop each, so each call uses its own connection
        await asyncio.gather(*putting)

    run_scenario(store_proxy, 10, scenario)


def test_dead_connections_are_replaced_before_a_call_needs_them(store_proxy: FaultyProxy) -> None:
    async def scenario(stores: list[Store]) -> None:
        (store,) = stores
        pool = store._topology.primaries()[0].pool
        before = list(pool._idle)
        store_proxy.drop_silently()
        async with asyncio.timeout(HEALTH_CHECK_S + 5):
            while len(pool._idle) < MIN_CONNECTIONS or any(one in before for one in pool._idle):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await put(store)

    run_scenario(store_proxy, 1, scenario)


def test_connections_use_tcp_keepalive(store_proxy: FaultyProxy) -> None:
    async def scenario(stores: list[Store]) -> None:
        connection = await stores[0]._topology.primaries()[0].pool.acquire()
        assert connection._writer is not None
        opened = connection._writer.get_extra_info("socket")
        assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 30
        await stores[0]._topology.primaries()[0].pool.release(connection)

    run_scenario(store_proxy, 1, scenario)
