"""`/metrics` has each metric, type and label of the contract, before the first event and after many."""

import re
import time
from collections import defaultdict
from collections.abc import Callable

import httpx2
import pytest

from gateway_fixture import DESIGN, MARKETING, PATH, GatewayFixture, OpenGateway
from gateway_process import START_S, Tree
from lua_scripts import LUA_SCRIPTS
from metric_names import families
from metrics_fixture import ACCOUNTS, ADMIN, FLUX, TEAMS, limited, quota, toured
from prometheus import MORNING, PERS, Scraped, assert_as_declared, said_by_promtool, scrape, scrape_openmetrics
from proxy import __version__
from proxy.auth import digest_of, token_of
from proxy.problems import Outcome
from proxy.telemetry.metrics import AUDIT_RESULTS, INFERENCE_AUDIT_RESULTS, INFERENCE_RESULTS, UPSTREAM_STATUSES

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
    "quota_forecast_credits": ("gauge", {"scope", "team", "measure", "per"}),
    "window_start_timestamp_seconds": ("gauge", {"per"}),
    "window_end_timestamp_seconds": ("gauge", {"per"}),
    "quota_warned_total": ("counter", {"team", "measure", "per"}),
    "upstream_calls_saved_total": ("counter", {"team"}),
    "upstream_seconds_saved_total": ("counter", {"team"}),
    "balance_credits": ("gauge", {"account"}),
    "balance_age_seconds": ("gauge", {"account"}),
    "price_audits_total": ("counter", {"account", "result"}),
    "inferences_total": ("counter", {"account", "result"}),
    "inference_audits_total": ("counter", {"account", "result"}),
    "suspect_answers_total": ("counter", {"account"}),
    "ledger_created_timestamp_seconds": ("gauge", set()),
    "ledger_lost_total": ("counter", set()),
    "unanswered_debits_total": ("counter", set()),
    "descriptors_exhausted_total": ("counter", set()),
    "buffered_debits": ("gauge", set()),
    "log_lines_dropped_total": ("counter", set()),
    "config_last_reload_successful": ("gauge", set()),
    "build_info": ("gauge", {"version"}),
    "token_expires_timestamp_seconds": ("gauge", {"team", "label"}),
    "team_info": ("gauge", {"team", "name"}),
}
"""The table of the public contract."""

EVERYTHING: Tree = {
    "teams": limited(quota(1, on_exceed="warn")),
    "org": {"quotas": [quota(1000, "week", "requests")], "timezone": MORNING},
}


class TestContract:
    def test_the_code_declares_what_the_contract_lists(self) -> None:
        declared = {family.name: (family.kind, set(family.labels)) for family in families().values()}
        assert declared == {f"estimate_proxy_{name}": entry for name, entry in CONTRACT.items()}

    @pytest.mark.parametrize("read", [scrape, scrape_openmetrics])
    def test_both_formats_have_all_metrics(
        self, read: Callable[[httpx2.Client], Scraped], open_scraped_gateway: OpenGateway
    ) -> None:
        assert_as_declared(read(toured(open_scraped_gateway(**EVERYTHING)).client))

    def test_promtool_reports_no_problem(self, open_scraped_gateway: OpenGateway) -> None:
        assert said_by_promtool(toured(open_scraped_gateway(**EVERYTHING)).client) == ""

    def test_outcomes_equal_the_contracts(self) -> None:
        named = """
            hit inferred stale miss collapsed bypass unpriced upstream-rejected rate-limited quota-exceeded over-ceiling
            unauthenticated team-disabled invalid upstream-error upstream-refused upstream-busy upstream-timeout
            store-unavailable overloaded not-cached cancelled internal-error
        """
        assert sorted(Outcome) == sorted(named.split())


