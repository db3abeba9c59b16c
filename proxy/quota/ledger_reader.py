"""Reads the ledger: quota states, window totals, usage, price changes, and when tokens were last used.

* One script reads quota states and totals at one moment of the store's clock, in the windows of that moment.
* Usage is read in chunks, so that a long report blocks neither the store nor the gateway. Requests that are booked
  between two chunks may be in one row and missing in another.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from time import time
from zoneinfo import ZoneInfo

from proxy.quota.counters import BASE_PERIODS, LedgerKeys, split_usage_field
from proxy.quota.price_changes import PriceChanges, decode_days
from proxy.quota.quotas import Quota, QuotaState, TeamLimits
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


@dataclass(frozen=True, slots=True)
class CounterValue:
    """The value of one counter."""

    requests: int
    credits_micro: int


@dataclass(frozen=True, slots=True)
class WindowTotals:
    """What teams have used in the running day, week and month, with or without quotas."""

    windows: Mapping[Period, Window]
    teams: Mapping[str, Mapping[Period, CounterValue]]


@dataclass(frozen=True, slots=True)
class _Plan:
    """The keys to read while the store's clock is in all the `windows`."""

    windows: Mapping[Period, Window]
    rates: Sequence[str]
    counters: Sequence[str]

    def is_valid_at(self, now_us: int) -> bool:
        return all(now_us // 1_000_000 in window for window in self.windows.values())


@dataclass(frozen=True, slots=True)
class _LedgerValues:
    """The values at `now_us`, by key. `tats_us` are theoretical arrival times, 0 for a team that has none."""

    plan: _Plan
    now_us: int
    tats_us: Mapping[str, int]
    counters: Mapping[str, CounterValue]


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
        wanted = None if query.team is None else current.get(query.team, query.team)
        teams = await self.teams() if wanted is None else directory.ids_of(wanted)
        team_days = [(day, team) for day in _days(query.first, query.last) for team in teams]
        for start in range(0, len(team_days), CHUNK):
            for team_day in await self._team_days(team_days[start : start + CHUNK]):
                totals.add(replace(team_day, team=current.get(team_day.team, team_day.team)))
        return totals.usage()

    async def upstream_means(self, first: date, last: date) -> dict[date, UpstreamTime]:
        """The mean time at upstream of each day that has one: its own, or the newest of an earlier day."""
        days = list(_days(date.fromordinal(max(1, first.toordinal() - LOOK_BACK_DAYS)), last))
        rows = await self._store.call(_UPSTREAM_GET, *map(self._keys.upstream, days))
        booked = {day: UpstreamTime(int(row[0]), int(row[1])) for day, row in zip(days, rows, strict=True) if row[0]}
        return known_means(days, booked)

    async def price_changes(self, query: PriceChangeQuery) -> PriceChanges:
        """The price changes of the query's days and account."""
        days = list(_days(query.first, query.last))
        hashes = []
        for start in range(0, len(days), CHUNK):
            keys = map(self._keys.price_changes, days[start : start + CHUNK])
            replies = await self._store.call(_USAGE_GET, *keys)
            hashes += [dict(zip(reply[::2], reply[1::2], strict=True)) for reply in replies]
        return decode_days(hashes, query.account)

    async def current_mean(self) -> UpstreamTime | None:
        """The mean time at upstream that counts today."""
        today = day_of(int(time()), self._zone)
        return (await self.upstream_means(today, today)).get(today)

    async def day_totals(self, days: Sequence[date], teams: Sequence[str]) -> dict[date, CounterValue]:
        """What these teams together used on each of these days: the measures that count against quotas."""
        sums = {day: Counter[str]() for day in days}
        team_days = [(day, team) for day in days for team in teams]
        for start in range(0, len(team_days), CHUNK):
            for team_day in await self._team_days(team_days[start : start + CHUNK]):
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
        rates = [self._keys.rate(one.team) for one in limits]
        quotas = {(_counted_team(one, quota), quota.per) for one in limits for quota in one.quotas}

        def plan_at(at_s: int) -> _Plan:
            windows = {per: window_of(per, at_s, self._zone) for _, per in quotas}
            return _Plan(windows, rates, [self._keys.counter(team, per, windows[per]) for team, per in quotas])

        values = await self._read(plan_at)
        return [self._quota_state(one, values) for one in limits]

    async def window_totals(self, teams: Sequence[str]) -> WindowTotals:
        """What these teams have used in the running windows, all at one moment."""

        def plan_at(at_s: int) -> _Plan:
            windows = {per: window_of(per, at_s, self._zone) for per in BASE_PERIODS}
            return _Plan(windows, [], [key for team in teams for key in self._counters(team, windows).values()])

        values = await self._read(plan_at)
        windows, counters = values.plan.windows, values.counters
        totals = {team: {per: counters[key] for per, key in self._counters(team, windows).items()} for team in teams}
        return WindowTotals(windows, totals)

    async def _team_days(self, team_days: Sequence[tuple[date, str]]) -> list[TeamDay]:
        keys = (self._keys.usage(team, day) for day, team in team_days)
        replies = await self._store.call(_USAGE_GET, *keys)
        return [
            TeamDay(day, team, dict(zip(reply[::2], reply[1::2], strict=True)))
            for (day, team), reply in zip(team_days, replies, strict=True)
        ]

    async def _read(self, plan_at: Callable[[int], _Plan]) -> _LedgerValues:
        """Plans by this machine's clock, and again by the store's if that is in other windows."""
        values = await self._read_plan(plan_at(int(time())))
        if values.plan.is_valid_at(values.now_us):
            return values
        return await self._read_plan(plan_at(values.now_us // 1_000_000))

    async def _read_plan(self, plan: _Plan) -> _LedgerValues:
        args = (len(plan.rates),)
        now_us, *rows = await self._store.call(_LEDGER_READ, *plan.rates, *plan.counters, args=args)
        tats, pairs = rows[: len(plan.rates)], rows[len(plan.rates) :]
        return _LedgerValues(
            plan,
            int(now_us),
            {key: int(tat or 0) for key, tat in zip(plan.rates, tats, strict=True)},
            {
                key: CounterValue(*(int(amount or 0) for amount in pair))
                for key, pair in zip(plan.counters, pairs, strict=True)
            },
        )

    def _quota_state(self, limits: TeamLimits, values: _LedgerValues) -> QuotaState:
        tat_us = values.tats_us[self._keys.rate(limits.team)]
        used = [self._used(limits, quota, values) for quota in limits.quotas]
        return QuotaState(limits, values.plan.windows, values.now_us, tat_us, used)

    def _used(self, limits: TeamLimits, quota: Quota, values: _LedgerValues) -> int:
        window = values.plan.windows[quota.per]
        value = values.counters[self._keys.counter(_counted_team(limits, quota), quota.per, window)]
        return value.requests if quota.measure == "requests" else value.credits_micro

    def _counters(self, team: str, windows: Mapping[Period, Window]) -> dict[Period, str]:
        return {per: self._keys.counter(team, per, window) for per, window in windows.items()}


def _counted_team(limits: TeamLimits, quota: Quota) -> str | None:
    """The team whose counter the quota limits; None for the organisation's."""
    return limits.team if quota.scope == "team" else None


def _days(first: date, last: date) -> Iterator[date]:
    return (first + timedelta(days=number) for number in range((last - first).days + 1))
