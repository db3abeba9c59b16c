"""Calendar windows, against an oracle that only reads clocks, also on days with clock changes and skipped days."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from functools import cache
from itertools import pairwise
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.quota.windows import Period, Window, day_of, days, rfc3339, start_of, window_of

ZONES = ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe")
ALL_PERS: tuple[Period, ...] = ("minute", "hour", "day", "week", "month")
HOUR = 3600
DAY = 24 * HOUR

every_zone = pytest.mark.parametrize("key", ZONES)


def instant(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


# --- Every day of two years -------------------------------------------------------------------------------------

FIRST, LAST = date(2026, 1, 1), date(2027, 12, 31)


@cache
def clock_days(key: str) -> list[tuple[int, date]]:
    """The start of each local day in these years, found by reading the zone's clocks every half hour."""
    begin, end = instant("2025-11-29T00:00Z"), instant("2028-02-03T00:00Z")
    read = ((at, datetime.fromtimestamp(at, UTC).astimezone(ZoneInfo(key)).date()) for at in range(begin, end, 1800))
    begins, last = [], date.min
    for at, day in read:
        assert day >= last, "none of these zones goes back across midnight"
        if day != last:
            begins.append((at, day))
        last = day
    return begins[1:]  # the first day started before the range


def grouped(key: str, group: Callable[[date], object]) -> list[Window]:
    """The windows made of consecutive days of the same group."""
    begins = [
        at for (_, before), (at, day) in pairwise([(0, date.min), *clock_days(key)]) if group(day) != group(before)
    ]
    return [Window(*ends) for ends in pairwise(begins)]


GROUPS: dict[Period, Callable[[date], object]] = {
    "day": lambda day: day,
    "week": lambda day: day.isocalendar()[:2],
    "month": lambda day: (day.year, day.month),
}


@every_zone
@pytest.mark.parametrize("per", GROUPS)
def test_windows_are_those_that_clocks_show(key: str, per: Period) -> None:
    zone, expected = ZoneInfo(key), grouped(key, GROUPS[per])
    starts = [window.start_s for window in expected]
    for begin, day in clock_days(key):
        if FIRST <= day <= LAST:
            window = expected[bisect_right(starts, begin) - 1]
            for at in (begin, begin + 1, begin + 5 * HOUR, begin + 22 * HOUR + 1799):
                assert window_of(per, at, zone) == window, (day, at)


