"""Queries of the dashboards, rules and alerts, run by a real Prometheus that scrapes a real gateway.

All tests of this file read the result of one scenario with three phases:

* `busy`: three teams had hits, misses, refusals, warnings and answers without a price; then upstream failed.
* `outage`: the stores do not answer, and debits wait.
* `lost`: the ledger was created again, and a changed config is refused.
"""

import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import isfinite
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from alert_rules import ALERTS, RECORDED
from dashboard_queries import EVERYTHING, Query, dashboards, queries
from faulty_rendernet import Fault
from fleet import StoreProcess, priced, store_process
from gateway_fixture import API_KEY, DESIGN, MARKETING, PATH, RETIRED, UpstreamFixture
from gateway_process import START_S, Tree, gateway_runner
from past_usage import put_past_usage
from prometheus import MORNING, PERS, SCRAPER, Point, Prometheus, prometheus, text_of, usage
from proxy.auth import digest_of, token_of
from scripted_simulator import Simulator
from serving import free_port, wait_until

ADMIN, WEB = token_of("a" * 32), token_of("w" * 32)

FLUX, ONE, ONE_AGAIN, VIDEO = b'[{"model":"Flux"}]', b"[{}]", b'[{"seed":7}]', b'[{"video_anyone":{}}]'
"""The simulator's prices for them are 2.75, 1, 1 and 30 credits."""

PHASE_TIMEOUT_S = 20.0
"""How long to wait until Prometheus has scraped and evaluated the changes of a phase."""

QUICK = {
    "proxy.gateway.audits.AUDIT_PAUSE_S": 0.2,
    "proxy.http.metrics_endpoint.SNAPSHOT_S": 0.5,
    "proxy.settings.reload.CHECK_EVERY_S": 0.2,
}
"""Waits of the gateway, by the constants that set them; by default they are seconds."""

RANGE_S = 30
"""Time range of the dashboards and of their rates. It is longer than the scenario up to `busy`."""

Alerts = list[dict[str, Any]]


def quota(limit: int, per: str, measure: str = "estimated_credits", on_exceed: str = "refuse") -> Tree:
    return {"measure": measure, "limit": limit, "per": per, "on_exceed": on_exceed}


def sections(ledger: StoreProcess, book: StoreProcess) -> dict[str, Any]:
    """Design nearly uses up a quota, marketing uses one up and has a token that expires, web exceeds one that warns."""
    in_a_week = str(datetime.now(UTC).date() + timedelta(days=7))
    return {
        "store": {"url": ledger.url, "on_outage": "admit"},
        "cache": {"url": book.url, "balance_max_age_s": 0, "ignore": ["seed"]},
        "metrics": {"tokens": [digest_of(SCRAPER)]},
        "admin": {"tokens": [digest_of(ADMIN)]},
        "org": {"timezone": MORNING, "quotas": [quota(5000, "month")]},
        "teams": {
            "design": {
                "name": "Design",
                "tokens": [digest_of(DESIGN)],
                "quotas": [quota(38, "day"), quota(100, "month")],
            },
            "marketing": {
                "tokens": [{"sha256": digest_of(MARKETING), "expires": in_a_week}],
                "quotas": [quota(5, "week", "requests")],
            },
            "web": {
                "tokens": [digest_of(WEB)],
                "quotas": [quota(3, "month", "requests", "warn")],
                "rate": {"per_s": 0.001, "burst": 14},
            },
        },
    }


def rendernet(**faults: float) -> Simulator:
    """A RenderNet with these faults, given as probabilities, and a low balance."""
    return Simulator(api_key=API_KEY, balance=900, spend_every=0, faults={Fault[n]: p for n, p in faults.items()})


@dataclass(frozen=True)
class Setup:
    """The gateway under test, and the processes around it."""

    config: Path
    client: httpx2.Client
    upstream: UpstreamFixture
    ledger: StoreProcess
    book: StoreProcess
    server: Prometheus

    def ask(self, token: str, body: bytes = FLUX, **headers: str) -> int:
        """Requests an estimate and returns its HTTP status."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(PATH, content=body, headers={"x-api-key": token, **named}).status_code

    def ask_each(self, token: str, *bodies: bytes, **headers: str) -> list[int]:
        return [self.ask(token, body, **headers) for body in bodies]

    def last_scrape(self) -> float:
        """Returns the Unix time of the gateway's last scrape."""
        (point,) = self.server.at(None, "max(timestamp(estimate_proxy_build_info))")
        return point.value

    def wait_for_scrape(self, *, after_s: float = 0.0) -> float:
        """Waits for a scrape at least `after_s` from now, and returns its time."""
        now = time.time() + after_s
        wait_until(lambda: self.last_scrape() > now, within_s=PHASE_TIMEOUT_S)
        return self.last_scrape()

    def alerts(self, wanted: Collection[str]) -> Alerts:
        """Waits until all of `wanted` are firing or the timeout has passed, and returns the alerts that are."""
        with suppress(AssertionError):  # a test reports which are missing
            wait_until(lambda: set(wanted) <= _names(self.server.alerts()), within_s=PHASE_TIMEOUT_S)
        return self.server.alerts()


