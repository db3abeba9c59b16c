"""Gauges show current values, and are absent while their store is unreachable."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from math import inf
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest
import redis

from faulty_rendernet import Fault
from fleet import StoreProcess, store_process
from gateway_fixture import DESIGN, MARKETING, GatewayFixture, OpenGateway, code_of
from gateway_process import START_S, Tree
from metric_names import families
from metrics_fixture import ACCOUNTS, ADMIN, FLUX, ONE, TEAMS, limited, quota
from past_usage import put_past_usage
from prometheus import MORNING, PERS, Scraped, booked, scrape, usage
from proxy.auth import digest_of, token_of
from proxy.cache.account_book import BOOK_REREAD_S
from proxy.http.metrics_endpoint import SNAPSHOT_S
from proxy.quota.counters import LedgerKeys
from proxy.quota.windows import window_of
from proxy.upstream.circuit_breaker import MIN_ANSWERS
from serving import wait_until

SHORT_SNAPSHOT_S = BOOK_REREAD_S + 0.3
"""Instead of `SNAPSHOT_S`, and longer than a gateway knows the books by heart: each snapshot reads these too."""

LEDGER_GAUGES = {family.name for family in families().values() if family.from_ledger} - {
    "estimate_proxy_ledger_created_timestamp_seconds",
    "estimate_proxy_balance_credits",
    "estimate_proxy_balance_age_seconds",
    "estimate_proxy_team_info",
    "estimate_proxy_token_expires_timestamp_seconds",
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes each scrape read the stores."""
    monkeypatch.setattr("proxy.http.metrics_endpoint.SNAPSHOT_S", -1.0)


@pytest.fixture
def ledger() -> Iterator[StoreProcess]:
    with store_process() as opened:
        yield opened


def hanging(store: StoreProcess) -> AbstractContextManager[None]:
    return store.hanging()


@contextmanager
def dead(store: StoreProcess) -> Iterator[None]:
    store.kill()
    yield
    store.start()


@pytest.mark.usefixtures("fresh")
class TestStores:
    @pytest.mark.parametrize("out_of_reach", [hanging, dead])
    def test_without_its_ledger_a_gateway_shows_no_stale_values(
        self,
        out_of_reach: Callable[[StoreProcess], AbstractContextManager[None]],
        ledger: StoreProcess,
        valkey_url: str,
        open_scraped_gateway: OpenGateway,
    ) -> None:
        ledger.start()
        with redis.Redis.from_url(ledger.url) as store:
            put_past_usage(store, "design", [10] * 20)
        gateway = open_scraped_gateway(store={"url": ledger.url}, cache={"url": valkey_url}, org={"quotas": [quota(5)]})
        assert gateway.ask(ONE).status_code == 200
        before = scrape(gateway.client)
        assert (up(before), _present(before)) == ({"ledger": 1, "price-book": 1}, LEDGER_GAUGES)
        with out_of_reach(ledger):
            wait_until(lambda: up(scrape(gateway.client)) == {"ledger": 0, "price-book": 1})
            during = scrape(gateway.client)
            assert _present(during) == set()
            assert during.series("balance_credits", "account") == {("default",): 10_000}
        wait_until(lambda: up(scrape(gateway.client)) == {"ledger": 1, "price-book": 1})
        wait_until(lambda: _present(scrape(gateway.client)) == LEDGER_GAUGES)
        after = scrape(gateway.client)
        assert after.value("window_estimated_credits", team="design", per="day") == 1

    def test_without_its_price_book_it_shows_no_stale_balance(
        self, ledger: StoreProcess, valkey_url: str, open_scraped_gateway: OpenGateway
    ) -> None:
        ledger.start()
        gateway = open_scraped_gateway(store={"url": valkey_url}, cache={"url": ledger.url}, org={"quotas": [quota(5)]})
        put_past_usage(gateway.store, "design", [10] * 20)
        assert gateway.ask(ONE).status_code == 200
        with ledger.hanging():
            wait_until(lambda: up(scrape(gateway.client)) == {"ledger": 1, "price-book": 0})
            during = scrape(gateway.client)
            assert _present(during) == LEDGER_GAUGES
            assert during.series("balance_credits", "account") == {}
            assert during.series("balance_age_seconds", "account") == {}
        wait_until(lambda: scrape(gateway.client).series("balance_credits", "account") == {("default",): 10_000})
        assert up(scrape(gateway.client)) == {"ledger": 1, "price-book": 1}

    def test_unanswered_and_buffered_debits_are_shown(
        self, ledger: StoreProcess, valkey_url: str, open_scraped_gateway: OpenGateway
    ) -> None:
        ledger.start()
        gateway = open_scraped_gateway(store={"url": ledger.url, "on_outage": "admit"}, cache={"url": valkey_url})
        with ledger.hanging():
            assert code_of(gateway.ask(ONE)) == "store-unavailable"
            assert [gateway.ask(ONE).status_code for _ in range(2)] == [200, 200]
            during = scrape(gateway.client)
            assert (during.value("unanswered_debits_total"), during.value("buffered_debits")) == (1, 2)
        wait_until(lambda: scrape(gateway.client).value("buffered_debits") == 0)

    def test_a_lost_ledger_is_counted(self, open_scraped_gateway: OpenGateway) -> None:
        gateway = open_scraped_gateway()
        gateway.ask(ONE)
        created = scrape(gateway.client).value("ledger_created_timestamp_seconds")
        assert created is not None
        gateway.store.flushall()
        gateway.ask(ONE)
        after = scrape(gateway.client)
        assert after.value("ledger_lost_total") == 1
        assert (after.value("ledger_created_timestamp_seconds") or 0) > created


