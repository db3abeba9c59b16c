"""Query strings of reports are read strictly, and `Accept` chooses CSV only where it is preferred."""

from datetime import date, timedelta
from itertools import combinations, permutations
from urllib.parse import urlencode

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import given

from proxy.problems import BadRequest, Code
from proxy.quota.counters import USAGE_KEPT_DAYS
from proxy.quota.report_queries import (
    GROUPS,
    Group,
    PriceChangeQuery,
    UsageQuery,
    read_parameters,
    read_price_change_query,
    read_usage_query,
)

TODAY = date(2026, 11, 22)
OLDEST = TODAY - timedelta(days=USAGE_KEPT_DAYS)
NOVEMBER = date(2026, 11, 1), TODAY
ORDERS = [order for size in (1, 2, 3) for chosen in combinations(GROUPS, size) for order in permutations(chosen)]


def read(query: str = "", accept: str | None = None) -> UsageQuery:
    return read_usage_query(query.encode(), accept, today=TODAY)


def read_price_changes(query: str = "", accept: str | None = None) -> PriceChangeQuery:
    return read_price_change_query(query.encode(), accept, today=TODAY)


def refusal(query: str | bytes) -> str:
    with pytest.raises(BadRequest) as caught:
        read_usage_query(query if isinstance(query, bytes) else query.encode(), None, today=TODAY)
    assert caught.value.problem.code is Code.INVALID_QUERY
    assert orjson.loads(caught.value.problem.document("id"))["status"] == 400
    return str(caught.value)


def test_the_default_is_this_month_by_day() -> None:
    assert read() == UsageQuery(*NOVEMBER, ("day",), None, csv=False)


def test_all_parameters_together() -> None:
    asked = read("from=2026-10-05&to=2026-10-07&by=model,team,day&team=design&model=Flux&format=csv")
    days = date(2026, 10, 5), date(2026, 10, 7)
    assert asked == UsageQuery(*days, ("model", "team", "day"), "design", csv=True, model="Flux")


@pytest.mark.parametrize(
    ("query", "first", "last"),
    [
        ("from=2026-11-22", TODAY, TODAY),
        ("from=2026-02-01", date(2026, 2, 1), TODAY),
        ("to=2026-10-15", date(2026, 10, 1), date(2026, 10, 15)),  # 1 November would be after it
        ("to=2026-12-24", date(2026, 11, 1), date(2026, 12, 24)),
        ("from=2026-11-22&to=2026-11-22", TODAY, TODAY),
        ("from=2024-02-29&to=2024-02-29", date(2024, 2, 29), date(2024, 2, 29)),
        ("from=2025-10-19", date(2025, 10, 19), TODAY),  # 400 days with both ends
        ("from=2026%2D11%2d22", TODAY, TODAY),
    ],
)
def test_the_days_of_a_query(query: str, first: date, last: date) -> None:
    asked = read(query)
    assert (asked.first, asked.last) == (first, last)


@pytest.mark.parametrize(
    "text", ["today", "2026-11", "20261101", "2026-W45-1", "2026-11-31", "2026-1-1", "²026-11-01", "2026-11-01 ", "0"]
)
@pytest.mark.parametrize("name", ["from", "to"])
def test_a_malformed_date_is_refused(name: str, text: str) -> None:
    assert refusal(urlencode({name: text})) == f"{name} must be a date, such as 2026-11-01."


def test_a_reversed_or_too_long_range_is_refused() -> None:
    assert refusal("from=2026-11-02&to=2026-11-01") == "from must not be after to, which is 2026-11-01."
    assert "after today, 2026-11-22" in refusal("from=2026-11-23")
    assert "400 days" in refusal("from=2025-10-18")
    assert "400 days" in refusal("from=0001-01-01&to=9999-12-31")


@pytest.mark.parametrize(
    "by", ["hour", "day,day", "day,", ",", "day, team", "weeks", "Day", "day,team,model,day", "outcome"]
)
def test_unknown_or_repeated_groups_are_refused(by: str) -> None:
    assert refusal(urlencode({"by": by})).startswith("by must be some of day, week, month, team and model, each once")


