import json
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.prices import Balance
from proxy.gateway.quote_document import (
    Known,
    Quoted,
    QuotedVariant,
    Unknown,
    quote_document,
    shown_to_team,
)
from proxy.gateway.quote_request import Line, QuoteRequest, Variant, read_quote
from proxy.quota.credits import micro_of
from proxy.quota.quotas import Measure, Quota, QuotaState, Rate, TeamLimits
from proxy.quota.windows import Window

UTC = ZoneInfo("UTC")
BUSY = Unknown("upstream-busy", "RenderNet is busy: try again later.")
CREDIT = 1_000_000


def known(amount: str, **more: Any) -> Known:
    return Known(amount.encode(), **{"basis": "stored", "age_s": 12.9, "ttl_s": 287.1, **more})


def state(*quotas: tuple[Measure, int, int], refuse: bool = True) -> QuotaState:
    """Of quotas a month, each by measure, limit and use."""
    limits = TeamLimits(
        "design", Rate(1, 1), tuple(Quota("team", one, "month", most, refuse) for one, most, _ in quotas)
    )
    return QuotaState(limits, {"month": Window(0, 86_400 * 30)}, 0, 0, tuple(used for *_, used in quotas))


def plain(**options: Any) -> QuoteRequest:
    return read_quote(orjson.dumps({"variants": [{"label": "a", "body": [{}]}], **options}))


def variant(label: str, whole: Quoted, lines: Sequence[tuple[int | str, Quoted]] = ()) -> QuotedVariant:
    parts = [Line(part, b"", mode_changes=part == "model") for part, _ in lines]
    return QuotedVariant(Variant(label, b"", [], parts), whole, [quoted for _, quoted in lines])


def document(
    *variants: QuotedVariant,
    request: QuoteRequest | None = None,
    quota_state: QuotaState | None = None,
    balance: Balance | None = None,
) -> Any:
    text = quote_document(request or plain(), variants, quota_state, balance)
    return json.loads(text, parse_float=Decimal)


def test_the_document_of_a_grid() -> None:
    change = {"path": "steps", "value": 30, "added": True}
    asked = known("2.50", basis="asked", age_s=0, ttl_s=None)
    shown = document(
        QuotedVariant(Variant("steps=20", b"", [change]), known("2")),
        variant("steps=30", asked),
        variant("steps=40", BUSY),
        balance=Balance(b"19.50", 3.7),
        request=plain(quantity=3),
        quota_state=state(("estimated_credits", 100 * CREDIT, 93 * CREDIT)),
    )
    assert shown == {
        "variants": [
            {
                "label": "steps=20",
                "changes": [change],
                "estimated": 2,
                "delta": 0,
                "age_s": 12,
                "ttl_s": 287,
                "basis": "stored",
            },
            {
                "label": "steps=30",
                "changes": [],
                "estimated": Decimal("2.50"),
                "delta": Decimal("0.5"),
                "age_s": 0,
                "ttl_s": None,
                "basis": "asked",
            },
            {
                "label": "steps=40",
                "changes": [],
                "estimated": None,
                "error": {"code": "upstream-busy", "message": "RenderNet is busy: try again later."},
                "delta": None,
                "age_s": None,
                "ttl_s": None,
                "basis": None,
            },
        ],
        "cheapest": "steps=20",
        "quotas": [
            {
                "scope": "team",
                "measure": "estimated_credits",
                "per": "month",
                "remaining": 7,
                "fits": True,
                "how_many": 3,
            }
        ],
        "balance": Decimal("19.50"),
        "balance_age_s": 3,
        "quantity": 3,
        "total": 6,
    }


def test_amounts_keep_rendernets_spelling() -> None:
    text = quote_document(plain(), [variant("a", known("5.0")), variant("b", known("1e1"))], None, None)
    assert b'"estimated":5.0' in text
    assert b'"estimated":1e1' in text
    assert b'"delta":5,' in text


def test_what_is_unknown_is_null() -> None:
    shown = document(
        variant("a", BUSY), variant("b", BUSY), request=plain(quantity=2), quota_state=state(("requests", 5, 1))
    )
    assert [one["delta"] for one in shown["variants"]] == [None, None]
    assert (shown["cheapest"], shown["total"], shown["balance"], shown["balance_age_s"]) == (None, None, None, None)
    assert (shown["quotas"][0]["remaining"], shown["quotas"][0]["fits"], shown["quotas"][0]["how_many"]) == (
        4,
        None,
        None,
    )
    assert document(variant("a", known("1")))["quotas"] is None
    assert "total" not in document(variant("a", known("1")))


def test_deltas_need_the_first_variant() -> None:
    shown = document(variant("a", BUSY), variant("b", known("3")), variant("c", known("2")))
    assert [one["delta"] for one in shown["variants"]] == [None, None, None]
    assert shown["cheapest"] == "c"


def test_of_equal_variants_the_first_is_the_cheapest() -> None:
    assert document(variant("a", known("2")), variant("b", known("1.0")), variant("c", known("1")))["cheapest"] == "b"


