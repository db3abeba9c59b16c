"""A gateway that runs out of file descriptors reports that, blames no store or upstream, and recovers."""

import asyncio
import errno
import logging
import os
import resource
import select
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx2
import psutil
import pytest
import redis
import uvloop

from deploy_files import DEPLOY
from gateway_fixture import PATH, UpstreamFixture, code_of, settings
from gateway_process import GatewayProcess, GatewayRunner, address_of, kill
from load_generator import new_body
from prometheus import SCRAPER, scrape
from proxy.auth import digest_of
from proxy.problems import Code, StoreUnavailable
from proxy.processes.supervisor import descriptor_warning
from proxy.processes.workers import MAX_FAILED_STARTS
from proxy.store.client import COOLDOWN_S, Script, Store
from proxy.telemetry import descriptor_monitor
from proxy.telemetry.descriptor_monitor import DescriptorMonitor
from proxy.telemetry.descriptors import is_one_left, raise_limit, ran_out
from proxy.telemetry.metrics import Metrics
from proxy.upstream.circuit_breaker import MIN_ANSWERS
from proxy.upstream.client import Upstream
from proxy.upstream.replies import Failed, Priced
from scripted_simulator import Simulator
from serving import wait_until

FEW = 64
WITH_FEW = ("/bin/sh", "-c", f'ulimit -n {FEW} && exec "$@"', "sh", sys.executable, "-m", "proxy")
"""The command of `serve` with a low soft and hard limit of descriptors."""

SAID = "out of file descriptors"
GET = Script("proxy.cache", "price_get", repeatable=True)


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """In this process. The limit is below all numbers in use, so one that another thread frees cannot be taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.open(os.devnull, os.O_RDONLY)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def run_scenario(scenario: Callable[[], Awaitable[None]]) -> None:
    """Runs a scenario on the event loop of workers."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as event_loop:
        event_loop.run(scenario())  # type: ignore[arg-type] # it is a coroutine function


def exhausted(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("estimate_proxy_descriptors_exhausted_total")


def wrapped(error: Exception, *, explicit: bool) -> Exception:
    """Raises an error from another one like a library, with `from` or without."""
    outer = httpx2.ConnectError("failed")
    outer.__context__ = error
    outer.__cause__ = error if explicit else None
    return outer


class TestRecognised:
    @pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
    @pytest.mark.parametrize("explicit", [True, False])
    def test_the_cause_of_another_error_is_recognised(self, number: int, *, explicit: bool) -> None:
        lack = OSError(number, os.strerror(number))
        assert ran_out(lack)
        assert ran_out(wrapped(wrapped(lack, explicit=explicit), explicit=explicit))
        assert ran_out(wrapped(ExceptionGroup("all failed", [ConnectionRefusedError(), lack]), explicit=explicit))

    def test_other_errors_are_not_taken_for_it(self) -> None:
        refused = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        for error in (refused, redis.ConnectionError("Too many open files"), ExceptionGroup("all failed", [refused])):
            assert not ran_out(wrapped(error, explicit=True))
        refused.__context__ = wrapped(refused, explicit=True)
        assert not ran_out(refused), "the search ends"

    @pytest.mark.parametrize(
        "error", [socket.gaierror(socket.EAI_NONAME, "unknown"), OSError(errno.EBUSY, os.strerror(errno.EBUSY))]
    )
    def test_a_failed_look_up_is_taken_for_it_only_if_none_is_left(self, error: OSError) -> None:
        failed = wrapped(error, explicit=True)
        assert is_one_left()
        assert not ran_out(failed)
        with no_descriptor_left():
            assert not is_one_left()
            assert ran_out(failed)


class TestWarning:
    def test_it_has_the_limit_the_need_and_the_fix(self, valkey_url: str) -> None:
        configured = settings(valkey_url, "http://127.0.0.1:1", upstream={"max_connections": 300})
        assert descriptor_warning(1024, configured) == (
            "a process may have only 1024 file descriptors here, but a busy worker needs 10624: "
            "10192 for clients, 300 for RenderNet, 32 for the stores, 100 for the rest. "
            "Raise the limit: ulimit -n 10624, or LimitNOFILE=10624 in the systemd unit"
        )
        assert descriptor_warning(10623, configured) is not None
        assert descriptor_warning(10624, configured) is None

    def test_the_units_limit_is_enough_for_any_setting(self, valkey_url: str) -> None:
        most = settings(valkey_url, "http://127.0.0.1:1", upstream={"max_connections": 10_000})
        (line,) = [line for line in _unit() if line.startswith("LimitNOFILE=")]
        assert descriptor_warning(int(line.partition("=")[2]), most) is None

    def test_the_soft_limit_becomes_the_hard_one(self) -> None:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] // 2, before[1]))
            assert raise_limit() == before[1]
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

    @pytest.mark.parametrize(("soft", "expected"), [(256, 256), (resource.RLIM_INFINITY, sys.maxsize)])
    def test_a_limit_that_cannot_be_raised_is_reported(
        self, monkeypatch: pytest.MonkeyPatch, soft: int, expected: int
    ) -> None:
        def refuse(*_: Any) -> None:
            raise ValueError("current limit exceeds maximum limit")

        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
        monkeypatch.setattr(resource, "setrlimit", refuse)
        assert raise_limit() == expected


