"""What the ledger says when it is asked and nothing is to be booked.

* How things stand is read by one script: all of it at one moment of the store's clock, in the windows of that moment.
* Usage of many days is read in parts, so that neither the store nor the gateway stands still meanwhile; what is booked
  between two of them may be in one row and not in another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from time import time
from zoneinfo import ZoneInfo

from proxy.quota.counters import BASE_PERIODS, LedgerKeys
from proxy.quota.quotas import Quota, QuotaState, TeamLimits
from proxy.quota.usage import TeamDay, Usage, UsageQuery, UsageTotals
from proxy.quota.windows import Period, Window, window_of
from proxy.store.client import Script, Store

CHUNK = 50
"""Team-days in one call: some milliseconds of the store's and of the gateway's time, however many models there are."""

_LEDGER_READ = Script("proxy.quota", "ledger_read", repeatable=True)
_TEAMS_GET, _USAGE_GET = (
    Script("proxy.quota", "teams_get", repeatable=True),
    Script("proxy.quota", "usage_get", repeatable=True),
)


@dataclass(frozen=True, slots=True)
class Count:
    """What a counter of the ledger holds."""

    requests: int
    credits_micro: int


@dataclass(frozen=True, slots=True)
class WindowTotals:
    """What teams have used in the running day, week and month, whatever their quotas."""

    windows: Mapping[Period, Window]
    teams: Mapping[str, Mapping[Period, Count]]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be read at a moment that lies in all the `windows`."""

    windows: Mapping[Period, Window]
    rates: Sequence[str]
    counters: Sequence[str]

    def holds(self, now_us: int) -> bool:
        return all(window.start_s <= now_us // 1_000_000 < window.end_s for window in self.windows.values())


@dataclass(frozen=True, slots=True)
class _Reading:
    """What was read at `now_us`. `arrivals` are the theoretical arrival times in µs, by rate."""

    plan: _Plan
    now_us: int
    arrivals: Mapping[str, int]
    counts: Mapping[str, Count]


class LedgerReader:
    """One organisation's ledger, read. All raise `StoreUnavailable`."""

    def __init__(self, store: Store, keys: LedgerKeys, zone: ZoneInfo) -> None:
        self._store = store
        self._keys = keys
        self._zone = zone

    async def teams(self) -> frozenset[str]:
        """The teams that have ever had usage, those that no setting names any more included."""
        found = await self._store.call(_TEAMS_GET, self._keys.teams)
        return frozenset(team.decode() for team in found)

    async def usage(self, query: UsageQuery) -> Usage:
        """The usage that `query` asks for, of its team, or of all that ever had any."""
        tally = UsageTotals(query.by)
        teams = await self.teams() if query.team is None else [query.team]
        team_days = [(day, team) for day in _days(query.first, query.last) for team in teams]
        for start in range(0, len(team_days), CHUNK):
            for kept in await self._kept(team_days[start : start + CHUNK]):
                tally.add(kept)
        return tally.usage()

    async def quota_states(self, terms: Sequence[TeamLimits]) -> list[QuotaState]:
        """How each of these teams stands, all at one moment."""
        rates = [self._keys.rate(one.team) for one in terms]
        quotas = {(_owner(one, quota), quota.per) for one in terms for quota in one.quotas}

        def plan(at_s: int) -> _Plan:
            windows = {per: window_of(per, at_s, self._zone) for _, per in quotas}
            return _Plan(windows, rates, [self._keys.counter(team, per, windows[per]) for team, per in quotas])

        reading = await self._read(plan)
        return [self._quota_state(one, reading) for one in terms]

    async def window_totals(self, teams: Sequence[str]) -> WindowTotals:
        """What each of these teams has used in the running windows, all at one moment."""

        def plan(at_s: int) -> _Plan:
            windows = {per: window_of(per, at_s, self._zone) for per in BASE_PERIODS}
            return _Plan(windows, [], [key for team in teams for key in self._counters(team, windows).values()])

        reading = await self._read(plan)
        windows, counts = reading.plan.windows, reading.counts
        totals = {team: {per: counts[key] for per, key in self._counters(team, windows).items()} for team in teams}
        return WindowTotals(windows, totals)

    async def _kept(self, team_days: Sequence[tuple[date, str]]) -> list[TeamDay]:
        keys = (self._keys.usage(team, day) for day, team in team_days)
        replies = await self._store.call(_USAGE_GET, *keys)
        return [
            TeamDay(day, team, dict(zip(reply[::2], reply[1::2], strict=True)))
            for (day, team), reply in zip(team_days, replies, strict=True)
        ]

    async def _read(self, plan_at: Callable[[int], _Plan]) -> _Reading:
        """A reading in the windows of its own moment: where this clock and the store's differ, the store's counts."""
        reading = await self._read_as_planned(plan_at(int(time())))
        if reading.plan.holds(reading.now_us):
            return reading
        return await self._read_as_planned(plan_at(reading.now_us // 1_000_000))

    async def _read_as_planned(self, plan: _Plan) -> _Reading:
        args = (len(plan.rates),)
        now_us, *found = await self._store.call(_LEDGER_READ, *plan.rates, *plan.counters, args=args)
        arrivals, counts = found[: len(plan.rates)], found[len(plan.rates) :]
        return _Reading(
            plan,
            int(now_us),
            {key: int(arrival or 0) for key, arrival in zip(plan.rates, arrivals, strict=True)},
            {
                key: Count(*(int(amount or 0) for amount in pair))
                for key, pair in zip(plan.counters, counts, strict=True)
            },
        )

    def _quota_state(self, terms: TeamLimits, reading: _Reading) -> QuotaState:
        tat_offset_us = reading.arrivals[self._keys.rate(terms.team)] - reading.now_us
        bounded_us = min(max(tat_offset_us, 0), terms.rate.burst_tolerance_us)
        used = [self._used(terms, quota, reading) for quota in terms.quotas]
        return QuotaState(terms, reading.plan.windows, reading.now_us, bounded_us, used)

    def _used(self, terms: TeamLimits, quota: Quota, reading: _Reading) -> int:
        window = reading.plan.windows[quota.per]
        count = reading.counts[self._keys.counter(_owner(terms, quota), quota.per, window)]
        return count.requests if quota.measure == "requests" else count.credits_micro

    def _counters(self, team: str, windows: Mapping[Period, Window]) -> dict[Period, str]:
        return {per: self._keys.counter(team, per, window) for per, window in windows.items()}


def _owner(terms: TeamLimits, quota: Quota) -> str | None:
    """Whose counter it is: the team's, or with None the organisation's."""
    return terms.team if quota.scope == "team" else None


def _days(first: date, last: date) -> Iterator[date]:
    return (first + timedelta(days=number) for number in range((last - first).days + 1))
