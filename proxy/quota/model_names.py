"""What was priced: the name under which usage and metrics count a body's credits.

RenderNet prices an item by the first of its modes that is present. Names are bounded in length and alphabet here; how
many there are is bounded by the ledger.
"""

import re
from typing import Any

import orjson

from proxy.problems import NO_NAME

MIXED = "mixed"
OTHER = "other"

MAX_MODELS = 50
"""Distinct names in an organisation; later ones count as `OTHER`."""

_MODES = ("segment", "style", "model", "true_touch", "narrator", "video_anyone")
_NAMED = frozenset(("style", "model"))
_NAME = re.compile(r"[A-Za-z0-9 ._-]{1,64}", re.ASCII)


def model_of(canonical: bytes) -> str:
    """The name of what a canonical body asks for: `MIXED` where its items differ, `NO_NAME` where they name nothing."""
    names = {_model(item) for item in orjson.loads(canonical)}
    return names.pop() if len(names) == 1 else MIXED


def _model(item: dict[str, Any]) -> str:
    """A mode of `null` is absent: some clients write every member they know."""
    for mode in _MODES:
        value = item.get(mode)
        if value is not None:
            return _bounded(value) if mode in _NAMED and isinstance(value, str) else mode
    return NO_NAME


def _bounded(name: str) -> str:
    return name if _NAME.fullmatch(name) and name not in (NO_NAME, MIXED) else OTHER
