"""Rates and quotas as teams see them: header fields, warnings and the two kinds of refusal."""

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import http_sf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.problems import Problem
from proxy.quota.credits import MICRO
from proxy.quota.quotas import Measure, Quota, QuotaState, Rate, Scope, TeamLimits, policy_field
from proxy.quota.windows import Period, Window, window_of

UTC = ZoneInfo("UTC")
NOW_S = 1_794_405_600  # 2026-11-11T14:00:00Z, a Wednesday
NOW_US = NOW_S * 1_000_000
RATE = Rate(50, 100)
PERS: tuple[Period, ...] = ("minute", "hour", "day", "week", "month")
WINDOWS = {per: window_of(per, NOW_S, UTC) for per in PERS}


def quota(
    measure: Measure = "requests", limit: int = 100, per: Period = "day", scope: Scope = "team", *, refuse: bool = True
) -> Quota:
    return Quota(scope, measure, per, limit, refuse)


def quota_state(
    quotas: Mapping[Quota, int] = {}, rate: Rate = RATE, *, tat_offset_us: int = 0, now_us: int = NOW_US
) -> QuotaState:
    """A team's state. `quotas`: the use of each quota."""
    limits, tat_us = TeamLimits("design", rate, tuple(quotas)), now_us + tat_offset_us
    return QuotaState(limits, WINDOWS, now_us, tat_us, tuple(quotas.values()))


def policies(state: QuotaState) -> str:
    return policy_field(state.limits, state.windows).decode()


def items(field: str) -> dict[str, dict[str, Any]]:
    """The items of a structured field that is a list of strings, with their parameters."""
    parsed: Any = http_sf.parse(field.encode(), tltype="list")
    assert all(type(name) is str for name, _ in parsed), "a token is not a string"
    assert len(dict(parsed)) == len(parsed)
    return dict(parsed)


# --- The rate ---------------------------------------------------------------------------------------------------

rates = st.builds(Rate, st.floats(0.001, 100_000), st.integers(1, 1_000_000))


@pytest.mark.parametrize(
    ("rate", "interval_us", "burst_tolerance_us"),
    [
        (Rate(50, 100), 20_000, 2_000_000),
        (Rate(0.5, 1), 2_000_000, 2_000_000),
        (Rate(3, 3), 333_333, 999_999),
        (Rate(0.001, 1_000_000), 10**9, 10**15),
        (Rate(100_000, 1), 10, 10),
    ],
)
def test_a_rate_in_microseconds(rate: Rate, interval_us: int, burst_tolerance_us: int) -> None:
    assert (rate.interval_us, rate.burst_tolerance_us) == (interval_us, burst_tolerance_us)


@given(rates)
def test_the_interval_of_a_rate_is_rounded_down(rate: Rate) -> None:
    assert 1 <= rate.interval_us <= 1_000_000 / rate.per_s < rate.interval_us + 1
    assert rate.burst_tolerance_us == rate.burst * rate.interval_us
    assert NOW_US + rate.burst_tolerance_us < 2**53, "Lua's numbers are exact below"


@given(rates, st.data())
def test_the_remaining_requests_of_a_rate_fit_into_its_burst_tolerance(rate: Rate, data: st.DataObject) -> None:
    tat_offset_us = data.draw(st.integers(0, rate.burst_tolerance_us))
    left = quota_state(rate=rate, tat_offset_us=tat_offset_us).rate_remaining()
    assert 0 <= left <= rate.burst
    assert (
        tat_offset_us + left * rate.interval_us
        <= rate.burst_tolerance_us
        < tat_offset_us + (left + 1) * rate.interval_us
    )


def test_a_team_that_paused_has_its_whole_burst() -> None:
    assert quota_state().rate_remaining() == 100
    assert quota_state(tat_offset_us=20_000).rate_remaining() == 99
    assert quota_state(tat_offset_us=1_980_001).rate_remaining() == 0
    assert quota_state(tat_offset_us=9_000_000).rate_remaining() == 0, "the rate was lowered meanwhile"


