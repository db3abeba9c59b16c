"""A state machine against the price book: two gateways on one store do what `price_book_model` says, answer for answer.

Everything is real but time: the store, the sockets, the simulator and the gateways, which share a clock that stands
still between steps. The store's scripts read it from a key where they would call `TIME`, so ages, claims and pauses
are compared exactly. What expires in the store by itself is ended by the test, when that clock says so.
"""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import httpx2
import orjson
import pytest
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from gateway_fixture import PATH, UpstreamFixture
from harness import machine_settings
from price_book_fleet import BALANCE_MAX_AGE_MS, LIFETIME_MS, Answer, Book, Fleet, Flight, Pending, Wants
from price_book_harness import ADMIN, START_MS, Harness, open_harness, soon
from price_book_model import Process
from price_book_requests import (
    AGES_MS,
    ANY_MOOD,
    BODIES,
    KEYS,
    NO_CACHE,
    PAUSES_MS,
    PLAIN,
    SEEDS,
    TICK_MS,
    WANTS,
    WHERE,
    Numbered,
    content,
    told_by,
)
from price_book_upstream import Body, Priced, Upstream, spelled

TRIES = 3
"""Work behind answers may be late on a machine that has much to do. Hypothesis repeats what fails: if it does not fail
again, that was it, and the test starts from the beginning."""

UNHURRIED_MS = 60_000
"""No stored price ends by itself while a step is under way."""

MEDDLINGS = ("purge question", "purge account", "evict price", "evict book", "ask anew", "reprice")


class Asked(NamedTuple):
    """A request on its way: to which process, what is expected of it, and what comes."""

    where: int
    expected: Answer | Pending
    response: Future[httpx2.Response]


