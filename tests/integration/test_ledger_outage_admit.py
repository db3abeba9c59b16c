"""An unreachable ledger with `on_outage = "admit"`: buffered debits are booked once after the outage."""

import asyncio
from datetime import date, timedelta
from time import time_ns

import pytest
import redis

from faulty_proxy import HEALTHY, Conditions, FaultyProxy
from ledger_fixture import (
    BUSY,
    CREDIT,
    DAY_S,
    DEAREST,
    FAILED,
    HIT,
    KEYS,
    MISS,
    PLAIN,
    ZONE,
    LedgerFixture,
    SkewedClock,
    calls,
    cut,
    hashes,
    quota,
    rows,
    run_scenario,
    terms,
    told,
    used,
    word,
)
from proxy.problems import Outcome
from proxy.quota.ledger import Admitted
from proxy.quota.quotas import Charge
from proxy.quota.windows import day_of, start_of, window_of


@pytest.mark.usefixtures("fast_recovery")
def test_requests_admitted_in_an_outage_are_booked_once_after_it(store_proxy: FaultyProxy, server: redis.Redis) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        settled, failed, refunded, cancelled = [await fixture.admitted(terms(quota(4))) for _ in range(4)]
        await cut(store_proxy)
        for _ in range(3):
            admission = await fixture.ledger.charge(terms(quota(0)), HIT)
            assert isinstance(admission, Admitted)
            assert (admission.quota_state, admission.booked, admission.model) == (None, False, "other")
        unseen = await fixture.admitted()
        assert (unseen.quota_state, unseen.booked, unseen.model) == (None, False, "-")
        assert word(await fixture.ledger.record_uncached(PLAIN, Outcome.NOT_CACHED)) == "admitted"
        assert word(await fixture.ledger.settle(settled, MISS)) == "admitted"
        assert word(await fixture.ledger.settle(failed, FAILED)) == "admitted"
        assert word(await fixture.ledger.settle(cancelled, Charge(Outcome.CANCELLED))) == "admitted"
        assert (await fixture.ledger.refund(refunded, *BUSY)).quota_state is None
        assert (await fixture.ledger.refund(await fixture.admitted(), *BUSY)).quota_state is None
        assert fixture.metric("buffered_debits") == 5
        assert rows(server) == {"-:cancelled:requests": 4}
        store_proxy.set_conditions(HEALTHY)
        await fixture.until_paid()
        assert word(await fixture.ledger.settle(unseen, MISS)) == "admitted", "it is not booked yet"
        await fixture.until_paid()
        assert fixture.metric("unanswered_debits_total") == 0

    run_scenario(store_proxy.url, scenario, admits=True)
    assert rows(server) == {
        "Flux:hit:requests": 3,
        "Flux:hit:credits": 12 * CREDIT,
        "Flux:miss:requests": 2,
        "Flux:miss:credits": 8 * CREDIT,
        "-:upstream-error:requests": 1,
        "-:cancelled:requests": 1,
    }
    assert used(server) == used(server, None) == (7, 20 * CREDIT)


