"""Usage: sums are exact for every grouping, and CSV contains no formulas."""

import csv
import json
from collections import Counter
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from fractions import Fraction
from io import StringIO
from itertools import combinations, permutations
from typing import Any

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import given

from proxy.problems import Outcome
from proxy.quota.csv_text import FORMULA_CHARACTERS
from proxy.quota.report_queries import GROUPS, Group, UsageQuery
from proxy.quota.team_directory import TeamDirectory
from proxy.quota.upstream_time import UpstreamTime
from proxy.quota.usage import Sort, TeamDay, Usage, UsageRow, UsageTotals, sort_usage
from proxy.quota.usage_report import LATER_OUTCOMES, OUTCOMES, SAVED_COLUMNS, cells_of, csv_of, json_of, share_of

TODAY = date(2026, 11, 22)
NOVEMBER = date(2026, 11, 1), TODAY
ORDERS = [order for size in (1, 2, 3) for chosen in combinations(GROUPS, size) for order in permutations(chosen)]

MODELS = st.one_of(
    st.sampled_from(["-", "mixed", "other", "Flux", "-1-1", "- x"]),
    st.text("ABCz09 ._-", min_size=1, max_size=64),
)
FIELDS = st.tuples(
    MODELS, st.sampled_from([*OUTCOMES, *LATER_OUTCOMES]), st.sampled_from(["requests", "refused", "credits"])
)
AMOUNTS = st.one_of(st.integers(0, 3), st.integers(0, 2**62))
TEAM_DAYS = st.builds(
    TeamDay,
    st.dates(date(2025, 12, 29), date(2026, 1, 5)),
    st.sampled_from(["design", "marketing", "a-b"]),
    st.dictionaries(FIELDS.map(lambda parts: ":".join(parts).encode()), AMOUNTS.map(lambda n: str(n).encode())),
)
SOME_TEAM_DAYS = st.lists(TEAM_DAYS, max_size=6, unique_by=lambda team_day: (team_day.day, team_day.team))


def query_by(*by: Group) -> UsageQuery:
    return UsageQuery(*NOVEMBER, by, None, csv=False)


def aggregate(
    team_days: list[TeamDay],
    by: tuple[Group, ...],
    means: Mapping[date, UpstreamTime] | None = None,
    model: str | None = None,
) -> Usage:
    totals = UsageTotals(by, means or {}, model)
    for team_day in team_days:
        totals.add(team_day)
    return totals.usage()


# --- Sums ------------------------------------------------------------------------------------------------------------


def some_days() -> list[TeamDay]:
    return [
        TeamDay(
            date(2026, 11, 1),
            "design",
            {
                b"Flux:hit:requests": b"9",
                b"Flux:hit:credits": b"40500000",
                b"-:rate-limited:refused": b"1",
                b"-:cancelled:requests": b"0",
                b"Old:miss:credits": b"0",
            },
        ),
        TeamDay(date(2026, 11, 1), "marketing", {b"Flux:miss:requests": b"2", b"Flux:miss:credits": b"1"}),
        TeamDay(date(2026, 11, 2), "design", {b"-:upstream-error:requests": b"1", b"-:upstream-error:refused": b"4"}),
        TeamDay(date(2026, 11, 3), "design", {}),
    ]


def test_sums_by_day_and_model() -> None:
    usage = aggregate(some_days(), ("day", "model"))
    assert usage.rows == (
        UsageRow(("2026-11-01", "-"), 0, 1, {"rate-limited": 1}, 0),
        UsageRow(("2026-11-01", "Flux"), 11, 0, {"hit": 9, "miss": 2}, 40_500_001, None),
        UsageRow(("2026-11-02", "-"), 1, 4, {"upstream-error": 5}, 0),
    )
    outcomes = {"hit": 9, "miss": 2, "rate-limited": 1, "upstream-error": 5}
    assert usage.total == UsageRow((), 12, 5, outcomes, 40_500_001, None)


