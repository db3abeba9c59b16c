"""Shared parts of both state machines: a clock that only a test moves, scripts that read it, hypothesis settings."""

import os
from functools import cache
from hashlib import sha1

import hypothesis
import pytest
import redis

from lua_scripts import LUA_SCRIPTS
from proxy.store.client import Script

MILLION = 1_000_000


class Clock:
    """The clock of the store's scripts and of the gateways in this process.

    skew_us: how far the running gateway's clock is ahead of the store's.
    """

    def __init__(self, store: redis.Redis, us: int) -> None:
        self._store = store
        self.us = us
        self.skew_us = 0

    def set(self, us: int) -> None:
        self.us = us
        self._store.hset("clock", mapping={"s": us // MILLION, "us": us % MILLION})

    def time_ns(self) -> int:
        return (self.us + self.skew_us) * 1000

    def time(self) -> float:
        return (self.us + self.skew_us) / MILLION


def use_clocked_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes scripts read the time from the key `clock` instead of calling `TIME`."""
    for number, name in enumerate(("text", "digest")):
        monkeypatch.setattr(Script, name, _clocked_attribute(number), raising=False)


def _clocked_attribute(number: int) -> property:
    """Returns a property whose setter does nothing, so that scripts can be constructed during a test."""
    return property(lambda script: _clocked_script(script.name)[number], lambda script, value: None)  # noqa: ARG005


@cache
def _clocked_script(name: str) -> tuple[bytes, str]:
    """Returns a script's text and digest. Rates get a longer TTL, because the store's own clock runs during a test."""
    text = LUA_SCRIPTS[name].read_bytes()
    clocked = text.replace(b"redis.call('TIME')", b"redis.call('HMGET', 'clock', 's', 'us')")
    clocked = clocked.replace(b"'PX', math.ceil(", b"'PX', 1e9 + math.ceil(")
    assert b"'TIME'" not in clocked
    assert (b"'PX', 1e9 +" in clocked) == (name == "ledger_decide")
    return clocked, sha1(clocked, usedforsecurity=False).hexdigest()


def machine_settings(variable: str, examples: int) -> hypothesis.settings:
    """Runs `examples` fixed sequences of steps, or as many random ones as the environment variable says."""
    return hypothesis.settings(
        max_examples=int(os.environ.get(variable, examples)),
        stateful_step_count=30,
        derandomize=variable not in os.environ,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
