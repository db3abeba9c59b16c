"""The committed dashboards and their queries."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRAFANA = Path(__file__).parents[2] / "grafana"
FILES = ("estimated-spend.json", "gateway.json")
VARIABLES = ("job", "instance", "team")
EVERYTHING = dict.fromkeys(VARIABLES, ".*")


@dataclass(frozen=True)
class Query:
    """A query as Grafana sends it, with its variables replaced."""

    dashboard: str
    panel: str
    letter: str
    expr: str
    instant: bool

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.panel} ({self.letter})"


def dashboards() -> list[dict[str, Any]]:
    """What is committed, as Grafana reads it."""
    return [json.loads((GRAFANA / "dashboards" / name).read_text()) for name in FILES]


def panels(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The panels of a dashboard, without the rows that stand between them."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries(
    dashboard: Mapping[str, Any],
    chosen: Mapping[str, str] = EVERYTHING,
    *,
    range_s: int = 300,
    rate_interval_s: int = 60,
) -> list[Query]:
    """All queries of a dashboard for a choice of job, instance and team, each a regular expression."""
    values = {**chosen, "__range": f"{range_s}s", "__rate_interval": f"{rate_interval_s}s"}
    return [
        Query(
            dashboard["title"],
            panel["title"],
            target["refId"],
            re.sub(r"\$(\w+)", lambda variable: values[variable[1]], target["expr"]),
            target["instant"],
        )
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]
