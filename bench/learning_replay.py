"""Replays questions against price functions, with the gateway's own learner and scripts on a real store.

Time is simulated: the scripts get it as arguments, the learner's memory from `Clock`. So hours of traffic take seconds.
"""

import asyncio
import heapq
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from time import process_time
from typing import Any

import orjson
import redis

from bench.learning_prices import Item, Scenario
from proxy.cache.canonical import canonicalise, key_of
from proxy.cache.prices import Price
from proxy.learning import counts, snapshots
from proxy.learning.learner import Learner
from proxy.learning.observation import Counted, Effect
from proxy.learning.ticket import Ticket
from proxy.learning.verdict import Inferred
from proxy.store.client import Script

START_S = 1_700_000_000.0
LATENCY_S = 0.2
CHANGES_TO_REPRICE = 3


class Clock:
    now = START_S

    def monotonic(self) -> float:
        return self.now


class ReplayStore:
    """Runs scripts on a real server, at the clock's time. Blocks, which saves the replay the event loop's turns."""

    def __init__(self, client: redis.Redis, clock: Clock) -> None:
        self._client = client
        self._clock = clock
        self._digests: dict[str, str] = {}
        self.calls = 0

    async def call(self, script: Script, *keys: str, args: tuple[bytes | int | str, ...] = ()) -> Any:
        if script.name not in self._digests:
            text = script.text.replace(b"redis.call('TIME')", b"{ tonumber(ARGV[#ARGV - 1]), tonumber(ARGV[#ARGV]) }")
            self._digests[script.name] = self._client.script_load(text)
        self.calls += 1
        seconds, us = divmod(round(self._clock.now * 1e6), 1_000_000)
        return self._client.evalsha(self._digests[script.name], len(keys), *keys, *args, seconds, us)

    def head(self, _account: str, scope: str) -> dict[str, Any]:
        """The head of a scope, past all memories."""
        text: Any = self._client.hget(scope, "head")
        found: dict[str, Any] = orjson.loads(text)
        return found


@dataclass(slots=True)
class Question:
    account: str
    key: str
    query: str
    ignored: tuple[str, ...]
    canonical: bytes


@dataclass(slots=True)
class Result:
    """asked: calls of upstream, audits included. late_*: of the questions after the first quarter."""

    questions: int = 0
    answered: int = 0
    late_questions: int = 0
    late_answered: int = 0
    asked: int = 0
    audits: int = 0
    wrong: int = 0
    wrong_before_change: int = 0
    after_doubt: int = 0
    """Answers inferred in a scope in doubt, from 2 s after the doubt on."""
    doubts: int = 0
    list_moves: int = 0
    contradictions: int = 0
    suspects: int = 0
    look_up_s: float = 0.0
    """CPU time of this process, in look-ups."""
    log: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """processes: learners with memories of their own. per_s: questions. change_at: share of the questions."""

    questions: int = 10_000
    per_s: float = 5.0
    processes: int = 1
    change_at: float = 0.5
    ttl_s: float = 3600.0
    learn_from: int = 100
    audit_one_in: int = 25


@contextmanager
def _clocked(clock: Clock) -> Iterator[None]:
    modules: list[Any] = [snapshots, counts]
    before = [module.monotonic for module in modules]
    for module in modules:
        module.monotonic = clock.monotonic
    try:
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            module.monotonic = original


def replay(client: redis.Redis, scenario: Scenario, plan: Plan, seed: int) -> Result:
    clock = Clock()
    with _clocked(clock):
        return asyncio.run(_Replay(client, clock, scenario, plan, seed).run())


