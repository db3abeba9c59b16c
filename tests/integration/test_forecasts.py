"""Forecasts of quotas: the history that they are made from, and every place that shows them."""

import asyncio
import csv
from collections.abc import Callable, Coroutine
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx2
import orjson
import pytest
import redis
from click.testing import CliRunner

from gateway_fixture import DESIGN, OpenGateway
from gateway_process import Tree
from ledger_fixture import calls
from metrics_fixture import ADMIN, FLUX, limited, quota
from past_usage import put_past_usage
from prometheus import scrape
from proxy.auth import digest_of
from proxy.cli.commands import main
from proxy.problems import StoreUnavailable
from proxy.quota.counters import LedgerKeys
from proxy.quota.credits import MICRO
from proxy.quota.forecast import Forecasts
from proxy.quota.history import UsageHistory
from proxy.quota.ledger_reader import LedgerReader
from proxy.quota.quotas import Quota, Rate, Scope, TeamLimits
from proxy.quota.team_directory import NO_NAMES, TeamDirectory
from proxy.quota.windows import Period, window_of
from proxy.store.client import Store
from serving import free_port

UTC = ZoneInfo("UTC")
KEYS = LedgerKeys("default")

pytestmark = pytest.mark.usefixtures("within_a_minute")

RunScenario = Callable[[Callable[[LedgerReader], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def run_scenario(any_store_url: str) -> RunScenario:
    def run(scenario: Callable[[LedgerReader], Coroutine[Any, Any, None]]) -> None:
        async def with_store() -> None:
            store = Store(any_store_url, "ledger")
            try:
                await scenario(LedgerReader(store, KEYS, UTC))
            finally:
                await store.close()

        asyncio.run(with_store())

    return run


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Yesterday can no longer change, even if it is just after midnight."""
    monkeypatch.setattr("proxy.quota.history.SETTLED_S", 0)


def monthly(team: str, scope: Scope = "team", per: Period = "month") -> TeamLimits:
    return TeamLimits(team, Rate(10, 10), (Quota(scope, "requests", per, 10**6, refuse=True),))


async def forecasts_of(history: UsageHistory, limits: TeamLimits, directory: TeamDirectory = NO_NAMES) -> Forecasts:
    return await history.forecasts(await history._ledger_reader.quota_states([limits]), directory)


async def days_seen(history: UsageHistory, limits: TeamLimits, directory: TeamDirectory = NO_NAMES) -> tuple[int, int]:
    """The forecast of the end, and how many days of history it is made from."""
    (found,) = (await forecasts_of(history, limits, directory)).values()
    return found.at_end, int(found.method.split()[3])


def left(per: Period = "month") -> float:
    """Days until the window ends."""
    now_s = int(datetime.now(UTC).timestamp())
    return (window_of(per, now_s, UTC).end_s - now_s) / 86_400


class TestHistory:
    def test_of_a_team(self, server: redis.Redis, run_scenario: RunScenario) -> None:
        put_past_usage(server, "design", [3000] * 30)
        put_past_usage(server, "other", [7] * 90)

        async def scenario(reader: LedgerReader) -> None:
            at_end, days = await days_seen(UsageHistory(reader, UTC), monthly("design"))
            assert days == 30
            assert at_end == pytest.approx(3000 * left(), abs=2)

        run_scenario(scenario)

    def test_of_the_organisation(self, server: redis.Redis, run_scenario: RunScenario) -> None:
        put_past_usage(server, "design", [3000] * 30)
        put_past_usage(server, "gone", [1000] * 60)

        async def scenario(reader: LedgerReader) -> None:
            at_end, days = await days_seen(UsageHistory(reader, UTC), monthly("design", "org"))
            assert days == 60
            assert at_end >= 2000 * left() - 1

        run_scenario(scenario)

    def test_includes_earlier_ids(self, server: redis.Redis, run_scenario: RunScenario) -> None:
        put_past_usage(server, "old", [*[3000] * 20, *[0] * 10])
        put_past_usage(server, "design", [3000] * 10)

        async def scenario(reader: LedgerReader) -> None:
            history = UsageHistory(reader, UTC)
            assert not await forecasts_of(history, monthly("design"))
            renamed = TeamDirectory(current={"old": "design"})
            at_end, days = await days_seen(history, monthly("design"), renamed)
            assert days == 30
            assert at_end == pytest.approx(3000 * left(), abs=2)

        run_scenario(scenario)

    @pytest.mark.usefixtures("settled")
    def test_is_read_once(self, server: redis.Redis, run_scenario: RunScenario) -> None:
        put_past_usage(server, "design", [30] * 40)

        async def scenario(reader: LedgerReader) -> None:
            history, limits = UsageHistory(reader, UTC), monthly("design")
            states = await reader.quota_states([limits])
            first = await history.forecasts(states, NO_NAMES)
            before = calls(server)
            server.flushdb()
            assert await history.forecasts(states, NO_NAMES) == first
            assert calls(server) == before

        run_scenario(scenario)

    def test_a_day_that_can_change_is_read_again(
        self, server: redis.Redis, run_scenario: RunScenario, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("proxy.quota.history.SETTLED_S", 86_400)
        put_past_usage(server, "design", [*[0] * 10, *[30] * 14])

        async def scenario(reader: LedgerReader) -> None:
            history, now_s = UsageHistory(reader, UTC), int(datetime.now(UTC).timestamp())
            await history._daily(("design",), now_s)
            put_past_usage(server, "design", [*[9] * 23, 90])
            daily = await history._daily(("design",), now_s)
            assert [day.requests for day in daily[-15:]] == [0, *[30] * 13, 90], "only yesterday is read again"

        run_scenario(scenario)

    @pytest.mark.usefixtures("settled")
    def test_days_that_are_too_old_are_forgotten(self, server: redis.Redis, run_scenario: RunScenario) -> None:
        put_past_usage(server, "design", [30] * 40)

        async def scenario(reader: LedgerReader) -> None:
            history = UsageHistory(reader, UTC)
            (state,) = await reader.quota_states([monthly("design")])
            await history.forecasts([state], NO_NAMES)
            held = len(history._settled)
            state.now_us += 10 * 86_400_000_000
            state.windows = {"month": window_of("month", state.now_us // 1_000_000, UTC)}
            await history.forecasts([state], NO_NAMES)
            assert len(history._settled) == held

        run_scenario(scenario)

    def test_short_windows_read_nothing(self, server: redis.Redis, run_scenario: RunScenario) -> None:
        put_past_usage(server, "design", [30] * 40)

        async def scenario(reader: LedgerReader) -> None:
            states = await reader.quota_states([monthly("design", per="day")])
            before = calls(server)
            assert await UsageHistory(reader, UTC).forecasts(states, NO_NAMES) == {}
            assert calls(server) == before

        run_scenario(scenario)

    def test_an_unreachable_ledger_raises(self, server: redis.Redis, run_scenario: RunScenario) -> None:
        put_past_usage(server, "design", [30] * 40)

        async def scenario(reader: LedgerReader) -> None:
            states = await reader.quota_states([monthly("design")])
            away = Store(f"redis://127.0.0.1:{free_port()}", "ledger")
            with pytest.raises(StoreUnavailable):
                await UsageHistory(LedgerReader(away, KEYS, UTC), UTC).forecasts(states, NO_NAMES)
            await away.close()

        run_scenario(scenario)


QUOTAS: list[Tree] = [quota(60_000), quota(9000, "week", "requests"), quota(5, "day", on_exceed="warn")]
ORG: Tree = {"quotas": [quota(10**6, on_exceed="warn")]}
FOUND = {"at_end", "low", "high", "reached_at", "reached_from", "reached_until", "method"}
CONFIG = f"""
store.url = "URL"
accounts.default.api_key = "rn-key"
org.quotas = [{{ measure = "estimated_credits", limit = 1000000, per = "month", on_exceed = "warn" }}]
[teams.design]
tokens = ["{digest_of(DESIGN)}"]
quotas = [
  {{ measure = "estimated_credits", limit = 60000, per = "month" }},
  {{ measure = "requests", limit = 9000, per = "week" }},
  {{ measure = "estimated_credits", limit = 5, per = "day", on_exceed = "warn" }},
]
"""


def shown(client: httpx2.Client, team: str = "design") -> list[Tree]:
    response = client.get("/v1/quota", params={"team": team}, headers={"x-api-key": ADMIN})
    assert response.status_code == 200, response.text
    quotas: list[Tree] = response.json()["quotas"]
    return quotas


class TestShown:
    def test_the_endpoint_the_gauge_and_the_command_agree(
        self, open_scraped_gateway: OpenGateway, valkey_url: str, tmp_path: Path
    ) -> None:
        gateway = open_scraped_gateway(teams=limited(*QUOTAS), org=ORG)
        put_past_usage(gateway.store, "design", [1000] * 30)
        put_past_usage(gateway.store, "retired", [500] * 20)
        assert gateway.ask(FLUX, x_api_key=DESIGN).status_code == 200
        month, week, day, org = shown(gateway.client)
        assert "forecast" not in day
        assert month["forecast"].keys() == week["forecast"].keys() == org["forecast"].keys() == FOUND
        ends = [one["forecast"]["at_end"] for one in (month, week, org)]
        assert ends[:2] == [
            pytest.approx(2.75 + 2000 * left(), abs=2),
            pytest.approx(1 + 1000 * left("week"), abs=2),
        ]
        assert ends[2] >= ends[0] == month["forecast"]["low"] == month["forecast"]["high"]
        assert org["forecast"]["reached_at"] is None
        assert shown(gateway.client, "marketing") == [org], "without a quota of its own"

        gauges = scrape(gateway.client).series("quota_forecast_credits", "scope", "team", "measure", "per")
        assert gauges == {
            ("team", "design", "estimated_credits", "month"): pytest.approx(ends[0], abs=2),
            ("team", "design", "requests", "week"): pytest.approx(ends[1], abs=2),
            ("org", "-", "estimated_credits", "month"): pytest.approx(ends[2], abs=2),
        }

        config = tmp_path / "estimate-proxy.toml"
        config.write_text(CONFIG.replace("URL", valkey_url))
        command = CliRunner(catch_exceptions=False)
        document = orjson.loads(
            command.invoke(main, ["quota", "design", "--config", str(config), "--format", "json"]).stdout
        )
        assert [one.get("forecast", {}).get("at_end") for one in document["quotas"]] == [
            pytest.approx(ends[0], abs=2),
            pytest.approx(ends[1], abs=2),
            None,
            pytest.approx(ends[2], abs=2),
        ]
        text = command.invoke(main, ["quota", "design", "--config", str(config), "--format", "csv"]).stdout
        rows = {row["per"]: row for row in csv.DictReader(text.splitlines()) if row["scope"] == "team"}
        assert float(rows["month"]["forecast_at_end"]) == pytest.approx(ends[0], abs=2)
        assert rows["day"]["forecast_at_end"] == rows["day"]["reached_at"] == ""

    def test_with_the_time_zone_of_the_organisation(self, open_gateway: OpenGateway) -> None:
        zone = ZoneInfo("Asia/Tokyo")
        now = datetime.now(zone)
        gateway = open_gateway(teams=limited(quota(1)), org={"timezone": zone.key})
        put_past_usage(gateway.store, "design", [1000] * 30, zone=zone.key)
        month = window_of("month", int(now.timestamp()), zone)
        counter = KEYS.counter("design", "month", month)
        gateway.store.hset(counter, mapping={"requests": 1000 * now.day, "credits": 2000 * now.day * MICRO})
        found = gateway.client.get("/v1/quota").json()["quotas"][0]["forecast"]
        assert found["reached_from"] == now.replace(day=1, hour=0, minute=0, second=0, microsecond=0).isoformat()
        assert found["reached_from"].endswith("T00:00:00+09:00")
