"""Counter sets: how long each is valid, what it contains, and that no two windows share a key."""

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


def counters_of(quotas: Sequence[Quota], at_s: int, zone: ZoneInfo = BERLIN, team: str = "design") -> CounterSet:
    limits = TeamLimits(team, Rate(50, 100), tuple(quotas))
    return team_counters(KEYS, limits, org_counters(KEYS, limits.org_quotas, at_s, zone), at_s, zone)


def midnight(year: int, month: int, day: int) -> int:
    return int(datetime(year, month, day, tzinfo=BERLIN).timestamp())


def test_keys_stay_the_same_across_versions() -> None:
    """A newer version must still find them."""
    counters = counters_of([quota(per="minute"), quota("org", per="hour")], NOON)
    assert counters.team is not None
    assert counters.team.usage.key == "ep1:{acme}:u:2026-11-22:design"
    assert counters.team.rate_key == "ep1:{acme}:rate:t:design"
    assert tuple(counters.expires_ms) == (
        f"ep1:{{acme}}:q:t:design:minute:{NOON - 56}",
        f"ep1:{{acme}}:q:t:design:day:{midnight(2026, 11, 22)}",
        f"ep1:{{acme}}:q:t:design:week:{midnight(2026, 11, 16)}",
        f"ep1:{{acme}}:q:t:design:month:{midnight(2026, 11, 1)}",
    )
    assert counters.org is not None
    assert tuple(counters.org.expires_ms) == (
        f"ep1:{{acme}}:q:o:hour:{NOON - 34 * 60 - 56}",
        f"ep1:{{acme}}:q:o:day:{midnight(2026, 11, 22)}",
        f"ep1:{{acme}}:q:o:week:{midnight(2026, 11, 16)}",
        f"ep1:{{acme}}:q:o:month:{midnight(2026, 11, 1)}",
    )
    assert (KEYS.id, KEYS.models, KEYS.teams) == ("ep1:{acme}:id", "ep1:{acme}:models", "ep1:{acme}:teams")
    assert KEYS.flush("7f") == "ep1:{acme}:flush:7f"


def test_no_team_shares_a_key_with_the_organisation_or_another_team() -> None:
    for name in ("o", "t", "a", "acme"):
        keys = set(_keys(counters_of([], NOON, team=name)))
        assert not keys & set(_keys(org_counters(KEYS, (), NOON, BERLIN)))
        assert not keys & set(_keys(counters_of([], NOON)))


def test_a_counter_set_has_the_expiries_and_quotas_of_its_scope() -> None:
    quotas = [
        quota(per="hour", limit=5),
        Quota("team", "estimated_credits", "month", 7_000_000, refuse=False),
        quota("org", "estimated_credits", "day", 8),
    ]
    counters = counters_of(quotas, NOON)
    expires_ms = [1000 * (window_of(per, NOON, BERLIN).end_s + COUNTER_KEPT_S) for per in ("hour", *BASE_PERIODS)]
    assert list(counters.expires_ms.values()) == expires_ms
    assert counters.quotas == ((1, "requests", 5, 1), (4, "credits", 7_000_000, 0))
    assert counters.team is not None
    assert counters.team.id == "design"
    assert counters.team.usage.expires_ms == 1000 * (midnight(2026, 11, 22) + DAY_S * (USAGE_KEPT_DAYS + 1))
    assert counters.team.rate == Rate(50, 100)
    assert counters.org is not None
    assert list(counters.org.expires_ms.values()) == expires_ms[1:]
    assert counters.org.quotas == ((1, "credits", 8, 1),)
    assert counters.org.team is None