class TestBreakdown:
    def test_items_add_up_with_the_residual(self) -> None:
        one = variant("a", known("4.5"), [(0, known("2")), (1, known("2.75"))])
        (shown,) = document(one, request=plain(breakdown="items"))["variants"]
        assert shown["breakdown"] == [{"item": 0, "estimated": 2}, {"item": 1, "estimated": Decimal("2.75")}]
        assert shown["residual"] == Decimal("-0.25")

    def test_an_unknown_line_makes_the_residual_unknown(self) -> None:
        for whole, line in ((known("4"), BUSY), (BUSY, known("4"))):
            one = variant("a", whole, [(0, known("2")), (1, line)])
            (shown,) = document(one, request=plain(breakdown="items"))["variants"]
            assert shown["residual"] is None
        assert shown["breakdown"][1] == {"item": 1, "estimated": 4}

    def test_members_have_marginals(self) -> None:
        one = variant(
            "a", known("4"), [("model", known("1.5")), ("seed", known("4")), ("steps", BUSY), ("x", known("5"))]
        )
        (shown,) = document(one, request=plain(breakdown="members"))["variants"]
        error = {"code": "upstream-busy", "message": "RenderNet is busy: try again later."}
        assert shown["breakdown"] == [
            {"member": "model", "marginal": Decimal("2.5"), "mode_changes": True},
            {"member": "seed", "marginal": 0},
            {"member": "steps", "marginal": None, "error": error},
            {"member": "x", "marginal": -1},
        ]
        assert "residual" not in shown

    def test_a_body_without_members_has_an_empty_breakdown(self) -> None:
        assert document(variant("a", known("1")), request=plain(breakdown="members"))["variants"][0]["breakdown"] == []


AMOUNTS = st.decimals(0, 10**6, allow_nan=False, places=6).map(str) | st.integers(0, 10**6).map(str)


@given(AMOUNTS, st.lists(AMOUNTS, min_size=1, max_size=5), st.integers(1, 10**6))
def test_sums_are_exact(whole: str, lines: list[str], quantity: int) -> None:
    parts = [(number, known(line)) for number, line in enumerate(lines)]
    request = plain(breakdown="items", quantity=quantity)
    shown = document(variant("a", known(whole), parts), variant("b", known(lines[0])), request=request)
    first, second = shown["variants"]
    assert sum(map(Fraction, lines)) + Fraction(first["residual"]) == Fraction(whole)
    assert Fraction(whole) + Fraction(second["delta"]) == Fraction(lines[0])
    assert Fraction(shown["total"]) == quantity * min(Fraction(whole), Fraction(lines[0]))


@pytest.mark.parametrize("tiny", ["1e-600", "1e-999999999", "1E-700"])
def test_a_sum_that_would_not_be_exact_is_unknown(tiny: str) -> None:
    request = plain(breakdown="items", quantity=3)
    one = variant("a", known("5"), [(0, known(tiny)), (1, known("1"))])
    shown = document(one, variant("b", known(tiny)), request=request)
    assert shown["variants"][0]["residual"] is None
    assert shown["variants"][1]["delta"] is None


class TestQuotas:
    @given(
        st.sampled_from(["requests", "estimated_credits"]),
        st.integers(0, 20),
        st.integers(0, 25),
        st.integers(0, 5),
        st.integers(1, 5),
    )
    def test_it_fits_if_every_estimate_would_be_admitted(
        self, measure: Measure, limit: int, used: int, micro: int, quantity: int
    ) -> None:
        """Counts admissions one by one, as the ledger makes them."""
        price = known(f"{micro}e-6")
        shown = document(
            variant("a", price), request=plain(quantity=quantity), quota_state=state((measure, limit, used))
        )["quotas"][0]
        each, admitted, now = 1 if measure == "requests" else micro, 0, used
        while admitted < 30 and now < limit and now + each <= limit:
            admitted, now = admitted + 1, now + each
        assert shown["fits"] is (admitted >= quantity)
        assert shown["how_many"] == (None if admitted == 30 else admitted)
        scale = 1 if measure == "requests" else CREDIT
        assert shown["remaining"] * scale == max(0, limit - used)
        assert bool(state((measure, limit, used)).refusing(micro_of(price.estimated))) is (admitted == 0)

    def test_a_quota_that_only_warns_refuses_nothing(self) -> None:
        warned = state(("requests", 1, 5), refuse=False)
        assert warned.refusing(5) == ()
        assert shown_to_team(known("5"), warned, UTC) == known("5")

    def test_a_refused_team_sees_no_price(self) -> None:
        limited = state(("estimated_credits", 5 * CREDIT, 3 * CREDIT))
        assert shown_to_team(known("2"), limited, UTC) == known("2")
        hidden = shown_to_team(known("2.5"), limited, UTC)
        assert hidden == Unknown(
            "quota-exceeded",
            "2 of the team's 5 estimated credits per month are left until 1970-01-31T00:00:00+00:00, and this estimate "
            "needs more.",
        )
        assert shown_to_team(known("2.5"), None, UTC) == known("2.5"), "the ledger is unavailable, and admits"
        assert shown_to_team(BUSY, limited, UTC) is BUSY