def test_sums_by_week_and_month() -> None:
    days = [TeamDay(date(2026, 10, day), "design", {b"Flux:hit:requests": b"1"}) for day in (25, 26, 31)]
    days.append(TeamDay(date(2026, 11, 1), "design", {b"Flux:hit:requests": b"1"}))
    assert [(row.group, row.requests) for row in aggregate(days, ("week",)).rows] == [
        (("2026-10-19",), 1),
        (("2026-10-26",), 3),
    ], "a week is named by its Monday"
    assert [(row.group, row.requests) for row in aggregate(days, ("month",)).rows] == [
        (("2026-10",), 3),
        (("2026-11",), 1),
    ]


@pytest.mark.parametrize(
    ("sort", "order"), [("names", "abc"), ("credits", "bac"), ("requests", "cab"), ("refused", "abc")]
)
def test_rows_are_sorted_by_names_or_by_the_highest_amount(sort: Sort, order: str) -> None:
    amounts = {"a": (2, 5), "b": (1, 9), "c": (3, 5)}
    rows = tuple(UsageRow((name,), requests, 0, {}, micro) for name, (requests, micro) in amounts.items())
    usage = sort_usage(Usage(rows, UsageRow((), 6, 0, {}, 19)), sort)
    assert "".join(row.group[0] for row in usage.rows) == order
    assert usage.total.requests == 6


def test_shares_are_percentages_of_all_credits() -> None:
    rows = tuple(UsageRow((name,), 1, 0, {}, micro) for name, micro in (("a", 2), ("b", 1), ("c", 0)))
    usage = Usage(rows, UsageRow((), 3, 0, {}, 3))
    assert [share_of(row, usage) for row in rows] == ["66.7", "33.3", "0"]
    nothing = Usage(rows[2:], UsageRow((), 1, 0, {}, 0))
    assert share_of(rows[2], nothing) == "", "no credits at all: a share is not defined"
    assert orjson.loads(json_of(nothing, query_by("day"), "UTC"))["rows"][0]["share_percent"] is None


def test_teams_are_shown_with_their_names() -> None:
    directory = TeamDirectory({"design": "=Design"})
    usage, query = aggregate(some_days(), ("team", "model")), query_by("team", "model")
    named = [(row["team"], row["team_name"]) for row in orjson.loads(json_of(usage, query, "UTC", directory))["rows"]]
    assert named == [("design", "=Design"), ("design", "=Design"), ("marketing", "")]
    header, *rows = cells(csv_of(usage, query.by, directory))
    place = header.index("team_name")
    assert [row[place] for row in rows] == ["'=Design", "'=Design", ""], "names are escaped, too"
    assert "team_name" not in csv_of(aggregate(some_days(), ("day",)), ("day",), directory).decode()


def answered(day: date, **outcomes: int) -> TeamDay:
    return TeamDay(day, "design", {f"Flux:{name}:requests".encode(): b"%d" % n for name, n in outcomes.items()})


def saved(usage: Usage) -> list[tuple[int, str]]:
    return [(row.upstream_calls_saved, row.upstream_seconds_saved) for row in (*usage.rows, usage.total)]


def test_an_answer_without_a_request_saves_a_call_and_the_mean_time_of_its_day() -> None:
    monday, tuesday = date(2026, 11, 2), date(2026, 11, 3)
    days = [answered(monday, hit=9, inferred=1, miss=3), answered(tuesday, hit=2)]
    means = {monday: UpstreamTime(calls=3, us=600_000), tuesday: UpstreamTime(calls=2, us=1)}
    assert saved(aggregate(days, ("day",), means)) == [(10, "2"), (2, "0.000001"), (12, "2.000001")]
    assert saved(aggregate(days, ("week",), means)) == [(12, "2.000001")] * 2


def test_an_answer_that_waited_for_anothers_request_saves_only_the_call() -> None:
    usage = aggregate([answered(TODAY, collapsed=4)], ("day",), {TODAY: UpstreamTime(1, 5)})
    assert saved(usage) == [(4, "0")] * 2


def test_a_stale_answer_saves_nothing_because_its_price_is_requested_again() -> None:
    usage = aggregate([answered(TODAY, stale=4, miss=1, cancelled=1)], ("day",), {TODAY: UpstreamTime(1, 5)})
    assert saved(usage) == [(0, "0")] * 2


