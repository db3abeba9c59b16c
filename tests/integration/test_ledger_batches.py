"""The ledger's batches: requests of one event loop iteration are decided in one call, each on its own."""

import asyncio
from collections import Counter

import pytest
import redis

from ledger_fixture import (
    CREDIT,
    FAILED,
    HIT,
    PLAIN,
    LedgerFixture,
    calls,
    quota,
    rows,
    run_scenario,
    terms,
    used,
    word,
)
from proxy.problems import Outcome
from proxy.quota.batches import LedgerBatcher
from proxy.quota.ledger_script import MAX_BATCH_ENTRIES
from proxy.quota.quotas import Charge, Quota


def test_requests_of_one_iteration_are_decided_in_one_call_and_in_order(
    any_store_url: str, server: redis.Redis
) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        before = calls(server)
        asked = [fixture.ledger.charge(terms(quota(3), team=team), HIT) for team in ("design", "film") * 5]
        words = list(map(word, await asyncio.gather(*asked)))
        assert words == ["admitted"] * 6 + ["quota-exceeded"] * 4
        assert calls(server) - before == 1

    run_scenario(any_store_url, scenario)


def test_equal_requests_share_one_entry_and_report_the_state_after_the_batch(
    any_store_url: str, server: redis.Redis
) -> None:
    limited, dear = terms(quota(4), quota(19 * CREDIT, "estimated_credits")), Charge(Outcome.HIT, 5 * CREDIT, "Flux")

    async def scenario(fixture: LedgerFixture) -> None:
        asked = [fixture.ledger.charge(limited, charge) for charge in (HIT, dear) * 3]
        ends = await asyncio.gather(*asked)
        assert list(map(word, ends)) == ["admitted"] * 3 + ["quota-exceeded", "admitted", "quota-exceeded"]
        assert [end.quota_state and tuple(end.quota_state.used) for end in ends] == [(4, 17 * CREDIT)] * 6

    run_scenario(any_store_url, scenario)
    assert rows(server) == {
        "Flux:hit:requests": 4,
        "Flux:hit:credits": 17 * CREDIT,
        "-:quota-exceeded:refused": 2,
    }


def test_with_a_warning_quota_each_request_reports_its_own_state(any_store_url: str, server: redis.Redis) -> None:
    warned = terms(Quota("team", "requests", "month", 2, refuse=False))

    async def scenario(fixture: LedgerFixture) -> None:
        ends = await asyncio.gather(*(fixture.ledger.charge(warned, HIT) for _ in range(4)))
        quota_states = [end.quota_state for end in ends if end.quota_state]
        assert [(tuple(quota_state.used), bool(quota_state.warnings())) for quota_state in quota_states] == [
            ((1,), False),
            ((2,), False),
            ((3,), True),
            ((4,), True),
        ]

    run_scenario(any_store_url, scenario)
    assert used(server) == (4, 16 * CREDIT)


def test_an_unexpected_exception_fails_only_its_batch(
    any_store_url: str, server: redis.Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(LedgerBatcher, "_call", _break)
            ends = await asyncio.gather(*(fixture.ledger.charge(PLAIN, HIT) for _ in range(3)))
        assert list(map(word, ends)) == ["store-unavailable"] * 3
        assert fixture.metric("unanswered_debits_total") == 3
        assert word(await fixture.ledger.charge(PLAIN, HIT)) == "admitted"

    run_scenario(any_store_url, scenario)
    assert "the reason is for the log" in caplog.text
    assert used(server)[0] == 1


async def _break(*_: object) -> None:
    raise RuntimeError("the reason is for the log")


def test_the_size_of_a_batch_is_limited(any_store_url: str, server: redis.Redis) -> None:
    async def scenario(fixture: LedgerFixture) -> None:
        before, limited = calls(server), terms(quota(2 * MAX_BATCH_ENTRIES + 1))
        asked = (
            fixture.ledger.charge(limited, Charge(Outcome.HIT, micro)) for micro in range(2 * MAX_BATCH_ENTRIES + 2)
        )
        words = list(map(word, await asyncio.gather(*asked)))
        assert Counter(words) == {"admitted": 2 * MAX_BATCH_ENTRIES + 1, "quota-exceeded": 1}
        assert calls(server) - before == 3

    run_scenario(any_store_url, scenario)
    assert used(server)[0] == 2 * MAX_BATCH_ENTRIES + 1


def test_each_request_of_a_batch_is_decided_on_its_own(any_store_url: str, server: redis.Redis) -> None:
    """A refund makes room for the next request of the batch, and a cancelled request is still counted."""
    limited = terms(quota(1))

    async def scenario(fixture: LedgerFixture) -> None:
        first = await fixture.admitted(limited)
        decide = fixture.batcher.decide
        tasks = [
            asyncio.ensure_future(decide("admit", limited, Charge(Outcome.CANCELLED))),
            asyncio.ensure_future(decide("refund", limited, FAILED, admitted_on=first.counters)),
            asyncio.ensure_future(decide("charge", limited, HIT)),
            asyncio.ensure_future(decide("peek", limited, HIT)),
        ]
        await asyncio.sleep(0)
        tasks[2].cancel()
        first_end, second_end, gone, last_end = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(gone, asyncio.CancelledError)
        assert not isinstance(first_end, BaseException)
        assert not isinstance(second_end, BaseException)
        assert not isinstance(last_end, BaseException)
        assert list(map(word, (first_end, second_end, last_end))) == ["quota-exceeded", "admitted", "quota-exceeded"]

    run_scenario(any_store_url, scenario)
    assert rows(server) == {
        "-:quota-exceeded:refused": 1,
        "-:upstream-error:refused": 1,
        "Flux:hit:requests": 1,
        "Flux:hit:credits": 4 * CREDIT,
    }