def _names(alerts: Alerts) -> set[str]:
    return {alert["labels"]["alertname"] for alert in alerts}


@dataclass(frozen=True)
class ScenarioResult:
    """What Prometheus recorded, the alerts of each phase, and `GET /v1/usage` at the end of `busy`.

    before, busy: Unix times at which to evaluate queries.
    """

    server: Prometheus
    before: float
    busy: float
    usage: Mapping[tuple[str, str], tuple[float, float]]
    alerts: Mapping[str, Alerts]


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamFixture) -> Iterator[ScenarioResult]:
    upstream.simulator = rendernet()
    with ExitStack() as opened:
        runner = opened.enter_context(gateway_runner(tmp_path_factory.mktemp("gateway"), upstream.url))
        ledger, book = opened.enter_context(store_process()), opened.enter_context(store_process())
        ledger.start()
        book.start()
        with redis.Redis.from_url(ledger.url) as store:  # for a forecast, and before the windows of this test
            put_past_usage(store, "design", [*[10] * 28, *[0] * 32], zone=MORNING)
        port, unused_port = free_port(), free_port()
        quick = runner.patching(QUICK)
        served = runner.begin("--port", str(port), env=quick, **sections(ledger, book))
        server = opened.enter_context(prometheus(f"127.0.0.1:{port}", f"127.0.0.1:{unused_port}"))
        served.wait_until_serving()
        client = opened.enter_context(served.client())
        yield _run_scenario(Setup(runner.folder / "estimate-proxy.toml", client, upstream, ledger, book, server))


def _run_scenario(setup: Setup) -> ScenarioResult:
    before = time.time() - 600
    _make_traffic(setup)
    _fail_upstream(setup)
    setup.wait_for_scrape(after_s=QUICK["proxy.http.metrics_endpoint.SNAPSHOT_S"])
    alerts = {"busy": setup.alerts(ALERTING["busy"])}
    busy, amounts = time.time(), usage(setup.client, ADMIN, ("design", "marketing", "web", "retired"))
    setup.upstream.simulator = rendernet()
    wait_until(lambda: _lose_a_reply(setup))
    with setup.ledger.hanging(), setup.book.hanging():
        # once upstream is called again and answers, a debit is waiting
        wait_until(lambda: setup.ask(DESIGN, ONE) == 200)
        alerts["outage"] = setup.alerts(ALERTING["outage"])
    _lose_the_ledger(setup)
    setup.config.write_text("[nonsense]\n")
    alerts["lost"] = setup.alerts(ALERTING["lost"])
    return ScenarioResult(setup.server, before, busy, amounts, alerts)


def _make_traffic(setup: Setup) -> None:
    """Makes two rounds of requests: the first event of a series creates it, only later ones show as growth."""
    for _ in range(2):
        assert setup.ask_each(DESIGN, *[FLUX] * 5) == [200] * 5
        assert setup.ask_each(WEB, *[FLUX] * 4) == [200] * 4
        wait_until(lambda: setup.server.at(None, "estimate_proxy_build_info"), within_s=START_S)
        setup.wait_for_scrape()
    _answer_without_prices(setup)
    assert setup.ask_each(WEB, FLUX, FLUX) == [200, 429]
    assert setup.ask_each(MARKETING, *[FLUX] * 7) == [*[200] * 5, 429, 429]
    assert [setup.ask("ep_nobody"), setup.ask(RETIRED), setup.ask(DESIGN, b"{}")] == [401, 403, 400]
    setup.wait_for_scrape(after_s=QUICK["proxy.gateway.audits.AUDIT_PAUSE_S"])
    _change_prices(setup)
    assert setup.ask(DESIGN, VIDEO) == 402


