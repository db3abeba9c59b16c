"""State machine that compares each verdict and key of the ledger with `ledger_model`, on Valkey and on Redis 7.0.

Everything is real except time. The scripts read it from a key instead of calling `TIME`; it is in the future, so no key
of a window expires. Two gateways share the ledger, each with a clock that may be wrong.
"""

from dataclasses import replace
from datetime import date
from functools import partial
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from harness import machine_settings
from ledger_harness import KEYS, MAX_NAMES, START_US, Answer, Harness, one_iteration_later
from ledger_model import (
    MILLION,
    PERS,
    Admission,
    Cost,
    Entry,
    Limit,
    ModelLedger,
    Process,
    TeamPolicy,
    Verdict,
    window_of,
)
from ledger_operations import (
    ANY_TEAM,
    COSTS,
    DRAFT,
    DRAFTS,
    HUGE,
    MANY_COSTS,
    MAX_LIMIT,
    OPERATIONS,
    PICKS,
    TEAMS,
    Draft,
    Expected,
    Operation,
    charge_of,
    check,
    check_nothing,
    check_unbooked,
    counters_of,
    entry_of,
    lasting,
    limits_of,
    state_of,
    with_state_of,
)
from proxy.problems import Code, Outcome, Problem
from proxy.quota.ledger import Admitted
from proxy.quota.ledger_script import MAX_BATCH_ENTRIES, MAX_ENTRY_MICRO
from proxy.quota.quotas import TeamLimits