@pytest.mark.parametrize(
    ("tat_us", "tat_offset_us"),
    [(0, 0), (NOW_US - 1, 0), (NOW_US, 0), (NOW_US + 20_000, 20_000), (NOW_US + 9_000_000, 2_000_000)],
)
def test_a_stored_tat_counts_from_now_to_the_burst_tolerance(tat_us: int, tat_offset_us: int) -> None:
    state = QuotaState(TeamLimits("design", RATE, ()), {}, NOW_US, tat_us, ())
    assert state.tat_offset_us == tat_offset_us


# --- Header fields ----------------------------------------------------------------------------------------------

ALL = {
    quota("requests", 10_000, "day"): 880,
    quota("estimated_credits", 5_000_500_000, "month"): 1_200_000_001,
    quota("requests", 60, "minute", refuse=False): 70,
    quota("estimated_credits", 50_000_000_000, "month", "org"): 50_000_000_000,
    quota("requests", 0, "hour", "org"): 0,
    quota("estimated_credits", 999_999, "week", "org"): 0,
}


def test_the_ratelimit_policy_field() -> None:
    assert policies(quota_state(ALL)) == (
        '"rate";q=100;w=2, "requests-day";q=10000;w=86400, "credits-month";q=5000;qu="credits";w=2592000, '
        '"requests-minute";q=60;w=60, "org-credits-month";q=50000;qu="credits";w=2592000, '
        '"org-requests-hour";q=0;w=3600, "org-credits-week";q=0;qu="credits";w=604800'
    )


def test_the_ratelimit_field() -> None:
    assert quota_state(ALL, tat_offset_us=860_000).limit_field() == (
        '"rate";r=57;t=1, "requests-day";r=9120;t=36000, "credits-month";r=3800;t=1677600, '
        '"requests-minute";r=0;t=60, "org-credits-month";r=0;t=1677600, '
        '"org-requests-hour";r=0;t=3600, "org-credits-week";r=0;t=381600'
    )


def test_fields_are_lists_of_strings_with_whole_numbers() -> None:
    promised, limits = items(policies(quota_state(ALL))), items(quota_state(ALL).limit_field())
    assert list(promised) == list(limits)
    assert {name for name, parameters in promised.items() if "qu" in parameters} == {
        "credits-month",
        "org-credits-month",
        "org-credits-week",
    }
    assert all(parameters["qu"] == "credits" for parameters in promised.values() if "qu" in parameters)
    assert all(type(parameters[name]) is int for parameters in promised.values() for name in "qw")
    assert all(type(parameters[name]) is int for parameters in limits.values() for name in "rt")


def test_without_quotas_the_fields_show_the_rate() -> None:
    assert items(policies(quota_state())) == {"rate": {"q": 100, "w": 2}}
    assert items(quota_state().limit_field()) == {"rate": {"r": 100, "t": 0}}


@pytest.mark.parametrize(
    ("rate", "window_s"),
    [(Rate(50, 100), 2), (Rate(50, 1), 1), (Rate(3, 10), 4), (Rate(0.5, 1), 2), (Rate(0.001, 1_000_000), 10**9)],
)
def test_the_window_of_a_rate_is_the_time_that_a_burst_takes_to_refill(rate: Rate, window_s: int) -> None:
    assert items(policies(quota_state(rate=rate)))["rate"] == {"q": rate.burst, "w": window_s}


def test_a_day_with_a_clock_change_has_its_real_length() -> None:
    """The day on which clocks go back has 25 hours."""
    day = quota()
    windows: dict[Period, Window] = {"day": window_of("day", 1_792_929_600, ZoneInfo("Europe/Berlin"))}
    state = QuotaState(TeamLimits("design", RATE, (day,)), windows, 1_792_929_600_000_000, 0, (0,))
    assert items(policies(state))["requests-day"] == {"q": 100, "w": 90_000}
    assert items(state.limit_field())["requests-day"] == {"r": 100, "t": 39_600}


