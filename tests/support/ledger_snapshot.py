"""A team's quotas and usage, read over HTTP."""

import json
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from fleet import TeamClient
from gateway_process import GatewayProcess, Tree


@dataclass(frozen=True)
class LedgerSnapshot:
    """A team's used quotas and its usage."""

    used: list[Decimal]
    usage: Tree

    @classmethod
    def of(cls, served: GatewayProcess, token: str) -> "LedgerSnapshot":
        quotas, rows = _shown(served, token, "/v1/quota")["quotas"], _shown(served, token, "/v1/usage?by=model")["rows"]
        total = {name: sum(row[name] for row in rows) for name in ("requests", "refused", "estimated_credits")}
        outcomes = sum((Counter[str](row["outcomes"]) for row in rows), Counter[str]())
        return cls([quota["used"] for quota in quotas], {**total, "outcomes": dict(outcomes)})


def _shown(served: GatewayProcess, token: str, path: str) -> Any:
    with served.client() as client:
        answer = client.get(path, headers={"x-api-key": token})
    assert answer.status_code == 200, answer.text
    return json.loads(answer.text, parse_float=Decimal)


def snapshot_of(team: TeamClient, at: int = 0) -> LedgerSnapshot:
    return LedgerSnapshot.of(team.fleet.gateways[at], team.token)
