"""The layout of an organisation's ledger in the store: key names, hash fields, and the counters of a request.

* All keys of a ledger are in one cluster slot, so one script can debit the team and the organisation, or neither.
* A new window is a new key: counters are never reset.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from typing import NamedTuple
from zoneinfo import ZoneInfo

from proxy.quota.quotas import Quota, Rate, TeamLimits, policy_field
from proxy.quota.windows import Period, Window, day_of, start_of, window_of

USAGE_KEPT_DAYS = 400

COUNTER_KEPT_S = 2 * 86400
"""How long a counter is kept after its window: longer than any request takes to be settled."""

BASE_PERIODS: tuple[Period, ...] = ("day", "week", "month")
"""Each scope is counted in these periods even without a quota, so that a new quota knows what was used before it."""

_FIELDS = {"requests": "requests", "estimated_credits": "credits"}
"""The fields of a counter, by measure."""


class LedgerKeys:
    """The store keys of an organisation's ledger."""

    def __init__(self, org: str) -> None:
        self._prefix = prefix = f"ep1:{{{org}}}"
        self.id = f"{prefix}:id"
        self.models = f"{prefix}:models"
        self.model_uses = f"{prefix}:model-uses"
        self.teams = f"{prefix}:teams"

    def flush(self, name: str) -> str:
        return f"{self._prefix}:flush:{name}"

    def token(self, token_id: str) -> str:
        """When a token was last used: the beginning of an hour, in seconds since 1970."""
        return f"{self._prefix}:token:{token_id}"

    def rate(self, team: str) -> str:
        return f"{self._prefix}:rate:t:{team}"

    def counter(self, team: str | None, per: Period, window: Window) -> str:
        """A hash with the fields `requests` and `credits`, in micro-credits. `team`: None for the organisation."""
        scope = "o" if team is None else f"t:{team}"
        return f"{self._prefix}:q:{scope}:{per}:{window.start_s}"

    def price_changes(self, day: date) -> str:
        """A hash; `proxy.quota.price_changes` explains its fields."""
        return f"{self._prefix}:price-changes:{day}"

    def upstream(self, day: date) -> str:
        """A hash with the fields `calls` and `us`: the requests that upstream answered on a day, and their time."""
        return f"{self._prefix}:upstream:{day}"

    def usage(self, team: str, day: date) -> str:
        """A hash; `split_usage_field` explains its fields."""
        return f"{self._prefix}:u:{day}:{team}"


@lru_cache(maxsize=10_000)
def split_usage_field(field: bytes) -> tuple[str, str, str]:
    """Model, outcome and measure: the parts of a field name that `add_usage` in `lua/ledger_decide.lua` writes.

    The measure is `requests` for what counts against quotas, `refused` for what does not, or `credits`, in
    micro-credits. The model is `NO_NAME` where nothing was priced. None of the three contains a colon.

    Cached, because a long report has the same few thousand names in millions of fields.
    """
    model, outcome, measure = field.decode().split(":")
    return model, outcome, measure


class DayKey(NamedTuple):
    """A key that belongs to a day."""

    key: str
    expires_ms: int


_NO_KEY = DayKey("", 0)


class TeamKeys(NamedTuple):
    """The keys of a team's usage on a day and of its rate."""

    id: str
    usage: DayKey
    rate_key: str
    rate: Rate


class QuotaRow(NamedTuple):
    """A quota as the script checks it. `counter`: the number, from 1, of the counter in its counter set."""

    counter: int
    field: str
    limit: int
    refuse: int


@dataclass(frozen=True, eq=False)
class CounterSet:
    """What a team's requests are booked on, or the organisation's, until the first of its windows ends.

    Two counter sets are never equal, even with equal contents.

    valid: the time that lies in all windows.
    expires_ms: when each counter expires, by its store key.
    quotas: of this scope alone.
    team: None for the organisation.
    org: the organisation's counters of the same time; None if these are the organisation's.
    upstream: the organisation's time at upstream; empty for a team.
    policy_field: `RateLimit-Policy` of the team.
    """

    windows: Mapping[Period, Window]
    valid: Window
    expires_ms: Mapping[str, int]
    quotas: Sequence[QuotaRow] = ()
    team: TeamKeys | None = None
    org: "CounterSet | None" = None
    policy_field: bytes = b""
    upstream: DayKey = _NO_KEY


def day_expires_ms(day: date, zone: ZoneInfo) -> int:
    """When what is kept about a day expires."""
    return 1000 * start_of(day + timedelta(days=1 + USAGE_KEPT_DAYS), zone)


def org_counters(keys: LedgerKeys, quotas: Sequence[Quota], at_s: int, zone: ZoneInfo) -> CounterSet:
    """The organisation's counters at an instant; `quotas` are its own."""
    windows = {per: window_of(per, at_s, zone) for per in periods(quotas)}
    valid = _intersection(windows.values())
    day = day_of(at_s, zone)
    upstream = DayKey(keys.upstream(day), day_expires_ms(day, zone))
    expires_ms = _expiries(keys, None, windows)
    return CounterSet(windows, valid, expires_ms, _quota_rows(windows, quotas), upstream=upstream)


def team_counters(keys: LedgerKeys, limits: TeamLimits, org: CounterSet, at_s: int, zone: ZoneInfo) -> CounterSet:
    """A team's counters at an instant. `org`: the organisation's of the same instant."""
    own = [quota for quota in limits.quotas if quota.scope == "team"]
    windows = {per: window_of(per, at_s, zone) for per in periods(own)}
    day = day_of(at_s, zone)
    usage = DayKey(keys.usage(limits.team, day), day_expires_ms(day, zone))
    all_windows = {**org.windows, **windows}
    return CounterSet(
        all_windows,
        _intersection((org.valid, *windows.values())),
        _expiries(keys, limits.team, windows),
        _quota_rows(windows, own),
        TeamKeys(limits.team, usage, keys.rate(limits.team), limits.rate),
        org,
        policy_field(limits, all_windows),
    )


def periods(quotas: Sequence[Quota]) -> tuple[Period, ...]:
    """The periods in which the scope of these quotas is counted, the months last."""
    short = {quota.per for quota in quotas} - set(BASE_PERIODS)
    return (*sorted(short, reverse=True), *BASE_PERIODS)


def _intersection(windows: Iterable[Window]) -> Window:
    starts, ends = zip(*((window.start_s, window.end_s) for window in windows), strict=True)
    return Window(max(starts), min(ends))


def _expiries(keys: LedgerKeys, team: str | None, windows: Mapping[Period, Window]) -> dict[str, int]:
    return {keys.counter(team, per, window): 1000 * (window.end_s + COUNTER_KEPT_S) for per, window in windows.items()}


def _quota_rows(windows: Mapping[Period, Window], quotas: Sequence[Quota]) -> tuple[QuotaRow, ...]:
    numbers = {per: number for number, per in enumerate(windows, 1)}
    return tuple(
        QuotaRow(numbers[quota.per], _FIELDS[quota.measure], quota.limit, int(quota.refuse)) for quota in quotas
    )
