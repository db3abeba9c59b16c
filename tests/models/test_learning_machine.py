"""State machine that compares what several gateways learn and infer with `learning_model`, on Valkey and on Redis 7.0.

Everything is real except time: the learners, their memories, the scripts and the store. Prices change, members begin to
count, answers arrive late, and keys are evicted.
"""

from collections import deque
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import learning_model as model
from harness import machine_settings
from learning_fixture import ACCOUNT, LearningFixture, open_learning, set_limits
from learning_fixture import body as question_of
from learning_model import Account, Answer, Body, class_of, is_sentinel, measure
from proxy.learning.observation import Counted
from proxy.learning.snapshots import REREAD_S
from proxy.learning.ticket import Ticket
from proxy.learning.verdict import Inferred

pytestmark = pytest.mark.usefixtures("coverage_paused")

_MODELS = st.sampled_from(["m1", "m1", "m1", "m2", "m3", "m4"])
_NOTES = st.sampled_from(["", "x", "text", "texts", "a long text"])
_SEEDS = st.sampled_from([0, -1, -7, 1, 2, *range(10, 40)])
_BODIES = st.builds(Body, _MODELS, _NOTES, st.sampled_from(["Plus", "Plus", "Regular"]), _SEEDS)
_MANY_SEEDS = st.lists(st.integers(10, 40), min_size=4, max_size=16)
_CHANGES = st.sampled_from(["", "", "list", "seed"])
_PROCESSES = st.sampled_from([0, 1, 2])
_TEAMS = st.sampled_from(["design", "marketing"])
_PAUSES_S = st.sampled_from([0.2, 0.9, 1.0, 2.5, 15.0, 25.0])


