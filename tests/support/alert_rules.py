"""The committed recording rules and alerts of Prometheus."""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
RULES = sorted((FOLDER / "rules").glob("*.yml"))


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules that have the member `kind`: "record" or "alert"."""
    groups = (group for file in RULES for group in yaml.safe_load(file.read_text())["groups"])
    return [rule for group in groups for rule in group["rules"] if kind in rule]


RECORDED, ALERTS = rules("record"), rules("alert")
