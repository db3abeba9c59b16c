"""`Estimate-Proxy-Max-Credits`: the ceiling on an estimate, with a real ledger and the simulator as upstream."""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Coroutine
from decimal import Decimal
from typing import Any

import httpx2
import pytest
import redis

from gateway_fixture import GatewayFixture, OpenGateway, answers, cache_status, code_of
from ledger_fixture import CREDIT, LedgerFixture, rows, run_scenario, terms, word
from ledger_fixture import quota as quota_of
from ledger_fixture import used as used_in
from proxy.problems import Outcome
from proxy.quota.ledger import Admitted, Denied
from proxy.quota.quotas import Charge, Quota
from quota_fixture import (
    FLUX,
    ONE,
    Limited,
    exactly,
    exceeded,
    explained,
    left,
    quota,
    rate,
    requests,
    row,
    usage,
    used,
)

pytestmark = pytest.mark.usefixtures("within_a_minute")

PRICE = Decimal("2.75")
"""Of `FLUX`."""


def ask(gateway: GatewayFixture, ceiling: str, body: bytes = FLUX, **headers: str) -> httpx2.Response:
    return gateway.ask(body, estimate_proxy_max_credits=ceiling, **headers)


def over(response: httpx2.Response, ceiling: float | Decimal, estimated: Decimal = PRICE) -> Any:
    """The problem of an estimate over its ceiling."""
    assert (response.status_code, code_of(response)) == (402, "over-ceiling"), response.text
    problem = exactly(response)
    assert (problem["estimated"], problem["ceiling"]) == (estimated, ceiling)
    return problem


