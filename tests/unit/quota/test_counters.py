"""Sheets: for how long each holds, what stands on it, and that no two windows share a key."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.quota.counters import (
    BASE_PERIODS,
    COUNTER_KEPT_S,
    USAGE_KEPT_DAYS,
    CounterSet,
    LedgerKeys,
    org_counters,
    periods,
    team_counters,
)
from proxy.quota.quotas import Measure, Quota, Rate, Scope, TeamLimits
from proxy.quota.windows import Period, Window, day_of, window_of

BERLIN = ZoneInfo("Europe/Berlin")
KEYS = LedgerKeys("acme")
DAY_S = 86_400
NOON = int(datetime(2026, 11, 22, 12, 34, 56, tzinfo=BERLIN).timestamp())
PERS: tuple[Period, ...] = ("minute", "hour", "day", "week", "month")


def quota(scope: Scope = "team", measure: Measure = "requests", per: Period = "day", limit: int = 9) -> Quota:
    return Quota(scope, measure, per, limit, refuse=True)


def sheet_of(quotas: Sequence[Quota], at_s: int, zone: ZoneInfo = BERLIN, team: str = "design") -> CounterSet:
    terms = TeamLimits(team, Rate(50, 100), tuple(quotas))
    return team_counters(KEYS, terms, org_counters(KEYS, terms.org_quotas, at_s, zone), at_s, zone)


def midnight(year: int, month: int, day: int) -> int:
    return int(datetime(year, month, day, tzinfo=BERLIN).timestamp())


def test_the_keys() -> None:
    """They are what a newer version must still find."""
    counters = sheet_of([quota(per="minute"), quota("org", per="hour")], NOON)
    assert counters.keys == (
        "ep1:{acme}:u:2026-11-22:design",
        "ep1:{acme}:rate:t:design",
        f"ep1:{{acme}}:q:t:design:minute:{NOON - 56}",
        f"ep1:{{acme}}:q:t:design:day:{midnight(2026, 11, 22)}",
        f"ep1:{{acme}}:q:t:design:week:{midnight(2026, 11, 16)}",
        f"ep1:{{acme}}:q:t:design:month:{midnight(2026, 11, 1)}",
    )
    assert counters.org is not None
    assert counters.org.keys == (
        f"ep1:{{acme}}:q:o:hour:{NOON - 34 * 60 - 56}",
        f"ep1:{{acme}}:q:o:day:{midnight(2026, 11, 22)}",
        f"ep1:{{acme}}:q:o:week:{midnight(2026, 11, 16)}",
        f"ep1:{{acme}}:q:o:month:{midnight(2026, 11, 1)}",
    )
    assert (KEYS.id, KEYS.models, KEYS.teams) == ("ep1:{acme}:id", "ep1:{acme}:models", "ep1:{acme}:teams")
    assert KEYS.flush("7f") == "ep1:{acme}:flush:7f"


def test_no_team_gets_at_the_organisations_keys() -> None:
    for name in ("o", "t", "a", "acme"):
        keys = set(sheet_of([], NOON, team=name).keys)
        assert not keys & set(org_counters(KEYS, (), NOON, BERLIN).keys)
        assert not keys & set(sheet_of([], NOON).keys)


def test_what_the_script_reads() -> None:
    quotas = [
        quota(per="hour", limit=5),
        Quota("team", "estimated_credits", "month", 7_000_000, refuse=False),
        quota("org", "estimated_credits", "day", 8),
    ]
    counters = sheet_of(quotas, NOON)
    ends = [window_of(per, NOON, BERLIN).end_s + COUNTER_KEPT_S for per in ("hour", *BASE_PERIODS)]
    usage_end = midnight(2026, 11, 22) + DAY_S * (USAGE_KEPT_DAYS + 1)
    head = (1000 * usage_end, "design", 20_000, 2_000_000)
    assert counters.args == (
        *head,
        4,
        *(1000 * end for end in ends),
        2,
        1,
        "requests",
        5,
        1,
        4,
        "credits",
        7_000_000,
        0,
    )
    assert counters.org is not None
    assert counters.org.args == (0, "", 0, 0, 3, *(1000 * end for end in ends[1:]), 1, 1, "credits", 8, 1)
    assert len(counters.keys) == 2 + 4


@pytest.mark.parametrize(
    ("quotas", "counted"),
    [
        ((), BASE_PERIODS),
        (("month",), BASE_PERIODS),
        (("hour",), ("hour", *BASE_PERIODS)),
        (("hour", "day", "minute"), ("minute", "hour", *BASE_PERIODS)),
    ],
)
def test_what_a_scope_is_counted_in(quotas: Sequence[Period], counted: tuple[Period, ...]) -> None:
    assert periods([quota(per=per) for per in quotas]) == counted
    assert periods([quota(measure=measure, per="hour") for measure in ("requests", "estimated_credits")])[0] == "hour"


def test_a_sheet_holds_until_the_first_of_its_windows_ends() -> None:
    assert sheet_of([], NOON).holds == Window(midnight(2026, 11, 22), midnight(2026, 11, 23))
    assert sheet_of([quota(per="hour")], NOON).holds == window_of("hour", NOON, BERLIN)
    assert sheet_of([quota("org", per="minute"), quota(per="hour")], NOON).holds == window_of("minute", NOON, BERLIN)


def test_a_sheet_is_one_of_a_kind() -> None:
    """Two that say the same are of different moments, such as before and after a reload."""
    assert sheet_of([], NOON) != sheet_of([], NOON)
    assert len({sheet_of([], NOON), sheet_of([], NOON)}) == 2


_ZONES = st.sampled_from(["UTC", "Europe/Berlin", "America/Sao_Paulo", "Australia/Lord_Howe", "Asia/Kathmandu"])
_INSTANTS = st.integers(midnight(2026, 1, 1), midnight(2030, 1, 1))
_QUOTAS = st.lists(st.builds(quota, st.sampled_from(["team", "org"]), per=st.sampled_from(PERS)), max_size=4)


@given(_QUOTAS, _INSTANTS, _ZONES.map(ZoneInfo), st.data())
def test_a_sheet_is_the_same_while_it_holds_and_another_before_and_behind(
    quotas: list[Quota], at_s: int, zone: ZoneInfo, data: st.DataObject
) -> None:
    quotas.sort(key=lambda one: one.scope == "org")
    counters = sheet_of(quotas, at_s, zone)
    holds = counters.holds
    assert holds.start_s <= at_s < holds.end_s
    for moment in (holds.start_s, holds.end_s - 1, data.draw(st.integers(holds.start_s, holds.end_s - 1))):
        assert _written(sheet_of(quotas, moment, zone)) == _written(counters)
    for moment in (holds.start_s - 1, holds.end_s):
        assert _all_keys(counters) != _all_keys(sheet_of(quotas, moment, zone))


def _all_keys(counters: CounterSet) -> tuple[str, ...]:
    assert counters.org is not None
    return counters.keys + counters.org.keys


def _written(counters: CounterSet) -> object:
    assert counters.org is not None
    return (
        counters.windows,
        counters.holds,
        counters.keys,
        counters.args,
        counters.org.windows,
        counters.org.keys,
        counters.org.args,
    )


@given(_QUOTAS, _INSTANTS, _ZONES.map(ZoneInfo))
def test_windows_and_ends_are_those_of_the_moment(quotas: list[Quota], at_s: int, zone: ZoneInfo) -> None:
    counters = sheet_of(quotas, at_s, zone)
    for per, window in counters.windows.items():
        assert window == window_of(per, at_s, zone)
    assert set(counters.windows) == {*BASE_PERIODS, *(quota.per for quota in quotas)}
    kept_until = datetime.fromtimestamp(int(counters.args[0]) // 1000, zone).date()
    assert kept_until - day_of(at_s, zone) in (timedelta(days=USAGE_KEPT_DAYS), timedelta(days=USAGE_KEPT_DAYS + 1))
    assert int(counters.args[0]) // 1000 - window_of("day", at_s, zone).end_s >= USAGE_KEPT_DAYS * DAY_S - 2 * 3600
