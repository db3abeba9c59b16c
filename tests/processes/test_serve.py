"""`serve` with real processes: signals, draining, and deaths of workers, stores and the supervisor."""

import fcntl
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import BinaryIO, cast

import httpx2
import psutil
import pytest
import redis

from gateway_fixture import DESIGN, PATH, UpstreamFixture, cache_status, code_of
from gateway_process import (
    SOON_S,
    START_S,
    GatewayProcess,
    GatewayRunner,
    address_of,
    gateway_runner,
    kill,
    wait_until_gone,
)
from proxy.embedded.stores import running_url
from proxy.store.access import Role
from proxy.telemetry.metrics import FLUSH_AFTER_S
from scripted_simulator import Simulator
from serving import wait_until

pytestmark = pytest.mark.usefixtures("measured_processes")

OTHER = b'[{"model":"Other"}]'
ROLES: tuple[Role, Role] = ("ledger", "price-book")
BYPASS = "fwd=bypass; detail=store-unavailable"
LONG_S = 60
"""A delay longer than any test."""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as executor:
        yield executor


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamFixture
) -> Iterator[tuple[GatewayRunner, GatewayProcess]]:
    """A gateway with its runner, for tests that change nothing."""
    with gateway_runner(tmp_path_factory.mktemp("undisturbed"), upstream.url) as opened:
        served = opened.start(env={"ESTIMATE_PROXY_LOG__LEVEL": "debug", "REDIS_URL": ""})
        yield opened, served
        assert served.stop() == 0
        assert_nothing_left(opened)


@dataclass(frozen=True)
class Held:
    """A request that upstream has received and holds."""

    asked: Future[httpx2.Response]
    release: Callable[[], None]


@contextmanager
def held(served: GatewayProcess, simulator: Simulator, pool: ThreadPoolExecutor) -> Iterator[Held]:
    calls = simulator.calls
    with simulator.hold() as hold:
        asked = pool.submit(served.ask, OTHER)
        assert simulator.arrived(calls + 1)
        yield Held(asked, hold.release)


def is_hit(response: httpx2.Response) -> bool:
    assert response.status_code == 200, response.text
    return cache_status(response).startswith("hit")


def is_served(response: httpx2.Response) -> bool:
    """Returns whether estimates are served from the stores."""
    return response.status_code == 200 and cache_status(response) != BYPASS


def refuses(url: str) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(address_of(url)) != 0


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