measures: st.SearchStrategy[Measure] = st.sampled_from(["requests", "estimated_credits"])
scopes: st.SearchStrategy[Scope] = st.sampled_from(["team", "org"])
distinct = st.builds(
    Quota,
    scope=scopes,
    measure=measures,
    per=st.sampled_from(PERS),
    limit=st.integers(0, 9 * 10**15),
    refuse=st.booleans(),
)
many = st.lists(distinct, unique_by=lambda quota: quota.policy, max_size=20)


@given(many, rates, st.data())
def test_any_state_makes_valid_fields(quotas: list[Quota], rate: Rate, data: st.DataObject) -> None:
    """Structured fields allow integers of 15 digits (RFC 9651 §3.3.1), so no quota on requests may be larger."""
    quotas = [quota for quota in quotas if quota.header_amount(quota.limit) <= 10**12]
    used = {quota: data.draw(st.integers(0, 2 * 10**16)) for quota in quotas}
    tat_offset_us = data.draw(st.integers(0, rate.burst_tolerance_us))
    state = quota_state(used, rate, tat_offset_us=tat_offset_us, now_us=NOW_US + data.draw(st.integers(0, 59_999_999)))
    promised, limits = items(policies(state)), items(state.limit_field())
    assert list(promised) == list(limits) == ["rate", *(quota.policy for quota in quotas)]
    assert limits["rate"]["r"] <= promised["rate"]["q"]
    for quota in quotas:
        unit = 1 if quota.measure == "requests" else 1_000_000
        policy, limit = promised[quota.policy], limits[quota.policy]
        assert policy["q"] == quota.limit // unit
        assert limit["r"] == max(0, quota.limit - used[quota]) // unit
        assert 0 < limit["t"] <= policy["w"]


@pytest.mark.parametrize(
    ("after_us", "left_s"), [(-1, 1), (-1_000_000, 1), (-1_000_001, 2), (0, 0), (1, 0), (10**12, 0)]
)
def test_time_left_is_rounded_up_and_never_negative(after_us: int, left_s: int) -> None:
    """A window may end before the answer is sent."""
    state = quota_state({quota(): 0}, now_us=WINDOWS["day"].end_s * 1_000_000 + after_us)
    assert items(state.limit_field())["requests-day"]["t"] == left_s


def test_org_quotas_are_the_organisations_among_a_teams_limits() -> None:
    assert [quota.policy for quota in quota_state(ALL).limits.org_quotas] == [
        "org-credits-month",
        "org-requests-hour",
        "org-credits-week",
    ]
    assert quota_state().limits.org_quotas == ()


# --- Warnings ---------------------------------------------------------------------------------------------------


def test_warnings_are_the_exceeded_quotas_that_only_warn() -> None:
    passed = quota("estimated_credits", 5_000_000, refuse=False)
    used: dict[Quota, int] = {
        quota("requests", 10, "hour"): 11,
        passed: 5_000_001,
        quota("requests", 10, "week", refuse=False): 10,
        quota("requests", 0, "month", "org", refuse=False): 1,
    }
    warned = quota_state(used).warnings()
    assert [quota.policy for quota in warned] == ["credits-day", "org-requests-month"]
    assert warned[0] is passed
    assert quota_state().warnings() == ()


# --- Denials ----------------------------------------------------------------------------------------------------


def document_of(problem: Problem) -> tuple[dict[str, Any], str | None]:
    """The document of a problem, its numbers as written, and its `Retry-After`."""
    retry_after = dict(problem.headers).get(b"retry-after")
    document = json.loads(problem.document("req-1"), parse_int=Decimal, parse_float=Decimal)
    return document, None if retry_after is None else retry_after.decode()


