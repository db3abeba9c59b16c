"""What `/metrics` says: every name, type and label of the contract, and that each number is what it claims to be."""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from conftest import Opened
from fleet import OwnLedger, own_ledger
from metric_names import families
from processes import START_S, Tree
from prometheus import (
    MORNING,
    OPENMETRICS,
    PERS,
    SCRAPER,
    Scraped,
    assert_as_declared,
    booked,
    said_by_promtool,
    scrape,
    scrape_openmetrics,
    usage,
)
from proxy import __version__
from proxy.app import METRICS_PATH
from proxy.circuit import MIN_ANSWERS
from proxy.gateway import Ask, Trace
from proxy.metrics import AUDIT_RESULTS, UPSTREAM_STATUSES, Metrics
from proxy.models import MAX_MODELS
from proxy.problems import Outcome
from proxy.scrape import SNAPSHOT_S
from proxy.sheets import LedgerKeys
from proxy.simulator import Fault
from proxy.teams import digest_of, token_of
from proxy.web import MAX_IN_FLIGHT, Ending, Lifecycle, StoryEndpoint
from proxy.windows import window_of
from scene import DESIGN, EXPIRED, MARKETING, PATH, RETIRED, Scene, code_of
from serving import free_port, serving, wait_until

ADMIN = token_of("a" * 32)
NOWHERE = "unix:///nonexistent/store.sock"

ONE, FLUX = b"[{}]", b'[{"model":"Flux"}]'
"""1 and 2.75 credits at the simulator's."""

TEAMS = ("design", "marketing", "retired")
ACCOUNTS = ("default", "second")

CONTRACT: dict[str, tuple[str, set[str]]] = {
    "requests_total": ("counter", {"team", "operation", "outcome"}),
    "estimated_credits_total": ("counter", {"team", "model"}),
    "unpriced_total": ("counter", {"team"}),
    "request_duration_seconds": ("histogram", {"operation", "outcome"}),
    "upstream_request_duration_seconds": ("histogram", {"account", "status"}),
    "store_duration_seconds": ("histogram", {"call"}),
    "store_up": ("gauge", {"role"}),
    "upstream_circuit_open": ("gauge", {"account"}),
    "requests_in_flight": ("gauge", set()),
    "window_estimated_credits": ("gauge", {"team", "per"}),
    "window_requests": ("gauge", {"team", "per"}),
    "quota_limit": ("gauge", {"scope", "team", "measure", "per"}),
    "quota_used": ("gauge", {"scope", "team", "measure", "per"}),
    "window_start_timestamp_seconds": ("gauge", {"per"}),
    "window_end_timestamp_seconds": ("gauge", {"per"}),
    "quota_warned_total": ("counter", {"team", "measure", "per"}),
    "balance_credits": ("gauge", {"account"}),
    "balance_age_seconds": ("gauge", {"account"}),
    "price_audits_total": ("counter", {"account", "result"}),
    "ledger_created_timestamp_seconds": ("gauge", set()),
    "ledger_lost_total": ("counter", set()),
    "unanswered_debits_total": ("counter", set()),
    "buffered_debits": ("gauge", set()),
    "config_last_reload_successful": ("gauge", set()),
    "build_info": ("gauge", {"version"}),
}
"""The table of the public contract."""


def quota(limit: float, per: str = "month", measure: str = "estimated_credits", on_exceed: str = "refuse") -> Tree:
    return {"measure": measure, "limit": limit, "per": per, "on_exceed": on_exceed}


def limited(*quotas: Tree, **more: Any) -> Tree:
    """For the section `teams`: what holds for `design`."""
    return {"design": {"tokens": [digest_of(DESIGN)], "quotas": list(quotas), **more}}


