"""The mean time at upstream that counts on a day."""

from datetime import date

from proxy.quota.upstream_time import UpstreamTime, known_means

MONDAY, TUESDAY, WEDNESDAY, THURSDAY = (date(2026, 11, day) for day in range(2, 6))
WEEK = (MONDAY, TUESDAY, WEDNESDAY, THURSDAY)


def test_a_day_without_requests_has_the_mean_of_the_newest_earlier_day() -> None:
    fast, slow = UpstreamTime(2, 100), UpstreamTime(1, 900)
    assert known_means(WEEK, {MONDAY: fast, WEDNESDAY: slow}) == {
        MONDAY: fast,
        TUESDAY: fast,
        WEDNESDAY: slow,
        THURSDAY: slow,
    }


def test_a_later_day_says_nothing_about_an_earlier_one() -> None:
    assert known_means(WEEK, {THURSDAY: UpstreamTime(1, 5)}) == {THURSDAY: UpstreamTime(1, 5)}
    assert known_means(WEEK, {}) == {}


def test_the_time_of_several_answers_is_rounded_once() -> None:
    assert UpstreamTime(calls=3, us=10).of(3) == 10
    assert UpstreamTime(calls=3, us=10).of(1) == 3
    assert UpstreamTime(calls=3, us=10).of(0) == 0