@pytest.mark.parametrize("order", ORDERS)
def test_groups_keep_their_order(order: tuple[Group, ...]) -> None:
    assert read(f"by={','.join(order)}").by == order


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (
            "form=2026-11-01",
            "The parameter 'form' is unknown. Known parameters: from, to, by, team, model, format, dialect.",
        ),
        ("token=ep_secret", "The parameter 'token'"),
        ("From=2026-11-01", "The parameter 'From'"),
        ("=x", "The parameter ''"),
        ("x" * 5000, f"The parameter '{'x' * 40}'"),
        (b"\xff=1", "The parameter"),
        ("%ff=1", "The parameter"),
        ("%00%0a=1", r"The parameter '\x00\n'"),
        ("from=2026-11-01&from=2026-11-01", "from is given twice."),
        ("by=day&by=team", "by is given twice."),
        ("team=", "team is empty"),
        ("to", "to is empty"),
        ("format=xml", "format must be csv or json."),
        ("format=CSV", "format must be csv or json."),
        ("dialect=excel", "dialect must be rfc4180 or excel-semicolon."),
        ("format=json&dialect=excel-semicolon", "dialect is only for CSV: leave it out, or use format=csv."),
    ],
)
def test_bad_parameters_are_refused(query: str | bytes, reason: str) -> None:
    found = refusal(query)
    assert found.startswith(reason)
    assert "secret" not in found
    assert found.isprintable()


def test_parameters_are_decoded() -> None:
    assert read_parameters(b"team=a%20b+c", ("team",)) == {"team": "a b c"}
    assert read_parameters(b"", ("team",)) == {}
    assert read_parameters(b"&&", ("team",)) == {}


@pytest.mark.parametrize(
    ("accept", "wants_csv"),
    [
        (None, False),
        ("", False),
        ("*/*", False),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", False),
        ("application/json", False),
        ("text/csv", True),
        ("Text/CSV; Charset=utf-8; header=present", True),
        ("text/*", True),
        ("text/csv, */*", True),
        ("text/csv, */*;q=0.1", True),
        ("text/csv;q=0.9, */*", False),
        ("text/csv, application/json", False),
        ("application/json;q=0.5, text/csv;q=0.6", True),
        ("application/json;q=0.6, text/csv;q=0.5", False),
        ("text/csv;q=0", False),
        ("text/csv;q=0.000, */*;q=0", False),
        ("text/csv;q=0, text/*", False),
        ("text/csv;q=0.001", True),
        ("text/csv;q=1.5", False),
        ("text/csv;q=-1", False),
        ("text/csv;q=", False),
        ("text/csv;q=nan", False),
        ("text/csv;q=x, application/json;q=0.1", False),
        ("text/csv; Q=0", False),
        ("text/csv;q=0.2, text/csv;header=present;q=0.9, application/json;q=0.5", True),
        (";;,,=", False),
        ("text/csvx, text", False),
    ],
)
def test_accept_chooses_csv_and_format_wins_over_it(accept: str | None, *, wants_csv: bool) -> None:
    assert read("", accept).csv is wants_csv
    assert read("format=csv", accept).csv is True
    assert read("format=json", accept).csv is False


def test_a_dialect_asks_for_csv() -> None:
    for query in ("dialect=excel-semicolon", "dialect=excel-semicolon&format=csv"):
        asked = read(query, "application/json")
        assert (asked.csv, asked.dialect) == (True, "excel-semicolon")
    assert read("dialect=rfc4180").csv


@given(st.binary(max_size=60))
def test_any_query_is_read_or_refused(query: bytes) -> None:
    try:
        asked = read_usage_query(query, None, today=TODAY)
    except BadRequest as error:
        orjson.loads(error.problem.document("id"))
    else:
        assert asked.first <= asked.last


@given(st.text(max_size=60))
def test_any_accept_is_read(accept: str) -> None:
    assert read("", accept).csv in (True, False)


def test_the_default_for_price_changes_is_everything_that_is_kept() -> None:
    assert read_price_changes() == PriceChangeQuery(OLDEST, TODAY, None, csv=False, dialect="rfc4180")
    assert read_price_changes("from=2020-01-01").first == OLDEST


def test_all_parameters_for_price_changes() -> None:
    assert read_price_changes("account=second&from=2026-11-01&dialect=excel-semicolon") == PriceChangeQuery(
        date(2026, 11, 1), TODAY, "second", csv=True, dialect="excel-semicolon"
    )
    assert read_price_changes(accept="text/csv").csv


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("from=2026-11-23", "from must not be after today, which is 2026-11-22."),
        ("from=yesterday", "from must be a date, such as 2026-11-01."),
        ("to=2026-11-01", "The parameter 'to' is unknown. Known parameters: account, from, format, dialect."),
        ("account=", "account is empty"),
        ("format=xml", "format must be csv or json."),
    ],
)
def test_bad_parameters_for_price_changes_are_refused(query: str, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        read_price_changes(query)