def _answer_without_prices(setup: Setup) -> None:
    """Makes upstream answer without a price, and refuse the key."""
    setup.upstream.simulator.script(*[Fault.UNPRICED_NULL] * 4, Fault.REFUSED_KEY)
    bodies = [b'[{"narrator":{"script":"%d"}}]' % number for number in range(5)]
    assert setup.ask_each(WEB, *bodies) == [*[200] * 4, 502]


def _change_prices(setup: Setup) -> None:
    """Makes audits find a changed price, and another price for a body whose ignored member differs."""
    assert setup.ask(DESIGN, ONE) == 200
    for body, estimated, result in ((ONE, 2, "changed"), (ONE_AGAIN, 3, "ignored-member")):
        _end_audit_pause(setup)
        setup.upstream.simulator.script(priced(estimated))
        assert setup.ask(DESIGN, body) == 200
        line = f'price_audits_total{{account="default",result="{result}"}} 1.0'
        wait_until(lambda line=line: line in _metrics(setup))  # type: ignore[misc]  # a default


def _end_audit_pause(setup: Setup) -> None:
    """Ends the pause of some seconds between two audits."""
    with redis.Redis.from_url(setup.book.url) as store:
        for key in store.scan_iter("ep1:book:*"):
            store.hdel(key, "audit_until_ms")


def _fail_upstream(setup: Setup) -> None:
    """Makes upstream fail until the circuit breaker opens."""
    setup.upstream.simulator = rendernet(SERVER_ERROR=1.0)
    wait_until(lambda: setup.ask(DESIGN, ONE, cache_control="no-cache") == 503)


def _lose_a_reply(setup: Setup) -> bool:
    """Returns whether a debit was sent before the gateway noticed that the store is hanging."""
    with setup.ledger.hanging():
        return setup.ask(DESIGN, ONE) == 503 and not _has_metric(setup, "unanswered_debits_total", 0)


def _lose_the_ledger(setup: Setup) -> None:
    wait_until(lambda: _has_metric(setup, "buffered_debits", 0))
    with redis.Redis.from_url(setup.ledger.url) as store:
        store.flushall()
    wait_until(lambda: setup.ask(DESIGN, b"[{},{}]") == 200)


def _has_metric(setup: Setup, name: str, value: float) -> bool:
    return f"estimate_proxy_{name} {value:.1f}\n" in _metrics(setup)


def _metrics(setup: Setup) -> str:
    return text_of(setup.client)


# --- queries ----------------------------------------------------------------------------------------------------

ALERTING: dict[str, set[str]] = {
    "busy": {
        "EstimateProxyQuotaNearlyUsed",
        "EstimateProxyQuotaUsedUp",
        "EstimateProxyRefusedByQuota",
        "EstimateProxyKeyRefused",
        "EstimateProxyUpstreamErrors",
        "EstimateProxyCircuitOpen",
        "EstimateProxyPriceChanged",
        "EstimateProxyIgnoredMemberPriced",
        "EstimateProxyUnpriced",
        "EstimateProxyBalanceLow",
        "EstimateProxyDown",
        "EstimateProxyTokenExpires",
    },
    "outage": {
        "EstimateProxyLedgerDown",
        "EstimateProxyPriceBookDown",
        "EstimateProxyUnansweredDebits",
        "EstimateProxyDebitsWaiting",
    },
    "lost": {"EstimateProxyLedgerLost", "EstimateProxyReloadFailed"},
}
"""The alerts that fire in each phase."""

ALL_DOWN = "EstimateProxyAllDown"
"""Fires before the first scrape."""

RELAXED: dict[str, list[tuple[str, str]]] = {
    # It needs two days of a month, and a pace that depends on today's date.
    "EstimateProxyMonthQuotaPace": [("} > 1", "}"), (" > 2 * 86400", "")],
    # It needs gateways that were misconfigured to use two ledgers.
    "EstimateProxyLedgersDiffer": [(") > 1", ")")],
    # It needs many refusals, but this gateway admits requests in an outage.
    "EstimateProxyStoreUnavailable": [('outcome="store-unavailable"', 'outcome="hit"')],
    # It needs a scope that was learned, and a member that begins to count.
    "EstimateProxyInferenceContradicted": [(") > 0", ") >= 0")],
    # It needs a week, and a hundred answers an hour.
    "EstimateProxyHitRatioCollapsed": [(" offset 1w", ""), ("- 0.25", "+ 0.25"), (">= 100", ">= 10")],
}
"""Alerts that no scenario of some seconds can make fire, with replacements in their expressions."""

