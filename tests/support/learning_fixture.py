"""Learners of several processes on one real store, at a time that the test sets."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import count
from typing import Any

import orjson
import pytest
import redis

from harness import Clock, use_clocked_scripts
from proxy.cache.canonical import canonicalise
from proxy.cache.prices import Price
from proxy.learning.evidence import Scope
from proxy.learning.learner import Learner
from proxy.learning.limits import Limits, limits_of
from proxy.learning.observation import Effect, Observation
from proxy.learning.ticket import Ticket
from proxy.learning.verdict import Inferred, NotInferred
from proxy.store.access import StoreAccess
from proxy.store.client import Store

ACCOUNT = "default"
TTL_S = 3600
START_US = 1_700_000_000_000_000
Item = dict[str, Any]


@dataclass(frozen=True)
class Body:
    """A question as the gateway would parse it."""

    canonical: bytes
    key: str
    account: str = ACCOUNT
    query: str = ""
    ignored: tuple[str, ...] = ()


def body(*items: Item, **named: Any) -> Body:
    canonical = canonicalise(orjson.dumps(items))
    return Body(canonical, sha256(canonical).hexdigest(), **named)


class LearningFixture:
    """learn_from: 10 unless the test says otherwise."""

    def __init__(
        self,
        url: str,
        client: redis.Redis,
        clock: Clock,
        *,
        learn_from: int = 10,
        processes: int = 2,
        ttl_s: float = TTL_S,
    ) -> None:
        self.client = client
        self.clock = clock
        self._runner = asyncio.Runner()
        self._url = url
        self._learn_from = learn_from
        self._ttl_s = ttl_s
        self._seeds = (1000 + 617 * number % 1000 for number in count())
        self._runner.run(self._open())
        self.learners = [self.new_learner() for _ in range(processes)]

    async def _open(self) -> None:
        self.store = Store(self._url, "price-book", access=StoreAccess(timeout_s=10))

    def new_learner(self, audit_one_in: int = 25) -> Learner:
        return Learner(
            self.store,
            origin="https://api.rendernet.ai",
            ttl_s=self._ttl_s,
            learn_from=self._learn_from,
            audit_one_in=audit_one_in,
        )

    def run(self, coroutine: Any) -> Any:
        return self._runner.run(_awaited(coroutine))

    def close(self) -> None:
        self._runner.run(self.store.close())
        self._runner.close()

    def wait(self, seconds: float) -> None:
        self.clock.set(self.clock.us + round(seconds * 1e6))

    def look_up(self, question: Body, process: int = 0, never: tuple[str, ...] = ()) -> Inferred | NotInferred:
        found: Inferred | NotInferred = self.run(self.learners[process].look_up(question, never))
        return found

    def ticket(self, question: Body, process: int = 0, never: tuple[str, ...] = ()) -> Ticket:
        """The ticket of a question that is asked now."""
        ticket = self.look_up(question, process, never).ticket
        assert ticket is not None
        return ticket

    def observe(self, ticket: Ticket, amount: int, process: int = 0, team: str = "design", **named: Any) -> Observation:
        price = Price(str(amount).encode(), b"")
        found: Observation = self.run(self.learners[process].observe(ticket, price, team=team, **named))
        return found

    def ask(self, question: Body, amount: int, process: int = 0, team: str = "design") -> Effect:
        """Asks a question a while later, and learns from its answer."""
        self.wait(1.5)
        return self.observe(self.ticket(question, process), amount, process, team).effect

    def flux(self, *, seed: int | None = None, **members: Any) -> Body:
        """A body with a new seed."""
        return body({"model": "Flux", "quality": "Plus", "seed": next(self._seeds) if seed is None else seed} | members)

    def learn(self, amount: int = 5, bodies: int = 40, **members: Any) -> None:
        """Asks bodies with seeds from 900 to 3020. The seeds of `flux` are between those."""
        for seed in [*range(3000, 3020), 900, 2100, *(next(self._seeds) for _ in range(bodies))]:
            assert self.ask(self.flux(seed=seed, **members), amount) in (Effect.NEW, Effect.AGREED)

    def scope(self) -> Scope:
        (found,) = self.scopes()
        return found

    def scopes(self) -> list[Scope]:
        found: list[Scope] = self.run(self.learners[0].scopes(ACCOUNT))
        return found

    def keys(self, pattern: str = "ep1:*") -> list[str]:
        return sorted(key.decode() for key in self.client.scan_iter(pattern))


def set_limits(monkeypatch: pytest.MonkeyPatch, **changes: float) -> None:
    """Changes the limits of learners that are made from now on."""

    def changed(*, learn_from: int, ttl_s: float) -> Limits:
        return replace(limits_of(learn_from=learn_from, ttl_s=ttl_s), **changes)  # type: ignore[arg-type]

    monkeypatch.setattr("proxy.learning.learner.limits_of", changed)


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


@contextmanager
def open_learning(url: str, monkeypatch: pytest.MonkeyPatch, **named: Any) -> Iterator[LearningFixture]:
    """An empty store, scripts and learners that share a clock."""
    with redis.Redis.from_url(url) as client:
        client.flushall()
        clock = Clock(client, START_US)
        clock.set(START_US)
        use_clocked_scripts(monkeypatch)
        for module in ("snapshots", "counts"):
            monkeypatch.setattr(f"proxy.learning.{module}.monotonic", clock.time)
        fixture = LearningFixture(url, client, clock, **named)
        try:
            yield fixture
        finally:
            fixture.close()