def test_time_of_days_without_a_mean_is_unknown_and_not_0() -> None:
    days = [answered(date(2026, 11, 1), hit=5), answered(date(2026, 11, 2), hit=1)]
    means = {date(2026, 11, 2): UpstreamTime(1, 250_000)}
    usage = aggregate(days, ("day",), means)
    assert saved(usage) == [(5, ""), (1, "0.25"), (6, "0.25")]
    rows = orjson.loads(json_of(usage, query_by("day"), "UTC"))["rows"]
    assert [(row["upstream_calls_saved"], row["upstream_seconds_saved"]) for row in rows] == [(5, None), (1, 0.25)]
    _, *written = cells(csv_of(usage, ("day",)))
    assert [row[-4:-2] for row in written] == [["5", ""], ["1", "0.25"]]


def test_sums_by_team() -> None:
    design, marketing = aggregate(some_days(), ("team",)).rows
    assert (design.group, design.requests, design.refused, design.credits_micro) == (("design",), 10, 5, 40_500_000)
    assert (marketing.group, marketing.requests, marketing.credits_micro) == (("marketing",), 2, 1)


def test_usage_of_zero_has_no_rows() -> None:
    assert aggregate([], ("day",)) == Usage((), UsageRow((), 0, 0, {}, 0))
    assert aggregate([TeamDay(TODAY, "design", {b"Flux:hit:credits": b"0"})], ("day",)).rows == ()


def test_an_outcome_of_a_newer_version_comes_last() -> None:
    team_day = TeamDay(TODAY, "design", {b"-:a-new-one:refused": b"1", b"-:not-cached:refused": b"2"})
    assert list(aggregate([team_day], ("day",)).total.outcomes) == ["not-cached", "a-new-one"]


def facts(team_days: list[TeamDay]) -> list[tuple[dict[str, str], str, str, int]]:
    """The amounts in the ledger, read in another way than the code does."""
    found = []
    for team_day in team_days:
        for field, amount in team_day.fields.items():
            model, outcome, measure = field.decode().rsplit(":", 2)
            year, week, _ = team_day.day.isocalendar()
            names = {
                "day": str(team_day.day),
                "team": team_day.team,
                "model": model,
                "week": str(date.fromisocalendar(year, week, 1)),
                "month": str(team_day.day)[:7],
            }
            found.append((names, outcome, measure, int(amount)))
    return found


def the_sum(rows: tuple[UsageRow, ...]) -> UsageRow:
    outcomes: Counter[str] = Counter()
    for row in rows:
        outcomes.update(row.outcomes)
    requests, refused, credits_micro = (
        sum(getattr(row, name) for row in rows) for name in ("requests", "refused", "credits_micro")
    )
    known_us = [row.saved_us for row in rows if row.saved_us is not None]
    saved_us = sum(known_us) if any(known_us) or len(known_us) == len(rows) else None
    return UsageRow((), requests, refused, dict(outcomes), credits_micro, saved_us)


MEANS = st.dictionaries(
    st.dates(date(2025, 12, 29), date(2026, 1, 5)), st.builds(UpstreamTime, st.integers(1, 9), st.integers(90, 10**6))
)


@given(SOME_TEAM_DAYS, st.sampled_from(ORDERS), MEANS)
def test_rows_add_up_to_a_total_that_is_the_same_for_every_grouping(
    team_days: list[TeamDay], by: tuple[Group, ...], means: Mapping[date, UpstreamTime]
) -> None:
    usage = aggregate(team_days, by, means)
    assert the_sum(usage.rows) == usage.total == aggregate(team_days, ("day",), means).total
    assert [row.group for row in usage.rows] == sorted({row.group for row in usage.rows})
    for row in (*usage.rows, usage.total):
        assert sum(row.outcomes.values()) == row.requests + row.refused, "each request has one outcome"
    assert usage.total.requests == sum(n for _, _, measure, n in facts(team_days) if measure == "requests")


