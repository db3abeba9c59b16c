"""The demo's invented usage: the same each time, and in agreement with the counters of quotas."""

import asyncio
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
import redis

from ledger_fixture import hashes
from proxy.demo.past_usage import DAYS, past_usage, put_past_usage
from proxy.demo.setup import TEAMS
from proxy.quota.counters import LedgerKeys
from proxy.quota.history import UsageHistory
from proxy.quota.ledger_reader import CounterValue, LedgerReader
from proxy.quota.quotas import Quota, Rate, TeamLimits
from proxy.quota.report_queries import UsageQuery
from proxy.quota.team_directory import NO_NAMES
from proxy.quota.windows import Period
from proxy.store.client import Store

ZONE = ZoneInfo("UTC")
KEYS = LedgerKeys("acme")

pytestmark = pytest.mark.usefixtures("within_a_minute")


def test_it_is_the_same_each_time() -> None:
    today = date(2026, 11, 30)
    assert list(past_usage(today)) == list(past_usage(today))
    assert {team for team, _, _ in past_usage(today)} == set(TEAMS)
    assert {day for _, day, _ in past_usage(today)} == {today - timedelta(days=age) for age in range(1, DAYS + 1)}


def test_rows_agree_with_counters_and_give_forecasts(server: redis.Redis, any_store_url: str) -> None:
    now = datetime.now(UTC)
    put_past_usage(any_store_url, KEYS, int(now.timestamp()), ZONE)
    limits = [TeamLimits(team, Rate(1, 1), (Quota("team", "requests", "month", 10**9, refuse=True),)) for team in TEAMS]

    async def read() -> None:
        store = Store(any_store_url, "ledger")
        reader = LedgerReader(store, KEYS, ZONE)
        try:
            totals = await reader.window_totals(TEAMS)
            firsts: dict[Period, datetime] = {"week": now - timedelta(days=now.weekday()), "month": now.replace(day=1)}
            for per, first in firsts.items():
                usage = await reader.usage(UsageQuery(first.date(), now.date(), ("team",), None, csv=False))
                rows = {row.group[0]: CounterValue(row.requests, row.credits_micro) for row in usage.rows}
                nothing = CounterValue(0, 0)
                assert {team: rows.get(team, nothing) for team in TEAMS} == {
                    team: values[per] for team, values in totals.teams.items()
                }
            forecasts = await UsageHistory(reader, ZONE).forecasts(await reader.quota_states(limits), NO_NAMES)
            assert {team for team, _ in forecasts} == set(TEAMS)
        finally:
            await store.close()

    asyncio.run(read())
    assert all(server.ttl(key) > 0 for key in server.keys("ep1:{acme}:*:*:*"))
    assert len(hashes(server, "u:*")) == DAYS * len(TEAMS)
