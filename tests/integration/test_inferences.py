"""Learned prices, as clients and operators meet them: inferred answers, audits, doubt, and what `observe` changes."""

import logging
from itertools import count, islice
from typing import Any

import httpx2
import pytest

from gateway_fixture import DESIGN, MARKETING, GatewayFixture, OpenGateway, answers, cache_status
from gateway_process import Tree
from proxy.auth import digest_of, token_of
from proxy.demo.simulator import Responder
from serving import wait_until

ADMIN = token_of("A" * 32)
LEARN_FROM = 3
NEVER = 10_000
"""For `audit_one_in`: the tests ask less often."""

pytestmark = pytest.mark.usefixtures("cold")


@pytest.fixture(autouse=True)
def _reads_evidence_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learned is seen at once, instead of after a second."""
    monkeypatch.setattr("proxy.learning.snapshots.REREAD_S", -1.0)
    monkeypatch.setattr("proxy.learning.counts.FLUSH_AFTER_S", 0.0)


@pytest.fixture
def open_learning(open_gateway: OpenGateway) -> OpenGateway:
    """Opens gateways that infer after few tests, and never audit unless `cache` says so."""

    def enter(learn: str = "use", **sections: Tree) -> GatewayFixture:
        cache = {"learn": learn, "learn_from": LEARN_FROM, "audit_one_in": NEVER, **sections.pop("cache", {})}
        return open_gateway(cache=cache, admin={"tokens": [digest_of(ADMIN)]}, **sections)

    return enter


SEEDS = count(5000)
DISTINCT = 12
"""After so many different values a member is left out."""


def body(seed: int | None = None, **members: Any) -> str:
    """A body with a new seed, inside the range that `learn` has taught."""
    seed = next(SEEDS) if seed is None else seed
    extra = "".join(f',"{name}":{value}' for name, value in members.items())
    return f'[{{"model":"Flux","seed":{seed}{extra}}}]'


def learn(gateway: GatewayFixture, **members: Any) -> None:
    """Asks until the gateway has learned that the seed does not count: the next body's price can be inferred."""
    for seed in (*islice(SEEDS, DISTINCT), 9999, 4000, *islice(SEEDS, LEARN_FROM)):
        assert gateway.ask(body(seed, **members)).status_code == 200
        asked = gateway.simulator.calls
        wait_until(lambda: scope(gateway)["asked"] >= asked)  # noqa: B023 -- called in this iteration


def scope(gateway: GatewayFixture) -> dict[str, Any]:
    """The first scope of `GET /v1/learned`; one without members if nothing is learned yet."""
    accounts = learned(gateway)["accounts"]
    scopes = [scope for account in accounts for scope in account["scopes"]]
    return scopes[0] if scopes else {"asked": 0}


def learned(gateway: GatewayFixture) -> dict[str, Any]:
    response = gateway.client.get("/v1/learned", headers={"x-api-key": ADMIN})
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


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
        learn(gateway)
        calls = gateway.simulator.calls
        found = gateway.ask(body())
        assert cache_status(found) in {"hit; ttl=3599; detail=inferred", "hit; ttl=3600; detail=inferred"}
        assert found.headers["age"] == "0"
        assert found.json() == {"data": {"estimated": 2.75, "balance": 10_000}, "error": {}}
        assert gateway.simulator.calls == calls
        assert counted(gateway, "inferences_total", result="answered") == 1

    def test_it_is_charged_and_logged_as_a_hit_with_its_setting(
        self, open_learning: OpenGateway, caplog: pytest.LogCaptureFixture
    ) -> None:
        gateway = open_learning()
        learn(gateway)
        before = usage(gateway)
        caplog.set_level(logging.INFO)
        gateway.ask(body())
        after = usage(gateway)
        assert after["estimated_credits"] - before["estimated_credits"] == 2.75
        assert after["outcomes"]["inferred"] == 1
        (facts,) = (facts for facts in map(_facts, caplog.records) if facts.get("outcome") == "inferred")
        assert len(facts["setting"]) == 24

    @pytest.mark.parametrize("value", ["no-cache", "no-store", "max-age=0"])
    def test_a_client_that_wants_an_exact_price_gets_it(self, open_learning: OpenGateway, value: str) -> None:
        gateway = open_learning()
        learn(gateway)
        exact = gateway.ask(body(), cache_control=value)
        assert cache_status(exact).startswith("fwd=")
        assert is_inferred(gateway.ask(body(), cache_control="only-if-cached"))
        assert is_inferred(gateway.ask(body(), cache_control="max-age=60"))

    def test_a_team_without_inference_gets_exact_prices(self, open_learning: OpenGateway) -> None:
        teams = {
            "design": {"tokens": [digest_of(DESIGN)]},
            "marketing": {"tokens": [digest_of(MARKETING)], "infer": False},
        }
        gateway = open_learning(teams=teams)
        learn(gateway)
        assert cache_status(gateway.ask(body(), x_api_key=MARKETING)).startswith("fwd=miss")
        assert is_inferred(gateway.ask(body()))

    def test_what_counts_is_asked(self, open_learning: OpenGateway) -> None:
        gateway = open_learning()
        learn(gateway)
        for other in (body(steps=21), body(quality='"Plus"'), '[{"model":"Other","seed":5001}]', body(seed=99_999_999)):
            assert cache_status(gateway.ask(other)).startswith("fwd=miss")

    def test_a_member_that_never_is_left_out(self, open_learning: OpenGateway) -> None:
        gateway = open_learning(cache={"never_learn": ["seed"]})
        learn(gateway)
        assert cache_status(gateway.ask(body())).startswith("fwd=miss")
        assert "0.seed" in scope(gateway)["counting"]


def usage(gateway: GatewayFixture) -> dict[str, Any]:
    document: dict[str, Any] = gateway.client.get("/v1/usage").json()["total"]
    return document


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    facts: dict[str, Any] = record.__dict__.get("facts", {})
    return facts
