"""Metrics of several workers: merging, memory files without a name, and survival of a worker's death."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any

import httpx2
import prometheus_client.metrics
import psutil
import pytest
import redis
from prometheus_client import values

from gateway_fixture import DESIGN, MARKETING
from gateway_process import GatewayProcess, GatewayRunner, Tree, kill, wait_until_gone
from open_files import open_files
from past_usage import put_past_usage
from prometheus import (
    MORNING,
    SCRAPER,
    Scraped,
    assert_as_declared,
    booked,
    said_by_promtool,
    scrape,
    scrape_openmetrics,
    usage,
)
from proxy.auth import digest_of, token_of
from proxy.problems import Outcome
from proxy.telemetry import multiprocess
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.metrics_files import NoMetricsFileError, metrics_files, vacate
from proxy.telemetry.multiprocess import SharedValues
from scripted_simulator import Simulator
from serving import wait_until

ADMIN = token_of("a" * 32)
FLUX = b'[{"model":"Flux"}]'
TEAMS = ("design", "marketing", "retired")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of this process and its gateways."""
    found = tmp_path / "tmp"
    found.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(found))
    return found


class TestFiles:
    @pytest.mark.parametrize("platform", ["linux", "darwin"])
    def test_they_have_no_name_and_end_with_their_process(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, platform: str
    ) -> None:
        monkeypatch.setattr(sys, "platform", platform)
        opened = open_files()
        with metrics_files(3) as descriptors:
            assert len(set(descriptors)) == 3
            assert [os.fstat(descriptor).st_nlink for descriptor in descriptors] == [0] * 3
            assert list(folder.iterdir()) == []
        assert not open_files() - opened

    def test_without_memory_files_temporary_files_are_used(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "memfd_create", _refuse)
        with metrics_files(1) as (descriptor,):
            assert os.fstat(descriptor).st_dev == folder.stat().st_dev
        folder.rmdir()
        with (
            pytest.raises(NoMetricsFileError, match=r"cannot open a file for metrics \(.*\): set TMPDIR"),
            metrics_files(1),
        ):
            pass


def _refuse(*_: Any) -> int:
    raise OSError(ENOSPC, os.strerror(ENOSPC))


@dataclass(frozen=True)
class Gateways:
    """Gateways on one store, with their temporary files in `folder`."""

    runner: GatewayRunner
    folder: Path
    sections: dict[str, Tree]

    def start(self, workers: int = 1) -> GatewayProcess:
        how: dict[str, Any] = {"env": {"TMPDIR": str(self.folder)}, **self.sections}
        served = self.runner.begin("--workers", str(workers), **how)
        served.wait_until_serving(times=workers)
        return served

    def files(self) -> list[Path]:
        """Returns the files in `folder` except the stores'."""
        return [*self.folder.iterdir(), *self.runner.runtime.iterdir()]


@pytest.fixture
def gateways(runner: GatewayRunner, folder: Path, valkey_url: str, simulator: Simulator) -> Gateways:
    assert simulator.calls == 0
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    quotas = [{"measure": "requests", "limit": 1, "per": "week", "on_exceed": "warn"}]
    sections: dict[str, Tree] = {
        "store": {"url": valkey_url},
        "metrics": {"tokens": [digest_of(SCRAPER)]},
        "admin": {"tokens": [digest_of(ADMIN)]},
        "org": {"timezone": MORNING, "quotas": quotas},
    }
    return Gateways(runner, folder, sections)


def scraped_at(served: GatewayProcess) -> Scraped:
    with served.client() as client:
        return scrape(client)


