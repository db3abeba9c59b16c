"""Adds up usage: the hashes of teams and days become rows with exact sums.

* The ledger has a hash for each team and day; `proxy.quota.counters.split_usage_field` explains its fields.
* Sums are integers of any size. Each request has one outcome, so the outcomes of a row add up to its `requests` and
  `refused`.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from operator import attrgetter
from typing import Literal, get_args

from proxy.problems import SAVES_CALL, SAVES_TIME, Outcome
from proxy.quota.counters import split_usage_field
from proxy.quota.credits import text_of
from proxy.quota.report_queries import Group
from proxy.quota.upstream_time import UpstreamTime

Sort = Literal["names", "credits", "requests", "refused"]
SORTS: tuple[Sort, ...] = get_args(Sort)

_POSITIONS = {outcome.value: position for position, outcome in enumerate(Outcome)}


@dataclass(frozen=True, slots=True)
class TeamDay:
    """The usage hash of a team on a day."""

    day: date
    team: str
    fields: Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The sums of one group.

    group: its names, in the order of the query's `by`.
    saved_us: the time that upstream would have taken for answers without a request to it, as far as the mean of their
        day is known; None if it is known for no day that has such answers.
    """

    group: tuple[str, ...]
    requests: int
    refused: int
    outcomes: dict[str, int]
    credits_micro: int
    saved_us: int | None = 0

    @property
    def upstream_calls_saved(self) -> int:
        return sum(self.outcomes.get(outcome, 0) for outcome in SAVES_CALL)

    @property
    def upstream_seconds_saved(self) -> str:
        """A decimal number; empty if unknown."""
        return "" if self.saved_us is None else text_of(self.saved_us)


@dataclass(frozen=True, slots=True)
class Usage:
    rows: tuple[UsageRow, ...]
    total: UsageRow


class UsageTotals:
    """Adds up days of teams one by one, so that a report never holds all of them in memory.

    means: the mean time at upstream of each day that has one. model: only this one.
    """

    def __init__(self, by: Sequence[Group], means: Mapping[date, UpstreamTime], model: str | None = None) -> None:
        self._by = by
        self._means = means
        self._model = model
        self._sums: defaultdict[tuple[str, ...], Counter[tuple[str, str]]] = defaultdict(Counter)

    def add(self, team_day: TeamDay) -> None:
        day = team_day.day
        monday = day - timedelta(days=day.weekday())
        names = {"day": str(day), "week": str(monday), "month": f"{day:%Y-%m}", "team": team_day.team}
        by_model: dict[str, Counter[tuple[str, str]]] = {}
        for name, amount in team_day.fields.items():
            model, outcome, measure = split_usage_field(name)
            if amount == b"0" or self._model not in (None, model):
                continue
            if model not in by_model:
                names["model"] = model
                by_model[model] = self._sums[tuple(names[group] for group in self._by)]
            sums = by_model[model]
            sums[outcome, measure] += int(amount)
            if outcome in SAVES_TIME and measure == "requests":
                self._add_saved(sums, outcome, int(amount), day)

    def _add_saved(self, sums: Counter[tuple[str, str]], outcome: str, answers: int, day: date) -> None:
        mean = self._means.get(day)
        if mean is None:
            sums[outcome, "unmeasured"] += answers
        else:
            sums[outcome, "measured"] += answers
            sums[outcome, "saved_us"] += mean.of(answers)

    def usage(self) -> Usage:
        total: Counter[tuple[str, str]] = Counter()
        for sums in self._sums.values():
            total.update(sums)
        return Usage(tuple(_row(group, sums) for group, sums in sorted(self._sums.items())), _row((), total))


def sort_usage(usage: Usage, sort: Sort) -> Usage:
    """Usage with the rows of the highest amounts first; equal ones, and all with `names`, in the order of names."""
    if sort == "names":
        return usage
    amount = attrgetter("credits_micro" if sort == "credits" else sort)
    return replace(usage, rows=tuple(sorted(usage.rows, key=amount, reverse=True)))


def _row(group: tuple[str, ...], sums: Mapping[tuple[str, str], int]) -> UsageRow:
    measures: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for (outcome, measure), amount in sums.items():
        measures[measure] += amount
        if measure in ("requests", "refused"):
            outcomes[outcome] += amount
    ordered = dict(sorted(outcomes.items(), key=_position))
    saved_us = None if measures["unmeasured"] and not measures["measured"] else measures["saved_us"]
    return UsageRow(group, measures["requests"], measures["refused"], ordered, measures["credits"], saved_us)


def _position(counted: tuple[str, int]) -> tuple[int, str]:
    """Outcomes that only a newer version of the gateway knows come last."""
    outcome, _ = counted
    return _POSITIONS.get(outcome, len(_POSITIONS)), outcome