def _unit() -> Sequence[str]:
    return (DEPLOY / "systemd" / "estimate-proxy.service").read_text().splitlines()


class TestConnections:
    """New connections while this process has no descriptor left."""

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    def test_upstream_connections_report_the_missing_descriptor(
        self, host: str, upstream: UpstreamFixture, simulator: Simulator
    ) -> None:
        """Uses an address and a name, because resolving a name needs descriptors."""
        url = upstream.url.replace("127.0.0.1", host)
        configured = settings("redis://unused", url)
        keys = {name: account.api_key for name, account in configured.accounts.items()}

        async def scenario() -> None:
            metrics = Metrics((), configured.accounts)
            asked = Upstream(configured.upstream, keys, metrics)
            deadline = asyncio.get_running_loop().time() + 10
            for _ in range(MIN_ANSWERS):
                with no_descriptor_left():
                    reply = await asked.estimate("default", new_body(), "", deadline=deadline)
                assert isinstance(reply, Failed)
                assert (reply.problem.code, reply.problem.retry_after_s, reply.asked) == (Code.OVERLOADED, 1, False)
                assert "no file descriptor left" in reply.problem.detail
            assert not asked.is_failing
            assert exhausted(metrics) == MIN_ANSWERS
            name, labels = "estimate_proxy_upstream_request_duration_seconds_count", {"account": "default"}
            assert metrics.registry.get_sample_value(name, {**labels, "status": "error"}) == 0
            assert isinstance(await asked.estimate("default", new_body(), "", deadline=deadline), Priced)
            await asked.close()

        run_scenario(scenario)
        assert simulator.calls == 1

    def test_store_connections_report_the_missing_descriptor(
        self, any_store_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario() -> None:
            metrics = Metrics()
            store = Store(any_store_url, "ledger", metrics)
            with no_descriptor_left(), pytest.raises(StoreUnavailable, match="no file descriptor left"):
                await store.call(GET, "ep1:{x}:price", "ep1:book:x")
            assert exhausted(metrics) == 1
            await asyncio.sleep(COOLDOWN_S)
            await store.call(GET, "ep1:{x}:price", "ep1:book:x")
            await store.close()

        run_scenario(scenario)
        (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert message == "the ledger's connection fails: this gateway has no file descriptor left for a connection"


class TestMonitor:
    def test_exhaustion_and_recovery_are_logged_once_each(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        metrics = Metrics()
        monitor = DescriptorMonitor(metrics)
        monitor.check(0)
        metrics.record_descriptors_exhausted()
        metrics.record_descriptors_exhausted()
        monitor.check(1)
        with monkeypatch.context() as patched:
            patched.setattr(descriptor_monitor, "is_one_left", lambda: False)
            monitor.check(2)
        monitor.check(3)
        monitor.check(4)
        assert exhausted(metrics) == 3
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        first, second = [record.getMessage() for record in caplog.records]
        assert first.startswith(f"{SAID} (this process may have {limit}): ")
        assert second == "there are file descriptors again"


@contextmanager
def exhausted_gateway(served: GatewayProcess) -> Iterator[None]:
    """Opens idle connections until the gateway accepts no more."""
    with ExitStack() as opened:

        def closes() -> bool:
            opened.enter_context(one := socket.create_connection(address_of(served.url)))
            connections.append(one)
            return bool(select.select(connections, [], [], 0.02)[0])

        connections: list[socket.socket] = []
        wait_until(closes)
        assert len(connections) < 2 * FEW
        yield


class TestServe:
    def test_it_warns_at_the_start_that_the_limit_is_too_low(self, runner: GatewayRunner, valkey_url: str) -> None:
        served = runner.start(command=WITH_FEW, store={"url": valkey_url})
        (message,) = served.messages("file descriptors")
        assert message.startswith(
            f"a process may have only {FEW} file descriptors here, but a busy worker needs 10424: "
        )
        (level,) = [line["level"] for line in served.lines() if line["message"] == message]
        assert level == "warning"

    def test_with_a_sufficient_limit_it_raises_the_soft_limit_without_a_warning(
        self, runner: GatewayRunner, valkey_url: str
    ) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        command = ("/bin/sh", "-c", f'ulimit -Sn {FEW} && exec "$@"', "sh", sys.executable, "-m", "proxy")
        served = runner.start(command=command, store={"url": valkey_url})
        assert served.worker().rlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert served.messages("file descriptors") == []

    def test_without_descriptors_it_is_overloaded_and_blames_no_store(
        self, runner: GatewayRunner, valkey_url: str, simulator: Simulator
    ) -> None:
        sections = {"store": {"url": valkey_url}, "metrics": {"tokens": [digest_of(SCRAPER)]}}
        quick = runner.patching({"proxy.telemetry.descriptor_monitor.CHECK_EVERY_S": 0.1})
        served = runner.start(command=WITH_FEW, env=quick, **sections)
        with served.client() as first, served.client() as second, ThreadPoolExecutor() as pool:
            assert [client.post(PATH, content=new_body()).status_code for client in (first, second)] == [200] * 2
            calls = simulator.calls
            with simulator.hold():
                held = pool.submit(first.post, PATH, content=new_body())  # on the existing connection
                assert simulator.arrived(calls + 1)
                with exhausted_gateway(served):
                    answers = [second.post(PATH, content=new_body()) for _ in range(2 * MIN_ANSWERS)]
                    assert {(answer.status_code, code_of(answer)) for answer in answers} == {(503, "overloaded")}
                    assert {answer.headers["retry-after"] for answer in answers} == {"1"}
                    assert second.get("/readyz").json() == {"status": "ready", "degraded": []}
                    served.wait_for_message(SAID)
                    counted = scrape(second)
            assert held.result().status_code == 200
            wait_until(lambda: second.post(PATH, content=new_body()).status_code == 200)
            served.wait_for_message("there are file descriptors again")
        found = counted.value("descriptors_exhausted_total")
        assert found is not None
        assert found >= len(answers)
        assert counted.value("upstream_request_duration_seconds_count", account="default", status="error") == 0
        assert counted.value("upstream_circuit_open", account="default") == 0
        assert len(served.messages(SAID)) == 1
        assert served.messages("upstream fails") == []
        assert served.stop() == 0

    @pytest.mark.usefixtures("simulator")
    def test_a_worker_that_cannot_be_started_is_started_later(self, runner: GatewayRunner, valkey_url: str) -> None:
        quick = runner.patching({"proxy.embedded.child._FIRST_DELAY_S": 0.05})
        served = runner.start(store={"url": valkey_url}, env=quick)
        supervisor = psutil.Process(served.process.pid)
        soft, hard = supervisor.rlimit(resource.RLIMIT_NOFILE)
        supervisor.rlimit(resource.RLIMIT_NOFILE, (3, hard))  # it keeps its open descriptors and gets no new ones
        kill(served.worker())
        refused = "the worker cannot be started (Too many open files): trying again in"
        served.wait_for_message(refused, times=MAX_FAILED_STARTS + 1)
        supervisor.rlimit(resource.RLIMIT_NOFILE, (soft, hard))
        served.wait_until_serving(times=2)
        assert served.ask(new_body()).status_code == 200
        assert served.stop() == 0
