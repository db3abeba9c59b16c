"""Reads the ledger: quota states, window totals, usage, price changes, and when tokens were last used.

* One script reads quota states and totals at one moment of the store's clock, in the windows of that moment.
* Usage is read in chunks, so that a long report blocks neither the store nor the gateway. Requests that are booked
  between two chunks may be in one row and missing in another.
"""

from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from time import time
from typing import NamedTuple, TypeVar
from zoneinfo import ZoneInfo

from proxy.quota.counters import BASE_PERIODS, LedgerKeys, split_usage_field
from proxy.quota.price_changes import PriceChanges, decode_days
from proxy.quota.quotas import Measure, Quota, QuotaState, TeamLimits
from proxy.quota.report_queries import PriceChangeQuery, UsageQuery
from proxy.quota.team_directory import NO_NAMES, TeamDirectory
from proxy.quota.upstream_time import LOOK_BACK_DAYS, UpstreamTime, known_means
from proxy.quota.usage import TeamDay, Usage, UsageTotals
from proxy.quota.windows import Period, Window, day_of, window_of
from proxy.store.client import Script, Store

CHUNK = 50
"""Days of teams in one call: some milliseconds of the store and of the gateway, even with the most models."""

_LEDGER_READ = Script("proxy.quota", "ledger_read", repeatable=True)
_TEAMS_GET = Script("proxy.quota", "teams_get", repeatable=True)
_TOKEN_USES_GET = Script("proxy.quota", "token_uses_get", repeatable=True)
_UPSTREAM_GET = Script("proxy.quota", "upstream_get", repeatable=True)
_USAGE_GET = Script("proxy.quota", "usage_get", repeatable=True)

_Item = TypeVar("_Item")

_Counted = tuple[str | None, Period]
"""What a counter counts: a team, or None for the organisation, in the running window of a period."""


@dataclass(frozen=True, slots=True)
class CounterValue:
    """The value of one counter."""

    requests: int
    credits_micro: int

    def of(self, measure: Measure) -> int:
        return self.requests if measure == "requests" else self.credits_micro


@dataclass(frozen=True, slots=True)
class WindowTotals:
    """What teams have used in the running day, week and month, with or without quotas."""

    windows: Mapping[Period, Window]
    teams: Mapping[str, Mapping[Period, CounterValue]]


class _LedgerValues(NamedTuple):
    """The values at `now_us`. `tats_us`: theoretical arrival times by team, 0 for a team that has none."""

    windows: Mapping[Period, Window]
    now_us: int
    tats_us: Mapping[str, int]
    counters: Mapping[_Counted, CounterValue]


