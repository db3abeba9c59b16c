"""Metrics of several processes: where they are kept and for how long, and how those of many workers become one."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from prometheus_client.multiprocess import MultiProcessCollector

from conftest import Stage
from processes import House, Served, Tree, house, kill, wait_until_gone
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
from proxy.metrics_files import VARIABLE, NoMetricsDirectoryError, forget_worker, metrics_directory
from proxy.simulator import Simulator
from proxy.teams import digest_of, token_of
from scene import DESIGN, MARKETING
from serving import wait_until

ADMIN = token_of("a" * 32)
FLUX = b'[{"model":"Flux"}]'
TEAMS = ("design", "marketing", "retired")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process and its gateways have their temporary files."""
    found = tmp_path / "tmp"
    found.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(found))
    return found


@pytest.fixture
def home(tmp_path: Path, upstream: tuple[Stage, str]) -> Iterator[House]:
    with house(tmp_path, upstream[1]) as opened:
        yield opened


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


class TestDirectory:
    def test_it_is_private_and_goes_with_its_user(self, folder: Path) -> None:
        with metrics_directory() as directory:
            assert directory.parent == folder
            assert (mode_of(directory), directory.stat().st_uid) == (0o700, os.getuid())
            (directory / "counter_1.db").touch()
        assert list(folder.iterdir()) == []

    def test_it_goes_whatever_happens(self, folder: Path) -> None:
        with pytest.raises(KeyError), metrics_directory():
            raise KeyError
        assert list(folder.iterdir()) == []

    def test_what_a_dead_one_left_is_removed_and_a_living_one_is_not(self, folder: Path) -> None:
        with metrics_directory() as living:
            dead = living.with_name(f"{living.name}x")
            dead.mkdir()
            (dead / "lock").touch()
            (dead / "counter_1.db").touch()
            with metrics_directory() as new:
                assert set(folder.iterdir()) == {living, new}
            assert set(folder.iterdir()) == {living}

    def test_what_nobody_has_locked_yet_is_left_alone(self, folder: Path) -> None:
        """It may have been made a moment ago, by a gateway that starts too."""
        with metrics_directory() as living:
            name = f"{living.name}x"
        (folder / name).mkdir()
        with metrics_directory():
            assert (folder / name).exists()

    def test_a_link_leads_nowhere(self, folder: Path, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "lock").touch()
        with metrics_directory() as living:
            name = f"{living.name}x"
        (folder / name).symlink_to(elsewhere)
        with metrics_directory():
            assert (elsewhere / "lock").exists()

    def test_without_a_folder_for_it_there_is_a_reason(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "missing"))
        with (
            pytest.raises(NoMetricsDirectoryError, match=r"No such file or directory.*set TMPDIR"),
            metrics_directory(),
        ):
            pass


@dataclass(frozen=True)
class Gateways:
    """Gateways on one store that have their temporary files in `folder`."""

    home: House
    folder: Path
    sections: dict[str, Tree]

    def start(self, workers: int = 1) -> Served:
        how: dict[str, Any] = {"env": {"TMPDIR": str(self.folder)}, **self.sections}
        served = self.home.begin("--workers", str(workers), **how)
        served.wait_until_serving(times=workers)
        return served

    def directories(self) -> set[Path]:
        return set(self.folder.glob("estimate-proxy-metrics-*"))


@pytest.fixture
def gateways(home: House, folder: Path, valkey_url: str, simulator: Simulator) -> Gateways:
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
    return Gateways(home, folder, sections)


def scraped_at(served: Served) -> Scraped:
    with served.client() as client:
        return scrape(client)


