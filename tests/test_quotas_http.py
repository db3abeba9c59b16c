"""Rates, quotas and usage as a team meets them: over sockets, with a real ledger, the simulator as upstream.

Windows begin and end at whole minutes: each test has some seconds without one.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import http_sf
import httpx2
import pytest

from conftest import Opened
from fleet import OwnLedger, own_ledger
from processes import Tree
from proxy.circuit import MIN_ANSWERS
from proxy.models import MAX_MODELS
from proxy.sheets import LedgerKeys
from proxy.simulator import Fault, Handler
from proxy.store import REST_S
from proxy.teams import digest_of, token_of
from scene import DESIGN, EXPIRED, MARKETING, PATH, PLENTY, RETIRED, Scene, answers, cache_status, code_of
from serving import free_port, wait_until

ADMIN = token_of("a" * 32)
KEYS = LedgerKeys("default")

ONE, FLUX, SEGMENT = b"[{}]", b'[{"model":"Flux"}]', b'[{"segment":{}}]'
"""1, 2.75 and 5 credits at the simulator's."""

SLOW = 0.001
"""A rate that gives nothing back while a test runs."""

MORNING = "UTC" if datetime.now(UTC).hour < 12 else "Etc/GMT+12"
"""A zone where no day ends within hours."""

IN_TIME_S = 0.3 + 0.05
"""What a ledger that does not answer may cost: the time it is given, and a little."""

Limited = Callable[..., Scene]


def quota(
    limit: float, per: str = "month", measure: str = "estimated_credits", on_exceed: str = "refuse"
) -> dict[str, Any]:
    return {"measure": measure, "limit": limit, "per": per, "on_exceed": on_exceed}


def requests(limit: int, per: str = "month", on_exceed: str = "refuse") -> dict[str, Any]:
    return quota(limit, per, "requests", on_exceed)


def team(token: str, *quotas: Tree, **more: Any) -> Tree:
    return {"tokens": [digest_of(token)], "quotas": list(quotas), **more}


def rate(burst: int, per_s: float = SLOW) -> Tree:
    return {"per_s": per_s, "burst": burst}


def priced(estimated: str) -> Handler:
    return answers(b'{"data":{"estimated":%b,"balance":7},"error":{}}' % estimated.encode())


def exactly(response: httpx2.Response) -> Any:
    """Its JSON, numbers with all their digits."""
    return json.loads(response.text, parse_float=Decimal)


def get(scene: Scene, path: str, token: str = DESIGN) -> httpx2.Response:
    return scene.client.get(path, headers={"x-api-key": token})


def shown(scene: Scene, path: str, token: str = DESIGN) -> Any:
    response = get(scene, path, token)
    assert response.status_code == 200, response.text
    return exactly(response)


def usage(scene: Scene, token: str = DESIGN) -> Any:
    return shown(scene, "/v1/usage", token)["total"]


def by_model(scene: Scene, token: str = DESIGN) -> dict[str, Any]:
    rows = shown(scene, "/v1/usage?by=model", token)["rows"]
    return {row.pop("model"): row for row in rows}


def row(requests: int = 0, credits_: float | Decimal = 0, refused: int = 0, **outcomes: int) -> Tree:
    """What usage shows of a group."""
    named = {name.replace("_", "-"): count for name, count in outcomes.items()}
    return {"requests": requests, "refused": refused, "estimated_credits": credits_, "outcomes": named}


def used(scene: Scene, token: str = DESIGN) -> list[Any]:
    """Of each quota, the team's and then the organisation's."""
    return [quota["used"] for quota in shown(scene, "/v1/quota", token)["quotas"]]


def rate_left(scene: Scene) -> int:
    left: int = shown(scene, "/v1/quota")["rate"]["remaining"]
    return left


def rest(scene: Scene, seconds: int) -> None:
    """As if `design` had last asked so much longer ago."""
    scene.store.incrby(KEYS.rate("design"), -1_000_000 * seconds)


