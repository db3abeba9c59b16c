"""Memory of a worker after its start, and during many requests for many bodies, hits and misses mixed."""

from time import monotonic
from typing import Any

from bench.children import BenchError
from bench.gateways import GatewayVariant
from bench.load import Shape
from bench.parts import Part, Say, Table, Target
from bench.servers import Servers
from bench.traffic import TEAMS, fresh, token

REQUESTS = 2_000_000
DISTINCT = 100_000
_STEP_S = 10.0
_MOST_S = 3600.0
_SETTLED = 0.1
"""Share of the run after which memory must be flat, because all caches are full by then."""
_START_MB, _FLAT = 80.0, 0.05
_ROWS = 20
MB = 1e6

Sample = tuple[int, float]
"""Requests so far, and the worker's RSS in MB."""


def run(servers: Servers, say: Say, *, requests: int = REQUESTS) -> Part:
    with servers.another_gateway(GatewayVariant("memory", TEAMS)) as site:
        (worker,) = site.workers()
        samples: list[Sample] = [(0, worker.memory_info().rss / MB)]
        traffic, began = fresh(token(TEAMS[0]), distinct=DISTINCT), monotonic()
        while samples[-1][0] < requests and monotonic() - began < _MOST_S:
            say(f"memory: {samples[-1][0]:,} of {requests:,} requests")
            load = servers.loads.make(site.url, traffic, Shape(_STEP_S))
            if load.refused:
                raise BenchError(f"memory: {load.refused} of {load.requests} answers were refusals")
            samples.append((samples[-1][0] + load.requests, worker.memory_info().rss / MB))
    done = samples[-1][0]
    return Part(
        name="memory",
        how=f"{done:,} requests for {DISTINCT:,} bodies by chance, in {monotonic() - began:,.0f} s",
        tables=[Table("Memory of a worker", ("requests", "RSS MB"), [_row(sample) for sample in _thinned(samples)])],
        targets=_targets(samples),
        notes=[f"It was to be {requests:,} requests: an hour was too short."] if done < requests else [],
        raw=_raw(samples),
    )


def _targets(samples: list[Sample]) -> list[Target]:
    settled = [rss for requests, rss in samples if requests >= samples[-1][0] * _SETTLED]
    middle = (min(settled) + max(settled)) / 2
    swing = (max(settled) - middle) / middle
    return [
        Target("RSS of a worker after its start, MB", _START_MB, samples[0][1], at_least=False, form=".1f"),
        Target(f"RSS behind the first {_SETTLED:.0%}, ± of its middle", _FLAT, swing, at_least=False, form=".3f"),
    ]


def _thinned(samples: list[Sample]) -> list[Sample]:
    step = max(1, len(samples) // _ROWS)
    return [*samples[:-1:step], samples[-1]]


def _row(sample: Sample) -> list[str]:
    return [f"{sample[0]:,}", f"{sample[1]:.1f}"]


def _raw(samples: list[Sample]) -> list[dict[str, Any]]:
    return [{"requests": requests, "rss_mb": rss} for requests, rss in samples]
