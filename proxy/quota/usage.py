"""Usage reports: reads the query, adds up the rows, writes them as JSON or CSV.

* The ledger has a hash for each team and day; `proxy.quota.counters.split_usage_field` explains its fields.
* Sums are integers of any size. Each request has one outcome, so the outcomes of a row add up to its `requests` and
  `refused`.
"""

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from io import StringIO
from typing import Literal
from urllib.parse import parse_qsl

import orjson

from proxy.problems import NO_NAME, BadRequest, Code, Outcome
from proxy.quota.counters import USAGE_KEPT_DAYS, split_usage_field
from proxy.quota.credits import text_of

Group = Literal["day", "team", "model"]
GROUPS: tuple[Group, ...] = ("day", "team", "model")

_NOT_IN_LEDGER = {
    Outcome.UNAUTHENTICATED,
    Outcome.TEAM_DISABLED,
    Outcome.INVALID,
    Outcome.STORE_UNAVAILABLE,
    Outcome.OVERLOADED,
}
OUTCOMES = tuple(outcome.value for outcome in Outcome if outcome not in _NOT_IN_LEDGER)
"""The outcomes that the ledger books, in the order of columns."""

FORMULA_CHARACTERS = "=+-@\t\r\n"
"""Spreadsheets may run a cell that begins with one of these (OWASP, CSV Injection)."""

_POSITIONS = {outcome: position for position, outcome in enumerate(OUTCOMES)}
_DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")  # RFC 9110 §12.4.2
_CSV_RANGES = ("*/*", "text/*", "text/csv")
_JSON_RANGES = ("*/*", "application/*", "application/json")


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """The days from `first` to `last`, both included. `team`: None for all teams."""

    first: date
    last: date
    by: tuple[Group, ...]
    team: str | None
    csv: bool


@dataclass(frozen=True, slots=True)
class TeamDay:
    """The usage hash of a team on a day."""

    day: date
    team: str
    fields: Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The sums of one group. `group`: its names, in the order of the query's `by`."""

    group: tuple[str, ...]
    requests: int
    refused: int
    outcomes: dict[str, int]
    credits_micro: int


@dataclass(frozen=True, slots=True)
class Usage:
    rows: tuple[UsageRow, ...]
    total: UsageRow


class UsageTotals:
    """Adds up days of teams one by one, so that a report never holds all of them in memory."""

    def __init__(self, by: Sequence[Group]) -> None:
        self._by = by
        self._sums: defaultdict[tuple[str, ...], Counter[tuple[str, str]]] = defaultdict(Counter)

    def add(self, team_day: TeamDay) -> None:
        names = {"day": team_day.day.isoformat(), "team": team_day.team}
        for field, amount in team_day.fields.items():
            if amount != b"0":
                names["model"], outcome, measure = split_usage_field(field)
                self._sums[tuple(names[group] for group in self._by)][outcome, measure] += int(amount)

    def usage(self) -> Usage:
        total: Counter[tuple[str, str]] = Counter()
        for sums in self._sums.values():
            total.update(sums)
        return Usage(tuple(_row(group, sums) for group, sums in sorted(self._sums.items())), _row((), total))


def read_usage_query(raw_query: bytes, accept: str | None, *, today: date) -> UsageQuery:
    """Reads a query string. The default is the month of the last day so far, by day. Raises `BadRequest`."""
    given = read_parameters(raw_query, ("from", "to", "by", "team", "format"))
    last = _day("to", given["to"]) if "to" in given else today
    first = _day("from", given["from"]) if "from" in given else min(last, today).replace(day=1)
    if first > last:
        raise _bad(f"from must not be after to, which is {last}.")
    if (last - first).days >= USAGE_KEPT_DAYS:
        raise _bad(f"from must not be more than {USAGE_KEPT_DAYS} days before the end of to: usage is kept no longer.")
    return UsageQuery(first, last, _groups(given.get("by", "day")), given.get("team"), _wants_csv(given, accept))


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


def json_of(usage: Usage, query: UsageQuery, timezone: str) -> bytes:
    """Usage as a JSON document. Credits are exact decimal numbers."""
    rows = [dict(zip(query.by, row.group, strict=True)) | _members(row) for row in usage.rows]
    document = {
        "from": query.first,
        "to": query.last,
        "timezone": timezone,
        "by": query.by,
        "rows": rows,
        "total": _members(usage.total),
    }
    return orjson.dumps(document)


def csv_of(usage: Usage, by: Sequence[Group]) -> bytes:
    """Usage as CSV (RFC 4180). Without the total, which a sum over a column would count twice."""
    text = StringIO(newline="")
    writer = csv.writer(text)
    header, *rows = cells_of(usage, by)
    writer.writerow(header)
    writer.writerows([*map(_escape_formula, row[: len(by)]), *row[len(by) :]] for row in rows)
    return text.getvalue().encode()


def cells_of(usage: Usage, by: Sequence[Group]) -> list[list[str]]:
    """Usage as rows of text, the header first. The columns do not depend on the content."""
    header = [*by, "requests", "refused", "estimated_credits", *OUTCOMES]
    return [header, *([*row.group, *amounts_of(row, OUTCOMES)] for row in usage.rows)]


def amounts_of(row: UsageRow, outcomes: Sequence[str]) -> list[str]:
    """A row's requests, refused requests and credits, and the count of each of these outcomes."""
    counts = (str(row.outcomes.get(outcome, 0)) for outcome in outcomes)
    return [str(row.requests), str(row.refused), text_of(row.credits_micro), *counts]


def _row(group: tuple[str, ...], sums: Mapping[tuple[str, str], int]) -> UsageRow:
    measures: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for (outcome, measure), amount in sums.items():
        measures[measure] += amount
        if measure != "credits":
            outcomes[outcome] += amount
    ordered = dict(sorted(outcomes.items(), key=_position))
    return UsageRow(group, measures["requests"], measures["refused"], ordered, measures["credits"])


def _position(counted: tuple[str, int]) -> tuple[int, str]:
    """Outcomes that only a newer version of the gateway knows come last."""
    outcome, _ = counted
    return _POSITIONS.get(outcome, len(_POSITIONS)), outcome


def _members(row: UsageRow) -> dict[str, object]:
    return {
        "requests": row.requests,
        "refused": row.refused,
        "estimated_credits": orjson.Fragment(text_of(row.credits_micro)),
        "outcomes": row.outcomes,
    }


def _escape_formula(cell: str) -> str:
    """A cell that no spreadsheet runs, as OWASP advises. A single `-` is not a formula, and stays as it is."""
    return f"'{cell}" if cell[:1] in FORMULA_CHARACTERS and cell != NO_NAME else cell


def _day(name: str, text: str) -> date:
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
        raise _bad("by must be some of day, team and model, each once, joined by commas.")
    return groups


def _wants_csv(given: Mapping[str, str], accept: str | None) -> bool:
    """`format` wins over `Accept`, where CSV needs a higher weight than JSON, or a more specific range."""
    if "format" in given:
        if given["format"] not in ("csv", "json"):
            raise _bad("format must be csv or json.")
        return given["format"] == "csv"
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