@pytest.mark.parametrize(
    ("quotas", "counted"),
    [
        ((), BASE_PERIODS),
        (("month",), BASE_PERIODS),
        (("hour",), ("hour", *BASE_PERIODS)),
        (("hour", "day", "minute"), ("minute", "hour", *BASE_PERIODS)),
    ],
)
def test_a_scope_is_counted_in_its_quotas_periods_and_the_base_periods(
    quotas: Sequence[Period], counted: tuple[Period, ...]
) -> None:
    assert periods([quota(per=per) for per in quotas]) == counted
    assert periods([quota(measure=measure, per="hour") for measure in ("requests", "estimated_credits")])[0] == "hour"


def test_a_counter_set_is_valid_until_the_first_of_its_windows_ends() -> None:
    assert counters_of([], NOON).valid == Window(midnight(2026, 11, 22), midnight(2026, 11, 23))
    assert counters_of([quota(per="hour")], NOON).valid == window_of("hour", NOON, BERLIN)
    assert counters_of([quota("org", per="minute"), quota(per="hour")], NOON).valid == window_of("minute", NOON, BERLIN)


def test_counter_sets_with_equal_contents_are_not_equal() -> None:
    """They are of different times, such as before and after a reload."""
    assert counters_of([], NOON) != counters_of([], NOON)
    assert len({counters_of([], NOON), counters_of([], NOON)}) == 2


_ZONES = st.sampled_from(["UTC", "Europe/Berlin", "America/Sao_Paulo", "Australia/Lord_Howe", "Asia/Kathmandu"])
_INSTANTS = st.integers(midnight(2026, 1, 1), midnight(2030, 1, 1))
_QUOTAS = st.lists(st.builds(quota, st.sampled_from(["team", "org"]), per=st.sampled_from(PERS)), max_size=4)


@given(_QUOTAS, _INSTANTS, _ZONES.map(ZoneInfo), st.data())
def test_a_counter_set_is_the_same_while_it_is_valid_and_another_before_and_after(
    quotas: list[Quota], at_s: int, zone: ZoneInfo, data: st.DataObject
) -> None:
    quotas.sort(key=lambda one: one.scope == "org")
    counters = counters_of(quotas, at_s, zone)
    valid = counters.valid
    assert valid.start_s <= at_s < valid.end_s
    for moment in (valid.start_s, valid.end_s - 1, data.draw(st.integers(valid.start_s, valid.end_s - 1))):
        assert _contents(counters_of(quotas, moment, zone)) == _contents(counters)
    for moment in (valid.start_s - 1, valid.end_s):
        assert _all_keys(counters) != _all_keys(counters_of(quotas, moment, zone))


def _keys(counters: CounterSet) -> tuple[str, ...]:
    team = (counters.team.usage.key, counters.team.rate_key) if counters.team else ()
    return (*team, *counters.expires_ms)


def _all_keys(counters: CounterSet) -> tuple[str, ...]:
    assert counters.org is not None
    return _keys(counters) + _keys(counters.org)


def _contents(counters: CounterSet) -> object:
    org = counters.org and _contents(counters.org)
    return counters.windows, counters.valid, counters.expires_ms, counters.quotas, counters.team, org


@given(_QUOTAS, _INSTANTS, _ZONES.map(ZoneInfo))
def test_windows_and_expiries_are_those_of_the_instant(quotas: list[Quota], at_s: int, zone: ZoneInfo) -> None:
    counters = counters_of(quotas, at_s, zone)
    for per, window in counters.windows.items():
        assert window == window_of(per, at_s, zone)
    assert set(counters.windows) == {*BASE_PERIODS, *(quota.per for quota in quotas)}
    assert counters.team is not None
    usage_expires_s = counters.team.usage.expires_ms // 1000
    kept_until = datetime.fromtimestamp(usage_expires_s, zone).date()
    assert kept_until - day_of(at_s, zone) in (timedelta(days=USAGE_KEPT_DAYS), timedelta(days=USAGE_KEPT_DAYS + 1))
    assert usage_expires_s - window_of("day", at_s, zone).end_s >= USAGE_KEPT_DAYS * DAY_S - 2 * 3600
