"""Several gateways on one store: one upstream call for equal requests, and the same prices, balances and purges."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from faulty_rendernet import Fault
from fleet import BODY, PURGES, Fleet, TeamClient, after, fleet_of, kinds, priced, results, seconds_until, unread
from gateway_fixture import PATH, UpstreamFixture, answers, cache_status
from gateway_process import GatewayProcess, address_of, kill
from lateness import assert_in_time
from proxy.cache.leases import LEASE_S
from proxy.demo.simulator import Exchange, Responder
from proxy.gateway.fetcher import MAX_REFRESHES
from scripted_simulator import Simulator
from serving import wait_until
from shared_fixtures import debian_redis

pytestmark = pytest.mark.usefixtures("coverage_paused")

MISS = "fwd=miss; fwd-status=200; stored; ttl=3600"
CALLERS = 1000
SUSPICIOUS = 3
"""One for each of the audits after which a price list counts as changed."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, valkey_url: str, upstream: UpstreamFixture) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    with fleet_of(4, folder, store_url=valkey_url, upstream_url=upstream.url) as opened:
        yield opened


@pytest.fixture
def team(fleet: Fleet, simulator: Simulator) -> TeamClient:
    assert simulator.calls == 0
    return fleet.team()


@pytest.fixture(scope="module")
def suspicious(tmp_path_factory: pytest.TempPathFactory, valkey_url: str, upstream: UpstreamFixture) -> Iterator[Fleet]:
    """Makes balances old after a moment."""
    cache = {"balance_max_age_s": 0.1}
    folder = tmp_path_factory.mktemp("suspicious")
    with fleet_of(SUSPICIOUS, folder, store_url=valkey_url, upstream_url=upstream.url, cache=cache) as opened:
        yield opened


# One upstream call


def test_a_grid_at_once_on_four_gateways_asks_each_question_once(team: TeamClient, simulator: Simulator) -> None:
    grid = {
        "base": json.loads(BODY),
        "vary": {"seed": list(range(8)), "cfg_scale": list(range(8))},
        "breakdown": "items",
    }
    content = json.dumps(grid).encode()
    with simulator.hold() as hold:
        running = [team.asking(at, content, path="/v1/quote") for at in (0, 1, 2, 3, 0, 1)]
        assert simulator.arrived(8)
        hold.release()
        quotes = [future.result(20).json() for future in running]
    assert simulator.calls == 64
    prices = [[variant["estimated"] for variant in quote["variants"]] for quote in quotes]
    assert prices == [[3] * 64] * 6
    usage = team.fleet.clients[0].get("/v1/usage", headers={"x-api-key": team.token}).json()["total"]
    assert (usage["requests"], usage["estimated_credits"]) == (64, 0)


@pytest.fixture(scope="module", params=["valkey", "redis"])
def any_fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamFixture
) -> Iterator[Fleet]:
    if request.param == "valkey":
        yield request.getfixturevalue("fleet")
        return
    folder = tmp_path_factory.mktemp("on-redis")
    with debian_redis() as url, fleet_of(2, folder, store_url=url, upstream_url=upstream.url) as opened:
        yield opened


def test_a_thousand_equal_requests_at_once_make_one_upstream_call(any_fleet: Fleet, simulator: Simulator) -> None:
    team = any_fleet.team()
    replies = asyncio.run(_equal_requests(team, simulator))
    responses = Counter(map(_status_of, replies))
    assert simulator.calls == 1, responses
    assert Counter(reply.partition(b"\r\n")[0] for reply in replies) == {b"HTTP/1.1 200 OK": CALLERS}
    bodies = {reply.partition(b"\r\n\r\n")[2] for reply in replies}
    assert bodies == {b'{"data":{"estimated":3,"balance":10000},"error":{}}'}
    assert responses.pop(MISS) == 1
    assert all(status.endswith("; collapsed") or status.startswith("hit; ") for status in responses), responses


async def _equal_requests(team: TeamClient, simulator: Simulator) -> Sequence[bytes]:
    """Returns the answers to requests that all arrived before upstream answered the first."""
    urls = [served.url for served in team.fleet.gateways]
    with simulator.hold():
        asked = [asyncio.create_task(_raw(team, urls[n % len(urls)])) for n in range(CALLERS)]
        await asyncio.to_thread(lambda: wait_until(lambda: _connections(urls) >= CALLERS))
        await asyncio.to_thread(lambda: wait_until(lambda: not any(map(unread, urls))))
        assert simulator.arrived(1)
    return await asyncio.gather(*asked)


