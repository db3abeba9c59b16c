"""Reads what was used on finished days, and forecasts quotas from it.

* Finished days are cached when they can no longer change. A report then reads nothing for its forecasts, except shortly
  after midnight.
* A team's history includes its earlier ids (`teams.X.was`), the organisation's all teams that ever had usage.
"""

import asyncio
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Final
from zoneinfo import ZoneInfo

from proxy.problems import NO_NAME
from proxy.quota.forecast import FORECAST_PERIODS, LOOKBACK_DAYS, Forecasts, forecast
from proxy.quota.ledger_reader import CHUNK, CounterValue, LedgerReader
from proxy.quota.quotas import QuotaState
from proxy.quota.team_directory import TeamDirectory
from proxy.quota.windows import day_of

SETTLED_S: Final = 2 * 3600
"""When a finished day no longer changes: all requests that began on it have ended (`request_timeout_s`)."""

_Members = tuple[str, ...]
"""A team's id and its earlier ones, or `_ORG` for all teams."""

_ORG: Final[_Members] = (NO_NAME,)


class UsageHistory:
    """What teams and their organisation used on each day."""

    def __init__(self, ledger_reader: LedgerReader, zone: ZoneInfo) -> None:
        self._ledger_reader = ledger_reader
        self._zone = zone
        self._settled: dict[tuple[date, _Members], CounterValue] = {}
        self._reading = asyncio.Lock()

    async def forecasts(self, quota_states: Sequence[QuotaState], directory: TeamDirectory) -> Forecasts:
        """The forecasts of the quotas in these states, which are of one moment. Raises `StoreUnavailable`."""
        wanted = {
            (quota.owner(state.limits.team), quota): (used, state)
            for state in quota_states
            for quota, used in state.uses()
            if quota.per in FORECAST_PERIODS
        }
        found = {}
        for (owner, quota), (used, state) in wanted.items():
            now_s = state.now_us // 1_000_000
            daily = await self._daily(tuple(directory.ids_of(owner)), now_s)
            amounts = [one.of(quota.measure) for one in daily]
            window = state.windows[quota.per]
            forecasted = forecast(quota, used, amounts, window=window, now_s=now_s, zone=self._zone)
            if forecasted is not None:
                found[owner, quota] = forecasted
            await asyncio.sleep(0)  # other requests run between two forecasts, each of which takes a millisecond
        return found

    async def _daily(self, members: _Members, now_s: int) -> list[CounterValue]:
        """The use of the finished days, the last one last."""
        today = day_of(now_s, self._zone)
        days = [today - timedelta(days=age) for age in range(LOOKBACK_DAYS, 0, -1)]
        async with self._reading:
            missing = [day for day in days if (day, members) not in self._settled]
            read = await self._read(members, missing, day_of(now_s - SETTLED_S, self._zone)) if missing else {}
            return [read[day] if day in read else self._settled[day, members] for day in days]

    async def _read(self, members: _Members, days: Sequence[date], unsettled: date) -> dict[date, CounterValue]:
        """Caches the days before `unsettled` step by step, so that a report that runs out of time helps the next."""
        self._settled = {
            key: value for key, value in self._settled.items() if (unsettled - key[0]).days <= LOOKBACK_DAYS
        }
        teams = sorted(await self._ledger_reader.teams()) if members == _ORG else members
        step = max(1, CHUNK // max(1, len(teams)))
        found: dict[date, CounterValue] = {}
        for start in range(0, len(days), step):
            read = await self._ledger_reader.day_totals(days[start : start + step], teams)
            self._settled.update({(day, members): value for day, value in read.items() if day < unsettled})
            found |= read
        return found
