"""Crowds before gateways: they ask for as long as a test wants, and know what they were told and how soon."""

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
"""Of each between two questions: a crowd is to be served by a machine that has other things to do."""

CREDITS: Tree = {"measure": "estimated_credits", "limit": 10**6, "per": "month"}
REQUESTS: Tree = {"measure": "requests", "limit": 10**6, "per": "month"}
"""Nobody reaches these: they show their counters."""

PRICE = 3
_NUMBERS = count()


def new_body() -> bytes:
    """A question that nobody has asked before, at `PRICE`."""
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
    """Asks one gateway from now on, for so long: each of its members one question after the other."""

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
    """What a gateway says from now on, but for its line about each request."""

    def __init__(self, served: GatewayProcess) -> None:
        self._served = served
        self._before = len(served.lines())

    def said(self) -> list[str]:
        lines = self._served.lines()[self._before :]
        return [line["message"] for line in lines if line["message"] != "request"]

    def messages(self, text: str) -> list[str]:
        return [message for message in self.said() if text in message]

    def assert_one_incident(self, fails: str, ends: str) -> None:
        """It has begun, perhaps with more than one reason, and it is over; each of that was said once."""
        wait_until(lambda: any(line.startswith(ends) for line in self.said()))  # lines are written a moment later
        *begins, end = (line for line in self.said() if line.startswith((fails, ends)))
        assert end.startswith(ends)
        assert all(line.startswith(fails) for line in begins), self.said()
        assert 1 <= len(begins) == len(set(begins)) <= 3, begins


def metric(client: httpx2.Client, series: str) -> float:
    """The sum of what a gateway shows under names that begin so, after the prefix of all names."""
    samples = (line.rpartition(" ") for line in client.get("/metrics").text.splitlines())
    return sum(float(value) for name, _, value in samples if name.startswith(f"estimate_proxy_{series}"))


def degraded(client: httpx2.Client) -> list[str]:
    answer = client.get("/readyz")
    assert answer.status_code == 200
    return list(answer.json()["degraded"])


def assert_booked(team: TeamClient, answers: int, *, at: int = 0, perhaps: int = 0) -> None:
    """All that was answered is on the books, once; of what was not, no more than what went out without a reply."""
    books = snapshot_of(team, at)
    requests, credits_used = books.usage["requests"], books.usage["estimated_credits"]
    assert books.used == [credits_used, requests]
    assert sum(books.usage["outcomes"].values()) == requests + books.usage["refused"]
    assert answers <= requests <= answers + perhaps, books
    assert answers * PRICE <= credits_used <= Decimal((answers + perhaps) * PRICE), books