async def _raw(team: TeamClient, url: str) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nx-api-key: {team.token}\r\nconnection: close\r\n"
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(*address_of(url))
        writer.write(f"{head}content-length: {len(BODY)}\r\n\r\n".encode() + BODY)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer


def _connections(urls: Sequence[str]) -> int:
    """Returns the gateways' ends of the connections, accepted or not."""
    ports = {f":{urlsplit(url).port:04X}" for url in urls}
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(row[1][-5:] in ports and row[3] == "01" for row in rows)


def _status_of(reply: bytes) -> str:
    lines = reply.partition(b"\r\n\r\n")[0].decode().splitlines()
    (status,) = (line.partition("; ")[2] for line in lines if line.startswith("cache-status: "))
    return status


def test_a_killed_leader_is_replaced_by_a_waiting_gateway(team: TeamClient, simulator: Simulator) -> None:
    simulator.script(Fault.HANG)
    lost = team.asking(0)
    assert simulator.arrived(1)
    waiting = team.waiting(1, 2, 3, 3)
    restarts = len(team.fleet.gateways[0].messages("serving on "))
    kill(team.fleet.gateways[0].worker())
    killed_at = time.monotonic()
    responses = results(waiting)
    longest_s = time.monotonic() - killed_at
    assert lost.exception(5) is not None
    assert {answer.json()["data"]["estimated"] for answer in responses} == {3}
    assert simulator.calls == 2
    assert kinds(responses) == [MISS] + [f"{MISS}; collapsed"] * 3
    assert_in_time(longest_s, LEASE_S + 1.5)
    team.fleet.gateways[0].wait_until_serving(times=restarts + 1)
    assert team.has(0)