class TestCeiling:
    def test_a_miss_over_it_keeps_its_request_and_its_price_is_stored(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100))
        response = ask(gateway, "2.5")
        assert over(response, Decimal("2.5"))["detail"] == (
            "The estimate is 2.75 credits, and the request accepts at most 2.5: make the generation cheaper, or raise "
            "Estimate-Proxy-Max-Credits."
        )
        assert cache_status(response).startswith("fwd=miss; fwd-status=200; stored")
        assert left(response) == {"credits-month": 100, "requests-month": 99}
        assert used(gateway) == [0, 1]
        assert usage(gateway) == row(1, over_ceiling=1)
        assert cache_status(gateway.ask(FLUX)).startswith("hit")
        assert gateway.simulator.calls == 1

    def test_a_hit_over_it_debits_nothing_but_the_rate(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100), rate=rate(3))
        assert gateway.ask(FLUX).status_code == 200
        response = ask(gateway, "2.749999")
        over(response, Decimal("2.749999"))
        assert cache_status(response).startswith("hit; ttl=")
        assert used(gateway) == [PRICE, 1]
        assert ask(gateway, "2.75").status_code == 200
        assert code_of(ask(gateway, "0")) == "rate-limited"
        assert used(gateway) == [2 * PRICE, 2]
        assert usage(gateway) == row(2, 2 * PRICE, refused=2, hit=1, miss=1, over_ceiling=1, rate_limited=1)

    @pytest.mark.parametrize("ceiling", ["2.75", "2.750000", "003", "3", "1000000", "9" * 4500, "9" * 4500 + ".5"])
    def test_a_price_that_is_not_higher_is_answered(self, ceiling: str, gateway: GatewayFixture) -> None:
        assert [ask(gateway, ceiling).json()["data"]["estimated"] for _ in range(2)] == [2.75, 2.75]

    @pytest.mark.parametrize("estimated", [b"20.0000001", b"2.00000000000000000000000000000000001e1", b"20.1"])
    def test_the_comparison_is_exact(self, estimated: bytes, gateway: GatewayFixture) -> None:
        gateway.simulator.script(answers(b'{"data":{"estimated":%b,"balance":9},"error":{}}' % estimated))
        for _ in range(2):
            response = ask(gateway, "20")
            assert estimated in response.content, "as RenderNet wrote it"
            over(response, 20, Decimal(estimated.decode()))
        assert ask(gateway, "20.2").status_code == 200

    @pytest.mark.parametrize(
        "ceiling", ["", "-1", "+1", "1e3", ".5", "5.", "1.0000001", "1,5", "1_000", "0x10", "NaN", "1 2", "\u0663"]
    )
    def test_anything_but_a_plain_number_is_refused(self, ceiling: str, gateway: GatewayFixture) -> None:
        headers: Any = [("x-api-key", gateway.client.headers["x-api-key"])]
        headers.append(("estimate-proxy-max-credits", ceiling.encode()))
        response = gateway.client.post("/pub/v1/generations/estimate", content=FLUX, headers=headers)
        assert (response.status_code, code_of(response)) == (400, "invalid-request")
        assert response.json()["detail"] == (
            "Estimate-Proxy-Max-Credits must be a number of credits with at most 6 decimals, such as 20 or 2.5."
        )
        assert gateway.simulator.calls == 0

    def test_a_repeated_header_is_refused(self, gateway: GatewayFixture) -> None:
        headers: Any = [("estimate-proxy-max-credits", "3"), ("estimate-proxy-max-credits", "4")]
        response = gateway.client.post("/pub/v1/generations/estimate", content=FLUX, headers=headers)
        assert (response.status_code, code_of(response)) == (400, "invalid-request")
        assert "sent 2 times" in response.json()["detail"]

    @pytest.mark.parametrize("known", [True, False])
    def test_a_quota_that_would_refuse_the_estimate_hides_its_price(self, known: bool, limited: Limited) -> None:  # noqa: FBT001
        gateway = limited(quota(2.5), requests(100))
        if known:
            assert code_of_quota(gateway.ask(FLUX)) == "quota-exceeded"
        booked = usage(gateway)["refused"]
        response = ask(gateway, "2")
        problem = exceeded(response)
        assert problem["quota"]["requested"] is None
        assert "this estimate needs more, more than" not in problem["detail"]
        assert problem["detail"].endswith("and this estimate needs more than the whole quota.")
        assert "2.75" not in response.text
        assert "estimated" not in problem
        assert used(gateway) == [0, 0], "as the refusal of an estimate without a ceiling"
        assert usage(gateway) == row(0, 0, refused=booked + 1, quota_exceeded=booked + 1)

    def test_a_used_up_quota_refuses_before_rendernet_is_asked(self, limited: Limited) -> None:
        gateway = limited(quota(1))
        gateway.ask(ONE)
        exceeded(ask(gateway, "2"))
        assert gateway.simulator.calls == 1

    def test_a_quota_on_requests_refuses_as_without_a_ceiling(self, limited: Limited) -> None:
        gateway = limited(requests(1))
        gateway.ask(FLUX)
        problem = exceeded(ask(gateway, "1"), 429)
        assert problem["quota"]["requested"] == 1

    def test_a_warning_quota_is_not_passed_by_a_refusal(self, limited: Limited) -> None:
        gateway = limited(quota(3, on_exceed="warn"))
        gateway.ask(FLUX)
        response = ask(gateway, "1")
        over(response, 1)
        assert "estimate-proxy-warning" not in response.headers

    @pytest.mark.usefixtures("cold")
    def test_a_stale_price_is_checked_and_refreshed(self, open_gateway: OpenGateway) -> None:
        gateway = open_gateway(cache={"ttl_s": 100, "stale_while_revalidate_s": 1000})
        gateway.ask(FLUX)
        gateway.age(500)
        response = ask(gateway, "2", cache_control="max-age=600")
        over(response, 2)
        assert "detail=stale-while-revalidate" in cache_status(response)
        assert gateway.simulator.arrived(2), "else the client could not see a price that has fallen"

    @pytest.mark.usefixtures("cold")
    def test_a_stale_price_after_a_failure_is_checked(self, limited: Limited) -> None:
        gateway = limited(requests(100), cache={"ttl_s": 100, "stale_while_revalidate_s": 0})
        gateway.ask(FLUX)
        gateway.age(500)
        gateway.simulator.script(answers(b"{}", 500))
        response = ask(gateway, "2")
        over(response, 2)
        assert "detail=stale-if-error" in cache_status(response)
        assert used(gateway) == [2], "RenderNet was asked"

    @pytest.mark.usefixtures("cold")
    @pytest.mark.parametrize("limit", [100, 4])
    def test_a_request_that_was_not_sent_uses_no_quota(self, limit: int, limited: Limited) -> None:
        """RenderNet has asked for a pause, so the gateway serves a stale price without asking."""
        gateway = limited(quota(limit), requests(100), cache={"ttl_s": 100, "stale_while_revalidate_s": 0})
        gateway.ask(FLUX)
        gateway.age(500)
        gateway.simulator.script(answers(b"{}", 429, retry_after="600"))
        assert code_of(gateway.ask(ONE)) == "upstream-busy"
        before = used(gateway)
        response = ask(gateway, "2")
        if limit == 4:
            assert exceeded(response)["quota"]["requested"] is None
        else:
            over(response, 2)
            assert cache_status(response).startswith("hit; ttl=-")
        assert used(gateway) == before
        assert gateway.simulator.calls == 2

    def test_an_answer_without_a_price_passes(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(answers(b'{"data":{"balance":9},"error":{}}'))
        response = ask(gateway, "0")
        assert (response.status_code, response.json()["data"]) == (200, {"balance": 9})

    def test_other_endpoints_have_no_ceiling(self, gateway: GatewayFixture) -> None:
        gateway.ask(FLUX)
        assert explained(gateway)["estimated"] == PRICE


def code_of_quota(response: httpx2.Response) -> str:
    return str(response.json()["error"]["code"])


@pytest.mark.parametrize("quotas", [(), (quota_of(10**15, "estimated_credits"), quota_of(10**9, scope="org"))])
def test_thousands_at_once_around_a_ceiling_are_booked_exactly(
    quotas: tuple[Quota, ...], any_store_url: str, server: redis.Redis
) -> None:
    """As many as `CEILING_REQUESTS` says."""
    count, chance = int(os.environ.get("CEILING_REQUESTS", "600")), random.Random(7)
    prices = [chance.randrange(2 * CREDIT) for _ in range(count)]
    within = [price for price in prices if price <= CREDIT]

    async def scenario(fixture: LedgerFixture) -> None:
        limits = terms(*quotas)

        def asked(price: int) -> Coroutine[Any, Any, Admitted | Denied]:
            if price > CREDIT:
                return fixture.ledger.refuse_over_ceiling(limits, Charge(Outcome.OVER_CEILING, price, "Flux"))
            return fixture.ledger.charge(limits, Charge(Outcome.HIT, price, "Flux"))

        assert set(map(word, await asyncio.gather(*map(asked, prices)))) == {"admitted"}

    run_scenario(any_store_url, scenario)
    assert used_in(server) == used_in(server, None) == (len(within), sum(within))
    assert rows(server)["-:over-ceiling:refused"] == count - len(within)


def test_a_quota_that_runs_out_among_them_is_used_up_exactly(any_store_url: str, server: redis.Redis) -> None:
    """The last credits go to estimates within the ceiling; those over it never use any."""

    async def scenario(fixture: LedgerFixture) -> None:
        limits = terms(quota_of(50 * CREDIT, "estimated_credits"))
        over_it, within = Charge(Outcome.OVER_CEILING, CREDIT, "Flux"), Charge(Outcome.HIT, CREDIT, "Flux")
        calls = (fixture.ledger.refuse_over_ceiling(limits, over_it), fixture.ledger.charge(limits, within))
        admitted = [word(end) for end in await asyncio.gather(*calls)]
        assert admitted == ["admitted"] * 2
        ends = await asyncio.gather(
            *(fixture.ledger.refuse_over_ceiling(limits, over_it) for _ in range(100)),
            *(fixture.ledger.charge(limits, within) for _ in range(100)),
            *(fixture.ledger.refuse_over_ceiling(limits, over_it) for _ in range(100)),
        )
        words = list(map(word, ends))
        assert Counter(words[:100]) == {"admitted": 100}
        assert Counter(words[100:200]) == {"admitted": 49, "quota-exceeded": 51}
        assert Counter(words[200:]) == {"quota-exceeded": 100}

    run_scenario(any_store_url, scenario)
    assert used_in(server) == (50, 50 * CREDIT)
    assert rows(server)["-:over-ceiling:refused"] == 101
