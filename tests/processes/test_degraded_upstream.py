"""A gateway whose upstream is killed, hangs, wants a pause, or is behind a bad way: what it answers, how soon, what it
says and books meanwhile, and that it recovers by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from faulty_proxy import HEALTHY, Conditions, FaultyProxy, proxy_to
from fleet import BODY, Fleet, TeamClient, fleet_of, limiting
from gateway_fixture import cache_status
from lateness import assert_in_time
from ledger_snapshot import snapshot_of
from load_generator import (
    CREDITS,
    PRICE,
    REQUESTS,
    LogTail,
    TimedAnswer,
    answered,
    degraded,
    metric,
    new_body,
    slowest_s,
    timed,
)
from proxy.upstream.circuit_breaker import MIN_ANSWERS
from serving import wait_until
from upstream_process import UpstreamProcess, upstream_process

TIMEOUT_S = 0.3
DEADLINE_S = 1.2
"""Of the whole answer. Nothing here comes near it, unless it waits for upstream twice and more."""

HURRIED = """
import pathlib, proxy.upstream.circuit_breaker
proxy.upstream.circuit_breaker.OPEN_S = 60.0
over, admit = pathlib.Path({over!r}), proxy.upstream.circuit_breaker.CircuitBreaker.admit
def admit_when_over(circuit, now, **how):
    return admit(circuit, now + 60.0 * over.exists(), **how)
proxy.upstream.circuit_breaker.CircuitBreaker.admit = admit_when_over
"""
"""A circuit is open until the test says that its time is over, whatever the machine's pace."""

TTL_S = 1
"""Behind it a price is stale, and serves if upstream fails."""


@dataclass(frozen=True)
class WorkerContext:
    fleet: Fleet
    upstream: UpstreamProcess
    store_proxy: FaultyProxy
    over: Path
    """While it is there, the time that circuits are open is over."""

    @contextmanager
    def being_over(self) -> Iterator[None]:
        self.over.touch()
        try:
            yield
        finally:
            self.over.unlink()


@contextmanager
def _killed(premises: WorkerContext) -> Iterator[None]:
    premises.upstream.kill()
    try:
        yield
    finally:
        premises.upstream.start()


@contextmanager
def _stopped(premises: WorkerContext) -> Iterator[None]:
    with premises.upstream.hanging():
        yield


def _conditions(bad: Conditions) -> Callable[[WorkerContext], AbstractContextManager[None]]:
    return lambda premises: premises.store_proxy.under(bad)


FAULTS: dict[str, tuple[Callable[[WorkerContext], AbstractContextManager[None]], str]] = {
    "killed": (_killed, "502 upstream-error"),
    "resets": (_conditions(Conditions(accepts=False)), "502 upstream-error"),
    "stopped": (_stopped, "504 upstream-timeout"),
    "half open": (_conditions(Conditions(carries=False)), "504 upstream-timeout"),
    "drips": (_conditions(Conditions(latency_s=0.02, piece_bytes=1)), "504 upstream-timeout"),
}
"""With what is answered where there is no price."""

PROBED = ("killed", "half open")
"""Where the first probe fails too: it takes its time."""


@dataclass
class Talk:
    """What a team asks, and all that it was told."""

    team: TeamClient
    told: list[TimedAnswer] = field(default_factory=list)

    def ask(self, body: bytes | None = None) -> TimedAnswer:
        self.told.append(timed(self.team, 0, body or new_body()))
        return self.told[-1]

    def ask_at_once(self, count: int) -> list[TimedAnswer]:
        asked = [self.team.fleet.pool.submit(self.ask) for _ in range(count)]
        return [one.result(15) for one in asked]

    def asked_upstream(self) -> float:
        return self._metric("upstream_request_duration_seconds_count")

    def has_open_circuit(self) -> bool:
        return self._metric("upstream_circuit_open") == 1

    def assert_booked(self, *, failures: int) -> None:
        """An answer is a request with credits, a failure one without; what was not to be asked is none."""
        requests, spent = answered(self.told) + failures, answered(self.told) * PRICE
        books = snapshot_of(self.team)
        usage = {name: books.usage[name] for name in ("requests", "estimated_credits", "refused")}
        refused = len(self.told) - requests
        assert usage == {"requests": requests, "estimated_credits": spent, "refused": refused}
        assert books.used == [spent, requests]

    def _metric(self, name: str) -> float:
        return metric(self.team.fleet.clients[0], f'{name}{{account="{self.team.account}"')


