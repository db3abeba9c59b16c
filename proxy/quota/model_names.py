"""Model names: the name under which usage and metrics count the credits of a body.

* RenderNet prices an item by its mode: see `proxy.cache.generation`.
* This module limits length and alphabet of a name; the ledger limits the number of distinct names, see
  `lua/ledger_decide.lua`.
"""

import re
from typing import Any

import orjson

from proxy.cache.generation import mode_of
from proxy.problems import NO_NAME

MIXED = "mixed"
OTHER = "other"

MAX_MODELS = 50
"""Distinct names in an organisation at a time, so that clients cannot create metric series without limit; more are
`OTHER`. A team brings at most half of them, and a name that was not used for 30 days gives its place to a new one."""

_NAME = re.compile(r"[A-Za-z0-9 ._-]{1,64}", re.ASCII)


def model_of(canonical: bytes) -> str:
    """The name for a canonical body: `MIXED` if its items have different names, `NO_NAME` if no mode is present."""
    names = {_model(item) for item in orjson.loads(canonical)}
    return names.pop() if len(names) == 1 else MIXED


def _model(item: dict[str, Any]) -> str:
    mode, name = mode_of(item)
    if name is None:
        return mode or NO_NAME
    return name if _NAME.fullmatch(name) and name not in (NO_NAME, MIXED) else OTHER
