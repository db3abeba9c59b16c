"""The circuit breaker: closed, open, half-open and back-off, also against a naive model that forgets nothing."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from examples import examples
from proxy.upstream.circuit_breaker import (
    MAX_ANSWERS,
    MAX_BACK_OFF_S,
    MIN_ANSWERS,
    OPEN_S,
    WINDOW_S,
    CircuitBreaker,
    Decision,
    Transition,
)

T = 1000.0
PROBE_S = 2.0


def ask(circuit: CircuitBreaker, now: float) -> Decision:
    return circuit.admit(now, probe_s=PROBE_S)


def is_closed(circuit: CircuitBreaker) -> bool:
    return not circuit.is_open


def answer(circuit: CircuitBreaker, now: float, outcomes: str) -> None:
    """Records a result for each letter: `f` is a failure, `.` an answer."""
    for outcome in outcomes:
        circuit.record(now, failed=outcome == "f")


def record(circuit: CircuitBreaker, now: float, *, failed: bool, probe_generation: int) -> None:
    """Records the result of a request of that probe generation, as the client does."""
    if circuit.probe_generation == probe_generation:
        circuit.record(now, failed=failed)


def opened(at: float = T) -> CircuitBreaker:
    circuit = CircuitBreaker()
    answer(circuit, at, "f" * MIN_ANSWERS)
    assert circuit.is_open
    return circuit


def probing(at: float = T + OPEN_S) -> CircuitBreaker:
    circuit = opened(at - OPEN_S)
    assert ask(circuit, at) is Decision.PROBE
    return circuit


# --- closed -----------------------------------------------------------------------------------------------------


def test_a_new_breaker_is_closed() -> None:
    circuit = CircuitBreaker()
    assert is_closed(circuit)
    assert [ask(circuit, now) for now in (0.0, 0.0, T)] == [Decision.ADMIT] * 3
    assert circuit.wait_s(0.0) == circuit.wait_s(T) == 0


@pytest.mark.parametrize(
    ("outcomes", "is_open"),
    [
        ("f" * (MIN_ANSWERS - 1), False),
        ("f" * MIN_ANSWERS, True),
        ("f" * 5 + "." * 4, False),
        ("f" * 5 + "." * 5, True),  # exactly half; and what completes the ten need not be a failure
        ("." * 5 + "f" * 5, True),
        ("." * 6 + "f" * 5, False),
        ("." * 6 + "f" * 6, True),
        ("f." * 4 + "..f", False),
        ("." * 100 + "f" * 99, False),
        ("." * 100 + "f" * 100, True),
    ],
)
def test_enough_results_open_it_if_half_of_them_are_failures(outcomes: str, is_open: bool) -> None:  # noqa: FBT001 -- a row of a table
    circuit = CircuitBreaker()
    answer(circuit, T, outcomes[:-1])
    assert is_closed(circuit)
    assert ask(circuit, T) is Decision.ADMIT
    answer(circuit, T, outcomes[-1])
    assert circuit.is_open is is_open
    assert (ask(circuit, T) is Decision.OPEN) is is_open


@pytest.mark.parametrize(("later_s", "is_open"), [(WINDOW_S - 0.5, True), (WINDOW_S, True), (WINDOW_S + 0.001, False)])
def test_failures_count_within_the_window_only(later_s: float, is_open: bool) -> None:  # noqa: FBT001 -- a row of a table
    circuit = CircuitBreaker()
    answer(circuit, T, "f" * (MIN_ANSWERS - 1))
    answer(circuit, T + later_s, "f")
    assert circuit.is_open is is_open


def test_the_window_slides() -> None:
    """Old failures leave it one by one: at this rate it never has more than nine."""
    circuit = CircuitBreaker()
    for step in range(100):
        answer(circuit, T + 1.25 * step, "f")
    assert is_closed(circuit)
    answer(circuit, T + 1.25 * 99, "f")
    assert circuit.is_open


def test_good_answers_leave_the_window_too() -> None:
    circuit = CircuitBreaker()
    answer(circuit, T, "." * 50)
    answer(circuit, T + 5, "f" * 20)
    assert is_closed(circuit)
    answer(circuit, T + WINDOW_S + 1, "f")
    assert circuit.is_open


def test_only_the_latest_results_are_remembered() -> None:
    circuit = CircuitBreaker()
    answer(circuit, T, "." * 3 * MAX_ANSWERS)
    answer(circuit, T, "f" * (MAX_ANSWERS // 2 - 1))
    assert is_closed(circuit)
    answer(circuit, T, "f")
    assert circuit.is_open


def test_a_failure_that_is_no_longer_remembered_does_not_count() -> None:
    circuit = CircuitBreaker()
    answer(circuit, T, "." * 10 + "f" * 9 + "." * (MAX_ANSWERS - 19))
    answer(circuit, T, "f" * (MAX_ANSWERS // 2 - 1))
    assert is_closed(circuit)
    answer(circuit, T, "f")
    assert circuit.is_open


# --- open, and half-open ----------------------------------------------------------------------------------------


def test_an_open_breaker_admits_nothing() -> None:
    circuit = opened()
    assert [ask(circuit, T + later_s) for later_s in (0, 1, OPEN_S - 0.001)] == [Decision.OPEN] * 3
    assert circuit.wait_s(T) == OPEN_S
    assert circuit.wait_s(T + 4) == OPEN_S - 4
    assert circuit.wait_s(T + OPEN_S + 1) == 0


def test_a_half_open_breaker_admits_one_probe() -> None:
    circuit = opened()
    now = T + OPEN_S
    assert [ask(circuit, now) for _ in range(3)] == [Decision.PROBE, Decision.OPEN, Decision.OPEN]
    assert circuit.is_open
    assert circuit.wait_s(now) == PROBE_S
    assert circuit.wait_s(now + 0.5) == PROBE_S - 0.5


def test_a_successful_probe_closes_it() -> None:
    circuit = probing()
    now = T + OPEN_S + 0.5
    circuit.record(now, failed=False)
    assert is_closed(circuit)
    assert circuit.wait_s(now) == 0
    assert [ask(circuit, now) for _ in range(3)] == [Decision.ADMIT] * 3


def test_a_breaker_that_has_closed_counts_from_zero() -> None:
    circuit = probing()
    now = T + OPEN_S
    answer(circuit, now, "." + "f" * (MIN_ANSWERS - 1))
    assert is_closed(circuit)  # the ten that opened it are forgotten
    answer(circuit, now, "f")
    assert circuit.is_open
    assert ask(circuit, now + OPEN_S - 0.001) is Decision.OPEN
    assert ask(circuit, now + OPEN_S) is Decision.PROBE


def test_a_failed_probe_opens_it_again() -> None:
    circuit = probing()
    now = T + OPEN_S + 0.5
    circuit.record(now, failed=True)
    assert circuit.is_open
    assert circuit.wait_s(now) == OPEN_S
    assert ask(circuit, now + OPEN_S - 0.001) is Decision.OPEN
    assert [ask(circuit, now + OPEN_S) for _ in range(2)] == [Decision.PROBE, Decision.OPEN]


def test_a_probe_without_a_result_is_followed_by_another() -> None:
    circuit = probing()
    now = T + OPEN_S
    assert ask(circuit, now + PROBE_S - 0.001) is Decision.OPEN
    assert [ask(circuit, now + PROBE_S) for _ in range(2)] == [Decision.PROBE, Decision.OPEN]
    assert circuit.wait_s(now + PROBE_S) == PROBE_S
    circuit.record(now + PROBE_S, failed=False)
    assert is_closed(circuit)


def test_a_late_result_of_a_probe_counts() -> None:
    circuit = probing()
    circuit.record(T + OPEN_S + PROBE_S + 10, failed=False)
    assert is_closed(circuit)


@pytest.mark.parametrize("failed", [True, False])
def test_the_result_of_an_abandoned_probe_does_not_count_for_the_next_one(failed: bool) -> None:  # noqa: FBT001 -- parametrized
    circuit = probing()
    first, now = circuit.probe_generation, T + OPEN_S + PROBE_S
    assert ask(circuit, now) is Decision.PROBE
    record(circuit, now + 0.5, failed=failed, probe_generation=first)
    assert circuit.is_open
    assert ask(circuit, now + 0.5) is Decision.OPEN  # the second is still awaited
    record(circuit, now + 1, failed=False, probe_generation=first + 1)
    assert is_closed(circuit)


@pytest.mark.parametrize("failed", [True, False])
def test_results_of_requests_from_before_it_opened_do_not_count(failed: bool) -> None:  # noqa: FBT001 -- parametrized
    circuit = opened()
    before = circuit.probe_generation
    record(circuit, T + 1, failed=failed, probe_generation=before)
    assert circuit.is_open
    assert circuit.wait_s(T + 1) == OPEN_S - 1
    assert [ask(circuit, T + OPEN_S) for _ in range(2)] == [Decision.PROBE, Decision.OPEN]
    record(circuit, T + OPEN_S + 0.25, failed=failed, probe_generation=before)  # nor while a probe is under way
    assert circuit.is_open
    assert circuit.wait_s(T + OPEN_S) == PROBE_S
    record(circuit, T + OPEN_S + 0.5, failed=False, probe_generation=circuit.probe_generation)
    assert is_closed(circuit)
    for _ in range(2 * MIN_ANSWERS):  # nor when it has closed
        record(circuit, T + OPEN_S + 1, failed=True, probe_generation=before)
    assert is_closed(circuit)


def test_each_probe_starts_a_new_generation() -> None:
    circuit = opened()
    generations = [circuit.probe_generation]
    for now in (T + OPEN_S, T + OPEN_S + PROBE_S):
        assert [ask(circuit, now) for _ in range(2)] == [Decision.PROBE, Decision.OPEN]
        generations.append(circuit.probe_generation)
    circuit.record(T + OPEN_S + PROBE_S, failed=False)
    assert ask(circuit, T + OPEN_S + PROBE_S) is Decision.ADMIT
    assert [*generations, circuit.probe_generation] == [0, 1, 2, 2]


def test_each_transition_has_its_reason_and_how_long_the_breaker_is_or_was_open() -> None:
    circuit = CircuitBreaker()
    answer(circuit, T, "..." + "f" * 6)
    assert circuit.record(T, failed=True) == Transition(
        is_open=True, seconds=OPEN_S, why="7 of 10 answers within 10 s were failures"
    )
    assert circuit.record(T + 1, failed=True) is None
    for probed_at in (T + OPEN_S, T + 2 * OPEN_S):
        assert ask(circuit, probed_at) is Decision.PROBE
        assert circuit.open_s(probed_at) == probed_at - T
        assert circuit.record(probed_at, failed=True) == Transition(
            is_open=True, seconds=OPEN_S, why="the probe failed"
        )
    assert ask(circuit, T + 20) is Decision.PROBE
    assert circuit.record(T + 20.5, failed=False) == Transition(
        is_open=False, seconds=20.5, why="the probe was answered"
    )
    assert circuit.record(T + 21, failed=False) is None


# --- a pause ----------------------------------------------------------------------------------------------------


def test_a_back_off_lasts_to_its_end() -> None:
    circuit = CircuitBreaker()
    circuit.back_off(T, 7)
    assert is_closed(circuit)
    assert [ask(circuit, T + later_s) for later_s in (0, 6.999, 7)] == [
        Decision.BACK_OFF,
        Decision.BACK_OFF,
        Decision.ADMIT,
    ]
    assert [circuit.wait_s(T + later_s) for later_s in (0, 5, 7, 8)] == [7, 2, 0, 0]


def test_the_longest_back_off_wins() -> None:
    circuit = CircuitBreaker()
    for seconds in (3, 7, 0, 5):
        circuit.back_off(T, seconds)
    circuit.back_off(T + 1, 5)
    assert circuit.wait_s(T) == 7


@pytest.mark.parametrize("seconds", [MAX_BACK_OFF_S, MAX_BACK_OFF_S + 1, 2**31, 10**64])
def test_a_back_off_lasts_at_most_an_hour(seconds: float) -> None:
    circuit = CircuitBreaker()
    circuit.back_off(T, seconds)
    assert circuit.wait_s(T) == MAX_BACK_OFF_S
    assert ask(circuit, T + MAX_BACK_OFF_S) is Decision.ADMIT


def test_a_back_off_of_zero_seconds_does_nothing() -> None:
    circuit = CircuitBreaker()
    circuit.back_off(T, 0)
    assert ask(circuit, T) is Decision.ADMIT


@pytest.mark.parametrize(("pause_s", "gate"), [(OPEN_S - 1, Decision.OPEN), (OPEN_S + 2, Decision.BACK_OFF)])
def test_an_open_breaker_and_a_back_off_must_both_end(pause_s: float, gate: Decision) -> None:
    circuit = opened()
    circuit.back_off(T, pause_s)
    assert ask(circuit, T) is Decision.BACK_OFF
    longest = max(pause_s, OPEN_S)
    assert circuit.wait_s(T) == longest
    assert ask(circuit, T + longest - 0.5) is gate
    assert [ask(circuit, T + longest) for _ in range(2)] == [Decision.PROBE, Decision.OPEN]


def test_no_probe_is_admitted_during_a_back_off() -> None:
    circuit = probing()
    now = T + OPEN_S
    circuit.back_off(now, PROBE_S + 1)
    assert ask(circuit, now + PROBE_S) is Decision.BACK_OFF
    assert circuit.wait_s(now) == PROBE_S + 1
    assert ask(circuit, now + PROBE_S + 1) is Decision.PROBE


def test_results_count_during_a_back_off() -> None:
    circuit = CircuitBreaker()
    circuit.back_off(T, 60)
    answer(circuit, T, "f" * MIN_ANSWERS)
    assert circuit.is_open


# --- the model --------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """Computes each answer from the whole history. Requests are numbered in the order in which they were made."""

    answers: list[tuple[float, bool]] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    opened_at: float | None = None
    probe: int = -1
    probe_ends: float | None = None

    def waits_for(self, now: float) -> dict[Decision, float]:
        """The reasons not to admit a request, and when each of them ends."""
        ends = {Decision.BACK_OFF: max(self.pauses, default=0.0)}
        if self.opened_at is not None:
            ends[Decision.OPEN] = max(self.opened_at + OPEN_S, self.probe_ends or 0)
        return {gate: end for gate, end in ends.items() if end > now}

    def admit(self, now: float, question: int) -> Decision:
        in_the_way = self.waits_for(now)
        if in_the_way:
            return min(in_the_way, key=[Decision.BACK_OFF, Decision.OPEN].index)
        if self.opened_at is not None:
            self.probe, self.probe_ends = question, now + PROBE_S
            return Decision.PROBE
        return Decision.ADMIT

    def note(self, now: float, question: int, *, failed: bool) -> None:
        if question < self.probe:
            return
        if self.opened_at is None:
            self.answers.append((now, failed))
            recent = [bad for at, bad in self.answers if now - at <= WINDOW_S][-MAX_ANSWERS:]
            if len(recent) >= MIN_ANSWERS and 2 * sum(recent) >= len(recent):
                self.opened_at = now
        elif question == self.probe and self.probe_ends is not None:
            self.probe_ends = None
            self.opened_at = now if failed else None
        if self.opened_at == now:
            self.answers = []


class CircuitMachine(RuleBasedStateMachine):
    """Time advances in eighths of a second, which floats add exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.circuit = CircuitBreaker()
        self.model = Model()
        self.now = T
        self.generations: list[int] = []
        self.out: list[int] = []

    @rule(eighths=st.integers(0, 12) | st.sampled_from([8 * int(s) for s in (PROBE_S, OPEN_S, WINDOW_S)]))
    def wait(self, eighths: int) -> None:
        self.now += eighths / 8

    @rule(times=st.integers(1, MIN_ANSWERS))
    def ask(self, times: int) -> None:
        for _ in range(times):
            question = len(self.generations)
            gate = self.circuit.admit(self.now, probe_s=PROBE_S)
            assert gate is self.model.admit(self.now, question)
            self.generations.append(self.circuit.probe_generation)
            if gate in (Decision.ADMIT, Decision.PROBE):
                self.out.append(question)

    @precondition(lambda self: self.out)
    @rule(outcomes=st.lists(st.sampled_from([True, True, False]), min_size=1, max_size=MIN_ANSWERS), data=st.data())
    def answer(self, outcomes: list[bool], data: st.DataObject) -> None:
        for failed in outcomes[: len(self.out)]:
            question = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
            record(self.circuit, self.now, failed=failed, probe_generation=self.generations[question])
            self.model.note(self.now, question, failed=failed)

    @precondition(lambda self: self.out)
    @rule(failed=st.booleans())
    def answer_the_newest(self, failed: bool) -> None:  # noqa: FBT001 -- hypothesis passes it by name
        question = self.out.pop()
        record(self.circuit, self.now, failed=failed, probe_generation=self.generations[question])
        self.model.note(self.now, question, failed=failed)

    @rule(seconds=st.integers(0, 8) | st.just(5000))
    def pause(self, seconds: int) -> None:
        self.circuit.back_off(self.now, seconds)
        self.model.pauses.append(self.now + min(seconds, 3600))

    @precondition(lambda self: self.model.pauses and max(self.model.pauses) > self.now + 60)
    @rule()
    def wait_for_the_end_of_a_long_pause(self) -> None:
        self.now = max(self.model.pauses)

    @invariant()
    def is_the_models(self) -> None:
        assert self.circuit.is_open == (self.model.opened_at is not None)
        assert (
            self.circuit.wait_s(self.now) == max(self.model.waits_for(self.now).values(), default=self.now) - self.now
        )


TestCircuit = CircuitMachine.TestCase
TestCircuit.settings = settings(examples(2), stateful_step_count=50)
