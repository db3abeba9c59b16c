"""Usage of finished days, written into a ledger as the gateway would have written it."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import redis

from proxy.quota.counters import LedgerKeys
from proxy.quota.credits import MICRO


def put_past_usage(
    store: redis.Redis, team: str, daily_requests: Sequence[int], *, zone: str = "UTC", org: str = "default"
) -> None:
    """So many requests of 2 credits each on the last days until yesterday, and as many refused ones."""
    keys, today = LedgerKeys(org), datetime.now(ZoneInfo(zone)).date()
    with store.pipeline() as pipeline:
        for age, requests in zip(range(len(daily_requests), 0, -1), daily_requests, strict=True):
            fields = {
                "Flux:hit:requests": requests - requests // 3,
                "Flux:hit:credits": 2 * requests * MICRO,
                "-:upstream-error:requests": requests // 3,
                "-:rate-limited:refused": requests,
            }
            pipeline.hset(keys.usage(team, today - timedelta(days=age)), mapping=dict(fields.items()))
        pipeline.sadd(keys.teams, team)
        pipeline.execute()