@given(SOME_TEAM_DAYS, st.sampled_from(ORDERS))
def test_each_row_is_the_sum_of_its_group(team_days: list[TeamDay], by: tuple[Group, ...]) -> None:
    groups = {tuple(names[group] for group in by) for names, _, _, amount in facts(team_days) if amount}
    usage = aggregate(team_days, by)
    assert {row.group for row in usage.rows} == groups, "no row has only zeros"
    for row in usage.rows:
        own = [fact for fact in facts(team_days) if tuple(fact[0][group] for group in by) == row.group]
        measured = {name: sum(n for *_, measure, n in own if measure == name) for name in ("requests", "refused")}
        assert (row.requests, row.refused) == (measured["requests"], measured["refused"])
        assert row.credits_micro == sum(n for *_, measure, n in own if measure == "credits")
        for outcome, count in row.outcomes.items():
            assert count == sum(n for _, name, measure, n in own if name == outcome and measure != "credits")


# --- Documents -------------------------------------------------------------------------------------------------------


def test_the_json_document() -> None:
    query = query_by("day", "model")
    document = orjson.loads(json_of(aggregate(some_days(), query.by), query, "Europe/Berlin"))
    assert document == {
        "from": "2026-11-01",
        "to": "2026-11-22",
        "timezone": "Europe/Berlin",
        "by": ["day", "model"],
        "rows": [
            {
                "day": "2026-11-01",
                "model": "-",
                "requests": 0,
                "refused": 1,
                "estimated_credits": 0,
                "outcomes": {"rate-limited": 1},
                "share_percent": 0,
                "upstream_calls_saved": 0,
                "upstream_seconds_saved": 0,
            },
            {
                "day": "2026-11-01",
                "model": "Flux",
                "requests": 11,
                "refused": 0,
                "estimated_credits": 40.500001,
                "outcomes": {"hit": 9, "miss": 2},
                "share_percent": 100,
                "upstream_calls_saved": 9,
                "upstream_seconds_saved": None,
            },
            {
                "day": "2026-11-02",
                "model": "-",
                "requests": 1,
                "refused": 4,
                "estimated_credits": 0,
                "outcomes": {"upstream-error": 5},
                "share_percent": 0,
                "upstream_calls_saved": 0,
                "upstream_seconds_saved": 0,
            },
        ],
        "total": {
            "requests": 12,
            "refused": 5,
            "estimated_credits": 40.500001,
            "outcomes": {"hit": 9, "miss": 2, "rate-limited": 1, "upstream-error": 5},
            "upstream_calls_saved": 9,
            "upstream_seconds_saved": None,
        },
    }


def test_json_of_amounts_beyond_doubles_and_64_bits() -> None:
    query = query_by("day")
    team_day = TeamDay(TODAY, "design", {b"Flux:hit:credits": b"123456789012345678901234567"})
    text = json_of(aggregate([team_day, team_day], query.by), query, "UTC").decode()
    assert '"estimated_credits":246913578024691357802.469134,' in text


@given(SOME_TEAM_DAYS, st.sampled_from(ORDERS))
def test_json_has_the_exact_numbers(team_days: list[TeamDay], by: tuple[Group, ...]) -> None:
    usage = aggregate(team_days, by)
    document = json_of(usage, query_by(*by), "UTC")
    read_back = _exact(document)
    for row, written in zip((*usage.rows, usage.total), (*read_back["rows"], read_back["total"]), strict=True):
        assert Fraction(written["estimated_credits"]) * 10**6 == row.credits_micro
        assert int(written["requests"]) == row.requests
        assert {name: int(count) for name, count in written["outcomes"].items()} == row.outcomes
        assert [written[group] for group in by if row.group] == [*row.group]


def _exact(document: bytes) -> Any:
    """Reads numbers as they are written."""
    return json.loads(document, parse_float=Decimal, parse_int=Decimal)


def test_the_csv_document() -> None:
    text = csv_of(aggregate(some_days(), ("day", "model")), ("day", "model")).decode()
    header, first, second, third, end = text.split("\r\n")
    later = ",".join((*SAVED_COLUMNS, *LATER_OUTCOMES))
    assert header == f"day,model,requests,refused,estimated_credits,{','.join(OUTCOMES)},share_percent,{later}"
    assert first == "2026-11-01,-,0,1,0,0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,0,0,0,0,0,0"
    assert second == "2026-11-01,Flux,11,0,40.500001,9,0,2,0,0,0,0,0,0,0,0,0,0,0,0,0,100,9,,0,0"
    assert third.startswith("2026-11-02,-,1,4,0,")
    assert end == "", "each line ends, and no total would be added up with the rest"


