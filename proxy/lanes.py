"""Connections to upstream, in lanes: small pools of httpx2's.

For each request a pool looks at every connection that it has, twice, to see which have been closed. With one pool of a
hundred that would be most of the time of a miss; a lane has few.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2

MAX_LANE_CONNECTIONS = 8


@dataclass(slots=True)
class _Lane:
    """`room`: connections that are free; below 0 it is a queue."""

    transport: httpx2.AsyncHTTPTransport
    room: int


class Lanes:
    """As many lanes as it takes. `make` makes one of so many connections; `close` must be called."""

    def __init__(self, max_connections: int, make: Callable[[int], httpx2.AsyncHTTPTransport]) -> None:
        starts = range(0, max_connections, MAX_LANE_CONNECTIONS)
        sizes = [min(MAX_LANE_CONNECTIONS, max_connections - start) for start in starts]
        self._lanes = [_Lane(make(size), size) for size in sizes]

    @contextmanager
    def one(self) -> Iterator[httpx2.AsyncHTTPTransport]:
        """For one exchange: the first lane with room, so that few connections are kept busy, or else the freest."""
        lane = next((lane for lane in self._lanes if lane.room > 0), None) or max(self._lanes, key=_room)
        lane.room -= 1
        try:
            yield lane.transport
        finally:
            lane.room += 1

    async def close(self) -> None:
        for lane in self._lanes:
            await lane.transport.aclose()


def _room(lane: _Lane) -> int:
    return lane.room