@pytest.fixture(scope="module")
def premises(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[WorkerContext]:
    folder: Path = tmp_path_factory.mktemp("upstream")
    over = folder / "over"
    (folder / "sitecustomize.py").write_text(HURRIED.format(over=str(over)))
    how: dict[str, Any] = {
        "env": [{"PYTHONPATH": str(folder), **limiting(team_defaults=[CREDITS, REQUESTS])}],
        "upstream": {"timeout_s": TIMEOUT_S},
        "server": {"request_timeout_s": DEADLINE_S, "drain_delay_s": 0},
        "cache": {"ttl_s": TTL_S, "stale_while_revalidate_s": 0},
        "metrics": {"public": True},
    }
    with (
        upstream_process() as upstream,
        proxy_to(upstream.url) as store_proxy,
        fleet_of(1, folder, store_url=valkey_url, upstream_url=store_proxy.url, **how) as fleet,
    ):
        yield WorkerContext(fleet, upstream, store_proxy, over)


@pytest.fixture(scope="module")
def talks(premises: WorkerContext) -> dict[str, Talk]:
    """Of teams that have a price already, soon a stale one."""
    talks = {fault: Talk(premises.fleet.team()) for fault in FAULTS}
    assert [talk.ask(BODY).says for talk in talks.values()] == ["200 fwd=miss"] * len(talks)
    return talks


@pytest.mark.parametrize("fault", FAULTS)
def test_without_upstream_stale_prices_serve_and_it_is_left_alone(
    fault: str, premises: WorkerContext, talks: dict[str, Talk]
) -> None:
    talk, (made, failure) = talks[fault], FAULTS[fault]
    client, log, account = premises.fleet.clients[0], LogTail(premises.fleet.gateways[0]), talk.team.account
    wait_until(lambda: talk.team.explain(0)["ttl_s"] < 0)
    with made(premises):
        _fails(talk, failure)
        _is_left_alone(talk)
        if fault in PROBED:
            _is_tried_again(talk, premises, failure)
        assert degraded(client) == ["upstream"]
    with premises.being_over():
        wait_until(lambda: talk.ask().says == "200 fwd=miss", within_s=5)
    assert cache_status(talk.ask(BODY).answer) == f"fwd=stale; fwd-status=200; stored; ttl={TTL_S}"
    assert not talk.has_open_circuit()
    assert degraded(client) == []
    assert_in_time(slowest_s(talk.told), DEADLINE_S)
    log.assert_one_incident(
        f"upstream fails for the account {account}: ", f"upstream answers again for the account {account}"
    )
    talk.assert_booked(failures=sum(one.says == failure for one in talk.told))


def _fails(talk: Talk, failure: str) -> None:
    """Until the circuit opens."""
    stale = cache_status(talk.ask(BODY).answer)
    assert stale.startswith("fwd=stale; ttl=-")
    assert stale.endswith("; detail=stale-if-error")
    failed = talk.ask_at_once(MIN_ANSWERS)
    assert {one.says for one in failed} <= {failure, "503 upstream-busy"}
    assert sum(one.says == failure for one in failed) >= MIN_ANSWERS / 2


def _is_left_alone(talk: Talk) -> None:
    assert talk.has_open_circuit()
    asked = talk.asked_upstream()
    refused, stale = talk.ask(), talk.ask(BODY)
    assert refused.says == "503 upstream-busy"
    assert 1 <= int(refused.answer.headers["retry-after"]) <= 60
    assert cache_status(stale.answer).startswith("hit; ttl=-")
    assert cache_status(stale.answer).endswith("; detail=stale-if-error")
    assert_in_time(slowest_s([refused, stale]), TIMEOUT_S, "Nobody waits for it.")
    assert talk.asked_upstream() == asked


def _is_tried_again(talk: Talk, premises: WorkerContext, failure: str) -> None:
    """By one, and left alone again."""
    asked = talk.asked_upstream()
    with premises.being_over():
        assert talk.ask().says == failure
    assert talk.ask().says == "503 upstream-busy"
    assert talk.asked_upstream() == asked + 1


def test_a_busy_upstream_is_not_asked_again_before_its_time(premises: WorkerContext) -> None:
    talk, busy = Talk(premises.fleet.team()), b'[{"model":"busy"}]'
    log = LogTail(premises.fleet.gateways[0])
    told = [talk.ask(busy), *talk.ask_at_once(4)]
    assert {(one.says, one.answer.headers["retry-after"]) for one in told} == {("503 upstream-busy", "1")}
    assert talk.asked_upstream() == 1
    wait_until(lambda: talk.ask().says == "200 fwd=miss", within_s=5)
    assert talk.asked_upstream() == 2
    assert len(log.said()) == 2
    talk.assert_booked(failures=1)


def test_connections_that_upstream_has_closed_or_reset_cost_nothing(premises: WorkerContext) -> None:
    talk = Talk(premises.fleet.team())
    for end in (premises.store_proxy.reset_connections, premises.store_proxy.cut):
        assert talk.ask().says == "200 fwd=miss"
        end()
        premises.store_proxy.set_conditions(HEALTHY)
    assert talk.ask().says == "200 fwd=miss"
    assert talk.asked_upstream() == 3
