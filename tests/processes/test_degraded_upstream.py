"""A gateway whose upstream is killed, hangs, asks for a pause, or has a bad network.

The tests check the answers, their latency, the log lines, the bookings, and the recovery.
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
"""Deadline of a whole answer. No request takes this long, unless it waits for upstream more than once."""

HURRIED = """
import pathlib, proxy.upstream.circuit_breaker
proxy.upstream.circuit_breaker.OPEN_S = 60.0
over, admit = pathlib.Path({over!r}), proxy.upstream.circuit_breaker.CircuitBreaker.admit
def admit_when_over(circuit, now, **how):
    return admit(circuit, now + 60.0 * over.exists(), **how)
proxy.upstream.circuit_breaker.CircuitBreaker.admit = admit_when_over
"""
"""A circuit stays open until the test ends its time, so the machine's speed does not matter."""

TTL_S = 1
"""A price older than this is stale, and is served if upstream fails."""


@dataclass(frozen=True)
class Setup:
    fleet: Fleet
    upstream: UpstreamProcess
    store_proxy: FaultyProxy
    over: Path
    """While this file exists, the open time of circuits is over."""

    @contextmanager
    def recovery(self) -> Iterator[None]:
        self.over.touch()
        try:
            yield
        finally:
            self.over.unlink()


@contextmanager
def _killed(setup: Setup) -> Iterator[None]:
    setup.upstream.kill()
    try:
        yield
    finally:
        setup.upstream.start()


@contextmanager
def _stopped(setup: Setup) -> Iterator[None]:
    with setup.upstream.hanging():
        yield


def _conditions(bad: Conditions) -> Callable[[Setup], AbstractContextManager[None]]:
    return lambda setup: setup.store_proxy.under(bad)


FAULTS: dict[str, tuple[Callable[[Setup], AbstractContextManager[None]], str]] = {
    "killed": (_killed, "502 upstream-error"),
    "resets": (_conditions(Conditions(accepts=False)), "502 upstream-error"),
    "stopped": (_stopped, "504 upstream-timeout"),
    "half open": (_conditions(Conditions(carries=False)), "504 upstream-timeout"),
    "drips": (_conditions(Conditions(latency_s=0.02, piece_bytes=1)), "504 upstream-timeout"),
}
"""Each fault, and the answer to a request without a stored price."""

PROBED = ("killed", "half open")
"""Faults where the first probe also fails, which takes time."""


@dataclass
class Client:
    """A team's requests and all responses to them."""

    team: TeamClient
    responses: list[TimedAnswer] = field(default_factory=list)

    def ask(self, body: bytes | None = None) -> TimedAnswer:
        self.responses.append(timed(self.team, 0, body or new_body()))
        return self.responses[-1]

    def ask_many(self, count: int) -> list[TimedAnswer]:
        calls_before = [self.team.fleet.pool.submit(self.ask) for _ in range(count)]
        return [one.result(15) for one in calls_before]

    def upstream_calls(self) -> float:
        return self._metric("upstream_request_duration_seconds_count")

    def has_open_circuit(self) -> bool:
        return self._metric("upstream_circuit_open") == 1

    def assert_booked(self, *, failures: int) -> None:
        """An answer counts as a request with credits, a failure as one without; refused requests do not count."""
        requests, spent = answered(self.responses) + failures, answered(self.responses) * PRICE
        books = snapshot_of(self.team)
        usage = {name: books.usage[name] for name in ("requests", "estimated_credits", "refused")}
        refused = len(self.responses) - requests
        assert usage == {"requests": requests, "estimated_credits": spent, "refused": refused}
        assert books.used == [spent, requests]

    def _metric(self, name: str) -> float:
        return metric(self.team.fleet.clients[0], f'{name}{{account="{self.team.account}"')


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Setup]:
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
        yield Setup(fleet, upstream, store_proxy, over)


@pytest.fixture(scope="module")
def team_clients(setup: Setup) -> dict[str, Client]:
    """Clients of teams that have a stored price, which is soon stale."""
    team_clients = {fault: Client(setup.fleet.team()) for fault in FAULTS}
    assert [team_client.ask(BODY).says for team_client in team_clients.values()] == ["200 fwd=miss"] * len(team_clients)
    return team_clients