def up(scraped: Scraped) -> dict[str, float]:
    return {role: value for (role,), value in scraped.series("store_up", "role").items()}


def _present(scraped: Scraped) -> set[str]:
    """Returns which of the ledger's gauges have samples."""
    return {name for name, _ in scraped.samples} & LEDGER_GAUGES


class TestGauges:
    def test_the_circuit_breakers_state_is_shown(
        self, open_scraped_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("proxy.upstream.circuit_breaker.OPEN_S", 0.1)
        gateway = open_scraped_gateway()
        gateway.simulator.script(*[Fault.SERVER_ERROR] * MIN_ANSWERS)
        for _ in range(MIN_ANSWERS):
            assert _circuits(gateway) == {"default": 0, "second": 0}
            assert code_of(gateway.ask()) == "upstream-error"
        assert _circuits(gateway) == {"default": 1, "second": 0}
        wait_until(lambda: gateway.ask().status_code == 200)
        assert _circuits(gateway) == {"default": 0, "second": 0}

    def test_requests_in_flight_are_shown(self, open_scraped_gateway: OpenGateway) -> None:
        gateway = open_scraped_gateway()
        assert scrape(gateway.client).value("requests_in_flight") == 1, "the scrape itself"
        with ThreadPoolExecutor() as pool, gateway.simulator.hold() as hold:
            asked = [pool.submit(gateway.ask, b'[{"seed":%d}]' % number) for number in range(3)]
            assert gateway.simulator.arrived(3)
            assert scrape(gateway.client).value("requests_in_flight") == 4
            hold.release()
            assert [future.result().status_code for future in asked] == [200] * 3
        wait_until(lambda: scrape(gateway.client).value("requests_in_flight") == 1)

    def test_windows_equal_the_usage_endpoint(self, open_scraped_gateway: OpenGateway) -> None:
        gateway = open_scraped_gateway(org={"timezone": MORNING})
        for body, token in ((FLUX, DESIGN), (FLUX, DESIGN), (ONE, MARKETING), (b"[{},{}]", DESIGN)):
            assert gateway.ask(body, x_api_key=token).status_code == 200
        assert code_of(gateway.ask("{}")) == "invalid-body"
        scraped = scrape(gateway.client)
        assert booked(scraped) == usage(gateway.client, ADMIN, TEAMS)
        assert booked(scraped)["design", "day"] == (3, 7.5)
        assert booked(scraped)["retired", "month"] == (0, 0)

    def test_each_window_has_its_own_value(self, open_scraped_gateway: OpenGateway) -> None:
        gateway, keys, zone = open_scraped_gateway(org={"timezone": MORNING}), LedgerKeys("default"), ZoneInfo(MORNING)
        for number, per in enumerate(PERS, 1):
            counter = keys.counter("design", per, window_of(per, int(time.time()), zone))
            gateway.store.hset(counter, mapping={"requests": number, "credits": number * 1_500_000})
        found = booked(scrape(gateway.client))
        assert [found["design", per] for per in PERS] == [(1, 1.5), (2, 3.0), (3, 4.5)]
        assert found["marketing", "month"] == (0, 0)

    def test_quota_gauges_equal_the_quota_endpoint(self, open_scraped_gateway: OpenGateway) -> None:
        wait_until(lambda: time.time() % 60 < 55)  # no minute may end in between
        quotas = [quota(100.5), quota(7, "minute", "requests"), quota(0, "hour", on_exceed="warn")]
        gateway = open_scraped_gateway(
            teams=limited(*quotas), org={"quotas": [quota(9000, "week", "requests")], "timezone": MORNING}
        )
        for token in (DESIGN, DESIGN, MARKETING):
            assert gateway.ask(FLUX, x_api_key=token).status_code == 200
        shown = gateway.client.get("/v1/quota", headers={"x-api-key": ADMIN}).json()["teams"]
        by_label = {_key(team["team"], quota): quota for team in shown for quota in team["quotas"]}
        scraped = scrape(gateway.client)
        for name, member in (("quota_limit", "limit"), ("quota_used", "used")):
            found = scraped.series(name, "scope", "team", "measure", "per")
            assert found == {key: quota[member] for key, quota in by_label.items()}
        for name, member in (("window_start", "window_start"), ("window_end", "resets_at")):
            found = scraped.series(f"{name}_timestamp_seconds", "per")
            ends = {(per,): datetime.fromisoformat(quota[member]).timestamp() for (*_, per), quota in by_label.items()}
            assert found.items() >= ends.items()
            assert {per for (per,) in found} == {"minute", "hour", "day", "week", "month"}
        assert scraped.value("quota_used", scope="org", team="-", measure="requests", per="week") == 3

    def test_the_balance_is_shared_by_all_gateways(self, open_scraped_gateway: OpenGateway) -> None:
        asked = open_scraped_gateway()
        assert asked.ask().status_code == 200
        asked.age(100)
        idle = open_scraped_gateway()
        scraped = scrape(idle.client)
        assert scraped.series("balance_credits", "account") == {("default",): 10_000}
        age = scraped.value("balance_age_seconds", account="default")
        assert age is not None
        assert 100 <= age < 100 + START_S
        assert scraped.series("balance_age_seconds", "account").keys() == {("default",)}

    @pytest.mark.usefixtures("fresh")
    def test_a_balance_received_by_another_gateway_is_shown(self, open_scraped_gateway: OpenGateway) -> None:
        asked, idle = open_scraped_gateway(), open_scraped_gateway()
        for number, balance in enumerate((41, 17)):
            asked.simulator.balance = balance
            assert asked.ask(b'[{"seed":%d}]' % number).status_code == 200
            wait_until(lambda: scrape(idle.client).value("balance_credits", account="default") == balance)  # noqa: B023

    def test_stores_are_read_at_most_every_few_seconds(
        self, open_scraped_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert SNAPSHOT_S == 3
        monkeypatch.setattr("proxy.http.metrics_endpoint.SNAPSHOT_S", SHORT_SNAPSHOT_S)
        scrape(open_scraped_gateway().client)  # the scripts are loaded now
        gateway = open_scraped_gateway()
        first, calls = _scrapes_until_read(gateway), _script_calls(gateway)
        next_ = _scrapes_until_read(gateway)
        assert next_[-1].ended - first[-1].began >= SHORT_SNAPSHOT_S
        assert len(next_) > 3
        assert _script_calls(gateway) - calls == 3 + len(ACCOUNTS), "scripts: ledger id, windows, quotas, books"


class TestTokens:
    def test_the_end_of_a_tokens_last_day(self, open_scraped_gateway: OpenGateway) -> None:
        tokens = [
            {"sha256": digest_of(DESIGN), "label": "ci"},
            {"sha256": digest_of(token_of("x" * 32)), "label": "old", "expires": "2027-06-30"},
            {"sha256": digest_of(token_of("y" * 32)), "label": "old", "expires": "2026-06-30"},
            {"sha256": digest_of(token_of("z" * 32)), "expires": "9999-12-31"},
        ]
        teams = {"design": {"tokens": tokens}, "retired": {"disabled": True, "tokens": tokens[1:2]}}
        scraped = scrape(open_scraped_gateway(teams=teams, org={"timezone": "Europe/Berlin"}).client)
        unlabelled = digest_of(token_of("z" * 32))[:15]
        ends = datetime(2027, 7, 1, tzinfo=ZoneInfo("Europe/Berlin")).timestamp()
        found = scraped.series("token_expires_timestamp_seconds", "team", "label")
        assert {label: at for (team, label), at in found.items() if team == "design"} == {
            "ci": inf,
            "old": ends,
            unlabelled: inf,
        }
        assert not [team for team, _ in found if team == "retired"], "a disabled team's tokens do not matter"


class TestTeams:
    def test_each_configured_team_has_its_name_or_else_its_id(self, open_scraped_gateway: OpenGateway) -> None:
        gateway = open_scraped_gateway(teams={"design": {"name": 'Design "Süd"'}})
        found = scrape(gateway.client).series("team_info", "team", "name")
        assert found == {("design", 'Design "Süd"'): 1, ("marketing", "marketing"): 1, ("retired", "retired"): 1}


def _circuits(gateway: GatewayFixture) -> dict[str, float]:
    series = scrape(gateway.client).series("upstream_circuit_open", "account")
    return {account: value for (account,), value in series.items()}


def _script_calls(gateway: GatewayFixture) -> int:
    """Returns how many scripts the store has run."""
    stats: Any = gateway.store.info("commandstats")
    return int(stats["cmdstat_evalsha"]["calls"])


class Took(NamedTuple):
    began: float
    ended: float


def _scrapes_until_read(gateway: GatewayFixture) -> list[Took]:
    """Scrapes until a scrape has read the stores."""
    calls, scrapes = _script_calls(gateway), list[Took]()
    while _script_calls(gateway) == calls:
        began = time.monotonic()
        scrape(gateway.client)
        scrapes.append(Took(began, time.monotonic()))
    return scrapes


def _key(team: str, quota: Tree) -> tuple[str, str, str, str]:
    """Returns a quota's labels; the organisation's quota has a series for each team."""
    return quota["scope"], team if quota["scope"] == "team" else "-", quota["measure"], quota["per"]
