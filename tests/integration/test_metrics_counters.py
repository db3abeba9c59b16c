"""Counters: each request once by team and outcome, credits, warnings, and calls of upstream and store."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from faulty_rendernet import Fault
from gateway_fixture import DESIGN, MARKETING, PATH, RETIRED, GatewayFixture, OpenGateway, break_off, code_of
from gateway_process import Tree
from inference_fixture import LEARNING, new_body, teach
from lua_scripts import LUA_SCRIPTS
from metric_samples import sample_value
from metrics_fixture import FLUX, ONE, TEAMS, limited, quota, toured
from prometheus import MORNING, SCRAPER, Scraped, scrape
from proxy.gateway.in_flight import MAX_IN_FLIGHT, InFlightTracker
from proxy.gateway.request import ClientRequest, Result, Trace
from proxy.http.endpoint import Endpoint
from proxy.http.paths import METRICS_PATH
from proxy.problems import Outcome
from proxy.quota import saved_time
from proxy.quota.model_names import MAX_MODELS
from proxy.telemetry.metrics import Metrics
from serving import NO_TLS, free_port, serving, wait_until

NOWHERE = "unix:///nonexistent/store.sock"

Act = Callable[[GatewayFixture], object]


def _nothing(_: GatewayFixture) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """How to cause an outcome. `act` causes it, and also the outcomes `besides`; `before` runs first."""

    act: Act
    before: Act = _nothing
    team: str = "design"
    besides: Sequence[Outcome] = ()
    sections: Mapping[str, Tree] = field(default_factory=dict)


def _scripted(fault: Fault) -> Act:
    def act(gateway: GatewayFixture) -> None:
        gateway.simulator.script(fault)
        gateway.ask()

    return act


def _grow_stale(gateway: GatewayFixture) -> None:
    gateway.ask()
    gateway.age(200)


def _teach(gateway: GatewayFixture) -> None:
    teach(gateway)
    wait_until(lambda: _number_ended(gateway) == gateway.simulator.calls)


def _ask_two_at_once(gateway: GatewayFixture) -> None:
    with gateway.simulator.hold() as hold, ThreadPoolExecutor() as pool:
        pool.submit(gateway.ask)
        assert gateway.simulator.arrived(1)
        decided = _decisions(gateway)
        pool.submit(gateway.ask)
        wait_until(lambda: _decisions(gateway) == decided + 1)
        hold.release()


def _decisions(gateway: GatewayFixture) -> float:
    """Returns how many decisions the ledger has made."""
    return sample_value(gateway.metrics, "estimate_proxy_store_duration_seconds_count", call="ledger_decide")


def _ask_too_much(gateway: GatewayFixture) -> None:
    gateway.tracker.in_flight += MAX_IN_FLIGHT
    gateway.ask()
    gateway.tracker.in_flight -= MAX_IN_FLIGHT


def _hang_up(gateway: GatewayFixture) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nx-api-key: {DESIGN}\r\ncontent-length: {len(ONE)}\r\n\r\n"
    with gateway.simulator.hold(), gateway.connect() as connection:
        connection.sendall(head.encode() + ONE)
        assert gateway.simulator.arrived(1)
        break_off(connection)


CASES: dict[Outcome, Case] = {
    Outcome.HIT: Case(GatewayFixture.ask, before=GatewayFixture.ask),
    Outcome.INFERRED: Case(lambda gateway: gateway.ask(new_body()), before=_teach, sections=LEARNING),
    Outcome.STALE: Case(
        GatewayFixture.ask, before=_grow_stale, sections={"cache": {"ttl_s": 100, "stale_while_revalidate_s": 1000}}
    ),
    Outcome.MISS: Case(GatewayFixture.ask),
    Outcome.COLLAPSED: Case(_ask_two_at_once, besides=[Outcome.MISS]),
    Outcome.BYPASS: Case(GatewayFixture.ask, sections={"cache": {"url": NOWHERE}}),
    Outcome.UNPRICED: Case(_scripted(Fault.UNPRICED_NULL)),
    Outcome.UPSTREAM_REJECTED: Case(lambda gateway: gateway.ask('[{"segment":"ast_missing"}]')),
    Outcome.UNAUTHENTICATED: Case(lambda gateway: gateway.ask(x_api_key="ep_nobody"), team="-"),
    Outcome.RATE_LIMITED: Case(
        GatewayFixture.ask, before=GatewayFixture.ask, sections={"teams": limited(rate={"per_s": 0.001, "burst": 1})}
    ),
    Outcome.QUOTA_EXCEEDED: Case(GatewayFixture.ask, sections={"teams": limited(quota(0))}),
    Outcome.OVER_CEILING: Case(lambda gateway: gateway.ask(estimate_proxy_max_credits="1")),
    Outcome.TEAM_DISABLED: Case(lambda gateway: gateway.ask(x_api_key=RETIRED), team="retired"),
    Outcome.INVALID: Case(lambda gateway: gateway.ask("{}")),
    Outcome.UPSTREAM_ERROR: Case(_scripted(Fault.SERVER_ERROR)),
    Outcome.UPSTREAM_REFUSED: Case(_scripted(Fault.REFUSED_KEY)),
    Outcome.UPSTREAM_BUSY: Case(_scripted(Fault.BUSY)),
    Outcome.UPSTREAM_TIMEOUT: Case(_scripted(Fault.HANG), sections={"upstream": {"timeout_s": 0.2}}),
    Outcome.STORE_UNAVAILABLE: Case(GatewayFixture.ask, sections={"store": {"url": NOWHERE}}),
    Outcome.OVERLOADED: Case(_ask_too_much, team="-"),
    Outcome.NOT_CACHED: Case(lambda gateway: gateway.ask(cache_control="only-if-cached")),
    Outcome.CANCELLED: Case(_hang_up),
}


def ended(scraped: Scraped) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Returns the estimates by team and outcome, and the observed durations by outcome."""
    requests, durations = Counter[tuple[str, str]](), Counter[str]()
    for (team, operation, outcome), value in scraped.series("requests_total", "team", "operation", "outcome").items():
        requests[team, outcome] += int(value) * (operation == "estimate")
    series = scraped.series("request_duration_seconds_count", "operation", "outcome")
    for (operation, outcome), value in series.items():
        durations[outcome] += int(value) * (operation == "estimate")
    return requests, durations