class TestBeforeTheFirstEvent:
    """Series exist before their first event, because `rate` and `increase` miss an event that creates a series."""

    @pytest.fixture
    def first(self, open_scraped_gateway: OpenGateway) -> Scraped:
        return scrape(open_scraped_gateway(org={"quotas": [quota(5)]}).client)

    def test_every_team_has_every_outcome(self, first: Scraped) -> None:
        found = first.series("requests_total", "team", "operation", "outcome")
        expected = {(team, "estimate", outcome.value): 0 for team in ("-", *TEAMS) for outcome in Outcome}
        assert {key: value for key, value in found.items() if key[1] == "estimate"} == expected
        durations = first.series("request_duration_seconds_count", "operation", "outcome")
        assert {outcome for operation, outcome in durations if operation == "estimate"} == {*Outcome}
        for name in ("unpriced_total", "upstream_calls_saved_total", "upstream_seconds_saved_total"):
            assert first.series(name, "team") == dict.fromkeys(((team,) for team in TEAMS), 0)

    def test_every_account_has_its_circuit_its_statuses_and_its_audits(self, first: Scraped) -> None:
        assert first.series("upstream_circuit_open", "account") == {(account,): 0 for account in ACCOUNTS}
        statuses = {(account, status): 0 for account in ACCOUNTS for status in UPSTREAM_STATUSES}
        assert first.series("upstream_request_duration_seconds_count", "account", "status") == statuses
        audits = {(account, result): 0 for account in ACCOUNTS for result in AUDIT_RESULTS}
        assert first.series("price_audits_total", "account", "result") == audits

    def test_every_account_has_its_inferences_and_their_audits(self, first: Scraped) -> None:
        inferences = {(account, result): 0 for account in ACCOUNTS for result in INFERENCE_RESULTS}
        assert first.series("inferences_total", "account", "result") == inferences
        audits = {(account, result): 0 for account in ACCOUNTS for result in INFERENCE_AUDIT_RESULTS}
        assert first.series("inference_audits_total", "account", "result") == audits
        assert first.series("suspect_answers_total", "account") == {(account,): 0 for account in ACCOUNTS}

    def test_every_team_has_its_windows_and_quotas(self, first: Scraped) -> None:
        windows = {(team, per): 0 for team in TEAMS for per in ("day", "week", "month")}
        assert first.series("window_estimated_credits", "team", "per") == windows
        assert first.series("window_requests", "team", "per") == windows
        assert first.series("quota_used", "scope", "team", "measure", "per") == {
            ("org", "-", "estimated_credits", "month"): 0
        }

    def test_build_info_and_ledger_metrics_exist(self, first: Scraped) -> None:
        assert first.series("build_info", "version") == {(__version__,): 1}
        assert first.value("config_last_reload_successful") == 1
        assert [first.value(f"{name}_total") for name in ("ledger_lost", "unanswered_debits")] == [0, 0]
        assert first.value("buffered_debits") == 0
        created = first.value("ledger_created_timestamp_seconds")
        assert created is not None
        assert abs(time.time() - created) < START_S


class TestLabels:
    CANARY = "CaNaRy"

    def test_only_the_label_model_has_values_from_requests(self, open_scraped_gateway: OpenGateway) -> None:
        gateway = open_scraped_gateway(**EVERYTHING)
        for ask in (self._odd_estimates, self._odd_requests, self._odd_purges):
            ask(toured(gateway))
        labels = {pair for _, labels in scrape(gateway.client).samples for pair in labels}
        values: dict[str, set[str]] = defaultdict(set)
        for label, value in labels:
            values[label].add(value)
        assert values.pop("model") == {"Flux", self.CANARY, "other"}
        assert all(re.fullmatch(r"[0-9.]+|\+Inf", bound) for bound in values.pop("le"))
        assert values.pop("call") <= LUA_SCRIPTS.keys()
        assert values == {
            "team": {"-", *TEAMS},
            "operation": {"estimate", "other"},
            "outcome": {*Outcome},
            "account": {*ACCOUNTS},
            "status": {*UPSTREAM_STATUSES},
            "role": {"ledger", "price-book"},
            "result": {*AUDIT_RESULTS, *INFERENCE_RESULTS, *INFERENCE_AUDIT_RESULTS},
            "version": {__version__},
            "scope": {"team", "org"},
            "measure": {"requests", "estimated_credits"},
            "per": {*PERS},
            "label": {digest_of(token)[:15] for token in (DESIGN, MARKETING)},
            "name": {*TEAMS},
        }

    def _odd_estimates(self, gateway: GatewayFixture) -> None:
        assert gateway.ask(b'[{"model":"CaNaRy"}]').status_code == 200
        assert gateway.ask('[{"model":"CaNaRy\\n\\"}"}]').status_code == 200
        for headers in ({"x_api_key": self.CANARY}, {"x_api_key": token_of("C" * 32)}, {"content_type": "CaNaRy/x"}):
            assert gateway.ask(**headers).status_code in {401, 415}
        named = {"x_request_id": self.CANARY, "user_agent": self.CANARY, "host": "canary.example", "x_team": "canary"}
        assert gateway.ask(**named).status_code == 200
        assert gateway.client.post(f"{PATH}?team=CaNaRy&account=CaNaRy", content=FLUX).status_code == 200

    def _odd_requests(self, gateway: GatewayFixture) -> None:
        for path in ("/CaNaRy", f"{PATH}/CaNaRy", "/v1/usage?team=CaNaRy", "/v1/quota?CaNaRy=1", "/metrics/CaNaRy"):
            assert gateway.client.get(path).status_code in {400, 403, 404}
        for method in ("CANARY", "DELETE", "OPTIONS"):
            answer = gateway.raw(f"{method} {PATH} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            assert answer.split()[1] in {b"405", b"501"}

    def _odd_purges(self, gateway: GatewayFixture) -> None:
        admin = {"x-api-key": ADMIN}
        assert gateway.client.post(
            "/v1/cache/purge", content=b'{"account":"canary","all":true}', headers=admin
        ).is_error
        assert gateway.client.get("/v1/usage?team=canary&by=team", headers=admin).is_error
