"""Load on gateways for a limited time, with the answers and their latencies."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from decimal import Decimal
from itertools import count

import httpx2

from fleet import TeamClient
from gateway_fixture import cache_status, code_of
from gateway_process import GatewayProcess, Tree
from ledger_snapshot import snapshot_of
from serving import wait_until

LANES = 4
PAUSE_S = 0.01
"""A client's pause between two requests, so that a busy machine can serve the load."""

CREDITS: Tree = {"measure": "estimated_credits", "limit": 10**6, "per": "month"}
REQUESTS: Tree = {"measure": "requests", "limit": 10**6, "per": "month"}
"""Limits that no test reaches: with them the counters are shown."""

PRICE = 3
_NUMBERS = count()


def new_body() -> bytes:
    """A new question that costs `PRICE`."""
    return b'[{"model":"Flux","steps":30,"seed":%d}]' % next(_NUMBERS)


@dataclass(frozen=True)
class TimedAnswer:
    """An answer, and how long it took as its client sees it."""

    answer: httpx2.Response
    seconds: float

    @property
    def says(self) -> str:
        """Such as `200 hit`, `200 fwd=miss`, `503 store-unavailable`."""
        status = self.answer.status_code
        return f"{status} {cache_status(self.answer).split(';')[0] if status == 200 else code_of(self.answer)}"


def timed(team: TeamClient, at: int, body: bytes) -> TimedAnswer:
    began = time.monotonic()
    answer = team.ask(at, body)
    return TimedAnswer(answer, time.monotonic() - began)


class LoadGenerator:
    """`LANES` clients that send requests to one gateway for `for_s` seconds, each one request after the other."""

    def __init__(self, team: TeamClient, at: int, body: Callable[[], bytes], *, for_s: float) -> None:
        until = time.monotonic() + for_s

        def lane() -> Iterator[TimedAnswer]:
            while time.monotonic() < until:
                yield timed(team, at, body())
                time.sleep(PAUSE_S)

        self._lanes: list[Future[list[TimedAnswer]]] = [
            team.fleet.pool.submit(lambda: list(lane())) for _ in range(LANES)
        ]

    def answers(self) -> list[TimedAnswer]:
        return [told for lane in self._lanes for told in lane.result(30)]


def slowest_s(told: Sequence[TimedAnswer]) -> float:
    return max(one.seconds for one in told)


def answered(told: Sequence[TimedAnswer]) -> int:
    return sum(one.answer.status_code == 200 for one in told)


class LogTail:
    """The log lines that a gateway writes from now on, without its request lines."""

    def __init__(self, served: GatewayProcess) -> None:
        self._served = served
        self._before = len(served.lines())

    def said(self) -> list[str]:
        lines = self._served.lines()[self._before :]
        return [line["message"] for line in lines if line["message"] != "request"]

    def messages(self, text: str) -> list[str]:
        return [message for message in self.said() if text in message]

    def assert_one_incident(self, fails: str, ends: str) -> None:
        """Asserts that one incident was opened, with at most three reasons, and closed, each logged once."""
        wait_until(lambda: any(line.startswith(ends) for line in self.said()))  # lines are written a moment later
        *begins, end = (line for line in self.said() if line.startswith((fails, ends)))
        assert end.startswith(ends)
        assert all(line.startswith(fails) for line in begins), self.said()
        assert 1 <= len(begins) == len(set(begins)) <= 3, begins


def metric(client: httpx2.Client, series: str) -> float:
    """The sum of all samples whose names begin with `estimate_proxy_` and `series`."""
    samples = (line.rpartition(" ") for line in client.get("/metrics").text.splitlines())
    return sum(float(value) for name, _, value in samples if name.startswith(f"estimate_proxy_{series}"))


def degraded(client: httpx2.Client) -> list[str]:
    answer = client.get("/readyz")
    assert answer.status_code == 200
    return list(answer.json()["degraded"])


def assert_booked(team: TeamClient, answers: int, *, at: int = 0, perhaps: int = 0) -> None:
    """Asserts that each answered request is booked once, and at most `perhaps` others."""
    books = snapshot_of(team, at)
    requests, credits_used = books.usage["requests"], books.usage["estimated_credits"]
    assert books.used == [credits_used, requests]
    assert sum(books.usage["outcomes"].values()) == requests + books.usage["refused"]
    assert answers <= requests <= answers + perhaps, books
    assert answers * PRICE <= credits_used <= Decimal((answers + perhaps) * PRICE), books