class TestServe:
    def test_it_uses_no_folder(self, gateways: Gateways) -> None:
        served = gateways.start(workers=2)
        assert served.ask(FLUX).status_code == 200
        assert scraped_at(served).value("config_last_reload_successful") == 1
        assert gateways.files() == []
        assert served.stop() == 0

    def test_it_needs_no_folder_to_start(self, gateways: Gateways, tmp_path: Path) -> None:
        gateways.folder.rmdir()
        env = {"XDG_RUNTIME_DIR": str(tmp_path / "missing"), "TMPDIR": str(gateways.folder)}
        served = gateways.runner.start(env=env, **gateways.sections)
        assert served.ask(FLUX).status_code == 200
        assert scraped_at(served).value("config_last_reload_successful") == 1

    def test_counting_survives_removed_files_and_killed_workers(self, gateways: Gateways) -> None:
        served = gateways.start(workers=2)
        assert [served.ask(FLUX).status_code for _ in range(5)] == [200] * 5
        wait_until(lambda: hits(scraped_at(served)) == 4)
        shutil.rmtree(gateways.folder)
        shutil.rmtree(gateways.runner.runtime)
        for number, worker in enumerate(served.workers(), 1):
            before = scraped_at(served)
            kill(worker)
            served.wait_until_serving(times=2 + number)
            after = scraped_at(served)
            assert {key: value for key, value in before.counted().items() if after.samples[key] < value} == {}
            assert served.ask(FLUX).status_code == 200
            wait_until(lambda number=number: hits(scraped_at(served)) == 4 + number)  # type: ignore[misc] # a default
        assert served.stop() == 0
        gateways.runner.runtime.mkdir()

    def test_a_killed_gateway_leaves_nothing(self, gateways: Gateways) -> None:
        killed = gateways.start()
        worker = killed.worker()
        killed.send(signal.SIGKILL)
        wait_until_gone(worker)
        assert gateways.files() == []

    def test_all_declared_metrics_are_shown(self, gateways: Gateways, valkey_url: str) -> None:
        with redis.Redis.from_url(valkey_url) as store:
            put_past_usage(store, "design", [10] * 20, zone=MORNING)  # a forecast needs it
        served = gateways.start()
        assert [served.ask(FLUX).status_code for _ in range(2)] == [200, 200]
        wait_until(lambda: hits(scraped_at(served)))
        with served.client() as client:
            assert_as_declared(scrape(client))
            assert_as_declared(scrape_openmetrics(client))
            assert said_by_promtool(client) == ""

    def test_a_killed_workers_gauges_disappear_and_its_counters_stay(
        self, gateways: Gateways, simulator: Simulator
    ) -> None:
        served = gateways.start()
        assert [served.ask(FLUX).status_code for _ in range(3)] == [200] * 3
        with ThreadPoolExecutor() as pool, simulator.hold():
            asked = [pool.submit(served.ask, b'[{"seed":%d}]' % number) for number in range(3)]
            assert simulator.arrived(4)
            before = scraped_at(served)
            kill(served.worker())
            served.wait_until_serving(times=2)
            for future in asked:
                with pytest.raises(httpx2.TransportError):
                    future.result()
        after = scraped_at(served)
        assert (before.value("requests_in_flight"), after.value("requests_in_flight")) == (4, 1)
        assert {key: value for key, value in before.counted().items() if after.samples[key] < value} == {}
        assert served.ask(FLUX).status_code == 200
        wait_until(lambda: hits(scraped_at(served)) == hits(before) + 1 == 3)

    def test_every_worker_shows_the_metrics_of_all(self, gateways: Gateways) -> None:
        served = gateways.start(workers=2)
        asked = 0
        while asked < 10 or not all(
            map(_has_hits, served.workers())
        ):  # the kernel chooses a worker for each connection
            asked += 1
            assert asked < 500, "one worker answers everything"
            assert served.ask(FLUX).status_code == 200
        wait_until(lambda: hits(scraped_at(served)) == asked - 1)
        for scraped in [scraped_at(served) for _ in range(10)]:
            assert hits(scraped) == asked - 1
            assert scraped.value("config_last_reload_successful") == 1
        wait_until(lambda: scraped_at(served).value("requests_in_flight") == 1)

    def test_a_team_added_by_a_reload_starts_at_0(self, gateways: Gateways) -> None:
        served = gateways.start(workers=2)
        gateways.runner.config(**gateways.sections, teams={"newcomer": {"tokens": [digest_of(token_of("n" * 32))]}})
        served.send(signal.SIGHUP)
        wait_until(lambda: ("newcomer", "month") in booked(scraped_at(served)))
        assert hits(scraped_at(served), "newcomer") == 0

    def test_two_gateways_show_the_same_ledger(self, gateways: Gateways) -> None:
        pair = [gateways.start(), gateways.start()]
        for at, token in ((0, DESIGN), (1, DESIGN), (1, MARKETING), (1, DESIGN)):
            assert pair[at].ask(FLUX, x_api_key=token).status_code == 200
        with ExitStack() as opened:
            clients = [opened.enter_context(served.client()) for served in pair]
            shown = [scrape(client) for client in clients]
            booked_usage = usage(clients[0], ADMIN, TEAMS)
        assert booked(shown[0]) == booked(shown[1]) == booked_usage
        assert booked_usage["design", "month"] == (3.0, 8.25)
        for name, labels in SHARED.items():
            assert shown[0].series(name, *labels) == shown[1].series(name, *labels) != {}, name
        assert [hits(scraped) for scraped in shown] == [0, 2], "counters are each gateway's own"


