"""Calendar windows: the minutes, hours, days, weeks and months of a time zone.

* The windows of one period cover time without gaps or overlaps. Each lies in exactly one window of the next longer
  period, except that a week can lie in two months.
* Days, weeks (from Monday) and months are those of the zone's calendar, so a day can have 23 or 25 hours.
* Hours and minutes are counted in elapsed time from the start of the day. If clocks go back one hour, the repeated hour
  is two windows.
* Instants are whole seconds since 1970 UTC.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Literal, assert_never

Period = Literal["minute", "hour", "day", "week", "month"]


@dataclass(frozen=True, slots=True)
class Window:
    """The time from `start_s` up to, but not including, `end_s`."""

    start_s: int
    end_s: int

    def __contains__(self, at_s: int) -> bool:
        return self.start_s <= at_s < self.end_s


def window_of(per: Period, at_s: int, zone: tzinfo) -> Window:
    """The window that contains `at_s`."""
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
    """The days from `first` up to, but not including, `end`."""
    return Window(start_of(first, zone), start_of(end, zone))


def day_of(at_s: int, zone: tzinfo) -> date:
    """The day that contains `at_s`. If clocks are set back across midnight, the new day continues."""
    day = datetime.fromtimestamp(at_s, zone).date()
    tomorrow = day + timedelta(days=1)
    return tomorrow if at_s >= start_of(tomorrow, zone) else day


def start_of(day: date, zone: tzinfo) -> int:
    """The first instant of a day: the first of two midnights, or the end of the gap if clocks skip midnight."""
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp())


def rfc3339(at_s: int, zone: tzinfo) -> str:
    """An instant in the zone's time, with its UTC offset."""
    return datetime.fromtimestamp(at_s, UTC).astimezone(zone).isoformat()


def _part_of_day(day: date, at_s: int, zone: tzinfo, length_s: int) -> Window:
    day_start_s = start_of(day, zone)
    start_s = day_start_s + (at_s - day_start_s) // length_s * length_s
    return Window(start_s, min(start_s + length_s, start_of(day + timedelta(days=1), zone)))