@pytest.fixture
def watched(open_gateway: Opened) -> Opened:
    """Opens gateways that may be scraped."""

    def enter(**sections: Tree) -> Scene:
        guard = {"metrics": {"tokens": [digest_of(SCRAPER)]}, "admin": {"tokens": [digest_of(ADMIN)]}}
        return open_gateway(**{**guard, **sections})

    return enter


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scrape reads the stores."""
    monkeypatch.setattr("proxy.scrape.SNAPSHOT_S", -1.0)


@pytest.fixture
def ledger() -> Iterator[OwnLedger]:
    with own_ledger() as opened:
        yield opened


def toured(scene: Scene) -> Scene:
    """After something has happened for each metric."""
    scene.ask(FLUX)
    scene.ask(FLUX)
    wait_until(lambda: scrape(scene.client).value("requests_total", team="design", operation="estimate", outcome="hit"))
    return scene


EVERYTHING: Tree = {
    "teams": limited(quota(1, on_exceed="warn")),
    "org": {"quotas": [quota(1000, "week", "requests")], "timezone": MORNING},
}


class TestContract:
    def test_the_code_declares_what_the_contract_lists(self) -> None:
        declared = {family.name: (family.kind, set(family.labels)) for family in families().values()}
        assert declared == {f"estimate_proxy_{name}": entry for name, entry in CONTRACT.items()}

    @pytest.mark.parametrize("read", [scrape, scrape_openmetrics])
    def test_it_is_all_there_in_both_formats(self, read: Callable[[httpx2.Client], Scraped], watched: Opened) -> None:
        assert_as_declared(read(toured(watched(**EVERYTHING)).client))

    def test_promtool_finds_nothing_to_say(self, watched: Opened) -> None:
        assert said_by_promtool(toured(watched(**EVERYTHING)).client) == ""

    def test_outcomes_are_those_of_the_contract(self) -> None:
        named = """
            hit stale miss collapsed bypass unpriced upstream-rejected rate-limited quota-exceeded unauthenticated
            team-disabled invalid upstream-error upstream-refused upstream-busy upstream-timeout store-unavailable
            overloaded not-cached cancelled internal-error
        """
        assert sorted(Outcome) == sorted(named.split())


class TestAccess:
    @pytest.mark.parametrize(
        ("headers", "status", "code"),
        [
            ({}, 401, "unknown-token"),
            ({"x-api-key": "ep_nobody"}, 401, "unknown-token"),
            ({"x-api-key": EXPIRED}, 401, "unknown-token"),
            ({"x-api-key": DESIGN}, 403, "forbidden"),
            ({"x-api-key": RETIRED}, 403, "forbidden"),
            ({"authorization": f"Bearer {DESIGN}"}, 403, "forbidden"),
        ],
    )
    def test_it_is_not_for_everybody(self, headers: dict[str, str], status: int, code: str, watched: Opened) -> None:
        answer = httpx2.get(watched().url + METRICS_PATH, headers=headers, trust_env=False)
        assert (answer.status_code, code_of(answer)) == (status, code)
        assert ("www-authenticate" in answer.headers) == (status == 401)
        assert "estimate_proxy_" not in answer.text

    @pytest.mark.parametrize("token", [SCRAPER, ADMIN])
    @pytest.mark.parametrize("header", [("x-api-key", "{}"), ("authorization", "Bearer {}")])
    def test_a_metrics_token_and_an_admin_token_open_it(
        self, token: str, header: tuple[str, str], watched: Opened
    ) -> None:
        named = {header[0]: header[1].format(token)}
        answer = httpx2.get(watched().url + METRICS_PATH, headers=named, trust_env=False)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        assert "estimate_proxy_store_up" in answer.text

    @pytest.mark.parametrize("headers", [{}, {"x-api-key": DESIGN}, {"x-api-key": "ep_nobody"}])
    def test_where_it_is_public_anybody_may_read_it(self, headers: dict[str, str], watched: Opened) -> None:
        scene = watched(metrics={"public": True})
        assert httpx2.get(scene.url + METRICS_PATH, headers=headers, trust_env=False).status_code == 200

    def test_a_metrics_token_opens_nothing_else(self, watched: Opened) -> None:
        scene = watched()
        assert code_of(scene.ask(x_api_key=SCRAPER)) == "forbidden"
        for path in ("/v1/usage", "/v1/quota"):
            assert code_of(scene.client.get(path, headers={"x-api-key": SCRAPER})) == "forbidden"

    @pytest.mark.parametrize(
        ("accept", "media_type"),
        [
            ("", "text/plain; version=0.0.4; charset=utf-8"),
            ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
            ("text/plain;version=not-a-number", "text/plain; version=0.0.4; charset=utf-8"),
            (OPENMETRICS, "application/openmetrics-text; version=1.0.0; charset=utf-8"),
            ("Application/OpenMetrics-Text", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
            ("application/openmetrics-text;version=ß", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
            ("text/html,application/openmetrics-text", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        ],
    )
    def test_the_scraper_chooses_the_format(self, accept: str, media_type: str, watched: Opened) -> None:
        headers = {b"x-api-key": SCRAPER.encode(), b"accept": accept.encode()}
        answer = watched().client.get(METRICS_PATH, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == media_type
        assert answer.headers["vary"] == "accept"
        assert answer.text.endswith("# EOF\n") == ("openmetrics" in media_type)


class TestBeforeTheFirstEvent:
    """A series that begins with its first event hides that event from `rate` and `increase`."""

    @pytest.fixture
    def first(self, watched: Opened) -> Scraped:
        return scrape(watched(org={"quotas": [quota(5)]}).client)

    def test_every_team_has_every_outcome(self, first: Scraped) -> None:
        found = first.series("requests_total", "team", "operation", "outcome")
        expected = {(team, "estimate", outcome.value): 0 for team in ("-", *TEAMS) for outcome in Outcome}
        assert {key: value for key, value in found.items() if key[1] == "estimate"} == expected
        durations = first.series("request_duration_seconds_count", "operation", "outcome")
        assert {outcome for operation, outcome in durations if operation == "estimate"} == {*Outcome}
        assert first.series("unpriced_total", "team") == dict.fromkeys(((team,) for team in TEAMS), 0)

    def test_every_account_has_its_circuit_its_statuses_and_its_audits(self, first: Scraped) -> None:
        assert first.series("upstream_circuit_open", "account") == {(account,): 0 for account in ACCOUNTS}
        statuses = {(account, status): 0 for account in ACCOUNTS for status in UPSTREAM_STATUSES}
        assert first.series("upstream_request_duration_seconds_count", "account", "status") == statuses
        audits = {(account, result): 0 for account in ACCOUNTS for result in AUDIT_RESULTS}
        assert first.series("price_audits_total", "account", "result") == audits

    def test_every_team_has_its_windows_and_quotas(self, first: Scraped) -> None:
        windows = {(team, per): 0 for team in TEAMS for per in ("day", "week", "month")}
        assert first.series("window_estimated_credits", "team", "per") == windows
        assert first.series("window_requests", "team", "per") == windows
        assert first.series("quota_used", "scope", "team", "measure", "per") == {
            ("org", "-", "estimated_credits", "month"): 0
        }

    def test_the_process_says_what_it_is(self, first: Scraped) -> None:
        assert first.series("build_info", "version") == {(__version__,): 1}
        assert first.value("config_last_reload_successful") == 1
        assert [first.value(f"{name}_total") for name in ("ledger_lost", "unanswered_debits")] == [0, 0]
        assert first.value("buffered_debits") == 0
        created = first.value("ledger_created_timestamp_seconds")
        assert created is not None
        assert abs(time.time() - created) < START_S


# --- what counters count ----------------------------------------------------------------------------------------

Act = Callable[[Scene], object]


def _nothing(_: Scene) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """How an outcome comes about: `act` makes it, and others `besides`; `before` is one request or nothing."""

    act: Act
    before: Act = _nothing
    team: str = "design"
    besides: Sequence[Outcome] = ()
    sections: Mapping[str, Tree] = field(default_factory=dict)


def _scripted(fault: Fault) -> Act:
    def act(scene: Scene) -> None:
        scene.simulator.script(fault)
        scene.ask()

    return act


def _grow_stale(scene: Scene) -> None:
    scene.ask()
    scene.age(200)


def _ask_two_at_once(scene: Scene) -> None:
    with scene.simulator.hold() as hold, ThreadPoolExecutor() as pool:
        pool.submit(scene.ask)
        assert scene.simulator.arrived(1)
        decided = _decisions(scene)
        pool.submit(scene.ask)
        wait_until(lambda: _decisions(scene) == decided + 1)
        hold.release()


def _decisions(scene: Scene) -> float:
    """How often the ledger has decided."""
    name = "estimate_proxy_store_duration_seconds_count"
    return scene.metrics.registry.get_sample_value(name, {"call": "ledger_decide"}) or 0


def _ask_too_much(scene: Scene) -> None:
    scene.lifecycle.in_flight += MAX_IN_FLIGHT
    scene.ask()
    scene.lifecycle.in_flight -= MAX_IN_FLIGHT


def _hang_up(scene: Scene) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nx-api-key: {DESIGN}\r\ncontent-length: {len(ONE)}\r\n\r\n"
    with scene.simulator.hold(), scene.connect() as connection:
        connection.sendall(head.encode() + ONE)
        assert scene.simulator.arrived(1)


CASES: dict[Outcome, Case] = {
    Outcome.HIT: Case(Scene.ask, before=Scene.ask),
    Outcome.STALE: Case(
        Scene.ask, before=_grow_stale, sections={"cache": {"ttl_s": 100, "stale_while_revalidate_s": 1000}}
    ),
    Outcome.MISS: Case(Scene.ask),
    Outcome.COLLAPSED: Case(_ask_two_at_once, besides=[Outcome.MISS]),
    Outcome.BYPASS: Case(Scene.ask, sections={"cache": {"url": NOWHERE}}),
    Outcome.UNPRICED: Case(_scripted(Fault.UNPRICED_NULL)),
    Outcome.UPSTREAM_REJECTED: Case(lambda scene: scene.ask('[{"segment":"ast_missing"}]')),
    Outcome.UNAUTHENTICATED: Case(lambda scene: scene.ask(x_api_key="ep_nobody"), team="-"),
    Outcome.RATE_LIMITED: Case(
        Scene.ask, before=Scene.ask, sections={"teams": limited(rate={"per_s": 0.001, "burst": 1})}
    ),
    Outcome.QUOTA_EXCEEDED: Case(Scene.ask, sections={"teams": limited(quota(0))}),
    Outcome.TEAM_DISABLED: Case(lambda scene: scene.ask(x_api_key=RETIRED), team="retired"),
    Outcome.INVALID: Case(lambda scene: scene.ask("{}")),
    Outcome.UPSTREAM_ERROR: Case(_scripted(Fault.SERVER_ERROR)),
    Outcome.UPSTREAM_REFUSED: Case(_scripted(Fault.REFUSED_KEY)),
    Outcome.UPSTREAM_BUSY: Case(_scripted(Fault.BUSY)),
    Outcome.UPSTREAM_TIMEOUT: Case(_scripted(Fault.HANG), sections={"upstream": {"timeout_s": 0.2}}),
    Outcome.STORE_UNAVAILABLE: Case(Scene.ask, sections={"store": {"url": NOWHERE}}),
    Outcome.OVERLOADED: Case(_ask_too_much, team="-"),
    Outcome.NOT_CACHED: Case(lambda scene: scene.ask(cache_control="only-if-cached")),
    Outcome.CANCELLED: Case(_hang_up),
}


def ended(scene: Scene) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """The estimates so far, by team and outcome, and those whose duration is known, by outcome."""
    scraped, requests, durations = scrape(scene.client), Counter[tuple[str, str]](), Counter[str]()
    for (team, operation, outcome), value in scraped.series("requests_total", "team", "operation", "outcome").items():
        requests[team, outcome] += int(value) * (operation == "estimate")
    series = scraped.series("request_duration_seconds_count", "operation", "outcome")
    for (operation, outcome), value in series.items():
        durations[outcome] += int(value) * (operation == "estimate")
    return requests, durations


class TestCounters:
    @pytest.mark.usefixtures("cold")
    @pytest.mark.parametrize("outcome", CASES)
    def test_each_request_counts_once_with_its_team_and_outcome(self, outcome: Outcome, watched: Opened) -> None:
        case = CASES[outcome]
        scene = watched(**case.sections)
        case.before(scene)
        wait_until(lambda: ended(scene)[0].total() == (case.before is not _nothing))
        requests, durations = ended(scene)
        case.act(scene)
        outcomes = [outcome.value, *(other.value for other in case.besides)]
        wait_until(lambda: ended(scene)[0].total() >= requests.total() + len(outcomes))
        assert ended(scene) == (
            requests + Counter((case.team, other) for other in outcomes),
            durations + Counter(outcomes),
        )
        assert scrape(scene.client).value("unpriced_total", team="design") == (outcome is Outcome.UNPRICED)

    def test_a_defect_counts_too(self) -> None:
        metrics = Metrics(TEAMS)

        async def broken(_: Ask, trace: Trace) -> Ending:
            trace.team = "design"
            raise RuntimeError("the reason is for the log")

        endpoint = StoryEndpoint(
            "estimate", broken, lifecycle=Lifecycle(), metrics=metrics, max_body_bytes=9, timeout_s=5
        )
        with serving(Starlette(routes=[Route("/", endpoint)])) as url:
            assert httpx2.post(url, trust_env=False).status_code == 500
        labels = {"team": "design", "operation": "estimate", "outcome": "internal-error"}
        assert metrics.registry.get_sample_value("estimate_proxy_requests_total", labels) == 1
        assert {*CASES, Outcome.INTERNAL_ERROR} == {*Outcome}

    def test_what_is_no_estimate_is_told_apart(self, watched: Opened) -> None:
        scene = watched()
        asked = [
            ("design", "hit", scene.client.get("/v1/quota")),
            ("design", "hit", scene.client.get("/v1/usage")),
            ("design", "miss", scene.client.post("/v1/explain", content=FLUX)),
            ("design", "unauthenticated", scene.client.get(METRICS_PATH)),
            ("-", "unauthenticated", scene.client.get("/v1/usage", headers={"x-api-key": "ep_nobody"})),
            ("-", "invalid", scene.client.get("/nothing")),
            ("-", "invalid", scene.client.get(PATH)),
            ("-", "hit", scene.client.get(METRICS_PATH, headers={"x-api-key": SCRAPER})),
        ]
        found = scrape(scene.client).series("requests_total", "team", "operation", "outcome")
        others = {(team, outcome): value for (team, operation, outcome), value in found.items() if operation == "other"}
        assert others == Counter((team, outcome) for team, outcome, _ in asked)
        assert ended(scene)[0].total() == 0

    def test_credits_are_counted_by_team_and_model_each_time_they_are_told(self, watched: Opened) -> None:
        scene = watched()
        for body, token in ((FLUX, DESIGN), (FLUX, DESIGN), (FLUX, MARKETING), (ONE, DESIGN)):
            assert scene.ask(body, x_api_key=token).status_code == 200
        assert scene.ask('[{"model":"Flux"},{"segment":{}}]').status_code == 200
        assert scrape(scene.client).series("estimated_credits_total", "team", "model") == {
            ("design", "Flux"): 5.5,
            ("marketing", "Flux"): 2.75,
            ("design", "-"): 1,
            ("design", "mixed"): 7.75,
        }

    @pytest.mark.parametrize("model", ["ünï", "x" * 65, 'a"b', "a\\nb", "-", "mixed", "{}"])
    def test_a_model_with_a_name_that_is_none_is_another(self, model: str, watched: Opened) -> None:
        scene = watched()
        assert scene.ask('[{"model":"' + model.replace('"', '\\"') + '"}]').status_code == 200
        assert scrape(scene.client).series("estimated_credits_total", "team", "model") == {("design", "other"): 1}

    def test_models_are_bounded_as_in_usage(self, watched: Opened) -> None:
        scene = watched()
        for number in range(MAX_MODELS + 5):
            assert scene.ask(b'[{"model":"model %d"}]' % number).status_code == 200
        counted = scrape(scene.client).series("estimated_credits_total", "team", "model")
        rows = scene.client.get("/v1/usage?by=model").json()["rows"]
        assert counted == {("design", row["model"]): row["estimated_credits"] for row in rows}
        assert len(counted) == MAX_MODELS + 1
        assert counted["design", "other"] == 5

    def test_warnings_are_counted_by_quota(self, watched: Opened) -> None:
        warn = [quota(2, "day", on_exceed="warn"), quota(3, "week", "requests", on_exceed="warn"), quota(100)]
        scene = watched(teams=limited(*warn), org={"quotas": [quota(9, on_exceed="warn")], "timezone": MORNING})
        for _ in range(5):
            assert scene.ask(FLUX).status_code == 200
        assert scrape(scene.client).series("quota_warned_total", "team", "measure", "per") == {
            ("design", "estimated_credits", "day"): 5,
            ("design", "requests", "week"): 2,
            ("-", "estimated_credits", "month"): 2,
        }

    def test_upstream_is_counted_by_what_it_said(self, watched: Opened) -> None:
        scene = watched(upstream={"timeout_s": 0.3})
        faults = [Fault.SERVER_ERROR, Fault.HANG, Fault.BUSY_FOR_NO_TIME, Fault.REDIRECT, Fault.HTML_IN_200]
        scene.simulator.script(None, None, *faults)
        scene.ask(ONE)
        scene.ask('[{"segment":"ast_missing"}]')
        for number in range(len(faults)):
            scene.ask(b'[{"seed":%d}]' % number)
        assert _statuses(scene) == {"2xx": 1, "4xx": 2, "5xx": 1, "timeout": 1, "error": 2}

    def test_an_upstream_out_of_reach_is_an_error(self, watched: Opened) -> None:
        scene = watched(upstream={"base_url": f"http://127.0.0.1:{free_port()}"})
        assert code_of(scene.ask()) == "upstream-error"
        assert _statuses(scene) == {"error": 1}

    def test_the_stores_calls_have_the_names_of_their_scripts(self, watched: Opened) -> None:
        found = scrape(toured(watched()).client).series("store_duration_seconds_count", "call")
        assert {("ledger_decide",), ("price_get",), ("price_put",), ("ledger_read",)} < found.keys()
        scripts = {path.stem for path in (Path(__file__).parent.parent / "proxy" / "lua").glob("*.lua")}
        assert {call for (call,) in found} <= scripts


def _statuses(scene: Scene) -> dict[str, float]:
    """How often upstream was asked for `default`, by what it said; it never was for another account."""
    series = scrape(scene.client).series("upstream_request_duration_seconds_count", "account", "status")
    asked = {key: value for key, value in series.items() if value}
    assert {account for account, _ in asked} == {"default"}
    return {status: value for (_, status), value in asked.items()}


# --- what gauges show -------------------------------------------------------------------------------------------

LEDGER_GAUGES = {family.name for family in families().values() if family.from_ledger} - {
    "estimate_proxy_ledger_created_timestamp_seconds",
    "estimate_proxy_balance_credits",
    "estimate_proxy_balance_age_seconds",
}


def hanging(store: OwnLedger) -> AbstractContextManager[None]:
    return store.hanging()


@contextmanager
def dead(store: OwnLedger) -> Iterator[None]:
    store.kill()
    yield
    store.start()


@pytest.mark.usefixtures("fresh")
class TestStores:
    @pytest.mark.parametrize("out_of_reach", [hanging, dead])
    def test_without_its_ledger_a_gateway_shows_no_old_numbers(
        self,
        out_of_reach: Callable[[OwnLedger], AbstractContextManager[None]],
        ledger: OwnLedger,
        valkey_url: str,
        watched: Opened,
    ) -> None:
        ledger.start()
        scene = watched(store={"url": ledger.url}, cache={"url": valkey_url}, org={"quotas": [quota(5)]})
        assert scene.ask(ONE).status_code == 200
        before = scrape(scene.client)
        assert (up(before), _present(before)) == ({"ledger": 1, "price-book": 1}, LEDGER_GAUGES)
        with out_of_reach(ledger):
            wait_until(lambda: up(scrape(scene.client)) == {"ledger": 0, "price-book": 1})
            during = scrape(scene.client)
            assert _present(during) == set()
            assert during.series("balance_credits", "account") == {("default",): 10_000}
        wait_until(lambda: up(scrape(scene.client)) == {"ledger": 1, "price-book": 1})
        wait_until(lambda: _present(scrape(scene.client)) == LEDGER_GAUGES)
        after = scrape(scene.client)
        assert after.value("window_estimated_credits", team="design", per="day") == 1

    def test_without_its_price_book_it_shows_no_old_balance(
        self, ledger: OwnLedger, valkey_url: str, watched: Opened
    ) -> None:
        ledger.start()
        scene = watched(store={"url": valkey_url}, cache={"url": ledger.url}, org={"quotas": [quota(5)]})
        assert scene.ask(ONE).status_code == 200
        with ledger.hanging():
            wait_until(lambda: up(scrape(scene.client)) == {"ledger": 1, "price-book": 0})
            during = scrape(scene.client)
            assert _present(during) == LEDGER_GAUGES
            assert during.series("balance_credits", "account") == {}
            assert during.series("balance_age_seconds", "account") == {}
        wait_until(lambda: scrape(scene.client).series("balance_credits", "account") == {("default",): 10_000})
        assert up(scrape(scene.client)) == {"ledger": 1, "price-book": 1}

    def test_a_debit_without_a_reply_and_one_that_waits(
        self, ledger: OwnLedger, valkey_url: str, watched: Opened
    ) -> None:
        ledger.start()
        scene = watched(store={"url": ledger.url, "on_outage": "admit"}, cache={"url": valkey_url})
        with ledger.hanging():
            assert code_of(scene.ask(ONE)) == "store-unavailable"
            assert [scene.ask(ONE).status_code for _ in range(2)] == [200, 200]
            during = scrape(scene.client)
            assert (during.value("unanswered_debits_total"), during.value("buffered_debits")) == (1, 2)
        wait_until(lambda: scrape(scene.client).value("buffered_debits") == 0)

    def test_a_ledger_that_was_lost(self, watched: Opened) -> None:
        scene = watched()
        scene.ask(ONE)
        created = scrape(scene.client).value("ledger_created_timestamp_seconds")
        assert created is not None
        scene.store.flushall()
        scene.ask(ONE)
        after = scrape(scene.client)
        assert after.value("ledger_lost_total") == 1
        assert (after.value("ledger_created_timestamp_seconds") or 0) > created


def up(scraped: Scraped) -> dict[str, float]:
    return {role: value for (role,), value in scraped.series("store_up", "role").items()}


def _present(scraped: Scraped) -> set[str]:
    """Which of the ledger's gauges have numbers."""
    return {name for name, _ in scraped.samples} & LEDGER_GAUGES


