"""A circuit from closed to open and back, a pause beside it, and both against a naive model that forgets nothing."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from examples import examples
from proxy.upstream.circuit_breaker import (
    MAX_ANSWERS,
    MAX_PAUSE_S,
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
    """An answer for each letter: `f` for a failure, `.` for any other."""
    for outcome in outcomes:
        circuit.note(now, failed=outcome == "f")


def tell(circuit: CircuitBreaker, now: float, *, failed: bool, probe_generation: int) -> None:
    """An answer to a question of that era, from whoever has asked it."""
    if circuit.probe_generation == probe_generation:
        circuit.note(now, failed=failed)


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


def test_a_new_circuit_is_closed() -> None:
    circuit = CircuitBreaker()
    assert is_closed(circuit)
    assert [ask(circuit, now) for now in (0.0, 0.0, T)] == [Decision.ASK] * 3
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
def test_half_of_enough_answers_open_it(outcomes: str, is_open: bool) -> None:  # noqa: FBT001 -- a row of a table
    circuit = CircuitBreaker()
    answer(circuit, T, outcomes[:-1])
    assert is_closed(circuit)
    assert ask(circuit, T) is Decision.ASK
    answer(circuit, T, outcomes[-1])
    assert circuit.is_open is is_open
    assert (ask(circuit, T) is Decision.OPEN) is is_open


@pytest.mark.parametrize(("later_s", "is_open"), [(WINDOW_S - 0.5, True), (WINDOW_S, True), (WINDOW_S + 0.001, False)])
def test_failures_count_as_long_as_the_window(later_s: float, is_open: bool) -> None:  # noqa: FBT001 -- a row of a table
    circuit = CircuitBreaker()
    answer(circuit, T, "f" * (MIN_ANSWERS - 1))
    answer(circuit, T + later_s, "f")
    assert circuit.is_open is is_open


def test_the_window_slides() -> None:
    """Old failures leave it one by one: at this pace nine are in it, however long it goes on."""
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


def test_of_many_answers_the_newest_count() -> None:
    circuit = CircuitBreaker()
    answer(circuit, T, "." * 3 * MAX_ANSWERS)
    answer(circuit, T, "f" * (MAX_ANSWERS // 2 - 1))
    assert is_closed(circuit)
    answer(circuit, T, "f")
    assert circuit.is_open


def test_a_forgotten_failure_is_forgotten() -> None:
    circuit = CircuitBreaker()
    answer(circuit, T, "." * 10 + "f" * 9 + "." * (MAX_ANSWERS - 19))
    answer(circuit, T, "f" * (MAX_ANSWERS // 2 - 1))
    assert is_closed(circuit)
    answer(circuit, T, "f")
    assert circuit.is_open


# --- open, and half-open ----------------------------------------------------------------------------------------


def test_an_open_circuit_lets_nothing_through_for_a_while() -> None:
    circuit = opened()
    assert [ask(circuit, T + later_s) for later_s in (0, 1, OPEN_S - 0.001)] == [Decision.OPEN] * 3
    assert circuit.wait_s(T) == OPEN_S
    assert circuit.wait_s(T + 4) == OPEN_S - 4
    assert circuit.wait_s(T + OPEN_S + 1) == 0


def test_then_one_probe_goes_through() -> None:
    circuit = opened()
    now = T + OPEN_S
    assert [ask(circuit, now) for _ in range(3)] == [Decision.PROBE, Decision.OPEN, Decision.OPEN]
    assert circuit.is_open
    assert circuit.wait_s(now) == PROBE_S
    assert circuit.wait_s(now + 0.5) == PROBE_S - 0.5


def test_a_probe_that_succeeds_closes_it() -> None:
    circuit = probing()
    now = T + OPEN_S + 0.5
    circuit.note(now, failed=False)
    assert is_closed(circuit)
    assert circuit.wait_s(now) == 0
    assert [ask(circuit, now) for _ in range(3)] == [Decision.ASK] * 3


def test_a_closed_circuit_starts_counting_anew() -> None:
    circuit = probing()
    now = T + OPEN_S
    answer(circuit, now, "." + "f" * (MIN_ANSWERS - 1))
    assert is_closed(circuit)  # the ten that opened it are forgotten
    answer(circuit, now, "f")
    assert circuit.is_open
    assert ask(circuit, now + OPEN_S - 0.001) is Decision.OPEN
    assert ask(circuit, now + OPEN_S) is Decision.PROBE


def test_a_probe_that_fails_opens_it_again() -> None:
    circuit = probing()
    now = T + OPEN_S + 0.5
    circuit.note(now, failed=True)
    assert circuit.is_open
    assert circuit.wait_s(now) == OPEN_S
    assert ask(circuit, now + OPEN_S - 0.001) is Decision.OPEN
    assert [ask(circuit, now + OPEN_S) for _ in range(2)] == [Decision.PROBE, Decision.OPEN]


def test_a_probe_whose_answer_never_comes_is_followed_by_another() -> None:
    circuit = probing()
    now = T + OPEN_S
    assert ask(circuit, now + PROBE_S - 0.001) is Decision.OPEN
    assert [ask(circuit, now + PROBE_S) for _ in range(2)] == [Decision.PROBE, Decision.OPEN]
    assert circuit.wait_s(now + PROBE_S) == PROBE_S
    circuit.note(now + PROBE_S, failed=False)
    assert is_closed(circuit)


def test_a_probes_answer_counts_when_it_is_late() -> None:
    circuit = probing()
    circuit.note(T + OPEN_S + PROBE_S + 10, failed=False)
    assert is_closed(circuit)


@pytest.mark.parametrize("failed", [True, False])
def test_the_answer_of_a_probe_that_was_given_up_is_not_the_next_ones(failed: bool) -> None:  # noqa: FBT001 -- parametrized
    circuit = probing()
    first, now = circuit.probe_generation, T + OPEN_S + PROBE_S
    assert ask(circuit, now) is Decision.PROBE
    tell(circuit, now + 0.5, failed=failed, probe_generation=first)
    assert circuit.is_open
    assert ask(circuit, now + 0.5) is Decision.OPEN  # the second is still awaited
    tell(circuit, now + 1, failed=False, probe_generation=first + 1)
    assert is_closed(circuit)


@pytest.mark.parametrize("failed", [True, False])
def test_what_was_asked_before_it_opened_changes_nothing(failed: bool) -> None:  # noqa: FBT001 -- parametrized
    circuit = opened()
    before = circuit.probe_generation
    tell(circuit, T + 1, failed=failed, probe_generation=before)
    assert circuit.is_open
    assert circuit.wait_s(T + 1) == OPEN_S - 1
    assert [ask(circuit, T + OPEN_S) for _ in range(2)] == [Decision.PROBE, Decision.OPEN]
    tell(circuit, T + OPEN_S + 0.25, failed=failed, probe_generation=before)  # nor while a probe is under way
    assert circuit.is_open
    assert circuit.wait_s(T + OPEN_S) == PROBE_S
    tell(circuit, T + OPEN_S + 0.5, failed=False, probe_generation=circuit.probe_generation)
    assert is_closed(circuit)
    for _ in range(2 * MIN_ANSWERS):  # nor when it has closed
        tell(circuit, T + OPEN_S + 1, failed=True, probe_generation=before)
    assert is_closed(circuit)


def test_an_era_begins_with_each_probe() -> None:
    circuit = opened()
    eras = [circuit.probe_generation]
    for now in (T + OPEN_S, T + OPEN_S + PROBE_S):
        assert [ask(circuit, now) for _ in range(2)] == [Decision.PROBE, Decision.OPEN]
        eras.append(circuit.probe_generation)
    circuit.note(T + OPEN_S + PROBE_S, failed=False)
    assert ask(circuit, T + OPEN_S + PROBE_S) is Decision.ASK
    assert [*eras, circuit.probe_generation] == [0, 1, 2, 2]


def test_each_transition_says_why_and_how_long_it_is_or_was_open() -> None:
    circuit = CircuitBreaker()
    answer(circuit, T, "..." + "f" * 6)
    assert circuit.note(T, failed=True) == Transition(
        is_open=True, seconds=OPEN_S, why="7 of 10 answers within 10 s were failures"
    )
    assert circuit.note(T + 1, failed=True) is None
    for probed_at in (T + OPEN_S, T + 2 * OPEN_S):
        assert ask(circuit, probed_at) is Decision.PROBE
        assert circuit.open_s(probed_at) == probed_at - T
        assert circuit.note(probed_at, failed=True) == Transition(is_open=True, seconds=OPEN_S, why="the probe failed")
    assert ask(circuit, T + 20) is Decision.PROBE
    assert circuit.note(T + 20.5, failed=False) == Transition(is_open=False, seconds=20.5, why="the probe was answered")
    assert circuit.note(T + 21, failed=False) is None


# --- a pause ----------------------------------------------------------------------------------------------------


def test_a_pause_is_kept_to_the_end() -> None:
    circuit = CircuitBreaker()
    circuit.pause(T, 7)
    assert is_closed(circuit)
    assert [ask(circuit, T + later_s) for later_s in (0, 6.999, 7)] == [Decision.PAUSED, Decision.PAUSED, Decision.ASK]
    assert [circuit.wait_s(T + later_s) for later_s in (0, 5, 7, 8)] == [7, 2, 0, 0]


def test_the_longest_pause_wins() -> None:
    circuit = CircuitBreaker()
    for seconds in (3, 7, 0, 5):
        circuit.pause(T, seconds)
    circuit.pause(T + 1, 5)
    assert circuit.wait_s(T) == 7


@pytest.mark.parametrize("seconds", [MAX_PAUSE_S, MAX_PAUSE_S + 1, 2**31, 10**64])
def test_a_pause_is_an_hour_at_the_most(seconds: float) -> None:
    circuit = CircuitBreaker()
    circuit.pause(T, seconds)
    assert circuit.wait_s(T) == MAX_PAUSE_S
    assert ask(circuit, T + MAX_PAUSE_S) is Decision.ASK


def test_no_pause_is_none() -> None:
    circuit = CircuitBreaker()
    circuit.pause(T, 0)
    assert ask(circuit, T) is Decision.ASK


@pytest.mark.parametrize(("pause_s", "gate"), [(OPEN_S - 1, Decision.OPEN), (OPEN_S + 2, Decision.PAUSED)])
def test_a_pause_and_an_open_circuit_are_both_waited_for(pause_s: float, gate: Decision) -> None:
    circuit = opened()
    circuit.pause(T, pause_s)
    assert ask(circuit, T) is Decision.PAUSED
    longest = max(pause_s, OPEN_S)
    assert circuit.wait_s(T) == longest
    assert ask(circuit, T + longest - 0.5) is gate
    assert [ask(circuit, T + longest) for _ in range(2)] == [Decision.PROBE, Decision.OPEN]


def test_nothing_probes_during_a_pause() -> None:
    circuit = probing()
    now = T + OPEN_S
    circuit.pause(now, PROBE_S + 1)
    assert ask(circuit, now + PROBE_S) is Decision.PAUSED
    assert circuit.wait_s(now) == PROBE_S + 1
    assert ask(circuit, now + PROBE_S + 1) is Decision.PROBE


def test_answers_count_during_a_pause() -> None:
    circuit = CircuitBreaker()
    circuit.pause(T, 60)
    answer(circuit, T, "f" * MIN_ANSWERS)
    assert circuit.is_open


# --- the model --------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """Looks through everything that ever happened. Questions are numbers, in the order in which they were asked."""

    answers: list[tuple[float, bool]] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    opened_at: float | None = None
    probe: int = -1
    probe_ends: float | None = None

    def waits_for(self, now: float) -> dict[Decision, float]:
        """What is in the way, and until when."""
        ends = {Decision.PAUSED: max(self.pauses, default=0.0)}
        if self.opened_at is not None:
            ends[Decision.OPEN] = max(self.opened_at + OPEN_S, self.probe_ends or 0)
        return {gate: end for gate, end in ends.items() if end > now}

    def admit(self, now: float, question: int) -> Decision:
        in_the_way = self.waits_for(now)
        if in_the_way:
            return min(in_the_way, key=[Decision.PAUSED, Decision.OPEN].index)
        if self.opened_at is not None:
            self.probe, self.probe_ends = question, now + PROBE_S
            return Decision.PROBE
        return Decision.ASK

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
    """Time goes in eighths of a second, which floats add up exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.circuit = CircuitBreaker()
        self.model = Model()
        self.now = T
        self.eras: list[int] = []
        self.out: list[int] = []

    @rule(eighths=st.integers(0, 12) | st.sampled_from([8 * int(s) for s in (PROBE_S, OPEN_S, WINDOW_S)]))
    def wait(self, eighths: int) -> None:
        self.now += eighths / 8

    @rule(times=st.integers(1, MIN_ANSWERS))
    def ask(self, times: int) -> None:
        for _ in range(times):
            question = len(self.eras)
            gate = self.circuit.admit(self.now, probe_s=PROBE_S)
            assert gate is self.model.admit(self.now, question)
            self.eras.append(self.circuit.probe_generation)
            if gate in (Decision.ASK, Decision.PROBE):
                self.out.append(question)

    @precondition(lambda self: self.out)
    @rule(outcomes=st.lists(st.sampled_from([True, True, False]), min_size=1, max_size=MIN_ANSWERS), data=st.data())
    def answer(self, outcomes: list[bool], data: st.DataObject) -> None:
        for failed in outcomes[: len(self.out)]:
            question = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
            tell(self.circuit, self.now, failed=failed, probe_generation=self.eras[question])
            self.model.note(self.now, question, failed=failed)

    @precondition(lambda self: self.out)
    @rule(failed=st.booleans())
    def answer_the_newest(self, failed: bool) -> None:  # noqa: FBT001 -- hypothesis passes it by name
        question = self.out.pop()
        tell(self.circuit, self.now, failed=failed, probe_generation=self.eras[question])
        self.model.note(self.now, question, failed=failed)

    @rule(seconds=st.integers(0, 8) | st.just(5000))
    def pause(self, seconds: int) -> None:
        self.circuit.pause(self.now, seconds)
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
