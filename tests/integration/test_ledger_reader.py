"""The ledger's reports on usage, quotas and windows, on Valkey and on Redis 7.0."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis

from ledger_fixture import BUSY
from proxy.problems import Outcome, StoreUnavailable
from proxy.quota import ledger_reader as module
from proxy.quota.batches import LedgerBatcher
from proxy.quota.counters import BASE_PERIODS, LedgerKeys
from proxy.quota.ledger import Admitted, Denied, Ledger
from proxy.quota.ledger_reader import CHUNK, CounterValue, LedgerReader
from proxy.quota.quotas import Charge, Measure, Quota, Rate, Scope, TeamLimits
from proxy.quota.report_queries import UsageQuery
from proxy.quota.windows import Period, window_of
from proxy.store.client import Store
from proxy.telemetry.metrics import Metrics
from serving import free_port

ZONE = ZoneInfo("Europe/Berlin")
KEYS = LedgerKeys("acme")
HUGE = 2**53 + 1
"""A double would round this number."""

RunScenario = Callable[[Callable[[LedgerReader], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def run_scenario(any_store_url: str) -> RunScenario:
    """Runs a scenario with a `LedgerReader`, and closes its store."""

    def run(scenario: Callable[[LedgerReader], Coroutine[Any, Any, None]]) -> None:
        async def with_store() -> None:
            store = Store(any_store_url, "ledger")
            try:
                await scenario(LedgerReader(store, KEYS, ZONE))
            finally:
                await store.close()

        asyncio.run(with_store())

    return run


def calls(server: redis.Redis, command: str) -> int:
    """Returns how often the server has run a command since the test began."""
    return int(server.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


def keep(server: redis.Redis, day: date, team: str, **fields: int) -> None:
    """Writes usage like the ledger; `Flux__hit__credits` is `Flux:hit:credits`, and a leading `none` is `-`."""
    named: dict[Any, Any] = {
        name.replace("__", ":").replace("none", "-").replace("_", "-"): amount for name, amount in fields.items()
    }
    server.hset(KEYS.usage(team, day), mapping=named)
    server.sadd(KEYS.teams, team)


def quota(scope: Scope, measure: Measure, per: Period, limit: int = 10**9) -> Quota:
    return Quota(scope, measure, per, limit, refuse=True)


def usage_query(first: date, last: date, *by: Any, team: str | None = None) -> UsageQuery:
    return UsageQuery(first, last, by, team, csv=False)


NOVEMBER_1 = date(2026, 11, 1)


# --- Usage -----------------------------------------------------------------------------------------------------------


def test_usage_of_teams_and_days(server: redis.Redis, run_scenario: RunScenario) -> None:
    day = timedelta(days=1)
    keep(server, NOVEMBER_1 - day, "design", Flux__hit__requests=100)
    keep(server, NOVEMBER_1, "design", Flux__hit__requests=3, Flux__hit__credits=HUGE, none__cancelled__requests=0)
    keep(server, NOVEMBER_1 + day, "removed", none__rate_limited__refused=2)
    keep(server, NOVEMBER_1 + 2 * day, "design", Flux__hit__requests=100)
    server.hset(LedgerKeys("other").usage("design", NOVEMBER_1), "Flux:hit:requests", 100)

    async def scenario(reports: LedgerReader) -> None:
        assert await reports.teams() == {"design", "removed"}
        usage = await reports.usage(usage_query(NOVEMBER_1, NOVEMBER_1 + day, "team"))
        assert [(row.group, row.requests, row.refused, row.credits_micro) for row in usage.rows] == [
            (("design",), 3, 0, HUGE),
            (("removed",), 0, 2, 0),
        ], "a team that was removed from the settings is still listed"
        assert usage.total.outcomes == {"hit": 3, "rate-limited": 2}
        own = await reports.usage(usage_query(NOVEMBER_1, NOVEMBER_1 + day, "day", "model", team="design"))
        assert [row.group for row in own.rows] == [("2026-11-01", "Flux")]
        assert own.total.credits_micro == HUGE

    run_scenario(scenario)


def test_usage_without_any_booking_is_empty(server: redis.Redis, run_scenario: RunScenario) -> None:
    assert server.dbsize() == 0

    async def scenario(reports: LedgerReader) -> None:
        assert await reports.teams() == frozenset()
        for team in (None, "nobody"):
            usage = await reports.usage(usage_query(NOVEMBER_1, NOVEMBER_1, "day", team=team))
            assert usage.rows == ()

    run_scenario(scenario)


def test_a_year_of_usage_is_read_in_parts(server: redis.Redis, run_scenario: RunScenario) -> None:
    days = [NOVEMBER_1 - timedelta(days=number) for number in range(400)]
    for number, day in enumerate(days):
        keep(server, day, "design", Flux__hit__requests=1, Flux__hit__credits=number)

    async def scenario(reports: LedgerReader) -> None:
        usage = await reports.usage(usage_query(days[-1], days[0], "day", team="design"))
        assert [row.group[0] for row in usage.rows] == [str(day) for day in reversed(days)]
        assert usage.total.credits_micro == sum(range(400))

    run_scenario(scenario)
    assert calls(server, "evalsha") in (400 // CHUNK, 400 // CHUNK + 1), "one more if the script was not loaded yet"
    assert calls(server, "hgetall") == 400


# --- Quotas and windows ----------------------------------------------------------------------------------------------


def now_s(server: redis.Redis) -> int:
    return int(server.time()[0])


def count(server: redis.Redis, team: str | None, per: Period, requests: int = 0, **credit: int) -> None:
    """Writes a counter of the current window; without credits it has no such field."""
    key = KEYS.counter(team, per, window_of(per, now_s(server), ZONE))
    for field, amount in ({"requests": requests} | credit).items():
        server.hset(key, field, amount)


def test_quota_states_of_teams(server: redis.Redis, run_scenario: RunScenario) -> None:
    credits_month, requests_week = quota("team", "estimated_credits", "month"), quota("team", "requests", "week")
    org_day = quota("org", "requests", "day")
    design = TeamLimits("design", Rate(2, 5), (credits_month, requests_week, org_day))
    other = TeamLimits("other", Rate(1, 1), (org_day,))
    count(server, "design", "month", requests=1, credits=HUGE)
    count(server, "design", "week", requests=7, credits=8)
    count(server, None, "day", requests=9, credits=10)
    before_us = 1_000_000 * now_s(server)
    server.set(KEYS.rate("design"), before_us + 60_000_000)

    async def scenario(reports: LedgerReader) -> None:
        first, second = await reports.quota_states([design, other])
        assert (first.limits, second.limits) == (design, other)
        assert list(first.used) == [HUGE, 7, 9]
        assert list(second.used) == [9]
        assert first.now_us == second.now_us >= before_us
        assert first.tat_offset_us == design.rate.burst_tolerance_us, "limited, like in the ledger"
        assert first.rate_remaining() == 0
        assert (second.tat_offset_us, second.rate_remaining()) == (0, 1)
        assert {per: first.windows[per] for per in ("day", "week", "month")} == {
            per: window_of(per, first.now_us // 1_000_000, ZONE) for per in BASE_PERIODS
        }

    run_scenario(scenario)


def test_a_rate_that_was_used_a_moment_ago(server: redis.Redis, run_scenario: RunScenario) -> None:
    terms = [TeamLimits(team, Rate(0.1, 5), ()) for team in ("used", "idle")]
    now_us = 1_000_000 * now_s(server)
    server.set(KEYS.rate("used"), now_us + 20_500_000)
    server.set(KEYS.rate("idle"), now_us - 20_000_000)

    async def scenario(reports: LedgerReader) -> None:
        used, idle = await reports.quota_states(terms)
        assert 15_000_000 < used.tat_offset_us <= 20_500_000
        assert used.rate_remaining() in (2, 3)
        assert (idle.tat_offset_us, idle.rate_remaining()) == (0, 5)
        assert await reports.quota_states([]) == []

    run_scenario(scenario)


def test_quota_states_without_any_booking(server: redis.Redis, run_scenario: RunScenario) -> None:
    terms = TeamLimits(
        "design", Rate(1, 3), tuple(quota("team", "requests", per) for per in ("minute", "hour", "month"))
    )

    async def scenario(reports: LedgerReader) -> None:
        (quota_state,) = await reports.quota_states([terms])
        assert list(quota_state.used) == [0, 0, 0]
        assert quota_state.rate_remaining() == 3
        assert (await reports.window_totals(["design"])).teams["design"]["month"] == CounterValue(0, 0)

    run_scenario(scenario)
    assert server.dbsize() == 0, "reports write nothing"


def test_a_counter_without_credits_has_0_credits(server: redis.Redis, run_scenario: RunScenario) -> None:
    count(server, "design", "day", requests=3)

    async def scenario(reports: LedgerReader) -> None:
        assert (await reports.window_totals(["design"])).teams["design"]["day"] == CounterValue(3, 0)

    run_scenario(scenario)


@pytest.mark.parametrize("wrong_by_s", [-86400, 86400, 40 * 86400, -(10**9)])
def test_a_wrong_clock_is_corrected_by_the_stores(
    server: redis.Redis, run_scenario: RunScenario, monkeypatch: pytest.MonkeyPatch, wrong_by_s: int
) -> None:
    count(server, "design", "day", requests=3)
    terms = TeamLimits("design", Rate(1, 1), (quota("team", "requests", "day"),))
    monkeypatch.setattr(module, "time", lambda: time.time() + wrong_by_s)

    async def scenario(reports: LedgerReader) -> None:
        (quota_state,) = await reports.quota_states([terms])
        assert list(quota_state.used) == [3]
        assert quota_state.windows["day"] == window_of("day", now_s(server), ZONE)
        totals = await reports.window_totals(["design"])
        assert totals.teams["design"]["day"] == CounterValue(3, 0)
        assert totals.windows["month"] == window_of("month", now_s(server), ZONE)

    run_scenario(scenario)


def test_with_a_correct_clock_one_call_is_enough(server: redis.Redis, run_scenario: RunScenario) -> None:
    terms = [TeamLimits(f"team-{number}", Rate(1, 1), (quota("team", "requests", "day"),)) for number in range(60)]

    async def scenario(reports: LedgerReader) -> None:
        await reports.quota_states(terms)  # the script may not be loaded yet
        server.config_resetstat()
        assert len(await reports.quota_states(terms)) == 60
        assert calls(server, "evalsha") == 1
        assert len((await reports.window_totals([one.team for one in terms])).teams) == 60
        assert calls(server, "evalsha") == 2

    run_scenario(scenario)


def test_window_totals(server: redis.Redis, run_scenario: RunScenario) -> None:
    for number, per in enumerate(BASE_PERIODS):
        count(server, "design", per, requests=number, credits=HUGE + number)
    count(server, None, "day", requests=99, credits=99)

    async def scenario(reports: LedgerReader) -> None:
        totals = await reports.window_totals(["design", "other"])
        assert totals.teams["design"] == {
            per: CounterValue(number, HUGE + number) for number, per in enumerate(BASE_PERIODS)
        }
        assert totals.teams["other"] == dict.fromkeys(BASE_PERIODS, CounterValue(0, 0))
        assert totals.windows == {per: window_of(per, now_s(server), ZONE) for per in BASE_PERIODS}
        assert (await reports.window_totals([])).teams == {}

    run_scenario(scenario)


def test_an_unreachable_store_raises() -> None:
    async def scenario() -> None:
        store = Store(f"redis://127.0.0.1:{free_port()}", "ledger")
        reports = LedgerReader(store, KEYS, ZONE)
        with pytest.raises(StoreUnavailable):
            await reports.usage(usage_query(NOVEMBER_1, NOVEMBER_1, "day"))
        with pytest.raises(StoreUnavailable):
            await reports.quota_states([])
        with pytest.raises(StoreUnavailable):
            await reports.window_totals(["design"])
        await store.close()

    asyncio.run(scenario())


# --- Reports on the ledger's bookings --------------------------------------------------------------------------------


def test_reports_equal_the_ledgers_bookings(any_store_url: str, server: redis.Redis) -> None:
    quotas = quota("team", "estimated_credits", "month"), quota("team", "requests", "day", 5)
    design = TeamLimits("design", Rate(0.001, 8), (*quotas, quota("org", "requests", "week")))

    async def scenario(store: Store) -> None:
        metrics = Metrics()
        ledger = Ledger(LedgerBatcher(store, KEYS, ZONE, metrics), metrics, admits_on_outage=False)
        reports = LedgerReader(store, KEYS, ZONE)
        for _ in range(3):
            await ledger.charge(design, Charge(Outcome.HIT, 4_500_000, "Flux"))
        asked, failed = await ledger.admit(design), await ledger.admit(design)
        assert isinstance(asked, Admitted)
        assert isinstance(failed, Admitted)
        assert (await reports.usage(_today("day"))).total.outcomes == {"hit": 3, "cancelled": 2}, "in flight"
        settled = await ledger.settle(asked, Charge(Outcome.MISS, 1, "Turbo"))
        await ledger.refund(failed, *BUSY)
        assert isinstance(await ledger.charge(design, Charge(Outcome.HIT, 1, "Flux")), Admitted)
        assert isinstance(await ledger.charge(design, Charge(Outcome.HIT, 1, "Flux")), Denied)

        usage = await reports.usage(_today("team", "model"))
        assert [(row.group, row.requests, row.refused, row.outcomes, row.credits_micro) for row in usage.rows] == [
            (("design", "-"), 0, 2, {"quota-exceeded": 1, "upstream-busy": 1}, 0),
            (("design", "Flux"), 4, 0, {"hit": 4}, 13_500_001),
            (("design", "Turbo"), 1, 0, {"miss": 1}, 1),
        ]
        (quota_state,) = await reports.quota_states([design])
        assert list(quota_state.used) == [13_500_002, 5, 5]
        assert settled.quota_state is not None
        assert list(settled.quota_state.used) == [13_500_001, 5, 5], "the request in flight is still counted"
        assert quota_state.rate_remaining() == 2, "8 minus three hits, two admissions and one more hit"
        totals = await reports.window_totals(["design"])
        assert set(totals.teams["design"].values()) == {CounterValue(5, 13_500_002)}, "usage and counters agree"
        today = _today()
        daily = (
            await reports.day_totals([today.first, today.first + timedelta(days=1), today.last], ["design"])
        ).values()
        assert CounterValue(5, 13_500_002) in daily, "and so does what forecasts are made from"
        await ledger.close(1.0)

    async def with_store() -> None:
        store = Store(any_store_url, "ledger")
        try:
            await scenario(store)
        finally:
            await store.close()

    asyncio.run(with_store())
    assert server.dbsize() > 0


def _today(*by: Any) -> UsageQuery:
    """Includes yesterday and tomorrow, because a test may run over midnight."""
    today = datetime.now(UTC).date()
    return usage_query(today - timedelta(days=1), today + timedelta(days=1), *by)
