"""A short replay of the bench: learned prices against price functions, in simulated time on a real store."""

import pytest
import redis

from bench.learning_prices import SCENARIOS
from bench.learning_replay import Plan, Result, replay


def replayed(url: str, name: str, **plan: float) -> Result:
    with redis.Redis.from_url(url) as client:
        return replay(client, SCENARIOS[name], Plan(learn_from=40, **plan), seed=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("processes", [1, 3])
def test_prices_that_do_not_change_are_inferred_without_error(valkey_url: str, processes: int) -> None:
    found = replayed(valkey_url, "static", questions=1000, processes=processes)
    assert found.wrong == 0
    assert found.late_answered >= 0.95 * found.late_questions
    assert found.audits > 20


@pytest.mark.parametrize("name", ["prompts longer than 200 cost more", "a second team's short prompts"])
def test_where_a_left_out_member_decides_nothing_is_inferred(valkey_url: str, name: str) -> None:
    found = replayed(valkey_url, name, questions=400)
    assert found.wrong == found.answered == 0
    assert found.contradictions > 0


def test_a_list_that_moves_is_no_contradiction(valkey_url: str) -> None:
    found = replayed(valkey_url, "the list x 1.1", questions=700, change_at=0.6)
    assert (found.list_moves, found.contradictions, found.after_doubt) == (1, 0, 0)
    assert 0 < found.wrong < 75


def test_a_member_that_begins_to_count_is_noticed(valkey_url: str) -> None:
    found = replayed(valkey_url, "odd seeds begin to cost", questions=700, change_at=0.6)
    assert found.contradictions > 0
    assert found.after_doubt == 0
    assert 0 < found.wrong < 75