def assert_nothing_left(runner: GatewayRunner) -> None:
    """Asserts that no socket is left after an orderly stop, and that the data directory is free."""
    assert list(runner.runtime.iterdir()) == []
    with (runner.data_dir / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def embedded(runner: GatewayRunner, role: Role) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(running_url(runner.data_dir, role=role), decode_responses=True) as client:
        yield client


def put(runner: GatewayRunner) -> None:
    """Writes a value into each embedded store and onto its disk; a write younger than 2 s may be lost."""
    for role in ROLES:
        with embedded(runner, role) as client:
            client.set("role", role)
            assert client.waitaof(1, 0, 5000)


def keeps(runner: GatewayRunner, role: Role) -> bool:
    """Returns whether the store answers, and still has its value."""
    with suppress(redis.ConnectionError), embedded(runner, role) as client:
        assert client.get("role") == role
        return True
    return False


# Start and stop


@pytest.mark.usefixtures("simulator")
def test_prices_survive_a_restart_of_the_gateway(runner: GatewayRunner) -> None:
    first = runner.start()
    miss, hit = first.ask(), first.ask()
    assert cache_status(miss) == "fwd=miss; fwd-status=200; stored; ttl=3600"
    assert is_hit(hit)
    assert hit.content == miss.content
    assert first.stop() == 0
    assert_nothing_left(runner)

    second = runner.start()
    assert second.ask().content == miss.content
    wait_until(lambda: is_hit(answer := second.ask()) and int(answer.headers["age"]) >= 1)


def test_sigterm_fails_readiness_then_keeps_serving_then_drains(
    runner: GatewayRunner, simulator: Simulator, pool: ThreadPoolExecutor
) -> None:
    served = runner.start(server={"drain_delay_s": 1, "drain_s": LONG_S})
    assert served.get("/readyz").json() == {"status": "ready", "degraded": []}
    served.ask()
    with held(served, simulator, pool) as running:
        served.send(signal.SIGTERM)
        signalled_at = time.monotonic()
        wait_until(lambda: served.get("/readyz").status_code == 503)
        assert served.get("/readyz").json() == {"status": "draining"}
        hit = served.ask()
        assert is_hit(hit)
        assert hit.headers["connection"] == "close"
        wait_until(lambda: refuses(served.url))
        assert time.monotonic() - signalled_at >= 1
        assert not running.asked.done()
        running.release()
        answer = running.asked.result()
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    assert cache_status(answer).startswith("fwd=miss; fwd-status=200; stored")
    assert served.exit_status(within_s=SOON_S) == 0
    assert_nothing_left(runner)


def test_a_request_that_outlasts_the_drain_gets_a_503(
    runner: GatewayRunner, simulator: Simulator, pool: ThreadPoolExecutor
) -> None:
    served = runner.start(server={"drain_delay_s": 0, "drain_s": 0.5})
    with held(served, simulator, pool) as running:
        served.send(signal.SIGTERM)
        answer = running.asked.result()
        assert served.exit_status(within_s=SOON_S) == 0
    assert (answer.status_code, code_of(answer)) == (503, "draining")
    assert answer.headers["retry-after"] == "1"
    assert [line["outcome"] for line in served.lines() if line["message"] == "request"] == ["cancelled"]
    assert_nothing_left(runner)


def test_a_body_that_outlasts_the_drain_gets_a_503_too(runner: GatewayRunner) -> None:
    served = runner.start(server={"drain_delay_s": 0, "drain_s": 0})
    head = f"POST {PATH} HTTP/1.1\r\nhost: gateway\r\nx-api-key: {DESIGN}\r\ncontent-length: 100\r\n\r\n["
    with socket.create_connection(address_of(served.url), timeout=SOON_S) as connection:
        connection.sendall(head.encode())
        served.get("/healthz")  # sent after it, so the other has been accepted
        served.send(signal.SIGTERM)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"draining"' in answer
    assert served.exit_status(within_s=SOON_S) == 0


@pytest.mark.usefixtures("simulator")
def test_prices_can_be_purged_from_the_command_line_while_it_runs(runner: GatewayRunner) -> None:
    def purge() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "proxy", "purge", "--all", "--config", str(runner.config())]
        env = runner.environment()
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=START_S)

    served = runner.start()
    served.ask()
    assert purge().stdout == "purged all prices of the account default\n"
    wait_until(lambda: not is_hit(served.ask()), within_s=2.0)
    assert served.stop() == 0
    stopped = purge()
    expected = f"estimate-proxy: no gateway is running on {runner.data_dir}: start one, or set store.url\n"
    assert (stopped.returncode, stopped.stderr) == (2, expected)


def test_sigint_skips_the_delay_and_idle_clients_do_not_delay_it(runner: GatewayRunner) -> None:
    served = runner.start(server={"drain_delay_s": LONG_S, "drain_s": LONG_S})
    with served.client() as idle:
        assert idle.post(PATH, content=OTHER).status_code == 200
        served.send(signal.SIGINT)
        assert served.exit_status(within_s=SOON_S) == 0
    assert_nothing_left(runner)


def test_a_second_signal_ends_the_delay_and_a_third_one_ends_everything(
    runner: GatewayRunner, simulator: Simulator, pool: ThreadPoolExecutor
) -> None:
    served = runner.start(server={"drain_delay_s": LONG_S, "drain_s": LONG_S})
    with held(served, simulator, pool) as running:
        served.send(signal.SIGTERM)
        wait_until(lambda: served.get("/readyz").status_code == 503)
        served.send(signal.SIGTERM)
        wait_until(lambda: refuses(served.url))
        assert not running.asked.done()
        served.send(signal.SIGTERM)
        assert served.exit_status(within_s=SOON_S) == 1
        with pytest.raises(httpx2.TransportError):
            running.asked.result()
    assert served.messages("SIGTERM: shutting down") == ["SIGTERM: shutting down"] * 3
    assert served.messages("not all workers finished in time: killing them")
    assert_nothing_left(runner)


