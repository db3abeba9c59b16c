"""The ledger against what `ledger_model` says of it: verdict for verdict, key for key, on Valkey and on Redis 7.0.

Everything is real but time. The scripts read it from a key where they would call `TIME`; it lies in the future, so that
no window of theirs ever expires. Two gateways share the ledger, each with a clock that may be wrong.
"""

from dataclasses import replace
from datetime import date
from functools import partial
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from harness import machine_settings
from ledger_acts import (
    ACTS,
    ANY_TEAM,
    BILLS,
    DRAFT,
    DRAFTS,
    HUGE,
    MANY_BILLS,
    MAX_LIMIT,
    PICKS,
    TEAMS,
    Act,
    Draft,
    Expected,
    charge_of,
    check,
    check_nothing,
    check_shown,
    entry_of,
    lasting,
    limits_of,
    shown_by,
    standing_as,
    summed_up,
)
from ledger_harness import KEYS, MOST_NAMES, START_US, Answer, Harness, later
from ledger_model import MILLION, PERS, Bill, Books, Deal, Entry, Limit, Process, Said, Ticket, span
from proxy.problems import Outcome
from proxy.quota.ledger import Admitted
from proxy.quota.ledger_script import MAX_BATCH_ENTRIES, MAX_ENTRY_MICRO
from proxy.quota.quotas import TeamLimits