class LedgerReader:
    """Reads the ledger of one organisation. Methods raise `StoreUnavailable`."""

    def __init__(self, store: Store, keys: LedgerKeys, zone: ZoneInfo) -> None:
        self._store = store
        self._keys = keys
        self._zone = zone

    async def teams(self) -> frozenset[str]:
        """The teams that ever had usage, including those that are no longer configured."""
        found = await self._store.call(_TEAMS_GET, self._keys.teams)
        return frozenset(team.decode() for team in found)

    async def usage(self, query: UsageQuery, directory: TeamDirectory = NO_NAMES) -> Usage:
        """The usage of the query's team, or of all teams that ever had any. An earlier id counts as the current one."""
        totals = UsageTotals(query.by, await self.upstream_means(query.first, query.last), query.model)
        current = directory.current
        team = query.team
        teams = await self.teams() if team is None else directory.ids_of(current.get(team, team))
        async for team_day in self._team_days(_days(query.first, query.last), teams):
            totals.add(replace(team_day, team=current.get(team_day.team, team_day.team)))
        return totals.usage()

    async def upstream_means(self, first: date, last: date) -> dict[date, UpstreamTime]:
        """The mean time at upstream of each day that has one: its own, or the newest of an earlier day."""
        days = _days(date.fromordinal(max(1, first.toordinal() - LOOK_BACK_DAYS)), last)
        rows = await self._store.call(_UPSTREAM_GET, *map(self._keys.upstream, days))
        booked = {day: UpstreamTime(int(row[0]), int(row[1])) for day, row in zip(days, rows, strict=True) if row[0]}
        return known_means(days, booked)

    async def price_changes(self, query: PriceChangeQuery) -> PriceChanges:
        """The price changes of the query's days and account."""
        hashes = []
        for days in _chunks(_days(query.first, query.last)):
            hashes += await self._hashes(map(self._keys.price_changes, days))
        return decode_days(hashes, query.account)

    async def current_mean(self) -> UpstreamTime | None:
        """The mean time at upstream that counts today."""
        today = day_of(int(time()), self._zone)
        return (await self.upstream_means(today, today)).get(today)

    async def day_totals(self, days: Sequence[date], teams: Sequence[str]) -> dict[date, CounterValue]:
        """What these teams together used on each of these days: the measures that count against quotas."""
        sums = {day: Counter[str]() for day in days}
        async for team_day in self._team_days(days, teams):
            for name, amount in team_day.fields.items():
                _, _, measure = split_usage_field(name)
                sums[team_day.day][measure] += int(amount)
        return {day: CounterValue(found["requests"], found["credits"]) for day, found in sums.items()}

    async def token_uses(self, token_ids: Sequence[str]) -> dict[str, int]:
        """The hour in which each token was last used, in seconds since 1970, of those with a recorded use."""
        if not token_ids:
            return {}
        hours = await self._store.call(_TOKEN_USES_GET, *map(self._keys.token, token_ids))
        return {token_id: int(hour_s) for token_id, hour_s in zip(token_ids, hours, strict=True) if hour_s is not None}

    async def quota_states(self, limits: Sequence[TeamLimits]) -> list[QuotaState]:
        """The states of these teams, all at one moment."""
        counted = {(_counted_team(one, quota), quota.per) for one in limits for quota in one.quotas}
        values = await self._read([one.team for one in limits], counted)
        states = []
        for one in limits:
            used = [values.counters[_counted_team(one, quota), quota.per].of(quota.measure) for quota in one.quotas]
            states.append(QuotaState(one, values.windows, values.now_us, values.tats_us[one.team], used))
        return states

    async def window_totals(self, teams: Sequence[str]) -> WindowTotals:
        """What these teams have used in the running windows, all at one moment."""
        values = await self._read([], {(team, per) for team in teams for per in BASE_PERIODS})
        totals = {team: {per: values.counters[team, per] for per in BASE_PERIODS} for team in teams}
        return WindowTotals(values.windows, totals)

    async def _team_days(self, days: Iterable[date], teams: Collection[str]) -> AsyncIterator[TeamDay]:
        for team_days in _chunks([(day, team) for day in days for team in teams]):
            hashes = await self._hashes(self._keys.usage(team, day) for day, team in team_days)
            for (day, team), fields in zip(team_days, hashes, strict=True):
                yield TeamDay(day, team, fields)

    async def _hashes(self, keys: Iterable[str]) -> list[dict[bytes, bytes]]:
        replies = await self._store.call(_USAGE_GET, *keys)
        return [dict(zip(reply[::2], reply[1::2], strict=True)) for reply in replies]

    async def _read(self, teams: Sequence[str], counted: Collection[_Counted]) -> _LedgerValues:
        """Reads in the windows of this machine's clock, and again if the store's clock is in others."""
        values = await self._read_at(int(time()), teams, counted)
        now_s = values.now_us // 1_000_000
        if all(now_s in window for window in values.windows.values()):
            return values
        return await self._read_at(now_s, teams, counted)

    async def _read_at(self, at_s: int, teams: Sequence[str], counted: Collection[_Counted]) -> _LedgerValues:
        periods = dict.fromkeys((*BASE_PERIODS, *(per for _, per in counted)))
        windows = {per: window_of(per, at_s, self._zone) for per in periods}
        keys = (*map(self._keys.rate, teams), *(self._keys.counter(team, per, windows[per]) for team, per in counted))
        now_us, *rows = await self._store.call(_LEDGER_READ, *keys, args=(len(teams),))
        tats_us = (int(tat or 0) for tat in rows[: len(teams)])
        values = (CounterValue(int(requests or 0), int(micro or 0)) for requests, micro in rows[len(teams) :])
        return _LedgerValues(
            windows, int(now_us), dict(zip(teams, tats_us, strict=True)), dict(zip(counted, values, strict=True))
        )


def _counted_team(limits: TeamLimits, quota: Quota) -> str | None:
    return limits.team if quota.scope == "team" else None


def _days(first: date, last: date) -> list[date]:
    return [first + timedelta(days=number) for number in range((last - first).days + 1)]


def _chunks(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))
