"""Usage reports: reads the query, adds up the rows, writes them as JSON or CSV.

* The ledger has a hash for each team and day; `proxy.quota.counters.split_usage_field` explains its fields.
* Sums are integers of any size. Each request has one outcome, so the outcomes of a row add up to its `requests` and
  `refused`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import Literal
from urllib.parse import parse_qsl

import orjson

from proxy.problems import SAVES_CALL, SAVES_TIME, BadRequest, Code, Outcome
from proxy.quota.counters import USAGE_KEPT_DAYS, split_usage_field
from proxy.quota.credits import MICRO, Currency, percent_text, text_of
from proxy.quota.csv_text import DIALECTS, Dialect, write_csv
from proxy.quota.upstream_time import UpstreamTime

Group = Literal["day", "week", "month", "team", "model"]
GROUPS: tuple[Group, ...] = ("day", "week", "month", "team", "model")

Sort = Literal["names", "credits", "requests", "refused"]
SORTS: tuple[Sort, ...] = ("names", "credits", "requests", "refused")

_NOT_IN_LEDGER = {
    Outcome.UNAUTHENTICATED,
    Outcome.TEAM_DISABLED,
    Outcome.INVALID,
    Outcome.STORE_UNAVAILABLE,
    Outcome.OVERLOADED,
}
_LATER = (Outcome.OVER_CEILING, Outcome.INFERRED)
OUTCOMES = tuple(outcome.value for outcome in Outcome if outcome not in (*_NOT_IN_LEDGER, *_LATER))
"""The outcomes that the ledger books, in the order of columns."""

SAVED_COLUMNS = ("upstream_calls_saved", "upstream_seconds_saved")

LATER_OUTCOMES = tuple(outcome.value for outcome in _LATER)
"""The outcomes that were added since. Their columns come last, because scripts rely on the order."""

_POSITIONS = {outcome.value: position for position, outcome in enumerate(Outcome)}
_DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")  # RFC 9110 §12.4.2
_CSV_RANGES = ("*/*", "text/*", "text/csv")
_JSON_RANGES = ("*/*", "application/*", "application/json")


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """The days from `first` to `last`, both included. `team`, `model`: None for all of them."""

    first: date
    last: date
    by: tuple[Group, ...]
    team: str | None
    csv: bool
    dialect: Dialect = "rfc4180"
    model: str | None = None


@dataclass(frozen=True, slots=True)
class TeamDirectory:
    """What the settings say about team ids in reports.

    names: the names of teams by their ids, for those that have one.
    current: the id of the configured team by each of its earlier ids (`teams.X.was`).
    """

    names: Mapping[str, str] = field(default_factory=dict)
    current: Mapping[str, str] = field(default_factory=dict)

    def ids_of(self, team: str) -> list[str]:
        """A team's id and its earlier ones."""
        return [team, *(earlier for earlier, current in self.current.items() if current == team)]

    def name_of(self, team: str) -> str:
        """The name of a team, empty if it has none."""
        return self.names.get(team, "")


NO_NAMES = TeamDirectory()


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


def read_usage_query(raw_query: bytes, accept: str | None, *, today: date) -> UsageQuery:
    """Reads a query string. The default is the month of the last day so far, by day. Raises `BadRequest`."""
    given = read_parameters(raw_query, ("from", "to", "by", "team", "model", "format", "dialect"))
    last = read_day("to", given["to"]) if "to" in given else today
    first = read_day("from", given["from"]) if "from" in given else min(last, today).replace(day=1)
    if first > last:
        raise _bad(f"from must not be after {'to, which is' if 'to' in given else 'today,'} {last}.")
    if (last - first).days >= USAGE_KEPT_DAYS:
        raise _bad(f"from must not be more than {USAGE_KEPT_DAYS} days before the end of to: usage is kept no longer.")
    groups, dialect = _groups(given.get("by", "day")), read_dialect(given)
    csv = wants_csv(given, accept)
    return UsageQuery(first, last, groups, given.get("team"), csv, dialect, given.get("model"))