def test_a_signal_before_it_serves_ends_it_too(runner: GatewayRunner) -> None:
    served = runner.begin()
    wait_until(lambda: any("proxy.processes.worker" in child.cmdline() for child in served.children()))
    served.send(signal.SIGTERM)
    assert served.exit_status(within_s=START_S) == 0, "at the latest when the worker has started"
    assert_nothing_left(runner)


def test_a_worker_that_dies_while_draining_is_not_replaced(runner: GatewayRunner) -> None:
    served = runner.start(server={"drain_delay_s": LONG_S})
    served.send(signal.SIGTERM)
    served.wait_for_message("SIGTERM")
    kill(served.worker())
    assert served.exit_status(within_s=SOON_S) == 1
    assert_nothing_left(runner)


# Deaths of a worker


@pytest.mark.usefixtures("simulator")
def test_a_dead_worker_is_replaced_and_no_request_is_refused(runner: GatewayRunner) -> None:
    served = runner.start()
    served.ask()
    supervisor = psutil.Process(served.process.pid)
    before = supervisor.num_fds()
    for deaths in range(1, 4):
        worker = served.worker()
        kill(worker)
        assert is_hit(served.ask())
        served.wait_until_serving(times=deaths + 1)
        assert served.worker() != worker
    assert supervisor.num_fds() == before
    assert {child.status() for child in supervisor.children()}.isdisjoint({psutil.STATUS_ZOMBIE})
    assert served.messages("the worker died") == [
        "the worker died (status -9): starting another",
        "the worker died (status -9): starting another in 0.5 s",
        "the worker died (status -9): starting another in 1 s",
    ]
    assert not served.messages("store")
    assert served.stop() == 0
    assert_nothing_left(runner)


def total(served: GatewayProcess, metric: str) -> float:
    """Returns the sum of a metric over all its labels."""
    samples = (line.rpartition(" ") for line in served.get("/metrics").text.splitlines())
    return sum(float(value) for name, _, value in samples if name.split("{")[0] == metric)


@pytest.mark.usefixtures("simulator")
def test_several_workers_act_as_one_gateway(runner: GatewayRunner) -> None:
    """One socket, one log and one pair of stores; counters are summed and survive a worker's death."""
    served = runner.begin("--workers", "3", metrics={"public": True})
    served.wait_until_serving(times=3)
    workers = served.workers()
    assert len(served.messages("serving on ")) == len(workers) == 3
    assert len(served.children()) == 5
    for _ in range(60):
        assert served.ask().status_code == 200
    wait_until(lambda: total(served, "estimate_proxy_requests_total") >= 60)
    kill(workers[0])
    served.wait_until_serving(times=4)
    assert [line.partition(" died")[0] for line in served.messages(" died")] == ["worker 1 of 3"]
    assert {worker.pid for worker in workers[1:]} < {worker.pid for worker in served.workers()}
    assert total(served, "estimate_proxy_requests_total") >= 60, "the dead worker's counters too"
    wait_until(lambda: _in_flight(served) == 1)
    assert served.stop() == 0
    assert_nothing_left(runner)


def _in_flight(served: GatewayProcess) -> float:
    """Returns the gauge over all workers, including this request; a worker's value may be `FLUSH_AFTER_S` old."""
    time.sleep(2 * FLUSH_AFTER_S)
    return total(served, "estimate_proxy_requests_in_flight")


@pytest.mark.usefixtures("simulator")
def test_no_worker_outlives_the_supervisor(runner: GatewayRunner) -> None:
    served = runner.begin("--workers", "2")
    served.wait_until_serving(times=2)
    children = served.children()
    served.send(signal.SIGKILL)
    wait_until_gone(*children)


