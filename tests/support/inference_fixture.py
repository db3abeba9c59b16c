"""Teaches a gateway that a seed does not decide the price, and reads what it has learned."""

from itertools import count, islice
from typing import Any

from gateway_fixture import GatewayFixture
from gateway_process import Tree
from proxy.auth import digest_of, token_of
from serving import wait_until

ADMIN = token_of("A" * 32)
LEARN_FROM = 3
NEVER = 10_000
"""For `audit_one_in`: the tests ask less often."""

LEARNING: dict[str, Tree] = {
    "cache": {"learn": "use", "learn_from": LEARN_FROM, "audit_one_in": NEVER},
    "admin": {"tokens": [digest_of(ADMIN)]},
}
"""Sections of a gateway that infers after few tests, and never audits."""

DISTINCT = 12
"""After so many different values a member is left out."""

SEEDS = count(5000)


def new_body(seed: int | None = None, **members: Any) -> str:
    """A body with a new seed, inside the range that `teach` has taught."""
    seed = next(SEEDS) if seed is None else seed
    extra = "".join(f',"{name}":{value}' for name, value in members.items())
    return f'[{{"model":"Flux","seed":{seed}{extra}}}]'


def teach(gateway: GatewayFixture, **members: Any) -> None:
    """Asks until the gateway has learned that the seed does not count: the next body's price can be inferred."""
    for seed in (*islice(SEEDS, DISTINCT), 9999, 4000, *islice(SEEDS, LEARN_FROM)):
        assert gateway.ask(new_body(seed, **members)).status_code == 200
        asked = gateway.simulator.calls
        wait_until(lambda asked=asked: sum(each["asked"] for each in scopes(gateway)) >= asked)  # type: ignore[misc]


def scopes(gateway: GatewayFixture) -> list[dict[str, Any]]:
    return [scope for account in learned(gateway)["accounts"] for scope in account["scopes"]]


def scope(gateway: GatewayFixture) -> dict[str, Any]:
    """The scope that was last asked."""
    return scopes(gateway)[0]


def learned(gateway: GatewayFixture) -> dict[str, Any]:
    response = gateway.client.get("/v1/learned", headers={"x-api-key": ADMIN})
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document
