"""An unreachable ledger with `on_outage = "refuse"`: the time a refusal takes, and the metrics."""

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from faulty_proxy import HEALTHY, Conditions, FaultyProxy
from lateness import assert_in_time
from ledger_fixture import BUSY, CREDIT, HIT, MISS, PLAIN, LedgerFixture, calls, cut, rows, run_scenario, used, word
from proxy.problems import Outcome, StoreUnavailable
from proxy.quota.ledger import Admitted, Denied
from proxy.store.client import TICK_S, TIMEOUT_S
from serving import free_port

SCHEDULING_S = 0.05
"""Tolerance for a busy machine, for the best of three measurements."""


@contextmanager
def stopped(server: redis.Redis) -> Iterator[None]:
    """Stops the server, so that it hangs."""
    pid = int(server.info("server")["process_id"])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def timed(asked: Coroutine[Any, Any, Admitted | Denied]) -> tuple[str, float]:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    return word(await asked), loop.time() - begun


def test_a_hanging_store_delays_only_the_first_requests_and_gets_no_call_twice(
    any_store_url: str, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest_s = 0.2
    monkeypatch.setattr("proxy.store.health.COOLDOWN_S", rest_s)

    async def scenario(fixture: LedgerFixture) -> None:
        admitted = await fixture.admitted()
        before, waits_s = calls(server), []
        with stopped(server):
            for _ in range(3):
                asked = [fixture.ledger.charge(PLAIN, HIT) for _ in range(5)]
                answers = await asyncio.gather(
                    *map(timed, [*asked, fixture.ledger.record_uncached(PLAIN, Outcome.NOT_CACHED)])
                )
                assert {result for result, _ in answers} == {"store-unavailable"}
                waits_s.append(max(waited_s for _, waited_s in answers))
                assert_in_time(
                    (await timed(fixture.ledger.admit(PLAIN)))[1], TIMEOUT_S, "It is left alone for a moment."
                )
                await asyncio.sleep(rest_s)
            assert word(await fixture.ledger.settle(admitted, MISS)) == "store-unavailable"
        assert_in_time(min(waits_s), TIMEOUT_S + 2 * TICK_S + SCHEDULING_S)
        assert fixture.metric("unanswered_debits_total") == 5, "later ones had no connection, so they were not sent"
        await fixture.until_back()
        assert calls(server) - before <= 2, "calls sent before it hung may have run now"

    run_scenario(any_store_url, scenario)
    assert used(server)[0] in (1, 6)
    assert rows(server)["-:cancelled:requests"] == 1


@pytest.mark.usefixtures("fast_recovery")
def test_a_store_that_refuses_connections_causes_no_delay(store_proxy: FaultyProxy, server: redis.Redis) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        if store_proxy.url == url:
            admitted = await fixture.admitted()
            await cut(store_proxy)
            assert word(await fixture.ledger.settle(admitted, MISS)) == "store-unavailable"
        before = calls(server)
        for asked in (fixture.ledger.charge(PLAIN, HIT), fixture.ledger.admit(PLAIN)):
            result, waited_s = await timed(asked)
            assert result == "store-unavailable"
            assert_in_time(waited_s, TIMEOUT_S)
        with pytest.raises(StoreUnavailable):
            await fixture.ledger.peek(PLAIN, 1)
        assert fixture.metric("unanswered_debits_total") == 0
        assert calls(server) == before

    for url in (store_proxy.url, f"redis://127.0.0.1:{free_port()}"):
        run_scenario(url, scenario)
    store_proxy.set_conditions(HEALTHY)
    assert rows(server) == {"-:cancelled:requests": 1}, "a request that ends without the ledger stays counted"


@pytest.mark.parametrize(
    "bad",
    [Conditions(swallows=b"EVALSHA"), Conditions(latency_s=TIMEOUT_S / 3, piece_bytes=1)],
    ids=["lost", "dripping"],
)
@pytest.mark.parametrize("admits", [False, True])
@pytest.mark.usefixtures("fast_recovery")
def test_a_debit_without_a_reply_is_refused_counted_and_not_repeated(
    store_proxy: FaultyProxy, server: redis.Redis, bad: Conditions, *, admits: bool
) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        admitted = await fixture.admitted()
        before = calls(server)
        store_proxy.set_conditions(bad)
        begins = fixture.ledger.charge(PLAIN, HIT), fixture.ledger.charge(PLAIN, HIT), fixture.ledger.admit(PLAIN)
        assert list(map(word, await asyncio.gather(*begins))) == ["store-unavailable"] * 3
        assert fixture.metric("unanswered_debits_total") == 3
        store_proxy.set_conditions(HEALTHY)
        await fixture.until_back()
        assert calls(server) - before == 2
        store_proxy.set_conditions(bad)
        assert word(await fixture.ledger.settle(admitted, MISS)) == "store-unavailable"
        assert fixture.metric("unanswered_debits_total") == 4
        assert fixture.metric("buffered_debits") == 0
        store_proxy.set_conditions(HEALTHY)
        await fixture.until_back()
        assert (await fixture.ledger.refund(await fixture.admitted(), *BUSY)).quota_state is not None
        assert calls(server) - before == 6

    run_scenario(store_proxy.url, scenario, admits=admits)
    assert used(server) == (4, 12 * CREDIT), "all was booked, once"
    assert rows(server)["-:cancelled:requests"] == 1


@pytest.mark.usefixtures("fast_recovery")
def test_a_connection_closed_during_a_debit_counts_as_a_lost_reply(
    store_proxy: FaultyProxy, server: redis.Redis
) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        admitted = await fixture.admitted()
        before = calls(server)
        store_proxy.set_conditions(Conditions(latency_s=60))
        refunded = asyncio.ensure_future(fixture.ledger.refund(admitted, *BUSY))
        await asyncio.sleep(0)  # it has its own task, and is sent with the next calls
        charged, left = (asyncio.ensure_future(fixture.ledger.charge(PLAIN, HIT)) for _ in range(2))
        await fixture.until(lambda: calls(server) == before + 1)
        left.cancel()
        await asyncio.to_thread(store_proxy.reset_connections)
        assert word(await charged) == "store-unavailable"
        assert (await refunded).quota_state is None
        assert fixture.metric("unanswered_debits_total") == 2, "cancelled requests count too, refunds do not"
        store_proxy.set_conditions(HEALTHY)
        await fixture.until_back()
        assert calls(server) - before == 2

    run_scenario(store_proxy.url, scenario, admits=True)
    assert used(server) == (2, 8 * CREDIT)
    assert rows(server)["-:upstream-busy:refused"] == 1
