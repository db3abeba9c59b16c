"""What a process is doing: whether it is about to stop, and how much it has under way.

A request that waits for upstream, or for the rest of its body, costs no CPU meanwhile. So there are three limits: on
the requests that this process works on, which keeps their answers quick; on all whose body is there; and on the bodies
that are still arriving, of which one team can hold half. A request beyond a limit is refused at once, which is cheap,
rather than queued.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

MAX_ACTIVE = 1000
"""Some tenths of a second of a busy core's time."""

MAX_IN_FLIGHT = 2000

MAX_ARRIVING_BYTES = 256 * 2**20
"""Limits the memory of bodies that are still arriving."""

MAX_TEAM_SHARE = 0.5

ARRIVING_REQUEST_BYTES = 32 * 2**10
"""What a request takes besides its body while it waits for it: a task, a connection, headers."""


class Arrival:
    """The memory that one request takes while its body is arriving. `held` counts that of all requests by team."""

    def __init__(self, reserved: Counter[str], team: str) -> None:
        self._reserved = reserved
        self._team = team
        self._size = 0

    def reserve(self, size: int) -> bool:
        """Takes `size` more bytes; False, and nothing is taken, if all teams or this one would then have too many."""
        exceeds = (
            self._reserved.total() + size > MAX_ARRIVING_BYTES
            or self._reserved[self._team] + size > MAX_TEAM_SHARE * MAX_ARRIVING_BYTES
        )
        if not exceeds:
            self._reserved[self._team] += size
            self._size += size
        return not exceeds

    def release(self) -> None:
        self._reserved[self._team] -= self._size
        if not self._reserved[self._team]:
            del self._reserved[self._team]


@dataclass(slots=True)
class InFlightTracker:
    draining: bool = False
    in_flight: int = 0
    """Requests that have all of their body, or need none."""
    waiting: int = 0
    """Of those in flight, the ones that wait for upstream, or for another's request to it."""
    arriving_bytes: Counter[str] = field(default_factory=Counter)
    """Memory of requests whose body is still arriving, by team."""
    stop_deadline: float = 0.0
    """Monotonic time by which everything is to be over, once it is stopping."""

    def is_overloaded(self) -> bool:
        """With the request that asks, which is in flight already."""
        return self.in_flight > MAX_IN_FLIGHT or self.in_flight - self.waiting > MAX_ACTIVE

    @contextmanager
    def waiting_for_upstream(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    @contextmanager
    def arriving(self, team: str) -> Iterator[Arrival]:
        """A request is not in flight while its body is arriving."""
        arrival = Arrival(self.arriving_bytes, team)
        self.in_flight -= 1
        try:
            yield arrival
        finally:
            self.in_flight += 1
            arrival.release()
