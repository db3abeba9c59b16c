"""What learners of several processes learn together, on a real store."""

from collections.abc import Iterator
from typing import Any

import pytest

from learning_fixture import ACCOUNT, TTL_S, LearningFixture, body, open_learning, set_limits
from proxy.cache.prices import Price
from proxy.learning.evidence import State
from proxy.learning.leaves import setting_id
from proxy.learning.observation import Counted, Effect, Observation
from proxy.learning.verdict import Inferred, NotInferred, Reason
from proxy.problems import StoreUnavailable


@pytest.fixture
def learning(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[LearningFixture]:
    with open_learning(valkey_url, monkeypatch) as opened:
        yield opened


def inferred(verdict: Inferred | NotInferred) -> bytes | Reason:
    return verdict.stored.price.estimated if isinstance(verdict, Inferred) else verdict.reason


def test_a_price_is_inferred_for_a_new_seed_once_there_are_enough_tests(learning: LearningFixture) -> None:
    learning.learn()
    scope = learning.scope()
    assert (scope.state, scope.left_out, scope.counting) == (State.ANSWERING, ("0.seed",), ("0.model", "0.quality"))
    assert scope.asked == 62
    assert 10 <= scope.tests <= 50
    assert inferred(learning.look_up(learning.flux(seed=1500), process=1)) == b"5"
    assert inferred(learning.look_up(learning.flux(seed=5000))) == Reason.OUTSIDE
    assert inferred(learning.look_up(learning.flux(seed=-1))) == Reason.NEW_SETTING
    assert inferred(learning.look_up(learning.flux(seed=1500, quality="Regular"))) == Reason.NEW_SETTING
    assert inferred(learning.look_up(learning.flux(seed=1500, model="RealVis"))) == Reason.NEW_SCOPE
    assert inferred(learning.look_up(body({"a.b": 1}))) == Reason.NOT_LEARNABLE


def test_python_and_the_script_compute_the_same_setting(learning: LearningFixture) -> None:
    mixed = {"prompt": "é\n", "deep": [{"x": None}, [], {}], "number": 2**63, "share": 0.1, "on": True, "text": "a~\\"}
    for seed in (*range(2, 40), 0.5, "7", "text", 0, -1, None):
        question = body({"seed": seed, **mixed})
        learning.wait(1.5)
        ticket = learning.ticket(question)
        setting = learning.observe(ticket, 5).setting
        left_out = "".join("01"[path in learning.scope().left_out] for path in ticket.reduced.paths)
        assert setting == setting_id(ticket.reduced, left_out)
    assert learning.scope().left_out == ("0.seed",)


def test_equal_bodies_are_one_body(learning: LearningFixture) -> None:
    learning.learn()
    tests = learning.scope().tests
    question = learning.flux(seed=1500, quality="Regular")
    for expected in (Effect.NEW, Effect.AGREED, Effect.AGREED, Effect.AGREED):
        assert learning.ask(question, 3) == expected
    assert learning.scope().tests == tests
    assert inferred(learning.look_up(learning.flux(seed=1501, quality="Regular"))) == Reason.NEW_SETTING


def test_what_lies_outside_is_asked_and_widens_the_range_if_it_agrees(learning: LearningFixture) -> None:
    learning.learn()
    tests = learning.scope().tests
    assert learning.ask(learning.flux(seed=5000), 9) == Effect.OUTSIDE
    assert learning.scope().state == State.ANSWERING
    assert inferred(learning.look_up(learning.flux(seed=4000))) == Reason.OUTSIDE
    assert learning.ask(learning.flux(seed=5000 - 1), 5) == Effect.AGREED
    learning.wait(1.5)
    assert inferred(learning.look_up(learning.flux(seed=4000))) == b"5"
    assert learning.scope().tests == tests, "what was outside is not a test"


def test_a_value_more_than_twice_as_large_as_its_own_setting_had_is_outside(learning: LearningFixture) -> None:
    learning.learn()
    for seed in (1000, 1001, 1002):
        learning.ask(learning.flux(seed=seed, quality="Regular"), 3)
    learning.wait(1.5)
    assert inferred(learning.look_up(learning.flux(seed=2004, quality="Regular"))) == b"3"
    assert inferred(learning.look_up(learning.flux(seed=2005, quality="Regular"))) == Reason.OUTSIDE


def doubt(learning: LearningFixture, amount: int = 6) -> None:
    assert learning.ask(learning.flux(), amount) == Effect.DOUBT


def test_in_doubt_nothing_is_inferred_in_the_account(learning: LearningFixture) -> None:
    learning.learn()
    learning.learn(model="RealVis")
    question, other = learning.flux(), learning.flux(model="RealVis")
    assert inferred(learning.look_up(other, process=1)) == b"5"
    learning.observe(learning.ticket(question), 6)
    assert inferred(learning.look_up(other)) == Reason.IN_DOUBT, "at once in this process"
    assert inferred(learning.look_up(other, process=1)) == b"5", "from memory"
    learning.wait(1)
    assert inferred(learning.look_up(other, process=1)) == Reason.IN_DOUBT
    assert inferred(learning.look_up(question, process=1)) == Reason.IN_DOUBT
    assert {scope.state for scope in learning.scopes()} == {State.IN_DOUBT}


def test_a_doubt_of_a_scope_that_does_not_answer_is_its_own(learning: LearningFixture) -> None:
    learning.learn(model="RealVis")
    learning.learn(bodies=0)
    doubt(learning)
    assert inferred(learning.look_up(learning.flux(model="RealVis"))) == b"5"
    doubt_of_flux, of_real_vis = learning.scopes()
    assert (doubt_of_flux.state, of_real_vis.state) == (State.IN_DOUBT, State.ANSWERING)


def test_two_bodies_that_agree_with_the_new_answer_say_that_the_list_moved(learning: LearningFixture) -> None:
    learning.learn()
    learning.learn(model="RealVis")
    tests = {scope.items: scope.tests for scope in learning.scopes()}
    doubt(learning)
    assert learning.ask(learning.flux(), 6) == Effect.AGREED
    assert learning.ask(learning.flux(), 6) == Effect.LIST_MOVED
    assert inferred(learning.look_up(learning.flux())) == b"6"
    assert inferred(learning.look_up(learning.flux(model="RealVis"))) == Reason.NEW_SETTING
    assert {scope.items: scope.tests for scope in learning.scopes()} == tests
    for expected in (Effect.NEW, Effect.AGREED, Effect.AGREED):
        assert learning.ask(learning.flux(model="RealVis"), 7) == expected
    learning.wait(1.5)
    assert inferred(learning.look_up(learning.flux(model="RealVis"))) == b"7"
    assert [scope.contradictions for scope in learning.scopes()] == [0, 0]


def test_one_body_that_does_not_agree_is_a_contradiction(learning: LearningFixture) -> None:
    learning.learn()
    learning.learn(model="RealVis")
    for _ in range(3):
        verdict = learning.look_up(learning.flux(), process=1)
        assert isinstance(verdict, Inferred)
        learning.learners[1].count(verdict, Counted.ANSWERED)
    learning.wait(1.5)
    learning.look_up(learning.flux(), process=1)  # stores the counts
    agreed_ms = learning.clock.us // 1000
    doubt(learning)
    learning.ask(learning.flux(), 6)
    learning.wait(1.5)
    found = learning.observe(learning.ticket(learning.flux()), 5)
    assert found.effect == Effect.CONTRADICTED
    assert found.contradiction is not None
    assert found.contradiction.suspects == 3
    assert found.contradiction.since_ms < agreed_ms < found.contradiction.until_ms == learning.clock.us // 1000
    flux, real_vis = learning.scopes()
    assert (flux.state, flux.tests, flux.needed, flux.contradictions) == (State.CONTRADICTED, 0, 20, 1)
    assert (real_vis.state, real_vis.tests, real_vis.needed) == (State.OBSERVING, 0, 10)
    assert inferred(learning.look_up(learning.flux())) == Reason.TOO_FEW_TESTS


def test_a_contradiction_without_suspect_answers_keeps_the_span_of_one_with_them(learning: LearningFixture) -> None:
    learning.learn()
    verdict = learning.look_up(learning.flux())
    assert isinstance(verdict, Inferred)
    learning.learners[0].count(verdict, Counted.ANSWERED)
    learning.wait(1.5)
    learning.look_up(learning.flux())  # stores the count
    doubt(learning)
    learning.ask(learning.flux(), 100)
    suspicious = learning.scope().last_contradiction
    learning.ask(learning.flux(), 11)
    learning.ask(learning.flux(), 101)
    scope = learning.scope()
    assert (scope.contradictions, scope.last_contradiction) == (2, suspicious)
    assert suspicious is not None
    assert suspicious.suspects == 1


def test_tests_needed_double_up_to_64_times(learning: LearningFixture) -> None:
    learning.learn()
    for number in range(8):
        learning.ask(learning.flux(), 10 + number)
        learning.ask(learning.flux(), 100)
        assert learning.scope().needed == 10 * min(64, 2 ** (number + 1))


def test_a_doubt_that_nobody_resolves_is_a_contradiction(learning: LearningFixture) -> None:
    learning.learn()
    learning.learn(model="RealVis")
    doubt(learning)
    learning.wait(TTL_S)
    learning.ask(learning.flux(model="RealVis"), 5)
    learning.wait(1.5)
    assert inferred(learning.look_up(learning.flux(model="RealVis"))) == Reason.TOO_FEW_TESTS
    learning.wait(1.5)
    found = learning.observe(learning.ticket(learning.flux()), 6)
    assert found.effect == Effect.AGREED
    assert found.contradiction is not None
    assert [scope.contradictions for scope in learning.scopes()] == [1, 0]
    for _ in range(12):
        learning.ask(learning.flux(model="RealVis"), 5)
    learning.wait(1.5)
    assert inferred(learning.look_up(learning.flux(model="RealVis"))) == b"5"


def test_a_doubt_of_an_evicted_scope_expires_too(learning: LearningFixture) -> None:
    learning.learn()
    doubt(learning)
    learning.client.delete(*learning.keys("ep1:*:scope:*"))
    learning.wait(TTL_S)
    learning.learn()
    assert learning.scope().state == State.ANSWERING


def test_an_answer_asked_before_a_doubt_does_not_resolve_it(learning: LearningFixture) -> None:
    learning.learn()
    late = learning.ticket(learning.flux())
    doubt(learning)
    assert learning.observe(late, 5).effect == Effect.IGNORED
    assert learning.scope().state == State.IN_DOUBT


@pytest.mark.parametrize("how", ["purge", "list-moved", "forgotten"])
def test_an_answer_asked_before_prices_were_dropped_is_ignored(learning: LearningFixture, how: str) -> None:
    learning.learn()
    late = learning.ticket(learning.flux())
    if how == "purge":
        learning.run(learning.learners[1].drop_prices(ACCOUNT))
    elif how == "forgotten":
        learning.client.delete(*learning.keys("ep1:*:learned"))
        learning.ask(learning.flux(), 5)
    else:
        for _ in range(3):
            learning.ask(learning.flux(), 6)
    assert learning.observe(late, 5).effect == Effect.IGNORED


def test_dropped_prices_are_asked_three_times_again(learning: LearningFixture) -> None:
    learning.learn()
    tests = learning.scope().tests
    learning.run(learning.learners[0].drop_prices(ACCOUNT))
    assert inferred(learning.look_up(learning.flux())) == Reason.NEW_SETTING
    for amount in (7, 7, 7):
        learning.ask(learning.flux(), amount)
    learning.wait(1.5)
    assert inferred(learning.look_up(learning.flux(), process=1)) == b"7"
    assert learning.scope().tests >= tests


def test_a_purged_question_drops_its_setting_alone(learning: LearningFixture) -> None:
    learning.learn()
    learning.learn(amount=3, quality="Regular")
    late = learning.ticket(learning.flux())
    learning.run(learning.learners[0].drop_setting(learning.flux()))
    assert inferred(learning.look_up(learning.flux())) == Reason.NEW_SETTING
    assert inferred(learning.look_up(learning.flux(quality="Regular"))) == b"3"
    assert learning.observe(late, 5).effect == Effect.IGNORED
    assert learning.ask(learning.flux(), 6) == Effect.NEW


def test_what_cannot_be_purged_from_what_was_learned_is_no_error(learning: LearningFixture) -> None:
    learning.run(learning.learners[0].drop_setting(body({"a.b": 1})))
    learning.run(learning.learners[0].drop_setting(learning.flux()))
    assert learning.keys("ep1:*:scope:*") == []


def test_an_evicted_account_needs_its_proof_again(learning: LearningFixture) -> None:
    learning.learn()
    learning.client.delete(*learning.keys("ep1:*:learned"))
    learning.wait(1.5)
    assert inferred(learning.look_up(learning.flux())) == Reason.NEW_SCOPE
    learning.ask(learning.flux(), 5)
    scope = learning.scope()
    assert (scope.state, scope.tests, scope.asked) == (State.OBSERVING, 0, 63)


def test_an_evicted_scope_is_learned_again(learning: LearningFixture) -> None:
    learning.learn()
    learning.client.delete(*learning.keys("ep1:*:scope:*"))
    learning.wait(1.5)
    assert inferred(learning.look_up(learning.flux())) == Reason.NEW_SCOPE
    assert learning.scopes() == []
    learning.learn()
    assert inferred(learning.look_up(learning.flux())) == b"5"


def test_a_leaf_whose_values_repeat_is_kept_again(learning: LearningFixture) -> None:
    for number in range(20):
        learning.ask(learning.flux(steps=10 + number % 14), 5)
    assert learning.scope().left_out == ("0.seed", "0.steps")
    learning.ask(learning.flux(steps=10), 5)
    learning.ask(learning.flux(steps=10), 6)
    for number in range(220):
        learning.ask(learning.flux(steps=10 + number % 14), 10 + number % 14)
    scope = learning.scope()
    assert scope.left_out == ("0.seed",)
    assert scope.needed == 10, "the contradictions were about a member that now counts"
    assert inferred(learning.look_up(learning.flux(steps=12))) == b"12"


def test_an_id_is_never_left_out(learning: LearningFixture) -> None:
    for number in range(30):
        learning.ask(learning.flux(asset_id=f"ast_{number}"), 5)
    assert learning.scope().left_out == ("0.seed",)


def test_a_member_that_never_learn_names_counts_again(learning: LearningFixture) -> None:
    learning.learn()
    question = learning.flux()
    assert inferred(learning.look_up(question, never=("seed",))) == Reason.NEVER_LEARN
    learning.observe(learning.ticket(question, never=("seed",)), 5)
    assert learning.scope().left_out == ()


def test_at_most_so_many_scopes_are_kept_and_half_through_one_team(
    learning: LearningFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, scopes=6)
    learner = learning.new_learner()
    learning.learners[0] = learner
    for number in range(5):
        learning.ask(learning.flux(model=f"m{number}"), 5)
    assert [scope.items for scope in learning.scopes()] == [("model m4",), ("model m3",), ("model m2",)]
    for number in range(5, 8):
        learning.ask(learning.flux(model=f"m{number}"), 5, team="marketing")
    learning.ask(learning.flux(model="m2"), 5)
    learning.ask(learning.flux(model="m8"), 5, team="sales")
    names = [scope.items[0] for scope in learning.scopes()]
    assert names == ["model m8", "model m2", "model m7", "model m6", "model m5", "model m4"]
    assert len(learning.keys("ep1:*:scope:*")) == 6


def test_at_most_so_many_settings_are_kept(learning: LearningFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, settings=20)
    learning.learners[0] = learning.new_learner()
    for number in range(50):
        learning.ask(learning.flux(asset_id=str(number)), 5)
        assert learning.scope().settings <= 20
    (key,) = learning.keys("ep1:*:scope:*")
    fields: Any = learning.client.hkeys(key)
    assert sum(field.startswith(b"s:") for field in fields) == learning.scope().settings
    assert inferred(learning.look_up(learning.flux(asset_id="49"))) == Reason.TOO_FEW_TESTS


def test_the_memory_of_values_is_bounded(learning: LearningFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, digests=16)
    learning.learners[0] = learning.new_learner()
    for _ in range(60):
        learning.ask(learning.flux(), 5)
    assert learning.scope().left_out == ("0.seed",)
    (key,) = learning.keys("ep1:*:scope:*")
    assert max(len(value) for field, value in learning.client.hgetall(key).items() if field[:5] == b"leaf:") < 130


def test_forgotten_scopes_are_gone(learning: LearningFixture) -> None:
    learning.learn()
    learning.learn(model="RealVis")
    doubt(learning)
    learner, scope = learning.learners[0], learning.scopes()[0].id
    assert learning.run(learner.forget(ACCOUNT, "unknown")) == 0
    assert learning.run(learner.forget(ACCOUNT, scope)) == 1
    assert [scope.items for scope in learning.scopes()] == [("model RealVis",)]
    assert inferred(learning.look_up(learning.flux(model="RealVis"))) == b"5", "the doubt is forgotten too"
    assert learning.run(learner.forget(ACCOUNT)) == 1
    assert learning.scopes() == []


def test_an_owed_audit_makes_the_next_answer_of_the_setting_a_miss(learning: LearningFixture) -> None:
    learning.learn()
    verdict = learning.look_up(learning.flux())
    assert isinstance(verdict, Inferred)
    learning.learners[0].owe_audit(verdict)
    assert inferred(learning.look_up(learning.flux())) == Reason.AUDIT_OWED
    assert inferred(learning.look_up(learning.flux())) == b"5"


def test_counts_reach_the_store_each_second_and_at_the_end(learning: LearningFixture) -> None:
    learning.learn()
    verdict = learning.look_up(learning.flux())
    assert isinstance(verdict, Inferred)
    learner = learning.learners[0]
    due = [learner.count(verdict, Counted.ANSWERED) for _ in range(25)]
    assert sum(due) == 1
    assert not any(learner.count(verdict, counted) for counted in (Counted.RIGHT, Counted.WRONG, Counted.RIGHT))
    assert learning.scope().answered == 0
    learning.wait(1)
    learning.look_up(learning.flux())
    scope = learning.scope()
    assert (scope.answered, scope.right, scope.wrong) == (25, 2, 1)
    learner.count(verdict, Counted.ANSWERED)
    learning.run(learner.close())
    assert learning.scope().answered == 26


def test_long_data_is_not_learned_from(learning: LearningFixture) -> None:
    price = Price(b"5", b'"x":"' + b"x" * 1024 + b'"')
    found: Observation = learning.run(
        learning.learners[0].observe(learning.ticket(learning.flux()), price, team="design")
    )
    assert found.effect == Effect.IGNORED
    assert learning.keys() == []


def test_audits_are_counted(learning: LearningFixture) -> None:
    learning.learn()
    learning.observe(learning.ticket(learning.flux()), 5, is_audit=True)
    assert learning.scope().audits == 1


def test_accounts_learn_nothing_from_each_other(learning: LearningFixture) -> None:
    learning.learn()
    other = learning.flux()
    assert (
        inferred(learning.look_up(body({"model": "Flux", "quality": "Plus", "seed": 1500}, account="b")))
        == Reason.NEW_SCOPE
    )
    assert inferred(learning.look_up(other)) == b"5"


def test_without_its_store_nothing_is_inferred(learning: LearningFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    learning.learn()
    learning.wait(2)

    async def fail(*_: object, **__: object) -> None:
        raise StoreUnavailable("out of reach")

    monkeypatch.setattr(learning.store, "call", fail)
    assert inferred(learning.look_up(learning.flux())) == Reason.UNAVAILABLE
