"""Counts of inferred prices, before they are in the store."""

import pytest

from proxy.learning import counts
from proxy.learning.counts import Counts
from proxy.learning.observation import Counted

KEY, OTHER = ("default", "s1"), ("default", "s2")


def test_counts_are_taken_once() -> None:
    found = Counts()
    for counted in (Counted.ANSWERED, Counted.WRONG, Counted.ANSWERED):
        found.add(KEY, counted)
    found.add(OTHER, Counted.RIGHT)
    assert list(found.pending()) == [KEY, OTHER]
    assert found.take(KEY) == (2, 0, 1)
    assert found.take(KEY) == ()
    assert found.take(OTHER) == (0, 1, 0)


def test_counts_are_due_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(counts, "monotonic", lambda: now)
    found = Counts()
    assert not found.is_due(KEY)
    found.add(KEY, Counted.ANSWERED)
    now += 0.5
    found.add(KEY, Counted.ANSWERED)
    assert not found.is_due(KEY)
    now += 0.5
    assert found.is_due(KEY)
    found.take(KEY)
    assert not found.is_due(KEY)
