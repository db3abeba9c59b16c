"""Quotas while the ledger is down, hangs or dies: refusals, admissions and their bookings."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import httpx2
import pytest

from faulty_rendernet import Fault
from fleet import StoreProcess, store_process
from gateway_fixture import GatewayFixture, cache_status, code_of
from lateness import assert_in_time
from proxy.store.client import COOLDOWN_S
from quota_fixture import FLUX, ONE, Limited, exceeded, explained, get, quota, requests, row, usage, used
from serving import free_port, wait_until

pytestmark = pytest.mark.usefixtures("within_a_minute")

IN_TIME_S = 0.3 + 0.05
"""Longest delay from a ledger that does not answer: its timeout plus a tolerance."""


@pytest.fixture
def ledger() -> Iterator[StoreProcess]:
    with store_process() as opened:
        yield opened


class TestWithoutTheLedger:
    def test_requests_are_refused_within_the_timeout(self, limited: Limited, valkey_url: str) -> None:
        dead = f"redis://127.0.0.1:{free_port()}"
        gateway = limited(quota(100), store={"url": dead}, cache={"url": valkey_url})
        for body in (FLUX, ONE):
            refused = gateway.ask(body)
            assert (refused.status_code, code_of(refused)) == (503, "store-unavailable")
            assert refused.headers["retry-after"] == "1"
            assert "ratelimit" not in refused.headers
            assert_in_time(refused.elapsed.total_seconds(), IN_TIME_S)
        assert gateway.simulator.calls == 0

    def test_requests_are_refused_in_time_if_the_ledger_hangs(
        self, limited: Limited, ledger: StoreProcess, valkey_url: str
    ) -> None:
        ledger.start()
        gateway = limited(quota(100), store={"url": ledger.url}, cache={"url": valkey_url})
        assert gateway.ask(FLUX).status_code == 200
        with ledger.hanging():
            refused = _refusals(gateway, for_s=3 * COOLDOWN_S)
        assert {code_of(answer) for answer in refused} == {"store-unavailable"}
        seconds = sorted(answer.elapsed.total_seconds() for answer in refused)
        waited = [elapsed for elapsed in seconds if elapsed > IN_TIME_S / 2]
        assert 1 <= len(waited) <= 3, "one wait per cool-down, not per request"
        assert_in_time(waited[0], IN_TIME_S)
        wait_until(lambda: gateway.ask(FLUX).status_code == 200)

    def test_with_on_outage_admit_requests_are_admitted_and_booked_later(
        self, limited: Limited, ledger: StoreProcess, valkey_url: str
    ) -> None:
        store = {"url": ledger.url, "on_outage": "admit"}
        gateway = limited(quota(5), requests(2), store=store, cache={"url": valkey_url})
        gateway.simulator.script(None, None, Fault.SERVER_ERROR)
        answers = [gateway.ask(body) for body in (FLUX, FLUX, ONE, b"[{},{}]")]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 502]
        assert not [answer for answer in answers if {"ratelimit", "ratelimit-policy"} & answer.headers.keys()]
        assert code_of(get(gateway, "/v1/usage")) == "store-unavailable"
        ledger.start()
        wait_until(lambda: get(gateway, "/v1/usage").status_code == 200 and usage(gateway)["requests"])
        assert usage(gateway) == row(4, Decimal("6.5"), hit=1, miss=2, upstream_error=1)
        assert used(gateway) == [Decimal("6.5"), 4]
        assert exceeded(gateway.ask(FLUX))["violated-policies"] == ["credits-month", "requests-month"]

    @pytest.mark.parametrize("on_outage", ["refuse", "admit"])
    def test_a_request_in_flight_when_the_ledger_dies_is_counted_once(
        self, on_outage: str, limited: Limited, ledger: StoreProcess, valkey_url: str
    ) -> None:
        ledger.start()
        store = {"url": ledger.url, "on_outage": on_outage}
        gateway = limited(quota(6), requests(2), store=store, cache={"url": valkey_url})
        with ThreadPoolExecutor() as pool, gateway.simulator.hold() as hold:
            asked = pool.submit(gateway.ask, FLUX)
            assert gateway.simulator.arrived(1)
            ledger.kill()
            hold.release()
            answer = asked.result()
        ledger.start()
        wait_until(lambda: get(gateway, "/v1/usage").status_code == 200)
        if on_outage == "admit":
            assert answer.status_code == 200
            wait_until(lambda: usage(gateway) == row(1, Decimal("2.75"), miss=1))
            assert used(gateway) == [Decimal("2.75"), 1]
        else:
            assert code_of(answer) == "store-unavailable"
            assert usage(gateway) == row(1, cancelled=1)
            assert used(gateway) == [0, 1]
        assert cache_status(gateway.ask(FLUX)).startswith("hit; "), "the price is not lost"

    def test_a_debit_with_unknown_outcome_is_neither_repeated_nor_answered(
        self, limited: Limited, ledger: StoreProcess, valkey_url: str
    ) -> None:
        ledger.start()
        store = {"url": ledger.url, "on_outage": "admit"}
        gateway = limited(requests(100), store=store, cache={"url": valkey_url})
        assert gateway.ask(FLUX).status_code == 200
        with ledger.hanging():
            unanswered, buffered = gateway.ask(FLUX), gateway.ask(FLUX)
        assert (code_of(unanswered), buffered.status_code) == ("store-unavailable", 200)
        assert gateway.metrics.unanswered_debits._value.get() == 1
        wait_until(lambda: gateway.metrics.buffered_debits._value.get() == 0)
        assert used(gateway)[0] in {2, 3}
        assert usage(gateway)["requests"] == used(gateway)[0]

    def test_an_explanation_has_no_price(self, limited: Limited, valkey_url: str) -> None:
        limited().ask(FLUX)
        dead = f"redis://127.0.0.1:{free_port()}"
        gateway = limited(store={"url": dead}, cache={"url": valkey_url})
        explanation = explained(gateway)
        assert (explanation["stored"], explanation["admitted"], explanation["degraded"]) == (True, None, ["ledger"])
        assert "estimated" not in explanation, "an estimate would be refused"

    def test_without_only_the_price_book_estimates_are_served_and_counted(self, limited: Limited) -> None:
        gateway = limited(quota(6), requests(100), cache={"url": f"redis://127.0.0.1:{free_port()}"})
        answers = [gateway.ask(FLUX) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 402]
        assert {cache_status(answer) for answer in answers} == {"fwd=bypass; detail=store-unavailable"}
        assert gateway.simulator.calls == 3
        assert used(gateway) == [Decimal("5.5"), 2]
        assert usage(gateway) == row(2, Decimal("5.5"), refused=1, bypass=2, quota_exceeded=1)


def _refusals(gateway: GatewayFixture, *, for_s: float) -> list[httpx2.Response]:
    until, refused = time.monotonic() + for_s, []
    while time.monotonic() < until:
        refused.append(gateway.ask(FLUX))
    return refused