def read_parameters(raw_query: bytes, names: Sequence[str]) -> dict[str, str]:
    """The parameters of a query string, each at most once. Raises `BadRequest`."""
    found: dict[str, str] = {}
    for name, value in parse_qsl(raw_query.decode("utf-8", "replace"), keep_blank_values=True):
        if name not in names:
            raise _bad(f"The parameter {name[:40]!r} is unknown. Known parameters: {', '.join(names)}.")
        if name in found:
            raise _bad(f"{name} is given twice.")
        if not value:
            raise _bad(f"{name} is empty: give it a value, or leave it out.")
        found[name] = value
    return found


def sort_usage(usage: Usage, sort: Sort) -> Usage:
    """Usage with the rows of the highest amounts first; equal ones, and all with `names`, in the order of names."""
    if sort == "names":
        return usage
    measure = {"credits": "credits_micro", "requests": "requests", "refused": "refused"}[sort]
    return replace(usage, rows=tuple(sorted(usage.rows, key=lambda row: -int(getattr(row, measure)))))


def share_of(row: UsageRow, usage: Usage) -> str:
    """The row's percentage of all estimated credits; empty if there are none."""
    return percent_text(row.credits_micro, usage.total.credits_micro)


def json_of(
    usage: Usage,
    query: UsageQuery,
    timezone: str,
    directory: TeamDirectory = NO_NAMES,
    currency: Currency | None = None,
) -> bytes:
    """Usage as a JSON document. Credits and money are exact decimal numbers."""
    rows = [_row_members(row, usage, query.by, directory) | _money(row, currency) | _saved(row) for row in usage.rows]
    document = {
        "from": query.first,
        "to": query.last,
        "timezone": timezone,
        "by": query.by,
        "rows": rows,
        "total": _members(usage.total) | _money(usage.total, currency) | _saved(usage.total),
    }
    if currency is not None:
        document["currency"] = {"code": currency.code, "per_credit": orjson.Fragment(currency.exact_text(MICRO))}
    return orjson.dumps(document)


def csv_of(
    usage: Usage,
    by: Sequence[Group],
    directory: TeamDirectory = NO_NAMES,
    currency: Currency | None = None,
    dialect: Dialect = "rfc4180",
) -> bytes:
    """Usage as CSV. No total row: summing a column would count it twice."""
    return write_csv(cells_of(usage, by, directory, currency), names=("team", "model", "team_name"), dialect=dialect)


def cells_of(
    usage: Usage, by: Sequence[Group], directory: TeamDirectory = NO_NAMES, currency: Currency | None = None
) -> list[list[str]]:
    """Usage as rows of text, the header first. The columns depend on `by` and on the currency alone."""
    header = [*by, "requests", "refused", "estimated_credits", *OUTCOMES, "share_percent"]
    rows = [[*row.group, *amounts_of(row, OUTCOMES), share_of(row, usage)] for row in usage.rows]
    if "team" in by:
        header.append("team_name")
        for cells in rows:
            cells.append(directory.name_of(cells[by.index("team")]))
    if currency is not None:
        header.append(f"derived_cost_{currency.code}")
        for cells, row in zip(rows, usage.rows, strict=True):
            cells.append(currency.exact_text(row.credits_micro))
    header += (*SAVED_COLUMNS, *LATER_OUTCOMES)
    for cells, row in zip(rows, usage.rows, strict=True):
        cells += [str(row.upstream_calls_saved), row.upstream_seconds_saved, *counts_of(row, LATER_OUTCOMES)]
    return [header, *rows]


def amounts_of(row: UsageRow, outcomes: Sequence[str]) -> list[str]:
    """A row's requests, refused requests and credits, and the count of each of these outcomes."""
    return [str(row.requests), str(row.refused), text_of(row.credits_micro), *counts_of(row, outcomes)]


