"""What a ledger is expected to say and to hold: a small model that knows nothing of the package.

* It has no counters. It is a list of entries, each with its moment, and every sum is added up anew.
* Windows are read off a calendar: the same day, the same week, the same month of one time zone.
* The rate is a leaky bucket: each request pours an interval into it, and it leaks as time goes by.
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
"""Counted whether anybody limits them or not."""

MILLION = 1_000_000
PENDING = ("-", "cancelled")
DAYS_KEPT = 30
"""For how long a model keeps its name without being used, in days of UTC."""


@cache
def span(per: str, at_s: int) -> tuple[int, int]:
    """The window of a moment. The zone's clocks are shifted by whole hours, so hours and minutes are those of UTC."""
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
    """At most so much of a measure in each window; one that does not refuse is there to be shown."""

    scope: str
    measure: str
    per: str
    most: int
    refuses: bool

    @property
    def name(self) -> str:
        kind = "requests" if self.measure == "requests" else "credits"
        return f"{'org-' if self.scope == 'org' else ''}{kind}-{self.per}"


@dataclass(frozen=True)
class Deal:
    """What holds for a team: its rate, its limits, and then the organisation's."""

    team: str
    interval_us: int
    burst: int
    limits: tuple[Limit, ...]

    @property
    def counted(self) -> frozenset[tuple[str, str]]:
        """The scopes and windows in which its requests are counted."""
        lasting = {(scope, per) for scope in ("team", "org") for per in LASTING}
        return frozenset(lasting | {(limit.scope, limit.per) for limit in self.limits})


@dataclass(frozen=True)
class Bill:
    """What a request has come to."""

    outcome: str
    micro: int | None = None
    model: str = "-"


