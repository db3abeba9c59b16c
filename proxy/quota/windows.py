"""Calendar windows: the minutes, hours, days, weeks and months of one time zone.

Windows of a kind cover time without gap or overlap, and each lies in exactly one of the next larger kind (but weeks and
months cross). Days, Monday's weeks and months are those of the zone's calendar, so a day may have 23 or 25 hours. Hours
and minutes are counted from the day's begin in elapsed time: that is the clock's own hour wherever clocks are shifted
by whole ones, and never one that happens twice.

Instants are whole seconds since 1970 UTC.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Literal, assert_never

Period = Literal["minute", "hour", "day", "week", "month"]


@dataclass(frozen=True, slots=True)
class Window:
    """From `start_s` up to, and without, `end_s`."""

    start_s: int
    end_s: int


def window_of(per: Period, at_s: int, zone: tzinfo) -> Window:
    """The window that `at_s` lies in."""
    day = day_of(at_s, zone)
    match per:
        case "minute":
            return _part_of_day(day, at_s, zone, 60)
        case "hour":
            return _part_of_day(day, at_s, zone, 3600)
        case "day":
            return days(day, day + timedelta(days=1), zone)
        case "week":
            monday = day - timedelta(days=day.weekday())
            return days(monday, monday + timedelta(days=7), zone)
        case "month":
            first = day.replace(day=1)
            return days(first, (first + timedelta(days=31)).replace(day=1), zone)
        case _:
            assert_never(per)


def days(first: date, end: date, zone: tzinfo) -> Window:
    """The days from `first` up to, and without, `end`."""
    return Window(start_of(first, zone), start_of(end, zone))


def day_of(at_s: int, zone: tzinfo) -> date:
    """The day that `at_s` lies in. Where clocks were set back over midnight, the new day goes on."""
    day = datetime.fromtimestamp(at_s, zone).date()
    tomorrow = day + timedelta(days=1)
    return tomorrow if at_s >= start_of(tomorrow, zone) else day


def start_of(day: date, zone: tzinfo) -> int:
    """The first instant of a day: the first midnight of two, or the end of the gap it fell into."""
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp())


def rfc3339(at_s: int, zone: tzinfo) -> str:
    """An instant as the zone's clocks show it."""
    return datetime.fromtimestamp(at_s, UTC).astimezone(zone).isoformat()


def _part_of_day(day: date, at_s: int, zone: tzinfo, length_s: int) -> Window:
    start = start_of(day, zone)
    start_s = start + (at_s - start) // length_s * length_s
    return Window(start_s, min(start_s + length_s, start_of(day + timedelta(days=1), zone)))
