"""What a process is doing: whether it is about to leave, and how much it has under way.

Who waits for upstream costs nothing meanwhile, so what is under way has two bounds: one on those that the process
itself works on, which keeps their answers quick, and one on all. Beyond either a request is told at once to come back,
which is cheap, rather than made to wait in a queue that grows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MAX_AT_WORK = 1000
"""Some tenths of a second of a busy core's time."""

MAX_IN_FLIGHT = 2000


@dataclass(slots=True)
class Lifecycle:
    draining: bool = False
    in_flight: int = 0
    waiting: int = 0
    """Of those in flight, the ones that wait for upstream, or for another's request to it."""
    stop_by: float = 0.0
    """Monotonic time by which everything is to be over, once it is stopping."""

    def is_overloaded(self) -> bool:
        """With the request that asks, which is in flight already."""
        return self.in_flight > MAX_IN_FLIGHT or self.in_flight - self.waiting > MAX_AT_WORK

    @contextmanager
    def waiting_for_upstream(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1
