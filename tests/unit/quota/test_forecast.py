"""Forecasts of quotas: what is expected, in which calendar, and how good forecasts are on made-up usage."""

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.forecast import CHECK_SEED, REQUIRED, Shape, measure
from proxy.quota.credits import MICRO
from proxy.quota.forecast import HISTORY_DAYS, LOOKBACK_DAYS, MIN_DAYS, Forecast, forecast
from proxy.quota.quotas import Measure, Quota
from proxy.quota.windows import Period, start_of, window_of

BERLIN = ZoneInfo("Europe/Berlin")


def quota(limit: int, per: Period = "month", measure: Measure = "requests", *, refuse: bool = False) -> Quota:
    return Quota("team", measure, per, limit, refuse=refuse)


def at(text: str, zone: ZoneInfo = BERLIN) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=zone).timestamp())


def found(limited: Quota, history: Sequence[int], now: str, used: int, zone: ZoneInfo = BERLIN) -> Forecast:
    now_s = at(now, zone)
    window = window_of(limited.per, now_s, zone)
    forecasted = forecast(limited, used, history, window=window, now_s=now_s, zone=zone)
    assert forecasted is not None
    return forecasted


def amounts_of(found: Forecast) -> tuple[int, int, int]:
    return found.low, found.at_end, found.high


def times_of(found: Forecast) -> tuple[int | None, int | None, int | None]:
    return found.reached_from_s, found.reached_at_s, found.reached_until_s


def days_before(day: date) -> list[date]:
    return [day - timedelta(days=age) for age in range(LOOKBACK_DAYS, 0, -1)]


