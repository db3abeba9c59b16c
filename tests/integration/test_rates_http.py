"""Rate limits over HTTP, with a real ledger and the simulator as upstream."""

import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal

import httpx2
import pytest

from faulty_rendernet import Fault
from gateway_fixture import MARKETING, GatewayFixture, code_of
from proxy.quota.counters import LedgerKeys
from quota_fixture import FLUX, ONE, SEGMENT, Limited, get, limits, quota, rate, requests, row, shown, usage, used

pytestmark = pytest.mark.usefixtures("within_a_minute")

KEYS = LedgerKeys("default")


def rate_left(gateway: GatewayFixture) -> int:
    left: int = shown(gateway, "/v1/quota")["rate"]["remaining"]
    return left


def rest(gateway: GatewayFixture, seconds: int) -> None:
    """Ages the rate's state of `design`, as if time had passed."""
    gateway.store.incrby(KEYS.rate("design"), -1_000_000 * seconds)


class TestRate:
    def test_after_its_burst_a_team_is_refused_and_uses_nothing(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100), rate=rate(3, per_s=0.1))
        assert [gateway.ask(FLUX).status_code for _ in range(3)] == [200] * 3
        before = used(gateway), gateway.simulator.calls
        for body in (FLUX, ONE):
            refused = gateway.ask(body)
            assert (refused.status_code, code_of(refused)) == (429, "rate-limited")
            assert refused.headers["retry-after"] in {"9", "10"}
            assert limits(refused)["rate"]["r"] == 0
        assert (used(gateway), gateway.simulator.calls) == before == ([Decimal("8.25"), 3], 1)
        assert usage(gateway) == row(3, Decimal("8.25"), refused=2, hit=2, miss=1, rate_limited=2)

    def test_a_request_is_admitted_after_retry_after_and_not_before(self, limited: Limited) -> None:
        gateway = limited(rate=rate(2, per_s=0.1))
        assert [gateway.ask().status_code for _ in range(3)] == [200, 200, 429]
        rest(gateway, 8)
        early = gateway.ask()
        assert early.status_code == 429
        rest(gateway, int(early.headers["retry-after"]))
        assert [gateway.ask().status_code for _ in range(2)] == [200, 429]
        rest(gateway, 1000)
        assert [gateway.ask().status_code for _ in range(3)] == [200, 200, 429], "more than a burst accumulated"

    def test_no_more_requests_are_admitted_than_the_rate_and_a_burst(self, limited: Limited) -> None:
        gateway = limited(rate=rate(5, per_s=20))
        started, statuses = time.monotonic(), Counter[int]()
        while (elapsed_s := time.monotonic() - started) < 0.5:
            statuses[gateway.ask().status_code] += 1
        elapsed_s = time.monotonic() - started
        assert 5 < statuses[200] <= 5 + 20 * elapsed_s + 1
        assert statuses[429] > 0

    def test_each_team_has_its_own_rate(self, limited: Limited) -> None:
        gateway = limited(rate=rate(1))
        assert [gateway.ask().status_code for _ in range(2)] == [200, 429]
        assert gateway.ask(x_api_key=MARKETING).status_code == 200

    def test_which_requests_count_for_the_rate(self, limited: Limited) -> None:
        gateway = limited(requests(3), rate=rate(100))
        gateway.simulator.script(None, Fault.SERVER_ERROR)
        taken = [
            _taken(gateway, 200, lambda: gateway.ask(FLUX)),
            _taken(gateway, 502, lambda: gateway.ask(ONE)),
            _taken(gateway, 200, lambda: gateway.ask(FLUX)),
            _taken(gateway, 429, lambda: gateway.ask(FLUX)),
            _taken(gateway, 504, lambda: gateway.ask(SEGMENT, cache_control="only-if-cached")),
            _taken(gateway, 200, lambda: gateway.client.post("/v1/explain", content=FLUX)),
            _taken(gateway, 400, lambda: gateway.ask(b"{}")),
            _taken(gateway, 401, lambda: gateway.ask(x_api_key="ep_nobody")),
            _taken(gateway, 200, lambda: get(gateway, "/v1/usage")),
            _taken(gateway, 200, lambda: get(gateway, "/v1/quota")),
        ]
        assert taken == [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]


def _taken(gateway: GatewayFixture, status: int, ask: Callable[[], httpx2.Response]) -> int:
    before = rate_left(gateway)
    assert ask().status_code == status
    return before - rate_left(gateway)