FAILURES: dict[str, tuple[Responder, int]] = {
    "failed": (answers(b'{"data":null,"error":{"code":"internal"}}', 500), 502),
    "busy": (answers(b'{"data":null,"error":{"code":"busy"}}', 429, retry_after="7"), 503),
    "rejected": (answers(b'{"data":null,"error":{"code":"no_such_style"}}', 422), 422),
    "unpriced": (answers(b'{"data":{"estimated":null,"balance":7},"error":{}}'), 200),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_refusal_of_upstream_is_shared_with_all_waiting_gateways(
    failure: str, team: TeamClient, simulator: Simulator
) -> None:
    release, (handler, status) = threading.Event(), FAILURES[failure]
    simulator.script(after(release, handler))
    asked = [team.asking(0)]
    assert simulator.arrived(1)
    asked += team.waiting(0, 1, 2, 3)
    release.set()
    responses = results(asked)
    assert simulator.calls == 1
    assert {answer.status_code for answer in responses} == {status}
    assert len({json.dumps(_without_id(answer.json())) for answer in responses}) == 1
    assert {answer.headers.get("retry-after") for answer in responses} == {"7" if failure == "busy" else None}
    assert Counter("collapsed" in cache_status(answer) for answer in responses) == {False: 1, True: 4}
    if failure != "busy":
        assert team.ask(1).json()["data"]["estimated"] == 3, "failures are not stored"


def _without_id(answer: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in answer.items() if name != "request_id"}


def test_an_answer_that_arrives_after_its_lease_was_taken_over_replaces_nothing(
    team: TeamClient, simulator: Simulator
) -> None:
    release = threading.Event()
    simulator.script(after(release, priced(1)), priced(2))
    first = team.asking(0)
    assert simulator.arrived(1)
    leader = team.fleet.gateways[0].worker()
    leader.suspend()
    try:
        second = team.ask(1)
    finally:
        leader.resume()
    time.sleep(0.8)  # until the store's cool-down is over, so that the fence refuses the write
    release.set()
    assert (second.json()["data"]["estimated"], cache_status(second)) == (2, MISS)
    late = first.result(5)
    assert (late.json()["data"]["estimated"], cache_status(late)) == (1, "fwd=miss; fwd-status=200")
    assert [team.ask(at).json()["data"]["estimated"] for at in range(4)] == [2] * 4
    assert simulator.calls == 2


# Purged


@pytest.mark.parametrize("purge", PURGES)
def test_a_purge_reaches_every_gateway(purge: str, team: TeamClient) -> None:
    assert [team.ask(at).status_code for at in (0, 1, 0, 1)] == [200] * 4
    assert team.has(0)
    assert team.has(1)
    team.purge(2, PURGES[purge])
    assert_in_time(seconds_until(lambda: not team.has(0) and not team.has(1), within_s=10), 2.2)
    assert cache_status(team.ask(1)) == MISS
    wait_until(lambda: team.has(0), within_s=1.5)
    assert cache_status(team.ask(0)).startswith("hit; ")


def test_another_price_reaches_every_gateway(team: TeamClient, simulator: Simulator) -> None:
    simulator.script(priced(1), priced(1), priced(2))
    assert [team.ask(at).json()["data"]["estimated"] for at in (0, 1, 1)] == [1] * 3
    assert team.ask(0, cache_control="no-cache").json()["data"]["estimated"] == 1
    assert team.fleet.store.hget(team.book.decode(), "drops") is None, "an equal price is not a change"
    assert team.ask(0, cache_control="no-cache").json()["data"]["estimated"] == 2
    assert_in_time(seconds_until(lambda: team.ask(1).json()["data"]["estimated"] == 2, within_s=10), 2.2)
    assert simulator.calls == 3


@pytest.mark.parametrize("purge", PURGES)
def test_a_fetch_in_flight_does_not_restore_a_purged_price(purge: str, team: TeamClient, simulator: Simulator) -> None:
    release = threading.Event()
    simulator.script(after(release, priced(1)), priced(2))
    before = team.asking(0)
    assert simulator.arrived(1)
    team.purge(1, PURGES[purge])
    time.sleep(1.1)  # a gateway may miss another one's purge of a book for a second
    (afterwards,) = team.waiting(0)
    release.set()
    answer = before.result(5)
    assert (answer.json()["data"]["estimated"], cache_status(answer)) == (1, "fwd=miss; fwd-status=200")
    assert afterwards.result(5).json()["data"]["estimated"] == 2, "a request after the purge joined an older fetch"
    assert [team.ask(at).json()["data"]["estimated"] for at in range(4)] == [2] * 4
    assert simulator.calls == 2


def test_right_after_a_purge_no_gateway_repeats_anothers_fetch(team: TeamClient, simulator: Simulator) -> None:
    known, new = b'[{"model":"Flux","seed":1}]', b'[{"model":"Flux","seed":2}]'
    assert team.ask(0).status_code == 200
    assert [team.ask(at, known).status_code for at in (1, 2, 3)] == [
        200
    ] * 3  # they have read the book before the purge
    team.purge(0, PURGES["account"])
    assert cache_status(team.ask(0)) == MISS
    assert cache_status(team.ask(1, new)) == MISS, "the leader has not noticed the purge"
    assert {cache_status(team.ask(at)).split(";")[0] for at in (2, 3, 1, 0)} == {"hit"}
    assert {cache_status(team.ask(at, new)).split(";")[0] for at in (2, 3, 1, 0)} == {"hit"}
    assert simulator.calls == 4


def test_the_loss_of_a_book_restores_no_purged_price(team: TeamClient, simulator: Simulator) -> None:
    assert team.ask(0).status_code == 200
    team.purge(0, PURGES["account"])
    team.fleet.store.delete(team.book)
    time.sleep(1.1)  # by then every gateway reads the book again
    assert not [at for at in range(4) if team.has(at)]
    assert cache_status(team.ask(1)) == MISS
    assert {team.ask(at).status_code for at in range(4)} == {200}
    assert simulator.calls == 2


# Stale


def test_a_stale_price_is_refreshed_once_for_all(team: TeamClient, simulator: Simulator) -> None:
    release = threading.Event()
    simulator.script(priced(1), after(release, priced(2)))
    assert team.ask(0).status_code == 200
    team.age(3600 + 100)
    responses = results([team.asking(at) for at in (0, 1, 2, 3) * 3])
    assert {answer.json()["data"]["estimated"] for answer in responses} == {1}
    assert set(kinds(responses)) <= {f"hit; ttl=-{late}; detail=stale-while-revalidate" for late in range(100, 105)}
    assert simulator.arrived(2)
    release.set()
    wait_until(lambda: all(team.ask(at).json()["data"]["estimated"] == 2 for at in range(4)), within_s=1)
    assert simulator.calls == 2
    assert team.fleet.store.hget(team.book.decode(), "drops") == b"1", (
        "replacing a stale price invalidates nothing more"
    )


def test_after_one_failed_call_all_gateways_serve_the_stale_price(team: TeamClient, simulator: Simulator) -> None:
    release = threading.Event()
    assert team.ask(0).status_code == 200
    simulator.script(after(release, answers(b"{}", 500)))
    team.age(3600 + 400)
    asked = [team.asking(0)]
    assert simulator.arrived(2)
    asked += team.waiting(1, 2, 3)
    release.set()
    responses = results(asked)
    assert {(answer.status_code, answer.json()["data"]["estimated"]) for answer in responses} == {(200, 3)}
    expected = {f"fwd=stale; fwd-status=500; ttl=-{late}; detail=stale-if-error" for late in range(400, 405)}
    assert set(kinds(responses)) <= expected
    assert simulator.calls == 2


# Audited


def test_only_one_gateway_fetches_a_fresh_balance(suspicious: Fleet, simulator: Simulator) -> None:
    team = suspicious.team()
    assert team.ask(0).json()["data"]["balance"] == 10_000
    simulator.balance = 9_000
    until = time.monotonic() + 2
    while time.monotonic() < until:
        responses = results([team.asking(at) for at in range(SUSPICIOUS)])
        assert {answer.status_code for answer in responses} == {200}
        time.sleep(0.02)
    assert simulator.calls == 2
    assert {answer.json()["data"]["balance"] for answer in responses} == {9_000}


def test_a_changed_price_list_is_noticed_by_all_and_fetched_without_a_burst(
    suspicious: Fleet, simulator: Simulator
) -> None:
    team = suspicious.team()
    bodies = [b'[{"model":"Flux","seed":%d}]' % seed for seed in range(60)]
    changed = bodies[:3]
    for body in bodies:
        assert team.ask(0, body).status_code == 200
    upstream = CountingUpstream()
    simulator.script(*[upstream.handler] * 1000)
    for at, body in enumerate(changed):
        _audit(team, at, body, simulator)
    assert_in_time(
        seconds_until(lambda: all(team.explain(at, bodies[-1])["ttl_s"] <= 0 for at in range(SUSPICIOUS)), within_s=10),
        1.5,
    )
    wait_until(lambda: team.fleet.gateways[2].messages("price list changed"))

    calls = simulator.calls
    team.fleet.store.hset(team.book, "audit_until_ms", int(time.time() * 1000) + 60_000)
    while stale := [body for body in bodies if _estimated(team, 0, body) != 9]:
        results([team.asking(at, body) for body in stale for at in range(SUSPICIOUS)])
    assert upstream.largest <= SUSPICIOUS * MAX_REFRESHES
    assert simulator.calls - calls <= len(bodies)


class CountingUpstream:
    """Answers with a new price after a delay, and counts the requests at a time."""

    def __init__(self) -> None:
        self.largest = self._now = 0

    def handler(self, exchange: Exchange) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            self._now += 1
            self.largest = max(self.largest, self._now)
            await asyncio.sleep(0.05)
            self._now -= 1
            await priced(9)(exchange)(scope, receive, send)

        return app


def _audit(team: TeamClient, at: int, body: bytes, simulator: Simulator) -> None:
    """Makes a gateway audit a body now, although another one has just audited the account."""
    time.sleep(0.15)
    calls = simulator.calls
    team.fleet.store.hdel(team.book, "audit_until_ms")
    assert team.ask(at, body).status_code == 200
    assert simulator.arrived(calls + 1)
    wait_until(lambda: _estimated(team, at, body) == 9)


def _estimated(team: TeamClient, at: int, body: bytes) -> object:
    return team.explain(at, body).get("estimated")


# Clocks


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, valkey_url: str, upstream: UpstreamFixture, simulator: Simulator
) -> None:
    jumped = tmp_path / "jumped"
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
    env = {"PYTHONPATH": str(tmp_path), "JUMPED": str(jumped)}
    with fleet_of(2, tmp_path, store_url=valkey_url, upstream_url=upstream.url, env=[env]) as opened:
        team = opened.team()
        other = b'[{"model":"Flux","seed":2}]'
        assert team.ask(0).status_code == 200
        jumped.touch()
        assert team.ask(0, other).status_code == 200
        for responses in (team.ask(at, body) for at in (0, 1, 0, 1) for body in (BODY, other)):
            assert 0 <= int(responses.headers["age"]) <= 3
            assert int(responses.headers["estimate-proxy-balance-age"]) <= 3
            assert 3596 <= int(cache_status(responses).removeprefix("hit; ttl=")) <= 3600
        wait_until(
            lambda: len(_days(opened.gateways[0])) > len(_days(opened.gateways[1]))
        )  # else the clock did not jump
    assert simulator.calls == 2


def _days(served: GatewayProcess) -> set[str]:
    """Returns the days of its log lines."""
    return {line["time"][:10] for line in served.lines()}


JUMPING_CLOCK = """
import datetime, os, time

def jump_s():
    return 86400 if os.path.exists(os.environ["JUMPED"]) else 0

class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=jump_s())

real = time.time
time.time = lambda: real() + jump_s()
datetime.datetime = Shifted
"""
