"""Settings for gateways that may be scraped, and requests after which every metric has a sample."""

from typing import Any

from gateway_fixture import DESIGN, GatewayFixture
from gateway_process import Tree
from past_usage import put_past_usage
from prometheus import SCRAPER, scrape
from proxy.auth import digest_of, token_of
from serving import wait_until

ADMIN = token_of("a" * 32)
GUARD: Tree = {"metrics": {"tokens": [digest_of(SCRAPER)]}, "admin": {"tokens": [digest_of(ADMIN)]}}

ONE, FLUX = b"[{}]", b'[{"model":"Flux"}]'
"""1 and 2.75 credits at the simulator's."""

TEAMS = ("design", "marketing", "retired")
ACCOUNTS = ("default", "second")


def quota(limit: float, per: str = "month", measure: str = "estimated_credits", on_exceed: str = "refuse") -> Tree:
    return {"measure": measure, "limit": limit, "per": per, "on_exceed": on_exceed}


def limited(*quotas: Tree, **more: Any) -> Tree:
    """For the section `teams`: what holds for `design`."""
    return {"design": {"tokens": [digest_of(DESIGN)], "quotas": list(quotas), **more}}


def toured(gateway: GatewayFixture) -> GatewayFixture:
    """After something has happened for each metric."""
    put_past_usage(gateway.store, "design", [10] * 20)
    gateway.ask(FLUX)
    gateway.ask(FLUX)
    wait_until(
        lambda: scrape(gateway.client).value("requests_total", team="design", operation="estimate", outcome="hit")
    )
    return gateway