class TestGauges:
    def test_the_circuit(self, watched: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("proxy.circuit.OPEN_S", 0.1)
        scene = watched()
        scene.simulator.script(*[Fault.SERVER_ERROR] * MIN_ANSWERS)
        for _ in range(MIN_ANSWERS):
            assert _circuits(scene) == {"default": 0, "second": 0}
            assert code_of(scene.ask()) == "upstream-error"
        assert _circuits(scene) == {"default": 1, "second": 0}
        wait_until(lambda: scene.ask().status_code == 200)
        assert _circuits(scene) == {"default": 0, "second": 0}

    def test_what_is_in_flight(self, watched: Opened) -> None:
        scene = watched()
        assert scrape(scene.client).value("requests_in_flight") == 1, "the scrape itself"
        with ThreadPoolExecutor() as pool, scene.simulator.hold() as hold:
            asked = [pool.submit(scene.ask, b'[{"seed":%d}]' % number) for number in range(3)]
            assert scene.simulator.arrived(3)
            assert scrape(scene.client).value("requests_in_flight") == 4
            hold.release()
            assert [future.result().status_code for future in asked] == [200] * 3
        wait_until(lambda: scrape(scene.client).value("requests_in_flight") == 1)

    def test_windows_are_what_usage_says(self, watched: Opened) -> None:
        scene = watched(org={"timezone": MORNING})
        for body, token in ((FLUX, DESIGN), (FLUX, DESIGN), (ONE, MARKETING), (b"[{},{}]", DESIGN)):
            assert scene.ask(body, x_api_key=token).status_code == 200
        assert code_of(scene.ask("{}")) == "invalid-body"
        scraped = scrape(scene.client)
        assert booked(scraped) == usage(scene.client, ADMIN, TEAMS)
        assert booked(scraped)["design", "day"] == (3, 7.5)
        assert booked(scraped)["retired", "month"] == (0, 0)

    def test_each_window_has_its_own_number(self, watched: Opened) -> None:
        scene, keys, zone = watched(org={"timezone": MORNING}), LedgerKeys("default"), ZoneInfo(MORNING)
        for number, per in enumerate(PERS, 1):
            counter = keys.counter("design", per, window_of(per, int(time.time()), zone))
            scene.store.hset(counter, mapping={"requests": number, "credits": number * 1_500_000})
        found = booked(scrape(scene.client))
        assert [found["design", per] for per in PERS] == [(1, 1.5), (2, 3.0), (3, 4.5)]
        assert found["marketing", "month"] == (0, 0)

    def test_quotas_are_what_their_teams_are_shown(self, watched: Opened) -> None:
        wait_until(lambda: time.time() % 60 < 55)  # no minute may end meanwhile
        quotas = [quota(100.5), quota(7, "minute", "requests"), quota(0, "hour", on_exceed="warn")]
        scene = watched(teams=limited(*quotas), org={"quotas": [quota(9000, "week", "requests")], "timezone": MORNING})
        for token in (DESIGN, DESIGN, MARKETING):
            assert scene.ask(FLUX, x_api_key=token).status_code == 200
        shown = scene.client.get("/v1/quota", headers={"x-api-key": ADMIN}).json()["teams"]
        told = {_key(team["team"], quota): quota for team in shown for quota in team["quotas"]}
        scraped = scrape(scene.client)
        for name, member in (("quota_limit", "limit"), ("quota_used", "used")):
            found = scraped.series(name, "scope", "team", "measure", "per")
            assert found == {key: quota[member] for key, quota in told.items()}
        for name, member in (("window_start", "window_start"), ("window_end", "resets_at")):
            found = scraped.series(f"{name}_timestamp_seconds", "per")
            ends = {(per,): datetime.fromisoformat(quota[member]).timestamp() for (*_, per), quota in told.items()}
            assert found.items() >= ends.items()
            assert {per for (per,) in found} == {"minute", "hour", "day", "week", "month"}
        assert scraped.value("quota_used", scope="org", team="-", measure="requests", per="week") == 3

    def test_the_balance_is_the_fleets(self, watched: Opened) -> None:
        asked = watched()
        assert asked.ask().status_code == 200
        asked.age(100)
        idle = watched()
        scraped = scrape(idle.client)
        assert scraped.series("balance_credits", "account") == {("default",): 10_000}
        age = scraped.value("balance_age_seconds", account="default")
        assert age is not None
        assert 100 <= age < 100 + START_S
        assert scraped.series("balance_age_seconds", "account").keys() == {("default",)}

    @pytest.mark.usefixtures("fresh")
    def test_a_balance_that_another_gateway_has_seen_is_shown_here(self, watched: Opened) -> None:
        asked, idle = watched(), watched()
        for number, balance in enumerate((41, 17)):
            asked.simulator.balance = balance
            assert asked.ask(b'[{"seed":%d}]' % number).status_code == 200
            wait_until(lambda: scrape(idle.client).value("balance_credits", account="default") == balance)  # noqa: B023

    def test_stores_are_read_at_most_every_few_seconds(self, watched: Opened) -> None:
        scrape(watched().client)  # the store knows the scripts now
        scene = watched()
        first, calls = _scrapes_until_read(scene), _script_calls(scene)
        next_ = _scrapes_until_read(scene)
        assert next_[-1].ended - first[-1].began >= SNAPSHOT_S
        assert len(next_) > 10
        assert _script_calls(scene) - calls == 3 + len(ACCOUNTS), "which ledger, windows, quotas, books"


def _circuits(scene: Scene) -> dict[str, float]:
    series = scrape(scene.client).series("upstream_circuit_open", "account")
    return {account: value for (account,), value in series.items()}


def _script_calls(scene: Scene) -> int:
    """How many scripts the store has run."""
    stats: Any = scene.store.info("commandstats")
    return int(stats["cmdstat_evalsha"]["calls"])


class Took(NamedTuple):
    began: float
    ended: float


def _scrapes_until_read(scene: Scene) -> list[Took]:
    """Scrapes, the last of which has read the stores."""
    calls, scrapes = _script_calls(scene), list[Took]()
    while _script_calls(scene) == calls:
        began = time.monotonic()
        scrape(scene.client)
        scrapes.append(Took(began, time.monotonic()))
    return scrapes


def _key(team: str, quota: Tree) -> tuple[str, str, str, str]:
    """A quota's labels; the organisation's is shown to each team."""
    return quota["scope"], team if quota["scope"] == "team" else "-", quota["measure"], quota["per"]


class TestLabels:
    CANARY = "CaNaRy"

    def test_no_value_comes_from_a_request_but_the_model(self, watched: Opened) -> None:
        scene = watched(**EVERYTHING)
        for ask in (self._odd_estimates, self._odd_requests, self._odd_purges):
            ask(toured(scene))
        labels = {pair for _, labels in scrape(scene.client).samples for pair in labels}
        values: dict[str, set[str]] = defaultdict(set)
        for label, value in labels:
            values[label].add(value)
        assert values.pop("model") == {"Flux", self.CANARY, "other"}
        assert all(re.fullmatch(r"[0-9.]+|\+Inf", bound) for bound in values.pop("le"))
        scripts = {path.stem for path in (Path(__file__).parent.parent / "proxy" / "lua").glob("*.lua")}
        assert values.pop("call") <= scripts
        assert values == {
            "team": {"-", *TEAMS},
            "operation": {"estimate", "other"},
            "outcome": {*Outcome},
            "account": {*ACCOUNTS},
            "status": {*UPSTREAM_STATUSES},
            "role": {"ledger", "price-book"},
            "result": {*AUDIT_RESULTS},
            "version": {__version__},
            "scope": {"team", "org"},
            "measure": {"requests", "estimated_credits"},
            "per": {*PERS},
        }

    def _odd_estimates(self, scene: Scene) -> None:
        assert scene.ask(b'[{"model":"CaNaRy"}]').status_code == 200
        assert scene.ask('[{"model":"CaNaRy\\n\\"}"}]').status_code == 200
        for headers in ({"x_api_key": self.CANARY}, {"x_api_key": token_of("C" * 32)}, {"content_type": "CaNaRy/x"}):
            assert scene.ask(**headers).status_code in {401, 415}
        named = {"x_request_id": self.CANARY, "user_agent": self.CANARY, "host": "canary.example", "x_team": "canary"}
        assert scene.ask(**named).status_code == 200
        assert scene.client.post(f"{PATH}?team=CaNaRy&account=CaNaRy", content=FLUX).status_code == 200

    def _odd_requests(self, scene: Scene) -> None:
        for path in ("/CaNaRy", f"{PATH}/CaNaRy", "/v1/usage?team=CaNaRy", "/v1/quota?CaNaRy=1", "/metrics/CaNaRy"):
            assert scene.client.get(path).status_code in {400, 403, 404}
        for method in ("CANARY", "DELETE", "OPTIONS"):
            answer = scene.raw(f"{method} {PATH} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            assert answer.split()[1] in {b"400", b"405"}

    def _odd_purges(self, scene: Scene) -> None:
        admin = {"x-api-key": ADMIN}
        assert scene.client.post("/v1/cache/purge", content=b'{"account":"canary","all":true}', headers=admin).is_error
        assert scene.client.get("/v1/usage?team=canary&by=team", headers=admin).is_error