SHARED: dict[str, Sequence[str]] = {
    "quota_limit": ("scope", "team", "measure", "per"),
    "quota_used": ("scope", "team", "measure", "per"),
    "window_start_timestamp_seconds": ("per",),
    "window_end_timestamp_seconds": ("per",),
    "balance_credits": ("account",),
    "ledger_created_timestamp_seconds": (),
}


def hits(scraped: Scraped, team: str = "design") -> float:
    found = scraped.value("requests_total", team=team, operation="estimate", outcome="hit")
    assert found is not None
    return found


def _has_hits(worker: psutil.Process) -> bool:
    """Returns whether the worker's own file has the hits."""
    _, _, descriptor, *_ = worker.cmdline()[worker.cmdline().index("proxy.processes.worker") + 1 :]
    content = Path(f"/proc/{worker.pid}/fd/{descriptor}").read_bytes()
    return any(
        b"design" in key and b'"hit"' in key and amount for key, _, (amount, _) in multiprocess._entries(content)
    )


# --- merging ----------------------------------------------------------------------------------------------------

WORKER = """
import sys
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.multiprocess import SharedValues
from proxy.problems import Outcome

hits, running, fails, created, own, *others = map(int, sys.argv[1:])
shared = SharedValues(own, others)
shared.install()
metrics = Metrics(["design"], ["default"], shared)
metrics.flush_soon = lambda: None
for _ in range(hits):
    metrics.record_request("design", "estimate", Outcome.HIT, 0.01)
metrics.record_credits("design", "Flux", 250_000 * hits)
metrics.flush()
metrics.requests_in_flight.set(running)
metrics.buffered_debits.set(running)
metrics.circuit_open.labels("default").set(fails)
metrics.store_up.labels("ledger").set(not fails)
metrics.config_last_reload_successful.set(not fails)
metrics.ledger_created.set(created)
print("counted", flush=True)
sys.stdin.read()
"""