def exceeded(response: httpx2.Response, status: int = 402) -> Any:
    """The problem that a quota makes, in both envelopes; it discloses no estimate."""
    problem = exactly(response)
    assert (response.status_code, problem["status"]) == (status, status), response.text
    assert problem["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert problem["error"] == {"code": "quota-exceeded", "message": problem["detail"]}
    assert problem["data"] is None
    assert problem["request_id"] == response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    assert "estimate-proxy-warning" not in response.headers
    return problem


def field(response: httpx2.Response, name: str) -> dict[str, dict[str, Any]]:
    """A structured field that is a list of strings, with their parameters."""
    items: Any = http_sf.parse(response.headers[name].encode(), tltype="list")
    assert {type(item) for item, _ in items} <= {str}, "a token is no string"
    assert len(dict(items)) == len(items)
    return dict(items)


def limits(response: httpx2.Response) -> dict[str, dict[str, Any]]:
    return field(response, "ratelimit")


def left(response: httpx2.Response) -> dict[str, int]:
    """What is left by `RateLimit`, but for the rate."""
    return {name: members["r"] for name, members in limits(response).items() if name != "rate"}


def policies(response: httpx2.Response) -> dict[str, dict[str, Any]]:
    return field(response, "ratelimit-policy")


@pytest.fixture(autouse=True)
def _within_a_minute() -> None:
    wait_until(lambda: time.time() % 60 < 55)


@pytest.fixture
def limited(open_gateway: Opened) -> Limited:
    """Opens a gateway whose team `design` has these quotas; there is a token for its operator."""

    def enter(*quotas: Tree, rate: Tree = PLENTY, teams: Tree | None = None, **sections: Tree) -> Scene:
        sections["teams"] = {"design": team(DESIGN, *quotas, rate=rate)} | (teams or {})
        return open_gateway(admin={"tokens": [digest_of(ADMIN)]}, **sections)

    return enter


@pytest.fixture
def ledger() -> Iterator[OwnLedger]:
    with own_ledger() as opened:
        yield opened


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


SCOPES = ["team", "org"]


def limiting(limited: Limited, scope: str, *quotas: Tree, **sections: Tree) -> Scene:
    return limited(*quotas, **sections) if scope == "team" else limited(org={"quotas": list(quotas)}, **sections)


class TestQuotas:
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize(("measure", "status"), [("requests", 429), ("estimated_credits", 402)])
    def test_one_that_is_used_up_refuses(self, scope: str, measure: str, status: int, limited: Limited) -> None:
        scene = limiting(limited, scope, quota(2, "month", measure), org_quota := requests(50, "week"))
        assert [scene.ask(ONE).status_code for _ in range(2)] == [200, 200]
        for body in (ONE, FLUX):
            problem = exceeded(scene.ask(body), status)
            own = {key: problem["quota"][key] for key in ("scope", "measure", "per", "limit", "used")}
            assert own == {"scope": scope, "measure": measure, "per": "month", "limit": 2, "used": 2}
            name = ("org-" if scope == "org" else "") + ("requests" if measure == "requests" else "credits")
            assert problem["violated-policies"] == [f"{name}-month"]
            assert problem["detail"].startswith("0 of the ")
        assert used(scene) == [2, 2], org_quota
        assert usage(scene) == row(2, 2, refused=2, hit=1, miss=1, quota_exceeded=2)
        assert scene.simulator.calls == 1
        other = scene.ask(ONE, x_api_key=MARKETING)
        assert other.status_code == (200 if scope == "team" else status)

    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("measure", ["requests", "estimated_credits"])
    def test_one_that_warns_counts_flags_and_admits(self, scope: str, measure: str, limited: Limited) -> None:
        scene = limiting(limited, scope, quota(2, "month", measure, "warn"), quota(100, "day"))
        answers_ = [scene.ask(ONE) for _ in range(4)]
        assert [answer.status_code for answer in answers_] == [200] * 4
        name = ("org-" if scope == "org" else "") + ("requests-month" if measure == "requests" else "credits-month")
        warnings = [answer.headers.get("estimate-proxy-warning") for answer in answers_]
        assert warnings == [None, None, f'"{name}"', f'"{name}"'], "a quota is passed when more than it is used"
        assert field(answers_[3], "estimate-proxy-warning") == {name: {}}
        assert [left(answer)[name] for answer in answers_] == [1, 0, 0, 0]
        assert used(scene) == [4, 4]
        assert usage(scene) == row(4, 4, hit=3, miss=1)

    @pytest.mark.parametrize("per", ["minute", "hour", "day", "week", "month"])
    def test_its_end_is_told_and_to_come_back_only_within_the_hour(self, per: str, limited: Limited) -> None:
        scene = limited(requests(1, per), org={"timezone": MORNING})
        now = datetime.now(ZoneInfo(MORNING))
        scene.ask()
        refused = scene.ask()
        quota = exceeded(refused, 429)["quota"]
        end = _end_of(per, now)
        assert (datetime.fromisoformat(quota["resets_at"]), quota["requested"]) == (end, 1)
        seconds = round((end - now).total_seconds())
        assert seconds - 3 <= limits(refused)[f"requests-{per}"]["t"] <= seconds + 1
        if per in {"minute", "hour"}:
            assert int(refused.headers["retry-after"]) == limits(refused)[f"requests-{per}"]["t"]
        else:
            assert "retry-after" not in refused.headers

    def test_credits_are_not_to_be_waited_for(self, limited: Limited) -> None:
        scene = limited(quota(1, "minute"))
        assert [scene.ask(ONE).status_code, scene.ask(ONE).status_code] == [200, 402]
        assert "retry-after" not in scene.ask(ONE).headers

    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize(("measure", "status"), [("requests", 429), ("estimated_credits", 402)])
    def test_a_limit_of_0_refuses_all(self, scope: str, measure: str, status: int, limited: Limited) -> None:
        limited().ask(FLUX, x_api_key=MARKETING)
        scene = limiting(limited, scope, quota(0, "day", measure))
        calls = scene.simulator.calls
        assert [scene.ask(body).status_code for body in (FLUX, ONE)] == [status] * 2
        assert exceeded(scene.ask(FLUX), status)["quota"]["limit"] == 0
        assert scene.simulator.calls == calls
        assert used(scene)[0] == (0 if scope == "team" else 1 if measure == "requests" else Decimal("2.75"))

    def test_a_limit_of_0_that_warns_admits(self, limited: Limited) -> None:
        scene = limited(quota(0, on_exceed="warn"), requests(0, on_exceed="warn"))
        answer = scene.ask(ONE)
        assert answer.status_code == 200
        assert list(field(answer, "estimate-proxy-warning")) == ["credits-month", "requests-month"]

    def test_a_hit_that_would_pass_it_is_refused_and_shows_no_more_than_what_it_asked_for(
        self, limited: Limited
    ) -> None:
        scene = limited(quota(5), requests(10))
        assert scene.ask(FLUX).status_code == 200
        refused = scene.ask(FLUX)
        problem = exceeded(refused)
        assert problem["quota"] == {
            "scope": "team",
            "measure": "estimated_credits",
            "per": "month",
            "limit": 5,
            "used": Decimal("2.75"),
            "requested": Decimal("2.75"),
            "resets_at": _end_of("month", datetime.now(UTC)).isoformat(),
        }
        assert problem["detail"].startswith("This estimate needs more than is left: 2.25 of the team's 5 ")
        assert {"cache-status", "age", "estimate-proxy-balance-age"}.isdisjoint(refused.headers)
        assert "balance" not in refused.text
        assert used(scene) == [Decimal("2.75"), 1]

    def test_a_miss_that_passes_it_debits_nothing_and_leaves_its_price_to_others(self, limited: Limited) -> None:
        scene = limited(quota(2), requests(10))
        problem = exceeded(refused := scene.ask(FLUX))
        assert (problem["quota"]["used"], problem["quota"]["requested"]) == (0, Decimal("2.75"))
        assert left(refused) == {"credits-month": 2, "requests-month": 10}
        assert (scene.simulator.calls, used(scene)) == (1, [0, 0])
        assert usage(scene) == row(refused=1, quota_exceeded=1)
        assert cache_status(scene.ask(FLUX, x_api_key=MARKETING)).startswith("hit; ")
        assert [scene.ask(ONE).status_code for _ in range(3)] == [200, 200, 402]
        assert (scene.simulator.calls, used(scene)) == (2, [2, 2])

    def test_a_miss_whose_price_would_not_fit_is_asked_and_one_with_nothing_left_is_not(self, limited: Limited) -> None:
        scene = limited(quota(2.75))
        assert scene.ask(FLUX).status_code == 200, "the very last credit may be used"
        problem = exceeded(scene.ask(ONE))
        assert (problem["quota"]["used"], problem["quota"]["requested"]) == (Decimal("2.75"), None)
        assert scene.simulator.calls == 1

    def test_nothing_of_a_refused_request_is_counted_anywhere(self, limited: Limited) -> None:
        org = {"quotas": [quota(3), requests(9, "day", "warn")]}
        scene = limited(requests(9, "week"), quota(9, "day"), org=org)
        assert scene.ask(ONE).status_code == 200
        for body in (FLUX, FLUX):  # a miss, and then a hit
            assert exceeded(scene.ask(body))["violated-policies"] == ["org-credits-month"]
        assert used(scene) == [1, 1, 1, 1]

    def test_all_that_are_violated_are_named_and_the_teams_first_is_explained(self, limited: Limited) -> None:
        org = {"quotas": [requests(2, "day"), quota(2, "week", on_exceed="warn"), quota(2)]}
        scene = limited(quota(2), requests(5), requests(2, "week"), org=org)
        assert [scene.ask(ONE).status_code for _ in range(2)] == [200, 200]
        problem = exceeded(scene.ask(ONE))
        expected = ["credits-month", "requests-week", "org-requests-day", "org-credits-month"]
        assert problem["violated-policies"] == expected
        assert (problem["quota"]["scope"], problem["quota"]["per"]) == ("team", "month")

    def test_a_teams_quotas_stand_in_place_of_the_defaults(self, limited: Limited) -> None:
        defaults = {"rate": rate(100), "quotas": [requests(1)]}
        teams = {"marketing": {"tokens": [digest_of(MARKETING)]}, "retired": team(RETIRED)}
        scene = limited(quota(100), team_defaults=defaults, teams=teams)
        assert [scene.ask().status_code for _ in range(2)] == [200, 200]
        assert [scene.ask(x_api_key=MARKETING).status_code for _ in range(2)] == [200, 429]
        assert [scene.ask(x_api_key=RETIRED).status_code for _ in range(2)] == [200, 200], "its own are none"

    def test_the_organisations_counts_all_teams(self, limited: Limited) -> None:
        scene = limited(org={"quotas": [quota(6), requests(100)]})
        assert [scene.ask(FLUX, x_api_key=token).status_code for token in (DESIGN, MARKETING)] == [200, 200]
        for token in (DESIGN, MARKETING):
            assert exceeded(scene.ask(FLUX, x_api_key=token))["quota"]["used"] == Decimal("5.5")
        assert used(scene) == used(scene, MARKETING) == [Decimal("5.5"), 2]
        rows = {row["team"]: row["estimated_credits"] for row in shown(scene, "/v1/usage?by=team", ADMIN)["rows"]}
        assert rows == {"design": Decimal("2.75"), "marketing": Decimal("2.75")}
        assert usage(scene, ADMIN) == row(2, Decimal("5.5"), refused=2, hit=1, miss=1, quota_exceeded=2)

    @pytest.mark.parametrize("measure", ["requests", "estimated_credits"])
    def test_many_at_once_do_not_pass_it(self, measure: str, limited: Limited) -> None:
        scene = limited(quota(20, "month", measure))
        with ThreadPoolExecutor(50) as pool, scene.simulator.hold() as hold:
            asked = [pool.submit(scene.ask, b'[{"seed":%d}]' % (number % 40)) for number in range(200)]
            assert scene.simulator.arrived(20)
            hold.release()
            statuses = Counter(future.result().status_code for future in asked)
        assert statuses == {200: 20, 429 if measure == "requests" else 402: 180}
        assert used(scene) == [20]
        total = usage(scene)
        assert (total["requests"], total["refused"], total["estimated_credits"]) == (20, 180, 20)


def _end_of(per: str, now: datetime) -> datetime:
    """Of the window that `now` lies in, where clocks are not shifted."""
    minute = now.replace(second=0, microsecond=0)
    day = minute.replace(hour=0, minute=0)
    ends = {
        "minute": minute + timedelta(minutes=1),
        "hour": minute.replace(minute=0) + timedelta(hours=1),
        "day": day + timedelta(days=1),
        "week": day + timedelta(days=7 - day.weekday()),
        "month": (day.replace(day=1) + timedelta(days=32)).replace(day=1),
    }
    return ends[per]


FAILURES: dict[str, tuple[Fault | Handler, int]] = {
    "upstream-error": (Fault.SERVER_ERROR, 502),
    "upstream-rejected": (answers(b'{"data":null,"error":{"code":"no_such_style"}}', 422), 422),
    "upstream-refused": (Fault.REFUSED_KEY, 502),
    "upstream-busy": (Fault.BUSY, 503),
    "upstream-timeout": (Fault.HANG, 504),
    "unpriced": (Fault.UNPRICED_NULL, 200),
}


class TestWhatCounts:
    def test_every_answer_each_time(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        for directives in ("", "", "max-age=0", "no-cache", "no-store"):
            assert scene.ask(FLUX, cache_control=directives).status_code == 200
        assert used(scene) == [Decimal("13.75"), 5]
        assert by_model(scene) == {"Flux": row(5, Decimal("13.75"), hit=1, miss=4)}

    @pytest.mark.usefixtures("cold")
    def test_stale_ones_too_and_not_what_is_asked_behind_them(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        scene.ask(FLUX)
        scene.age(3600 + 100)
        assert "stale-while-revalidate" in cache_status(scene.ask(FLUX))
        wait_until(lambda: scene.simulator.calls == 2 and not scene.store.keys("ep1:*:lease"))
        scene.age(3600 + 400)
        scene.simulator.script(Fault.SERVER_ERROR)
        assert "stale-if-error" in cache_status(scene.ask(FLUX))
        assert used(scene) == [Decimal("8.25"), 3]
        assert by_model(scene) == {"Flux": row(3, Decimal("8.25"), stale=2, miss=1)}

    def test_one_that_waited_for_anothers(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        with ThreadPoolExecutor() as pool, scene.simulator.hold() as hold:
            asked = [pool.submit(scene.ask, FLUX) for _ in range(3)]
            wait_until(lambda: usage(scene)["requests"] == 3)
            hold.release()
            assert {future.result().status_code for future in asked} == {200}
        assert scene.simulator.calls == 1
        assert used(scene) == [Decimal("8.25"), 3]
        assert by_model(scene) == {"Flux": row(3, Decimal("8.25"), miss=1, collapsed=2)}

    def test_one_under_way_is_a_request_already(self, limited: Limited) -> None:
        scene = limited(quota(1), requests(1))
        with ThreadPoolExecutor() as pool, scene.simulator.hold() as hold:
            asked = pool.submit(scene.ask, ONE)
            assert scene.simulator.arrived(1)
            assert exceeded(scene.ask(FLUX), 429)["violated-policies"] == ["requests-month"]
            assert usage(scene) == row(1, refused=1, quota_exceeded=1, cancelled=1)
            hold.release()
            assert asked.result().status_code == 200
        assert usage(scene) == row(1, 1, refused=1, miss=1, quota_exceeded=1)

    @pytest.mark.parametrize("failure", FAILURES)
    def test_a_failure_is_a_request_without_credits(self, failure: str, limited: Limited) -> None:
        scene = limited(quota(100), requests(100), upstream={"timeout_s": 0.2})
        answer, status = FAILURES[failure]
        scene.simulator.script(answer)
        failed = scene.ask(FLUX)
        assert failed.status_code == status
        assert left(failed) == {"credits-month": 100, "requests-month": 99}
        assert used(scene) == [0, 1]
        assert by_model(scene) == {"-": row(1, **{failure: 1})}

    def test_an_answer_without_a_price_that_is_refused(self, limited: Limited) -> None:
        scene = limited(quota(100), upstream={"on_unpriced": "refuse"})
        scene.simulator.script(Fault.UNPRICED_NEGATIVE)
        assert code_of(scene.ask()) == "unpriced"
        assert usage(scene) == row(1, unpriced=1)

    def test_one_whose_time_is_over_before_upstream_answers(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100), server={"request_timeout_s": 0.2})
        with scene.simulator.hold() as hold:
            assert code_of(scene.ask(FLUX)) == "upstream-timeout"
            assert used(scene) == [0, 1]
            hold.release()
        wait_until(lambda: usage(scene) == row(1, upstream_timeout=1))

    def test_what_upstream_did_not_want_to_be_asked_is_no_request(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        scene.simulator.script(answers(b"{}", 429, retry_after="30"))
        asked, unasked = scene.ask(FLUX), scene.ask(ONE)
        assert (code_of(asked), code_of(unasked)) == ("upstream-busy", "upstream-busy")
        assert [left(answer)["requests-month"] for answer in (asked, unasked)] == [99, 99]
        assert (scene.simulator.calls, used(scene)) == (1, [0, 1])
        assert by_model(scene) == {"-": row(1, refused=1, upstream_busy=2)}

    def test_behind_an_open_circuit_there_is_no_request(self, limited: Limited) -> None:
        scene = limited(requests(100))
        scene.simulator.script(*[Fault.SERVER_ERROR] * MIN_ANSWERS)
        for number in range(MIN_ANSWERS):
            assert scene.ask(b'[{"seed":%d}]' % number).status_code == 502
        refused = scene.ask(FLUX)
        assert (code_of(refused), left(refused)) == ("upstream-busy", {"requests-month": 100 - MIN_ANSWERS})
        assert (scene.simulator.calls, used(scene)) == (MIN_ANSWERS, [MIN_ANSWERS])
        assert usage(scene) == row(MIN_ANSWERS, refused=1, upstream_error=MIN_ANSWERS, upstream_busy=1)

    def test_what_was_not_to_be_asked_is_no_request(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        absent = scene.ask(FLUX, cache_control="only-if-cached")
        assert (code_of(absent), left(absent)) == ("not-cached", {"credits-month": 100, "requests-month": 100})
        assert usage(scene) == row(refused=1, not_cached=1)
        scene.ask(FLUX)
        assert scene.ask(FLUX, cache_control="only-if-cached").status_code == 200
        assert used(scene) == [Decimal("5.5"), 2]

    def test_what_is_no_question_is_not_counted_at_all(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        bad = [
            scene.ask(b"{}"),
            scene.ask(content_type="text/plain"),
            scene.ask(x_api_key=EXPIRED),
            scene.ask(cache_control="max-age=x"),
            scene.client.get(PATH),
        ]
        assert [response.status_code for response in bad] == [400, 415, 401, 400, 405]
        for response in bad:
            assert {"ratelimit", "ratelimit-policy", "estimate-proxy-warning"}.isdisjoint(response.headers)
        assert (usage(scene), used(scene)) == (row(), [0, 0])

    def test_a_client_that_goes_away_is_charged_for_what_it_asked(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {DESIGN}\r\nContent-Length: {len(FLUX)}\r\n\r\n"
        with scene.simulator.hold() as hold:
            with scene.connect() as leader, scene.connect() as follower:
                leader.sendall(head.encode() + FLUX)
                assert scene.simulator.arrived(1)
                follower.sendall(head.encode() + FLUX)
                wait_until(lambda: used(scene) == [0, 2])
            hold.release()
        wait_until(lambda: by_model(scene) == {"Flux": row(2, Decimal("5.5"), miss=1, collapsed=1)})
        assert used(scene) == [Decimal("5.5"), 2]

    def test_a_client_that_goes_away_before_its_body_is_there_is_not(self, limited: Limited) -> None:
        scene = limited(requests(100))
        with scene.connect() as connection:
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {DESIGN}\r\nContent-Length: 4\r\n\r\n["
            connection.sendall(head.encode())
            wait_until(lambda: scene.lifecycle.in_flight)
        wait_until(lambda: not scene.lifecycle.in_flight)
        assert (usage(scene), used(scene)) == (row(), [0])

    @pytest.mark.usefixtures("cold")
    def test_usage_is_exactly_what_was_asked(self, limited: Limited) -> None:
        """A day's life of a team, by its outcomes; the quotas and the sum of all rows say the same."""
        scene = limited(quota(21.5), requests(100), rate=rate(15), upstream={"timeout_s": 0.3})
        simulator = scene.simulator
        _ask_for(scene, [(FLUX, "200"), (FLUX, "200"), (b"[1]", "invalid-body")])
        with ThreadPoolExecutor() as pool, simulator.hold() as hold:
            pair = [pool.submit(scene.ask, SEGMENT) for _ in range(2)]
            wait_until(lambda: usage(scene)["requests"] == 4)
            hold.release()
            assert {future.result().status_code for future in pair} == {200}
        scene.age(3600 + 100)
        assert "stale-while-revalidate" in cache_status(scene.ask(FLUX))
        wait_until(lambda: simulator.calls == 3 and not scene.store.keys("ep1:*:lease"))
        scene.age(3600 + 400)
        simulator.script(*(FAILURES[name][0] for name in ("upstream-rejected", "unpriced")))
        simulator.script(Fault.SERVER_ERROR, Fault.REFUSED_KEY, Fault.HANG)
        _ask_for(scene, [(ONE, "422"), (ONE, "200"), (ONE, "upstream-error")])
        _ask_for(scene, [(ONE, "upstream-refused"), (ONE, "upstream-timeout")])
        assert code_of(scene.ask(ONE, cache_control="only-if-cached")) == "not-cached"
        simulator.script(Fault.SERVER_ERROR, None, answers(b"{}", 429, retry_after="30"))
        assert "stale-if-error" in cache_status(scene.ask(FLUX))
        exceeded(scene.ask(ONE))
        _ask_for(scene, [(b"[{},{}]", "upstream-busy"), (b"[{},{}]", "upstream-busy"), (FLUX, "rate-limited")])

        rows = by_model(scene)
        refused = {"not_cached": 1, "quota_exceeded": 1, "rate_limited": 1, "upstream_busy": 2}
        failed = dict.fromkeys(("upstream_error", "upstream_rejected", "upstream_refused", "upstream_timeout"), 1)
        assert rows == {
            "Flux": row(4, 11, hit=1, stale=2, miss=1),
            "segment": row(2, 10, miss=1, collapsed=1),
            "-": row(6, 0, refused=4, unpriced=1, **refused, **failed),
        }
        assert used(scene) == [21, 12]
        total = usage(scene)
        for column in ("requests", "refused", "estimated_credits"):
            assert total[column] == sum(row[column] for row in rows.values())
        for row_ in rows.values():
            assert sum(row_["outcomes"].values()) == row_["requests"] + row_["refused"]


def _ask_for(scene: Scene, expected: list[tuple[bytes, str]]) -> None:
    """Asks one body after the other, for a problem's code, or else a status."""
    for body, word in expected:
        response = scene.ask(body)
        told = code_of(response) if "problem" in response.headers["content-type"] else str(response.status_code)
        assert told == word


AMOUNTS = {
    "0.000001": "0.000001",
    "0.1": "0.1",
    "1e9": "1000000000",
    "5.0": "5",
    "1e-7": "0.000001",
    "1E+2": "100",
    "0": "0",
    "999999999.9999999": "1000000000",
}
"""As upstream writes them, and as they count: rounded up to a micro-credit."""


class TestAmounts:
    def test_are_exact_and_shown_as_upstream_wrote_them(self, limited: Limited) -> None:
        scene = limited(quota(9e9), requests(100))
        scene.simulator.script(*map(priced, AMOUNTS))
        for number, written in enumerate(AMOUNTS):
            body, counted = b'[{"model":"m%d"}]' % number, Decimal(AMOUNTS[written])
            for answer in (scene.ask(body), scene.ask(body)):
                assert answer.content == b'{"data":{"estimated":%b,"balance":7},"error":{}}' % written.encode()
            assert by_model(scene)[f"m{number}"]["estimated_credits"] == 2 * counted
        spent = 2 * sum(map(Decimal, AMOUNTS.values()))
        assert usage(scene)["estimated_credits"] == used(scene)[0] == spent == Decimal("4000000210.200004")
        (own, _) = shown(scene, "/v1/quota")["quotas"]
        assert own["remaining"] == 9 * 10**9 - spent
        assert left(scene.ask(b'[{"model":"m6"}]'))["credits-month"] == 4_999_999_789

    @pytest.mark.parametrize(("limit", "status"), [(1_000_000_000.100002, 200), (1_000_000_000.100001, 402)])
    def test_a_micro_credit_decides(self, limit: float, status: int, limited: Limited) -> None:
        scene = limited(quota(limit))
        scene.simulator.script(priced("1e9"), priced("0.1"), priced("0.0000015"))
        assert [scene.ask(body).status_code for body in (ONE, FLUX, SEGMENT)] == [200, 200, status]


class TestModels:
    def test_are_named_by_what_decides_the_price(self, limited: Limited) -> None:
        expected = {
            "segment": b'[{"style":"Anime","segment":{},"model":"Flux"}]',
            "Anime": b'[{"model":"Flux","style":"Anime"}]',
            "Flux": b'[{"true_touch":{},"model":"Flux"},{"model":"Flux","steps":9}]',
            "true_touch": b'[{"narrator":{},"true_touch":{"scale_factor":2}}]',
            "narrator": b'[{"video_anyone":{},"narrator":{"script":"x"}}]',
            "video_anyone": b'[{"video_anyone":{"duration":5}}]',
            "mixed": b'[{"model":"Flux"},{"segment":{}}]',
            "other": b'[{"model":"=HYPERLINK(1)"}]',
            "-": b'[{"steps":30}]',
        }
        scene = limited()
        answers_ = {model: scene.ask(body) for model, body in expected.items()}
        assert by_model(scene) == {
            model: row(1, exactly(answer)["data"]["estimated"], miss=1) for model, answer in answers_.items()
        }

    def test_have_so_many_names_and_the_rest_are_others(self, limited: Limited) -> None:
        scene = limited(teams={"marketing": team(MARKETING)})
        for number in range(MAX_MODELS + 2):
            scene.ask(b'[{"model":"m%d"}]' % number)
        scene.ask(b'[{"model":"m%d"}]' % MAX_MODELS, x_api_key=MARKETING)
        rows = by_model(scene)
        assert set(rows) == {*(f"m{number}" for number in range(MAX_MODELS)), "other"}
        assert rows["other"] == row(2, 2, miss=2)
        assert by_model(scene, MARKETING) == {"other": row(1, 1, hit=1)}, "names are the organisation's"


class TestFields:
    def test_say_what_holds_and_what_is_left(self, limited: Limited) -> None:
        org = {"quotas": [quota(100, "week", on_exceed="warn"), requests(7, "minute")]}
        scene = limited(requests(10, "day"), quota(10.5), rate=rate(20, per_s=0.5), org=org)
        now = datetime.now(UTC)
        first, second = scene.ask(FLUX), scene.ask(FLUX)
        month_s = (_end_of("month", now) - _end_of("month", now.replace(day=1) - timedelta(days=1))).total_seconds()
        assert policies(first) == {
            "rate": {"q": 20, "w": 40},
            "requests-day": {"q": 10, "w": 86_400},
            "credits-month": {"q": 10, "qu": "credits", "w": month_s},
            "org-credits-week": {"q": 100, "qu": "credits", "w": 7 * 86_400},
            "org-requests-minute": {"q": 7, "w": 60},
        }
        assert list(limits(first)) == list(policies(first))
        assert left(first) == {"requests-day": 9, "credits-month": 7, "org-credits-week": 97, "org-requests-minute": 6}
        assert left(second) == {"requests-day": 8, "credits-month": 5, "org-credits-week": 94, "org-requests-minute": 5}
        assert [limits(answer)["rate"]["r"] for answer in (first, second)] == [19, 18]
        assert limits(first)["rate"]["t"] == 2
        assert limits(second)["rate"]["t"] in {3, 4}
        for name, per in [("requests-day", "day"), ("org-credits-week", "week"), ("org-requests-minute", "minute")]:
            seconds = (_end_of(per, now) - now).total_seconds()
            assert seconds - 3 <= limits(first)[name]["t"] <= seconds + 1

    def test_stand_on_refusals_and_explanations_too(self, limited: Limited) -> None:
        scene = limited(quota(3), requests(9), rate=rate(5))
        answered = scene.ask(FLUX)
        refused, absent = scene.ask(FLUX), scene.ask(ONE, cache_control="only-if-cached")
        explained = scene.client.post("/v1/explain", content=FLUX)
        for _ in range(2):
            scene.client.post("/v1/explain", content=FLUX)
        limited_ = scene.ask(FLUX)
        told = [answered, refused, absent, explained, limited_]
        assert [answer.status_code for answer in told] == [200, 402, 504, 200, 429]
        assert {answer.headers["ratelimit-policy"] for answer in told} == {answered.headers["ratelimit-policy"]}
        assert [limits(answer)["rate"]["r"] for answer in told] == [4, 4, 3, 2, 0]
        for answer in told:
            assert left(answer) == {"credits-month": 0, "requests-month": 8}

    def test_a_warning_is_for_an_answer_and_not_for_a_refusal(self, limited: Limited) -> None:
        scene = limited(requests(0, "day", "warn"), quota(2))
        exceeded(scene.ask(FLUX))  # it looks that there is none
        scene.simulator.script(answers(b"{}", 429, retry_after="30"))
        assert field(scene.ask(ONE), "estimate-proxy-warning") == {"requests-day": {}}
        unasked = scene.ask(ONE)
        assert code_of(unasked) == "upstream-busy"
        assert "estimate-proxy-warning" not in unasked.headers


def explained(scene: Scene, body: bytes = FLUX) -> Any:
    response = scene.client.post("/v1/explain", content=body)
    assert response.status_code == 200, response.text
    return exactly(response)


class TestExplain:
    def test_debits_no_quota_and_takes_from_the_rate(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(2), rate=rate(5))
        scene.ask(FLUX)
        before = usage(scene), used(scene)
        assert [explained(scene)["admitted"] for _ in range(4)] == [True] * 4
        for path in ("/v1/explain", PATH):
            refused = scene.client.post(path, content=FLUX)
            assert (refused.status_code, code_of(refused)) == (429, "rate-limited")
            assert refused.headers["retry-after"] in {"999", "1000"}
        assert used(scene) == before[1]
        assert usage(scene) == row(1, Decimal("2.75"), refused=1, miss=1, rate_limited=1)

    def test_shows_no_price_that_an_estimate_would_be_refused(self, limited: Limited) -> None:
        scene = limited(quota(5))
        scene.ask(FLUX)
        response = scene.client.post("/v1/explain", content=FLUX)
        told = exactly(response)
        assert (told["stored"], told["admitted"]) == (True, False)
        assert told["refusal"] == {"code": "quota-exceeded", "detail": exceeded(scene.ask(FLUX))["detail"]}
        assert "estimated" not in told
        assert "2.75" not in response.text

    def test_a_price_that_nobody_knows_may_pass_and_nothing_left_may_not(self, limited: Limited) -> None:
        scene = limited(quota(2.75))
        assert explained(scene, SEGMENT)["admitted"] is True
        scene.ask(FLUX)
        told = explained(scene, SEGMENT)
        assert (told["stored"], told["admitted"], told["refusal"]["code"]) == (False, False, "quota-exceeded")

    def test_a_price_that_fits_is_shown(self, limited: Limited) -> None:
        scene = limited(quota(5.5))
        scene.ask(FLUX)
        told = explained(scene)
        assert (told["admitted"], told["estimated"]) == (True, Decimal("2.75"))
        assert "refusal" not in told


class TestViews:
    def test_to_look_debits_nothing_and_takes_no_rate(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100), rate=rate(2))
        scene.ask(FLUX)
        before = shown(scene, "/v1/quota")
        for path in ("/v1/usage", "/v1/usage?by=model&format=csv", "/v1/quota"):
            response = get(scene, path)
            assert response.status_code == 200
            assert {"ratelimit", "ratelimit-policy"}.isdisjoint(response.headers)
        assert shown(scene, "/v1/quota") == before
        assert before["rate"] == {"per_s": Decimal(str(SLOW)), "burst": 2, "remaining": 1}

    def test_a_team_that_is_disabled_sees_what_it_used(self, limited: Limited) -> None:
        retired = team(RETIRED, requests(10))
        limited(teams={"retired": retired}).ask(FLUX, x_api_key=RETIRED)
        scene = limited(teams={"retired": {**retired, "disabled": True}})
        assert code_of(scene.ask(FLUX, x_api_key=RETIRED)) == "team-disabled"
        assert usage(scene, RETIRED) == row(1, Decimal("2.75"), miss=1)
        assert used(scene, RETIRED) == [1]

    def test_a_quota_that_is_set_later_knows_what_was_used_before(self, limited: Limited) -> None:
        limited().ask(FLUX)
        scene = limited(quota(5), requests(2, "week"), org={"quotas": [quota(100, "day")]})
        assert used(scene) == [Decimal("2.75"), 1, Decimal("2.75")]
        exceeded(scene.ask(FLUX))


class TestWithoutTheLedger:
    def test_it_refuses_within_the_time_that_was_said(self, limited: Limited, valkey_url: str) -> None:
        dead = f"redis://127.0.0.1:{free_port()}"
        scene = limited(quota(100), store={"url": dead}, cache={"url": valkey_url})
        for body in (FLUX, ONE):
            refused = scene.ask(body)
            assert (refused.status_code, code_of(refused)) == (503, "store-unavailable")
            assert refused.headers["retry-after"] == "1"
            assert "ratelimit" not in refused.headers
            assert refused.elapsed.total_seconds() < IN_TIME_S
        assert scene.simulator.calls == 0

    def test_it_refuses_in_time_also_if_the_ledger_hangs(
        self, limited: Limited, ledger: OwnLedger, valkey_url: str
    ) -> None:
        ledger.start()
        scene = limited(quota(100), store={"url": ledger.url}, cache={"url": valkey_url})
        assert scene.ask(FLUX).status_code == 200
        with ledger.hanging():
            refused = _refusals(scene, for_s=3 * REST_S)
        assert {code_of(answer) for answer in refused} == {"store-unavailable"}
        seconds = sorted(answer.elapsed.total_seconds() for answer in refused)
        waited = [elapsed for elapsed in seconds if elapsed > IN_TIME_S / 2]
        assert 1 <= len(waited) <= 3, "one wait a rest, not one a request"
        assert waited[0] < IN_TIME_S
        wait_until(lambda: scene.ask(FLUX).status_code == 200)

    def test_it_admits_if_that_is_wanted_and_books_when_the_ledger_is_back(
        self, limited: Limited, ledger: OwnLedger, valkey_url: str
    ) -> None:
        store = {"url": ledger.url, "on_outage": "admit"}
        scene = limited(quota(5), requests(2), store=store, cache={"url": valkey_url})
        scene.simulator.script(None, None, Fault.SERVER_ERROR)
        told = [scene.ask(body) for body in (FLUX, FLUX, ONE, b"[{},{}]")]
        assert [answer.status_code for answer in told] == [200, 200, 200, 502]
        assert not [answer for answer in told if {"ratelimit", "ratelimit-policy"} & answer.headers.keys()]
        assert code_of(get(scene, "/v1/usage")) == "store-unavailable"
        ledger.start()
        wait_until(lambda: get(scene, "/v1/usage").status_code == 200 and usage(scene)["requests"])
        assert usage(scene) == row(4, Decimal("6.5"), hit=1, miss=2, upstream_error=1)
        assert used(scene) == [Decimal("6.5"), 4]
        assert exceeded(scene.ask(FLUX))["violated-policies"] == ["credits-month", "requests-month"]

    @pytest.mark.parametrize("on_outage", ["refuse", "admit"])
    def test_one_under_way_when_it_dies_is_counted_once(
        self, on_outage: str, limited: Limited, ledger: OwnLedger, valkey_url: str
    ) -> None:
        ledger.start()
        store = {"url": ledger.url, "on_outage": on_outage}
        scene = limited(quota(6), requests(2), store=store, cache={"url": valkey_url})
        with ThreadPoolExecutor() as pool, scene.simulator.hold() as hold:
            asked = pool.submit(scene.ask, FLUX)
            assert scene.simulator.arrived(1)
            ledger.kill()
            hold.release()
            answer = asked.result()
        ledger.start()
        wait_until(lambda: get(scene, "/v1/usage").status_code == 200)
        if on_outage == "admit":
            assert answer.status_code == 200
            wait_until(lambda: usage(scene) == row(1, Decimal("2.75"), miss=1))
            assert used(scene) == [Decimal("2.75"), 1]
        else:
            assert code_of(answer) == "store-unavailable"
            assert usage(scene) == row(1, cancelled=1)
            assert used(scene) == [0, 1]
        assert cache_status(scene.ask(FLUX)).startswith("hit; "), "the price is not lost"

    def test_a_debit_that_may_have_been_booked_is_neither_repeated_nor_answered(
        self, limited: Limited, ledger: OwnLedger, valkey_url: str
    ) -> None:
        ledger.start()
        store = {"url": ledger.url, "on_outage": "admit"}
        scene = limited(requests(100), store=store, cache={"url": valkey_url})
        assert scene.ask(FLUX).status_code == 200
        with ledger.hanging():
            unanswered, owed = scene.ask(FLUX), scene.ask(FLUX)
        assert (code_of(unanswered), owed.status_code) == ("store-unavailable", 200)
        assert scene.metrics.unanswered_debits._value.get() == 1
        wait_until(lambda: scene.metrics.buffered_debits._value.get() == 0)
        assert used(scene)[0] in {2, 3}
        assert usage(scene)["requests"] == used(scene)[0]

    def test_what_is_explained_has_no_price(self, limited: Limited, valkey_url: str) -> None:
        limited().ask(FLUX)
        dead = f"redis://127.0.0.1:{free_port()}"
        scene = limited(store={"url": dead}, cache={"url": valkey_url})
        told = explained(scene)
        assert (told["stored"], told["admitted"], told["degraded"]) == (True, None, ["ledger"])
        assert "estimated" not in told, "an estimate would be refused"

    def test_without_the_price_book_alone_estimates_go_on_and_count(self, limited: Limited) -> None:
        scene = limited(quota(6), requests(100), cache={"url": f"redis://127.0.0.1:{free_port()}"})
        told = [scene.ask(FLUX) for _ in range(3)]
        assert [answer.status_code for answer in told] == [200, 200, 402]
        assert {cache_status(answer) for answer in told} == {"fwd=bypass; detail=store-unavailable"}
        assert scene.simulator.calls == 3
        assert used(scene) == [Decimal("5.5"), 2]
        assert usage(scene) == row(2, Decimal("5.5"), refused=1, bypass=2, quota_exceeded=1)


def _refusals(scene: Scene, *, for_s: float) -> list[httpx2.Response]:
    until, refused = time.monotonic() + for_s, []
    while time.monotonic() < until:
        refused.append(scene.ask(FLUX))
    return refused