SELECTIONS: list[Mapping[str, str]] = [EVERYTHING, {**EVERYTHING, "job": "estimate-proxy", "team": "design|web"}]


def is_data(points: Sequence[Point]) -> bool:
    """Returns whether there is at least one finite number; 0/0 gives NaN."""
    return any(isfinite(point.value) for point in points)


def plotted(scenario: ScenarioResult, query: Query) -> list[Point]:
    """Returns the points that Grafana would draw."""
    if query.instant:
        return scenario.server.at(scenario.busy, query.expr)
    return scenario.server.until(scenario.busy, query.expr, since_s=RANGE_S)


@pytest.mark.parametrize("selection", SELECTIONS, ids=["everything", "a selection"])
@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard["uid"])
def test_every_panel_shows_data(dashboard: Tree, selection: Mapping[str, str], scenario: ScenarioResult) -> None:
    panel_queries = queries(dashboard, selection, range_s=RANGE_S, rate_interval_s=RANGE_S)
    assert panel_queries
    assert [str(query) for query in panel_queries if not is_data(plotted(scenario, query))] == []


def test_the_windows_panels_equal_the_usage_endpoint(scenario: ScenarioResult) -> None:
    spend = queries(dashboards()[0])
    titles = ("Estimated today", "Estimated this week", "Estimated this month")
    for per, title in zip(PERS, titles, strict=True):
        (query,) = (query for query in spend if query.panel == title)
        (point,) = plotted(scenario, query)
        assert point.value == sum(amount for (_, p), (_, amount) in scenario.usage.items() if p == per) > 40


def test_teams_are_shown_by_name_or_else_by_id(scenario: ScenarioResult) -> None:
    by_name = [query for dashboard in dashboards() for query in queries(dashboard) if "(name)" in query.expr]
    shown = [point.labels for query in by_name for point in plotted(scenario, query)]
    ids = ("marketing", "web", "retired", "-")
    assert {(labels["team"], labels["name"]) for labels in shown} == {("design", "Design"), *zip(ids, ids, strict=True)}


def test_each_teams_window_gauges_equal_the_usage_endpoint(scenario: ScenarioResult) -> None:
    for number, name in enumerate(("requests", "estimated_credits")):
        points = scenario.server.at(scenario.busy, f"estimate_proxy_window_{name}")
        found = {(point.labels["team"], point.labels["per"]): point.value for point in points}
        assert found == {key: amounts[number] for key, amounts in scenario.usage.items()}


def test_every_recording_rule_has_data(scenario: ScenarioResult) -> None:
    names = {rule["record"] for rule in RECORDED}
    assert len(names) > 10
    assert {name for name in names if not is_data(scenario.server.at(scenario.busy, name))} == set()


def test_every_rule_evaluates_without_an_error(scenario: ScenarioResult) -> None:
    rules = [rule for group in scenario.server.groups() for rule in group["rules"]]
    assert len(rules) == len(RECORDED) + len(ALERTS)
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}


def test_every_alert_fires_in_its_phase(scenario: ScenarioResult) -> None:
    named = [ALL_DOWN, *RELAXED, *set().union(*ALERTING.values())]
    assert sorted(named) == sorted(alert["alert"] for alert in ALERTS)
    missing = {phase: names - _names(scenario.alerts[phase]) for phase, names in ALERTING.items()}
    assert missing == {phase: set() for phase in ALERTING}
    assert is_data(scenario.server.at(scenario.before, _expression(ALL_DOWN)))
    assert not is_data(scenario.server.at(scenario.busy, _expression(ALL_DOWN)))


@pytest.mark.parametrize("alert", RELAXED)
def test_the_relaxed_alerts_query_series_that_exist(alert: str, scenario: ScenarioResult) -> None:
    expression = _expression(alert)
    for condition, relaxed in RELAXED[alert]:
        assert condition in expression
        expression = expression.replace(condition, relaxed)
    assert is_data(scenario.server.at(scenario.busy, expression))


def _expression(alert: str) -> str:
    (found,) = (rule["expr"] for rule in ALERTS if rule["alert"] == alert)
    return str(found)


def test_the_annotations_of_alerts_render_their_values(scenario: ScenarioResult) -> None:
    found = [alert for alerts in scenario.alerts.values() for alert in alerts]
    for text in (text for alert in found for text in alert["annotations"].values()):
        assert not re.search(r"error expanding|<no value>|NaN|%!|\{\{", text), text
