"""The ledger against what `ledger_model` says of it: verdict for verdict, key for key, on Valkey and on Redis 7.0.

Everything is real but time. The scripts read it from a key where they would call `TIME`; it lies in the future, so that
no window of theirs ever expires. Two gateways share the ledger, each with a clock that may be wrong.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date, datetime
from fractions import Fraction
from functools import cache, partial
from hashlib import sha1
from importlib.resources import files
from itertools import count, product
from math import inf
from typing import Any, NamedTuple

import hypothesis
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from ledger_model import (
    LASTING,
    MILLION,
    PERS,
    ZONE,
    Bill,
    Books,
    Deal,
    Entry,
    Limit,
    Process,
    Said,
    Ticket,
    span,
)
from proxy.decisions import EXACT_MICRO, Decisions
from proxy.ledger import Admitted, Denied, Ledger
from proxy.metrics import Metrics
from proxy.problems import Outcome
from proxy.quotas import Charge, Quota, Rate, Standing, Terms
from proxy.reports import Reports
from proxy.servers import CONNECTION
from proxy.sheets import LedgerKeys
from proxy.store import Script, Store

TEAMS = ("design", "marketing", "film")
MODELS = ("Flux", "Flux dev.1", "style", "mixed", "other", "-")
MOST_NAMES = 2
KEYS = LedgerKeys("acme")
START_US = int(datetime(2031, 10, 25, 22, 30, tzinfo=ZONE).timestamp()) * MILLION
"""A Saturday evening: the clocks are set back in the night, and the month ends with the next week's Friday."""

HUGE = 10**15
"""Micro-credits of the dearest answer that there is."""

Answer = Admitted | Denied | Standing | None


class Expected(NamedTuple):
    """What is to be asked, what the model has said to it, if anything, and how an answer is compared with that.

    deal: whose standing it is to tell.
    """

    asked: Coroutine[Any, Any, Answer]
    said: Said | None
    check: Callable[[Said | None, Answer], None]
    deal: Deal | None = None