class _Replay:
    def __init__(self, client: redis.Redis, clock: Clock, scenario: Scenario, plan: Plan, seed: int) -> None:
        client.flushall()
        self._clock = clock
        self._scenario = scenario
        self._plan = plan
        self._chance = random.Random(seed)
        self.store = ReplayStore(client, clock)
        self._learners = [self._learner() for _ in range(plan.processes)]
        self._exact: dict[str, tuple[int, float]] = {}
        self._events: list[tuple[float, int, Callable[[], Any]]] = []
        self._order = count()
        self._changed_settings: set[tuple[str, str]] = set()
        self._doubt_since: dict[str, float] = {}
        self._number = 0
        self.result = Result()

    def _learner(self) -> Learner:
        plan, store = self._plan, self.store
        learner = Learner(
            store,  # type: ignore[arg-type] # it has the one method that is used
            origin="https://api.rendernet.ai",
            ttl_s=plan.ttl_s,
            learn_from=plan.learn_from,
            audit_one_in=plan.audit_one_in,
        )
        learner._audits._choose = self._chance.randrange
        return learner

    async def run(self) -> Result:
        for number in range(self._plan.questions):
            self._number = number
            self._clock.now += self._chance.expovariate(self._plan.per_s)
            await self._run_events(self._clock.now)
            await self._ask()
        await self._run_events(float("inf"))
        return self.result

    async def _run_events(self, until: float) -> None:
        now = self._clock.now
        while self._events and self._events[0][0] <= until:
            self._clock.now, _, event = heapq.heappop(self._events)
            await event()
        self._clock.now = max(now, self._clock.now) if until == float("inf") else now

    async def _ask(self) -> None:
        result, plan = self.result, self._plan
        learner = self._chance.choice(self._learners)
        team = self._chance.choice(("design", "marketing"))
        item = self._scenario.make(self._chance, team)
        canonical = canonicalise(orjson.dumps([item]))
        key = key_of(canonical, origin="o", account="a", path="/p", query="")
        is_late = self._number >= plan.questions / 4
        result.questions += 1
        result.late_questions += is_late
        exact = self._exact.get(key)
        if exact is not None and self._clock.now < exact[1] + plan.ttl_s:
            result.answered += 1
            result.late_answered += is_late
            return
        question = Question("default", key, "", (), canonical)
        started = process_time()
        verdict = await learner.look_up(question)
        result.look_up_s += process_time() - started
        if isinstance(verdict, Inferred) and verdict.stored.ttl_s > -300:
            self._answer(learner, verdict, item, key, team, is_late=is_late)
        elif verdict.ticket is not None:
            self._call_upstream(learner, verdict.ticket, item, key, team)

    def _answer(self, learner: Learner, inferred: Inferred, item: Item, key: str, team: str, *, is_late: bool) -> None:
        result = self.result
        result.answered += 1
        result.late_answered += is_late
        if int(inferred.stored.price.estimated) != self._price(item):
            result.wrong += 1
            result.wrong_before_change += not self._has_changed
        result.after_doubt += self._is_after_doubt(inferred.scope.id)
        is_due = learner.count(inferred, Counted.ANSWERED)
        if is_due or inferred.stored.ttl_s <= 0:
            result.audits += is_due
            self._call_upstream(learner, inferred.ticket, item, key, team, is_audit=is_due)

    def _is_after_doubt(self, scope: str) -> bool:
        """Whether the scope has been in doubt for two seconds, and still is."""
        since = self._doubt_since.get(scope)
        if since is None or self._clock.now < since + 2:
            return False
        in_doubt = self.store.head(*self._learners[0]._snapshots.keys("default", scope)).get("doubt") is not None
        if not in_doubt:  # the left-out members changed, which ends a doubt too
            del self._doubt_since[scope]
        return in_doubt

    def _call_upstream(
        self, learner: Learner, ticket: Ticket, item: Item, key: str, team: str, *, is_audit: bool = False
    ) -> None:
        self.result.asked += 1
        amount, asked_at = self._price(item), self._clock.now

        async def reply() -> None:
            self._exact[key] = amount, asked_at
            await self._observe(learner, ticket, amount, team, is_audit=is_audit)

        when = self._clock.now + self._chance.uniform(0.5, 1.5) * LATENCY_S
        heapq.heappush(self._events, (when, next(self._order), reply))

    async def _observe(self, learner: Learner, ticket: Ticket, amount: int, team: str, *, is_audit: bool) -> None:
        result = self.result
        price = Price(str(amount).encode(), b"")
        observed = await learner.observe(ticket, price, team=team, is_audit=is_audit)
        if observed.effect is Effect.DOUBT:
            result.doubts += 1
            self._doubt_since.setdefault(observed.scope, self._clock.now)
        if observed.effect in (Effect.LIST_MOVED, Effect.CONTRADICTED) or observed.contradiction:
            self._doubt_since.clear()
        if observed.effect is Effect.LIST_MOVED:
            result.list_moves += 1
            self._changed_settings.add((observed.scope, observed.setting))
            if len(self._changed_settings) >= CHANGES_TO_REPRICE:
                self._changed_settings.clear()
                await learner.drop_prices(ticket.account)
        if observed.contradiction is not None:
            result.contradictions += 1
            result.suspects += observed.contradiction.suspects
        if observed.effect not in (Effect.AGREED, Effect.NEW, Effect.OUTSIDE, Effect.IGNORED) or observed.contradiction:
            result.log.append(f"{self._number} {observed.effect} {observed.contradiction or ''}")

    @property
    def _has_changed(self) -> bool:
        return self._scenario.changed is not None and self._number >= self._plan.questions * self._plan.change_at

    def _price(self, item: Item) -> int:
        changed = self._scenario.changed
        return changed(item) if changed is not None and self._has_changed else self._scenario.price(item)
