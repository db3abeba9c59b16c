"""Generates the JSON of the dashboards: `python grafana/build.py`. A test fails if the committed files differ."""

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard

import gateway
import spend

FOLDER = Path(__file__).parent / "dashboards"


def rendered() -> dict[str, str]:
    """The text of each file, by its name."""
    return {"estimated-spend.json": _text(spend.board()), "gateway.json": _text(gateway.board())}


def _text(board: dashboard.Dashboard) -> str:
    return json.dumps(board, cls=JSONEncoder, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
