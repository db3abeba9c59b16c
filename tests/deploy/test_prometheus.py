"""Dashboards, rules and alerts show something: a real Prometheus that scrapes a real gateway answers their queries.

One performance for all tests of this file, in three acts:

* `busy`: three teams had hits, misses, refusals, warnings and answers without a price; then upstream failed.
* `shut`: the stores do not answer, and debits wait.
* `lost`: the ledger has begun anew, and a changed config is refused.
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
from gateway_process import START_S, Tree, address_of, gateway_runner
from prometheus import MORNING, PERS, SCRAPER, Point, Prometheus, prometheus, text_of, usage
from proxy.auth import digest_of, token_of
from proxy.gateway.fetcher import AUDIT_PAUSE_S
from proxy.http.metrics_endpoint import SNAPSHOT_S
from scripted_simulator import Simulator
from serving import free_port, wait_until

ADMIN, WEB = token_of("a" * 32), token_of("w" * 32)

FLUX, ONE, ONE_AGAIN, VIDEO = b'[{"model":"Flux"}]', b"[{}]", b'[{"seed":7}]', b'[{"video_anyone":{}}]'
"""2.75, 1, 1 and 30 credits at the simulator's."""

ACT_S = 20.0
"""Until Prometheus has seen what an act is about."""

RANGE_S = 30
"""What a reader of the dashboards looks at, and the ranges of rates: longer than the performance so far."""

Alerts = list[dict[str, Any]]


def quota(limit: int, per: str, measure: str = "estimated_credits", on_exceed: str = "refuse") -> Tree:
    return {"measure": measure, "limit": limit, "per": per, "on_exceed": on_exceed}


