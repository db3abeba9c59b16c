"""Writes usage as JSON, as CSV, and as rows of text."""

from collections.abc import Sequence

import orjson

from proxy.problems import Outcome
from proxy.quota.credits import MICRO, Currency, percent_text, text_of
from proxy.quota.csv_text import Dialect, write_csv
from proxy.quota.report_queries import Group, UsageQuery
from proxy.quota.team_directory import NO_NAMES, TeamDirectory
from proxy.quota.usage import Usage, UsageRow

_NOT_IN_LEDGER = {
    Outcome.UNAUTHENTICATED,
    Outcome.TEAM_DISABLED,
    Outcome.INVALID,
    Outcome.STORE_UNAVAILABLE,
    Outcome.OVERLOADED,
}
_LATER = (Outcome.OVER_CEILING, Outcome.INFERRED)
OUTCOMES = tuple(outcome.value for outcome in Outcome if outcome not in (*_NOT_IN_LEDGER, *_LATER))
"""The outcomes that the ledger books, except for `LATER_OUTCOMES`, in the order of columns."""

LATER_OUTCOMES = tuple(outcome.value for outcome in _LATER)
"""Outcomes that came after the order of columns was published. Theirs are last, because scripts rely on that order."""

SAVED_COLUMNS = ("upstream_calls_saved", "upstream_seconds_saved")


def json_of(
    usage: Usage,
    query: UsageQuery,
    timezone: str,
    directory: TeamDirectory = NO_NAMES,
    currency: Currency | None = None,
) -> bytes:
    """Usage as a JSON document. Credits and money are exact decimal numbers."""
    document = {
        "from": query.first,
        "to": query.last,
        "timezone": timezone,
        "by": query.by,
        "rows": [_row_members(row, usage, query.by, directory, currency) for row in usage.rows],
        "total": _amounts(usage.total) | _derived(usage.total, currency),
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
    if "team" in by:
        header.append("team_name")
    if currency is not None:
        header.append(f"derived_cost_{currency.code}")
    rows = []
    for row in usage.rows:
        cells = [*row.group, *amounts_of(row, OUTCOMES), share_of(row, usage)]
        if "team" in by:
            cells.append(directory.name_of(row.group[by.index("team")]))
        if currency is not None:
            cells.append(currency.exact_text(row.credits_micro))
        rows.append([*cells, str(row.upstream_calls_saved), row.upstream_seconds_saved, *_counts(row, LATER_OUTCOMES)])
    return [[*header, *SAVED_COLUMNS, *LATER_OUTCOMES], *rows]


def amounts_of(row: UsageRow, outcomes: Sequence[str]) -> list[str]:
    """A row's requests, refused requests and credits, and the count of each of these outcomes."""
    return [str(row.requests), str(row.refused), text_of(row.credits_micro), *_counts(row, outcomes)]


def share_of(row: UsageRow, usage: Usage) -> str:
    """The row's percentage of all estimated credits; empty if there are none."""
    return percent_text(row.credits_micro, usage.total.credits_micro)


def _counts(row: UsageRow, outcomes: Sequence[str]) -> list[str]:
    return [str(row.outcomes.get(outcome, 0)) for outcome in outcomes]


def _row_members(
    row: UsageRow, usage: Usage, by: Sequence[Group], directory: TeamDirectory, currency: Currency | None
) -> dict[str, object]:
    names: dict[str, str] = dict(zip(by, row.group, strict=True))
    members = {**names, **_amounts(row), "share_percent": orjson.Fragment(share_of(row, usage) or "null")}
    if "team" in names:
        members["team_name"] = directory.name_of(names["team"])
    return members | _derived(row, currency)


def _amounts(row: UsageRow) -> dict[str, object]:
    """The amounts that the ledger has booked."""
    return {
        "requests": row.requests,
        "refused": row.refused,
        "estimated_credits": orjson.Fragment(text_of(row.credits_micro)),
        "outcomes": row.outcomes,
    }


def _derived(row: UsageRow, currency: Currency | None) -> dict[str, object]:
    """What is computed from these amounts: money, and what was saved."""
    money = {} if currency is None else {"derived_cost": orjson.Fragment(currency.exact_text(row.credits_micro))}
    saved = (row.upstream_calls_saved, orjson.Fragment(row.upstream_seconds_saved or "null"))
    return {**money, **dict(zip(SAVED_COLUMNS, saved, strict=True))}
