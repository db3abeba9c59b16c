"""The backlog: each debit is flushed exactly once, in batches that keep their name, and memory is limited."""

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.problems import Outcome
from proxy.quota.backlog import Backlog, BufferedDebit, FlushBatch
from proxy.quota.counters import CounterSet
from proxy.quota.ledger_script import MAX_ENTRY_MICRO
from proxy.quota.quotas import Charge
from proxy.quota.windows import Window

COUNTER_SETS = [CounterSet({}, Window(0, 60), {}) for _ in range(3)]
TODAY, TOMORROW, _ = COUNTER_SETS
HIT = Charge(Outcome.HIT, 5, "Flux")
FAILED = Charge(Outcome.UPSTREAM_ERROR)


def taken(backlog: Backlog, max_rows: int = 100) -> tuple[BufferedDebit, ...]:
    """Takes the next batch and drops it."""
    batch = backlog.batch(max_rows)
    assert batch is not None
    backlog.drop(batch)
    return batch.rows


def test_debits_of_the_same_kind_are_added_up() -> None:
    backlog = Backlog(100)
    for counters, charge in [(TODAY, HIT), (TODAY, FAILED), (TODAY, HIT), (TOMORROW, HIT), (TODAY, FAILED)]:
        assert backlog.add(counters, charge, 1)
    assert backlog.requests == 5
    assert taken(backlog) == (
        BufferedDebit(TODAY, Charge(Outcome.HIT, 10, "Flux"), 2),
        BufferedDebit(TODAY, FAILED, 2),
        BufferedDebit(TOMORROW, HIT, 1),
    )
    assert not backlog
    assert backlog.batch(100) is None


def test_a_free_answer_and_an_unpriced_one_are_separate_sums() -> None:
    backlog = Backlog(100)
    free, unpriced = Charge(Outcome.MISS, 0, "Flux"), Charge(Outcome.MISS, None, "Flux")
    for charge in (free, unpriced, free):
        backlog.add(TODAY, charge, 1)
    assert taken(backlog) == (BufferedDebit(TODAY, free, 2), BufferedDebit(TODAY, unpriced, 1))


def test_time_at_upstream_is_added_up_apart_from_answers_without_it() -> None:
    backlog = Backlog(100)
    timed, untimed = Charge(Outcome.MISS, 5, "Flux", upstream_us=20), Charge(Outcome.MISS, 5, "Flux")
    for charge in (timed, untimed, timed):
        backlog.add(TODAY, charge, 1)
    both = Charge(Outcome.MISS, 10, "Flux", upstream_us=40)
    assert taken(backlog) == (BufferedDebit(TODAY, both, 2), BufferedDebit(TODAY, untimed, 1))


def test_a_request_that_is_taken_back_does_not_count_as_buffered() -> None:
    backlog = Backlog(100)
    backlog.add(TODAY, Charge(Outcome.CANCELLED), -1)
    assert backlog, "it still has to be booked"
    assert backlog.requests == 0
    backlog.add(TODAY, HIT, 1)
    assert backlog.requests == 1
    assert [debit.requests for debit in taken(backlog)] == [-1, 1]


def test_a_full_backlog_still_adds_to_existing_sums() -> None:
    backlog = Backlog(2)
    assert backlog.has_capacity()
    assert backlog.add(TODAY, HIT, 1)
    assert backlog.has_capacity()
    assert backlog.add(TOMORROW, HIT, 1)
    assert not backlog.has_capacity()
    assert not backlog.add(TODAY, FAILED, 1)
    assert backlog.add(TODAY, HIT, 1)
    assert backlog.requests == 3


def test_the_rows_of_a_batch_count_until_it_is_dropped() -> None:
    backlog = Backlog(1)
    backlog.add(TODAY, HIT, 1)
    batch = backlog.batch(1)
    assert batch is not None
    assert not backlog.add(TODAY, HIT, 1)
    backlog.drop(batch)
    assert backlog.add(TODAY, HIT, 1)


def test_a_batch_keeps_its_name_and_rows_until_it_is_dropped() -> None:
    backlog = Backlog(3)
    backlog.add(TODAY, HIT, 1)
    backlog.add(TOMORROW, HIT, 1)
    first = backlog.batch(1)
    assert first is not None
    backlog.add(TODAY, HIT, 1)
    assert backlog.batch(100) is first, "later debits are not added: the batch may be booked already"
    assert first.rows == (BufferedDebit(TODAY, HIT, 1),)
    assert backlog.requests == 3
    backlog.drop(first)
    backlog.drop(first)
    second = backlog.batch(100)
    assert second is not None
    assert second.rows == (BufferedDebit(TOMORROW, HIT, 1), BufferedDebit(TODAY, HIT, 1))
    assert second.name != first.name
    backlog.drop(first)
    assert backlog.batch(1) is second, "another batch was dropped"


def test_a_sum_that_would_be_inexact_in_lua_is_split() -> None:
    backlog, highest = Backlog(3), Charge(Outcome.HIT, 10**12, "Flux")
    for _ in range(45):
        assert backlog.add(TODAY, highest, 1)
    assert backlog.add(TODAY, FAILED, 1)
    for _ in range(45):
        assert backlog.add(TODAY, highest, 1)
    assert not backlog.add(TODAY, highest, 1), "a third sum would be one too many"
    assert backlog.requests == 91
    sums = [(debit.requests, debit.charge.credits_micro) for debit in taken(backlog)]
    assert sorted(sums, key=str) == [(1, None), (45, MAX_ENTRY_MICRO), (45, MAX_ENTRY_MICRO)]


_CHARGES = st.builds(
    Charge,
    st.sampled_from([Outcome.HIT, Outcome.CANCELLED]),
    st.none() | st.integers(0, 10**12) | st.just(10**12),
    st.sampled_from(["Flux", "-"]),
)
_DEBITS = st.tuples(st.sampled_from(COUNTER_SETS), _CHARGES, st.sampled_from([1, 1, -1]))


def amounts(counters: CounterSet, charge: Charge, requests: int) -> dict[Any, int]:
    row = counters, charge.outcome, charge.model, charge.credits_micro is None
    return {(row, "requests"): requests, (row, "credits"): charge.credits_micro or 0}


@given(st.lists(_DEBITS | st.just("book") | st.just("fail")), st.integers(1, 6), st.integers(1, 4))
def test_each_debit_is_flushed_exactly_once(steps: list[Any], max_rows: int, batch_rows: int) -> None:
    backlog = Backlog(max_rows)
    buffered: Counter[Any] = Counter()
    booked: dict[str, FlushBatch] = {}
    for step in [*steps, *["book"] * (max_rows + 1)]:
        if step == "fail":
            backlog.batch(batch_rows)
        elif step == "book":
            if (batch := backlog.batch(batch_rows)) is not None:
                assert len(batch.rows) <= batch_rows
                assert batch.name not in booked
                booked[batch.name] = batch
                backlog.drop(batch)
        elif backlog.add(*step):
            buffered.update(amounts(*step))
        assert len(backlog._sums) <= max_rows
    assert not backlog
    found: Counter[Any] = Counter()
    for row in (row for batch in booked.values() for row in batch.rows):
        found.update(amounts(row.counters, row.charge, row.requests))
    assert found == buffered