def test_the_columns_do_not_depend_on_the_content() -> None:
    assert csv_of(aggregate([], ("team",)), ("team",)).decode().count("\r\n") == 1
    assert cells_of(aggregate([], ("team",)), ("team",)) == [
        [
            *("team", "requests", "refused", "estimated_credits"),
            *(*OUTCOMES, "share_percent", "team_name", *SAVED_COLUMNS, *LATER_OUTCOMES),
        ]
    ]
    assert list(OUTCOMES) == [
        *("hit", "stale", "miss", "collapsed", "bypass", "unpriced", "upstream-rejected"),
        *("rate-limited", "quota-exceeded", "upstream-error", "upstream-refused", "upstream-busy", "upstream-timeout"),
        *("not-cached", "cancelled", "internal-error"),
    ], "users' scripts depend on these columns"
    assert list(LATER_OUTCOMES) == ["over-ceiling", "inferred"]


def test_every_outcome_is_a_column_or_never_reaches_the_ledger() -> None:
    assert set(Outcome) - {*OUTCOMES, *LATER_OUTCOMES} == {
        *("unauthenticated", "team-disabled", "invalid", "store-unavailable", "overloaded")
    }


def cells(text: bytes) -> list[list[str]]:
    return list(csv.reader(StringIO(text.decode(), newline=""), strict=True))


@given(SOME_TEAM_DAYS, st.sampled_from(ORDERS))
def test_csv_reads_back_as_the_same_numbers(team_days: list[TeamDay], by: tuple[Group, ...]) -> None:
    usage = aggregate(team_days, by)
    header, *rows = cells(csv_of(usage, by))
    assert len({len(row) for row in (header, *rows)}) == 1
    for row, written in zip(usage.rows, rows, strict=True):
        assert [name.removeprefix("'") for name in written[: len(by)]] == [*row.group]
        named = dict(zip(header, written, strict=True))
        assert (int(named["requests"]), int(named["refused"])) == (row.requests, row.refused)
        assert Fraction(named["estimated_credits"]) * 10**6 == row.credits_micro
        assert {name: int(named[name]) for name in (*OUTCOMES, *LATER_OUTCOMES) if int(named[name])} == {
            name: count for name, count in row.outcomes.items() if count
        }


@given(st.text(max_size=30).filter(lambda model: ":" not in model))
def test_no_cell_of_csv_is_a_formula(model: str) -> None:
    """For any name. A comma, a quote or a line break does not split the cell, either."""
    row = UsageRow(("design", model), 1, 0, {"hit": 1}, 1)
    header, written = cells(csv_of(Usage((row,), row), ("team", "model")))
    for cell in (*header, *written):
        assert cell == "-" or not cell.startswith(tuple(FORMULA_CHARACTERS))
    assert written[1] in (model, f"'{model}")


@pytest.mark.parametrize("model", ["=1+1", "+1", "-1-1", "- x", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "--"])
def test_formulas_are_escaped(model: str) -> None:
    row = UsageRow((model,), 1, 0, {}, 0)
    assert cells(csv_of(Usage((row,), row), ("model",)))[1][0] == f"'{model}"


def test_ordinary_names_and_a_single_dash_are_not_escaped() -> None:
    for model in ("-", "Flux", "Stable Diffusion 1.5", "a-b", "_x"):
        row = UsageRow((model,), 1, 0, {}, 0)
        assert cells(csv_of(Usage((row,), row), ("model",)))[1][0] == model


@given(SOME_TEAM_DAYS, st.sampled_from(["Flux", "-", "never used"]))
def test_one_model_is_the_rows_of_that_model(team_days: list[TeamDay], model: str) -> None:
    everything, only = aggregate(team_days, ("model", "team")), aggregate(team_days, ("model", "team"), model=model)
    assert only.rows == tuple(row for row in everything.rows if row.group[0] == model)
    assert only.total.credits_micro == sum(row.credits_micro for row in only.rows)