@every_zone
def test_a_day_has_the_date_that_clocks_show(key: str) -> None:
    for (begin, day), (end, _) in pairwise(clock_days(key)):
        assert start_of(day, ZoneInfo(key)) == begin
        assert {day_of(at, ZoneInfo(key)) for at in (begin, begin + DAY // 2, end - 1)} == {day}


@pytest.mark.parametrize(
    ("key", "lengths"),
    [
        ("Europe/Berlin", {23 * HOUR: 2, 24 * HOUR: 726, 25 * HOUR: 2}),
        ("America/New_York", {23 * HOUR: 2, 24 * HOUR: 726, 25 * HOUR: 2}),
        ("Australia/Lord_Howe", {23 * HOUR + 1800: 2, 24 * HOUR: 726, 24 * HOUR + 1800: 2}),
        ("UTC", {24 * HOUR: 730}),
    ],
)
def test_days_with_clock_changes_are_shorter_or_longer(key: str, lengths: dict[int, int]) -> None:
    every_day = [FIRST + timedelta(days=number) for number in range(730)]
    windows = [window_of("day", start_of(day, ZoneInfo(key)) + 12 * HOUR, ZoneInfo(key)) for day in every_day]
    assert every_day[-1] == LAST
    assert Counter(window.end_s - window.start_s for window in windows) == lengths


@pytest.mark.parametrize("key", ["Europe/Berlin", "America/New_York", "UTC"])
def test_an_hour_is_the_clocks_hour_where_clocks_change_by_whole_hours(key: str) -> None:
    for begin, _ in clock_days(key):
        for at in range(begin, begin + DAY, 1800):
            assert window_of("hour", at + 7, ZoneInfo(key)) == Window(at // HOUR * HOUR, at // HOUR * HOUR + HOUR)


@every_zone
def test_a_minute_is_the_clocks_minute(key: str) -> None:
    for begin, _ in clock_days(key):
        for at in (begin, begin + 59, begin + 2 * HOUR + 30, begin + 23 * HOUR):
            assert window_of("minute", at, ZoneInfo(key)) == Window(at // 60 * 60, at // 60 * 60 + 60)


# --- Odd days ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per", "at", "start", "end"),
    [
        # clocks forward at 02:00, and back at 03:00
        ("day", "2026-03-29T12:00+02:00", "2026-03-29T00:00+01:00", "2026-03-30T00:00+02:00"),
        ("day", "2026-10-25T12:00+01:00", "2026-10-25T00:00+02:00", "2026-10-26T00:00+01:00"),
        ("hour", "2026-03-29T03:10+02:00", "2026-03-29T03:00+02:00", "2026-03-29T04:00+02:00"),
        ("hour", "2026-10-25T02:10+02:00", "2026-10-25T02:00+02:00", "2026-10-25T02:00+01:00"),
        ("hour", "2026-10-25T02:10+01:00", "2026-10-25T02:00+01:00", "2026-10-25T03:00+01:00"),
        ("week", "2026-03-29T23:59:59+02:00", "2026-03-23T00:00+01:00", "2026-03-30T00:00+02:00"),
        ("week", "2026-03-30T00:00+02:00", "2026-03-30T00:00+02:00", "2026-04-06T00:00+02:00"),
        ("week", "2027-01-01T12:00+01:00", "2026-12-28T00:00+01:00", "2027-01-04T00:00+01:00"),
        ("month", "2026-10-01T00:00+02:00", "2026-10-01T00:00+02:00", "2026-11-01T00:00+01:00"),
        ("month", "2026-12-31T23:59:59+01:00", "2026-12-01T00:00+01:00", "2027-01-01T00:00+01:00"),
        ("month", "2028-02-29T12:00+01:00", "2028-02-01T00:00+01:00", "2028-03-01T00:00+01:00"),
        ("minute", "2026-10-25T02:59:59+02:00", "2026-10-25T02:59+02:00", "2026-10-25T03:00+02:00"),
    ],
)
def test_windows_in_berlin(per: Period, at: str, start: str, end: str) -> None:
    expected = Window(instant(start), instant(end))
    assert window_of(per, instant(at), ZoneInfo("Europe/Berlin")) == expected


def test_the_new_day_continues_if_clocks_go_back_across_midnight() -> None:
    """In St. John's, at 00:01 on 7 November 2010, it was 23:01 on the 6th again."""
    zone = ZoneInfo("America/St_Johns")
    first_midnight, second_midnight = instant("2010-11-07T00:00-02:30"), instant("2010-11-07T00:00-03:30")
    shown_again = instant("2010-11-06T23:30-03:30")
    assert datetime.fromtimestamp(shown_again, zone).date() == date(2010, 11, 6)
    day = window_of("day", shown_again, zone)
    assert day == Window(first_midnight, instant("2010-11-08T00:00-03:30"))
    assert day.end_s - day.start_s == 25 * HOUR
    assert {day_of(at, zone) for at in (first_midnight, shown_again, second_midnight)} == {date(2010, 11, 7)}
    assert day_of(first_midnight - 1, zone) == date(2010, 11, 6)
    # 1 November 2009 was such a day, and the start of a month.
    first = instant("2009-11-01T00:00-02:30")
    for at in (first, instant("2009-10-31T23:01-03:30"), instant("2009-11-01T00:00-03:30")):
        assert window_of("month", at, zone) == Window(first, instant("2009-12-01T00:00-03:30"))


def test_a_day_without_midnight_starts_after_the_gap() -> None:
    """In Beirut, clocks went from 24:00 to 01:00 on 30 March 2025."""
    zone = ZoneInfo("Asia/Beirut")
    start = instant("2025-03-30T01:00+03:00")
    assert start_of(date(2025, 3, 30), zone) == start
    assert window_of("day", start, zone) == Window(start, start + 23 * HOUR)
    assert window_of("day", start - 1, zone) == Window(start - DAY, start)


def test_a_day_that_a_zone_skips_has_no_length() -> None:
    """Samoa went from the end of 29 December 2011 to the start of the 31st."""
    zone = ZoneInfo("Pacific/Apia")
    shift = instant("2011-12-31T00:00+14:00")
    assert days(date(2011, 12, 30), date(2011, 12, 31), zone) == Window(shift, shift)
    assert (day_of(shift - 1, zone), day_of(shift, zone)) == (date(2011, 12, 29), date(2011, 12, 31))
    assert window_of("day", shift - 1, zone) == Window(shift - DAY, shift)
    assert window_of("day", shift, zone) == Window(shift, shift + DAY)
    for at in (shift - 1, shift):
        week, month = window_of("week", at, zone), window_of("month", at, zone)
        assert (week.end_s - week.start_s, month.end_s - month.start_s) == (6 * DAY, 30 * DAY)


@pytest.mark.parametrize(
    ("day", "length", "last"),
    [(date(2026, 4, 5), 24 * HOUR + 1800, 1800), (date(2026, 10, 4), 23 * HOUR + 1800, 1800)],
)
def test_a_change_by_half_an_hour_shortens_the_last_hour(day: date, length: int, last: int) -> None:
    zone = ZoneInfo("Australia/Lord_Howe")
    start = start_of(day, zone)
    hours = list(windows_between("hour", start, start + length, zone))
    assert [window.end_s - window.start_s for window in hours] == [HOUR] * (length // HOUR) + [last]
    assert hours[-1].end_s == start_of(day + timedelta(days=1), zone)


def windows_between(per: Period, start_s: int, end_s: int, zone: ZoneInfo) -> Iterator[Window]:
    while start_s < end_s:
        window = window_of(per, start_s, zone)
        yield window
        start_s = window.end_s


# --- Any zone, any instant --------------------------------------------------------------------------------------

zones = st.sampled_from(sorted(available_timezones())).map(ZoneInfo)


def shifts(year: int, zone: ZoneInfo) -> list[int]:
    """The clock changes of a zone in a year, each as the start of the twelve hours that contain it."""
    spans = range(instant(f"{year}-01-01T00:00Z"), instant(f"{year + 1}-01-01T00:00Z"), DAY // 2)
    offsets = [datetime.fromtimestamp(at, zone).utcoffset() for at in spans]
    return [at for at, (before, after) in zip(spans, pairwise(offsets), strict=False) if before != after]


@st.composite
def moments(draw: st.DrawFn) -> tuple[int, ZoneInfo]:
    """An instant and a zone, half of the time near a clock change."""
    zone, year = draw(zones), draw(st.integers(1970, 2099))
    near = shifts(year, zone) if draw(st.booleans()) else []
    if near:
        return draw(st.sampled_from(near)) + draw(st.integers(-36 * HOUR, 48 * HOUR)), zone
    return draw(st.integers(instant(f"{year}-01-01T00:00Z"), instant(f"{year + 1}-01-01T00:00Z"))), zone


@given(moments())
@example((0, ZoneInfo("Africa/Monrovia")))  # whose offset has seconds
@example((instant("2010-11-06T23:30-03:30"), ZoneInfo("America/St_Johns")))
@example((instant("2011-12-31T00:00+14:00"), ZoneInfo("Pacific/Apia")))
def test_windows_of_a_period_have_no_gaps_or_overlaps(moment: tuple[int, ZoneInfo]) -> None:
    at, zone = moment
    for per in ALL_PERS:
        window = window_of(per, at, zone)
        assert window.start_s <= at < window.end_s
        assert window_of(per, window.start_s, zone) == window
        assert window_of(per, window.end_s - 1, zone) == window
        assert window_of(per, window.end_s, zone).start_s == window.end_s
        assert window_of(per, window.start_s - 1, zone).end_s == window.start_s


@given(moments())
def test_each_window_is_inside_one_of_the_next_longer_period(moment: tuple[int, ZoneInfo]) -> None:
    at, zone = moment
    window = {per: window_of(per, at, zone) for per in ALL_PERS}
    nested: list[tuple[Period, Period]] = [("minute", "hour"), ("hour", "day"), ("day", "week"), ("day", "month")]
    for inner, outer in nested:
        assert window[outer].start_s <= window[inner].start_s
        assert window[inner].end_s <= window[outer].end_s


@given(moments())
def test_a_day_has_the_date_that_clocks_show_at_its_start(moment: tuple[int, ZoneInfo]) -> None:
    at, zone = moment
    day, window = day_of(at, zone), window_of("day", at, zone)
    assert datetime.fromtimestamp(window.start_s, zone).date() == day
    assert window == days(day, day + timedelta(days=1), zone)
    assert day_of(window.start_s - 1, zone) < day < day_of(window.end_s, zone)


@given(moments(), st.integers(1, 40))
def test_consecutive_days_make_one_window(moment: tuple[int, ZoneInfo], count: int) -> None:
    at, zone = moment
    first = day_of(at, zone)
    window = days(first, first + timedelta(days=count), zone)
    apart = list(windows_between("day", window.start_s, window.end_s, zone))
    assert apart[0] == window_of("day", at, zone)
    assert apart[-1].end_s == window.end_s
    assert count - 1 <= len(apart) <= count, "a zone may have left out one of them"


# --- As text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "key", "text"),
    [
        (0, "UTC", "1970-01-01T00:00:00+00:00"),
        (1_793_404_800, "Europe/Berlin", "2026-10-31T01:00:00+01:00"),
        (1_793_404_800, "America/New_York", "2026-10-30T20:00:00-04:00"),
        (1_793_404_800, "Asia/Kathmandu", "2026-10-31T05:45:00+05:45"),
    ],
)
def test_an_instant_as_local_time(at: int, key: str, text: str) -> None:
    assert rfc3339(at, ZoneInfo(key)) == text


@given(moments())
def test_local_time_reads_back_as_the_instant(moment: tuple[int, ZoneInfo]) -> None:
    at, zone = moment
    assert instant(rfc3339(at, zone)) == at
