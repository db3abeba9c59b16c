"""The upstream of the price book's model: its requests, its replies, and the circuit breaker for it."""

from dataclasses import dataclass
from itertools import count
from math import ceil
from typing import NamedTuple

WINDOW_MS, MIN_ANSWERS, OPEN_MS, PROBE_MS = 10_000, 10, 5_000, 5_000
BUSY_S = 30


class Body(NamedTuple):
    """Bodies with the same `key` are equal requests; the member `seed` is ignored."""

    key: int
    seed: int


@dataclass(frozen=True)
class Priced:
    amount: int
    serial: int
    balance: int | None = None


@dataclass(frozen=True)
class Unpriced:
    body: str
    balance: int | None


@dataclass(frozen=True)
class Rejected:
    status: int
    body: str


@dataclass(frozen=True)
class Failed:
    code: str
    status: int | None
    retry_after_s: int | None = None
    outage: bool = True
    asked: bool = True


Reply = Priced | Unpriced | Rejected | Failed

FAILURES: dict[str, Failed] = {
    "fails": Failed("upstream-error", 500),
    "sends a page": Failed("upstream-error", 200),
    "hangs up": Failed("upstream-error", 200),
    "is busy": Failed("upstream-busy", 429, retry_after_s=BUSY_S, outage=False),
    "refuses the key": Failed("upstream-refused", 401, outage=False),
}
FAULTS = (*FAILURES, "rejects", "gives no price")
REJECTION = '{"data":null,"error":{"code":"invalid","message":"no"}}'


class Upstream:
    """Upstream's numbered replies. `fault` None: normal answers."""

    def __init__(self, keys: int, seeds: int) -> None:
        self._amounts = count(1)
        self.prices = {Body(key, seed): 0 for key in range(keys) for seed in range(seeds)}
        for key in range(keys):
            self.change(*(body for body in self.prices if body.key == key))
        self.balance: int | None = 1000
        self.fault: str | None = None

    def change(self, *bodies: Body) -> None:
        amount = next(self._amounts)
        self.prices.update(dict.fromkeys(bodies, amount))

    def reply(self, body: Body, serial: int) -> Reply:
        if self.fault == "rejects":
            return Rejected(422, REJECTION)
        if self.fault == "gives no price":
            return Unpriced(document("null", self.balance, serial), self.balance)
        if self.fault is not None:
            return FAILURES[self.fault]
        return Priced(self.prices[body], serial, self.balance)


def document(amount: str, balance: int | None, serial: int) -> str:
    """Returns the body of an answer of upstream, which is also the gateway's."""
    shown = "" if balance is None else f',"balance":{balance}'
    return f'{{"data":{{"estimated":{amount}{shown},"serial":{serial}}},"error":{{}}}}'


def amount_text(amount: int) -> str:
    """Returns an amount as upstream writes it; a float parser would drop the trailing zero."""
    return f"{amount}.50"


class ModelCircuitBreaker:
    def __init__(self) -> None:
        self._answers: list[tuple[int, bool]] = []
        self._open_until: int | None = None
        self._paused_until = 0
        self._probe_until: int | None = None

    def refusal(self, now: int) -> Failed | None:
        """Returns why upstream is not called now, None if it is."""
        until = [self._paused_until]
        if self._open_until is not None:
            until += [self._open_until, self._probe_until or 0]
        if now < max(until):
            return Failed("upstream-busy", None, retry_after_s=ceil((max(until) - now) / 1000), asked=False)
        if self._open_until is not None:
            self._probe_until = now + PROBE_MS
        return None

    def record(self, now: int, reply: Reply) -> None:
        failed = isinstance(reply, Failed) and reply.outage
        if isinstance(reply, Failed) and reply.retry_after_s is not None:
            self._paused_until = now + reply.retry_after_s * 1000
        if self._open_until is None:
            self._answers = [answer for answer in self._answers if answer[0] >= now - WINDOW_MS]
            self._answers.append((now, failed))
            if len(self._answers) >= MIN_ANSWERS and 2 * sum(bad for _, bad in self._answers) >= len(self._answers):
                self._answers, self._open_until = [], now + OPEN_MS
        elif self._probe_until is not None:
            self._probe_until, self._open_until = None, (now + OPEN_MS if failed else None)
