"""Rates as a team meets them: over sockets, with a real ledger, the simulator as upstream."""

import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal

import httpx2
import pytest

from faulty_rendernet import Fault
from gateway_fixture import MARKETING, Scene, code_of
from proxy.quota.counters import LedgerKeys
from quota_scenes import FLUX, ONE, SEGMENT, Limited, get, limits, quota, rate, requests, row, shown, usage, used

pytestmark = pytest.mark.usefixtures("within_a_minute")

KEYS = LedgerKeys("default")


def rate_left(scene: Scene) -> int:
    left: int = shown(scene, "/v1/quota")["rate"]["remaining"]
    return left


def rest(scene: Scene, seconds: int) -> None:
    """As if `design` had last asked so much longer ago."""
    scene.store.incrby(KEYS.rate("design"), -1_000_000 * seconds)


class TestRate:
    def test_after_its_burst_a_team_is_told_to_wait_and_nothing_is_used(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100), rate=rate(3, per_s=0.1))
        assert [scene.ask(FLUX).status_code for _ in range(3)] == [200] * 3
        before = used(scene), scene.simulator.calls
        for body in (FLUX, ONE):
            refused = scene.ask(body)
            assert (refused.status_code, code_of(refused)) == (429, "rate-limited")
            assert refused.headers["retry-after"] in {"9", "10"}
            assert limits(refused)["rate"]["r"] == 0
        assert (used(scene), scene.simulator.calls) == before == ([Decimal("8.25"), 3], 1)
        assert usage(scene) == row(3, Decimal("8.25"), refused=2, hit=2, miss=1, rate_limited=2)

    def test_it_comes_back_when_it_was_told_to_and_not_before(self, limited: Limited) -> None:
        scene = limited(rate=rate(2, per_s=0.1))
        assert [scene.ask().status_code for _ in range(3)] == [200, 200, 429]
        rest(scene, 8)
        early = scene.ask()
        assert early.status_code == 429
        rest(scene, int(early.headers["retry-after"]))
        assert [scene.ask().status_code for _ in range(2)] == [200, 429]
        rest(scene, 1000)
        assert [scene.ask().status_code for _ in range(3)] == [200, 200, 429], "more than a burst was saved up"

    def test_in_any_time_no_more_than_the_rate_and_a_burst(self, limited: Limited) -> None:
        scene = limited(rate=rate(5, per_s=20))
        started, statuses = time.monotonic(), Counter[int]()
        while (elapsed_s := time.monotonic() - started) < 0.5:
            statuses[scene.ask().status_code] += 1
        elapsed_s = time.monotonic() - started
        assert 5 < statuses[200] <= 5 + 20 * elapsed_s + 1
        assert statuses[429] > 0

    def test_a_rate_is_a_teams_own(self, limited: Limited) -> None:
        scene = limited(rate=rate(1))
        assert [scene.ask().status_code for _ in range(2)] == [200, 429]
        assert scene.ask(x_api_key=MARKETING).status_code == 200

    def test_what_takes_from_it(self, limited: Limited) -> None:
        scene = limited(requests(3), rate=rate(100))
        scene.simulator.script(None, Fault.SERVER_ERROR)
        taken = [
            _taken(scene, 200, lambda: scene.ask(FLUX)),
            _taken(scene, 502, lambda: scene.ask(ONE)),
            _taken(scene, 200, lambda: scene.ask(FLUX)),
            _taken(scene, 429, lambda: scene.ask(FLUX)),
            _taken(scene, 504, lambda: scene.ask(SEGMENT, cache_control="only-if-cached")),
            _taken(scene, 200, lambda: scene.client.post("/v1/explain", content=FLUX)),
            _taken(scene, 400, lambda: scene.ask(b"{}")),
            _taken(scene, 401, lambda: scene.ask(x_api_key="ep_nobody")),
            _taken(scene, 200, lambda: get(scene, "/v1/usage")),
            _taken(scene, 200, lambda: get(scene, "/v1/quota")),
        ]
        assert taken == [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]


def _taken(scene: Scene, status: int, ask: Callable[[], httpx2.Response]) -> int:
    before = rate_left(scene)
    assert ask().status_code == status
    return before - rate_left(scene)
