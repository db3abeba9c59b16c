"""A ledger's rate against its definition, on Valkey and on Redis 7.0."""

from collections.abc import Callable, Coroutine, Sequence
from fractions import Fraction
from itertools import count
from typing import Any

import hypothesis
from hypothesis import given
from hypothesis import strategies as st

from ledger_acts import limits_of
from ledger_harness import START_US, Answer, Harness
from ledger_model import Books, Deal, Process
from proxy.problems import Outcome
from proxy.quota.ledger import Admitted
from proxy.quota.quotas import Charge, TeamLimits


def conforms(admitted: Sequence[int], at_us: int, interval_us: int, burst: int) -> bool:
    """Whether with one more, now, no stretch of time holds more than a burst, and one an interval."""
    return all(
        len(admitted) - number + 1 <= burst + Fraction(at_us - since_us, interval_us)
        for number, since_us in enumerate(admitted)
    )


def test_a_rate_admits_all_that_conforms_and_nothing_else(harness: Harness) -> None:
    """By its definition, over all stretches of time; nothing of an algorithm is in it."""
    harness.begin()
    gateway, process, serial = harness.gateways[0], Process(Books(START_US, 0)), count()
    ledger = gateway.ledger
    ask: dict[str, Callable[[TeamLimits], Coroutine[Any, Any, Answer]]] = {
        "charge": lambda terms: ledger.charge(terms, Charge(Outcome.HIT, 1)),
        "admit": ledger.admit,
        "peek": lambda terms: ledger.peek(terms, None),
        "record_uncached": lambda terms: ledger.record_uncached(terms, Outcome.NOT_CACHED),
    }
    asks = st.lists(
        st.tuples(st.sampled_from(sorted(ask)), st.integers(0, 6), st.integers(-1, 1)), min_size=3, max_size=40
    )

    @hypothesis.settings(max_examples=150, derandomize=True, database=None)
    @given(st.sampled_from([20, 20_000, 333_333, 10**9]), st.integers(1, 5), asks)
    def learn(interval_us: int, burst: int, asked: list[tuple[str, int, int]]) -> None:
        terms = limits_of(Deal(f"team-{next(serial)}", interval_us, burst, ()))
        at_us, admitted = harness.clock.us, list[int]()
        for kind, halves, more_us in asked:
            at_us += max(0, halves * interval_us // 2 + more_us)
            harness.clock.set(at_us)
            (answer,) = gateway.run(process, [ask[kind](terms)])
            expected = conforms(admitted, at_us, interval_us, burst)
            assert isinstance(answer, Admitted) == expected
            if expected:
                admitted.append(at_us)

    learn()
