"""Gateways with rates and quotas: settings of teams, requests, and readers of the answers."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import http_sf
import httpx2

from gateway_fixture import DESIGN, GatewayFixture
from gateway_process import Tree
from proxy.auth import digest_of, token_of

ADMIN = token_of("a" * 32)

ONE, FLUX, SEGMENT = b"[{}]", b'[{"model":"Flux"}]', b'[{"segment":{}}]'
"""1, 2.75 and 5 credits at the simulator's."""

SLOW = 0.001
"""A rate that gives nothing back while a test runs."""

Limited = Callable[..., GatewayFixture]


def quota(
    limit: float, per: str = "month", measure: str = "estimated_credits", on_exceed: str = "refuse"
) -> dict[str, Any]:
    return {"measure": measure, "limit": limit, "per": per, "on_exceed": on_exceed}


def requests(limit: int, per: str = "month", on_exceed: str = "refuse") -> dict[str, Any]:
    return quota(limit, per, "requests", on_exceed)


def team(token: str, *quotas: Tree, **more: Any) -> Tree:
    return {"tokens": [digest_of(token)], "quotas": list(quotas), **more}


def rate(burst: int, per_s: float = SLOW) -> Tree:
    return {"per_s": per_s, "burst": burst}


def exactly(response: httpx2.Response) -> Any:
    """Its JSON, numbers with all their digits."""
    return json.loads(response.text, parse_float=Decimal)


def get(gateway: GatewayFixture, path: str, token: str = DESIGN) -> httpx2.Response:
    return gateway.client.get(path, headers={"x-api-key": token})


def shown(gateway: GatewayFixture, path: str, token: str = DESIGN) -> Any:
    response = get(gateway, path, token)
    assert response.status_code == 200, response.text
    return exactly(response)


def usage(gateway: GatewayFixture, token: str = DESIGN) -> Any:
    """The total of what was counted."""
    return _counted(shown(gateway, "/v1/usage", token)["total"])


def by_model(gateway: GatewayFixture, token: str = DESIGN) -> dict[str, Any]:
    """What was counted, by model."""
    rows = shown(gateway, "/v1/usage?by=model", token)["rows"]
    return {row["model"]: _counted(row) for row in rows}


def _counted(row: Tree) -> Tree:
    return {name: row[name] for name in ("requests", "refused", "estimated_credits", "outcomes")}


def row(requests: int = 0, credits_: float | Decimal = 0, refused: int = 0, **outcomes: int) -> Tree:
    """What usage shows of a group."""
    named = {name.replace("_", "-"): count for name, count in outcomes.items()}
    return {"requests": requests, "refused": refused, "estimated_credits": credits_, "outcomes": named}


def used(gateway: GatewayFixture, token: str = DESIGN) -> list[Any]:
    """Of each quota, the team's and then the organisation's."""
    return [quota["used"] for quota in shown(gateway, "/v1/quota", token)["quotas"]]


def exceeded(response: httpx2.Response, status: int = 402) -> Any:
    """The problem that a quota makes, in both envelopes; it discloses no estimate."""
    problem = exactly(response)
    assert (response.status_code, problem["status"]) == (status, status), response.text
    assert problem["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert problem["error"] == {"code": "quota-exceeded", "message": problem["detail"]}
    assert problem["data"] is None
    assert problem["request_id"] == response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    assert "estimate-proxy-warning" not in response.headers
    return problem


def field(response: httpx2.Response, name: str) -> dict[str, dict[str, Any]]:
    """A structured field that is a list of strings, with their parameters."""
    items: Any = http_sf.parse(response.headers[name].encode(), tltype="list")
    assert {type(item) for item, _ in items} <= {str}, "a token is no string"
    assert len(dict(items)) == len(items)
    return dict(items)


def limits(response: httpx2.Response) -> dict[str, dict[str, Any]]:
    return field(response, "ratelimit")


def left(response: httpx2.Response) -> dict[str, int]:
    """What is left by `RateLimit`, but for the rate."""
    return {name: members["r"] for name, members in limits(response).items() if name != "rate"}


def explained(gateway: GatewayFixture, body: bytes = FLUX) -> Any:
    response = gateway.client.post("/v1/explain", content=body)
    assert response.status_code == 200, response.text
    return exactly(response)


def end_of(per: str, now: datetime) -> datetime:
    """Of the window that `now` lies in, where clocks are not shifted."""
    minute = now.replace(second=0, microsecond=0)
    day = minute.replace(hour=0, minute=0)
    ends = {
        "minute": minute + timedelta(minutes=1),
        "hour": minute.replace(minute=0) + timedelta(hours=1),
        "day": day + timedelta(days=1),
        "week": day + timedelta(days=7 - day.weekday()),
        "month": (day.replace(day=1) + timedelta(days=32)).replace(day=1),
    }
    return ends[per]