class Clock:
    """What time it is: for the store, and for the gateway that is at work."""

    def __init__(self, store: redis.Redis) -> None:
        self._store = store
        self.us = START_US
        self.skew_us = 0

    def set(self, us: int) -> None:
        self.us = us
        self._store.hset("clock", mapping={"s": us // MILLION, "us": us % MILLION})

    def time_ns(self) -> int:
        return (self.us + self.skew_us) * 1000


@cache
def _clocked_script(name: str) -> tuple[bytes, str]:
    """A script that reads the time where the test has put it, and Redis' name for it. Rates outlive the test."""
    text = (files("proxy") / "lua" / f"{name}.lua").read_bytes()
    clocked = text.replace(b"redis.call('TIME')", b"redis.call('HMGET', 'clock', 's', 'us')")
    clocked = clocked.replace(b"'PX', math.ceil(", b"'PX', 1e9 + math.ceil(")
    assert b"'TIME'" not in clocked
    assert (b"'PX', 1e9 +" in clocked) == (name == "ledger_decide")
    return clocked, sha1(clocked, usedforsecurity=False).hexdigest()


class Gateway:
    """One of those that share the ledger, with a loop of its own that turns only while it is asked."""

    def __init__(self, url: str, clock: Clock) -> None:
        self._clock = clock
        self._runner = asyncio.Runner()
        self._store = self._runner.run(_store(url))
        self._reports = Reports(self._store, KEYS, ZONE)
        self.ledger = self._new_ledger()

    def begin(self) -> None:
        """Anew, and knowing nothing; what the last example still owed is lost."""
        self._store.rests[CONNECTION] = inf
        self._runner.run(self.ledger.close(1))
        self._store.rests[CONNECTION] = 0
        self._clock.skew_us = 0
        self.ledger = self._new_ledger()
        self._runner.run(self.ledger.open())

    def run(self, process: Process, asked: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
        """The answers to what is asked in one turn of the loop."""
        self._let(process)
        return self._runner.run(_in_one_turn(asked))

    def pay(self, process: Process) -> None:
        """Returns when nothing is owed any more."""
        self.run(process, [_none(self.ledger._flushing)])

    def standings(self, process: Process, terms: list[Terms]) -> list[Standing]:
        self._let(process)
        return self._runner.run(self._reports.standings(terms))

    def close(self) -> None:
        self._runner.run(self._store.close())
        self._runner.close()

    def _let(self, process: Process) -> None:
        """Whether there is a ledger, and what time it is, are this process's own matters."""
        self._store.rests[CONNECTION] = inf if process.out else 0
        self._clock.skew_us = process.skew_us

    def _new_ledger(self) -> Ledger:
        metrics = Metrics()
        return Ledger(Decisions(self._store, KEYS, ZONE, metrics), metrics, admits_on_outage=True)


async def _store(url: str) -> Store:
    return Store(url, "ledger")


async def _none(flushing: asyncio.Task[None] | None) -> None:
    assert flushing is not None
    await asyncio.wait_for(flushing, 10)


async def _in_one_turn(asked: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    return await asyncio.gather(*asked)


async def later(asked: Coroutine[Any, Any, Answer]) -> Answer:
    """One turn later: that is when a settlement, which has a task of its own, gets to the ledger."""
    await asyncio.sleep(0)
    return await asked


class World:
    """What all examples use."""

    def __init__(self, store: redis.Redis, clock: Clock, gateways: list[Gateway]) -> None:
        self.store = store
        self.clock = clock
        self.gateways = gateways

    def begin(self) -> None:
        self.store.flushall()
        self.clock.set(START_US)
        for gateway in self.gateways:
            gateway.begin()

    def calls(self) -> int:
        """How many scripts were called so far."""
        return int(self.store.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])

    def keys(self) -> dict[str, tuple[dict[str, int], bool]]:
        """The hashes of usage and counters with their fields that are not 0, and of all keys whether they expire."""
        names: Any = sorted(self.store.keys("ep1:{acme}:*"))
        pipeline = self.store.pipeline(transaction=False)
        for name in names:
            pipeline.pttl(name)
            if name.startswith((b"ep1:{acme}:u:", b"ep1:{acme}:q:")):
                pipeline.hgetall(name)
            else:
                pipeline.type(name)
        replies = pipeline.execute()
        return {
            name.decode(): (_amounts(held), ttl != -1)
            for name, ttl, held in zip(names, replies[::2], replies[1::2], strict=True)
        }


def _amounts(held: Any) -> dict[str, int]:
    return {field.decode(): int(n) for field, n in held.items() if n != b"0"} if isinstance(held, dict) else {}


def terms_of(deal: Deal) -> Terms:
    quotas = tuple(Quota(one.scope, one.measure, one.per, one.most, one.refuses) for one in deal.limits)  # type: ignore[arg-type]  # they are spelled alike
    terms = Terms(deal.team, Rate(MILLION / deal.interval_us, deal.burst), quotas)
    assert terms.rate.interval_us == deal.interval_us
    return terms


def charge_of(bill: Bill) -> Charge:
    return Charge(Outcome(bill.outcome), bill.micro, bill.model)


def shown_by(standing: Standing) -> Said:
    """How a team stands, as the model would put it."""
    return Said(
        "ok",
        standing.now_us,
        standing.lead_us,
        standing.rate_remaining(),
        tuple(standing.used),
        tuple(standing.windows[quota.per].end_s for quota in standing.terms.quotas),
    )


def said_by(answer: Answer) -> Said:
    """A verdict, as the model would put it."""
    assert isinstance(answer, Admitted | Denied)
    assert answer.standing is not None
    shown = shown_by(answer.standing)
    if isinstance(answer, Admitted):
        return replace(shown, model=answer.model)
    problem = answer.problem
    violated = tuple(problem.members.get("violated-policies", ()))
    word, retry_after_s = problem.outcome.value, problem.retry_after_s
    return replace(shown, word=word, violated=violated, status=problem.status, retry_after_s=retry_after_s)


def agree(said: Said, expected: Said) -> bool:
    """Where more is used than a number of Lua can hold exactly, which is over any limit, a verdict may say it so."""
    pairs = zip(said.used, expected.used, strict=True)
    used = (right if right > 2**53 and abs(told - right) <= right >> 50 else told for told, right in pairs)
    return replace(said, used=tuple(used)) == expected


class Draft(NamedTuple):
    """A limit, or how far it lies from what is used when it comes into force."""

    measure: str
    per: str
    refuses: bool
    most: int
    is_relative: bool


class Act(NamedTuple):
    """What somebody wants; `pick` is which of those that have been admitted is settled, or refunded."""

    kind: str
    team: str
    bill: Bill
    pick: int


def _drafts(measure: str, fixed: Sequence[int], relative: Sequence[int]) -> st.SearchStrategy[Draft]:
    parts = st.just(measure), st.sampled_from(PERS), st.sampled_from([True, True, True, False])
    return st.one_of(
        *[st.builds(Draft, *parts, st.sampled_from(relative), st.just(value=True))] * 3,
        st.builds(Draft, *parts, st.sampled_from(fixed), st.just(value=False)),
    )


_DRAFT = st.one_of(
    _drafts("requests", (0, 1, 3, 20, 10**12), (-1, 1, 2, 3, 4, 6, 8, 12)),
    _drafts(
        "estimated_credits", (0, 1, 50 * MILLION, 9 * HUGE), (-1, 1, MILLION, 9 * MILLION, 20 * MILLION, HUGE, 3 * HUGE)
    ),
)
_DRAFTS = st.lists(_DRAFT, max_size=4, unique_by=lambda draft: (draft.measure, draft.per))
_RATES = st.sampled_from([(20, 10**6), (10, 1), (333_333, 3), (20_000, 100), (10**9, 2), (MILLION, 8)])
_TEAMS = st.sampled_from(TEAMS)
_OWNERS = st.sampled_from(["", *TEAMS])
_WHERE = st.sampled_from([0, 0, 1])
_AMOUNTS = st.sampled_from([0, 1, 2, 999_999, MILLION, HUGE - 1, HUGE]) | st.integers(0, 5 * MILLION)
_PRICED = st.builds(Bill, st.sampled_from(["hit", "miss"]), _AMOUNTS, st.sampled_from(MODELS))
_FAILED = st.builds(Bill, st.sampled_from(["upstream-error", "unpriced", "cancelled"]), st.none(), st.just("Flux"))
_BILLS = st.one_of(_PRICED, _PRICED, _PRICED, _FAILED)
_MANY_BILLS = st.lists(_BILLS, min_size=4, max_size=8)
_KINDS = ("charge", "charge", "admit", "admit", "settle", "settle", "settle", "refund", "refund", "pass", "peek")
_PICKS = st.integers(0, 99)
_ACTS = st.lists(
    st.one_of(
        *[st.builds(Act, st.sampled_from(_KINDS), _TEAMS, _PRICED, _PICKS)] * 5,
        st.builds(Act, st.just("settle"), _TEAMS, _FAILED, _PICKS),
    ),
    min_size=1,
    max_size=8,
)
_PAUSES_US = st.sampled_from([1, 10, 19_999, 333_333, MILLION, 10 * MILLION, 3600 * MILLION, -1, -30 * MILLION])
_PER = st.sampled_from(PERS)
_EDGES = st.sampled_from([0, 1, 1])
_AROUND_US = st.sampled_from([-1, 0, MILLION])
_SKEWS_US = st.sampled_from(
    [0, 1, 90 * MILLION, -90 * MILLION, 5400 * MILLION, -86_400 * MILLION, 40 * 86_400 * MILLION]
)


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        world.begin()
        self._books = Books(START_US, MOST_NAMES)
        self._processes = [Process(self._books) for _ in world.gateways]
        self._waiting: list[list[tuple[Ticket, Admitted]]] = [[] for _ in world.gateways]
        """What each gateway has admitted and not settled."""
        self._rates = dict.fromkeys(TEAMS, (20, 10**6))
        self._limits: dict[str, tuple[Limit, ...]] = dict.fromkeys(("", *TEAMS), ())
        """Of the organisation, and of each team."""
        self._agree()

    def teardown(self) -> None:
        for gateway, process in zip(self._world.gateways, self._processes, strict=True):
            process.out = False
            if process.owes:
                gateway.pay(process)

    # -- Steps

    @initialize(drafts=_DRAFTS, much=st.sampled_from([False, False, False, False, True]))
    def start(self, drafts: list[Draft], *, much: bool) -> None:
        if much:
            self.much_is_used(0, TEAMS[0])
        self.limits_change("", drafts)

    @rule(us=_PAUSES_US)
    def time_passes(self, us: int) -> None:
        self._books.now_us += us
        self._world.clock.set(self._books.now_us)

    @rule(per=_PER, edge=_EDGES, us=_AROUND_US)
    def time_comes_to_an_edge(self, per: str, edge: int, us: int) -> None:
        """Of the running window: to its end, or back to its begin, or one step further."""
        edge_s = span(per, self._books.now_us // MILLION)[edge]
        self.time_passes(edge_s * MILLION + us - self._books.now_us)

    @rule(where=_WHERE, us=_SKEWS_US)
    def clock_is_wrong(self, where: int, us: int) -> None:
        self._processes[where].skew_us = us

    @rule(team=_TEAMS, rate=_RATES)
    def rate_changes(self, team: str, rate: tuple[int, int]) -> None:
        self._rates[team] = rate
        self._agree()

    @rule(owner=_OWNERS, drafts=_DRAFTS)
    def limits_change(self, owner: str, drafts: list[Draft]) -> None:
        """A team's, or the organisation's: set, raised, lowered, even below what is used."""
        self._limits[owner] = tuple(self._limit(owner, draft) for draft in drafts)
        self._agree()

    @rule(where=_WHERE, acts=_ACTS)
    def turn(self, where: int, acts: list[Act]) -> None:
        """Several things are asked in one turn of the loop, and decided in one call: or in two, where a clock is wrong.

        Without the ledger, nothing is called.
        """
        process, calls = self._processes[where], self._world.calls()
        expected = self._expect_all(where, acts)
        answers = self._world.gateways[where].run(process, [one.asked for one in expected])
        called = self._world.calls() - calls
        assert called == 0 if process.out else called == 1 or (called == 2 and not process.knows_the_time)
        for answer, one in zip(answers, expected, strict=True):
            one.check(one.said, answer)
        if not process.out:
            process.hear()

    @rule(where=_WHERE, team=_TEAMS, draft=_DRAFT, owned=st.booleans(), bills=_MANY_BILLS, ends=st.booleans())
    def questions(self, where: int, team: str, draft: Draft, *, owned: bool, bills: list[Bill], ends: bool) -> None:
        """Several are admitted under a limit, and settled; perhaps in the next window, where others have come first."""
        self.limits_change(team if owned else "", [draft])
        half = len(bills) // 2
        self.turn(where, [Act("admit", team, bill, 0) for bill in bills[:half]])
        if ends:
            self.time_comes_to_an_edge(draft.per, 1, 0)
            self.turn(where, [Act("charge", team, bill, 0) for bill in bills[half:]])
        self.turn(where, [Act("settle", team, bill, 0) for bill in bills])

    @rule(where=_WHERE, acts=_ACTS, per=_PER, us=_AROUND_US, off_us=st.sampled_from([-1, 1, -MILLION, MILLION]))
    def clocks_differ_at_an_edge(self, where: int, acts: list[Act], per: str, us: int, off_us: int) -> None:
        """A gateway that knew the time takes itself to be just before, or just behind, the end of a window."""
        self.turn(where, acts)
        self.time_comes_to_an_edge(per, 1, us)
        self._processes[where].skew_us += off_us
        self.turn(where, acts)

    @rule(where=_WHERE, acts=_ACTS, per=_PER, edge=_EDGES, us=_AROUND_US, more_acts=_ACTS)
    def an_outage(self, where: int, acts: list[Act], per: str, edge: int, us: int, more_acts: list[Act]) -> None:
        """From something admitted before it to something settled behind it, over the end of a window."""
        self.turn(where, acts)
        self.ledger_is_out(where)
        self.turn(where, acts)
        self.time_comes_to_an_edge(per, edge, us)
        self.turn(where, more_acts)
        self.ledger_is_back(where)

    @rule(where=_WHERE, team=_TEAMS)
    def much_is_used(self, where: int, team: str) -> None:
        """More than a number of Lua holds exactly."""
        self.turn(where, [Act("charge", team, Bill("stale", HUGE - 1, "Flux"), 0)] * 11)

    @rule(where=_WHERE)
    def ledger_is_out(self, where: int) -> None:
        self._processes[where].out = True

    @rule(where=_WHERE)
    def ledger_is_back(self, where: int) -> None:
        self._processes[where].out = False
        self._pay(where)

    @rule(where=_WHERE, bill=_BILLS, pick=_PICKS)
    def what_was_admitted_unseen_is_settled(self, where: int, bill: Bill, pick: int) -> None:
        """Whether the ledger is back or not."""
        process, gateway = self._processes[where], self._world.gateways[where]
        if (found := self._pick(where, pick, unseen=True)) is not None:
            ticket, admitted = found
            process.owe(ticket, bill)
            (answer,) = gateway.run(process, [gateway.ledger.settle(admitted, charge_of(bill))])
            self._on_credit(bill, None, answer)
            self._pay(where)

    @rule(where=_WHERE)
    def look(self, where: int) -> None:
        """What is shown is exact, and books nothing."""
        if self._processes[where].out:
            return
        terms = [terms for _, terms in self._deals.values()]
        standings = self._world.gateways[where].standings(self._processes[where], terms)
        for standing, (deal, _) in zip(standings, self._deals.values(), strict=True):
            assert shown_by(standing) == self._books.say(deal)

    # -- What always holds

    @invariant()
    def all_adds_up(self) -> None:
        usage: dict[tuple[date, str], dict[str, int]] = {}
        counters: dict[tuple[str, str, int], dict[str, int]] = {}
        for name, (amounts, expires) in self._world.keys().items():
            kind, *rest = name.removeprefix("ep1:{acme}:").split(":")
            assert expires == (kind not in ("id", "models", "teams"))
            if amounts and kind == "u":
                usage[date.fromisoformat(rest[0]), rest[1]] = amounts
            elif amounts and kind == "q":
                counters[rest[1] if rest[0] == "t" else "", rest[-2], int(rest[-1])] = amounts
        assert usage == self._books.usage()
        assert counters == self._books.counters()
        assert _lasting(counters) == _summed_up(usage)

    @invariant()
    def names_are_few(self) -> None:
        for key, names in ((KEYS.models, set(self._books.names)), (KEYS.teams, self._books.seen)):
            assert self._world.store.smembers(key) == {name.encode() for name in names}

    # -- How it is done

    def _agree(self) -> None:
        """Everybody knows the new terms."""
        self._deals: dict[str, tuple[Deal, Terms]] = {}
        for team in TEAMS:
            deal = Deal(team, *self._rates[team], (*self._limits[team], *self._limits[""]))
            self._deals[team] = deal, terms_of(deal)

    def _limit(self, owner: str, draft: Draft) -> Limit:
        limit = Limit("team" if owner else "org", draft.measure, draft.per, draft.most, draft.refuses)
        if not draft.is_relative:
            return limit
        most = self._books.used(owner, limit) + draft.most
        return replace(limit, most=min(max(0, most), 9 * HUGE))

    def _expect_all(self, where: int, acts: list[Act]) -> list[Expected]:
        """In the order of `acts`. Those alike are decided in the place of the first one.

        Who is refused is told what was so then, who is admitted what is so behind them all.
        """
        expected: dict[int, Expected] = {}
        out = self._processes[where].out
        for numbers in [[number] for number in range(len(acts))] if out else self._alike(where, acts):
            found = [self._expect(where, acts[number]) for number in numbers]
            if len(found) > 1:
                found = [one._replace(said=_standing_as(found[-1].said, one.said)) for one in found]
            expected.update(zip(numbers, found, strict=True))
        return [self._behind_all(expected[number]) for number in range(len(acts))]

    def _behind_all(self, one: Expected) -> Expected:
        if one.said is None or one.deal is None or one.said.word != "ok":
            return one
        if not all(limit.refuses for limit in one.deal.limits):
            return one
        return one._replace(said=_standing_as(self._books.say(one.deal), one.said))

    def _alike(self, where: int, acts: list[Act]) -> list[list[int]]:
        """The numbers of those that are decided as one, which a sum beyond what Lua holds exactly would not be."""
        groups: list[list[int]] = []
        known: dict[object, list[int]] = {}
        waiting = sum(ticket.entry is not None for ticket, _ in self._waiting[where])
        for number, act in enumerate(acts):
            ends = act.kind in ("settle", "refund") and waiting > 0
            waiting -= ends
            alike = not ends and act.kind not in ("peek", "pass")
            alike = alike and all(one.refuses for one in self._deals[act.team][0].limits)
            bill = act.bill if act.kind == "charge" else None  # all others are admitted
            kind = (act.team, bill) if alike else number
            micro = (bill and bill.micro) or 0
            group = known.get(kind)
            if group is None or (len(group) + 1) * micro > EXACT_MICRO:
                group = known[kind] = []
                groups.append(group)
            group.append(number)
        return groups

    def _expect(self, where: int, act: Act) -> Expected:
        """What is to be asked, and what must come of it."""
        if act.kind in ("settle", "refund") and (found := self._pick(where, act.pick, unseen=False)):
            return self._expect_end(where, act, *found)
        return self._expect_unseen(where, act) if self._processes[where].out else self._expect_begin(where, act)

    def _expect_begin(self, where: int, act: Act) -> Expected:
        ledger, (deal, terms), bill = self._world.gateways[where].ledger, self._deals[act.team], act.bill
        match act.kind:
            case "charge":
                return Expected(
                    later(ledger.charge(terms, charge_of(bill))), self._books.charge(deal, bill), _check, deal
                )
            case "peek":
                return Expected(later(ledger.peek(terms, bill.micro)), self._books.peek(deal, bill.micro), _check, deal)
            case "pass":
                said = self._books.pass_over(deal, "not-cached")
                return Expected(later(ledger.pass_over(terms, Outcome.NOT_CACHED)), said, _check, deal)
            case _:
                said, entry = self._books.admit(deal)
                ticket = Ticket(deal, self._books.now_us, entry)
                return Expected(later(ledger.admit(terms)), said, partial(self._check_admission, where, ticket), deal)

    def _expect_unseen(self, where: int, act: Act) -> Expected:
        """Without the ledger everybody is admitted."""
        process, ledger, (deal, terms) = (
            self._processes[where],
            self._world.gateways[where].ledger,
            self._deals[act.team],
        )
        ticket = process.ticket(deal)
        match act.kind:
            case "charge" | "peek":
                process.owe(ticket, act.bill)
                asked = ledger.charge(terms, charge_of(act.bill))
                return Expected(later(asked), None, partial(self._on_credit, act.bill))
            case "pass":
                asked = ledger.pass_over(terms, Outcome.NOT_CACHED)
                return Expected(later(asked), None, partial(self._on_credit, Bill("not-cached")))
            case _:
                check = partial(self._on_credit, Bill("cancelled"), waiting=(where, ticket))
                return Expected(later(ledger.admit(terms)), None, check)

    def _expect_end(self, where: int, act: Act, ticket: Ticket, admitted: Admitted) -> Expected:
        process, ledger = self._processes[where], self._world.gateways[where].ledger
        if act.kind == "refund":
            asked = ledger.refund(admitted, Outcome.UPSTREAM_BUSY)
            if process.out:
                process.owe(ticket, None)
                return Expected(asked, None, _check_nothing)
            return Expected(
                asked, self._books.refund(ticket.deal, _entry(ticket), "upstream-busy"), _check_shown, ticket.deal
            )
        settled = ledger.settle(admitted, charge_of(act.bill))
        if process.out:
            process.owe(ticket, act.bill)
            return Expected(settled, None, partial(self._on_credit, act.bill))
        return Expected(settled, self._books.settle(ticket.deal, _entry(ticket), act.bill), _check, ticket.deal)

    def _pick(self, where: int, pick: int, *, unseen: bool) -> tuple[Ticket, Admitted] | None:
        """One of those that have been admitted: from now on it is not there any more."""
        found = [one for one in self._waiting[where] if (one[0].entry is None) == unseen]
        if not found:
            return None
        picked = found[pick % len(found)]
        self._waiting[where].remove(picked)
        return picked

    def _check_admission(self, where: int, ticket: Ticket, said: Said | None, answer: Answer) -> None:
        _check(said, answer)
        if isinstance(answer, Admitted):
            self._waiting[where].append((ticket, answer))

    def _on_credit(self, bill: Bill, _: Said | None, answer: Answer, waiting: tuple[int, Ticket] | None = None) -> None:
        assert isinstance(answer, Admitted)
        assert (answer.standing, answer.booked) == (None, False)
        assert answer.model == ("-" if bill.micro is None else "other")
        if waiting is not None:
            where, ticket = waiting
            self._waiting[where].append((ticket, answer))

    def _pay(self, where: int) -> None:
        process = self._processes[where]
        if process.owes and not process.out:
            self._world.gateways[where].pay(process)
            process.pay()
            process.hear()


def _standing_as(last: Said | None, said: Said | None) -> Said:
    assert last is not None
    assert said is not None
    return replace(said, lead_us=last.lead_us, rate_left=last.rate_left, used=last.used)


def _check(said: Said | None, answer: Answer) -> None:
    assert said is not None
    assert agree(said_by(answer), said), f"{said_by(answer)} is not {said}"


def _check_shown(said: Said | None, answer: Answer) -> None:
    assert said is not None
    assert isinstance(answer, Standing)
    assert agree(shown_by(answer), said), f"{shown_by(answer)} is not {said}"


def _check_nothing(_: Said | None, answer: Answer) -> None:
    assert answer is None


def _entry(ticket: Ticket) -> Entry:
    assert ticket.entry is not None
    return ticket.entry


def _lasting(counters: Mapping[tuple[str, str, int], Mapping[str, int]]) -> dict[tuple[str, str, int], Counter[str]]:
    """What is counted by the day, week and month."""
    return {of: Counter(amounts) for of, amounts in counters.items() if of[1] in LASTING}


def _summed_up(usage: Mapping[tuple[date, str], Mapping[str, int]]) -> dict[tuple[str, str, int], Counter[str]]:
    """What these counters must hold, by the rows of usage."""
    sums: dict[tuple[str, str, int], Counter[str]] = {}
    for (day, team), row in usage.items():
        noon_s = int(datetime(day.year, day.month, day.day, 12, tzinfo=ZONE).timestamp())
        for owner, per in product(("", team), LASTING):
            counter = sums.setdefault((owner, per, span(per, noon_s)[0]), Counter())
            for name, amount in row.items():
                *_, measure = name.split(":")
                counter[measure] += amount if measure != "refused" else 0
    return {of: +counter for of, counter in sums.items() if +counter}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, any_store_url: str) -> Iterator[World]:
    monkeypatch.setattr(Script, "text", property(lambda script: _clocked_script(script.name)[0]))
    monkeypatch.setattr(Script, "digest", property(lambda script: _clocked_script(script.name)[1]))
    monkeypatch.setattr("proxy.store.TIMEOUT_S", 10)
    monkeypatch.setattr("proxy.decisions.MAX_MODELS", MOST_NAMES)
    monkeypatch.setattr("proxy.ledger.FLUSH_EVERY_S", 0)
    with ExitStack() as opened:
        store = opened.enter_context(redis.Redis.from_url(any_store_url))
        clock = Clock(store)
        monkeypatch.setattr("proxy.decisions.time_ns", clock.time_ns)
        monkeypatch.setattr("proxy.reports.time", lambda: clock.time_ns() / 1e9)
        gateways = [Gateway(any_store_url, clock) for _ in range(2)]
        for gateway in gateways:
            opened.callback(gateway.close)
        yield World(store, clock, gateways)


def test_the_ledger_does_as_its_model(world: World) -> None:
    profile = hypothesis.settings(
        max_examples=int(os.environ.get("LEDGER_EXAMPLES", "40")),
        stateful_step_count=30,
        derandomize="LEDGER_EXAMPLES" not in os.environ,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    machine: Any = partial(LedgerMachine, world)
    run_state_machine_as_test(machine, settings=profile)


# --- The rate --------------------------------------------------------------------------------------------------------


def conforms(admitted: Sequence[int], at_us: int, interval_us: int, burst: int) -> bool:
    """Whether with one more, now, no stretch of time holds more than a burst, and one an interval."""
    return all(
        len(admitted) - number + 1 <= burst + Fraction(at_us - since_us, interval_us)
        for number, since_us in enumerate(admitted)
    )


def test_a_rate_admits_all_that_conforms_and_nothing_else(world: World) -> None:
    """By its definition, over all stretches of time; nothing of an algorithm is in it."""
    world.begin()
    gateway, process, serial = world.gateways[0], Process(Books(START_US, 0)), count()
    ledger = gateway.ledger
    ask: dict[str, Callable[[Terms], Coroutine[Any, Any, Answer]]] = {
        "charge": lambda terms: ledger.charge(terms, Charge(Outcome.HIT, 1)),
        "admit": ledger.admit,
        "peek": lambda terms: ledger.peek(terms, None),
        "pass": lambda terms: ledger.pass_over(terms, Outcome.NOT_CACHED),
    }
    asks = st.lists(
        st.tuples(st.sampled_from(sorted(ask)), st.integers(0, 6), st.integers(-1, 1)), min_size=3, max_size=40
    )

    @hypothesis.settings(max_examples=150, derandomize=True, database=None)
    @given(st.sampled_from([20, 20_000, 333_333, 10**9]), st.integers(1, 5), asks)
    def learn(interval_us: int, burst: int, asked: list[tuple[str, int, int]]) -> None:
        terms = terms_of(Deal(f"team-{next(serial)}", interval_us, burst, ()))
        at_us, admitted = world.clock.us, list[int]()
        for kind, halves, more_us in asked:
            at_us += max(0, halves * interval_us // 2 + more_us)
            world.clock.set(at_us)
            (answer,) = gateway.run(process, [ask[kind](terms)])
            expected = conforms(admitted, at_us, interval_us, burst)
            assert isinstance(answer, Admitted) == expected
            if expected:
                admitted.append(at_us)

    learn()
