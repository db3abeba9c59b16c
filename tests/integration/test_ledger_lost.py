"""A ledger that is new, or lost: what is told of it, and how often."""

import asyncio
from time import time_ns

import pytest
import redis

from faulty_proxy import GOOD, Relay
from ledger_fixture import CREDIT, HIT, KEYS, PLAIN, Desk, opened, play, quota, terms, told, used
from proxy.quota.ledger import Admitted

NEW = ("WARNING", "a new ledger begins: usage and quotas count from zero")
LOST = ("ERROR", "the ledger was lost: usage and quotas count from zero")


def test_a_new_ledger_is_told_once(any_store_url: str, server: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    async def story(desk: Desk) -> None:
        created_s = desk.metric("ledger_created_timestamp_seconds")
        assert abs(created_s - time_ns() / 1e9) < 60
        assert created_s == int(server.hget(KEYS.id, "created_ms") or 0) / 1000
        await desk.ledger.charge(PLAIN, HIT)
        assert desk.metric("ledger_lost_total") == 0

    play(any_store_url, story)
    assert told(caplog) == [NEW]
    play(any_store_url, story)
    assert told(caplog) == []


def test_gateways_that_begin_together_raise_no_alarm(
    any_store_url: str, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def gateway() -> None:
        async with opened(any_store_url) as desk:
            await asyncio.gather(*(desk.ledger.charge(PLAIN, HIT) for _ in range(3)))
            assert desk.metric("ledger_lost_total") == 0

    async def story() -> None:
        await asyncio.gather(*(gateway() for _ in range(5)))

    asyncio.run(story())
    assert told(caplog) == [NEW]
    assert used(server)[0] == 15


def test_a_lost_ledger_is_an_error_once_for_each_gateway(
    any_store_url: str, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with opened(any_store_url) as one, opened(any_store_url) as other:
            for times in (1, 2):
                told(caplog)
                server.flushall()
                for desk in (one, other, one, other):
                    assert isinstance(await desk.ledger.charge(terms(quota(4)), HIT), Admitted)
                assert told(caplog) == [LOST, LOST]
                assert one.metric("ledger_lost_total") == other.metric("ledger_lost_total") == times
                created_s = one.metric("ledger_created_timestamp_seconds")
                assert created_s == int(server.hget(KEYS.id, "created_ms") or 0) / 1000

    asyncio.run(story())
    assert used(server) == (4, 16 * CREDIT)


@pytest.mark.usefixtures("server", "hurried")
def test_a_ledger_that_is_out_of_reach_at_first_is_no_lost_one(way: Relay, caplog: pytest.LogCaptureFixture) -> None:
    way.cut()

    async def story(desk: Desk) -> None:
        assert any("usage and quotas are unknown" in message for _, message in told(caplog))
        way.become(GOOD)
        await desk.until_back()
        assert desk.metric("ledger_lost_total") == 0
        assert NEW in told(caplog)

    play(way.url, story)
