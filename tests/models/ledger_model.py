"""Reference model of the ledger: its expected verdicts and counters, without any code of the package.

* It has no counters, only a list of entries with their times. Every sum is computed from the list.
* Windows are calendar days, weeks and months of one time zone.
* The rate is a leaky bucket: each request adds one interval, and the level falls with the time that passes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo

ZONE = ZoneInfo("Europe/Berlin")
PERS = ("minute", "hour", "day", "week", "month")
LASTING = ("day", "week", "month")
"""Windows that are counted with or without a limit."""

MILLION = 1_000_000
PENDING = ("-", "cancelled")
DAYS_KEPT = 30
"""Days of UTC after which an unused model loses its name."""


@cache
def window_of(per: str, at_s: int) -> tuple[int, int]:
    """Returns begin and end of the window at `at_s`. The zone's offset is whole hours, so hours are those of UTC."""
    if per in ("minute", "hour"):
        length_s = 60 if per == "minute" else 3600
        return at_s - at_s % length_s, at_s - at_s % length_s + length_s
    today = day_of(at_s)
    monday, first = today - timedelta(days=today.weekday()), today.replace(day=1)
    begin, end = {
        "day": (today, today + timedelta(days=1)),
        "week": (monday, monday + timedelta(days=7)),
        "month": (first, date(first.year + first.month // 12, first.month % 12 + 1, 1)),
    }[per]
    return _midnight(begin), _midnight(end)


@cache
def day_of(at_s: int) -> date:
    return datetime.fromtimestamp(at_s, ZONE).date()


def _midnight(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=ZONE).timestamp())


@dataclass(frozen=True)
class Limit:
    """The highest amount of a measure in each window; `refuses` false: it only warns."""

    scope: str
    measure: str
    per: str
    max_amount: int
    refuses: bool

    @property
    def name(self) -> str:
        kind = "requests" if self.measure == "requests" else "credits"
        return f"{'org-' if self.scope == 'org' else ''}{kind}-{self.per}"


@dataclass(frozen=True)
class TeamPolicy:
    """A team's rate and limits: first its own, then the organisation's."""

    team: str
    interval_us: int
    burst: int
    limits: tuple[Limit, ...]

    @property
    def counted(self) -> frozenset[tuple[str, str]]:
        """The scopes and windows that count its requests."""
        lasting = {(scope, per) for scope in ("team", "org") for per in LASTING}
        return frozenset(lasting | {(limit.scope, limit.per) for limit in self.limits})


@dataclass(frozen=True)
class Cost:
    """A request's outcome, and its price in micro-credits if it has one."""

    outcome: str
    micro: int | None = None
    model: str = "-"

    @property
    def booked(self) -> "Cost":
        """Nobody pays for an estimate over its ceiling."""
        return Cost(self.outcome) if self.outcome == "over-ceiling" else self


@dataclass(eq=False)
class Entry:
    """A counted request, in the windows of its time."""

    team: str
    at_us: int
    counted: frozenset[tuple[str, str]]
    row: tuple[str, str] = PENDING
    micro: int = 0

    def amount(self, measure: str) -> int:
        return 1 if measure == "requests" else self.micro

    def windows(self) -> Iterator[tuple[str, str, int]]:
        """Yields the counters that include it: owner (`""` is the organisation), period, begin."""
        for scope, per in self.counted:
            yield ("" if scope == "org" else self.team), per, window_of(per, self.at_us // MILLION)[0]


@dataclass(frozen=True)
class Verdict:
    """The compared parts of a verdict. `resets_s` and `used` are in the order of the limits."""

    code: str
    now_us: int
    tat_offset_us: int
    rate_left: int
    used: tuple[int, ...]
    resets_s: tuple[int, ...]
    violated: tuple[str, ...] = ()
    status: int = 200
    retry_after_s: int | None = None
    model: str = "-"


@dataclass
class ModelLedger:
    """The ledger, and the store's clock."""

    now_us: int
    max_names: int
    names: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By model: the day of its last use, and the team that used it first."""

    entries: list[Entry] = field(default_factory=list)
    refused: Counter[tuple[date, str, str]] = field(default_factory=Counter)
    teams: set[str] = field(default_factory=set)
    """Teams with any usage so far."""
    _buckets: dict[str, tuple[int, int]] = field(default_factory=dict)

    # -- Operations

    def charge(self, policy: TeamPolicy, cost: Cost) -> Verdict:
        if not self._conforms(policy):
            return self._refuse(policy, self._too_often(policy))
        if violated := self._violated(policy, 1, cost.micro or 0, begins=True):
            return self._refuse(policy, self._exceeded(policy, violated))
        self._pour(policy)
        return self.ok_verdict(policy, self.book(Entry(policy.team, self.now_us, policy.counted), cost))

    def admit(self, policy: TeamPolicy) -> tuple[Verdict, Entry | None]:
        if not self._conforms(policy):
            return self._refuse(policy, self._too_often(policy)), None
        if violated := self._violated(policy, 1, 0, begins=True):
            return self._refuse(policy, self._exceeded(policy, violated)), None
        self._pour(policy)
        entry = Entry(policy.team, self.now_us, policy.counted)
        self._write(entry)
        return self.ok_verdict(policy), entry

    def settle(self, policy: TeamPolicy, entry: Entry, cost: Cost) -> Verdict:
        self.entries.remove(entry)
        if cost.micro is not None and (violated := self._violated(policy, 1, cost.micro, begins=False)):
            return self._refuse(policy, self._exceeded(policy, violated))
        return self.ok_verdict(policy, self.book(Entry(policy.team, self.now_us, policy.counted), cost.booked))

    def refund(self, policy: TeamPolicy, entry: Entry, cost: Cost) -> Verdict:
        self.entries.remove(entry)
        if cost.micro is not None and (violated := self._violated(policy, 1, cost.micro, begins=False)):
            return self._refuse(policy, self._exceeded(policy, violated))
        return self._refuse(policy, replace(self.ok_verdict(policy), code=cost.outcome))

    def release(self, entry: Entry) -> None:
        self.entries.remove(entry)

    def over_ceiling(self, policy: TeamPolicy, micro: int) -> Verdict:
        if not self._conforms(policy):
            return self._refuse(policy, self._too_often(policy))
        if violated := self._violated(policy, 1, micro, begins=True):
            return self._refuse(policy, self._exceeded(policy, violated))
        self._pour(policy)
        self._record_refusal(policy.team, "over-ceiling")
        return self.ok_verdict(policy)

    def peek(self, policy: TeamPolicy, micro: int | None) -> Verdict:
        if not self._conforms(policy):
            return self._too_often(policy)
        self._pour(policy)
        violated = self._violated(policy, 1, micro or 0, begins=True)
        return self._exceeded(policy, violated) if violated else self.ok_verdict(policy)

    def use_rate(self, policy: TeamPolicy) -> Verdict:
        if not self._conforms(policy):
            return self._refuse(policy, self._too_often(policy))
        self._pour(policy)
        return self.ok_verdict(policy)

    def record_uncached(self, policy: TeamPolicy, outcome: str) -> Verdict:
        if not self._conforms(policy):
            return self._refuse(policy, self._too_often(policy))
        self._pour(policy)
        self._record_refusal(policy.team, outcome)
        return self.ok_verdict(policy)

    def book(self, entry: Entry, cost: Cost) -> str:
        """Books a request without a check of the limits, and returns the model's name in the usage."""
        model = "-" if cost.micro is None else self._usage_name(cost.model, entry.team)
        entry.row, entry.micro = (model, cost.outcome), cost.micro or 0
        self._write(entry)
        return model

    # -- Stored state

    def usage(self) -> dict[tuple[date, str], Counter[str]]:
        """Returns the usage rows by day and team, with the store's field names."""
        rows: dict[tuple[date, str], Counter[str]] = {}
        for entry in self.entries:
            row, name = rows.setdefault((day_of(entry.at_us // MILLION), entry.team), Counter()), ":".join(entry.row)
            row.update({f"{name}:requests": 1, f"{name}:credits": entry.micro})
        for (day, team, outcome), times in self.refused.items():
            rows.setdefault((day, team), Counter())[f"-:{outcome}:refused"] += times
        return {of: +row for of, row in rows.items()}

    def counters(self) -> dict[tuple[str, str, int], Counter[str]]:
        counters: dict[tuple[str, str, int], Counter[str]] = {}
        for entry in self.entries:
            for window in entry.windows():
                counters.setdefault(window, Counter()).update(requests=1, credits=entry.micro)
        return {window: +counter for window, counter in counters.items()}

    def used(self, team: str, limit: Limit) -> int:
        counter = "" if limit.scope == "org" else team, limit.per, window_of(limit.per, self.now_us // MILLION)[0]
        return sum(entry.amount(limit.measure) for entry in self.entries if counter in entry.windows())

    # -- Rules

    def _conforms(self, policy: TeamPolicy) -> bool:
        return self._level(policy) + policy.interval_us <= policy.interval_us * policy.burst

    def _pour(self, policy: TeamPolicy) -> None:
        self._buckets[policy.team] = (self._level(policy) + policy.interval_us, self.now_us)

    def _level(self, policy: TeamPolicy) -> int:
        """The level is capped at the current size of the bucket, so nobody waits longer than one interval."""
        level, at_us = self._buckets.get(policy.team, (0, 0))
        return min(max(0, level - (self.now_us - at_us)), policy.interval_us * policy.burst)

    def _violated(self, policy: TeamPolicy, requests: int, micro: int, *, begins: bool) -> list[Limit]:
        def exceeds(limit: Limit) -> bool:
            used, requested = self.used(policy.team, limit), requests if limit.measure == "requests" else micro
            return used + requested > limit.max_amount or (begins and used == limit.max_amount)

        return [limit for limit in policy.limits if limit.refuses and exceeds(limit)]

    def _write(self, entry: Entry) -> None:
        self.teams.add(entry.team)
        self.entries.append(entry)

    def _record_refusal(self, team: str, outcome: str) -> None:
        self.teams.add(team)
        self.refused[day_of(self.now_us // MILLION), team, outcome] += 1

    def _refuse(self, policy: TeamPolicy, verdict: Verdict) -> Verdict:
        self._record_refusal(policy.team, verdict.code)
        return verdict

    def _usage_name(self, model: str, team: str) -> str:
        if model in ("-", "mixed", "other"):
            return model
        today = self.now_us // (86_400 * MILLION)
        if model not in self.names:
            self.names = {name: use for name, use in self.names.items() if today - use[0] <= DAYS_KEPT}
            own = sum(first_team == team for _, first_team in self.names.values())
            if len(self.names) == self.max_names or own == self.max_names // 2:
                return "other"
            self.names[model] = today, team
        self.names[model] = today, self.names[model][1]
        return model

    def ok_verdict(self, policy: TeamPolicy, model: str = "-") -> Verdict:
        used = tuple(self.used(policy.team, limit) for limit in policy.limits)
        resets_s = tuple(window_of(limit.per, self.now_us // MILLION)[1] for limit in policy.limits)
        tat_offset_us = self._level(policy)
        rate_left = policy.burst - _ceil_div(tat_offset_us, policy.interval_us)
        return Verdict("ok", self.now_us, tat_offset_us, rate_left, used, resets_s, model=model)

    def _too_often(self, policy: TeamPolicy) -> Verdict:
        too_full_us = self._level(policy) + policy.interval_us - policy.interval_us * policy.burst
        retry_after_s = _ceil_div(too_full_us, MILLION)
        return replace(self.ok_verdict(policy), code="rate-limited", status=429, retry_after_s=retry_after_s)

    def _exceeded(self, policy: TeamPolicy, violated: list[Limit]) -> Verdict:
        verdict = replace(
            self.ok_verdict(policy), code="quota-exceeded", violated=tuple(limit.name for limit in violated)
        )
        if violated[0].measure == "estimated_credits":
            return replace(verdict, status=402)
        left_us = window_of(violated[0].per, self.now_us // MILLION)[1] * MILLION - self.now_us
        return replace(verdict, status=429, retry_after_s=_ceil_div(left_us, MILLION))


def _ceil_div(number: int, by: int) -> int:
    return -(-number // by)


@dataclass(eq=False)
class Admission:
    """An admitted request. `entry` is None while the ledger has not booked it."""

    policy: TeamPolicy
    at_us: int
    entry: Entry | None


@dataclass
class Process:
    """A gateway's state: its clock, and the debits that it buffers while the ledger is unreachable."""

    model_ledger: ModelLedger
    skew_us: int = 0
    """How far its clock is ahead of the ledger's."""
    ledger_down: bool = False
    _synced_skew_us: int = 0
    _buffered: list[tuple[Admission, Cost | None]] = field(default_factory=list)

    @property
    def clock_is_synced(self) -> bool:
        return self.skew_us == self._synced_skew_us

    @property
    def has_buffered(self) -> bool:
        return bool(self._buffered)

    def sync_clock(self) -> None:
        """Learns the offset of the ledger's clock from a reply."""
        self._synced_skew_us = self.skew_us

    def admission(self, policy: TeamPolicy) -> Admission:
        """Admits a request without the ledger, in the windows of this process's estimate of the time."""
        return Admission(policy, self.model_ledger.now_us + self.skew_us - self._synced_skew_us, None)

    def buffer(self, admission: Admission, cost: Cost | None) -> None:
        """Buffers a settlement, or a refund if `bill` is None."""
        if cost is not None or admission.entry is not None:
            self._buffered.append((admission, cost))

    def flush(self) -> None:
        """Books everything that is buffered, in the windows of its admission."""
        for admission, cost in self._buffered:
            if admission.entry is not None:
                self.model_ledger.entries.remove(admission.entry)
            if cost is not None:
                entry = Entry(admission.policy.team, admission.at_us, admission.policy.counted)
                self.model_ledger.book(entry, cost.booked)
        self._buffered.clear()
