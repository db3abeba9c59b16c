"""Store connections that were lost while they were idle."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
import redis

from faulty_proxy import FaultyProxy
from proxy.problems import StoreOutcomeUnknown, StoreUnavailable
from proxy.store.client import COOLDOWN_S, Script, Store

PUT, LOOK = Script("proxy.cache", "price_purge"), Script("proxy.cache", "price_get", repeatable=True)
CONNECTIONS = 5


@pytest.fixture
def server(any_store_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(any_store_url) as client:
        yield client


def run_scenario(store_proxy: FaultyProxy, scenario: Callable[[Store], Awaitable[None]]) -> None:
    async def played() -> None:
        store = Store(store_proxy.url, "ledger")
        try:
            await scenario(store)
        finally:
            await store.close()

    asyncio.run(played())


async def put(store: Store) -> None:
    await store.call(PUT, "ep1:{idle}:price", "ep1:{idle}:lease")


async def spread(store: Store) -> None:
    """Opens several connections, and leaves them idle."""
    putting = []
    for _ in range(CONNECTIONS):
        putting.append(asyncio.create_task(put(store)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # one iteration of the event loop each, so the calls are not sent together
    await asyncio.gather(*putting)


def calls(server: redis.Redis) -> int:
    return int(server.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))


def test_a_connection_that_was_reset_fails_no_call(store_proxy: FaultyProxy, server: redis.Redis) -> None:
    async def scenario(store: Store) -> None:
        await spread(store)
        before = calls(server)
        await asyncio.to_thread(store_proxy.reset_connections)
        await asyncio.sleep(0.05)  # the event loop handles the reset first
        await put(store)
        assert calls(server) == before + 1

    run_scenario(store_proxy, scenario)


def test_of_several_dead_connections_only_the_first_fails_a_debit(
    store_proxy: FaultyProxy, server: redis.Redis
) -> None:
    async def scenario(store: Store) -> None:
        await spread(store)
        before = calls(server)
        store_proxy.drop_silently()
        with pytest.raises(StoreOutcomeUnknown):
            await put(store)
        with pytest.raises(StoreUnavailable, match="cool-down"):
            await put(store)
        await asyncio.sleep(COOLDOWN_S)
        await spread(store)
        assert calls(server) == before + CONNECTIONS

    run_scenario(store_proxy, scenario)


def test_reads_are_answered_although_all_connections_are_dead(store_proxy: FaultyProxy) -> None:
    async def scenario(store: Store) -> None:
        await spread(store)
        store_proxy.drop_silently()
        assert (await store.call(LOOK, "ep1:{idle}:price"))[0] is None

    run_scenario(store_proxy, scenario)
