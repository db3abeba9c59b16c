"""Counts the requests of one process, and limits them. Also holds whether the process is draining.

A request that waits for upstream, or for the rest of its body, costs memory but no CPU time. So there are three limits:

* on active requests, which use CPU time: it keeps their answers quick;
* on all requests whose bodies have arrived;
* on the memory of requests whose bodies are still arriving; one team can hold half of it.

A request beyond a limit is refused at once rather than queued: refusing is cheap.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

MAX_ACTIVE = 1000
"""Limits active requests: these many take some tenths of a second of a busy core's time."""

MAX_IN_FLIGHT = 2000
"""Limits active and waiting requests together."""

MAX_ARRIVING_BYTES = 256 * 2**20
"""Limits the memory of requests whose bodies are still arriving."""

MAX_TEAM_SHARE = 0.5
"""Limits the part of `MAX_ARRIVING_BYTES` that one team can take."""

ARRIVING_REQUEST_BYTES = 32 * 2**10
"""The memory of a request with an arriving body, without the body: a task, a connection, headers."""


class Arrival:
    """The memory that is reserved for one request while its body arrives.

    reserved: bytes of all such requests, by team.
    """

    def __init__(self, reserved: Counter[str], team: str) -> None:
        self._reserved = reserved
        self._team = team
        self._size = 0

    def reserve(self, size: int) -> bool:
        """Reserves `size` more bytes. Returns False and reserves nothing if that would pass a limit."""
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
    """Requests whose body has arrived, or that need none."""
    waiting: int = 0
    """The requests in flight that wait for upstream, or for another request's call to it."""
    arriving_bytes: Counter[str] = field(default_factory=Counter)
    """Memory reserved for requests whose body is still arriving, by team."""
    stop_deadline: float = 0.0
    """When a stopping process must have finished, on the monotonic clock."""

    def is_overloaded(self) -> bool:
        """Whether a limit is passed. Count the request as in flight before you call this."""
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
        """While the body of a request arrives, the request is not in flight."""
        arrival = Arrival(self.arriving_bytes, team)
        self.in_flight -= 1
        try:
            yield arrival
        finally:
            self.in_flight += 1
            arrival.release()