def test_the_refusal_by_the_rate() -> None:
    document, retry_after = document_of(quota_state(rate=Rate(0.5, 1), tat_offset_us=1_500_000).rate_limited())
    detail = "The team may send 0.5 requests per second, and at most 1 at once: send requests more slowly."
    assert document == {
        "type": "urn:estimate-proxy:problem:rate-limited",
        "title": "The team sends requests too fast",
        "status": 429,
        "detail": detail,
        "request_id": "req-1",
        "data": None,
        "error": {"code": "rate-limited", "message": detail},
    }
    assert retry_after == "2"


def test_one_request_per_second_is_in_the_singular() -> None:
    problem = quota_state(rate=Rate(1, 5)).rate_limited()
    assert problem.detail.startswith("The team may send 1 request per second, and at most 5 at once: ")


@given(rates, st.data())
def test_retry_after_is_the_shortest_sufficient_wait_in_seconds(rate: Rate, data: st.DataObject) -> None:
    tat_offset_us = data.draw(st.integers(rate.burst_tolerance_us - rate.interval_us + 1, rate.burst_tolerance_us))
    wait_s = quota_state(rate=rate, tat_offset_us=tat_offset_us).rate_limited().retry_after_s
    assert wait_s is not None
    assert 1 <= wait_s <= 1000
    assert max(0, tat_offset_us - wait_s * 1_000_000) + rate.interval_us <= rate.burst_tolerance_us
    assert wait_s == 1 or tat_offset_us - (wait_s - 1) * 1_000_000 + rate.interval_us > rate.burst_tolerance_us


CREDITS = quota("estimated_credits", 5_000_100_000, "month")
ORG_REQUESTS = quota("requests", 60, "hour", "org")


def exceeded(
    used: Mapping[Quota, int], violated: Sequence[Quota], requested_micro: int | None = None, zone: ZoneInfo = UTC
) -> tuple[dict[str, Any], str | None]:
    return document_of(quota_state(used).quota_exceeded(violated, requested_micro, zone))


def test_the_refusal_by_a_quota_on_credits() -> None:
    document, retry_after = exceeded({CREDITS: 4_999_000_000}, [CREDITS], 2_750_001)
    detail = (
        "1.1 of the team's 5000.1 estimated credits per month are left until 2026-12-01T00:00:00+00:00, "
        "and this estimate needs 2.750001."
    )
    assert document == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "A quota is used up or would be exceeded",
        "status": 402,
        "detail": detail,
        "request_id": "req-1",
        "data": None,
        "error": {"code": "quota-exceeded", "message": detail},
        "quota": {
            "scope": "team",
            "measure": "estimated_credits",
            "per": "month",
            "limit": Decimal("5000.1"),
            "used": 4999,
            "requested": Decimal("2.750001"),
            "resets_at": "2026-12-01T00:00:00+00:00",
        },
        "violated-policies": ["credits-month"],
    }
    assert retry_after is None


@pytest.mark.parametrize(
    ("limit", "used", "requested", "begin", "end"),
    [
        (10, 7, 4, "3 of the team's 10 estimated credits per month are left until ", ", and this estimate needs 4."),
        (10, 10, 4, "0 of the team's 10 estimated credits per month are left until ", ", and this estimate needs 4."),
        (10, 12, 4, "0 of the team's 10 estimated credits per month are left until ", ", and this estimate needs 4."),
        (10, 10, None, "0 of the team's 10 estimated credits per month are left until ", ":00."),
        (
            1,
            0,
            2,
            "1 of the team's 1 estimated credit per month are left until ",
            " needs 2, more than the whole quota.",
        ),
        (0, 0, None, "The team's quota of estimated credits per month is 0, so every request is refused. Ask ", "."),
    ],
)
def test_the_detail_says_what_is_left_and_needed_and_if_waiting_does_not_help(
    limit: int, used: int, requested: int | None, begin: str, end: str
) -> None:
    month = quota("estimated_credits", limit * MICRO, "month")
    document, _ = exceeded({month: used * MICRO}, [month], None if requested is None else requested * MICRO)
    assert document["detail"].startswith(begin)
    assert document["detail"].endswith(end)