def noisy(days: int, mean: int = 100) -> list[int]:
    """Amounts that differ by up to a quarter, in a cycle that is not a week's."""
    return [mean + mean * (number * 7 % 11 - 5) // 20 for number in range(days)]


class TestAbsent:
    @pytest.mark.parametrize("per", ["minute", "hour", "day"])
    def test_for_short_windows(self, per: Period) -> None:
        now_s = at("2026-11-11T12:00")
        window = window_of(per, now_s, BERLIN)
        assert forecast(quota(9, per), 1, [1] * 90, window=window, now_s=now_s, zone=BERLIN) is None

    @pytest.mark.parametrize("history", [[], [0] * 90, [0] * 77 + [5] * 13], ids=["none", "no use", "13 days"])
    def test_without_enough_history(self, history: list[int]) -> None:
        now_s = at("2026-11-11T12:00")
        window = window_of("month", now_s, BERLIN)
        assert forecast(quota(9), 1, history, window=window, now_s=now_s, zone=BERLIN) is None


class TestAmounts:
    def test_constant_use_goes_on(self) -> None:
        steady = found(quota(10_000), [100] * MIN_DAYS, "2026-11-11T00:00", 1000)
        assert amounts_of(steady) == (3000, 3000, 3000)

    def test_of_today_the_time_left_is_forecast(self) -> None:
        assert found(quota(10_000), [100] * 90, "2026-11-11T12:00", 1020).at_end == 1020 + 50 + 1900

    @pytest.mark.parametrize(
        ("now", "days_left"),
        [
            ("2026-02-11T00:00", 18),
            ("2028-02-11T00:00", 19),
            ("2026-03-11T00:00", 21),  # clocks go forward on the 29th
            ("2026-10-11T00:00", 21),  # and back on the 25th
            ("2026-12-31T00:00", 1),
            ("2026-12-31T23:59:59", 0),
            ("2026-12-01T00:00", 31),
        ],
    )
    def test_a_month_has_its_own_length(self, now: str, days_left: int) -> None:
        assert found(quota(10_000), [100] * 90, now, 7).at_end in (7 + 100 * days_left, 7 + 100 * days_left + 1)

    def test_a_window_that_has_just_ended_has_nothing_ahead(self) -> None:
        window = window_of("month", at("2026-11-30T12:00"), BERLIN)
        ended = forecast(quota(10_000), 2900, [100] * 90, window=window, now_s=window.end_s, zone=BERLIN)
        assert ended is not None
        assert amounts_of(ended) == (2900, 2900, 2900)
        assert times_of(ended) == (None, None, None)

    def test_a_week_ends_on_sunday(self) -> None:
        assert found(quota(10_000, "week"), [100] * 90, "2026-11-12T00:00", 300).at_end == 700

    def test_a_day_that_the_zone_skipped_has_no_use(self) -> None:
        apia = ZoneInfo("Pacific/Apia")  # no 30 December in 2011
        assert found(quota(10_000), [100] * 90, "2011-12-28T00:00", 2700, apia).at_end == 3000

    def test_a_weekend_without_work_stays_without(self) -> None:
        history = [0 if day.weekday() >= 5 else 100 for day in days_before(date(2026, 11, 13))]
        week = found(quota(10_000, "week"), history, "2026-11-13T00:00", 400)
        assert 500 <= week.at_end < 520
        assert week.low >= 480

    def test_growth_is_followed(self) -> None:
        grown = [round(1000 * 1.01**number) for number in range(110)]
        month = found(quota(100_000), grown[:90], "2026-11-11T00:00", sum(grown[80:90]))
        assert month.at_end == pytest.approx(sum(grown[80:110]), rel=0.05)
        assert month.low < month.at_end < month.high

    def test_one_spike_changes_little(self) -> None:
        calm, spiky = noisy(90), noisy(90)
        spiky[85] = 5000
        first, second = (found(quota(10_000), history, "2026-11-11T00:00", 1000) for history in (calm, spiky))
        assert second.at_end == pytest.approx(first.at_end, rel=0.15)

    def test_after_a_stop_less_and_less_is_expected(self) -> None:
        ends = [
            found(quota(10_000), [*noisy(90 - idle), *[0] * idle], "2026-11-11T00:00", 100).at_end
            for idle in (0, 10, 30, 60)
        ]
        assert ends == sorted(ends, reverse=True)
        assert ends[-1] < 150

    def test_credits_are_whole(self) -> None:
        half = MICRO // 2
        month = found(quota(10_000 * MICRO, measure="estimated_credits"), [half + 1] * 90, "2026-11-11T00:00", half)
        assert amounts_of(month) == (11 * MICRO, 11 * MICRO, 11 * MICRO)  # 10.50002 rounded up

    def test_days_on_which_the_quota_was_used_up_do_not_count(self) -> None:
        days = days_before(date(2026, 11, 11))
        history = [100 if day.day <= 20 else 0 for day in days]
        refused = found(quota(2000, refuse=True), history, "2026-11-11T00:00", 1000)
        warned = found(quota(2000), history, "2026-11-11T00:00", 1000)
        assert amounts_of(refused) == (3000, 3000, 3000)
        assert warned.at_end < 2500

    def test_a_quota_that_was_always_used_up_at_once_goes_on_like_that(self) -> None:
        history = [500 if day.day == 1 else 0 for day in days_before(date(2026, 11, 11))]
        used_up = found(quota(500, refuse=True), history, "2026-11-11T00:00", 500)
        assert 500 < used_up.at_end < 1500
        assert used_up.reached_at_s is not None

    def test_a_quota_that_was_used_up_on_all_but_a_few_days(self) -> None:
        """The known days are all before the first backtest."""
        history = [*[0] * (LOOKBACK_DAYS - 14), *[10] * 7, *[500] * 7]
        assert found(quota(100, "week", refuse=True), history, "2026-11-16T00:00", 0).at_end == 70

    def test_weeks_are_used_up_from_monday(self) -> None:
        days = days_before(date(2026, 11, 11))
        history = [100 if day.weekday() <= 4 else 0 for day in days]
        assert found(quota(500, "week", refuse=True), history, "2026-11-11T00:00", 200).at_end == 700

    def test_only_the_last_days_are_looked_at(self) -> None:
        recent = noisy(HISTORY_DAYS)
        first = found(quota(10_000), recent, "2026-11-11T00:00", 1000)
        assert found(quota(10_000), [*noisy(31, 9999), *recent], "2026-11-11T00:00", 1000) == first

    def test_the_method_says_what_it_used(self) -> None:
        month = found(quota(10_000), [0] * 50 + [100] * 40, "2026-11-11T00:00", 1000)
        assert month.method == "weekday means of 40 days, corrected by 18 backtests"


class TestReached:
    def test_constant_use_reaches_the_limit_at_one_time(self) -> None:
        month = found(quota(2050), [100] * 90, "2026-11-11T00:00", 1000)
        assert times_of(month) == (at("2026-11-21T12:00"),) * 3

    def test_on_a_day_of_25_hours(self) -> None:
        month = found(quota(1450), [100] * 90, "2026-10-11T00:00", 0)
        assert month.reached_at_s == start_of(date(2026, 10, 25), BERLIN) + 25 * 1800

    def test_on_a_day_that_has_begun(self) -> None:
        month = found(quota(1025), [100] * 90, "2026-11-11T12:00", 1000)
        assert month.reached_at_s == at("2026-11-11T18:00")

    def test_not_in_this_window(self) -> None:
        assert times_of(found(quota(3001), [100] * 90, "2026-11-11T00:00", 1000)) == (None, None, None)

    def test_the_range_is_around_the_time(self) -> None:
        from_s, at_s, until_s = times_of(found(quota(2000), noisy(90), "2026-11-11T00:00", 1000))
        assert from_s is not None
        assert at_s is not None
        assert until_s is not None
        assert at("2026-11-11T00:00") < from_s < at_s < until_s < at("2026-12-01T00:00")

    def test_perhaps(self) -> None:
        expected = found(quota(10_000), noisy(90), "2026-11-11T00:00", 1000)
        above, below = expected.at_end + 10, expected.at_end - 10
        maybe, probably = (found(quota(limit), noisy(90), "2026-11-11T00:00", 1000) for limit in (above, below))
        assert [moment is None for moment in times_of(maybe)] == [False, True, True]
        assert [moment is None for moment in times_of(probably)] == [False, False, True]

    def test_an_earlier_day_is_named(self) -> None:
        month = found(quota(250), [100] * 90, "2026-11-11T12:00", 1040)
        assert times_of(month) == (at("2026-11-03T00:00"), at("2026-11-03T12:00"), at("2026-11-04T00:00"))
        assert month.at_end == 1040 + 50 + 1900

    def test_today(self) -> None:
        month = found(quota(1020), [100] * 90, "2026-11-11T12:00", 1040)
        assert times_of(month) == (at("2026-11-11T00:00"), at("2026-11-11T06:00"), at("2026-11-11T12:00") + 1)

    def test_more_in_the_rows_than_was_counted(self) -> None:
        """Rows count what a team used under an earlier id; its quota does not."""
        month = found(quota(900), [100] * 90, "2026-11-11T12:00", 940)
        assert month.reached_until_s == at("2026-11-10T00:00")

    def test_a_limit_of_0_is_reached_at_once(self) -> None:
        month = found(quota(0), [100] * 90, "2026-11-01T00:00", 0)
        assert times_of(month) == (at("2026-11-01T00:00"), at("2026-11-01T00:00"), at("2026-11-01T00:00") + 1)


@given(
    history=st.lists(st.integers(0, 10**15), max_size=100),
    used=st.integers(0, 10**15),
    limit=st.integers(0, 10**16),
    now_s=st.integers(at("2026-01-01T00:00"), at("2028-01-01T00:00")),
    zone=st.sampled_from(["Europe/Berlin", "America/Sao_Paulo", "Australia/Lord_Howe", "Pacific/Apia"]),
    per=st.sampled_from(["week", "month"]),
    refuse=st.booleans(),
)
def test_amounts_and_times_are_in_order(  # noqa: PLR0913 -- hypothesis draws each
    *, history: list[int], used: int, limit: int, now_s: int, zone: str, per: Period, refuse: bool
) -> None:
    calendar = ZoneInfo(zone)
    window = window_of(per, now_s, calendar)
    limited = quota(limit, per, "estimated_credits", refuse=refuse)
    month = forecast(limited, used, history, window=window, now_s=now_s, zone=calendar)
    if month is None:
        return
    assert used <= month.low <= month.at_end <= month.high
    times = [moment for moment in times_of(month) if moment is not None]
    assert times == sorted(times)
    assert all(window.start_s <= moment <= window.end_s for moment in times)
    assert used < limit or len(times) == 3


class TestQuality:
    @pytest.mark.parametrize("shape", REQUIRED)
    def test_on_day_10_the_end_of_the_month_is_known_well(self, shape: Shape) -> None:
        """The table in docs/usage.md has more cases."""
        measured = measure(shape, seed=CHECK_SEED, cases=200)
        assert measured.median_error <= 0.1
        assert 0.75 <= measured.held <= 0.9
        assert measured.dates_held >= 0.75
