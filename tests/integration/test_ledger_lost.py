"""Log lines and metrics about a new or lost ledger."""

import asyncio
from time import time_ns

import pytest
import redis

from faulty_proxy import HEALTHY, FaultyProxy
from ledger_fixture import CREDIT, HIT, KEYS, PLAIN, LedgerFixture, opened, quota, run_scenario, terms, told, used
from proxy.quota.ledger import Admitted

NEW = ("WARNING", "a new ledger begins: usage and quotas count from zero")
LOST = ("ERROR", "the ledger was lost: usage and quotas count from zero")


def test_a_new_ledger_is_logged_once(any_store_url: str, server: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        created_s = fixture.metric("ledger_created_timestamp_seconds")
        assert abs(created_s - time_ns() / 1e9) < 60
        assert created_s == int(server.hget(KEYS.id, "created_ms") or 0) / 1000
        await fixture.ledger.charge(PLAIN, HIT)
        assert fixture.metric("ledger_lost_total") == 0

    run_scenario(any_store_url, scenario)
    assert told(caplog) == [NEW]
    run_scenario(any_store_url, scenario)
    assert told(caplog) == []


def test_gateways_that_start_together_report_no_loss(
    any_store_url: str, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def gateway() -> None:
        async with opened(any_store_url) as fixture:
            await asyncio.gather(*(fixture.ledger.charge(PLAIN, HIT) for _ in range(3)))
            assert fixture.metric("ledger_lost_total") == 0

    async def scenario() -> None:
        await asyncio.gather(*(gateway() for _ in range(5)))

    asyncio.run(scenario())
    assert told(caplog) == [NEW]
    assert used(server)[0] == 15


def test_each_gateway_logs_a_lost_ledger_once_as_an_error(
    any_store_url: str, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with opened(any_store_url) as one, opened(any_store_url) as other:
            for times in (1, 2):
                told(caplog)
                server.flushall()
                for fixture in (one, other, one, other):
                    assert isinstance(await fixture.ledger.charge(terms(quota(4)), HIT), Admitted)
                assert told(caplog) == [LOST, LOST]
                assert one.metric("ledger_lost_total") == other.metric("ledger_lost_total") == times
                created_s = one.metric("ledger_created_timestamp_seconds")
                assert created_s == int(server.hget(KEYS.id, "created_ms") or 0) / 1000

    asyncio.run(scenario())
    assert used(server) == (4, 16 * CREDIT)


@pytest.mark.usefixtures("server", "fast_recovery")
def test_a_ledger_that_is_unreachable_at_the_start_is_not_lost(
    store_proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    store_proxy.cut()

    async def scenario(fixture: LedgerFixture) -> None:
        assert any("usage and quotas are unknown" in message for _, message in told(caplog))
        store_proxy.set_conditions(HEALTHY)
        await fixture.until_back()
        assert fixture.metric("ledger_lost_total") == 0
        assert NEW in told(caplog)

    run_scenario(store_proxy.url, scenario)
