"""The bench's own load: keeps connections busy, or sends at a fixed rate.

Run as `python -m bench.loader SPEC`, SPEC being a JSON object; prints the result as one.

* Busy: each of `connections` connections sends its next request when it has received an answer.
* At a rate: requests have evenly spaced times. Each is sent on a free connection at its time, or as soon as one is
  free, and its latency counts from its time: a stalled server cannot hide its latency by receiving fewer requests.
* Timers of uvloop and epoll have a resolution of a millisecond, so a rate uses `select`, with about 50 µs.
"""

import asyncio
import json
import selectors
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any, BinaryIO, cast

import httptools
import uvloop

GRACE_S = 5.0
"""Time to wait for the last answers."""


@dataclass(slots=True)
class Spec:
    """rate: requests per second, or 0 to keep all connections busy. most: maximum number of requests, or 0."""

    host: str
    port: int
    file: str
    first: int
    connections: int
    seconds: float
    rate: float = 0.0
    most: int = 0


class Tally:
    """The results of a load."""

    def __init__(self) -> None:
        self.latencies_s: list[float] = []
        self.refused = 0
        self.broken = 0

    def result(self, seconds: float) -> dict[str, Any]:
        ordered = sorted(self.latencies_s)
        return {
            "requests": len(ordered),
            "seconds": seconds,
            "p50_ms": _share(ordered, 0.50) * 1000,
            "p99_ms": _share(ordered, 0.99) * 1000,
            "refused": self.refused,
            "broken": self.broken,
        }


class Loading:
    """One load. `free`: connections without a request; `late`: times that passed while none was free."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.tally = Tally()
        self.requests = _requests(Path(spec.file), spec.first)
        self.free: deque[_Connection] = deque()
        self.late: deque[float] = deque()
        self._sent = 0
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()

    async def run(self) -> dict[str, Any]:
        spec = self.spec
        for _ in range(spec.connections):
            await self._loop.create_connection(lambda: _Connection(self), spec.host, spec.port)
        began = self._began = perf_counter()
        self._until = began + spec.seconds
        if spec.rate:
            self._send_due()
        else:
            for connection in list(self.free):
                self.send_next(connection)
        async with asyncio.timeout(spec.seconds + GRACE_S):
            await self._over.wait()
        return self.tally.result(perf_counter() - began)

    def send_next(self, connection: "_Connection") -> None:
        """Sends a free connection's next request, or one that is late."""
        if self.spec.rate:
            if self.late:
                connection.send(next(self.requests), self.late.popleft())
            else:
                self.free.append(connection)
        elif self._may_send():
            self._sent += 1
            connection.send(next(self.requests), perf_counter())
        self._end_if_over()

    def give_up(self) -> None:
        """Stops the load, because a connection broke and its results are invalid."""
        self.tally.broken += 1
        self._over.set()

    def _may_send(self) -> bool:
        return perf_counter() < self._until and not 0 < self.spec.most <= self._sent

    def _send_due(self) -> None:
        now = perf_counter()
        while (due := self._began + self._sent / self.spec.rate) <= now and due < self._until:
            self._sent += 1
            if self.free:
                self.free.popleft().send(next(self.requests), due)
            else:
                self.late.append(due)
        if due < self._until:
            self._loop.call_later(due - perf_counter(), self._send_due)
        else:
            self._until = 0.0  # all requests are sent or late
            self._end_if_over()

    def _end_if_over(self) -> None:
        if len(self.tally.latencies_s) >= self._sent and (self._until == 0 or not (self.spec.rate or self._may_send())):
            self._over.set()


class _Connection(asyncio.Protocol):
    def __init__(self, loading: Loading) -> None:
        self._loading = loading
        self._parser = httptools.HttpResponseParser(self)
        self._since: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._loading.free.append(self)

    def send(self, request: bytes, since: float) -> None:
        self._since = since
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        assert self._since is not None
        tally = self._loading.tally
        tally.latencies_s.append(perf_counter() - self._since)
        self._since = None
        tally.refused += self._parser.get_status_code() >= 400
        self._loading.send_next(self)

    def connection_lost(self, _: Exception | None) -> None:
        if self._since is not None:
            self._loading.give_up()


def _requests(path: Path, first: int) -> Iterator[bytes]:
    """Yields the requests of a traffic file endlessly."""
    with path.open("rb") as file:
        kind, *numbers = file.readline().split()
        if kind == b"listed":
            pieces = [_piece(file) for _ in range(int(numbers[0]))]
            return cycle([pieces[int(file.readline()) - 1] for _ in range(int(numbers[1]))])
        before, after = _piece(file), _piece(file)
        if distinct := int(numbers[0]):
            chance = Random(first)
            return (before + b"%012d" % (10**11 + chance.randint(1, distinct)) + after for _ in count())
        return (before + b"%012d" % number + after for number in count(first + 1))


def _piece(file: BinaryIO) -> bytes:
    return file.read(int(file.readline()))


def _share(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


async def load(spec: Spec) -> dict[str, Any]:
    return await Loading(spec).run()


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))

    def loop() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(selectors.SelectSelector()) if spec.rate else uvloop.new_event_loop()

    try:
        with asyncio.Runner(loop_factory=loop) as runner:
            sys.stdout.write(json.dumps(runner.run(load(spec))))
    except TimeoutError:
        sys.exit(f"the server was still behind {GRACE_S:g} s after the last request was to be sent")


if __name__ == "__main__":
    main()