@pytest.mark.parametrize("fault", FAULTS)
def test_without_upstream_stale_prices_are_served_and_upstream_is_not_called(
    fault: str, setup: Setup, team_clients: dict[str, Client]
) -> None:
    team_client, (made, failure) = team_clients[fault], FAULTS[fault]
    client, log, account = setup.fleet.clients[0], LogTail(setup.fleet.gateways[0]), team_client.team.account
    wait_until(lambda: team_client.team.explain(0)["ttl_s"] < 0)
    with made(setup):
        _check_failures(team_client, failure)
        _check_no_calls(team_client)
        if fault in PROBED:
            _check_probe(team_client, setup, failure)
        assert degraded(client) == ["upstream"]
    with setup.recovery():
        wait_until(lambda: team_client.ask().says == "200 fwd=miss", within_s=5)
    assert cache_status(team_client.ask(BODY).answer) == f"fwd=stale; fwd-status=200; stored; ttl={TTL_S}"
    assert not team_client.has_open_circuit()
    assert degraded(client) == []
    assert_in_time(slowest_s(team_client.responses), DEADLINE_S)
    log.assert_one_incident(
        f"upstream fails for the account {account}: ", f"upstream answers again for the account {account}"
    )
    team_client.assert_booked(failures=sum(one.says == failure for one in team_client.responses))


def _check_failures(team_client: Client, failure: str) -> None:
    """Sends requests until the circuit breaker opens."""
    stale = cache_status(team_client.ask(BODY).answer)
    assert stale.startswith("fwd=stale; ttl=-")
    assert stale.endswith("; detail=stale-if-error")
    failed = team_client.ask_many(MIN_ANSWERS)
    assert {one.says for one in failed} <= {failure, "503 upstream-busy"}
    assert sum(one.says == failure for one in failed) >= MIN_ANSWERS / 2


def _check_no_calls(team_client: Client) -> None:
    assert team_client.has_open_circuit()
    calls_before = team_client.upstream_calls()
    refused, stale = team_client.ask(), team_client.ask(BODY)
    assert refused.says == "503 upstream-busy"
    assert 1 <= int(refused.answer.headers["retry-after"]) <= 60
    assert cache_status(stale.answer).startswith("hit; ttl=-")
    assert cache_status(stale.answer).endswith("; detail=stale-if-error")
    assert_in_time(slowest_s([refused, stale]), TIMEOUT_S, "Nobody waits for it.")
    assert team_client.upstream_calls() == calls_before


def _check_probe(team_client: Client, setup: Setup, failure: str) -> None:
    """One probe is sent; after its failure, upstream is not called again."""
    calls_before = team_client.upstream_calls()
    with setup.recovery():
        assert team_client.ask().says == failure
    assert team_client.ask().says == "503 upstream-busy"
    assert team_client.upstream_calls() == calls_before + 1


def test_a_busy_upstream_is_not_called_before_its_retry_after(setup: Setup) -> None:
    team_client, busy = Client(setup.fleet.team()), b'[{"model":"busy"}]'
    log = LogTail(setup.fleet.gateways[0])
    responses = [team_client.ask(busy), *team_client.ask_many(4)]
    assert {(one.says, one.answer.headers["retry-after"]) for one in responses} == {("503 upstream-busy", "1")}
    assert team_client.upstream_calls() == 1
    wait_until(lambda: team_client.ask().says == "200 fwd=miss", within_s=5)
    assert team_client.upstream_calls() == 2
    wait_until(lambda: len(log.said()) == 2)  # lines are written a moment later
    team_client.assert_booked(failures=1)


def test_connections_that_upstream_has_closed_or_reset_fail_no_request(setup: Setup) -> None:
    team_client = Client(setup.fleet.team())
    for end in (setup.store_proxy.reset_connections, setup.store_proxy.cut):
        assert team_client.ask().says == "200 fwd=miss"
        end()
        setup.store_proxy.set_conditions(HEALTHY)
    assert team_client.ask().says == "200 fwd=miss"
    assert team_client.upstream_calls() == 3