def test_a_worker_that_never_serves_stops_the_gateway(runner: GatewayRunner, tmp_path: Path) -> None:
    dying = "import os, sys\nif 'proxy.processes.worker' in sys.orig_argv: os._exit(7)\n"
    (tmp_path / "sitecustomize.py").write_text(dying)
    served = runner.begin(env={"PYTHONPATH": str(tmp_path)})
    assert served.exit_status() == 1
    assert served.messages("the worker died") == [
        "the worker died (status 7): starting another",
        "the worker died (status 7): starting another in 0.5 s",
        "the worker died 3 times before it served (status 7): giving up",
    ]
    assert_nothing_left(runner)


def speak_like_redis_6(handler: socketserver.StreamRequestHandler) -> None:
    """Answers OK to everything, and the version to INFO."""
    requests = cast("BinaryIO", handler.rfile)
    while head := requests.readline():
        words = [_value(requests) for _ in range(int(head[1:]))]
        version = b"redis_version:6.2.14\r\n"
        handler.wfile.write(b"$%d\r\n%b\r\n" % (len(version), version) if words[0].upper() == b"INFO" else b"+OK\r\n")


def _value(requests: BinaryIO) -> bytes:
    size = int(requests.readline()[1:])
    return requests.read(size + 2)[:size]


def test_a_store_that_is_too_old_is_refused_once(runner: GatewayRunner) -> None:
    old_redis = type("OldRedis", (socketserver.StreamRequestHandler,), {"handle": speak_like_redis_6})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), old_redis) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        served = runner.begin(store={"url": f"redis://127.0.0.1:{server.server_address[1]}/0"})
        status = served.exit_status()
        server.shutdown()
        thread.join()
    assert status == 1
    (line,) = served.lines()
    assert line["level"] == "error"
    assert line["message"] == (
        "cannot serve: the store is Redis 6.2.14: use Redis 7.0 or newer, or Valkey 7.2 or newer"
    )


# Embedded stores, and their deaths


def test_each_store_is_a_separate_server(undisturbed: tuple[GatewayRunner, GatewayProcess]) -> None:
    runner, served = undisturbed
    assert set(served.children()) == {served.worker(), *map(served.store, ROLES)}
    for role, policy in zip(ROLES, ("noeviction", "allkeys-lru"), strict=True):
        with embedded(runner, role) as client:
            expected = {"maxmemory-policy": policy, "appendonly": "yes", "appendfsync": "everysec"}
            assert client.config_get(*expected) == expected
            assert client.info("server")["process_id"] == served.store(role).pid


def test_a_dead_store_is_restarted_with_its_data_while_the_other_serves(runner: GatewayRunner) -> None:
    served = runner.start()
    put(runner)
    for dies, lives in (ROLES, ROLES[::-1]):
        dead, worker, untouched = served.store(dies), served.worker(), served.store(lives)
        kill(dead)
        death = f"embedded store {dies} was killed by signal 9 (Killed); embedded store {dies} restarted"
        served.wait_for_message(death)
        wait_until(lambda role=dies: keeps(runner, role))  # type: ignore[misc] # a default
        assert keeps(runner, lives)
        assert (served.worker(), served.store(lives)) == (worker, untouched)
        assert served.store(dies) != dead
    assert len(served.messages("embedded store")) == len(ROLES)
    assert served.stop() == 0
    assert_nothing_left(runner)


@pytest.mark.usefixtures("simulator")
def test_removed_sockets_are_created_again_and_a_new_worker_finds_them(runner: GatewayRunner) -> None:
    served = runner.start()
    assert served.ask().status_code == 200
    put(runner)
    for path in runner.runtime.iterdir():
        shutil.rmtree(path)
    kill(served.worker())
    served.wait_until_serving(times=2)
    wait_until(lambda: is_served(served.ask()))
    assert all(keeps(runner, role) for role in ROLES)
    assert len(served.messages("lost its socket")) == len(ROLES)
    assert served.stop() == 0
    assert_nothing_left(runner)


def test_a_store_that_cannot_start_is_named_and_nothing_is_left(runner: GatewayRunner) -> None:
    manifest = runner.data_dir / "ledger" / "appendonlydir" / "appendonly.aof.manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("garbage\n")
    line = runner.refused()
    assert line.startswith(
        f"estimate-proxy: embedded store ledger: {manifest} is missing or damaged: restore a backup "
    )
    assert_nothing_left(runner)


