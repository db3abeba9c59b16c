"""`POST /v1/explain`: what the gateway makes of a body."""

import pytest

from gateway_fixture import RETIRED, Opened, Scene, cache_status, code_of
from proxy.cache.canonical import canonicalise, key_of
from serving import free_port

BODY = b'[ {"steps": 7.0, "model": "Fl\\u0075x"} ]'


def explained(scene: Scene, body: bytes = BODY, query: str = "") -> dict[str, object]:
    response = scene.client.post(f"/v1/explain{query}", content=body)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    document: dict[str, object] = response.json()
    return document


def test_a_body_that_nobody_has_asked(scene: Scene) -> None:
    canonical = canonicalise(BODY)
    scene.ask(b'[{"batch_size":1}]')
    origin = f"http://{dict(scene.simulator.received[0].headers)[b'host'].decode()}"
    assert explained(scene) == {
        "canonical_body": '[{"model":"Flux","steps":7}]',
        "key": key_of(canonical, origin=origin, account="default", path="/pub/v1/generations/estimate", query=""),
        "account": "default",
        "query": "",
        "ignored_members": [],
        "stored": False,
        "admitted": True,
    }


def test_a_body_whose_price_is_known(scene: Scene) -> None:
    scene.ask(BODY)
    found = explained(scene)
    assert found["stored"] is True
    assert found["estimated"] == 2.75
    assert found["age_s"] == 0
    assert found["ttl_s"] in {3599, 3600}
    assert explained(scene, query="?type=image")["stored"] is False
    assert scene.simulator.calls == 1


def test_its_key_is_the_one_in_the_store(scene: Scene) -> None:
    scene.ask(BODY)
    assert scene.store.keys("ep1:*:price") == [f"ep1:{{{explained(scene)['key']}}}:price".encode()]


def test_without_a_store_it_says_that_it_does_not_know(open_gateway: Opened) -> None:
    scene = open_gateway(cache={"url": f"redis://127.0.0.1:{free_port()}"})
    found = explained(scene)
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
def test_it_refuses_as_an_estimate_would(scene: Scene, headers: dict[str, str], body: bytes, code: str) -> None:
    assert code_of(scene.client.post("/v1/explain", content=body, headers=headers)) == code


def test_it_asks_upstream_nothing(scene: Scene) -> None:
    explained(scene)
    assert scene.simulator.calls == 0
    assert cache_status(scene.ask(BODY)).startswith("fwd=miss")
