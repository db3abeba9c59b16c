"""Gateways for the bench: `serve` with a config file and external stores."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from bench.children import module, running
from bench.probe import answers
from bench.sites import Site, Store, Workspace
from bench.traffic import token
from proxy.auth import digest_of

BROKE, HASTY = "broke", "hasty"
"""Teams that are refused: one has almost no credits, one has a rate of one request in a thousand seconds."""

_HUGE = {"estimated_credits": 9_000_000_000, "requests": 10**12}


@dataclass(frozen=True, slots=True)
class GatewayVariant:
    """A gateway's teams, and their quotas on credits and requests, of the team and of the organisation.

    logged: whether each request has a log line, which is the default.
    """

    name: str
    teams: Sequence[str]
    quotas: bool = True
    logged: bool = False
    workers: int = 1


@contextmanager
def gateway(
    workspace: Workspace, variant: GatewayVariant, ledger: Store, book: Store, upstream_url: str
) -> Iterator[Site]:
    """Starts a gateway. Gateways share the stores, but each has its own ledger in them."""
    config = workspace.folder / f"{variant.name}.toml"
    config.write_text(_toml(_config(variant, ledger, book, upstream_url)), encoding="utf-8")
    url, port = workspace.address()
    command = module("proxy", "serve", "--config", config, "--port", port, "--workers", variant.workers)
    with running(variant.name, command, workspace.folder, workspace.cores.server) as child:
        child.wait_until(lambda: answers(url, "/readyz"))

        def workers() -> list[psutil.Process]:
            return [process for process in child.family() if "proxy.processes.worker" in process.cmdline()]

        child.wait_until(lambda: len(workers()) == variant.workers)
        yield Site(url, child, workers, ledger)


def _config(variant: GatewayVariant, ledger: Store, book: Store, upstream_url: str) -> dict[str, object]:
    """Returns a config with all features on, and high limits."""
    tree: dict[str, object] = {
        "server.drain_delay_s": 0,
        "upstream.base_url": upstream_url,
        "upstream.max_connections": 1000,
        "accounts.default.api_key": "rn-bench",
        "store.url": ledger.url,
        "cache.url": book.url,
        "log.level": "info" if variant.logged else "warning",
        "org.id": variant.name,
        "team_defaults.rate": {"per_s": 100_000, "burst": 1_000_000},
        f"teams.{BROKE}.quotas": _month({"estimated_credits": 1}),
        f"teams.{HASTY}.rate": {"per_s": 0.001, "burst": 1},
    }
    if variant.quotas:
        tree |= {"org.quotas": _month(_HUGE), "team_defaults.quotas": _month(_HUGE)}
    return tree | {f"teams.{team}.tokens": [digest_of(token(team))] for team in (*variant.teams, BROKE, HASTY)}


def _month(limits: dict[str, int]) -> list[dict[str, object]]:
    return [{"measure": measure, "limit": limit, "per": "month"} for measure, limit in limits.items()]


def _toml(tree: dict[str, object]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in tree.items())


def _value(value: object) -> str:
    """JSON's texts and numbers are valid TOML."""
    match value:
        case dict():
            return f"{{{', '.join(f'{key} = {_value(member)}' for key, member in value.items())}}}"
        case list():
            return f"[{', '.join(map(_value, value))}]"
        case _:
            return json.dumps(value)