@contextmanager
def worker(own: int, *, hits: int, running: int, fails: bool, created: int) -> Iterator[None]:
    """Starts a process that counts in the file `own`, and keeps running."""
    numbers = map(str, (hits, running, int(fails), created, own))
    command = [sys.executable, "-c", WORKER, *numbers]
    with subprocess.Popen(command, pass_fds=[own], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"counted\n"
        yield


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores prometheus_client after `SharedValues.install`."""
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setattr(prometheus_client.metrics, "_use_created", True)


def counting(own: int, *others: int) -> Metrics:
    """Yields the instruments of a worker in this process."""
    shared = SharedValues(own, others)
    shared.install()
    metrics = Metrics(["design"], ["default"], shared)
    metrics.flush_soon = lambda: None  # type: ignore[method-assign] # there is no loop
    return metrics


def seen_by(metrics: Metrics) -> Scraped:
    return Scraped(list(metrics.collect()))


def _sums(scraped: Scraped) -> dict[str, Any]:
    """Checks counters that several workers have in common."""
    counts = {
        "hits": hits(scraped),
        "durations": scraped.value("request_duration_seconds_count", operation="estimate", outcome="hit"),
        "fast ones": scraped.value("request_duration_seconds_bucket", operation="estimate", outcome="hit", le="0.01"),
        "credits": scraped.value("estimated_credits_total", team="design", model="Flux"),
        "errors": scraped.value("requests_total", team="design", operation="estimate", outcome="upstream-error"),
    }
    return {name: value for name, value in counts.items() if value is not None}


def _states(scraped: Scraped) -> list[float | None]:
    """Sets the gauges for in flight, waiting, circuit open, store up, config loaded and ledger created."""
    return [
        scraped.value("requests_in_flight"),
        scraped.value("buffered_debits"),
        scraped.value("upstream_circuit_open", account="default"),
        scraped.value("store_up", role="ledger"),
        scraped.value("config_last_reload_successful"),
        scraped.value("ledger_created_timestamp_seconds"),
    ]


@pytest.mark.usefixtures("restored")
class TestMerging:
    def test_counters_are_summed_and_gauges_merged_by_their_mode(self) -> None:
        together = {"hits": 5, "durations": 5, "fast ones": 5, "credits": 1.25, "errors": 0}
        with metrics_files(3) as (first, second, third):
            own = counting(first, second, third)
            with worker(second, hits=2, running=1, fails=False, created=2000):
                with worker(third, hits=3, running=5, fails=True, created=1000):
                    assert _sums(seen_by(own)) == together
                    assert _states(seen_by(own)) == [6, 6, 1, 0, 0, 1000]
                vacate(third)
                assert _sums(seen_by(own)) == together
                assert _states(seen_by(own)) == [1, 1, 0, 1, 1, 2000]
                with worker(third, hits=1, running=1, fails=False, created=3000):
                    assert _sums(seen_by(own)) == {name: value * 6 / 5 for name, value in together.items()}
                    assert _states(seen_by(own)) == [2, 2, 0, 1, 1, 3000]

    def test_a_new_worker_shows_its_predecessors_counters(self) -> None:
        """Predecessors may have series that it has not created itself."""
        with metrics_files(1) as (only,):
            with worker(only, hits=2, running=1, fails=True, created=2000):
                pass
            vacate(only)
            scraped = seen_by(counting(only))
        assert _sums(scraped) == {"hits": 2, "durations": 2, "fast ones": 2, "credits": 0.5, "errors": 0}
        assert _states(scraped) == [0, 0, 0, 0, 1, 0]

    def test_without_a_writable_file_it_counts_in_its_own_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with metrics_files(2) as (first, second):
            own = counting(first, second)
            with monkeypatch.context() as full:
                full.setattr(os, "pwrite", _refuse)
                own.record_request("design", "estimate", Outcome.HIT, 0.01)
                own.record_credits("design", "Flux", 250_000)
                own.flush()
                assert _sums(seen_by(own)) == {"hits": 1, "durations": 1, "fast ones": 1, "credits": 0.25, "errors": 0}
            own.record_request("design", "estimate", Outcome.HIT, 0.01)
            own.record_credits("design", "Flux", 250_000)
            own.flush()
            other = counting(second, first)
            assert _sums(seen_by(other)) == {"hits": 2, "durations": 2, "fast ones": 2, "credits": 0.5, "errors": 0}

    @pytest.mark.parametrize("size", [0, 1, 16, 17, 1000, 1003])
    def test_a_truncated_file_is_read_up_to_its_end(self, size: int) -> None:
        with metrics_files(2) as (first, second):
            own = counting(first, second)
            with worker(second, hits=2, running=1, fails=False, created=2000):
                os.ftruncate(second, size)
                assert hits(seen_by(own)) in {0, 2}

    def test_a_file_of_zeros_counts_nothing(self) -> None:
        with metrics_files(2) as (first, second):
            own = counting(first, second)
            with worker(second, hits=2, running=1, fails=False, created=2000):
                os.pwrite(second, b"\0" * os.fstat(second).st_size, 0)
                assert hits(seen_by(own)) == 0