@dataclass(eq=False)
class Entry:
    """A request that counts, in the windows of its moment."""

    team: str
    at_us: int
    counted: frozenset[tuple[str, str]]
    row: tuple[str, str] = PENDING
    micro: int = 0

    def amount(self, measure: str) -> int:
        return 1 if measure == "requests" else self.micro

    def windows(self) -> Iterator[tuple[str, str, int]]:
        """The counters that it is in: whose, of which kind, beginning when."""
        for scope, per in self.counted:
            yield ("" if scope == "org" else self.team), per, span(per, self.at_us // MILLION)[0]


@dataclass(frozen=True)
class Said:
    """All that is compared of a verdict. `resets_s` and `used` go with the limits."""

    word: str
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
class Books:
    """The ledger, and the clock that it goes by."""

    now_us: int
    most_names: int
    names: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Of each model with a name of its own: the day of its last use, and the team that brought it."""

    entries: list[Entry] = field(default_factory=list)
    refused: Counter[tuple[date, str, str]] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    """Teams that have ever had usage."""
    _buckets: dict[str, tuple[int, int]] = field(default_factory=dict)

    # -- What can be asked of it

    def charge(self, deal: Deal, bill: Bill) -> Said:
        if not self._has_room(deal):
            return self._refuse(deal, self._too_often(deal))
        if violated := self._violated(deal, 1, bill.micro or 0, begins=True):
            return self._refuse(deal, self._exceeded(deal, violated))
        self._pour(deal)
        return self.say(deal, self.enter(Entry(deal.team, self.now_us, deal.counted), bill))

    def admit(self, deal: Deal) -> tuple[Said, Entry | None]:
        if not self._has_room(deal):
            return self._refuse(deal, self._too_often(deal)), None
        if violated := self._violated(deal, 1, 0, begins=True):
            return self._refuse(deal, self._exceeded(deal, violated)), None
        self._pour(deal)
        entry = Entry(deal.team, self.now_us, deal.counted)
        self._write(entry)
        return self.say(deal), entry

    def settle(self, deal: Deal, entry: Entry, bill: Bill) -> Said:
        self.entries.remove(entry)
        if bill.micro is not None and (violated := self._violated(deal, 1, bill.micro, begins=False)):
            return self._refuse(deal, self._exceeded(deal, violated))
        return self.say(deal, self.enter(Entry(deal.team, self.now_us, deal.counted), bill))

    def refund(self, deal: Deal, entry: Entry, outcome: str) -> Said:
        self.entries.remove(entry)
        self._note(deal.team, outcome)
        return self.say(deal)

    def peek(self, deal: Deal, micro: int | None) -> Said:
        if not self._has_room(deal):
            return self._too_often(deal)
        self._pour(deal)
        violated = self._violated(deal, 1, micro or 0, begins=True)
        return self._exceeded(deal, violated) if violated else self.say(deal)

    def record_uncached(self, deal: Deal, outcome: str) -> Said:
        if not self._has_room(deal):
            return self._refuse(deal, self._too_often(deal))
        self._pour(deal)
        self._note(deal.team, outcome)
        return self.say(deal)

    def enter(self, entry: Entry, bill: Bill) -> str:
        """Books a request with its price, whatever the limits; the name under which that is counted."""
        model = "-" if bill.micro is None else self._named(bill.model, entry.team)
        entry.row, entry.micro = (model, bill.outcome), bill.micro or 0
        self._write(entry)
        return model

    # -- What it holds

    def usage(self) -> dict[tuple[date, str], Counter[str]]:
        """Of each day and team, in the store's spelling."""
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
        counter = "" if limit.scope == "org" else team, limit.per, span(limit.per, self.now_us // MILLION)[0]
        return sum(entry.amount(limit.measure) for entry in self.entries if counter in entry.windows())

    # -- How it is worked out

    def _has_room(self, deal: Deal) -> bool:
        return self._level(deal) + deal.interval_us <= deal.interval_us * deal.burst

    def _pour(self, deal: Deal) -> None:
        self._buckets[deal.team] = (self._level(deal) + deal.interval_us, self.now_us)

    def _level(self, deal: Deal) -> int:
        """Never more than it holds now, whatever it held: nobody waits longer than for one interval."""
        level, at_us = self._buckets.get(deal.team, (0, 0))
        return min(max(0, level - (self.now_us - at_us)), deal.interval_us * deal.burst)

    def _violated(self, deal: Deal, requests: int, micro: int, *, begins: bool) -> list[Limit]:
        def passes(limit: Limit) -> bool:
            used, wanted = self.used(deal.team, limit), requests if limit.measure == "requests" else micro
            return used + wanted > limit.most or (begins and used == limit.most)

        return [limit for limit in deal.limits if limit.refuses and passes(limit)]

    def _write(self, entry: Entry) -> None:
        self.seen.add(entry.team)
        self.entries.append(entry)

    def _note(self, team: str, outcome: str) -> None:
        self.seen.add(team)
        self.refused[day_of(self.now_us // MILLION), team, outcome] += 1

    def _refuse(self, deal: Deal, said: Said) -> Said:
        self._note(deal.team, said.word)
        return said

    def _named(self, model: str, team: str) -> str:
        if model in ("-", "mixed", "other"):
            return model
        today = self.now_us // (86_400 * MILLION)
        if model not in self.names:
            self.names = {name: use for name, use in self.names.items() if today - use[0] <= DAYS_KEPT}
            own = sum(brought_by == team for _, brought_by in self.names.values())
            if len(self.names) == self.most_names or own == self.most_names // 2:
                return "other"
            self.names[model] = today, team
        self.names[model] = today, self.names[model][1]
        return model

    def say(self, deal: Deal, model: str = "-") -> Said:
        used = tuple(self.used(deal.team, limit) for limit in deal.limits)
        resets_s = tuple(span(limit.per, self.now_us // MILLION)[1] for limit in deal.limits)
        tat_offset_us = self._level(deal)
        rate_left = deal.burst - _divided_up(tat_offset_us, deal.interval_us)
        return Said("ok", self.now_us, tat_offset_us, rate_left, used, resets_s, model=model)

    def _too_often(self, deal: Deal) -> Said:
        too_full_us = self._level(deal) + deal.interval_us - deal.interval_us * deal.burst
        retry_after_s = _divided_up(too_full_us, MILLION)
        return replace(self.say(deal), word="rate-limited", status=429, retry_after_s=retry_after_s)

    def _exceeded(self, deal: Deal, violated: list[Limit]) -> Said:
        said = replace(self.say(deal), word="quota-exceeded", violated=tuple(limit.name for limit in violated))
        if violated[0].measure == "estimated_credits":
            return replace(said, status=402)
        left_us = span(violated[0].per, self.now_us // MILLION)[1] * MILLION - self.now_us
        return replace(said, status=429, retry_after_s=_divided_up(left_us, MILLION))


def _divided_up(number: int, by: int) -> int:
    return -(-number // by)


@dataclass(eq=False)
class Ticket:
    """An admitted request. `entry` is None until something of it is on the books."""

    deal: Deal
    at_us: int
    entry: Entry | None


@dataclass
class Process:
    """A gateway's side: what it takes for the time, and what it owes while the ledger is out of reach."""

    books: Books
    skew_us: int = 0
    """By how much its clock is ahead of the ledger's."""
    out: bool = False
    _known_skew_us: int = 0
    _owed: list[tuple[Ticket, Bill | None]] = field(default_factory=list)

    @property
    def knows_the_time(self) -> bool:
        return self.skew_us == self._known_skew_us

    @property
    def owes(self) -> bool:
        return bool(self._owed)

    def hear(self) -> None:
        """Of the ledger's clock."""
        self._known_skew_us = self.skew_us

    def ticket(self, deal: Deal) -> Ticket:
        """Of a request that is admitted unseen, in the windows of the moment that this process takes it for."""
        return Ticket(deal, self.books.now_us + self.skew_us - self._known_skew_us, None)

    def owe(self, ticket: Ticket, bill: Bill | None) -> None:
        """What has become of it is booked later; None: nothing has."""
        if bill is not None or ticket.entry is not None:
            self._owed.append((ticket, bill))

    def pay(self) -> None:
        """Everything that is owed, in the windows in which it was admitted."""
        for ticket, bill in self._owed:
            if ticket.entry is not None:
                self.books.entries.remove(ticket.entry)
            if bill is not None:
                entry = Entry(ticket.deal.team, ticket.at_us, ticket.deal.counted)
                self.books.enter(entry, bill)
        self._owed.clear()