class PriceBookMachine(RuleBasedStateMachine):
    def __init__(self, harness: Harness, hot_ms: int, book_ms: int) -> None:
        super().__init__()
        self._world = harness
        harness.begin()
        self._upstream = Upstream(KEYS, SEEDS)
        self._answers = Numbered(self._upstream)
        harness.upstream.simulator.script(*[self._answers] * 1000)
        self._fleet = Fleet(self._upstream, hot_ms, book_ms, START_MS)
        self._processes = [Process(self._fleet) for _ in harness.replicas]
        self._forgotten: dict[int, tuple[int, int]] = {}
        """Which of upstream's answers had to be forgotten: when, and who was told so."""

    # -- Steps

    @initialize(knows_balance=st.integers(0, 3))
    def start(self, knows_balance: int) -> None:
        self._upstream.balance = 1000 if knows_balance else None

    @rule(body=BODIES, wants=WANTS, where=WHERE, spelling=st.none() | st.integers(0, 99))
    def ask(self, body: Body, wants: Wants, where: int, spelling: int | None) -> None:
        self._tick()
        self._conclude(self._begin(where, body, wants, spelling))

    @rule(
        body=BODIES,
        wants=WANTS,
        where=WHERE,
        meddler=WHERE,
        meddling=st.sampled_from(MEDDLINGS),
        latecomer=st.none() | WHERE,
    )
    def ask_and_meddle(
        self, body: Body, wants: Wants, where: int, meddler: int, meddling: str, latecomer: int | None
    ) -> None:
        """Something happens between a question and upstream's answer; then somebody else may ask the same."""
        self._tick()
        simulator, calls = self._world.upstream.simulator, self._fleet.calls
        with simulator.hold():
            asked = self._begin(where, body, wants)
            held = self._flights() if self._fleet.calls > calls else []
            simulator._hold = None  # it is for this question alone
            if held:
                self._meddle(meddling, body, meddler)
            if latecomer is not None:
                asked += self._ask_unheld(latecomer, body, PLAIN)
        self._conclude(asked)
        if meddling.startswith("purge"):
            replies = [flight.told.reply for _, flight in held if flight.told is not None]
            self._forget(meddler, [reply.serial for reply in replies if isinstance(reply, Priced)])

    @rule(body=BODIES, where=WHERE, others=st.lists(WHERE, min_size=1, max_size=3))
    def crowd(self, body: Body, where: int, others: list[int]) -> None:
        """Equal questions at once, in one process and in two."""
        self._tick()
        with self._world.upstream.simulator.hold():
            asked = [waiting for at in (where, *others) for waiting in self._begin(at, body, PLAIN)]
        self._conclude(asked)

    @rule(ms=PAUSES_MS | AGES_MS)
    def time_passes(self, ms: int) -> None:
        self._tick(ms)

    @rule(body=BODIES, alone=st.integers(0, 3))
    def price_changes(self, body: Body, alone: int) -> None:
        """Of a question; or of one body of it, so that a member which was declared neutral is not."""
        bodies = [body] if alone == 0 else [Body(body.key, seed) for seed in range(SEEDS)]
        self._upstream.change(*bodies)

    @rule(body=BODIES, seed=st.integers(0, SEEDS - 1), age_ms=AGES_MS, mood=ANY_MOOD, wants=WANTS, where=WHERE)
    def price_ages(self, body: Body, seed: int, age_ms: int, mood: str | None, wants: Wants, where: int) -> None:
        """Until the question is asked again, in a body that may have another price, and upstream may have trouble."""
        self._upstream.mood = None
        self.ask(body, NO_CACHE, where, None)
        self.price_changes(Body(body.key, seed), seed)
        self.time_passes(age_ms - TICK_MS)
        self._upstream.mood = mood
        self.ask(Body(body.key, seed), wants, where, None)

    @rule(where=WHERE)
    def price_list_changes(self, where: int) -> None:
        """Audits find out, one after the other."""
        self._upstream.mood = None
        self.time_passes(30_000)
        for key in range(KEYS):
            self.ask(Body(key, 0), NO_CACHE, where, None)
        for key in range(KEYS):
            self._upstream.change(*(Body(key, seed) for seed in range(SEEDS)))
        for key in range(3):
            self.time_passes(BALANCE_MAX_AGE_MS + TICK_MS)
            self.ask(Body(key, 0), PLAIN, where, None)

    @rule(balance=st.none() | st.integers(0, 9999))
    def balance_changes(self, balance: int | None) -> None:
        self._upstream.balance = balance

    @rule(mood=ANY_MOOD)
    def upstream_turns(self, mood: str | None) -> None:
        self._upstream.mood = mood

    @rule(body=BODIES, where=WHERE)
    def purge_question(self, body: Body, where: int) -> None:
        self._tick()
        self._meddle("purge question", body, where)

    @rule(where=WHERE)
    def purge_account(self, where: int) -> None:
        self._tick()
        self._meddle("purge account", Body(0, 0), where)

    @rule(where=WHERE)
    def purge_other_account(self, where: int) -> None:
        assert self._purge(where, {"account": "second", "all": True}) == {"account": "second", "purged": "all"}

    @rule(body=BODIES)
    def evict_price(self, body: Body) -> None:
        self._meddle("evict price", body, 0)

    @rule()
    def evict_book(self) -> None:
        self._meddle("evict book", Body(0, 0), 0)

    @rule()
    def reprice(self) -> None:
        """As if other processes' audits had found changes."""
        self._tick()
        self._meddle("reprice", Body(0, 0), 0)

    @rule(where=WHERE)
    def restart(self, where: int) -> None:
        self._world.replicas[where].restart()
        self._processes[where] = Process(self._fleet)

    @rule(body=BODIES, where=WHERE)
    def explain(self, body: Body, where: int) -> None:
        self._tick()
        _, seen = self._processes[where].look_up(body.key)
        told = self._world.replicas[where].client.post("/v1/explain", content=content(body)).json()
        assert told["stored"] == (seen is not None)
        if seen is not None:
            assert told["age_s"] == seen.age_ms // 1000
            assert told["ttl_s"] == seen.ttl_ms // 1000
            assert f"{told['estimated']:.2f}" == spelled(seen.price.amount)

    # -- What always holds

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        self._see_the_calls()
        self._see_the_store()
        self._see_the_leases()
        self._see_the_audits()

    def _see_the_calls(self) -> None:
        assert self._world.upstream.simulator.calls == self._fleet.calls
        assert self._answers.serial == self._fleet.serial

    def _see_the_store(self) -> None:
        """Prices alone, each of them the newest, for as long as it may serve."""
        found = {}
        for key, text in self._world.texts().items():
            _, put_at, *_, estimated, rest = text.split(b" ", 7)
            found[key] = (int(put_at), estimated.decode(), rest.decode())
        stored = self._fleet.prices.items()
        assert found == {key: (p.put_at, spelled(p.amount), f'"serial":{p.serial}') for key, p in stored}
        for key, price in stored:
            if price.put_at == self._fleet.now:
                left_ms: Any = self._world.store.pttl(self._world.price_key(key))
                assert LIFETIME_MS - UNHURRIED_MS < left_ms <= LIFETIME_MS

    def _see_the_leases(self) -> None:
        names = [self._world.price_key(key).replace("price", "lease") for key in range(KEYS)]
        leases: Any = self._world.store.mget(names)
        assert not [lease for lease in leases if lease is not None and lease.startswith(b"L")]

    def _see_the_audits(self) -> None:
        for replica, process in zip(self._world.replicas, self._processes, strict=True):
            for result in ("same", "changed", "ignored-member"):
                name, labels = "estimate_proxy_price_audits_total", {"account": "default", "result": result}
                counted = replica.fetcher._metrics.registry.get_sample_value(name, labels) or 0
                assert counted == process.audits[result], result

    # -- How it is done

    def _tick(self, ms: int = TICK_MS) -> None:
        self._fleet.pass_time(ms)
        self._world.set_clock(self._fleet.now)
        for key, text in self._world.texts().items():
            left_ms = LIFETIME_MS - (self._fleet.now - int(text.split(b" ", 2)[1]))
            self._world.store.pexpire(self._world.price_key(key), max(UNHURRIED_MS, left_ms) if left_ms > 0 else 0)

    def _post(self, where: int, body: Body, wants: Wants, spelling: int | None = None) -> httpx2.Response:
        headers = {"content-type": "application/json"}
        if wants.header is not None:
            headers["cache-control"] = wants.header
        return self._world.replicas[where].client.post(PATH, content=content(body, spelling), headers=headers)

    def _begin(self, where: int, body: Body, wants: Wants, spelling: int | None = None) -> list[Asked]:
        """Asks, and returns when the answer is there and as expected, or when the question waits."""
        process, fetcher = self._processes[where], self._world.replicas[where].fetcher
        expected = process.begin(body, wants)
        response = self._world.pool.submit(self._post, where, body, wants, spelling)
        if waits := isinstance(expected, Pending) and expected.flight in process.in_the_air:
            soon(lambda: (fetcher.joined, fetcher.followed) == (process.joined, process.followed))
        else:
            self._check(where, response.result(), expected)
        assert self._world.upstream.simulator.arrived(self._fleet.calls)
        return [Asked(where, expected, response)] if waits else []

    def _ask_unheld(self, where: int, body: Body, wants: Wants) -> list[Asked]:
        """Asks while another's question is held upstream: it waits only if it waits for that."""
        held, calls = self._flights(), self._fleet.calls
        asked = self._begin(where, body, wants)
        if self._fleet.calls == calls:
            return asked
        for _, _, response in asked:
            response.result()
        self._land(flight for flight in self._flights() if flight not in held)
        for at, expected, response in asked:
            self._check(at, response.result(), expected)
        return []

    def _flights(self) -> list[tuple[Process, Flight]]:
        """All that are in the air, leaders first: who follows another process lands after it."""
        flights = [(process, flight) for process in self._processes for flight in process.in_the_air]
        return sorted(flights, key=lambda each: each[1].follows)

    def _land(self, flights: Iterable[tuple[Process, Flight]]) -> None:
        for process, flight in flights:
            process.land(flight)
        for process, replica in zip(self._processes, self._world.replicas, strict=True):
            replica.wait_until_flying(len(process.in_the_air))

    def _conclude(self, asked: list[Asked]) -> None:
        """Everything comes home, and every answer is as expected."""
        responses = [response.result() for _, _, response in asked]
        self._land(self._flights())
        for (where, expected, _), response in zip(asked, responses, strict=True):
            self._check(where, response, expected)

    def _check(self, where: int, response: httpx2.Response, expected: Answer | Pending) -> None:
        if isinstance(expected, Pending):
            expected = self._processes[where].end(expected)
        assert told_by(response) == expected
        if expected.age_s is not None:
            found = re.search(r'"serial":(\d+)', response.text)
            assert found is not None
            forgotten_at, teller = self._forgotten.get(int(found[1]), (self._fleet.now, -1))
            late_ms = self._fleet.now - forgotten_at
            assert teller == -1 or (teller != where and late_ms <= self._fleet.hot_ms), "a purged price came back"

    def _meddle(self, meddling: str, body: Body, where: int) -> None:
        """What an operator, another request or the store's eviction does at any time."""
        fleet, process, store = self._fleet, self._processes[where], self._world.store
        match meddling:
            case "purge question":
                told = self._purge(where, {"account": "default", "body": orjson.Fragment(content(body))})
                expected = {"account": "default", "purged": "question", "key": self._world.keys[body.key]}
                assert told == expected | {"was_stored": process.purge_question(body.key)}
                self._forget(where, (n for n, key in enumerate(self._answers.asked, 1) if key == body.key))
            case "purge account":
                told = self._purge(where, {"account": "default", "all": True})
                assert told == {"account": "default", "purged": "all"}
                process.purge_account()
                self._forget(where, range(1, self._answers.serial + 1))
            case "evict price":
                store.delete(self._world.price_key(body.key))
                fleet.prices.pop(body.key, None)
            case "evict book":
                store.delete(self._world.book_key)
                fleet.book = Book()
            case "ask anew":
                self._ask_unheld(where, body, NO_CACHE)
            case "reprice" if fleet.book.purge is not None and fleet.book.reprice is not None:
                fleet.reprice()
                renewed: Any = {"reprice": f"test-{fleet.book.reprice}", "repriced_at_ms": fleet.now}
                store.hset(self._world.book_key, mapping=renewed)

    def _purge(self, where: int, wanted: dict[str, Any]) -> Any:
        headers = {"x-api-key": ADMIN, "content-type": "application/json"}
        client = self._world.replicas[where].client
        return client.post("/v1/cache/purge", content=orjson.dumps(wanted), headers=headers).json()

    def _forget(self, teller: int, answers: Iterable[int]) -> None:
        self._forgotten |= dict.fromkeys(answers, (self._fleet.now, teller))


@pytest.fixture
def harness(valkey_url: str, monkeypatch: pytest.MonkeyPatch, upstream: UpstreamFixture) -> Iterator[Harness]:
    with open_harness(valkey_url, monkeypatch, upstream) as harness:
        yield harness


@pytest.mark.parametrize(("hot_ms", "book_ms"), [(-1, 0), (5000, 1000)], ids=["remembering nothing", "remembering"])
def test_the_price_book_does_as_its_model(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, hot_ms: int, book_ms: int
) -> None:
    if hot_ms < 0:
        monkeypatch.setattr("proxy.cache.account_book.BOOK_REREAD_S", book_ms / 1000)
        monkeypatch.setattr("proxy.cache.memory.MAX_AGE_S", hot_ms / 1000)
    profile = machine_settings("PRICE_BOOK_EXAMPLES", 25)
    machine: Any = partial(PriceBookMachine, harness, hot_ms, book_ms)
    for left in reversed(range(TRIES)):
        try:
            run_state_machine_as_test(machine, settings=profile)
        except Flaky:
            if not left:
                raise
        else:
            return
