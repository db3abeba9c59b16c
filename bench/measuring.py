"""Measuring a case: load from outside, CPU time of the server's workers, and what its store spent on scripts.

Before each measurement one request is asked, and its answer must be what the case is about; behind it, every answer
must have been of that kind, and upstream must have been asked as often as the case says. Else there is no number.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep

from bench.cases import Case
from bench.children import BenchError
from bench.load import Load, Shape
from bench.machine import busy_s, stolen_s
from bench.probe import Said, ask
from bench.servers import Servers
from bench.sites import Site
from bench.traffic import once_each

TRIES = 3
"""Of the request before: the first may fill what the next one finds."""

WARMING_S = 180.0
WARM_REQUESTS = 200

QUIET_S = 0.5
QUIET_WITHIN_S = 30.0

STRAY_ASKS = 0.01
"""Of the requests of a hit, so many may be asked of upstream: balances are refreshed behind hits."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One case in one round. Times are in the unit that the name says; None is not applicable.

    cpu_us: of the server's workers, for each request; workers: CPU seconds of each.
    busy: the part of one core that a worker had; others: the part of the servers' cores that the rest of the machine
    had. Where both together are well below 1, the server was not the limit.
    script_us: of the ledger's store for each call of a script, admission_us: for each request.
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
    """What is read before and after a load. The loader's own start lies between, so it takes longer than the load."""

    at: float
    cpu_s: Sequence[float]
    cores_s: float
    scripts: tuple[int, float]
    asked: int
    stolen_s: float


def prepare(servers: Servers, case: Case) -> None:
    """Starts what the case needs, and has it run for a moment."""
    with _about(case):
        site = case.site(servers)
        servers.upstream.delay(0)
        servers.loads.make(site.url, case.traffic(), Shape(WARMING_S, most=WARM_REQUESTS))


def measure(servers: Servers, case: Case, seconds: float, *, rate: float = 0.0) -> Measured:
    """Raises `BenchError` where the answers were not what the case is about."""
    with _about(case):
        site, traffic = case.site(servers), case.traffic()
        servers.upstream.delay(case.delay_ms)
        if case.warm is not None:  # while others had their turns, what is remembered has aged
            each = once_each(case.warm())
            servers.loads.make(site.url, each, Shape(WARMING_S, most=len(each.requests)))
        _check_one(case, lambda: ask(site.url, servers.loads.sample(traffic)))
        before = _read(servers, site)
        try:
            load = servers.loads.make(site.url, traffic, Shape(max(seconds, case.least_s), case.connections, rate))
            after = _read(servers, site)
        finally:
            if case.expected.asks:
                _wait_until_quiet(servers)
        _check_all(case, load, after.asked - before.asked)
        return _measured(case, load, before, after, cores=len(servers.place.cores.server))


@contextmanager
def _about(case: Case) -> Iterator[None]:
    """Has errors say which case they are about."""
    try:
        yield
    except (BenchError, OSError) as error:
        raise BenchError(f"{case.name}: {error}") from None


def _wait_until_quiet(servers: Servers) -> None:
    """Until upstream is not asked any more for those that hung up when the load was over: the next case has no such."""
    deadline, asked = monotonic() + QUIET_WITHIN_S, -1
    while asked != (asked := servers.upstream.asked()) and monotonic() < deadline:
        sleep(QUIET_S)


def _read(servers: Servers, site: Site) -> _Reading:
    scripts = site.ledger.scripts() if site.ledger else (0, 0.0)
    return _Reading(
        monotonic(), site.cpu_s(), busy_s(servers.place.cores.server), scripts, servers.upstream.asked(), stolen_s()
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


def _check_one(case: Case, asked: Callable[[], Said]) -> None:
    for _ in range(TRIES):
        said = asked()
        if said.status == case.expected.status and case.expected.cache in said.cache_status:
            return
    raise BenchError(
        f"expected {case.expected.status} {case.expected.cache}".rstrip()
        + f", but the server says {said.status} {said.cache_status} {said.body[:200]!r}"
    )


def _check_all(case: Case, load: Load, asked: int) -> None:
    wanted = load.requests if case.expected.status >= 400 else 0
    if load.refused != wanted:
        raise BenchError(f"{load.refused} of {load.requests} answers were refusals, not {wanted}")
    if case.expected.asks and asked < load.requests:
        raise BenchError(f"upstream was asked only {asked} times for {load.requests} requests")
    if not case.expected.asks and asked > max(10, load.requests * STRAY_ASKS):
        raise BenchError(f"upstream was asked {asked} times for {load.requests} requests")