@pytest.mark.usefixtures("fast_recovery")
def test_requests_admitted_in_an_outage_are_booked_in_the_windows_of_their_admission(
    store_proxy: FaultyProxy, server: redis.Redis, clock: SkewedClock
) -> None:
    days: list[date] = []

    async def scenario(fixture: LedgerFixture) -> None:
        seen = await fixture.admitted()
        days.append(day_of(time_ns() // 10**9, ZONE))
        await cut(store_proxy)
        await fixture.ledger.charge(PLAIN, HIT)
        unseen = await fixture.admitted()
        clock.ahead_s = DAY_S
        await fixture.ledger.charge(PLAIN, Charge(Outcome.STALE, CREDIT, "Flux"))
        for admitted in (seen, unseen):
            assert word(await fixture.ledger.settle(admitted, MISS)) == "admitted"
        store_proxy.set_conditions(HEALTHY)
        await fixture.until_paid()

    run_scenario(store_proxy.url, scenario, admits=True)
    today, tomorrow = days[0], days[0] + timedelta(days=1)
    assert hashes(server, "u:*") == {
        KEYS.usage("design", today): {
            "Flux:hit:requests": 1,
            "Flux:hit:credits": 4 * CREDIT,
            "Flux:miss:requests": 2,
            "Flux:miss:credits": 8 * CREDIT,
        },
        KEYS.usage("design", tomorrow): {"Flux:stale:requests": 1, "Flux:stale:credits": CREDIT},
    }
    for team in ("design", None):
        days_of = {
            KEYS.counter(team, "day", window_of("day", start_of(day, ZONE), ZONE)): day for day in (today, tomorrow)
        }
        found = {days_of[name]: held for name, held in hashes(server, "q:*").items() if name in days_of}
        assert found == {
            today: {"requests": 3, "credits": 12 * CREDIT},
            tomorrow: {"requests": 1, "credits": CREDIT},
        }


@pytest.mark.usefixtures("fast_recovery")
def test_time_at_upstream_is_booked_after_an_outage(store_proxy: FaultyProxy, server: redis.Redis) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        admitted = [await fixture.admitted()]
        await cut(store_proxy)
        admitted.append(await fixture.admitted())
        for request in admitted:
            timed = Charge(Outcome.MISS, CREDIT, "Flux", upstream_us=70)
            assert word(await fixture.ledger.settle(request, timed)) == "admitted"
        store_proxy.set_conditions(HEALTHY)
        await fixture.until_paid()

    run_scenario(store_proxy.url, scenario, admits=True)
    assert [*hashes(server, "upstream:*").values()] == [{"calls": 2, "us": 140}]


@pytest.mark.usefixtures("fast_recovery")
def test_a_flush_without_a_reply_is_repeated_and_booked_once(store_proxy: FaultyProxy, server: redis.Redis) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        await cut(store_proxy)
        for _ in range(3):
            await fixture.ledger.charge(PLAIN, HIT)
        before = calls(server)
        store_proxy.set_conditions(Conditions(swallows=b"EVALSHA"))
        await asyncio.to_thread(store_proxy.swallowed.wait, 10)
        await fixture.until(lambda: calls(server) - before >= 2)
        assert fixture.metric("buffered_debits") == 3
        assert used(server) == (3, 12 * CREDIT)
        store_proxy.set_conditions(HEALTHY)
        await fixture.until_paid()
        assert used(server) == (3, 12 * CREDIT)
        assert len(server.keys("ep1:{acme}:flush:*")) == 1
        assert fixture.metric("unanswered_debits_total") == 0

    run_scenario(store_proxy.url, scenario, admits=True)
    (flush,) = server.keys("ep1:{acme}:flush:*")
    assert 23 * 3600 < server.ttl(flush) <= 86_400


def test_buffered_debits_are_booked_when_the_gateway_closes(
    store_proxy: FaultyProxy, server: redis.Redis, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.store.health.COOLDOWN_S", 0.0)
    monkeypatch.setattr("proxy.quota.ledger.FLUSH_EVERY_S", 3600)

    async def scenario(fixture: LedgerFixture) -> None:
        await cut(store_proxy)
        for _ in range(3):
            await fixture.ledger.charge(PLAIN, HIT)
        if comes_back:
            store_proxy.set_conditions(HEALTHY)

    for comes_back in (True, False):
        store_proxy.set_conditions(HEALTHY)
        told(caplog)
        run_scenario(store_proxy.url, scenario, admits=True, drain_s=5 if comes_back else 0.3)
        lost = ("ERROR", "the debits of 3 requests are lost: the ledger stayed out of reach")
        assert (lost in told(caplog)) == (not comes_back)
    assert used(server) == (3, 12 * CREDIT)


@pytest.mark.usefixtures("fast_recovery")
def test_a_full_backlog_refuses(store_proxy: FaultyProxy, server: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.quota.ledger.MAX_BACKLOG_ROWS", 2)
    monkeypatch.setattr("proxy.quota.ledger.FLUSH_EVERY_S", 0.5)  # no flush is tried before the backlog is full

    async def scenario(fixture: LedgerFixture) -> None:
        seen, other_seen = await fixture.admitted(), await fixture.admitted()
        await cut(store_proxy)
        assert word(await fixture.ledger.charge(PLAIN, HIT)) == "admitted"
        unseen = await fixture.admitted()
        assert word(await fixture.ledger.charge(terms(team="film"), HIT)) == "admitted"
        for asked in (
            fixture.ledger.charge(PLAIN, MISS),
            fixture.ledger.admit(PLAIN),
            fixture.ledger.settle(unseen, MISS),
        ):
            assert word(await asked) == "store-unavailable"
        assert word(await fixture.ledger.settle(seen, MISS)) == "store-unavailable"
        assert (await fixture.ledger.refund(other_seen, *BUSY)).quota_state is None
        assert word(await fixture.ledger.charge(PLAIN, HIT)) == "admitted", "it is added to an existing sum"
        assert fixture.metric("buffered_debits") == 3
        store_proxy.set_conditions(HEALTHY)
        await fixture.until_paid()
        await fixture.admitted()

    run_scenario(store_proxy.url, scenario, admits=True)
    assert rows(server) == {"Flux:hit:requests": 2, "Flux:hit:credits": 8 * CREDIT, "-:cancelled:requests": 3}
    assert used(server) == (5, 8 * CREDIT)
    assert used(server, None) == (6, 12 * CREDIT)


@pytest.mark.usefixtures("fast_recovery")
def test_a_settlement_that_does_not_fit_the_backlog_leaves_its_request_pending(
    store_proxy: FaultyProxy, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would need two buffered debits: a refund of the admission, and the charge."""
    monkeypatch.setattr("proxy.quota.ledger.MAX_BACKLOG_ROWS", 1)

    async def scenario(fixture: LedgerFixture) -> None:
        first, second = await fixture.admitted(), await fixture.admitted()
        await cut(store_proxy)
        assert word(await fixture.ledger.settle(first, MISS)) == "store-unavailable"
        assert word(await fixture.ledger.settle(second, Charge(Outcome.CANCELLED))) == "admitted"
        store_proxy.set_conditions(HEALTHY)
        await fixture.until_paid()

    run_scenario(store_proxy.url, scenario, admits=True)
    assert rows(server) == {"-:cancelled:requests": 2}
    assert used(server) == (2, 0)


@pytest.mark.usefixtures("fast_recovery")
def test_buffered_debits_stay_exact(store_proxy: FaultyProxy, server: redis.Redis) -> None:
    """Together they exceed 2**53, where Lua's numbers are not exact any more, so several calls book them."""

    async def scenario(fixture: LedgerFixture) -> None:
        await cut(store_proxy)
        dear = Charge(Outcome.HIT, DEAREST - 1, "Flux")
        await asyncio.gather(*(fixture.ledger.charge(PLAIN, dear) for _ in range(9101)))
        store_proxy.set_conditions(HEALTHY)
        await fixture.until_paid()

    run_scenario(store_proxy.url, scenario, admits=True)
    total = 9101 * (DEAREST - 1)
    assert used(server) == (9101, total)
    assert int(float(total)) != total


def test_a_settlement_outlives_its_request(store_proxy: FaultyProxy, server: redis.Redis) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        admitted, refunded = await fixture.admitted(), await fixture.admitted()
        store_proxy.set_conditions(Conditions(latency_s=0.05))
        tasks = [
            asyncio.ensure_future(fixture.ledger.settle(admitted, MISS)),
            asyncio.ensure_future(fixture.ledger.refund(refunded, *BUSY)),
        ]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)

    run_scenario(store_proxy.url, scenario)
    assert rows(server) == {"Flux:miss:requests": 1, "Flux:miss:credits": 4 * CREDIT, "-:upstream-busy:refused": 1}
    assert used(server) == (1, 4 * CREDIT)
