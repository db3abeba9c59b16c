"""Writes that the ledger's store refuses: memory full, a replica, an overflow. Nothing is written then."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from ledger_fixture import (
    CREDIT,
    DEAREST,
    HIT,
    KEYS,
    MISS,
    PLAIN,
    SLOW,
    ZONE,
    LedgerFixture,
    everything,
    run_scenario,
    terms,
    told,
    used,
    word,
)
from proxy.problems import Outcome
from proxy.quota.quotas import Charge
from proxy.quota.windows import window_of
from serving import free_port


@contextmanager
def full_of_memory(server: redis.Redis) -> Iterator[None]:
    names = ("maxmemory", "maxmemory-policy")
    before = [(name, server.config_get(name)[name] or "") for name in names]
    server.config_set("maxmemory-policy", "noeviction")
    server.config_set("maxmemory", "1")
    try:
        yield
    finally:
        for name, value in before:
            server.config_set(name, value)


@contextmanager
def replica(server: redis.Redis) -> Iterator[None]:
    server.replicaof("127.0.0.1", str(free_port()))
    try:
        yield
    finally:
        server.replicaof("NO", "ONE")


@pytest.mark.parametrize("trouble", [full_of_memory, replica])
def test_a_store_that_refuses_a_write_writes_nothing(
    any_store_url: str, server: redis.Redis, trouble: Callable[[redis.Redis], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        admitted = await fixture.admitted(SLOW)
        before = everything(server)
        told(caplog)
        with trouble(server):
            for _ in range(3):
                for asked in (
                    fixture.ledger.charge(SLOW, HIT),
                    fixture.ledger.admit(terms(team="film", rate=SLOW.rate)),
                ):
                    assert word(await asked) == "store-unavailable"
            assert everything(server) == before
        assert len(told(caplog)) == 1, "one log line, not one per request"
        assert word(await fixture.ledger.settle(admitted, MISS)) == "admitted"
        assert fixture.metric("unanswered_debits_total") == 0, "the outcome is known: nothing was booked"

    run_scenario(any_store_url, scenario)
    assert used(server) == (1, 4 * CREDIT)


@pytest.mark.parametrize("field", ["requests", "credits"])
def test_a_counter_that_would_overflow_refuses_before_any_write(
    any_store_url: str, server: redis.Redis, field: str
) -> None:
    month = KEYS.counter(None, "month", window_of("month", int(server.time()[0]), ZONE))

    async def scenario(fixture: LedgerFixture) -> None:
        await fixture.ledger.charge(SLOW, HIT)
        server.hset(month, field, 81 * 10**17)
        before = everything(server)
        for asked in (fixture.ledger.charge(SLOW, HIT), fixture.ledger.admit(terms(team="film", rate=SLOW.rate))):
            assert word(await asked) == "store-unavailable"
        assert everything(server) == before
        server.hset(month, "credits", 4 * 10**18 - DEAREST)
        server.hset(month, "requests", 1)
        before = everything(server)
        dear = Charge(Outcome.HIT, DEAREST, "Flux")
        words = list(map(word, await asyncio.gather(*(fixture.ledger.charge(SLOW, dear) for _ in range(2)))))
        assert words == ["store-unavailable"] * 2
        assert everything(server) == before
        assert word(await fixture.ledger.charge(SLOW, dear)) == "admitted"

    run_scenario(any_store_url, scenario)


@pytest.mark.usefixtures("fast_recovery")
def test_debits_that_a_read_only_store_refuses_are_buffered(any_store_url: str, server: redis.Redis) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        with replica(server):
            assert word(await fixture.ledger.charge(PLAIN, HIT)) == "admitted"
            assert used(server) == (0, 0)
        await fixture.until_paid()

    run_scenario(any_store_url, scenario, admits=True)
    assert used(server) == (1, 4 * CREDIT)
