"""Measurement of a case: load, CPU time of the server's workers, and the time of its store's scripts.

Before each measurement one request is sent, and its answer must be the expected one. Afterwards, every answer must have
been of that kind, and the number of upstream calls must be right. Otherwise the case has no number.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep

from bench.cases import Case
from bench.children import BenchError
from bench.load import Load, Shape
from bench.machine import busy_s, stolen_s
from bench.probe import Response, send
from bench.servers import Servers
from bench.sites import Site
from bench.traffic import once_each

MAX_ATTEMPTS = 3
"""Attempts of the first request: the first one may store what the next one finds."""

WARMING_S = 180.0
WARM_REQUESTS = 200

QUIET_S = 0.5
QUIET_WITHIN_S = 30.0

MAX_STRAY_CALLS = 0.01
"""Share of hits that may cause an upstream call: balances are refreshed after hits."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The results of one case in one round. Names have the units; None: not applicable.

    cpu_us: CPU time of the server's workers per request; workers: CPU seconds of each.
    busy: a worker's share of one core; others: the share of the servers' cores that other processes used. If the sum is
    well below 1, the server was not the limit.
    script_us: time of the ledger's store per script call; admission_us: per request.
    """

    case: str
    requests: int
    seconds: float
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    busy: float
    others: float
    workers: tuple[float, ...]
    script_us: float | None
    admission_us: float | None
    stolen_s: float


@dataclass(frozen=True, slots=True)
class _Reading:
    """Counters that are read before and after a load. The time between includes the loader's start."""

    at: float
    cpu_s: Sequence[float]
    cores_s: float
    scripts: tuple[int, float]
    upstream_calls: int
    stolen_s: float


def prepare(servers: Servers, case: Case) -> None:
    """Starts the servers of a case, and warms them up."""
    with _errors_with_name_of(case):
        site = case.site(servers)
        servers.upstream.delay(0)
        servers.loads.make(site.url, case.traffic(), Shape(WARMING_S, most=WARM_REQUESTS))


def measure(servers: Servers, case: Case, seconds: float, *, rate: float = 0.0) -> Measured:
    """Raises `BenchError` if the answers are not the expected ones."""
    with _errors_with_name_of(case):
        site, traffic = case.site(servers), case.traffic()
        servers.upstream.delay(case.delay_ms)
        if case.warm is not None:  # cached entries have aged while other cases ran
            each = once_each(case.warm())
            servers.loads.make(site.url, each, Shape(WARMING_S, most=len(each.requests)))
        _check_one(case, lambda: send(site.url, servers.loads.sample(traffic)))
        before = _read(servers, site)
        try:
            load = servers.loads.make(site.url, traffic, Shape(max(seconds, case.least_s), case.connections, rate))
            after = _read(servers, site)
        finally:
            if case.expected.calls_upstream:
                _wait_until_quiet(servers)
        _check_all(case, load, after.upstream_calls - before.upstream_calls)
        return _measured(case, load, before, after, cores=len(servers.workspace.cores.server))


@contextmanager
def _errors_with_name_of(case: Case) -> Iterator[None]:
    """Adds the name of the case to errors."""
    try:
        yield
    except (BenchError, OSError) as error:
        raise BenchError(f"{case.name}: {error}") from None


def _wait_until_quiet(servers: Servers) -> None:
    """Waits for the upstream calls of requests that were cut off at the end of the load."""
    deadline, upstream_calls = monotonic() + QUIET_WITHIN_S, -1
    while upstream_calls != (upstream_calls := servers.upstream.calls()) and monotonic() < deadline:
        sleep(QUIET_S)


def _read(servers: Servers, site: Site) -> _Reading:
    scripts = site.ledger.scripts() if site.ledger else (0, 0.0)
    return _Reading(
        monotonic(),
        site.cpu_s(),
        busy_s(servers.workspace.cores.server),
        scripts,
        servers.upstream.calls(),
        stolen_s(),
    )


def _measured(case: Case, load: Load, before: _Reading, after: _Reading, *, cores: int) -> Measured:
    workers = tuple(end - start for start, end in zip(before.cpu_s, after.cpu_s, strict=True))
    calls, script_us = (end - start for start, end in zip(before.scripts, after.scripts, strict=True))
    others_s = after.cores_s - before.cores_s - sum(workers)
    return Measured(
        case=case.name,
        requests=load.requests,
        seconds=load.seconds,
        per_s=load.requests / load.seconds,
        p50_ms=load.p50_ms,
        p99_ms=load.p99_ms,
        cpu_us=sum(workers) / load.requests * 1e6,
        busy=sum(workers) / load.seconds / len(workers),
        others=max(0.0, others_s) / (after.at - before.at) / cores,
        workers=workers,
        script_us=script_us / calls if calls else None,
        admission_us=script_us / load.requests if calls else None,
        stolen_s=after.stolen_s - before.stolen_s,
    )


def _check_one(case: Case, send: Callable[[], Response]) -> None:
    for _ in range(MAX_ATTEMPTS):
        response = send()
        if response.status == case.expected.status and case.expected.cache in response.cache_status:
            return
    raise BenchError(
        f"expected {case.expected.status} {case.expected.cache}".rstrip()
        + f", but the server answers {response.status} {response.cache_status} {response.body[:200]!r}"
    )


def _check_all(case: Case, load: Load, upstream_calls: int) -> None:
    expected_refusals = load.requests if case.expected.status >= 400 else 0
    if load.refused != expected_refusals:
        raise BenchError(f"{load.refused} of {load.requests} answers were refusals, not {expected_refusals}")
    if case.expected.calls_upstream and upstream_calls < load.requests:
        raise BenchError(f"upstream was called only {upstream_calls} times for {load.requests} requests")
    if not case.expected.calls_upstream and upstream_calls > max(10, load.requests * MAX_STRAY_CALLS):
        raise BenchError(f"upstream was called {upstream_calls} times for {load.requests} requests")
