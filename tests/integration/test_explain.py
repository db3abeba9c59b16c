"""`POST /v1/explain`: the canonical body, its key and its stored price."""

import pytest

from gateway_fixture import RETIRED, GatewayFixture, OpenGateway, cache_status, code_of
from proxy.cache.canonical import canonicalise, key_of
from serving import free_port

BODY = b'[ {"steps": 7.0, "model": "Fl\\u0075x"} ]'


def explained(gateway: GatewayFixture, body: bytes = BODY, query: str = "") -> dict[str, object]:
    response = gateway.client.post(f"/v1/explain{query}", content=body)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    document: dict[str, object] = response.json()
    return document


def test_a_body_without_a_stored_price(gateway: GatewayFixture) -> None:
    canonical = canonicalise(BODY)
    gateway.ask(b'[{"batch_size":1}]')
    origin = f"http://{dict(gateway.simulator.received[0].headers)[b'host'].decode()}"
    assert explained(gateway) == {
        "canonical_body": '[{"model":"Flux","steps":7}]',
        "key": key_of(canonical, origin=origin, account="default", path="/pub/v1/generations/estimate", query=""),
        "account": "default",
        "query": "",
        "ignored_members": [],
        "stored": False,
        "admitted": True,
        "learned": {
            "learn": "observe",
            "inferable": False,
            "reason": "new-scope",
            "detail": "No body with these members, models and number of items was asked yet, or only in the last two "
            "seconds.",
        },
    }


def test_a_body_with_a_stored_price(gateway: GatewayFixture) -> None:
    gateway.ask(BODY)
    found = explained(gateway)
    assert found["stored"] is True
    assert found["estimated"] == 2.75
    assert found["age_s"] == 0
    assert found["ttl_s"] in {3599, 3600}
    assert explained(gateway, query="?type=image")["stored"] is False
    assert gateway.simulator.calls == 1


def test_its_key_is_the_one_in_the_store(gateway: GatewayFixture) -> None:
    gateway.ask(BODY)
    assert gateway.store.keys("ep1:*:price") == [f"ep1:{{{explained(gateway)['key']}}}:price".encode()]


def test_without_a_store_it_reports_no_stored_price(open_gateway: OpenGateway) -> None:
    gateway = open_gateway(cache={"url": f"redis://127.0.0.1:{free_port()}"})
    found = explained(gateway)
    assert found["stored"] is None
    assert found["admitted"] is True
    assert found["degraded"] == ["price-book"]


@pytest.mark.parametrize(
    ("headers", "body", "code"),
    [
        ({"x-api-key": "ep_nobody"}, BODY, "unknown-token"),
        ({"x-api-key": RETIRED}, BODY, "team-disabled"),
        ({}, b"[1]", "invalid-body"),
        ({"content-type": "text/plain"}, BODY, "unsupported-media-type"),
    ],
)
def test_it_refuses_the_same_bodies_as_an_estimate(
    gateway: GatewayFixture, headers: dict[str, str], body: bytes, code: str
) -> None:
    assert code_of(gateway.client.post("/v1/explain", content=body, headers=headers)) == code


def test_it_makes_no_upstream_call(gateway: GatewayFixture) -> None:
    explained(gateway)
    assert gateway.simulator.calls == 0
    assert cache_status(gateway.ask(BODY)).startswith("fwd=miss")
