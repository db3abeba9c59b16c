"""Price changes: days are decoded in order, and reports have exact amounts."""

import json
from datetime import date, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

import hypothesis.strategies as st
from hypothesis import given

from proxy.quota.counters import USAGE_KEPT_DAYS
from proxy.quota.price_changes import FOUND, PriceChange, PriceChanges, decode_days, json_of, lines_of
from proxy.quota.report_queries import PriceChangeQuery

TODAY = date(2026, 11, 22)
OLDEST = TODAY - timedelta(days=USAGE_KEPT_DAYS)
BERLIN = ZoneInfo("Europe/Berlin")
EVERYTHING = PriceChangeQuery(OLDEST, TODAY, None, csv=False, dialect="rfc4180")
KEY = "0123456789abcdef"
FIRST = PriceChange(1_795_000_000, "default", "Flux", KEY, "2.75", "3", "audit")
SECOND = PriceChange(1_795_000_001, "second", "mixed", KEY, "5", "4.999999", "ask")


def hash_of(*changes: PriceChange, found: int | None = None) -> dict[bytes, bytes]:
    fields = {b"%d" % number: change.encoded() for number, change in enumerate(changes)}
    return fields | {FOUND: b"%d" % (len(changes) if found is None else found)}


def test_changes_of_several_days_are_sorted_by_time() -> None:
    assert decode_days([hash_of(SECOND, FIRST), {}, hash_of()], None) == PriceChanges([FIRST, SECOND], 0)


def test_an_account_sees_its_own_changes_and_how_many_were_not_kept() -> None:
    assert decode_days([hash_of(FIRST, SECOND, found=7), hash_of(found=1)], "second") == PriceChanges([SECOND], 6)


def test_the_json_document_has_exact_amounts() -> None:
    document = json.loads(json_of(PriceChanges([FIRST, SECOND], 3), EVERYTHING, BERLIN), parse_float=Decimal)
    assert document == {
        "from": str(OLDEST),
        "to": "2026-11-22",
        "timezone": "Europe/Berlin",
        "changes": [
            {
                "at": "2026-11-18T12:06:40+01:00",
                "account": "default",
                "model": "Flux",
                "key": KEY,
                "old": Decimal("2.75"),
                "new": 3,
                "found_by": "audit",
            },
            {
                "at": "2026-11-18T12:06:41+01:00",
                "account": "second",
                "model": "mixed",
                "key": KEY,
                "old": 5,
                "new": Decimal("4.999999"),
                "found_by": "ask",
            },
        ],
        "not_kept": 3,
    }


def test_lines_have_the_columns_of_the_document() -> None:
    assert lines_of(PriceChanges([FIRST], 0), BERLIN) == [
        ["at", "account", "model", "key", "old", "new", "found_by"],
        ["2026-11-18T12:06:40+01:00", "default", "Flux", KEY, "2.75", "3", "audit"],
    ]


@given(st.builds(PriceChange, st.integers(0, 2**40), *[st.text()] * 5, st.sampled_from(["audit", "doubt", "ask"])))
def test_a_change_is_read_as_it_was_written(change: PriceChange) -> None:
    assert decode_days([hash_of(change)], None).changes == [change]


def test_what_a_newer_version_adds_is_ignored() -> None:
    newer = FIRST.encoded()[:-1] + b',"currency":"EUR"}'
    assert decode_days([{b"a": newer, FOUND: b"1"}], None).changes == [FIRST]