class TestServe:
    def test_a_gateway_leaves_nothing_behind(self, gateways: Gateways) -> None:
        served = gateways.start()
        (directory,) = gateways.directories()
        assert mode_of(directory) == 0o700
        assert list(directory.glob(f"counter_{served.worker().pid}.db"))
        assert served.stop() == 0
        assert gateways.directories() == set()

    def test_what_a_killed_gateway_leaves_the_next_one_removes(self, gateways: Gateways) -> None:
        killed = gateways.start()
        (abandoned,) = gateways.directories()
        living = gateways.start()
        worker = killed.worker()
        killed.send(signal.SIGKILL)
        wait_until_gone(worker)
        assert abandoned.exists()
        gateways.start()
        assert not abandoned.exists()
        assert len(gateways.directories()) == 2
        assert scraped_at(living).value("config_last_reload_successful") == 1

    def test_where_nothing_can_be_written_it_says_so(self, home: House) -> None:
        command = [sys.executable, "-m", "proxy", "serve", "--config", str(home.config()), "--port", "0"]
        env = {name: value for name, value in home.environment().items() if not name.startswith("COVERAGE")}
        done = subprocess.run(
            command,
            env=env,
            cwd=home.folder,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=_write_no_files,
        )
        (line,) = done.stderr.splitlines()
        assert line.startswith("estimate-proxy: there is no writable directory for metrics (")
        assert line.endswith("): set TMPDIR to one")
        assert (done.returncode, done.stdout) == (2, "")

    def test_it_shows_what_the_code_declares(self, gateways: Gateways) -> None:
        served = gateways.start()
        assert [served.ask(FLUX).status_code for _ in range(2)] == [200, 200]
        wait_until(lambda: hits(scraped_at(served)))
        with served.client() as client:
            assert_as_declared(scrape(client))
            assert_as_declared(scrape_openmetrics(client))
            assert said_by_promtool(client) == ""

    def test_a_killed_worker_takes_its_gauges_along_and_leaves_its_counters(
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
        counted = {key: value for key, value in before.samples.items() if key[0].endswith(GROWING)}
        assert {key: value for key, value in counted.items() if after.samples[key] < value} == {}
        assert served.ask(FLUX).status_code == 200
        wait_until(lambda: hits(scraped_at(served)) == hits(before) + 1 == 3)

    def test_whichever_worker_is_scraped_it_tells_of_all(self, gateways: Gateways) -> None:
        served = gateways.start(workers=2)
        (directory,) = gateways.directories()
        asked = 0
        while asked < 10 or len(_who_answered(directory)) < 2:  # connections choose their worker
            asked += 1
            assert asked < 500, "one worker answers everything"
            assert served.ask(FLUX).status_code == 200
        wait_until(lambda: hits(scraped_at(served)) == asked - 1)
        for scraped in [scraped_at(served) for _ in range(10)]:
            assert hits(scraped) == asked - 1
            assert scraped.value("config_last_reload_successful") == 1
        wait_until(lambda: scraped_at(served).value("requests_in_flight") == 1)

    def test_a_team_that_a_reload_brings_begins_at_0(self, gateways: Gateways) -> None:
        served = gateways.start(workers=2)
        gateways.home.config(**gateways.sections, teams={"newcomer": {"tokens": [digest_of(token_of("n" * 32))]}})
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
            told = usage(clients[0], ADMIN, TEAMS)
        assert booked(shown[0]) == booked(shown[1]) == told
        assert told["design", "month"] == (3.0, 8.25)
        for name, labels in SHARED.items():
            assert shown[0].series(name, *labels) == shown[1].series(name, *labels) != {}, name
        assert [hits(scraped) for scraped in shown] == [0, 2], "counters are each gateway's own"


GROWING = ("_total", "_count", "_sum", "_bucket")
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


def _who_answered(directory: Path) -> set[Path]:
    """The files of workers that have had hits."""
    files = directory.glob("counter_*.db")
    return {file for file in files if hits(_merged(file))}


def _write_no_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


# --- how those of many become one -------------------------------------------------------------------------------

WORKER = """
import sys
from proxy.metrics import Metrics
from proxy.problems import Outcome

hits, running, fails, created = map(int, sys.argv[1:])
metrics = Metrics(["design"], ["default"])
metrics.flush_soon = lambda: None
for _ in range(hits):
    metrics.note_request("design", "estimate", Outcome.HIT, 0.01)
metrics.note_credits("design", "Flux", 250_000 * hits)
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
def worker(directory: Path, *, hits: int, running: int, fails: bool, created: int) -> Iterator[int]:
    """A process that has counted so much, while it lives; its pid."""
    numbers = map(str, (hits, running, int(fails), created))
    command, env = [sys.executable, "-c", WORKER, *numbers], {**os.environ, VARIABLE: str(directory)}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"counted\n"
        yield process.pid


def _merged(*files: Path) -> Scraped:
    return Scraped(list(MultiProcessCollector.merge(map(str, files))))  # type: ignore[no-untyped-call]  # it has no types


def merged(directory: Path) -> Scraped:
    return _merged(*directory.glob("*.db"))


def _sums(scraped: Scraped) -> dict[str, Any]:
    """What several workers have counted together."""
    counts = {
        "hits": hits(scraped),
        "durations": scraped.value("request_duration_seconds_count", operation="estimate", outcome="hit"),
        "fast ones": scraped.value("request_duration_seconds_bucket", operation="estimate", outcome="hit", le="0.01"),
        "credits": scraped.value("estimated_credits_total", team="design", model="Flux"),
        "errors": scraped.value("requests_total", team="design", operation="estimate", outcome="upstream-error"),
    }
    return {name: value for name, value in counts.items() if value is not None}


def _states(scraped: Scraped) -> list[float | None]:
    """In flight, waiting, circuit open, store up, config taken, ledger created."""
    return [
        scraped.value("requests_in_flight"),
        scraped.value("buffered_debits"),
        scraped.value("upstream_circuit_open", account="default"),
        scraped.value("store_up", role="ledger"),
        scraped.value("config_last_reload_successful"),
        scraped.value("ledger_created_timestamp_seconds"),
    ]


def test_counters_add_up_and_gauges_merge_as_each_must(tmp_path: Path) -> None:
    together = {"hits": 5, "durations": 5, "fast ones": 5, "credits": 1.25, "errors": 0}
    with worker(tmp_path, hits=2, running=1, fails=False, created=2000):
        with worker(tmp_path, hits=3, running=5, fails=True, created=1000) as pid:
            assert _sums(merged(tmp_path)) == together
            assert _states(merged(tmp_path)) == [6, 6, 1, 0, 0, 1000]
        forget_worker(tmp_path, pid)
        assert _sums(merged(tmp_path)) == together
        assert _states(merged(tmp_path)) == [1, 1, 0, 1, 1, 1000]