@pytest.mark.usefixtures("simulator")
def test_without_its_price_book_it_calls_upstream_until_the_price_book_is_back(runner: GatewayRunner) -> None:
    served = runner.start()
    assert served.ask().status_code == 200
    served.send(signal.SIGSTOP)  # the stopped supervisor starts no other store
    kill(served.store("price-book"))
    assert is_hit(served.ask())  # out of the process's memory
    answers = [served.ask(OTHER) for _ in range(5)]
    assert {(answer.status_code, cache_status(answer)) for answer in answers} == {(200, BYPASS)}
    assert len({answer.content for answer in answers}) == 1
    assert served.get("/readyz").json() == {"status": "ready", "degraded": ["price-book"]}
    served.send(signal.SIGCONT)
    wait_until(lambda: is_hit(served.ask(OTHER)))
    assert served.messages(
        "embedded store price-book was killed by signal 9 (Killed); embedded store price-book restarted"
    )
    assert 1 <= len(served.messages("the price-book's connection fails")) <= 3, "one incident, not one per request"
    assert served.stop() == 0
    assert_nothing_left(runner)


@pytest.mark.usefixtures("simulator")
def test_without_its_ledger_it_refuses_until_the_ledger_is_back(runner: GatewayRunner) -> None:
    served = runner.start()
    assert served.ask().status_code == 200
    served.send(signal.SIGSTOP)  # the stopped supervisor starts no other ledger
    kill(served.store("ledger"))
    answers = [served.ask() for _ in range(5)]
    assert {(answer.status_code, code_of(answer)) for answer in answers} == {(503, "store-unavailable")}
    assert served.get("/readyz").json() == {"status": "ready", "degraded": ["ledger"]}
    served.send(signal.SIGCONT)
    wait_until(lambda: served.ask().status_code == 200)
    assert 1 <= len(served.messages("the ledger's connection fails")) <= 3, "one incident, not one per request"
    assert not served.messages("price-book")
    assert served.stop() == 0
    assert_nothing_left(runner)


# Death of the supervisor


@pytest.mark.parametrize("worker_is", ["waiting for upstream", "stopped"])
def test_nothing_outlives_the_supervisor_and_the_next_one_takes_over(
    worker_is: str, runner: GatewayRunner, simulator: Simulator, pool: ThreadPoolExecutor
) -> None:
    served = runner.start()
    price = served.ask().content
    put(runner)
    worker, stores = served.worker(), [served.store(role) for role in ROLES]
    if worker_is == "stopped":
        worker.suspend()
        served.process.kill()
    else:
        with held(served, simulator, pool) as running:
            served.process.kill()
            with pytest.raises(httpx2.TransportError):
                running.asked.result()
    wait_until_gone(worker, *stores)

    following = runner.start()
    answer = following.ask()
    assert is_hit(answer)
    assert answer.content == price
    assert all(keeps(runner, role) for role in ROLES)
    assert len(list(runner.runtime.iterdir())) == 1, "the dead gateway's sockets are removed"


def test_a_worker_whose_supervisor_dies_ends_by_itself(runner: GatewayRunner, tmp_path: Path) -> None:
    """For systems without a parent death signal: only Linux has one."""
    elsewhere = (
        "import sys\nfrom proxy.embedded import child\nchild.sys = type('Elsewhere', (), {'platform': 'darwin'})\n"
    )
    (tmp_path / "sitecustomize.py").write_text(elsewhere)
    served = runner.start(env={"PYTHONPATH": str(tmp_path)})
    worker, stores = served.worker(), [served.store(role) for role in ROLES]
    served.process.kill()
    wait_until_gone(worker)
    assert served.messages("the supervisor has died: stopping")
    for store in stores:
        kill(store)


