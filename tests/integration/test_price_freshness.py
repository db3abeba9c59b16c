"""Freshness of prices: request directives, stale answers, audits, ignored members, purges."""

import logging
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from faulty_rendernet import Fault
from gateway_fixture import DESIGN, MARKETING, GatewayFixture, OpenGateway, answers, cache_status, code_of
from proxy.auth import digest_of, token_of
from proxy.demo.simulator import Responder
from proxy.problems import StoreUnavailable
from proxy.store.client import Script, Store
from serving import wait_until

FLUX = b'[{"model":"Flux"}]'
ADMIN = token_of("A" * 32)
PURGE = "/v1/cache/purge"

pytestmark = pytest.mark.usefixtures("cold")


def priced(amount: str, balance: str = "10000") -> Responder:
    return answers(f'{{"data":{{"estimated":{amount},"balance":{balance}}},"error":{{}}}}'.encode())


def amount(response: httpx2.Response) -> float:
    return float(response.json()["data"]["estimated"])


def settled(gateway: GatewayFixture, calls: int) -> None:
    """Waits until upstream has had this number of calls, and its answers are stored."""
    wait_until(lambda: gateway.simulator.calls >= calls and not gateway.store.keys("ep1:*:lease"))
    assert gateway.simulator.calls == calls


class TestDirectives:
    def test_no_cache_fetches_and_stores(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(priced("1"), priced("2"))
        gateway.ask()
        fresh = gateway.ask(cache_control="no-cache")
        assert (amount(fresh), cache_status(fresh)) == (2, "fwd=request; fwd-status=200; stored; ttl=3600")
        hit = gateway.ask()
        assert (amount(hit), cache_status(hit)[:3]) == (2, "hit")

    def test_no_store_fetches_and_keeps_the_stored_price(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(priced("1"), priced("2", "77"))
        gateway.ask()
        fresh = gateway.ask(cache_control="max-stale, No-Store")
        assert (amount(fresh), cache_status(fresh)) == (2, "fwd=request; fwd-status=200")
        assert gateway.ask().json()["data"] == {"estimated": 1, "balance": 77}

    def test_max_age_accepts_prices_that_are_young_enough(self, gateway: GatewayFixture) -> None:
        gateway.ask()
        gateway.age(10)
        assert cache_status(gateway.ask(cache_control="max-age=60")).startswith("hit")
        assert cache_status(gateway.ask(cache_control="max-age=5")) == "fwd=request; fwd-status=200; stored; ttl=3600"
        assert cache_status(gateway.ask(cache_control="max-age=5")).startswith("hit")

    def test_only_if_cached_never_calls_upstream(self, gateway: GatewayFixture) -> None:
        refused = gateway.ask(cache_control="only-if-cached")
        assert (refused.status_code, code_of(refused)) == (504, "not-cached")
        assert gateway.simulator.calls == 0
        gateway.ask()
        assert cache_status(gateway.ask(cache_control="only-if-cached")).startswith("hit")
        assert code_of(gateway.ask(cache_control="only-if-cached, no-cache")) == "not-cached"

    @pytest.mark.parametrize("value", ["max-age=soon", "max-age", "max-age=-1", "max-age=1.5"])
    def test_an_invalid_max_age_is_refused(self, gateway: GatewayFixture, value: str) -> None:
        assert code_of(gateway.ask(cache_control=value)) == "invalid-request"

    @pytest.mark.parametrize("value", ["", "no-transform", "max-stale=5", "min-fresh=1", 'x="no-cache, y"', "public"])
    def test_other_directives_are_ignored(self, gateway: GatewayFixture, value: str) -> None:
        gateway.ask()
        assert cache_status(gateway.ask(cache_control=value)).startswith("hit")

    def test_a_failed_no_cache_request_gets_no_stale_answer(self, gateway: GatewayFixture) -> None:
        gateway.ask()
        gateway.simulator.script(Fault.SERVER_ERROR)
        assert code_of(gateway.ask(cache_control="no-cache")) == "upstream-error"
        assert cache_status(gateway.ask()).startswith("hit")


class TestStale:
    def test_a_stale_price_is_served_while_it_is_revalidated(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(priced("1"), priced("2"))
        gateway.ask()
        gateway.age(3612)
        stale = gateway.ask()
        assert (amount(stale), stale.headers["age"]) == (1, "3612")
        assert cache_status(stale) in {f"hit; ttl={ttl}; detail=stale-while-revalidate" for ttl in (-12, -13)}
        settled(gateway, calls=2)
        fresh = gateway.ask()
        assert (amount(fresh), cache_status(fresh)[:3]) == (2, "hit")

    def test_after_that_window_upstream_is_called(self, gateway: GatewayFixture) -> None:
        gateway.ask()
        gateway.age(3600 + 301)
        assert cache_status(gateway.ask()) == "fwd=stale; fwd-status=200; stored; ttl=3600"

    @pytest.mark.parametrize(
        ("fault", "status"),
        [
            (Fault.SERVER_ERROR, "; fwd-status=500"),
            (Fault.BUSY_FOR_NO_TIME, "; fwd-status=429"),
            (Fault.REFUSED_KEY, "; fwd-status=401"),
            (Fault.HANG, ""),
        ],
    )
    def test_a_stale_price_is_served_if_upstream_fails(
        self, open_gateway: OpenGateway, fault: Fault, status: str
    ) -> None:
        gateway = open_gateway(upstream={"timeout_s": 0.5})
        gateway.ask()
        gateway.age(3600 + 400)
        gateway.simulator.script(fault)
        stale = gateway.ask()
        assert (stale.status_code, amount(stale), stale.headers["age"]) == (200, 2.75, "4000")
        assert cache_status(stale).replace("-401", "-400") == f"fwd=stale{status}; ttl=-400; detail=stale-if-error"

    def test_a_stale_price_is_served_if_the_deadline_passes(self, open_gateway: OpenGateway) -> None:
        gateway = open_gateway(server={"request_timeout_s": 0.2}, upstream={"timeout_s": 5})
        gateway.ask()
        gateway.age(3600 + 400)
        with gateway.simulator.hold():
            assert cache_status(gateway.ask()).endswith("detail=stale-if-error")

    def test_a_price_older_than_its_window_is_not_served(self, gateway: GatewayFixture) -> None:
        gateway.ask()
        gateway.age(3600 + 86_401)
        gateway.simulator.script(Fault.SERVER_ERROR)
        assert code_of(gateway.ask()) == "upstream-error"

    def test_a_refusal_of_the_body_deletes_the_price(self, gateway: GatewayFixture) -> None:
        gateway.ask()
        gateway.age(3610)
        gateway.simulator.script(answers(b"{}", 422))
        assert cache_status(gateway.ask()).endswith("detail=stale-while-revalidate")
        settled(gateway, calls=2)
        wait_until(lambda: not gateway.store.keys("ep1:*:price"))
        assert cache_status(gateway.ask()) == "fwd=miss; fwd-status=200; stored; ttl=3600"

    def test_an_unpriced_refresh_keeps_the_price(self, gateway: GatewayFixture) -> None:
        gateway.ask()
        gateway.age(3610)
        gateway.simulator.script(Fault.UNPRICED_NULL)
        gateway.ask()
        settled(gateway, calls=2)
        assert cache_status(gateway.ask()).endswith("detail=stale-while-revalidate")


class TestCircuit:
    def open(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(*[Fault.SERVER_ERROR] * 10)
        for number in range(10):
            gateway.ask(b'[{"seed":%d}]' % number)

    def test_it_opens_and_answers_without_an_upstream_call(self, gateway: GatewayFixture) -> None:
        self.open(gateway)
        calls = gateway.simulator.calls
        refused = gateway.ask()
        assert (refused.status_code, code_of(refused)) == (503, "upstream-busy")
        assert 1 <= int(refused.headers["retry-after"]) <= 5
        assert gateway.simulator.calls == calls

    def test_while_it_is_open_stale_prices_are_served(self, gateway: GatewayFixture) -> None:
        gateway.ask()
        gateway.age(3600 + 400)
        self.open(gateway)
        assert re.fullmatch("hit; ttl=-4[0-9]{2}; detail=stale-if-error", cache_status(gateway.ask()))

    def test_a_successful_probe_closes_it(self, gateway: GatewayFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("proxy.upstream.circuit_breaker.OPEN_S", 0.2)
        self.open(gateway)
        wait_until(lambda: gateway.ask().status_code == 200)
        assert gateway.ask(b"[{}]").status_code == 200

    def test_each_account_has_its_own(self, open_gateway: OpenGateway) -> None:
        gateway = open_gateway(teams={"marketing": {"tokens": [digest_of(MARKETING)], "account": "second"}})
        self.open(gateway)
        assert code_of(gateway.ask(x_api_key=MARKETING)) == "upstream-refused"

    def test_upstreams_retry_after_is_respected(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(answers(b"{}", 429, retry_after="30"))
        assert gateway.ask().headers["retry-after"] == "30"
        calls = gateway.simulator.calls
        again = gateway.ask(b"[{}]")
        assert (code_of(again), int(again.headers["retry-after"])) in {("upstream-busy", 30), ("upstream-busy", 29)}
        assert gateway.simulator.calls == calls


class TestAudits:
    @pytest.fixture
    def gateway(self, open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch) -> GatewayFixture:
        """Opens a gateway for which every balance is old."""
        monkeypatch.setattr("proxy.gateway.audits.AUDIT_CLAIM_S", 0.0)
        return open_gateway(cache={"balance_max_age_s": 0})

    def audits(self, gateway: GatewayFixture, result: str) -> float:
        value = gateway.metrics.registry.get_sample_value(
            "estimate_proxy_price_audits_total", {"account": "default", "result": result}
        )
        return value or 0.0

    def audited(self, gateway: GatewayFixture, result: str, body: bytes = FLUX) -> httpx2.Response:
        """Requests a hit, and waits until its audit is over."""
        calls, before = gateway.simulator.calls, self.audits(gateway, result)
        hit = gateway.ask(body)
        assert cache_status(hit).startswith("hit")
        settled(gateway, calls=calls + 1)
        wait_until(lambda: self.audits(gateway, result) == before + 1)
        return hit

    def ttl_s(self, gateway: GatewayFixture, body: bytes) -> int:
        return int(gateway.client.post("/v1/explain", content=body).json()["ttl_s"])

    def test_an_old_balance_is_fetched_again_after_the_answer(self, gateway: GatewayFixture) -> None:
        gateway.ask()
        gateway.simulator.balance = 41
        assert self.audited(gateway, "same").json()["data"]["balance"] == 10_000
        assert self.audited(gateway, "same").json()["data"]["balance"] == 41

    def test_the_answer_has_the_balances_age(self, open_gateway: OpenGateway) -> None:
        open_gateway().ask()
        gateway = open_gateway(cache={"balance_max_age_s": 60})
        gateway.age(70)
        assert gateway.ask().headers["estimate-proxy-balance-age"] == "70"
        settled(gateway, calls=2)
        wait_until(lambda: gateway.ask().headers["estimate-proxy-balance-age"] == "0")

    def test_a_fresh_balance_is_not_fetched_again(self, open_gateway: OpenGateway) -> None:
        gateway = open_gateway(cache={"balance_max_age_s": 60})
        gateway.ask()
        gateway.ask()
        gateway.ask(b"[{}]")
        settled(gateway, calls=2)

    def test_a_price_that_differs_is_replaced_and_logged(
        self, gateway: GatewayFixture, caplog: pytest.LogCaptureFixture
    ) -> None:
        gateway.simulator.script(priced("5"), priced("5.0"), priced("6"), priced("6"))
        gateway.ask()
        self.audited(gateway, "same")
        with caplog.at_level(logging.WARNING, "proxy"):
            self.audited(gateway, "changed")
        (record,) = caplog.records
        assert record.getMessage() == "price changed"
        facts = {"account": "default", "old": "5.0", "new": "6"}
        assert facts.items() <= record.facts.items()  # type: ignore[attr-defined] # ours
        assert amount(self.audited(gateway, "same")) == 6

    def test_three_changed_bodies_make_every_older_price_stale(self, gateway: GatewayFixture) -> None:
        bodies = [b'[{"seed":%d}]' % number for number in range(4)]
        gateway.simulator.script(*[priced("5")] * 4, *[priced("6")] * 4)
        for body in bodies:
            gateway.ask(body)
        for body in bodies[:2]:
            self.audited(gateway, "changed", body)
        assert self.ttl_s(gateway, bodies[3]) > 3500
        self.audited(gateway, "changed", bodies[2])
        wait_until(lambda: self.ttl_s(gateway, bodies[3]) <= 0)
        assert cache_status(gateway.ask(bodies[3])).endswith("detail=stale-while-revalidate")
        settled(gateway, calls=8)
        assert self.ttl_s(gateway, bodies[3]) > 3500

    def test_one_body_that_keeps_changing_is_not_a_new_price_list(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(*[priced(str(number)) for number in range(1, 6)])
        gateway.ask()
        for _ in range(4):
            self.audited(gateway, "changed")
        assert self.ttl_s(gateway, FLUX) > 3500


class TestIgnoredMembers:
    @pytest.fixture
    def gateway(self, open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch) -> GatewayFixture:
        monkeypatch.setattr("proxy.gateway.audits.AUDIT_CLAIM_S", 0.0)
        return open_gateway(cache={"ignore": ["seed", "prompt.positive"], "balance_max_age_s": 0})

    def test_they_are_left_out_of_the_key_but_sent_to_upstream(self, gateway: GatewayFixture) -> None:
        first = b'[{"model":"Flux","seed":1,"prompt":{"positive":"a","negative":"b"}}]'
        gateway.ask(first)
        for other in (b'"seed":2,"prompt":{"positive":"c","negative":"b"}', b'"prompt":{"negative":"b"}'):
            assert cache_status(gateway.ask(b'[{"model":"Flux",%s}]' % other)).startswith("hit")
        for other in (b'"prompt":{"negative":"x"}', b'"prompt":null', b'"seed2":1,"prompt":{"negative":"b"}'):
            assert cache_status(gateway.ask(b'[{"model":"Flux",%s}]' % other)).startswith("fwd=miss")
        assert gateway.simulator.received[0].body == (
            b'[{"model":"Flux","prompt":{"negative":"b","positive":"a"},"seed":1}]'
        )

    def test_explain_shows_them(self, gateway: GatewayFixture) -> None:
        body = b'[{"seed":1,"prompt":{"negative":"b"}}]'
        assert gateway.client.post("/v1/explain", content=body).json()["ignored_members"] == ["seed"]

    def test_one_that_changes_a_price_is_detected(
        self, gateway: GatewayFixture, caplog: pytest.LogCaptureFixture
    ) -> None:
        gateway.simulator.script(priced("5"), priced("6"))
        gateway.ask(b'[{"seed":1}]')
        with caplog.at_level(logging.ERROR, "proxy"):
            assert amount(gateway.ask(b'[{"seed":2}]')) == 5
            wait_until(lambda: caplog.records)
        (record,) = caplog.records
        assert record.getMessage() == "a member of cache.ignore decides prices"
        assert record.facts["members"] == "seed"  # type: ignore[attr-defined] # ours
        assert gateway.metrics.registry.get_sample_value(
            "estimate_proxy_price_audits_total", {"account": "default", "result": "ignored-member"}
        )


class TestPurge:
    @pytest.fixture
    def gateway(self, open_gateway: OpenGateway) -> GatewayFixture:
        return open_gateway(admin={"tokens": [digest_of(ADMIN)]})

    def purge(self, gateway: GatewayFixture, content: str, token: str = ADMIN) -> httpx2.Response:
        return gateway.client.post(PURGE, content=content, headers={"x-api-key": token})

    def test_one_request_can_be_purged(self, gateway: GatewayFixture) -> None:
        gateway.ask()
        gateway.ask(b"[{}]")
        answer = self.purge(gateway, '{"account":"default","body":[ {"model":"Fl\\u0075x"} ]}')
        key = gateway.client.post("/v1/explain", content=FLUX).json()["key"]
        assert answer.json() == {"account": "default", "purged": "question", "key": key, "was_stored": True}
        assert cache_status(gateway.ask()).startswith("fwd=miss")
        assert cache_status(gateway.ask(b"[{}]")).startswith("hit")
        assert self.purge(gateway, '{"body":[{"never":"asked"}]}').json()["was_stored"] is False

    def test_all_prices_of_an_account_can_be_purged(self, gateway: GatewayFixture) -> None:
        gateway.ask()
        gateway.ask(b"[{}]")
        assert self.purge(gateway, '{"account":"default","all":true}').json() == {"account": "default", "purged": "all"}
        assert cache_status(gateway.ask()).startswith("fwd=miss")
        assert cache_status(gateway.ask(b"[{}]")).startswith("fwd=miss")
        assert cache_status(gateway.ask()).startswith("hit")

    def test_a_partial_purge_is_reported_as_failed(
        self, gateway: GatewayFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gateway.ask()
        call = Store.call

        async def half(store: Store, script: Script, *keys: str, args: tuple[bytes | int | str, ...] = ()) -> Any:
            if script.name == "book_drop":
                raise StoreUnavailable("it went away in between")
            return await call(store, script, *keys, args=args)

        with monkeypatch.context() as broken:
            broken.setattr(Store, "call", half)
            refused = self.purge(gateway, '{"body":[{"model":"Flux"}]}')
        assert (refused.status_code, code_of(refused)) == (503, "store-unavailable")
        assert "the purge may not have happened" in refused.json()["detail"]
        assert self.purge(gateway, '{"body":[{"model":"Flux"}]}').status_code == 200

    def test_a_request_that_joins_a_purged_fetch_fetches_again_even_without_the_store(
        self, gateway: GatewayFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gateway.simulator.script(priced("1"), priced("2"))
        call = Store.call

        async def no_reads(store: Store, script: Script, *keys: str, args: tuple[bytes | int | str, ...] = ()) -> Any:
            if script.name == "price_get":
                raise StoreUnavailable("no reads")
            return await call(store, script, *keys, args=args)

        with ThreadPoolExecutor(2) as pool, gateway.simulator.hold() as hold:
            before = pool.submit(gateway.ask)
            assert gateway.simulator.arrived(1)
            assert self.purge(gateway, '{"body":[{"model":"Flux"}]}').status_code == 200
            monkeypatch.setattr(Store, "call", no_reads)
            after = pool.submit(gateway.ask)
            wait_until(lambda: gateway.tracker.waiting == 2)
            hold.release()
            assert [amount(before.result()), amount(after.result())] == [1, 2]
        assert gateway.simulator.calls == 2

    def test_a_request_with_a_query_can_be_purged(self, gateway: GatewayFixture) -> None:
        path = "/pub/v1/generations/estimate?type=image"
        gateway.client.post(path, content=FLUX)
        assert self.purge(gateway, '{"body":[{"model":"Flux"}]}').json()["was_stored"] is False
        assert self.purge(gateway, '{"body":[{"model":"Flux"}],"query":"type=image"}').json()["was_stored"] is True

    @pytest.mark.parametrize(
        ("token", "status", "code"), [(DESIGN, 403, "forbidden"), ("ep_nobody", 401, "unknown-token")]
    )
    def test_a_purge_needs_an_admin_token(self, gateway: GatewayFixture, token: str, status: int, code: str) -> None:
        refused = self.purge(gateway, '{"all":true}', token)
        assert (refused.status_code, code_of(refused)) == (status, code)

    def test_an_admin_token_gives_no_estimates(self, gateway: GatewayFixture) -> None:
        assert code_of(gateway.ask(x_api_key=ADMIN)) == "forbidden"

    @pytest.mark.parametrize(
        ("content", "code"),
        [
            ("{}", "invalid-body"),
            ('{"all":false}', "invalid-body"),
            ('{"all":true,"body":[{}]}', "invalid-body"),
            ('{"body":[]}', "invalid-body"),
            ('{"body":[{}],"query":1}', "invalid-body"),
            ("[]", "invalid-body"),
            ("{", "invalid-body"),
            ('{"account":"nobody","all":true}', "invalid-request"),
        ],
    )
    def test_an_invalid_purge_request_is_refused(self, gateway: GatewayFixture, content: str, code: str) -> None:
        refused = self.purge(gateway, content)
        assert (refused.status_code, code_of(refused)) == (400, code)

    def test_a_purge_without_the_store_gets_a_503(self, gateway: GatewayFixture) -> None:
        gateway.store.client_pause(600)
        refused = self.purge(gateway, '{"all":true}')
        assert (refused.status_code, code_of(refused)) == (503, "store-unavailable")

    def test_prices_can_be_purged_from_the_command_line(
        self, gateway: GatewayFixture, valkey_url: str, tmp_path: Path
    ) -> None:
        gateway.ask()
        config, body = tmp_path / "config.toml", tmp_path / "body.json"
        host = dict(gateway.simulator.received[0].headers)[b"host"].decode()
        config.write_text(
            f'[upstream]\nbase_url = "http://{host}"\n[accounts.default]\napi_key = "k"\n'
            f'[store]\nurl = "{valkey_url}"\n[teams.design]\ntokens = []\n'
        )
        body.write_bytes(b'[ {"model": "Flux"} ]')
        key = gateway.client.post("/v1/explain", content=FLUX).json()["key"]

        def purge(*arguments: str) -> tuple[int, str, str]:
            command = [sys.executable, "-m", "proxy", "purge", "--config", str(config), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
            return done.returncode, done.stdout, done.stderr

        assert purge(str(body)) == (0, f"purged {key}\n", "")
        assert purge(str(body)) == (0, f"nothing was stored for {key}\n", "")
        assert cache_status(gateway.ask()).startswith("fwd=miss")
        assert purge("--all") == (0, "purged all prices of the account default\n", "")
        assert cache_status(gateway.ask()).startswith("fwd=miss")
        assert purge() == (2, "", "estimate-proxy: give either a FILE with a body, or --all\n")
        assert purge("--all", "--account", "x")[0] == 2
        body.write_bytes(b"[]")
        assert purge(str(body))[0] == 2