_RATES = st.sampled_from([(20, 10**6), (10, 1), (333_333, 3), (20_000, 100), (10**9, 2), (MILLION, 8)])
_OWNERS = st.sampled_from(["", *TEAMS])
_WHERE = st.sampled_from([0, 0, 1])
_PAUSES_US = st.sampled_from([1, 10, 19_999, 333_333, MILLION, 10 * MILLION, 3600 * MILLION, -1, -30 * MILLION])
_PER = st.sampled_from(PERS)
_EDGES = st.sampled_from([0, 1, 1])
_AROUND_US = st.sampled_from([-1, 0, MILLION])
_SKEWS_US = st.sampled_from(
    [0, 1, 90 * MILLION, -90 * MILLION, 5400 * MILLION, -86_400 * MILLION, 40 * 86_400 * MILLION]
)


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self, harness: Harness) -> None:
        super().__init__()
        self._world = harness
        harness.begin()
        self._books = Books(START_US, MOST_NAMES)
        self._processes = [Process(self._books) for _ in harness.gateways]
        self._waiting: list[list[tuple[Ticket, Admitted]]] = [[] for _ in harness.gateways]
        """What each gateway has admitted and not settled."""
        self._rates = dict.fromkeys(TEAMS, (20, 10**6))
        self._limits: dict[str, tuple[Limit, ...]] = dict.fromkeys(("", *TEAMS), ())
        """Of the organisation, and of each team."""
        self._flushes = 0
        self._agree()

    def teardown(self) -> None:
        for gateway, process in zip(self._world.gateways, self._processes, strict=True):
            process.out = False
            if process.owes:
                gateway.pay(process)

    # -- Steps

    @initialize(drafts=DRAFTS, much=st.sampled_from([False, False, False, False, True]))
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

    @rule(team=ANY_TEAM, rate=_RATES)
    def rate_changes(self, team: str, rate: tuple[int, int]) -> None:
        self._rates[team] = rate
        self._agree()

    @rule(owner=_OWNERS, drafts=DRAFTS)
    def limits_change(self, owner: str, drafts: list[Draft]) -> None:
        """A team's, or the organisation's: set, raised, lowered, even below what is used."""
        self._limits[owner] = tuple(self._limit(owner, draft) for draft in drafts)
        self._agree()

    @rule(where=_WHERE, acts=ACTS)
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

    @rule(where=_WHERE, team=ANY_TEAM, draft=DRAFT, owned=st.booleans(), bills=MANY_BILLS, ends=st.booleans())
    def questions(self, where: int, team: str, draft: Draft, *, owned: bool, bills: list[Bill], ends: bool) -> None:
        """Several are admitted under a limit, and settled; perhaps in the next window, where others have come first."""
        self.limits_change(team if owned else "", [draft])
        half = len(bills) // 2
        self.turn(where, [Act("admit", team, bill, 0) for bill in bills[:half]])
        if ends:
            self.time_comes_to_an_edge(draft.per, 1, 0)
            self.turn(where, [Act("charge", team, bill, 0) for bill in bills[half:]])
        self.turn(where, [Act("settle", team, bill, 0) for bill in bills])

    @rule(where=_WHERE, acts=ACTS, per=_PER, us=_AROUND_US, off_us=st.sampled_from([-1, 1, -MILLION, MILLION]))
    def clocks_differ_at_an_edge(self, where: int, acts: list[Act], per: str, us: int, off_us: int) -> None:
        """A gateway that knew the time takes itself to be just before, or just behind, the end of a window."""
        self.turn(where, acts)
        self.time_comes_to_an_edge(per, 1, us)
        self._processes[where].skew_us += off_us
        self.turn(where, acts)

    @rule(where=_WHERE, acts=ACTS, per=_PER, edge=_EDGES, us=_AROUND_US, more_acts=ACTS)
    def an_outage(self, where: int, acts: list[Act], per: str, edge: int, us: int, more_acts: list[Act]) -> None:
        """From something admitted before it to something settled behind it, over the end of a window."""
        self.turn(where, acts)
        self.ledger_is_out(where)
        self.turn(where, acts)
        self.time_comes_to_an_edge(per, edge, us)
        self.turn(where, more_acts)
        self.ledger_is_back(where)

    @rule(where=_WHERE, team=ANY_TEAM)
    def much_is_used(self, where: int, team: str) -> None:
        """Two flushes book as much as they can, together more than 2**53; then one answer more."""
        process, (deal, terms) = self._processes[where], self._deals[team]
        if process.out:
            return
        bill = Bill("stale", MAX_BATCH_ENTRIES * MAX_ENTRY_MICRO, "Flux")
        for name in ("first", "second"):
            ticket = process.ticket(deal)
            self._world.gateways[where].flush(process, f"{name} {self._flushes}", terms, charge_of(bill))
            self._books.enter(Entry(deal.team, ticket.at_us, deal.counted), bill)
            process.hear()
        self._flushes += 1
        self.turn(where, [Act("charge", team, Bill("stale", HUGE - 1, "Flux"), 0)])

    @rule(where=_WHERE)
    def ledger_is_out(self, where: int) -> None:
        self._processes[where].out = True

    @rule(where=_WHERE)
    def ledger_is_back(self, where: int) -> None:
        self._processes[where].out = False
        self._pay(where)

    @rule(where=_WHERE, bill=BILLS, pick=PICKS)
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
        quota_states = self._world.gateways[where].quota_states(self._processes[where], terms)
        for quota_state, (deal, _) in zip(quota_states, self._deals.values(), strict=True):
            assert shown_by(quota_state) == self._books.say(deal)

    # -- What always holds

    @invariant()
    def all_adds_up(self) -> None:
        usage: dict[tuple[date, str], dict[str, int]] = {}
        counters: dict[tuple[str, str, int], dict[str, int]] = {}
        for name, (amounts, expires) in self._world.keys().items():
            kind, *rest = name.removeprefix("ep1:{acme}:").split(":")
            assert expires == (kind not in ("id", "models", "model-uses", "teams"))
            if amounts and kind == "u":
                usage[date.fromisoformat(rest[0]), rest[1]] = amounts
            elif amounts and kind == "q":
                counters[rest[1] if rest[0] == "t" else "", rest[-2], int(rest[-1])] = amounts
        assert usage == self._books.usage()
        assert counters == self._books.counters()
        assert lasting(counters) == summed_up(usage)

    @invariant()
    def names_are_few(self) -> None:
        for key, names in ((KEYS.models, set(self._books.names)), (KEYS.teams, self._books.seen)):
            assert self._world.store.smembers(key) == {name.encode() for name in names}

    # -- How it is done

    def _agree(self) -> None:
        """Everybody knows the new terms."""
        self._deals: dict[str, tuple[Deal, TeamLimits]] = {}
        for team in TEAMS:
            deal = Deal(team, *self._rates[team], (*self._limits[team], *self._limits[""]))
            self._deals[team] = deal, limits_of(deal)

    def _limit(self, owner: str, draft: Draft) -> Limit:
        limit = Limit("team" if owner else "org", draft.measure, draft.per, draft.most, draft.refuses)
        if not draft.is_relative:
            return limit
        most = self._books.used(owner, limit) + draft.most
        return replace(limit, most=min(max(0, most), MAX_LIMIT))

    def _expect_all(self, where: int, acts: list[Act]) -> list[Expected]:
        """In the order of `acts`. Those alike are decided in the place of the first one.

        Who is refused is told what was so then, who is admitted what is so behind them all.
        """
        expected: dict[int, Expected] = {}
        # The requests to settle are given out in the order of `acts`, as the gateway asks. Given out in the order of
        # decisions, an act that is grouped with an earlier one could take the request of an act between the two.
        ended = [self._ended(where, act) for act in acts]
        out = self._processes[where].out
        for numbers in [[number] for number in range(len(acts))] if out else self._alike(acts, ended):
            found = [self._expect(where, acts[number], ended[number]) for number in numbers]
            if len(found) > 1:
                found = [one._replace(said=standing_as(found[-1].said, one.said)) for one in found]
            expected.update(zip(numbers, found, strict=True))
        return [self._behind_all(expected[number]) for number in range(len(acts))]

    def _behind_all(self, one: Expected) -> Expected:
        if one.said is None or one.deal is None or one.said.word != "ok":
            return one
        if not all(limit.refuses for limit in one.deal.limits):
            return one
        return one._replace(said=standing_as(self._books.say(one.deal), one.said))

    def _ended(self, where: int, act: Act) -> tuple[Ticket, Admitted] | None:
        return self._pick(where, act.pick, unseen=False) if act.kind in ("settle", "refund") else None

    def _alike(self, acts: list[Act], ended: list[tuple[Ticket, Admitted] | None]) -> list[list[int]]:
        """The numbers of those that are decided as one, which a sum beyond what Lua holds exactly would not be."""
        groups: list[list[int]] = []
        known: dict[object, list[int]] = {}
        for number, act in enumerate(acts):
            alike = ended[number] is None and act.kind not in ("peek", "record_uncached")
            alike = alike and all(one.refuses for one in self._deals[act.team][0].limits)
            bill = act.bill if act.kind == "charge" else None  # all others are admitted
            kind = (act.team, bill) if alike else number
            micro = (bill and bill.micro) or 0
            group = known.get(kind)
            if group is None or (len(group) + 1) * micro > MAX_ENTRY_MICRO:
                group = known[kind] = []
                groups.append(group)
            group.append(number)
        return groups

    def _expect(self, where: int, act: Act, ended: tuple[Ticket, Admitted] | None) -> Expected:
        """What is to be asked, and what must come of it."""
        if ended is not None:
            return self._expect_end(where, act, *ended)
        return self._expect_unseen(where, act) if self._processes[where].out else self._expect_begin(where, act)

    def _expect_begin(self, where: int, act: Act) -> Expected:
        ledger, (deal, terms), bill = self._world.gateways[where].ledger, self._deals[act.team], act.bill
        match act.kind:
            case "charge":
                return Expected(
                    later(ledger.charge(terms, charge_of(bill))), self._books.charge(deal, bill), check, deal
                )
            case "peek":
                return Expected(later(ledger.peek(terms, bill.micro)), self._books.peek(deal, bill.micro), check, deal)
            case "record_uncached":
                said = self._books.record_uncached(deal, "not-cached")
                return Expected(later(ledger.record_uncached(terms, Outcome.NOT_CACHED)), said, check, deal)
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
            case "record_uncached":
                asked = ledger.record_uncached(terms, Outcome.NOT_CACHED)
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
                return Expected(asked, None, check_nothing)
            return Expected(
                asked, self._books.refund(ticket.deal, entry_of(ticket), "upstream-busy"), check_shown, ticket.deal
            )
        settled = ledger.settle(admitted, charge_of(act.bill))
        if process.out:
            process.owe(ticket, act.bill)
            return Expected(settled, None, partial(self._on_credit, act.bill))
        return Expected(settled, self._books.settle(ticket.deal, entry_of(ticket), act.bill), check, ticket.deal)

    def _pick(self, where: int, pick: int, *, unseen: bool) -> tuple[Ticket, Admitted] | None:
        """One of those that have been admitted: from now on it is not there any more."""
        found = [one for one in self._waiting[where] if (one[0].entry is None) == unseen]
        if not found:
            return None
        picked = found[pick % len(found)]
        self._waiting[where].remove(picked)
        return picked

    def _check_admission(self, where: int, ticket: Ticket, said: Said | None, answer: Answer) -> None:
        check(said, answer)
        if isinstance(answer, Admitted):
            self._waiting[where].append((ticket, answer))

    def _on_credit(self, bill: Bill, _: Said | None, answer: Answer, waiting: tuple[int, Ticket] | None = None) -> None:
        assert isinstance(answer, Admitted)
        assert (answer.quota_state, answer.booked) == (None, False)
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


