"""Which inferred answers are audited."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from json_values import chances
from proxy.learning import audits
from proxy.learning.audits import Audits


@given(chances, st.integers(1, 30))
def test_one_answer_in_each_block_is_audited(chance: Random, one_in: int) -> None:
    found = Audits(one_in, chance.randrange)
    blocks = [[found.is_due("scope") for _ in range(one_in)] for _ in range(5)]
    assert [sum(block) for block in blocks] == [1] * 5


def test_each_place_in_a_block_is_chosen() -> None:
    found = Audits(5)
    places = {[found.is_due("scope") for _ in range(5)].index(True) for _ in range(500)}
    assert places == set(range(5))


def test_scopes_have_blocks_of_their_own() -> None:
    found = Audits(2, lambda _: 1)
    assert [found.is_due(scope) for scope in "abab"] == [False, False, True, True]


def test_a_setting_owes_an_audit_until_its_next_answer() -> None:
    found = Audits(25)
    found.owe("one")
    found.owe("one")
    assert [found.pay("other"), found.pay("one"), found.pay("one")] == [False, True, False]


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audits, "MAX_BLOCKS", 2)
    monkeypatch.setattr(audits, "MAX_OWED", 2)
    found = Audits(25)
    for number in range(5):
        found.is_due(f"scope {number}")
        found.owe(f"setting {number}")
    assert len(found._blocks) == len(found._owed) == 2
    assert not found.pay("setting 0")
    assert found.pay("setting 4")