pytestmark = pytest.mark.usefixtures("coverage_paused")

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
        self._harness = harness
        harness.reset()
        self._model_ledger = ModelLedger(START_US, MAX_NAMES)
        self._processes = [Process(self._model_ledger) for _ in harness.gateways]
        self._waiting: list[list[tuple[Admission, Admitted]]] = [[] for _ in harness.gateways]
        """The requests that each gateway has admitted and not settled."""
        self._rates = dict.fromkeys(TEAMS, (20, 10**6))
        self._limits: dict[str, tuple[Limit, ...]] = dict.fromkeys(("", *TEAMS), ())
        """Limits of the organisation (`""`) and of each team."""
        self._flushes = 0
        self._update_policies()

    def teardown(self) -> None:
        for gateway, process in zip(self._harness.gateways, self._processes, strict=True):
            process.ledger_down = False
            if process.has_buffered:
                gateway.flush(process)

    # -- Steps

    @initialize(drafts=DRAFTS, exceeds_2_to_the_53=st.sampled_from([False, False, False, False, True]))
    def start(self, drafts: list[Draft], *, exceeds_2_to_the_53: bool) -> None:
        if exceeds_2_to_the_53:
            self.usage_exceeds_2_to_the_53(0, TEAMS[0])
        self.limits_change("", drafts)

    @rule(us=_PAUSES_US)
    def time_passes(self, us: int) -> None:
        self._model_ledger.now_us += us
        self._harness.clock.set(self._model_ledger.now_us)

    @rule(per=_PER, edge=_EDGES, us=_AROUND_US)
    def time_reaches_an_edge(self, per: str, edge: int, us: int) -> None:
        """Moves the time to the end or the begin of the current window, plus `us`."""
        edge_s = window_of(per, self._model_ledger.now_us // MILLION)[edge]
        self.time_passes(edge_s * MILLION + us - self._model_ledger.now_us)

    @rule(where=_WHERE, us=_SKEWS_US)
    def clock_is_skewed(self, where: int, us: int) -> None:
        self._processes[where].skew_us = us

    @rule(team=ANY_TEAM, rate=_RATES)
    def rate_changes(self, team: str, rate: tuple[int, int]) -> None:
        self._rates[team] = rate
        self._update_policies()

    @rule(owner=_OWNERS, drafts=DRAFTS)
    def limits_change(self, owner: str, drafts: list[Draft]) -> None:
        """Sets, raises or lowers limits of a team or the organisation, even below the used amount."""
        self._limits[owner] = tuple(self._limit(owner, draft) for draft in drafts)
        self._update_policies()

    @rule(where=_WHERE, operations=OPERATIONS)
    def run_operations(self, where: int, operations: list[Operation]) -> None:
        """Runs operations in one iteration of the event loop: one call decides them, or two if the clock is wrong.

        Without the ledger, no script is called.
        """
        process, calls = self._processes[where], self._harness.calls()
        expected = self._expect_all(where, operations)
        answers = self._harness.gateways[where].run(process, [one.call for one in expected])
        called = self._harness.calls() - calls
        assert called == 0 if process.ledger_down else called == 1 or (called == 2 and not process.clock_is_synced)
        for answer, one in zip(answers, expected, strict=True):
            one.check(one.verdict, answer)
        if not process.ledger_down:
            process.sync_clock()

    @rule(where=_WHERE, team=ANY_TEAM, draft=DRAFT, for_team=st.booleans(), costs=MANY_COSTS, next_window=st.booleans())
    def admissions_are_settled(
        self, where: int, team: str, draft: Draft, *, for_team: bool, costs: list[Cost], next_window: bool
    ) -> None:
        """Admits and settles several requests under a limit, perhaps in the next window after other requests."""
        self.limits_change(team if for_team else "", [draft])
        half = len(costs) // 2
        self.run_operations(where, [Operation("admit", team, cost, 0) for cost in costs[:half]])
        if next_window:
            self.time_reaches_an_edge(draft.per, 1, 0)
            self.run_operations(where, [Operation("charge", team, cost, 0) for cost in costs[half:]])
        self.run_operations(where, [Operation("settle", team, cost, 0) for cost in costs])

    @rule(
        where=_WHERE, operations=OPERATIONS, per=_PER, us=_AROUND_US, off_us=st.sampled_from([-1, 1, -MILLION, MILLION])
    )
    def clock_is_skewed_at_an_edge(
        self, where: int, operations: list[Operation], per: str, us: int, off_us: int
    ) -> None:
        """Moves a synchronised gateway's clock to just before or just after the end of a window."""
        self.run_operations(where, operations)
        self.time_reaches_an_edge(per, 1, us)
        self._processes[where].skew_us += off_us
        self.run_operations(where, operations)

    @rule(where=_WHERE, operations=OPERATIONS, per=_PER, edge=_EDGES, us=_AROUND_US, more_operations=OPERATIONS)
    def outage_over_an_edge(
        self, where: int, operations: list[Operation], per: str, edge: int, us: int, more_operations: list[Operation]
    ) -> None:
        """Runs operations before, during and after an outage that contains the edge of a window."""
        self.run_operations(where, operations)
        self.ledger_goes_down(where)
        self.run_operations(where, operations)
        self.time_reaches_an_edge(per, edge, us)
        self.run_operations(where, more_operations)
        self.ledger_comes_back(where)

    @rule(where=_WHERE, team=ANY_TEAM)
    def usage_exceeds_2_to_the_53(self, where: int, team: str) -> None:
        """Books two largest flushes, together more than 2**53, and then one more answer."""
        process, (policy, team_limits) = self._processes[where], self._policies[team]
        if process.ledger_down:
            return
        cost = Cost("stale", MAX_BATCH_ENTRIES * MAX_ENTRY_MICRO, "Flux")
        for name in ("first", "second"):
            admission = process.admission(policy)
            self._harness.gateways[where].book_largest_flush(
                process, f"{name} {self._flushes}", team_limits, charge_of(cost)
            )
            self._model_ledger.book(Entry(policy.team, admission.at_us, policy.counted), cost)
            process.sync_clock()
        self._flushes += 1
        self.run_operations(where, [Operation("charge", team, Cost("stale", HUGE - 1, "Flux"), 0)])

    @rule(where=_WHERE)
    def ledger_goes_down(self, where: int) -> None:
        self._processes[where].ledger_down = True

    @rule(where=_WHERE)
    def ledger_comes_back(self, where: int) -> None:
        self._processes[where].ledger_down = False
        self._flush(where)

    @rule(where=_WHERE, cost=COSTS, pick=PICKS)
    def admission_of_an_outage_is_settled(self, where: int, cost: Cost, pick: int) -> None:
        """The ledger may be back or still down."""
        process, gateway = self._processes[where], self._harness.gateways[where]
        if (found := self._pick(where, pick, in_outage=True)) is not None:
            admission, admitted = found
            process.buffer(admission, cost)
            (answer,) = gateway.run(process, [gateway.ledger.settle(admitted, charge_of(cost))])
            self._check_buffered(cost, None, answer)
            self._flush(where)

    @rule(where=_WHERE)
    def reports_are_exact(self, where: int) -> None:
        """Reports are exact, and book nothing."""
        if self._processes[where].ledger_down:
            return
        team_limits = [team_limits for _, team_limits in self._policies.values()]
        quota_states = self._harness.gateways[where].quota_states(self._processes[where], team_limits)
        for quota_state, (policy, _) in zip(quota_states, self._policies.values(), strict=True):
            assert state_of(quota_state) == self._model_ledger.ok_verdict(policy)

    # -- Invariants

    @invariant()
    def usage_and_counters_match_the_model(self) -> None:
        usage: dict[tuple[date, str], dict[str, int]] = {}
        counters: dict[tuple[str, str, int], dict[str, int]] = {}
        for name, (amounts, expires) in self._harness.keys().items():
            kind, *rest = name.removeprefix("ep1:{acme}:").split(":")
            assert expires == (kind not in ("id", "models", "model-uses", "teams"))
            if amounts and kind == "u":
                usage[date.fromisoformat(rest[0]), rest[1]] = amounts
            elif amounts and kind == "q":
                counters[rest[1] if rest[0] == "t" else "", rest[-2], int(rest[-1])] = amounts
        assert usage == self._model_ledger.usage()
        assert counters == self._model_ledger.counters()
        assert lasting(counters) == counters_of(usage)

    @invariant()
    def names_match_the_model(self) -> None:
        for key, names in ((KEYS.models, set(self._model_ledger.names)), (KEYS.teams, self._model_ledger.teams)):
            assert self._harness.store.smembers(key) == {name.encode() for name in names}

    # -- Helpers

    def _update_policies(self) -> None:
        """Gives the current rates and limits to all teams."""
        self._policies: dict[str, tuple[TeamPolicy, TeamLimits]] = {}
        for team in TEAMS:
            policy = TeamPolicy(team, *self._rates[team], (*self._limits[team], *self._limits[""]))
            self._policies[team] = policy, limits_of(policy)

    def _limit(self, owner: str, draft: Draft) -> Limit:
        limit = Limit("team" if owner else "org", draft.measure, draft.per, draft.max_amount, draft.refuses)
        if not draft.is_relative:
            return limit
        max_amount = self._model_ledger.used(owner, limit) + draft.max_amount
        return replace(limit, max_amount=min(max(0, max_amount), MAX_LIMIT))

    def _expect_all(self, where: int, operations: list[Operation]) -> list[Expected]:
        """Returns expectations in the order of `operations`. Mergeable ones are decided in the place of the first one.

        A refused request reports the team's state at its decision, an admitted one the state after the batch.
        """
        expected: dict[int, Expected] = {}
        # Requests to settle are picked in the order of `operations`, like the gateway does. In the order of decisions,
        # an operation merged with an earlier one could take the request of an operation between the two.
        to_settle = [self._to_settle(where, operation) for operation in operations]
        ledger_down = self._processes[where].ledger_down
        for numbers in (
            [[number] for number in range(len(operations))] if ledger_down else self._mergeable(operations, to_settle)
        ):
            found = [self._expect(where, operations[number], to_settle[number]) for number in numbers]
            if len(found) > 1:
                found = [one._replace(verdict=with_state_of(found[-1].verdict, one.verdict)) for one in found]
            expected.update(zip(numbers, found, strict=True))
        return [self._after_batch(expected[number]) for number in range(len(operations))]

    def _after_batch(self, one: Expected) -> Expected:
        if one.verdict is None or one.policy is None or one.verdict.code in ("rate-limited", "quota-exceeded"):
            return one
        if not all(limit.refuses for limit in one.policy.limits):
            return one
        return one._replace(verdict=with_state_of(self._model_ledger.ok_verdict(one.policy), one.verdict))

    def _to_settle(self, where: int, operation: Operation) -> tuple[Admission, Admitted] | None:
        return (
            self._pick(where, operation.pick, in_outage=False)
            if operation.kind in ("settle", "refund", "release")
            else None
        )

    def _mergeable(
        self, operations: list[Operation], to_settle: list[tuple[Admission, Admitted] | None]
    ) -> list[list[int]]:
        """Returns groups of indices that the ledger merges. It does not merge above Lua's largest exact number."""
        groups: list[list[int]] = []
        open_groups: dict[object, list[int]] = {}
        for number, operation in enumerate(operations):
            mergeable = to_settle[number] is None and operation.kind not in ("peek", "record_uncached", "over_ceiling")
            mergeable = mergeable and all(one.refuses for one in self._policies[operation.team][0].limits)
            cost = operation.cost if operation.kind == "charge" else None  # all others are admissions
            name = operation.kind if operation.kind in ("charge", "use_rate") else "admit"
            kind = (name, operation.team, cost) if mergeable else number
            micro = (cost and cost.micro) or 0
            group = open_groups.get(kind)
            if group is None or (len(group) + 1) * micro > MAX_ENTRY_MICRO:
                group = open_groups[kind] = []
                groups.append(group)
            group.append(number)
        return groups

    def _expect(self, where: int, operation: Operation, to_settle: tuple[Admission, Admitted] | None) -> Expected:
        """Returns the call for an operation, and its expected answer."""
        if to_settle is not None:
            return self._expect_settlement(where, operation, *to_settle)
        return (
            self._expect_in_outage(where, operation)
            if self._processes[where].ledger_down
            else self._expect_decision(where, operation)
        )

    def _expect_decision(self, where: int, operation: Operation) -> Expected:
        ledger, (policy, team_limits), cost = (
            self._harness.gateways[where].ledger,
            self._policies[operation.team],
            operation.cost,
        )
        match operation.kind:
            case "charge":
                return Expected(
                    one_iteration_later(ledger.charge(team_limits, charge_of(cost))),
                    self._model_ledger.charge(policy, cost),
                    check,
                    policy,
                )
            case "peek":
                return Expected(
                    one_iteration_later(ledger.peek(team_limits, cost.micro)),
                    self._model_ledger.peek(policy, cost.micro),
                    check,
                    policy,
                )
            case "use_rate":
                coroutine = ledger.use_rate(team_limits)
                return Expected(one_iteration_later(coroutine), self._model_ledger.use_rate(policy), check, policy)
            case "over_ceiling":
                assert cost.micro is not None
                coroutine = ledger.refuse_over_ceiling(team_limits, charge_of(cost))
                verdict = self._model_ledger.over_ceiling(policy, cost.micro)
                return Expected(one_iteration_later(coroutine), verdict, check, policy)
            case "record_uncached":
                verdict = self._model_ledger.record_uncached(policy, "not-cached")
                return Expected(
                    one_iteration_later(ledger.record_uncached(team_limits, Outcome.NOT_CACHED)), verdict, check, policy
                )
            case _:
                verdict, entry = self._model_ledger.admit(policy)
                admission = Admission(policy, self._model_ledger.now_us, entry)
                return Expected(
                    one_iteration_later(ledger.admit(team_limits)),
                    verdict,
                    partial(self._check_admission, where, admission),
                    policy,
                )

    def _expect_in_outage(self, where: int, operation: Operation) -> Expected:
        """Without the ledger, every request is admitted."""
        process, ledger, (policy, team_limits) = (
            self._processes[where],
            self._harness.gateways[where].ledger,
            self._policies[operation.team],
        )
        admission = process.admission(policy)
        match operation.kind:
            case "charge" | "peek":
                process.buffer(admission, operation.cost)
                coroutine = ledger.charge(team_limits, charge_of(operation.cost))
                return Expected(one_iteration_later(coroutine), None, partial(self._check_buffered, operation.cost))
            case "record_uncached":
                coroutine = ledger.record_uncached(team_limits, Outcome.NOT_CACHED)
                return Expected(one_iteration_later(coroutine), None, partial(self._check_buffered, Cost("not-cached")))
            case "use_rate":
                coroutine = ledger.use_rate(team_limits)
                return Expected(one_iteration_later(coroutine), None, partial(self._check_buffered, Cost("hit")))
            case "over_ceiling":
                coroutine = ledger.refuse_over_ceiling(team_limits, charge_of(operation.cost))
                return Expected(one_iteration_later(coroutine), None, partial(self._check_buffered, operation.cost))
            case _:
                check = partial(self._check_buffered, Cost("cancelled"), waiting=(where, admission))
                return Expected(one_iteration_later(ledger.admit(team_limits)), None, check)

    def _expect_settlement(
        self, where: int, operation: Operation, admission: Admission, admitted: Admitted
    ) -> Expected:
        process, ledger = self._processes[where], self._harness.gateways[where].ledger
        if operation.kind == "refund":
            cost = operation.cost if operation.cost.outcome == "over-ceiling" else Cost("upstream-busy")
            refund = ledger.refund(admitted, charge_of(cost), Problem(Code(cost.outcome), "", other_status=200))
            if process.ledger_down:
                process.buffer(admission, None)
                return Expected(refund, None, check_unbooked)
            verdict = self._model_ledger.refund(admission.policy, entry_of(admission), cost)
            return Expected(refund, verdict, check, admission.policy)
        if operation.kind == "release":
            if process.ledger_down:
                process.buffer(admission, None)
            else:
                self._model_ledger.release(entry_of(admission))
            return Expected(ledger.release(admitted), None, check_nothing)
        settled = ledger.settle(admitted, charge_of(operation.cost))
        if process.ledger_down:
            process.buffer(admission, operation.cost)
            return Expected(settled, None, partial(self._check_buffered, operation.cost))
        return Expected(
            settled,
            self._model_ledger.settle(admission.policy, entry_of(admission), operation.cost),
            check,
            admission.policy,
        )

    def _pick(self, where: int, pick: int, *, in_outage: bool) -> tuple[Admission, Admitted] | None:
        """Removes and returns one admitted request, None if there is none."""
        found = [one for one in self._waiting[where] if (one[0].entry is None) == in_outage]
        if not found:
            return None
        picked = found[pick % len(found)]
        self._waiting[where].remove(picked)
        return picked

    def _check_admission(self, where: int, admission: Admission, verdict: Verdict | None, answer: Answer) -> None:
        check(verdict, answer)
        if isinstance(answer, Admitted):
            self._waiting[where].append((admission, answer))

    def _check_buffered(
        self, cost: Cost, _: Verdict | None, answer: Answer, waiting: tuple[int, Admission] | None = None
    ) -> None:
        assert isinstance(answer, Admitted)
        assert (answer.quota_state, answer.booked) == (None, False)
        assert answer.model == ("-" if cost.booked.micro is None else "other")
        if waiting is not None:
            where, admission = waiting
            self._waiting[where].append((admission, answer))

    def _flush(self, where: int) -> None:
        process = self._processes[where]
        if process.has_buffered and not process.ledger_down:
            self._harness.gateways[where].flush(process)
            process.flush()
            process.sync_clock()


def test_the_ledger_behaves_like_its_model(harness: Harness) -> None:
    profile = machine_settings("LEDGER_EXAMPLES", 25)
    machine: Any = partial(LedgerMachine, harness)
    run_state_machine_as_test(machine, settings=profile)


def test_the_first_of_two_settlements_takes_the_only_admitted_request(harness: Harness) -> None:
    """The second settlement becomes an admission, which the ledger merges with the one before both."""
    machine, cost = LedgerMachine(harness), Cost("hit", 5, "Flux")
    warning = Draft("requests", "day", refuses=False, max_amount=9, is_relative=False)
    # with a warning quota, each request reports the state at its own decision
    machine.limits_change("design", [warning])
    machine.run_operations(0, [Operation("admit", "design", cost, 0)])
    machine.run_operations(
        0,
        [
            Operation("admit", "film", cost, 0),
            Operation("settle", "design", cost, 0),
            Operation("settle", "film", cost, 0),
        ],
    )
    machine.usage_and_counters_match_the_model()
    used = {name: amounts for name, (amounts, _) in harness.keys().items() if ":u:" in name}
    assert used == {
        "ep1:{acme}:u:2031-10-25:design": {"Flux:hit:requests": 1, "Flux:hit:credits": 5},
        "ep1:{acme}:u:2031-10-25:film": {"-:cancelled:requests": 2},
    }


def test_a_new_model_replaces_one_unused_for_30_days(harness: Harness) -> None:
    """The limit is two names, one for each team."""
    machine = LedgerMachine(harness)

    def charge(team: str, *models: str) -> None:
        machine.run_operations(0, [Operation("charge", team, Cost("hit", 5, model), 0) for model in models])
        machine.names_match_the_model()

    charge("design", "Flux", "Flux dev.1")
    charge("film", "style", "Flux dev.1")
    assert set(machine._model_ledger.names) == {"Flux", "style"}
    machine.time_passes(30 * 86_400 * MILLION)
    charge("film", "Flux")
    charge("design", "Flux dev.1")
    machine.time_passes(86_400 * MILLION)
    charge("design", "Flux dev.1")
    assert set(machine._model_ledger.names) == {"Flux"}
    charge("film", "Flux dev.1")
    assert set(machine._model_ledger.names) == {"Flux", "Flux dev.1"}