def sections(ledger: StoreProcess, book: StoreProcess) -> dict[str, Tree]:
    """Design comes near a quota, marketing uses one up and has a token that expires, and web passes one that warns."""
    in_a_week = str(datetime.now(UTC).date() + timedelta(days=7))
    return {
        "store": {"url": ledger.url, "on_outage": "admit"},
        "cache": {"url": book.url, "balance_max_age_s": 0, "ignore": ["seed"]},
        "metrics": {"tokens": [digest_of(SCRAPER)]},
        "admin": {"tokens": [digest_of(ADMIN)]},
        "org": {"timezone": MORNING, "quotas": [quota(5000, "month")]},
        "teams": {
            "design": {"tokens": [digest_of(DESIGN)], "quotas": [quota(38, "day"), quota(100, "month")]},
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


def renders(**faults: float) -> Simulator:
    """A RenderNet with these faults, by their probability. What is left of the balance is little."""
    return Simulator(api_key=API_KEY, balance=900, spend_every=0, faults={Fault[n]: p for n, p in faults.items()})


@dataclass(frozen=True)
class Stand:
    """What the performance is played with."""

    config: Path
    client: httpx2.Client
    upstream: UpstreamFixture
    ledger: StoreProcess
    book: StoreProcess
    seen_by: Prometheus

    def ask(self, token: str, body: bytes = FLUX, **headers: str) -> int:
        """The status of an estimate."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(PATH, content=body, headers={"x-api-key": token, **named}).status_code

    def ask_each(self, token: str, *bodies: bytes, **headers: str) -> list[int]:
        return [self.ask(token, body, **headers) for body in bodies]

    def moment(self) -> float:
        """When the gateway was scraped last."""
        (point,) = self.seen_by.at(None, "max(timestamp(estimate_proxy_build_info))")
        return point.value

    def until_seen(self, *, behind_s: float = 0.0) -> float:
        """The moment of a scrape that began so long behind now."""
        now = time.time() + behind_s
        wait_until(lambda: self.moment() > now, within_s=ACT_S)
        return self.moment()

    def alerts(self, wanted: Collection[str]) -> Alerts:
        """What is true by Prometheus' own evaluation, as soon as that is all of `wanted`, or has had the time to be."""
        with suppress(AssertionError):  # a test says which are missing
            wait_until(lambda: set(wanted) <= _names(self.seen_by.alerts()), within_s=ACT_S)
        return self.seen_by.alerts()


def _names(alerts: Alerts) -> set[str]:
    return {alert["labels"]["alertname"] for alert in alerts}


@dataclass(frozen=True)
class Performance:
    """What Prometheus saw, which alerts were true in each act, and what `GET /v1/usage` said when it was busy.

    before, busy: moments to ask for.
    """

    seen_by: Prometheus
    before: float
    busy: float
    usage: Mapping[tuple[str, str], tuple[float, float]]
    alerts: Mapping[str, Alerts]


@pytest.fixture(scope="module")
def performance(tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamFixture) -> Iterator[Performance]:
    upstream.simulator = renders()
    with ExitStack() as opened:
        runner = opened.enter_context(gateway_runner(tmp_path_factory.mktemp("gateway"), upstream.url))
        ledger, book = opened.enter_context(store_process()), opened.enter_context(store_process())
        ledger.start()
        book.start()
        served = runner.start(**sections(ledger, book))
        client = opened.enter_context(served.client())
        targets = ("{}:{}".format(*address_of(served.url)), f"127.0.0.1:{free_port()}")
        seen_by = opened.enter_context(prometheus(*targets))
        yield _perform(Stand(runner.folder / "estimate-proxy.toml", client, upstream, ledger, book, seen_by))


def _perform(stand: Stand) -> Performance:
    before = time.time() - 600
    wait_until(lambda: stand.seen_by.at(None, "estimate_proxy_build_info"), within_s=START_S)
    stand.until_seen()
    _be_busy(stand)
    _fail_upstream(stand)
    stand.until_seen(behind_s=SNAPSHOT_S)
    alerts = {"busy": stand.alerts(ALERTING["busy"])}
    busy, told = time.time(), usage(stand.client, ADMIN, ("design", "marketing", "web", "retired"))
    stand.upstream.simulator = renders()
    wait_until(lambda: _lose_a_reply(stand))
    with stand.ledger.hanging(), stand.book.hanging():
        wait_until(lambda: stand.ask(DESIGN, ONE) == 200)  # when upstream is asked again and answers, a debit waits
        alerts["shut"] = stand.alerts(ALERTING["shut"])
    _lose_the_ledger(stand)
    stand.config.write_text("[nonsense]\n")
    alerts["lost"] = stand.alerts(ALERTING["lost"])
    return Performance(stand.seen_by, before, busy, told, alerts)


def _be_busy(stand: Stand) -> None:
    """Series that begin with an event need another scrape before they can be seen to grow: there are two rounds."""
    for _ in range(2):
        assert stand.ask_each(DESIGN, *[FLUX] * 5) == [200] * 5
        assert stand.ask_each(WEB, *[FLUX] * 4) == [200] * 4
        stand.until_seen()
    _answer_oddly(stand)
    assert stand.ask_each(WEB, FLUX, FLUX) == [200, 429]
    assert stand.ask_each(MARKETING, *[FLUX] * 7) == [*[200] * 5, 429, 429]
    assert [stand.ask("ep_nobody"), stand.ask(RETIRED), stand.ask(DESIGN, b"{}")] == [401, 403, 400]
    stand.until_seen(behind_s=AUDIT_PAUSE_S)
    _change_prices(stand)
    assert stand.ask(DESIGN, VIDEO) == 402


def _answer_oddly(stand: Stand) -> None:
    """Upstream gives no price, and refuses the key."""
    stand.upstream.simulator.script(*[Fault.UNPRICED_NULL] * 4, Fault.REFUSED_KEY)
    bodies = [b'[{"narrator":{"script":"%d"}}]' % number for number in range(5)]
    assert stand.ask_each(WEB, *bodies) == [*[200] * 4, 502]


def _change_prices(stand: Stand) -> None:
    """Behind a hit upstream says another price, and then one for a body whose ignored member differs."""
    assert stand.ask(DESIGN, ONE) == 200
    for body, estimated, result in ((ONE, 2, "changed"), (ONE_AGAIN, 3, "ignored-member")):
        _let_a_hit_be_checked(stand)
        stand.upstream.simulator.script(priced(estimated))
        assert stand.ask(DESIGN, body) == 200
        line = f'price_audits_total{{account="default",result="{result}"}} 1.0'
        wait_until(lambda line=line: line in _metrics(stand))  # type: ignore[misc]  # a default


def _let_a_hit_be_checked(stand: Stand) -> None:
    """Another one was a moment ago, and there are some seconds between two."""
    with redis.Redis.from_url(stand.book.url) as store:
        for key in store.scan_iter("ep1:book:*"):
            store.hdel(key, "audit_until_ms")


def _fail_upstream(stand: Stand) -> None:
    """Until it is not asked any more."""
    stand.upstream.simulator = renders(SERVER_ERROR=1.0)
    wait_until(lambda: stand.ask(DESIGN, ONE, cache_control="no-cache") == 503)


def _lose_a_reply(stand: Stand) -> bool:
    """Whether a debit was sent before the gateway had noticed that its connections lead nowhere."""
    with stand.ledger.hanging():
        return stand.ask(DESIGN, ONE) == 503 and not _has(stand, "unanswered_debits_total", 0)


def _lose_the_ledger(stand: Stand) -> None:
    wait_until(lambda: _has(stand, "buffered_debits", 0))
    with redis.Redis.from_url(stand.ledger.url) as store:
        store.flushall()
    wait_until(lambda: stand.ask(DESIGN, b"[{},{}]") == 200)


def _has(stand: Stand, name: str, value: float) -> bool:
    return f"estimate_proxy_{name} {value:.1f}\n" in _metrics(stand)


def _metrics(stand: Stand) -> str:
    return text_of(stand.client)


# --- what is seen -----------------------------------------------------------------------------------------------

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
    "shut": {
        "EstimateProxyLedgerDown",
        "EstimateProxyPriceBookDown",
        "EstimateProxyUnansweredDebits",
        "EstimateProxyDebitsWaiting",
    },
    "lost": {"EstimateProxyLedgerLost", "EstimateProxyReloadFailed"},
}
"""Alerts whose expressions are true in an act."""

NOBODY_THERE = "EstimateProxyAllDown"
"""True before anything was scraped."""

EASED: dict[str, list[tuple[str, str]]] = {
    # It takes two days of a month, and a pace that depends on today's date.
    "EstimateProxyMonthQuotaPace": [("} > 1", "}"), (" > 2 * 86400", "")],
    # It takes gateways that were set up wrongly, on two ledgers.
    "EstimateProxyLedgersDiffer": [(") > 1", ")")],
    # It takes many refusals, where this gateway admits.
    "EstimateProxyStoreUnavailable": [('outcome="store-unavailable"', 'outcome="hit"')],
    # It takes a week, and a hundred answers an hour.
    "EstimateProxyHitRatioCollapsed": [(" offset 1w", ""), ("- 0.25", "+ 0.25"), (">= 100", ">= 10")],
}
"""Alerts that no performance of some seconds makes true, with what is changed in their expressions."""

CHOICES: list[Mapping[str, str]] = [EVERYTHING, {**EVERYTHING, "job": "estimate-proxy", "team": "design|web"}]


def is_data(points: Sequence[Point]) -> bool:
    """At least one number: what is divided by nothing is none."""
    return any(isfinite(point.value) for point in points)


def shown(performance: Performance, query: Query) -> list[Point]:
    """What Grafana would draw."""
    if query.instant:
        return performance.seen_by.at(performance.busy, query.expr)
    return performance.seen_by.until(performance.busy, query.expr, since_s=RANGE_S)


@pytest.mark.parametrize("chosen", CHOICES, ids=["everything", "a choice"])
@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard["uid"])
def test_every_panel_shows_data(dashboard: Tree, chosen: Mapping[str, str], performance: Performance) -> None:
    asked = queries(dashboard, chosen, range_s=RANGE_S, rate_interval_s=RANGE_S)
    assert asked
    assert [str(query) for query in asked if not is_data(shown(performance, query))] == []


