"""State machine that compares each answer of two gateways with one price book with `price_book_model`.

Everything is real except time: the store, the sockets, the simulator and the gateways. They share a clock that only
changes between steps. The store's scripts read it from a key instead of calling `TIME`, so ages, claims and pauses are
compared exactly. The test itself expires keys in the store by that clock.
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
from metric_samples import sample_value
from price_book_fleet import BALANCE_MAX_AGE_MS, LIFETIME_MS, Answer, Book, Directives, Fetch, Fleet, Pending
from price_book_harness import ADMIN, START_MS, Harness, open_harness, wait_briefly_until
from price_book_model import Process
from price_book_requests import (
    AGES_MS,
    ANY_FAULT,
    BODIES,
    DIRECTIVES,
    KEYS,
    NO_CACHE,
    PAUSES_MS,
    PLAIN,
    SEEDS,
    TICK_MS,
    WHERE,
    NumberedAnswers,
    answer_of,
    content,
)
from price_book_upstream import Body, Priced, Upstream, amount_text

pytestmark = pytest.mark.usefixtures("coverage_paused")

MAX_TRIES = 3
"""Background work may be late on a busy machine. Hypothesis repeats a failed example: if it passes then, lateness was
the reason, and the test starts again."""

MIN_TTL_MS = 60_000
"""Minimum TTL in the store, so that no price expires during a step."""

EVENTS = ("purge question", "purge account", "evict price", "evict book", "ask with no-cache", "reprice")


class SentRequest(NamedTuple):
    """A sent request: the index of its gateway, the expected answer, and the response."""

    where: int
    expected: Answer | Pending
    response: Future[httpx2.Response]


class PriceBookMachine(RuleBasedStateMachine):
    def __init__(self, harness: Harness, memory_ms: int, book_ms: int) -> None:
        super().__init__()
        self._harness = harness
        harness.reset()
        self._upstream = Upstream(KEYS, SEEDS)
        self._answers = NumberedAnswers(self._upstream)
        harness.upstream.simulator.script(*[self._answers] * 1000)
        self._fleet = Fleet(self._upstream, memory_ms, book_ms, START_MS)
        self._processes = [Process(self._fleet) for _ in harness.replicas]
        self._purged: dict[int, tuple[int, int]] = {}
        """By serial of upstream's answers: when a purge removed it, and through which gateway."""

    # -- Steps

    @initialize(knows_balance=st.integers(0, 3))
    def start(self, knows_balance: int) -> None:
        self._upstream.balance = 1000 if knows_balance else None

    @rule(body=BODIES, directives=DIRECTIVES, where=WHERE, spelling=st.none() | st.integers(0, 99))
    def ask(self, body: Body, directives: Directives, where: int, spelling: int | None) -> None:
        self._tick()
        self._finish(self._send(where, body, directives, spelling))

    @rule(
        body=BODIES,
        directives=DIRECTIVES,
        where=WHERE,
        event_where=WHERE,
        event=st.sampled_from(EVENTS),
        later_where=st.none() | WHERE,
    )
    def event_during_a_fetch(
        self, body: Body, directives: Directives, where: int, event_where: int, event: str, later_where: int | None
    ) -> None:
        """Causes an event while upstream holds a request; then another client may send the same request."""
        self._tick()
        simulator, calls = self._harness.upstream.simulator, self._fleet.calls
        with simulator.hold():
            sent = self._send(where, body, directives)
            held = self._fetches() if self._fleet.calls > calls else []
            simulator._hold = None  # only this request is held
            if held:
                self._apply_event(event, body, event_where)
            if later_where is not None:
                sent += self._send_unheld(later_where, body, PLAIN)
        self._finish(sent)
        if event.startswith("purge"):
            replies = [fetch.result.reply for _, fetch in held if fetch.result is not None]
            self._record_purge(event_where, [reply.serial for reply in replies if isinstance(reply, Priced)])

    @rule(body=BODIES, where=WHERE, others=st.lists(WHERE, min_size=1, max_size=3))
    def equal_requests_at_once(self, body: Body, where: int, others: list[int]) -> None:
        """Sends equal requests at once, to one gateway or to both."""
        self._tick()
        with self._harness.upstream.simulator.hold():
            sent = [waiting for at in (where, *others) for waiting in self._send(at, body, PLAIN)]
        self._finish(sent)

    @rule(ms=PAUSES_MS | AGES_MS)
    def time_passes(self, ms: int) -> None:
        self._tick(ms)

    @rule(body=BODIES, alone=st.integers(0, 3))
    def price_changes(self, body: Body, alone: int) -> None:
        """Changes the price of a request, or only of one body, so that an ignored member changes the price."""
        bodies = [body] if alone == 0 else [Body(body.key, seed) for seed in range(SEEDS)]
        self._upstream.change(*bodies)

    @rule(
        body=BODIES, seed=st.integers(0, SEEDS - 1), age_ms=AGES_MS, fault=ANY_FAULT, directives=DIRECTIVES, where=WHERE
    )
    def price_ages(
        self, body: Body, seed: int, age_ms: int, fault: str | None, directives: Directives, where: int
    ) -> None:
        """Ages a price, and repeats the request: the body may have another price, and upstream a fault."""
        self._upstream.fault = None
        self.ask(body, NO_CACHE, where, None)
        self.price_changes(Body(body.key, seed), seed)
        self.time_passes(age_ms - TICK_MS)
        self._upstream.fault = fault
        self.ask(Body(body.key, seed), directives, where, None)

    @rule(where=WHERE)
    def price_list_changes(self, where: int) -> None:
        """Changes all prices, which audits find one after the other."""
        self._upstream.fault = None
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

    @rule(fault=ANY_FAULT)
    def upstream_fault_changes(self, fault: str | None) -> None:
        self._upstream.fault = fault

    @rule(body=BODIES, where=WHERE)
    def purge_request(self, body: Body, where: int) -> None:
        self._tick()
        self._apply_event("purge question", body, where)

    @rule(where=WHERE)
    def purge_account(self, where: int) -> None:
        self._tick()
        self._apply_event("purge account", Body(0, 0), where)

    @rule(where=WHERE)
    def purge_other_account(self, where: int) -> None:
        assert self._purge(where, {"account": "second", "all": True}) == {"account": "second", "purged": "all"}

    @rule(body=BODIES)
    def evict_price(self, body: Body) -> None:
        self._apply_event("evict price", body, 0)

    @rule()
    def evict_book(self) -> None:
        self._apply_event("evict book", Body(0, 0), 0)

    @rule()
    def reprice(self) -> None:
        """Marks all prices as changed, like audits of other processes would."""
        self._tick()
        self._apply_event("reprice", Body(0, 0), 0)

    @rule(where=WHERE)
    def restart(self, where: int) -> None:
        self._harness.replicas[where].restart()
        self._processes[where] = Process(self._fleet)

    @rule(body=BODIES, where=WHERE)
    def explain(self, body: Body, where: int) -> None:
        self._tick()
        _, lookup = self._processes[where].look_up(body.key)
        explained = self._harness.replicas[where].client.post("/v1/explain", content=content(body)).json()
        assert explained["stored"] == (lookup is not None)
        if lookup is not None:
            assert explained["age_s"] == lookup.age_ms // 1000
            assert explained["ttl_s"] == lookup.ttl_ms // 1000
            assert f"{explained['estimated']:.2f}" == amount_text(lookup.price.amount)

    # -- Invariants

    @invariant()
    def state_matches_the_model(self) -> None:
        self._check_calls()
        self._check_stored_prices()
        self._check_leases()
        self._check_audits()

    def _check_calls(self) -> None:
        assert self._harness.upstream.simulator.calls == self._fleet.calls
        assert self._answers.serial == self._fleet.serial

    def _check_stored_prices(self) -> None:
        """The store holds priced answers only, the newest of each request, with the right lifetime."""
        found = {}
        for key, text in self._harness.stored_prices().items():
            _, put_at, *_, estimated, rest = text.split(b" ", 7)
            found[key] = (int(put_at), estimated.decode(), rest.decode())
        stored = self._fleet.prices.items()
        assert found == {key: (p.put_at, amount_text(p.amount), f'"serial":{p.serial}') for key, p in stored}
        for key, price in stored:
            if price.put_at == self._fleet.now:
                left_ms: Any = self._harness.store.pttl(self._harness.price_key(key))
                assert LIFETIME_MS - MIN_TTL_MS < left_ms <= LIFETIME_MS

    def _check_leases(self) -> None:
        names = [self._harness.price_key(key).replace("price", "lease") for key in range(KEYS)]
        leases: Any = self._harness.store.mget(names)
        assert not [lease for lease in leases if lease is not None and lease.startswith(b"L")]

    def _check_audits(self) -> None:
        for replica, process in zip(self._harness.replicas, self._processes, strict=True):
            for result in ("same", "changed", "ignored-member"):
                name = "estimate_proxy_price_audits_total"
                counted = sample_value(replica.fetcher._metrics, name, account="default", result=result)
                assert counted == process.audits[result], result

    # -- Helpers

    def _tick(self, ms: int = TICK_MS) -> None:
        self._fleet.pass_time(ms)
        self._harness.set_clock(self._fleet.now)
        for key, text in self._harness.stored_prices().items():
            left_ms = LIFETIME_MS - (self._fleet.now - int(text.split(b" ", 2)[1]))
            self._harness.store.pexpire(self._harness.price_key(key), max(MIN_TTL_MS, left_ms) if left_ms > 0 else 0)

    def _post(self, where: int, body: Body, directives: Directives, spelling: int | None = None) -> httpx2.Response:
        headers = {"content-type": "application/json"}
        if directives.header is not None:
            headers["cache-control"] = directives.header
        return self._harness.replicas[where].client.post(PATH, content=content(body, spelling), headers=headers)

    def _send(self, where: int, body: Body, directives: Directives, spelling: int | None = None) -> list[SentRequest]:
        """Sends a request, and checks its answer unless the model says that it waits."""
        process, fetcher = self._processes[where], self._harness.replicas[where].fetcher
        expected = process.begin(body, directives)
        response = self._harness.pool.submit(self._post, where, body, directives, spelling)
        if waits := isinstance(expected, Pending) and expected.fetch in process.in_flight:
            wait_briefly_until(lambda: (fetcher.joined, fetcher.followed) == (process.joined, process.followed))
        else:
            self._check(where, response.result(), expected)
        assert self._harness.upstream.simulator.arrived(self._fleet.calls)
        return [SentRequest(where, expected, response)] if waits else []

    def _send_unheld(self, where: int, body: Body, directives: Directives) -> list[SentRequest]:
        """Sends a request while upstream holds another one. It only waits if it waits for that one."""
        held, calls = self._fetches(), self._fleet.calls
        sent = self._send(where, body, directives)
        if self._fleet.calls == calls:
            return sent
        for _, _, response in sent:
            response.result()
        self._complete(fetch for fetch in self._fetches() if fetch not in held)
        for at, expected, response in sent:
            self._check(at, response.result(), expected)
        return []

    def _fetches(self) -> list[tuple[Process, Fetch]]:
        """Returns all fetches in flight, leaders first: a follower completes after its leader."""
        fetches = [(process, fetch) for process in self._processes for fetch in process.in_flight]
        return sorted(fetches, key=lambda each: each[1].follows)

    def _complete(self, fetches: Iterable[tuple[Process, Fetch]]) -> None:
        for process, fetch in fetches:
            process.complete(fetch)
        for process, replica in zip(self._processes, self._harness.replicas, strict=True):
            replica.wait_for_fetches(len(process.in_flight))

    def _finish(self, sent: list[SentRequest]) -> None:
        """Completes all fetches, and checks all answers."""
        responses = [response.result() for _, _, response in sent]
        self._complete(self._fetches())
        for (where, expected, _), response in zip(sent, responses, strict=True):
            self._check(where, response, expected)

    def _check(self, where: int, response: httpx2.Response, expected: Answer | Pending) -> None:
        if isinstance(expected, Pending):
            expected = self._processes[where].end(expected)
        assert answer_of(response) == expected
        if expected.age_s is not None:
            found = re.search(r'"serial":(\d+)', response.text)
            assert found is not None
            purged_at, purged_by = self._purged.get(int(found[1]), (self._fleet.now, -1))
            late_ms = self._fleet.now - purged_at
            assert purged_by == -1 or (purged_by != where and late_ms <= self._fleet.memory_ms), (
                "a purged price came back"
            )

    def _apply_event(self, event: str, body: Body, where: int) -> None:
        """Applies an event: a purge, an eviction, another request, or a change found by audits."""
        fleet, process, store = self._fleet, self._processes[where], self._harness.store
        match event:
            case "purge question":
                reply = self._purge(where, {"account": "default", "body": orjson.Fragment(content(body))})
                expected = {"account": "default", "purged": "question", "key": self._harness.keys[body.key]}
                assert reply == expected | {"was_stored": process.purge_request(body.key)}
                self._record_purge(
                    where, (n for n, key in enumerate(self._answers.answered_keys, 1) if key == body.key)
                )
            case "purge account":
                reply = self._purge(where, {"account": "default", "all": True})
                assert reply == {"account": "default", "purged": "all"}
                process.purge_account()
                self._record_purge(where, range(1, self._answers.serial + 1))
            case "evict price":
                store.delete(self._harness.price_key(body.key))
                fleet.prices.pop(body.key, None)
            case "evict book":
                store.delete(self._harness.book_key)
                fleet.book = Book()
            case "ask with no-cache":
                self._send_unheld(where, body, NO_CACHE)
            case "reprice" if fleet.book.purge is not None and fleet.book.reprice is not None:
                fleet.reprice()
                renewed: Any = {"reprice": f"test-{fleet.book.reprice}", "repriced_at_ms": fleet.now}
                store.hset(self._harness.book_key, mapping=renewed)

    def _purge(self, where: int, wanted: dict[str, Any]) -> Any:
        headers = {"x-api-key": ADMIN, "content-type": "application/json"}
        client = self._harness.replicas[where].client
        return client.post("/v1/cache/purge", content=orjson.dumps(wanted), headers=headers).json()

    def _record_purge(self, purged_by: int, answers: Iterable[int]) -> None:
        self._purged |= dict.fromkeys(answers, (self._fleet.now, purged_by))


@pytest.fixture
def harness(valkey_url: str, monkeypatch: pytest.MonkeyPatch, upstream: UpstreamFixture) -> Iterator[Harness]:
    with open_harness(valkey_url, monkeypatch, upstream) as harness:
        yield harness


@pytest.mark.parametrize(("memory_ms", "book_ms"), [(-1, 0), (5000, 1000)], ids=["without memory", "with memory"])
def test_the_price_book_behaves_like_its_model(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, memory_ms: int, book_ms: int
) -> None:
    if memory_ms < 0:
        monkeypatch.setattr("proxy.cache.account_book.BOOK_REREAD_S", book_ms / 1000)
        monkeypatch.setattr("proxy.cache.memory.MAX_AGE_S", memory_ms / 1000)
    profile = machine_settings("PRICE_BOOK_EXAMPLES", 16)
    machine: Any = partial(PriceBookMachine, harness, memory_ms, book_ms)
    for left in reversed(range(MAX_TRIES)):
        try:
            run_state_machine_as_test(machine, settings=profile)
        except Flaky:
            if not left:
                raise
        else:
            return
