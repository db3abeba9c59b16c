"""The mean time of a request at upstream, by day. Reports take it as the time that a cached answer saved.

A day's mean is over the organisation's requests to upstream on that day whose price answered a client. A day without
such a request takes the mean of the newest earlier day, at most `LOOK_BACK_DAYS` back.
"""

from collections.abc import Iterable, Mapping
from datetime import date
from typing import NamedTuple

LOOK_BACK_DAYS = 30
"""How much earlier that day may be: RenderNet's speed of long ago says little."""


class UpstreamTime(NamedTuple):
    """The requests that upstream answered on a day, at least one, and their time."""

    calls: int
    us: int

    def of(self, answers: int) -> int:
        """The microseconds that so many answers would have taken, by the mean; rounded down."""
        return answers * self.us // self.calls


def known_means(days: Iterable[date], booked: Mapping[date, UpstreamTime]) -> dict[date, UpstreamTime]:
    """For each of the `days`, which follow each other, its own time at upstream, or the newest of an earlier one."""
    means: dict[date, UpstreamTime] = {}
    newest: UpstreamTime | None = None
    for day in days:
        newest = booked.get(day, newest)
        if newest is not None:
            means[day] = newest
    return means