def test_the_ledger_does_as_its_model(harness: Harness) -> None:
    profile = machine_settings("LEDGER_EXAMPLES", 40)
    machine: Any = partial(LedgerMachine, harness)
    run_state_machine_as_test(machine, settings=profile)


def test_with_one_request_to_settle_the_first_settlement_takes_it(harness: Harness) -> None:
    """The second one is an admission, which the ledger decides together with the one before both."""
    machine, bill = LedgerMachine(harness), Bill("hit", 5, "Flux")
    warning = Draft("requests", "day", refuses=False, most=9, is_relative=False)
    machine.limits_change("design", [warning])  # each request of the team is told how it stood at that step
    machine.turn(0, [Act("admit", "design", bill, 0)])
    machine.turn(0, [Act("admit", "film", bill, 0), Act("settle", "design", bill, 0), Act("settle", "film", bill, 0)])
    machine.all_adds_up()
    used = {name: amounts for name, (amounts, _) in harness.keys().items() if ":u:" in name}
    assert used == {
        "ep1:{acme}:u:2031-10-25:design": {"Flux:hit:requests": 1, "Flux:hit:credits": 5},
        "ep1:{acme}:u:2031-10-25:film": {"-:cancelled:requests": 2},
    }


def test_a_model_gives_its_place_to_a_new_one_after_30_days(harness: Harness) -> None:
    """Of two places, each team can have one."""
    machine = LedgerMachine(harness)

    def charge(team: str, *models: str) -> None:
        machine.turn(0, [Act("charge", team, Bill("hit", 5, model), 0) for model in models])
        machine.names_are_few()

    charge("design", "Flux", "Flux dev.1")
    charge("film", "style", "Flux dev.1")
    assert set(machine._books.names) == {"Flux", "style"}
    machine.time_passes(30 * 86_400 * MILLION)
    charge("film", "Flux")
    charge("design", "Flux dev.1")
    machine.time_passes(86_400 * MILLION)
    charge("design", "Flux dev.1")
    assert set(machine._books.names) == {"Flux"}
    charge("film", "Flux dev.1")
    assert set(machine._books.names) == {"Flux", "Flux dev.1"}
