"""Where the ledger of an organisation keeps what: its keys, and the sheets on which a team's requests are booked.

All keys of a ledger lie in one slot of a cluster, so that one script debits team and organisation, all or none. A new
window is a new key, never a reset.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from zoneinfo import ZoneInfo

from proxy.quota.quotas import Quota, TeamLimits, policies_of
from proxy.quota.windows import Period, Window, day_of, start_of, window_of

USAGE_KEPT_DAYS = 400
COUNTER_KEPT_S = 2 * 86400
"""Behind the end of its window: longer than any request takes to be settled."""

BASE_PERIODS: tuple[Period, ...] = ("day", "week", "month")
"""A scope is counted in these windows, quota or not: one that is set today knows what was used before."""

MAX_ENTRIES = 200
"""Entries in one script call: some milliseconds of the store's time."""

MAX_ENTRY_MICRO = 45 * 10**12
"""Micro-credits of one entry, at least one estimate of the highest price (10**12). All entries of a call together have
at most 9 * 10**15, which is below 2**53: numbers of Lua are exact up to there."""

_FIELDS = {"requests": "requests", "estimated_credits": "credits"}


@dataclass(frozen=True, slots=True)
class LedgerKeys:
    """The names of an organisation's keys."""

    org: str

    @property
    def id(self) -> str:
        return f"ep1:{{{self.org}}}:id"

    @property
    def models(self) -> str:
        return f"ep1:{{{self.org}}}:models"

    @property
    def teams(self) -> str:
        return f"ep1:{{{self.org}}}:teams"

    def flush(self, number: str) -> str:
        return f"ep1:{{{self.org}}}:flush:{number}"

    def rate(self, team: str) -> str:
        return f"ep1:{{{self.org}}}:rate:t:{team}"

    def counter(self, team: str | None, per: Period, window: Window) -> str:
        """Of a team, or with None of the organisation."""
        scope = "o" if team is None else f"t:{team}"
        return f"ep1:{{{self.org}}}:q:{scope}:{per}:{window.start_s}"

    def usage(self, team: str, day: date) -> str:
        return f"ep1:{{{self.org}}}:u:{day.isoformat()}:{team}"


@dataclass(frozen=True, eq=False)
class CounterSet:
    """What requests of a team, or of the organisation, are booked on while none of its windows ends.

    holds: the time during which it is the sheet to book on.
    keys, args: as `proxy/quota/lua/ledger_decide.lua` reads them.
    org: the organisation's sheet of the same time; None if this is it.
    policy_field: `RateLimit-Policy` of a team whose sheet it is.
    """

    windows: Mapping[Period, Window]
    holds: Window
    keys: tuple[str, ...]
    args: tuple[str | int, ...]
    org: "CounterSet | None" = None
    policy_field: bytes = b""


def org_counters(keys: LedgerKeys, quotas: Sequence[Quota], at_s: int, zone: ZoneInfo) -> CounterSet:
    """The organisation's, at an instant; `quotas` are its own."""
    windows = {per: window_of(per, at_s, zone) for per in periods(quotas)}
    counters = tuple(keys.counter(None, per, window) for per, window in windows.items())
    return CounterSet(windows, _common(windows.values()), counters, (0, "", 0, 0, *_counter_args(windows, quotas)))


def team_counters(keys: LedgerKeys, terms: TeamLimits, org: CounterSet, at_s: int, zone: ZoneInfo) -> CounterSet:
    """A team's, on top of the organisation's of the same instant."""
    own = [quota for quota in terms.quotas if quota.scope == "team"]
    windows = {per: window_of(per, at_s, zone) for per in periods(own)}
    day = day_of(at_s, zone)
    usage_ends_s = start_of(day + timedelta(days=1 + USAGE_KEPT_DAYS), zone)
    counters = (keys.counter(terms.team, per, window) for per, window in windows.items())
    interval_us, burst_tolerance_us = terms.rate.interval_us, terms.rate.burst_tolerance_us
    all_windows = {**org.windows, **windows}
    return CounterSet(
        all_windows,
        _common((org.holds, *windows.values())),
        (keys.usage(terms.team, day), keys.rate(terms.team), *counters),
        (1000 * usage_ends_s, terms.team, interval_us, burst_tolerance_us, *_counter_args(windows, own)),
        org,
        policies_of(terms, all_windows),
    )


def periods(quotas: Sequence[Quota]) -> tuple[Period, ...]:
    """The windows in which their scope is counted."""
    short = {quota.per for quota in quotas} - set(BASE_PERIODS)
    return (*sorted(short, reverse=True), *BASE_PERIODS)


def _common(windows: Iterable[Window]) -> Window:
    """The time that lies in all of them."""
    starts, ends = zip(*((window.start_s, window.end_s) for window in windows), strict=True)
    return Window(max(starts), min(ends))


def _counter_args(windows: Mapping[Period, Window], quotas: Sequence[Quota]) -> tuple[str | int, ...]:
    ends_ms = (1000 * (window.end_s + COUNTER_KEPT_S) for window in windows.values())
    numbers = {per: number for number, per in enumerate(windows, 1)}
    limits: list[str | int] = []
    for quota in quotas:
        limits += (numbers[quota.per], _FIELDS[quota.measure], quota.limit, int(quota.refuse))
    return (len(windows), *ends_ms, len(quotas), *limits)
