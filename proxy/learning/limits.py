"""Thresholds for learning and inferring, and limits on stored evidence. `Limits` passes them to the Lua script."""

from dataclasses import asdict, dataclass

import orjson

ENOUGH_BODIES = 3
"""Distinct bodies of a setting that must agree before its price is inferred; and, after a doubt, the doubtful one with
the two that decide."""

REACH = 2
"""A left-out value may be so many times as large as the largest of its own setting."""

MAX_REST_BYTES = 1024
"""Of an answer's data besides the estimate. Answers with more are not learned from."""

LIFETIME_S = 30 * 86400
"""How long a scope is kept after upstream was last asked in it, but at least twice as long as prices are fresh."""


@dataclass(frozen=True, slots=True)
class Limits:
    """learn_from: tests without a contradiction before anything is inferred. ttl_ms: after which a doubt is settled.

    values, share: a leaf is left out if it has at least so many distinct values, and more than this share of the bodies
    has one of its own. It is kept again below half of that share.
    factor: limits how many times as many tests contradictions can require.
    scopes: of an account; a team brings at most half. The one that was not used for longest makes room.
    settings: of a scope. The quarter with the oldest answers makes room.
    digests: of a leaf's values. At so many they are forgotten, and the leaf's counts are halved.
    """

    learn_from: int
    ttl_ms: int
    lifetime_ms: int
    values: int = 12
    share: float = 0.15
    bodies: int = ENOUGH_BODIES
    reach: int = REACH
    factor: int = 64
    scopes: int = 256
    settings: int = 256
    digests: int = 256

    def encode(self) -> bytes:
        return orjson.dumps(asdict(self))


def limits_of(*, learn_from: int, ttl_s: float) -> Limits:
    return Limits(learn_from, ttl_ms=round(ttl_s * 1000), lifetime_ms=round(max(LIFETIME_S, 2 * ttl_s) * 1000))
