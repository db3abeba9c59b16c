"""Changed prices are recorded once in the fleet, however a gateway finds them, and shown to viewers and operators."""

import asyncio
import csv
from datetime import UTC, datetime
from io import StringIO
from typing import Any
from zoneinfo import ZoneInfo

import httpx2
import pytest
import redis

from faulty_proxy import HEALTHY, FaultyProxy
from gateway_fixture import DESIGN, GatewayFixture, OpenGateway, answers, cache_status, code_of
from proxy.auth import digest_of, token_of
from proxy.demo.simulator import Responder
from proxy.quota import price_change_log as module
from proxy.quota.counters import USAGE_KEPT_DAYS, LedgerKeys
from proxy.quota.ledger_reader import LedgerReader
from proxy.quota.price_change_log import PriceChangeLog
from proxy.quota.price_changes import MAX_PER_DAY, PriceChanges
from proxy.quota.report_queries import PriceChangeQuery
from proxy.store.client import Store
from serving import wait_until

ADMIN, VIEWER = token_of("a" * 32), token_of("v" * 32)
FLUX = b'[{"model":"Flux"}]'
PATH = "/v1/prices/changes"
KEYS, ZONE = LedgerKeys("acme"), ZoneInfo("UTC")
DAY_MS = 86_400_000

pytestmark = pytest.mark.usefixtures("cold")


def priced(amount: str) -> Responder:
    return answers(f'{{"data":{{"estimated":{amount},"balance":9}},"error":{{}}}}'.encode())


def opened(open_gateway: OpenGateway, **sections: Any) -> GatewayFixture:
    return open_gateway(admin={"tokens": [digest_of(ADMIN)]}, viewer={"tokens": [digest_of(VIEWER)]}, **sections)


@pytest.fixture
def gateway(open_gateway: OpenGateway) -> GatewayFixture:
    return opened(open_gateway)


def get(gateway: GatewayFixture, query: str = "", token: str = VIEWER, **headers: str) -> httpx2.Response:
    return gateway.client.get(PATH + query, headers={"x-api-key": token, **headers})


def changes(gateway: GatewayFixture, query: str = "") -> list[tuple[str, float, float, str]]:
    """Model, old, new and how it was found, of each change."""
    answer = get(gateway, query)
    assert answer.status_code == 200, answer.text
    return [(row["model"], row["old"], row["new"], row["found_by"]) for row in answer.json()["changes"]]


