"""The ledger's rate limit, compared with its definition, on Valkey and on Redis 7.0."""

from collections.abc import Callable, Coroutine, Sequence
from fractions import Fraction
from itertools import count
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger_harness import START_US, Answer, Harness
from ledger_model import ModelLedger, Process, TeamPolicy
from ledger_operations import limits_of
from proxy.problems import Outcome
from proxy.quota.ledger import Admitted
from proxy.quota.quotas import Charge, TeamLimits

pytestmark = pytest.mark.usefixtures("coverage_paused")


def conforms(admitted: Sequence[int], at_us: int, interval_us: int, burst: int) -> bool:
    """Returns whether one more request now keeps every period of time within a burst plus one per interval."""
    return all(
        len(admitted) - number + 1 <= burst + Fraction(at_us - since_us, interval_us)
        for number, since_us in enumerate(admitted)
    )


def test_a_rate_admits_exactly_the_conforming_requests(harness: Harness) -> None:
    """Checks the definition over all periods of time, independent of the algorithm."""
    harness.reset()
    gateway, process, serial = harness.gateways[0], Process(ModelLedger(START_US, 0)), count()
    ledger = gateway.ledger
    calls: dict[str, Callable[[TeamLimits], Coroutine[Any, Any, Answer]]] = {
        "charge": lambda team_limits: ledger.charge(team_limits, Charge(Outcome.HIT, 1)),
        "admit": ledger.admit,
        "peek": lambda team_limits: ledger.peek(team_limits, None),
        "record_uncached": lambda team_limits: ledger.record_uncached(team_limits, Outcome.NOT_CACHED),
    }
    call_lists = st.lists(
        st.tuples(st.sampled_from(sorted(calls)), st.integers(0, 6), st.integers(-1, 1)), min_size=3, max_size=40
    )

    @hypothesis.settings(max_examples=150, derandomize=True, database=None)
    @given(st.sampled_from([20, 20_000, 333_333, 10**9]), st.integers(1, 5), call_lists)
    def compare(interval_us: int, burst: int, drawn: list[tuple[str, int, int]]) -> None:
        team_limits = limits_of(TeamPolicy(f"team-{next(serial)}", interval_us, burst, ()))
        at_us, admitted = harness.clock.us, list[int]()
        for kind, halves, more_us in drawn:
            at_us += max(0, halves * interval_us // 2 + more_us)
            harness.clock.set(at_us)
            (answer,) = gateway.run(process, [calls[kind](team_limits)])
            expected = conforms(admitted, at_us, interval_us, burst)
            assert isinstance(answer, Admitted) == expected
            if expected:
                admitted.append(at_us)

    compare()
