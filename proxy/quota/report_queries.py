"""Reads the query strings of reports: days, teams, groups, and whether the answer is JSON or CSV.

All public functions raise `BadRequest`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal, get_args
from urllib.parse import parse_qsl

from proxy.problems import BadRequest, Code
from proxy.quota.counters import USAGE_KEPT_DAYS
from proxy.quota.csv_text import DIALECTS, Dialect

Group = Literal["day", "week", "month", "team", "model"]
GROUPS: tuple[Group, ...] = get_args(Group)

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
class PriceChangeQuery:
    """The days from `first` to `last`, both included. `account`: None for all."""

    first: date
    last: date
    account: str | None
    csv: bool
    dialect: Dialect


def read_usage_query(raw_query: bytes, accept: str | None, *, today: date) -> UsageQuery:
    """By default from the first of the month of `to`, by day; `to` is today by default."""
    given = read_parameters(raw_query, ("from", "to", "by", "team", "model", "format", "dialect"))
    last = _day("to", given["to"]) if "to" in given else today
    first = _day("from", given["from"]) if "from" in given else min(last, today).replace(day=1)
    if first > last:
        raise _bad(f"from must not be after {'to, which is' if 'to' in given else 'today,'} {last}.")
    if (last - first).days >= USAGE_KEPT_DAYS:
        raise _bad(f"from must not be more than {USAGE_KEPT_DAYS} days before the end of to: usage is kept no longer.")
    groups, dialect = _groups(given.get("by", "day")), _dialect(given)
    return UsageQuery(first, last, groups, given.get("team"), _wants_csv(given, accept), dialect, given.get("model"))


def read_price_change_query(raw_query: bytes, accept: str | None, *, today: date) -> PriceChangeQuery:
    """The default is everything that is kept."""
    given = read_parameters(raw_query, ("account", "from", "format", "dialect"))
    oldest = today - timedelta(days=USAGE_KEPT_DAYS)
    first = max(oldest, _day("from", given["from"])) if "from" in given else oldest
    if first > today:
        raise _bad(f"from must not be after today, which is {today}.")
    return PriceChangeQuery(first, today, given.get("account"), _wants_csv(given, accept), _dialect(given))


def read_parameters(raw_query: bytes, names: Sequence[str]) -> dict[str, str]:
    """The parameters of a query string, each at most once."""
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
    if len(set(groups)) < len(names):
        raise _bad("by must be some of day, week, month, team and model, each once, joined by commas.")
    return groups


def _dialect(given: Mapping[str, str]) -> Dialect:
    for dialect in DIALECTS:
        if given.get("dialect", "rfc4180") == dialect:
            return dialect
    raise _bad(f"dialect must be {' or '.join(DIALECTS)}.")


def _wants_csv(given: Mapping[str, str], accept: str | None) -> bool:
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