def test_the_windows_panels_show_what_usage_says(performance: Performance) -> None:
    spend = queries(dashboards()[0])
    titles = ("Estimated today", "Estimated this week", "Estimated this month")
    for per, title in zip(PERS, titles, strict=True):
        (query,) = (query for query in spend if query.panel == title)
        (point,) = shown(performance, query)
        assert point.value == sum(amount for (_, p), (_, amount) in performance.usage.items() if p == per) > 40


def test_the_windows_are_what_usage_says_team_by_team(performance: Performance) -> None:
    for number, name in enumerate(("requests", "estimated_credits")):
        points = performance.seen_by.at(performance.busy, f"estimate_proxy_window_{name}")
        found = {(point.labels["team"], point.labels["per"]): point.value for point in points}
        assert found == {key: told[number] for key, told in performance.usage.items()}


def test_every_recorded_series_is_there(performance: Performance) -> None:
    names = {rule["record"] for rule in RECORDED}
    assert len(names) > 10
    assert {name for name in names if not is_data(performance.seen_by.at(performance.busy, name))} == set()


def test_every_rule_can_be_evaluated(performance: Performance) -> None:
    rules = [rule for group in performance.seen_by.groups() for rule in group["rules"]]
    assert len(rules) == len(RECORDED) + len(ALERTS)
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}


def test_every_alert_is_true_when_it_should_be(performance: Performance) -> None:
    named = [NOBODY_THERE, *EASED, *set().union(*ALERTING.values())]
    assert sorted(named) == sorted(alert["alert"] for alert in ALERTS)
    missing = {act: names - _names(performance.alerts[act]) for act, names in ALERTING.items()}
    assert missing == {act: set() for act in ALERTING}
    assert is_data(performance.seen_by.at(performance.before, _expression(NOBODY_THERE)))
    assert not is_data(performance.seen_by.at(performance.busy, _expression(NOBODY_THERE)))


@pytest.mark.parametrize("alert", EASED)
def test_the_other_alerts_look_at_series_that_are_there(alert: str, performance: Performance) -> None:
    expression = _expression(alert)
    for condition, eased in EASED[alert]:
        assert condition in expression
        expression = expression.replace(condition, eased)
    assert is_data(performance.seen_by.at(performance.busy, expression))


def _expression(alert: str) -> str:
    (found,) = (rule["expr"] for rule in ALERTS if rule["alert"] == alert)
    return str(found)


def test_the_texts_of_alerts_have_their_numbers(performance: Performance) -> None:
    found = [alert for alerts in performance.alerts.values() for alert in alerts]
    for text in (text for alert in found for text in alert["annotations"].values()):
        assert not re.search(r"error expanding|<no value>|NaN|%!|\{\{", text), text