def _number_ended(gateway: GatewayFixture) -> float:
    """Returns how many estimates have ended, without the cost of a scrape."""
    (requests,) = gateway.metrics.requests.collect()
    totals = (sample for sample in requests.samples if sample.name.endswith("_total"))
    return sum(sample.value for sample in totals if sample.labels["operation"] == "estimate")


class TestCounters:
    @pytest.mark.usefixtures("cold", "cold_learning")
    @pytest.mark.parametrize("outcome", CASES)
    def test_each_request_counts_once_with_its_team_and_outcome(
        self, outcome: Outcome, open_scraped_gateway: OpenGateway
    ) -> None:
        case = CASES[outcome]
        gateway = open_scraped_gateway(**case.sections)
        case.before(gateway)
        wait_until(lambda: _number_ended(gateway) >= (case.before is not _nothing))
        requests, durations = ended(scrape(gateway.client))
        case.act(gateway)
        outcomes = [outcome.value, *(other.value for other in case.besides)]
        wait_until(lambda: _number_ended(gateway) >= requests.total() + len(outcomes))
        scraped = scrape(gateway.client)
        assert ended(scraped) == (
            requests + Counter((case.team, other) for other in outcomes),
            durations + Counter(outcomes),
        )
        assert scraped.value("unpriced_total", team="design") == (outcome is Outcome.UNPRICED)

    def test_an_unexpected_exception_counts_too(self) -> None:
        metrics = Metrics(TEAMS)

        async def broken(_: ClientRequest, trace: Trace) -> Result:
            trace.team = "design"
            raise RuntimeError("the reason is for the log")

        endpoint = Endpoint(
            "estimate", broken, tracker=InFlightTracker(), metrics=metrics, max_body_bytes=9, timeout_s=5
        )
        with serving(Starlette(routes=[Route("/", endpoint)])) as url:
            assert httpx2.post(url, trust_env=False, verify=NO_TLS).status_code == 500
        labels = {"team": "design", "operation": "estimate", "outcome": "internal-error"}
        assert metrics.registry.get_sample_value("estimate_proxy_requests_total", labels) == 1
        assert {*CASES, Outcome.INTERNAL_ERROR} == {*Outcome}

    def test_other_requests_are_counted_by_their_kind(self, open_scraped_gateway: OpenGateway) -> None:
        gateway = open_scraped_gateway()
        asked = [
            ("design", "hit", gateway.client.get("/v1/quota")),
            ("design", "hit", gateway.client.get("/v1/usage")),
            ("design", "miss", gateway.client.post("/v1/explain", content=FLUX)),
            ("design", "unauthenticated", gateway.client.get(METRICS_PATH)),
            ("-", "unauthenticated", gateway.client.get("/v1/usage", headers={"x-api-key": "ep_nobody"})),
            ("-", "invalid", gateway.client.get("/nothing")),
            ("-", "invalid", gateway.client.get(PATH)),
            ("-", "hit", gateway.client.get(METRICS_PATH, headers={"x-api-key": SCRAPER})),
        ]
        found = scrape(gateway.client).series("requests_total", "team", "operation", "outcome")
        others = {(team, outcome): value for (team, operation, outcome), value in found.items() if operation == "other"}
        assert others == Counter((team, outcome) for team, outcome, _ in asked)
        assert ended(scrape(gateway.client))[0].total() == 0

    def test_credits_are_counted_by_team_and_model_with_every_answer(self, open_scraped_gateway: OpenGateway) -> None:
        gateway = open_scraped_gateway()
        for body, token in ((FLUX, DESIGN), (FLUX, DESIGN), (FLUX, MARKETING), (ONE, DESIGN)):
            assert gateway.ask(body, x_api_key=token).status_code == 200
        assert gateway.ask('[{"model":"Flux"},{"segment":{}}]').status_code == 200
        assert scrape(gateway.client).series("estimated_credits_total", "team", "model") == {
            ("design", "Flux"): 5.5,
            ("marketing", "Flux"): 2.75,
            ("design", "-"): 1,
            ("design", "mixed"): 7.75,
        }

    @pytest.mark.parametrize("model", ["ünï", "x" * 65, 'a"b', "a\\nb", "-", "mixed", "{}"])
    def test_a_model_with_an_invalid_name_counts_as_other(self, model: str, open_scraped_gateway: OpenGateway) -> None:
        gateway = open_scraped_gateway()
        assert gateway.ask('[{"model":"' + model.replace('"', '\\"') + '"}]').status_code == 200
        assert scrape(gateway.client).series("estimated_credits_total", "team", "model") == {("design", "other"): 1}

    def test_the_number_of_models_is_limited_like_in_usage(self, open_scraped_gateway: OpenGateway) -> None:
        gateway, half = open_scraped_gateway(), MAX_MODELS // 2
        for number in range(half + 5):
            assert gateway.ask(b'[{"model":"model %d"}]' % number).status_code == 200
        counted = scrape(gateway.client).series("estimated_credits_total", "team", "model")
        rows = gateway.client.get("/v1/usage?by=model").json()["rows"]
        assert counted == {("design", row["model"]): row["estimated_credits"] for row in rows}
        assert len(counted) == half + 1, "one team brings half of the names at the most"
        assert counted["design", "other"] == 5

    def test_warnings_are_counted_by_quota(self, open_scraped_gateway: OpenGateway) -> None:
        warn = [quota(2, "day", on_exceed="warn"), quota(3, "week", "requests", on_exceed="warn"), quota(100)]
        gateway = open_scraped_gateway(
            teams=limited(*warn), org={"quotas": [quota(9, on_exceed="warn")], "timezone": MORNING}
        )
        for _ in range(5):
            assert gateway.ask(FLUX).status_code == 200
        assert scrape(gateway.client).series("quota_warned_total", "team", "measure", "per") == {
            ("design", "estimated_credits", "day"): 5,
            ("design", "requests", "week"): 2,
            ("-", "estimated_credits", "month"): 2,
        }

    def test_saved_calls_and_their_time_are_counted_by_team(
        self, open_scraped_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(saved_time, "TICK_S", 0.05)
        gateway = open_scraped_gateway()
        gateway.ask(FLUX)
        (key,) = gateway.store.keys("ep1:{default}:upstream:*")
        gateway.store.hset(key, "us", 250_000)
        for token in (DESIGN, DESIGN, MARKETING):
            assert gateway.ask(FLUX, x_api_key=token).status_code == 200
        gateway.client.get("/v1/quota")  # counts as a hit of another operation
        expected = {("design",): 2, ("marketing",): 1, ("retired",): 0}
        assert scrape(gateway.client).series("upstream_calls_saved_total", "team") == expected
        seconds = {team: 0.25 * calls for team, calls in expected.items()}
        wait_until(lambda: scrape(gateway.client).series("upstream_seconds_saved_total", "team") == seconds)

    @pytest.mark.usefixtures("cold")
    @pytest.mark.parametrize(("outcome", "calls"), [(Outcome.COLLAPSED, 1), (Outcome.STALE, 0)])
    def test_answers_that_save_no_time(
        self, outcome: Outcome, calls: int, open_scraped_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(saved_time, "TICK_S", 0.05)
        case = CASES[outcome]
        gateway = open_scraped_gateway(**case.sections)
        case.before(gateway)
        case.act(gateway)
        wait_until(lambda: ended(scrape(gateway.client))[0]["design", outcome.value] == 1)
        for _ in range(2):
            assert gateway.ask('[{"seed":7}]', x_api_key=MARKETING).status_code == 200
        wait_until(lambda: scrape(gateway.client).value("upstream_seconds_saved_total", team="marketing") != 0)
        scraped = scrape(gateway.client)
        assert scraped.value("upstream_calls_saved_total", team="design") == calls
        assert scraped.value("upstream_seconds_saved_total", team="design") == 0

    def test_upstream_calls_are_counted_by_status(self, open_scraped_gateway: OpenGateway) -> None:
        gateway = open_scraped_gateway(upstream={"timeout_s": 0.3})
        faults = [Fault.SERVER_ERROR, Fault.HANG, Fault.BUSY_FOR_NO_TIME, Fault.REDIRECT, Fault.HTML_IN_200]
        gateway.simulator.script(None, None, *faults)
        gateway.ask(ONE)
        gateway.ask('[{"segment":"ast_missing"}]')
        for number in range(len(faults)):
            gateway.ask(b'[{"seed":%d}]' % number)
        assert _statuses(gateway) == {"2xx": 1, "4xx": 2, "5xx": 1, "timeout": 1, "error": 2}

    def test_an_unreachable_upstream_is_counted_as_an_error(self, open_scraped_gateway: OpenGateway) -> None:
        gateway = open_scraped_gateway(upstream={"base_url": f"http://127.0.0.1:{free_port()}"})
        assert code_of(gateway.ask()) == "upstream-error"
        assert _statuses(gateway) == {"error": 1}

    def test_store_calls_are_counted_by_script_name(self, open_scraped_gateway: OpenGateway) -> None:
        found = scrape(toured(open_scraped_gateway()).client).series("store_duration_seconds_count", "call")
        assert {("ledger_decide",), ("price_get",), ("price_put",), ("ledger_read",)} < found.keys()
        assert {call for (call,) in found} <= LUA_SCRIPTS.keys()


def _statuses(gateway: GatewayFixture) -> dict[str, float]:
    """Returns the upstream calls of account `default` by status; other accounts have none."""
    series = scrape(gateway.client).series("upstream_request_duration_seconds_count", "account", "status")
    asked = {key: value for key, value in series.items() if value}
    assert {account for account, _ in asked} == {"default"}
    return {status: value for (_, status), value in asked.items()}