class TestFinding:
    def test_a_request_that_gets_another_price_than_the_stored_one(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(priced("2.75"), priced("3"), priced("3.0"), priced("1"))
        assert gateway.ask(FLUX).status_code == 200
        for _ in range(3):
            assert gateway.ask(FLUX, cache_control="no-cache").status_code == 200
        wait_until(lambda: changes(gateway) == [("Flux", 2.75, 3, "ask"), ("Flux", 3, 1, "ask")])

    def test_the_refresh_of_a_stale_price(self, open_gateway: OpenGateway) -> None:
        gateway = opened(open_gateway, cache={"ttl_s": 100, "stale_while_revalidate_s": 1000})
        gateway.simulator.script(priced("2.75"), priced("3"))
        gateway.ask(FLUX)
        gateway.age(200)
        assert cache_status(gateway.ask(FLUX)).endswith("stale-while-revalidate")
        wait_until(lambda: changes(gateway) == [("Flux", 2.75, 3, "ask")])

    def test_an_audit(self, open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("proxy.gateway.audits.AUDIT_CLAIM_S", 0.0)
        gateway = opened(open_gateway, cache={"balance_max_age_s": 0})
        gateway.simulator.script(priced("2.75"), priced("3"))
        gateway.ask(FLUX)
        assert cache_status(gateway.ask(FLUX)).startswith("hit")
        wait_until(lambda: changes(gateway) == [("Flux", 2.75, 3, "audit")])

    def test_a_purged_account_still_knows_its_old_prices(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(priced("2.75"), priced("3"))
        gateway.ask(FLUX)
        purge = b'{"account":"default","all":true}'
        assert gateway.client.post("/v1/cache/purge", content=purge, headers={"x-api-key": ADMIN}).status_code == 200
        assert cache_status(gateway.ask(FLUX)).startswith("fwd=miss")
        wait_until(lambda: changes(gateway) == [("Flux", 2.75, 3, "ask")])

    def test_bodies_that_differ_in_ignored_members_do_not_show_a_change(self, open_gateway: OpenGateway) -> None:
        """The other body may be the reason for the other price."""
        gateway = opened(open_gateway, cache={"ignore": ["seed"]})
        gateway.simulator.script(priced("2.75"), priced("3"), priced("4"))
        for seed in (1, 2, 2):
            gateway.ask(b'[{"seed":%d}]' % seed, cache_control="no-cache")
        wait_until(lambda: changes(gateway) == [("-", 3, 4, "ask")])

    def test_one_gateway_of_several_records_a_change(self, gateway: GatewayFixture, open_gateway: OpenGateway) -> None:
        other = opened(open_gateway)
        gateway.simulator.script(*[priced("2.75")] * 2, *[priced("3")] * 2)
        for each in (gateway, other):
            assert each.ask(FLUX, cache_control="no-cache").json()["data"]["estimated"] == 2.75
        for each in (gateway, other):
            assert each.ask(FLUX, cache_control="no-cache").json()["data"]["estimated"] == 3
        wait_until(lambda: changes(other) != [])
        assert changes(other) == changes(gateway) == [("Flux", 2.75, 3, "ask")]


class TestEndpoint:
    @pytest.fixture(autouse=True)
    def _one_change(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(priced("2.75"), priced("3"))
        gateway.ask(FLUX)
        gateway.ask(FLUX, cache_control="no-cache")
        wait_until(lambda: changes(gateway) != [])

    @pytest.mark.parametrize("token", [ADMIN, VIEWER])
    def test_operators_and_viewers_see_what_changed_when(self, token: str, gateway: GatewayFixture) -> None:
        document = get(gateway, token=token).json()
        (change,) = document["changes"]
        age = datetime.now(UTC) - datetime.fromisoformat(change["at"])
        assert 0 <= age.total_seconds() < 60
        assert (change["account"], change["key"]) == ("default", self.key(gateway)[:16])
        assert (document["to"], document["not_kept"]) == (change["at"][:10], 0)

    def key(self, gateway: GatewayFixture) -> str:
        return str(gateway.client.post("/v1/explain", content=FLUX).json()["key"])

    def test_it_is_available_as_csv(self, gateway: GatewayFixture) -> None:
        answer = get(gateway, accept="text/csv")
        assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
        header, row = csv.reader(StringIO(answer.text))
        assert header == ["at", "account", "model", "key", "old", "new", "found_by"]
        assert row[4:] == ["2.75", "3", "ask"]
        assert ";2,75;3;ask\r\n" in get(gateway, "?dialect=excel-semicolon").text

    def test_other_days_and_accounts_have_none(self, gateway: GatewayFixture) -> None:
        assert changes(gateway, "?account=second") == []
        assert len(changes(gateway, f"?account=default&from={datetime.now(UTC).date()}")) == 1

    def test_an_account_that_was_removed_still_has_its_changes(self, open_gateway: OpenGateway) -> None:
        gateway = opened(open_gateway)
        answer = get(gateway, "?account=gone")
        assert code_of(answer) == "invalid-query"
        assert answer.json()["detail"] == "account: 'gone' is not configured and has no price change: check the name."
        change = b'{"at_s":0,"account":"gone","model":"Flux","key":"k","old":"1","new":"2","found_by":"doubt"}'
        key = LedgerKeys("default").price_changes(datetime.now(UTC).date())
        gateway.store.hset(key, mapping={"found": 1, "a": change})
        assert changes(gateway, "?account=gone") == [("Flux", 1, 2, "doubt")]

    def test_teams_see_none(self, gateway: GatewayFixture) -> None:
        answer = get(gateway, token=DESIGN)
        assert (answer.status_code, code_of(answer)) == (403, "forbidden")
        assert answer.json()["detail"].endswith("you sent a team's token.")
        assert get(gateway, token="ep_nobody").status_code == 401


class TestLedger:
    def test_a_day_keeps_the_first_changes_and_counts_the_rest(self, any_store_url: str, server: redis.Redis) -> None:
        more = 3

        async def scenario(store: Store) -> PriceChanges:
            log = PriceChangeLog(store, KEYS, ZONE)
            for number in range(MAX_PER_DAY + more):
                self.record(log, number)
            await log.close(20)
            return await self.read(store)

        found = self.run(any_store_url, scenario)
        assert [change.old for change in found.changes] == ["0.5"] * MAX_PER_DAY
        assert {change.new for change in found.changes} == {str(1 + number) for number in range(MAX_PER_DAY)}
        assert found.not_kept == more
        (key,) = server.keys("ep1:{acme}:price-changes:*")
        assert USAGE_KEPT_DAYS * DAY_MS <= server.pttl(key) <= (USAGE_KEPT_DAYS + 1) * DAY_MS

    @pytest.mark.usefixtures("server")
    def test_changes_of_an_outage_are_recorded_after_it(
        self, store_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "RETRY_S", 0.05)
        monkeypatch.setattr(module, "MAX_WAITING", 2)

        async def scenario(store: Store) -> PriceChanges:
            log = PriceChangeLog(store, KEYS, ZONE)
            await asyncio.to_thread(store_proxy.cut)
            for number in range(3):
                self.record(log, number)
            await asyncio.sleep(0.1)
            store_proxy.set_conditions(HEALTHY)
            await log.close(20)
            return await self.read(store)

        found = self.run(store_proxy.url, scenario)
        assert sorted(change.new for change in found.changes) == ["1", "2"], "the log has the third"
        assert found.not_kept == 0

    def record(self, log: PriceChangeLog, number: int) -> None:
        key = f"{number:064x}"
        log.record("ask", account="default", model="Flux", key=key, old=b"0.5", new=b"%d" % (1 + number))

    async def read(self, store: Store) -> PriceChanges:
        today = datetime.now(UTC).date()
        query = PriceChangeQuery(today, today, None, csv=False, dialect="rfc4180")
        return await LedgerReader(store, KEYS, ZONE).price_changes(query)

    def run(self, url: str, scenario: Any) -> PriceChanges:
        async def run() -> PriceChanges:
            store = Store(url, "ledger")
            try:
                found: PriceChanges = await scenario(store)
                return found
            finally:
                await store.close()

        return asyncio.run(run())
