"""How people see what was learned: bounds in words, scopes, and reasons."""

from dataclasses import replace
from zoneinfo import ZoneInfo

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.prices import Price, StoredPrice
from proxy.learning.evidence import Contradiction, Scope, State
from proxy.learning.leaves import Reduced
from proxy.learning.report import accounts_document, bound_in_words, percent_below, scope_document, verdict_document
from proxy.learning.ticket import Ticket
from proxy.learning.verdict import Inferred, NotInferred, Reason

ZONE = ZoneInfo("Europe/Berlin")
SCOPE = Scope(
    id="5c09e",
    items=("model Flux",),
    counting=("0.model", "0.steps"),
    left_out=("0.seed",),
    state=State.ANSWERING,
    tests=412,
    needed=100,
    settings=20,
    asked=500,
    answered=1500,
    right=0,
    wrong=0,
    audits=60,
    list_moves=1,
    contradictions=0,
    last_contradiction=None,
    team="design",
    used_at_ms=1_795_000_000_000,
)
TICKET = Ticket("default", Reduced("5c09e", (), (), (), ()), "key", "epoch", 0)
INFERRED = Inferred(StoredPrice(Price(b"4", b""), 1, 2, b""), "a1b2", SCOPE, TICKET)


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100"), (0.95, "95"), (0.0295, "3"), (0.0073, "0.8"), (0.0008, "0.08"), (0.0001, "0.01")]
)
def test_a_bound_is_rounded_up(share: float, text: str) -> None:
    assert percent_below(share) == text


@given(st.floats(1e-7, 1))
def test_a_bound_in_words_is_never_below_the_bound(share: float) -> None:
    shown = float(percent_below(share))
    assert 100 * share * (1 - 1e-9) <= shown <= max(200 * share, 100 * share + 1)


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        (412, "of 412 tries none cost otherwise: with 95 % confidence fewer than 0.8 % of bodies do"),
        (1, "the only try did not cost otherwise: with 95 % confidence fewer than 95 % of bodies do"),
        (0, "no test yet, so nothing is known"),
    ],
)
def test_the_bound_in_words(tests: int, words: str) -> None:
    assert bound_in_words(replace(SCOPE, tests=tests)) == words


def test_a_scope() -> None:
    contradiction = Contradiction(1_794_999_000_000, 1_794_999_600_000, 17)
    document = scope_document(replace(SCOPE, contradictions=1, last_contradiction=contradiction), ZONE)
    assert document["answered_percent"] == 75.0
    assert document["would_have_answered_percent"] == 0.0
    assert document["last_asked"] == "2026-11-18T12:06:40+01:00"
    assert document["last_contradiction"] == {
        "since": "2026-11-18T11:50:00+01:00",
        "until": "2026-11-18T12:00:00+01:00",
        "suspect_answers": 17,
    }


def test_a_scope_that_only_observes() -> None:
    document = scope_document(replace(SCOPE, answered=0, right=390, wrong=10, asked=500), ZONE)
    assert (document["would_have_answered"], document["would_have_been_wrong"]) == (400, 10)
    assert document["would_have_answered_percent"] == 80.0
    assert scope_document(replace(SCOPE, asked=0, answered=0), ZONE)["answered_percent"] == 0.0


def test_scopes_by_account() -> None:
    document = orjson.loads(orjson.dumps(accounts_document("use", {"default": [SCOPE], "second": []}, ZONE)))
    assert (document["learn"], document["timezone"]) == ("use", "Europe/Berlin")
    assert [(each["account"], len(each["scopes"])) for each in document["accounts"]] == [("default", 1), ("second", 0)]


def test_a_verdict_shows_nothing_of_other_teams() -> None:
    document = verdict_document(INFERRED)
    assert (document["inferable"], document["setting"]) == (True, "a1b2")
    assert document.keys().isdisjoint({"team", "estimated", "asked", "answered"})


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_explained(reason: Reason) -> None:
    known = verdict_document(NotInferred(reason, SCOPE, TICKET, "0.seed" if reason is Reason.OUTSIDE else None))
    unknown = verdict_document(NotInferred(reason))
    for document in (known, unknown):
        assert (document["inferable"], document["reason"]) == (False, reason)
        assert document["detail"].endswith(".")
    assert known["scope"] == "5c09e"
    assert "scope" not in unknown


def test_details_name_the_member_and_the_number_of_tests() -> None:
    outside = verdict_document(NotInferred(Reason.OUTSIDE, SCOPE, TICKET, "0.seed"))
    assert outside["detail"] == "The value of 0.seed is outside the range that was tested."
    few = verdict_document(NotInferred(Reason.TOO_FEW_TESTS, replace(SCOPE, tests=7), TICKET))
    assert few["detail"] == "There are 7 tests without a contradiction, and it takes 100."