def test_a_worker_whose_supervisor_dies_before_the_stores_have_started_ends() -> None:
    """It ends without a traceback, while it waits for its settings."""
    with socket.socket() as listener:
        ours, theirs = Pipe()
        with theirs, tempfile.TemporaryFile() as metrics_file:
            fds = (listener.fileno(), theirs.fileno(), metrics_file.fileno())
            command = [sys.executable, "-m", "proxy.processes.worker", *map(str, fds)]
            worker = subprocess.Popen(command, pass_fds=fds, stderr=subprocess.PIPE)
        ours.close()
        assert worker.communicate(timeout=START_S)[1] == b""
        assert worker.returncode == 1


# Failed starts


def test_a_data_directory_has_one_gateway(undisturbed: tuple[GatewayRunner, GatewayProcess]) -> None:
    runner, first = undisturbed
    line = runner.refused()
    assert line == (
        f"estimate-proxy: another gateway (pid {first.process.pid}), or a Valkey server that it left behind, is using "
        f"{runner.data_dir}: end it, or set store.data_dir to another directory"
    )
    assert first.get("/readyz").json()["degraded"] == []


def test_a_port_in_use_is_named(runner: GatewayRunner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = runner.refused("--port", str(port))
    assert line == (
        f"estimate-proxy: cannot listen on 127.0.0.1:{port}: Address already in use; choose another port with --port"
    )
    assert not runner.data_dir.exists()


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("gateway.invalid", "gateway.invalid:0: "),
        ("192.0.2.1", "192.0.2.1:0: Cannot assign requested address"),
        ("2001:db8::1", "[2001:db8::1]:0: "),
    ],
)
def test_a_host_of_another_machine_is_named(host: str, reason: str, runner: GatewayRunner) -> None:
    line = runner.refused("--host", host)
    assert line.startswith(f"estimate-proxy: cannot listen on {reason}")
    assert line.endswith("; choose another address with --host")


@pytest.mark.usefixtures("simulator")
def test_it_listens_on_ipv6_if_available(runner: GatewayRunner) -> None:
    if not has_ipv6():
        assert runner.refused("--host", "::1").startswith("estimate-proxy: cannot listen on [::1]:0: ")
        return
    served = runner.start("--host", "::1")
    assert served.url.startswith("http://[::1]:")
    assert served.ask().status_code == 200


@pytest.mark.usefixtures("simulator")
def test_with_an_external_store_no_store_is_started(runner: GatewayRunner, any_store_url: str) -> None:
    served = runner.start(store={"url": any_store_url})
    question = b'[{"model":"of %d"}]' % served.process.pid
    assert not is_hit(served.ask(question))
    assert is_hit(served.ask(question))
    assert served.children() == [served.worker()]
    assert not runner.data_dir.exists()
    assert list(runner.runtime.iterdir()) == []
    assert served.stop() == 0


@pytest.mark.usefixtures("simulator")
def test_with_an_external_price_book_only_the_ledger_is_started(runner: GatewayRunner, valkey_url: str) -> None:
    served = runner.start(cache={"url": valkey_url})
    question = b'[{"model":"of %d"}]' % served.process.pid
    assert not is_hit(served.ask(question))
    assert is_hit(served.ask(question))
    assert set(served.children()) == {served.worker(), served.store("ledger")}
    assert not (runner.data_dir / "price-book").exists()
    assert served.stop() == 0
    assert_nothing_left(runner)


# Processes as an operator sees them


def test_arguments_and_environments_of_processes_show_no_setting(
    undisturbed: tuple[GatewayRunner, GatewayProcess],
) -> None:
    _, served = undisturbed
    assert served.worker().cmdline()[:3] == [sys.executable, "-m", "proxy.processes.worker"]
    assert not [name for name in served.worker().environ() if name.startswith("ESTIMATE_PROXY_")]
    assert [served.store(role).environ() for role in ROLES] == [{}, {}]


def test_a_folder_named_proxy_is_not_imported(runner: GatewayRunner, tmp_path: Path) -> None:
    (tmp_path / "proxy.py").write_text("raise SystemExit('this is not the gateway')")
    command = shutil.which("estimate-proxy", path=str(Path(sys.executable).parent))
    assert command is not None
    served = runner.start(command=[command])
    assert served.get("/healthz").json() == {"status": "alive"}