class LearningMachine(RuleBasedStateMachine):
    def __init__(self, learning: LearningFixture) -> None:
        super().__init__()
        self._learning = learning
        learning.client.flushall()
        learning.learners = [learning.new_learner() for _ in range(3)]
        learning.wait(60)
        self._account = Account()
        self._epochs: dict[str, int | None] = {"": None}
        self._history: deque[tuple[float, Account]] = deque([(0.0, deepcopy(self._account))])
        self._held: list[tuple[Ticket, Body, int, int]] = []
        self._asked: list[tuple[Body, int]] = []
        self._list, self._counting = 100, False

    @property
    def _now_s(self) -> float:
        return self._learning.clock.time()

    def _price(self, body: Body) -> int:
        surcharge = body.seed % 2 if self._counting else 0
        return self._list + 10 * (body.quality == "Plus") + (body.seed == -1) + surcharge

    def _change(self, what: str) -> None:
        if what == "list":
            self._list += 100
        elif what == "seed":
            self._counting = not self._counting

    def _tick(self, seconds: float = 0.01) -> None:
        self._learning.wait(seconds)

    def _ticket(self, process: int, body: Body) -> Ticket:
        """Looks a body up, and compares the verdict with those of the model within the memory's age."""
        question = question_of({leaf: body.value(leaf) for leaf in model.LEAVES})
        found = self._learning.look_up(question, process)
        start = self._now_s - REREAD_S
        before = [state for at, state in self._history if at <= start][-1:]
        states = before + [state for at, state in self._history if at > start]
        allowed = {state.verdict(body) for state in states}
        if isinstance(found, Inferred):
            price = int(found.stored.price.estimated)
            assert price in allowed, (found, allowed)
            self._check_evidence(body, price, found)
            self._learning.learners[process].count(found, Counted.ANSWERED)
        else:
            mixed = {"new-setting"} if len(states) > 1 else set()
            assert found.reason in allowed | mixed, (found, allowed)
        assert found.ticket is not None
        return found.ticket

    def _check_evidence(self, body: Body, price: int, found: Inferred) -> None:
        """Three distinct bodies with equal kept values and classes were asked and gave the price, and it is inside."""
        left_out = {path.removeprefix("0.") for path in found.scope.left_out}
        alike = {
            other
            for other, amount in self._asked
            if amount == price
            and all(
                class_of(other.value(leaf)) == class_of(body.value(leaf))
                if leaf in left_out
                else other.value(leaf) == body.value(leaf)
                for leaf in model.LEAVES
            )
        }
        assert len(alike) >= model.BODIES
        for leaf in left_out:
            value = body.value(leaf)
            if not is_sentinel(value):
                asked = [other.value(leaf) for other, _ in self._asked if other.model == body.model]
                measured = [measure(each) for each in asked if type(each) is type(value) and not is_sentinel(each)]
                assert min(measured) <= measure(value) <= max(measured)

    def _observe(self, process: int, ticket: Ticket, body: Body, price: int, team: str) -> None:
        now, epoch = self._learning.clock.us // 1000, self._epochs[ticket.epoch]
        fresh = next(self._account.ids)
        expected = self._account.observe(Answer(body, price, ticket.asked_at_ms, epoch, now, team, fresh))
        found = self._learning.observe(ticket, price, process, team)
        assert found.effect.value == expected.removesuffix("!")
        assert (found.contradiction is not None) == (expected in ("contradicted", expected.removesuffix("!") + "!"))
        self._asked.append((body, price))
        self._record()

    def _record(self) -> None:
        """Keeps the model's state for look-ups from memory, and the names of its ids."""
        (key,) = self._learning.keys("ep1:*:learned") or ("",)
        epoch: Any = self._learning.client.hget(key, "epoch") if key else None
        if epoch is not None:
            self._epochs[epoch.decode()] = self._account.epoch
        self._history.append((self._now_s, deepcopy(self._account)))
        while len(self._history) > 1 and self._history[1][0] <= self._now_s - REREAD_S:
            self._history.popleft()

    @rule(process=_PROCESSES, body=_BODIES, team=_TEAMS)
    def ask(self, process: int, body: Body, team: str) -> None:
        self._tick()
        ticket = self._ticket(process, body)
        self._tick()
        self._observe(process, ticket, body, self._price(body), team)

    @rule(process=_PROCESSES, body=_BODIES, seeds=_MANY_SEEDS, pause_s=_PAUSES_S, change=_CHANGES)
    def ask_many(self, process: int, body: Body, seeds: list[int], pause_s: float, change: str) -> None:
        """Asks bodies that differ by seed; half-way the prices may change."""
        for number, seed in enumerate(seeds):
            if number == len(seeds) // 2:
                self._change(change)
            self._tick(min(pause_s, 2.5))
            other = replace(body, seed=seed)
            self._observe(process, self._ticket(process, other), other, self._price(other), "design")

    @rule(process=_PROCESSES, body=_BODIES)
    def ask_slowly(self, process: int, body: Body) -> None:
        """Asks a body whose answer arrives later: the price is that of now."""
        self._tick()
        self._held.append((self._ticket(process, body), body, self._price(body), process))

    @rule(pick=st.integers(0, 100))
    def answer_late(self, pick: int) -> None:
        self._tick()
        if self._held:
            ticket, body, price, process = self._held.pop(pick % len(self._held))
            self._observe(process, ticket, body, price, "marketing")

    @rule(seconds=_PAUSES_S)
    def wait(self, seconds: float) -> None:
        self._tick(seconds)

    @rule(process=_PROCESSES)
    def drop_prices(self, process: int) -> None:
        self._tick()
        self._account.drop_prices()
        self._learning.run(self._learning.learners[process].drop_prices(ACCOUNT))
        self._record()

    @rule(process=_PROCESSES, body=_BODIES)
    def purge(self, process: int, body: Body) -> None:
        self._tick()
        self._account.drop_setting(body, self._learning.clock.us // 1000)
        question = question_of({leaf: body.value(leaf) for leaf in model.LEAVES})
        self._learning.run(self._learning.learners[process].drop_setting(question))
        self._record()

    @rule(process=_PROCESSES, name=_MODELS)
    def forget(self, process: int, name: str) -> None:
        self._tick()
        learner = self._learning.learners[process]
        for scope in self._learning.scopes():
            if scope.items == (f"model {name}",):
                assert self._learning.run(learner.forget(ACCOUNT, scope.id)) == 1
                self._account.forget(name)
        self._record()

    @rule(name=st.sampled_from(["", "m1", "m2"]))
    def evict(self, name: str) -> None:
        """The store evicts the account's key, or a scope."""
        self._tick()
        if not name:
            self._learning.client.delete("none", *self._learning.keys("ep1:*:learned"))
            self._account.evict()
        for key in self._learning.keys("ep1:*:scope:*") if name else ():
            members: Any = self._learning.client.hget(key, "members")
            if f'"model {name}"'.encode() in members:
                self._learning.client.delete(key)
                self._account.scopes.pop(name, None)
        self._record()

    @invariant()
    def scopes_are_those_of_the_model(self) -> None:
        account = self._account
        found = {scope.items[0].removeprefix("model "): scope for scope in self._learning.scopes()}
        listed = [name for name in account.listed if name in account.scopes]
        assert list(found) == sorted(listed, key=lambda name: -account.listed[name][0])
        for name, scope in found.items():
            expected = account.scopes[name]
            assert scope.state.value == account.state(name)
            assert {path.removeprefix("0.") for path in scope.left_out} == expected.left_out
            assert (scope.tests, scope.needed) == (account.tests(expected), expected.needed())
            assert (scope.asked, scope.contradictions) == (expected.asked, expected.contradictions)
            assert (scope.list_moves, scope.settings) == (expected.list_moves, expected.count)
        assert len(found) <= model.SCOPES


def test_learning_follows_the_model(any_store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"values": model.VALUES, "share": model.SHARE, "bodies": model.BODIES, "reach": model.REACH}
    limits |= {"factor": model.FACTOR, "scopes": model.SCOPES, "settings": model.SETTINGS, "digests": model.DIGESTS}
    set_limits(monkeypatch, **limits)
    with open_learning(any_store_url, monkeypatch, learn_from=model.LEARN_FROM, ttl_s=model.TTL_MS / 1000) as learning:
        machine: Any = partial(LearningMachine, learning)
        run_state_machine_as_test(machine, settings=machine_settings("LEARNING_EXAMPLES", 20))