def counts_of(row: UsageRow, outcomes: Sequence[str]) -> list[str]:
    return [str(row.outcomes.get(outcome, 0)) for outcome in outcomes]


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


def _row_members(row: UsageRow, usage: Usage, by: Sequence[Group], directory: TeamDirectory) -> dict[str, object]:
    names: dict[str, str] = dict(zip(by, row.group, strict=True))
    team_name = {"team_name": directory.name_of(names["team"])} if "team" in names else {}
    return {**names, **_members(row), "share_percent": orjson.Fragment(share_of(row, usage) or "null"), **team_name}


def _money(row: UsageRow, currency: Currency | None) -> dict[str, object]:
    return {} if currency is None else {"derived_cost": orjson.Fragment(currency.exact_text(row.credits_micro))}


def _members(row: UsageRow) -> dict[str, object]:
    return {
        "requests": row.requests,
        "refused": row.refused,
        "estimated_credits": orjson.Fragment(text_of(row.credits_micro)),
        "outcomes": row.outcomes,
    }


def _saved(row: UsageRow) -> dict[str, object]:
    seconds = orjson.Fragment(row.upstream_seconds_saved or "null")
    return dict(zip(SAVED_COLUMNS, (row.upstream_calls_saved, seconds), strict=True))


def read_day(name: str, text: str) -> date:
    """A parameter that is a day. Raises `BadRequest`."""
    try:
        if _DAY.fullmatch(text):  # `fromisoformat` reads weeks too
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise _bad(f"{name} must be a date, such as 2026-11-01.")


def _groups(text: str) -> tuple[Group, ...]:
    names = text.split(",")
    groups = tuple(group for name in names for group in GROUPS if group == name)
    if len(groups) < len(names) or len(set(groups)) < len(groups):
        raise _bad("by must be some of day, week, month, team and model, each once, joined by commas.")
    return groups


def read_dialect(given: Mapping[str, str]) -> Dialect:
    """The parameter `dialect`. Raises `BadRequest`."""
    for dialect in DIALECTS:
        if given.get("dialect", "rfc4180") == dialect:
            return dialect
    raise _bad(f"dialect must be {' or '.join(DIALECTS)}.")


def wants_csv(given: Mapping[str, str], accept: str | None) -> bool:
    """`format` wins over `dialect`, which implies CSV, and both win over `Accept`.

    There, CSV needs a higher weight than JSON, or a more specific range.
    """
    if "format" in given:
        if given["format"] not in ("csv", "json"):
            raise _bad("format must be csv or json.")
        if given["format"] == "json" and "dialect" in given:
            raise _bad("dialect is only for CSV: leave it out, or use format=csv.")
        return given["format"] == "csv"
    if "dialect" in given:
        return True
    ranges = _media_ranges(accept or "")
    wanted = _quality(ranges, _CSV_RANGES)
    return wanted[0] > 0 and wanted > _quality(ranges, _JSON_RANGES)


def _quality(ranges: Mapping[str, float], matching: Sequence[str]) -> tuple[float, int]:
    """Weight and specificity of the most specific of the `matching` ranges (RFC 9110 §12.5.1)."""
    found = [(ranges[name], specificity) for specificity, name in enumerate(matching) if name in ranges]
    return found[-1] if found else (0.0, 0)


def _media_ranges(accept: str) -> dict[str, float]:
    """The ranges of an `Accept` header with their weights. Malformed ones are ignored."""
    ranges: dict[str, float] = {}
    for part in accept.lower().split(","):
        name, *parameters = (text.strip() for text in part.split(";"))
        weights = [text.removeprefix("q=") for text in parameters if text.startswith("q=")] or ["1"]
        if _QUALITY.fullmatch(weights[0]):
            ranges[name] = max(float(weights[0]), ranges.get(name, 0.0))
    return ranges


def _bad(detail: str) -> BadRequest:
    return BadRequest(Code.INVALID_QUERY, detail)