@pytest.mark.parametrize(("requested", "end"), [(4, " needs more."), (12, " needs more than the whole quota.")])
def test_the_detail_can_hide_the_price(requested: int, end: str) -> None:
    month = quota("estimated_credits", 10 * MICRO, "month")
    problem = quota_state({month: 9 * MICRO}).quota_exceeded([month], requested * MICRO, UTC, shows_price=False)
    assert problem.detail.endswith(end)


def test_the_refusal_by_a_quota_on_requests() -> None:
    document, retry_after = exceeded({CREDITS: 0, ORG_REQUESTS: 60}, [ORG_REQUESTS], None, ZoneInfo("Asia/Kolkata"))
    assert document["status"] == 429
    assert document["detail"] == (
        "0 of the organisation's 60 requests per hour are left until 2026-11-11T20:30:00+05:30."
    )
    assert document["quota"] == {
        "scope": "org",
        "measure": "requests",
        "per": "hour",
        "limit": 60,
        "used": 60,
        "requested": 1,
        "resets_at": "2026-11-11T20:30:00+05:30",
    }
    assert document["violated-policies"] == ["org-requests-hour"]
    assert document["error"]["code"] == "quota-exceeded"
    assert retry_after == "3600"


def test_the_first_quota_is_explained_and_all_are_named() -> None:
    used = {CREDITS: 5_000_100_000, ORG_REQUESTS: 61}
    document, retry_after = exceeded(used, [CREDITS, ORG_REQUESTS], 1)
    assert (document["status"], retry_after) == (402, None)
    assert document["quota"]["used"] == document["quota"]["limit"] == Decimal("5000.1")
    assert document["detail"].startswith("0 of the team's 5000.1 estimated credits per month are left until ")
    assert document["violated-policies"] == ["credits-month", "org-requests-hour"]
    document, retry_after = exceeded(used, [ORG_REQUESTS, CREDITS], 1)
    assert (document["status"], retry_after) == (429, "3600")
    assert document["quota"]["used"] == 61
    assert document["violated-policies"] == ["org-requests-hour", "credits-month"]


@pytest.mark.parametrize(("requested", "expected"), [(None, None), (0, 0), (1, Decimal("0.000001")), (5_000_000, 5)])
def test_requested_is_null_if_the_price_is_unknown(requested: int | None, expected: Decimal | int | None) -> None:
    document, _ = exceeded({CREDITS: 5_000_100_000}, [CREDITS], requested)
    assert document["quota"]["requested"] == expected


@pytest.mark.parametrize(
    ("per", "retry_after"), [("minute", "60"), ("hour", "3600"), ("day", None), ("week", None), ("month", None)]
)
def test_retry_after_is_sent_for_requests_up_to_an_hour_and_never_for_credits(
    per: Period, retry_after: str | None
) -> None:
    on_requests, on_credits = quota("requests", 1, per), quota("estimated_credits", 1, per)
    assert exceeded({on_requests: 1}, [on_requests])[1] == retry_after
    assert exceeded({on_credits: 1}, [on_credits], 1)[1] is None


@given(many.filter(bool), st.data())
def test_any_refusal_has_exact_numbers(quotas: list[Quota], data: st.DataObject) -> None:
    used = {quota: data.draw(st.integers(0, 2 * 10**16)) for quota in quotas}
    violated = data.draw(st.permutations(quotas))
    requested = data.draw(st.none() | st.integers(0, 10**15))
    document, _ = exceeded(used, violated, requested)
    first, member = violated[0], document["quota"]
    unit = 1 if first.measure == "requests" else 10**6
    assert document["status"] == (429 if unit == 1 else 402)
    assert (member["limit"] * unit, member["used"] * unit) == (first.limit, used[first])
    assert member["requested"] == (1 if unit == 1 else None if requested is None else Decimal(requested) / unit)
    assert (member["scope"], member["measure"], member["per"]) == (first.scope, first.measure, first.per)
    assert document["violated-policies"] == [quota.policy for quota in violated]
