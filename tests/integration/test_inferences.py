"""Learned prices, as clients and operators meet them: inferred answers, audits, doubt, and what `observe` changes."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import httpx2
import pytest

from faulty_proxy import Conditions, FaultyProxy
from faulty_rendernet import Fault
from gateway_fixture import DESIGN, MARKETING, GatewayFixture, OpenGateway, answers, cache_status, code_of
from gateway_process import Tree
from inference_fixture import ADMIN, LEARN_FROM, LEARNING, learned, new_body, scope, teach
from proxy.auth import digest_of, token_of
from proxy.demo.simulator import Responder
from proxy.store.access import TIMEOUT_S
from serving import wait_until

VIEWER = token_of("V" * 32)

pytestmark = pytest.mark.usefixtures("cold", "cold_learning")


@pytest.fixture
def open_learning(open_gateway: OpenGateway) -> OpenGateway:
    """Opens gateways that infer after few tests, and never audit unless `cache` says so."""

    def enter(learn: str = "use", **sections: Tree) -> GatewayFixture:
        cache = {**LEARNING["cache"], "learn": learn, **sections.pop("cache", {})}
        return open_gateway(**{**LEARNING, "cache": cache, **sections})

    return enter


def counted(gateway: GatewayFixture, name: str, **labels: str) -> float:
    gateway.metrics.flush()
    value = gateway.metrics.registry.get_sample_value(f"estimate_proxy_{name}", {"account": "default", **labels})
    assert value is not None
    return value


def priced(amount: str) -> Responder:
    return answers(f'{{"data":{{"estimated":{amount},"balance":10000}},"error":{{}}}}'.encode())


def amount(response: httpx2.Response) -> float:
    return float(response.json()["data"]["estimated"])


def is_inferred(response: httpx2.Response) -> bool:
    return "detail=inferred" in cache_status(response)


class TestUse:
    def test_a_new_seed_is_answered_without_asking(self, open_learning: OpenGateway) -> None:
        gateway = open_learning()
        teach(gateway)
        calls = gateway.simulator.calls
        found = gateway.ask(new_body())
        assert cache_status(found) in {"hit; ttl=3599; detail=inferred", "hit; ttl=3600; detail=inferred"}
        assert found.headers["age"] == "0"
        assert found.json() == {"data": {"estimated": 2.75, "balance": 10_000}, "error": {}}
        assert gateway.simulator.calls == calls
        assert counted(gateway, "inferences_total", result="answered") == 1

    def test_it_is_charged_and_logged_as_a_hit_with_its_setting(
        self, open_learning: OpenGateway, caplog: pytest.LogCaptureFixture
    ) -> None:
        gateway = open_learning()
        teach(gateway)
        before = usage(gateway)
        caplog.set_level(logging.INFO)
        gateway.ask(new_body())
        after = usage(gateway)
        assert after["estimated_credits"] - before["estimated_credits"] == 2.75
        assert after["outcomes"]["inferred"] == 1
        (facts,) = (facts for facts in map(_facts, caplog.records) if facts.get("outcome") == "inferred")
        assert len(facts["setting"]) == 24

    @pytest.mark.parametrize("value", ["no-cache", "no-store", "max-age=0"])
    def test_a_client_that_wants_an_exact_price_gets_it(self, open_learning: OpenGateway, value: str) -> None:
        gateway = open_learning()
        teach(gateway)
        exact = gateway.ask(new_body(), cache_control=value)
        assert cache_status(exact).startswith("fwd=")
        assert is_inferred(gateway.ask(new_body(), cache_control="only-if-cached"))
        assert is_inferred(gateway.ask(new_body(), cache_control="max-age=60"))

    def test_a_team_without_inference_gets_exact_prices(self, open_learning: OpenGateway) -> None:
        teams = {
            "design": {"tokens": [digest_of(DESIGN)]},
            "marketing": {"tokens": [digest_of(MARKETING)], "infer": False},
        }
        gateway = open_learning(teams=teams)
        teach(gateway)
        assert cache_status(gateway.ask(new_body(), x_api_key=MARKETING)).startswith("fwd=miss")
        why = gateway.client.post("/v1/explain", content=new_body(), headers={"x-api-key": MARKETING}).json()["learned"]
        assert (why["inferable"], why["reason"], "estimated" in why) == (False, "exact-team", False)
        assert is_inferred(gateway.ask(new_body()))

    def test_what_counts_is_asked(self, open_learning: OpenGateway) -> None:
        gateway = open_learning()
        teach(gateway)
        for other in (
            new_body(steps=21),
            new_body(quality='"Plus"'),
            '[{"model":"Other","seed":5001}]',
            new_body(seed=99_999_999),
        ):
            assert cache_status(gateway.ask(other)).startswith("fwd=miss")

    def test_a_member_that_never_is_left_out(self, open_learning: OpenGateway) -> None:
        gateway = open_learning(cache={"never_learn": ["seed"]})
        teach(gateway)
        assert cache_status(gateway.ask(new_body())).startswith("fwd=miss")
        assert "0.seed" in scope(gateway)["counting"]


class TestAudits:
    @pytest.fixture
    def gateway(self, open_learning: OpenGateway) -> GatewayFixture:
        """Has learned, and audits every inferred answer."""
        gateway = open_learning(cache={"audit_one_in": 1})
        teach(gateway)
        return gateway

    def audited(self, gateway: GatewayFixture, audits: int) -> None:
        wait_until(lambda: scope(gateway)["audits"] == audits)

    def test_an_audit_that_agrees_asks_after_the_answer(self, gateway: GatewayFixture) -> None:
        calls = gateway.simulator.calls
        assert is_inferred(gateway.ask(new_body()))
        self.audited(gateway, 1)
        assert gateway.simulator.calls == calls + 1
        wait_until(lambda: counted(gateway, "inference_audits_total", result="same") == 1)
        assert scope(gateway)["contradictions"] == 0

    def test_a_member_that_begins_to_count(self, gateway: GatewayFixture, caplog: pytest.LogCaptureFixture) -> None:
        gateway.simulator.script(priced("9"))
        wrong = gateway.ask(new_body())
        assert (is_inferred(wrong), amount(wrong)) == (True, 2.75)
        self.audited(gateway, 1)
        assert scope(gateway)["state"] == "in doubt"
        right = gateway.ask(new_body())
        assert (cache_status(right)[:8], amount(right)) == ("fwd=miss", 2.75)
        wait_until(lambda: scope(gateway)["state"] == "contradicted")
        found = scope(gateway)
        assert (found["tests"], found["tests_needed"]) == (0, 2 * LEARN_FROM)
        assert found["last_contradiction"]["suspect_answers"] == 1
        wait_until(lambda: counted(gateway, "inference_audits_total", result="contradicted") == 1)
        assert counted(gateway, "suspect_answers_total") == 1
        assert counted(gateway, "inference_audits_total", result="list-moved") == 0
        (record,) = (each for each in caplog.records if each.getMessage() == "inferred prices contradicted")
        assert record.levelno == logging.ERROR
        assert (_facts(record)["suspect_answers"], _facts(record)["scope"]) == (1, found["scope"])
        assert not is_inferred(gateway.ask(new_body()))

    def test_a_list_that_moves(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(*[priced("9")] * 3)
        assert amount(gateway.ask(new_body())) == 2.75
        self.audited(gateway, 1)
        for _ in range(2):
            asked = scope(gateway)["asked"]
            assert not is_inferred(gateway.ask(new_body()))
            wait_until(lambda asked=asked: scope(gateway)["asked"] == asked + 1)  # type: ignore[misc]  # a default
        assert (scope(gateway)["state"], scope(gateway)["list_moves"]) == ("answering", 1)
        wait_until(lambda: counted(gateway, "inference_audits_total", result="list-moved") == 1)
        assert (counted(gateway, "suspect_answers_total"), scope(gateway)["contradictions"]) == (0, 0)
        (change,) = changes(gateway)
        assert (change["old"], change["new"], change["found_by"], change["model"]) == (2.75, 9, "doubt", "Flux")
        moved = gateway.ask(new_body())
        assert (is_inferred(moved), amount(moved)) == (True, 9)

    def test_an_audit_that_cannot_be_asked_is_owed(self, gateway: GatewayFixture) -> None:
        calls = gateway.simulator.calls
        gateway.simulator.script(Fault.SERVER_ERROR)
        assert is_inferred(gateway.ask(new_body()))
        wait_until(lambda: gateway.simulator.calls == calls + 1)
        wait_until(lambda: not gateway.store.keys("ep1:*:lease"))
        assert explained(gateway)["inferable"] is True, "to explain is not to ask"
        assert cache_status(gateway.ask(new_body())).startswith("fwd=miss")
        assert is_inferred(gateway.ask(new_body()))

    def test_an_audit_of_a_body_that_is_being_asked_is_owed(self, gateway: GatewayFixture) -> None:
        body = new_body()
        with ThreadPoolExecutor() as pool, gateway.simulator.hold() as hold:
            assert is_inferred(gateway.ask(body))
            assert gateway.simulator.arrived(1), "the audit of the first answer"
            assert is_inferred(gateway.ask(body))
            asked = pool.submit(gateway.ask, new_body())
            assert gateway.simulator.arrived(2)
            hold.release()
            assert cache_status(asked.result()).startswith("fwd=miss")


class TestWithTheRest:
    def test_an_exact_price_comes_first(self, open_learning: OpenGateway) -> None:
        gateway = open_learning()
        gateway.simulator.script(priced("7"))
        gateway.ask(new_body(1))
        teach(gateway)
        exact = gateway.ask(new_body(1))
        assert (cache_status(exact)[:9], amount(exact)) == ("hit; ttl=", 7)
        assert not is_inferred(exact)

    def test_an_inferred_price_over_the_ceiling_is_refused(self, open_learning: OpenGateway) -> None:
        gateway = open_learning()
        teach(gateway)
        before = usage(gateway)["estimated_credits"]
        refused = gateway.ask(new_body(), estimate_proxy_max_credits="2.5")
        assert (refused.status_code, code_of(refused), refused.json()["estimated"]) == (402, "over-ceiling", 2.75)
        assert cache_status(refused).endswith("; detail=inferred")
        assert is_inferred(gateway.ask(new_body(), estimate_proxy_max_credits="2.75"))
        assert usage(gateway)["estimated_credits"] == before + 2.75
        assert usage(gateway)["outcomes"]["over-ceiling"] == 1

    def test_a_quote_shows_where_its_prices_come_from(self, open_learning: OpenGateway) -> None:
        gateway = open_learning()
        teach(gateway)
        calls, body = gateway.simulator.calls, json.loads(new_body())
        named = {"variants": [{"label": "new", "body": body}, {"label": "other", "body": [{"segment": {}}]}]}
        response = gateway.client.post("/v1/quote", json=named)
        assert [variant["basis"] for variant in response.json()["variants"]] == ["inferred", "asked"]
        assert gateway.simulator.calls == calls + 1
        exact = gateway.client.post("/v1/quote", json=named, headers={"cache-control": "no-cache"})
        assert [variant["basis"] for variant in exact.json()["variants"]] == ["asked", "asked"]

    def test_a_stale_price_is_served_and_refreshed_with_the_askers_body(self, open_learning: OpenGateway) -> None:
        gateway = open_learning(cache={"ttl_s": 100, "stale_while_revalidate_s": 50})
        teach(gateway)
        age_settings(gateway, 120)
        asked = new_body()
        stale = gateway.ask(asked)
        assert cache_status(stale) in {"hit; ttl=-20; detail=inferred", "hit; ttl=-21; detail=inferred"}
        assert stale.headers["age"] == "120"
        wait_until(lambda: not is_inferred(gateway.ask(asked, cache_control="only-if-cached")))
        assert gateway.simulator.received[-1].body == asked.encode()
        wait_until(lambda: int(gateway.ask(new_body()).headers["age"]) < 5)

    def test_a_stale_price_is_served_if_rendernet_fails(self, open_learning: OpenGateway) -> None:
        gateway = open_learning(cache={"ttl_s": 100, "stale_while_revalidate_s": 0, "stale_if_error_s": 500})
        teach(gateway)
        age_settings(gateway, 300)
        gateway.simulator.script(Fault.SERVER_ERROR)
        found = gateway.ask(new_body())
        status = cache_status(found)
        assert (found.status_code, amount(found)) == (200, 2.75)
        assert status.startswith("fwd=stale; fwd-status=500; ttl=-20")
        assert status.endswith("; detail=inferred")
        assert usage(gateway)["outcomes"]["inferred"] == 1
        age_settings(gateway, 400)
        gateway.simulator.script(Fault.SERVER_ERROR)
        assert gateway.ask(new_body()).status_code == 502

    def test_an_old_balance_is_refreshed(self, open_learning: OpenGateway, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("proxy.gateway.audits.AUDIT_CLAIM_S", 0.0)
        monkeypatch.setattr("proxy.gateway.audits.AUDIT_PAUSE_S", 0.0)
        gateway = open_learning(cache={"balance_max_age_s": 0})
        teach(gateway)
        gateway.simulator.balance = 41
        assert gateway.ask(new_body()).json()["data"]["balance"] == 10_000
        wait_until(lambda: gateway.ask(new_body()).json()["data"]["balance"] == 41)
        assert counted(gateway, "price_audits_total", result="ignored-member") == 0

    @pytest.mark.parametrize("what", ["body", "all"])
    def test_a_purge_drops_the_learned_price(self, open_learning: OpenGateway, what: str) -> None:
        gateway = open_learning()
        teach(gateway)
        other = new_body()
        content = '{"all":true}' if what == "all" else f'{{"body":{other}}}'
        purged = gateway.client.post("/v1/cache/purge", content=content, headers={"x-api-key": ADMIN})
        assert purged.status_code == 200
        tests = scope(gateway)["tests"]
        for number in range(3):
            assert cache_status(gateway.ask(new_body())).startswith("fwd=miss")
            wait_until(lambda number=number: explained(gateway)["inferable"] is (number == 2))  # type: ignore[misc]
        assert is_inferred(gateway.ask(new_body()))
        assert scope(gateway)["tests"] >= tests, "what is known about members stays"

    def test_repricing_drops_learned_prices(self, open_learning: OpenGateway, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("proxy.gateway.audits.AUDIT_CLAIM_S", 0.0)
        monkeypatch.setattr("proxy.gateway.audits.AUDIT_PAUSE_S", 0.0)
        gateway = open_learning(cache={"balance_max_age_s": 0})
        others = ['[{"segment":{}}]', '[{"narrator":{}}]', '[{"video_anyone":{}}]']
        for other in others:
            gateway.ask(other)
        teach(gateway)
        assert explained(gateway)["inferable"] is True
        for number, other in enumerate(others):
            gateway.simulator.script(priced("77"))
            gateway.ask(other)
            wait_until(lambda number=number: counted(gateway, "price_audits_total", result="changed") == number + 1)  # type: ignore[misc]
        wait_until(lambda: explained(gateway)["reason"] == "new-setting")

    def test_without_the_store_a_request_is_answered_as_without_learning(
        self, open_learning: OpenGateway, store_proxy: FaultyProxy
    ) -> None:
        gateway = open_learning(cache={"url": store_proxy.url})
        teach(gateway)
        with store_proxy.under(Conditions(accepts=False)):
            assert cache_status(gateway.ask(new_body())) == "fwd=bypass; detail=store-unavailable"
            assert "learned" not in gateway.client.post("/v1/explain", content=new_body()).json()
            refused = gateway.client.get("/v1/learned", headers={"x-api-key": ADMIN})
            assert code_of(refused) == "store-unavailable"
        with store_proxy.under(Conditions(carries=False)):
            started = time.monotonic()
            assert gateway.ask(new_body()).status_code == 200
            assert time.monotonic() - started < 2 * TIMEOUT_S, "no second timeout after the price book's"


class TestObserve:
    def test_no_answer_differs_and_nothing_more_is_asked(self, open_learning: OpenGateway) -> None:
        requests: list[tuple[str, dict[str, str]]]
        requests = [(new_body(seed), {}) for seed in (*range(5000, 5012), 9999, 4000, *range(6000, 6010), 6000)]
        requests += [
            (new_body(7000), {"cache_control": value}) for value in ("no-cache", "max-age=0", "only-if-cached")
        ]
        told: list[list[object]] = []
        calls: list[int] = []
        for learn in ("off", "observe"):
            gateway = open_learning(learn=learn)
            gateway.store.flushall()
            told.append([_comparable(gateway.ask(content, **headers)) for content, headers in requests])
            calls.append(gateway.simulator.calls - sum(calls))
        assert told[0] == told[1]
        assert calls[0] == calls[1] > 20
        wait_until(lambda: counted(gateway, "inferences_total", result="right") > 3)
        assert counted(gateway, "inferences_total", result="answered") == 0

    def test_it_counts_what_would_have_been_wrong(self, open_learning: OpenGateway) -> None:
        gateway = open_learning(learn="observe")
        teach(gateway)
        assert explained(gateway)["inferable"] is True
        assert "estimated" not in explained(gateway), "another body's price is shown only where it would be the answer"
        calls = gateway.simulator.calls
        assert not is_inferred(gateway.ask(new_body()))
        assert (counted(gateway, "inferences_total", result="right"), gateway.simulator.calls) == (1, calls + 1)
        gateway.simulator.script(priced("9"))
        assert amount(gateway.ask(new_body())) == 9
        assert counted(gateway, "inferences_total", result="wrong") == 1
        wait_until(lambda: scope(gateway)["state"] == "in doubt")
        gateway.ask(new_body())
        wait_until(lambda: scope(gateway)["contradictions"] == 1)
        found = scope(gateway)
        assert (found["would_have_answered"], found["would_have_been_wrong"], found["answered"]) == (2, 1, 0)
        assert counted(gateway, "suspect_answers_total") == 0

    def test_a_list_that_moves_makes_no_price_stale(self, open_learning: OpenGateway) -> None:
        """Only `use` counts it towards repricing."""
        gateway = open_learning(learn="observe")
        teach(gateway)
        gateway.simulator.script(*[priced("9")] * 3)
        for _ in range(3):
            asked = scope(gateway)["asked"]
            gateway.ask(new_body())
            wait_until(lambda asked=asked: scope(gateway)["asked"] == asked + 1)  # type: ignore[misc]
        assert scope(gateway)["list_moves"] == 1
        assert changes(gateway) == []
        assert not [key for key in gateway.store.keys("ep1:book:*") if gateway.store.hexists(key, "changed_keys")]

    def test_off_learns_nothing(self, open_learning: OpenGateway) -> None:
        gateway = open_learning(learn="off")
        for _ in range(5):
            gateway.ask(new_body())
        assert learned(gateway)["accounts"][0]["scopes"] == []
        assert "learned" not in gateway.client.post("/v1/explain", content=new_body()).json()


class TestReports:
    def test_what_was_learned(self, open_learning: OpenGateway) -> None:
        gateway = open_learning()
        teach(gateway, steps=20)
        gateway.ask(new_body(steps=20))
        gateway.ask(new_body(steps=20))  # stores the count of the first
        assert scope(gateway)["answered"] == 1
        document = learned(gateway)
        assert [each["account"] for each in document["accounts"]] == ["default", "second"]
        assert document["learn"] == "use"
        found = scope(gateway)
        assert (found["state"], found["items"], found["team"]) == ("answering", ["model Flux"], "design")
        assert (found["left_out"], found["counting"]) == (["0.seed"], ["0.model", "0.steps"])
        assert found["tests"] >= found["tests_needed"] == LEARN_FROM
        assert found["bound_in_words"].startswith(
            f"of {found['tests']} tries none cost otherwise: with 95 % confidence"
        )
        assert found["answered_percent"] == round(100 / (found["asked"] + 1), 1)
        assert "2.75" not in gateway.client.get("/v1/learned", headers={"x-api-key": ADMIN}).text, "no amounts"

    def test_only_viewers_and_admins_see_it(self, open_learning: OpenGateway) -> None:
        gateway = open_learning(viewer={"tokens": [digest_of(VIEWER)]})
        assert code_of(gateway.client.get("/v1/learned")) == "forbidden"
        assert code_of(gateway.client.get("/v1/learned", headers={"x-api-key": "ep_nobody"})) == "unknown-token"
        headers = {"x-api-key": VIEWER}
        assert gateway.client.get("/v1/learned?account=second", headers=headers).json()["accounts"] == [
            {"account": "second", "scopes": []}
        ]
        for query in ("account=nobody", "acount=second"):
            assert code_of(gateway.client.get(f"/v1/learned?{query}", headers=headers)) == "invalid-query"

    def test_explain_says_why_a_body_was_not_inferred(self, open_learning: OpenGateway) -> None:
        gateway = open_learning()
        assert explained(gateway) == {
            "learn": "use",
            "inferable": False,
            "reason": "new-scope",
            "detail": "No body with these members, models and number of items was asked yet, or only in the last two "
            "seconds.",
        }
        gateway.ask(new_body())
        wait_until(lambda: explained(gateway)["reason"] == "too-few-tests")
        teach(gateway)
        found = explained(gateway, new_body(99_999_999))
        assert (found["reason"], found["detail"]) == (
            "outside-range",
            "The value of 0.seed is outside the range that was tested.",
        )
        assert (found["left_out"], found["counting"], found["state"]) == (["0.seed"], ["0.model"], "answering")
        calls = gateway.simulator.calls
        inferable = explained(gateway)
        assert (inferable["inferable"], inferable["estimated"]) == (True, 2.75)
        assert gateway.simulator.calls == calls


def changes(gateway: GatewayFixture) -> list[dict[str, Any]]:
    document = gateway.client.get("/v1/prices/changes", headers={"x-api-key": ADMIN}).json()
    found: list[dict[str, Any]] = document["changes"]
    return found


def explained(gateway: GatewayFixture, content: str | None = None) -> dict[str, Any]:
    document: dict[str, Any] = gateway.client.post("/v1/explain", content=content or new_body()).json()["learned"]
    return document


def age_settings(gateway: GatewayFixture, seconds: int) -> None:
    """Makes the newest answer of every setting older."""
    for key in gateway.store.keys("ep1:*:scope:*"):
        for name, value in cast("dict[bytes, bytes]", gateway.store.hgetall(key)).items():
            if name.startswith(b"s:"):
                at_ms, _, fields = value.partition(b" ")
                gateway.store.hset(key, name, b"%d %b" % (int(at_ms) - 1000 * seconds, fields))


def _comparable(response: httpx2.Response) -> tuple[int, dict[str, str], bytes]:
    """What a client sees, but the time that it took and the id of the request."""
    varying = {"x-request-id", "server-timing", "date", "ratelimit"}
    headers = {name: value for name, value in response.headers.items() if name not in varying}
    if response.status_code >= 400:
        return response.status_code, headers, b""
    return response.status_code, headers, response.content


def usage(gateway: GatewayFixture) -> dict[str, Any]:
    document: dict[str, Any] = gateway.client.get("/v1/usage").json()["total"]
    return document


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    facts: dict[str, Any] = record.__dict__.get("facts", {})
    return facts
