"""Evidence as the store has it, decoded; and what it says about a body."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from json_values import plain
from proxy.cache.canonical import canonicalise
from proxy.cache.prices import Price
from proxy.learning.evidence import Contradiction, Evidence, Setting, State, decode_evidence, decode_setting
from proxy.learning.leaves import Reduced, reduce
from proxy.learning.ticket import Ticket
from proxy.learning.verdict import Inferred, NotInferred, Reason, decide

HEAD: dict[str, Any] = {
    "left": "01",
    "ranges": {"2n": ["10", "1000"]},
    "tests": 100,
    "factor": 1,
    "proof": "p1",
    "settings": 20,
    "asked": 160,
    "audits": 4,
    "list_moves": 0,
    "contradictions": 0,
    "agreed_at": 5,
    "team": "design",
}
MEMBERS = {"items": ["model Flux"], "paths": ["0.model", "0.seed"]}


def evidence(*, doubts: bytes = b"", **head: Any) -> Evidence:
    fields = [b"e1", b"p1", doubts, b"7000 design", orjson.dumps(HEAD | head), orjson.dumps(MEMBERS), b"40", None, b"3"]
    return decode_evidence("s1", fields, learn_from=100)


def setting(bodies: int = 3, reach: tuple[str, str] = ("500", "600"), at_ms: int = 9000) -> Setting:
    return Setting(Price(b"5", b""), bodies, at_ms, {"2n": reach})


def body(seed: Any, never: tuple[str, ...] = ()) -> Reduced:
    found = reduce(canonicalise(plain([{"model": "Flux", "seed": seed}])), query="", ignored=(), never_learn=never)
    assert found is not None
    return found


def verdict(reduced: Reduced, known: Evidence, of_setting: Setting | None) -> Inferred | NotInferred:
    ticket = Ticket("default", reduced, "k", "e1", 10_000)
    return decide(ticket, known, of_setting, setting="x", ttl_s=60)


def test_a_scope_is_decoded_with_its_counts() -> None:
    scope = evidence().scope
    assert scope is not None
    assert (scope.counting, scope.left_out, scope.items) == (("0.model",), ("0.seed",), ("model Flux",))
    assert (scope.tests, scope.needed, scope.answered, scope.right, scope.wrong) == (100, 100, 40, 0, 3)
    assert (scope.team, scope.used_at_ms, scope.last_contradiction) == ("design", 7000, None)


@pytest.mark.parametrize(
    ("known", "state"),
    [
        (evidence(), State.ANSWERING),
        (evidence(tests=99), State.OBSERVING),
        (evidence(tests=100, factor=2), State.OBSERVING),
        (evidence(tests=3, factor=2, contradictions=1), State.CONTRADICTED),
        (evidence(contradictions=1), State.ANSWERING),
        (evidence(proof="p0"), State.OBSERVING),
        (evidence(doubt={"at": 1, "until": 2, "epoch": "e1"}), State.IN_DOUBT),
        (evidence(doubt={"at": 1, "until": 2, "epoch": "e0"}), State.ANSWERING),
        (evidence(doubts=b" other:99999"), State.IN_DOUBT),
    ],
)
def test_the_state_of_a_scope(known: Evidence, state: State) -> None:
    assert known.scope is not None
    assert known.scope.state == state
    expected = {State.ANSWERING: Inferred, State.IN_DOUBT: Reason.IN_DOUBT}.get(state, Reason.TOO_FEW_TESTS)
    found = verdict(body(550), known, setting())
    assert (found.reason if isinstance(found, NotInferred) else Inferred) == expected


def test_the_last_contradiction_is_decoded() -> None:
    scope = evidence(last={"since": 5, "until": 9, "suspects": 2}).scope
    assert scope is not None
    assert scope.last_contradiction == Contradiction(5, 9, 2)


@pytest.mark.parametrize("missing", [0, 4, 5])
def test_evidence_that_is_incomplete_is_no_evidence(missing: int) -> None:
    fields: list[Any] = [b"e1", b"p1", b"", b"7000 design", orjson.dumps(HEAD), orjson.dumps(MEMBERS), None, None, None]
    fields[missing] = None
    found = verdict(body(550), decode_evidence("s1", fields, learn_from=100), setting())
    assert found == NotInferred(Reason.NEW_SCOPE, ticket=Ticket("default", body(550), "k", "e1", 10_000))


def test_the_bound_is_that_of_the_contract() -> None:
    bounds = [evidence(tests=tests).scope for tests in (0, 1, 100, 412)]
    assert [round(scope.bound, 4) for scope in bounds if scope is not None] == [1.0, 0.95, 0.0295, 0.0072]


def test_a_setting_is_decoded_unless_its_price_was_dropped() -> None:
    fields = {"epoch": "e1", "bodies": ["a", "b"], "estimated": "5", "rest": '"a":1', "reach": {"2n": ["1", "2"]}}
    text = b"9000 " + orjson.dumps(fields)
    assert decode_setting(text, "e1") == Setting(Price(b"5", b'"a":1'), 2, 9000, {"2n": ["1", "2"]})
    assert decode_setting(text, "e2") is None
    assert decode_setting(None, "e1") is None
    assert decode_setting(b"9000 " + orjson.dumps({"epoch": "e1", "bodies": {}}), "e1") is None


def test_an_inferred_price_has_the_age_of_the_newest_agreeing_answer() -> None:
    found = verdict(body(550), evidence(), setting())
    assert isinstance(found, Inferred)
    assert (found.stored.price, found.stored.age_s, found.stored.ttl_s) == (Price(b"5", b""), 1.0, 59.0)
    later = verdict(body(550), evidence(), setting(at_ms=11_000))
    assert isinstance(later, Inferred)
    assert later.stored.age_s == 0, "the store's clock is a little ahead of the ticket's"


@pytest.mark.parametrize("of_setting", [None, setting(bodies=2)])
def test_a_setting_needs_three_bodies(of_setting: Setting | None) -> None:
    found = verdict(body(550), evidence(), of_setting)
    assert isinstance(found, NotInferred)
    assert found.reason == Reason.NEW_SETTING


def test_a_member_that_may_no_longer_be_left_out_counts_at_once() -> None:
    found = verdict(body(550, never=("seed",)), evidence(), setting())
    assert isinstance(found, NotInferred)
    assert found.reason == Reason.NEVER_LEARN


@given(st.integers(-3000, 3000) | st.floats(-3000, 3000), st.integers(-2000, 2000), st.integers(-2000, 2000))
def test_nothing_outside_the_range_is_inferred(seed: float, low: int, high: int) -> None:
    known = evidence(ranges={"2n": [str(low), str(high)]})
    found = verdict(body(seed), known, setting(reach=("-30", "500")))
    if seed in (0, -1):
        assert isinstance(found, Inferred), "a sentinel has no range"
    elif low <= seed <= high and abs(seed) <= 1000:
        assert isinstance(found, Inferred)
    else:
        assert isinstance(found, NotInferred)
        assert (found.reason, found.outside) == (Reason.OUTSIDE, "0.seed")


@pytest.mark.parametrize("seed", ["text", "7"])
def test_a_kind_of_value_without_a_range_is_outside(seed: str) -> None:
    found = verdict(body(seed), evidence(), setting())
    assert isinstance(found, NotInferred)
    assert found.reason == Reason.OUTSIDE
