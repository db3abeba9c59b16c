"""A gateway whose standard error is not read or cannot be written: it keeps serving, and counts lost lines."""

import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx2
import psutil
import pytest

from gateway_fixture import DESIGN, PATH
from gateway_process import SOON_S, START_S, GatewayProcess, GatewayRunner, Tree, address_of, kill
from prometheus import Scraped, scrape
from scripted_simulator import Simulator
from serving import free_port, wait_until

OPEN: dict[str, Any] = {
    "metrics": {"public": True},
    "team_defaults": {"rate": {"per_s": 100_000, "burst": 1_000_000}},
}
ENDED = b'"error":{}}'
"""The end of each answer."""

PIPE_LINES = 2**16 // 100
"""More than the size of a pipe."""

FEW_LINES = 1000
"""The gateway keeps so many lines that nobody reads. By default it keeps 10,000, which take seconds to ask for."""

AT_ONCE = 100
IDLE_S = 0.6


class Reader:
    """Copies a pipe to a gateway's log, unless it is stalled. `stderr` is the gateway's end."""

    def __init__(self) -> None:
        self._pipe, self.stderr = os.pipe()
        self._reads, self._pauses = threading.Event(), threading.Event()
        self._reads.set()
        self._leaves = False
        self._thread: threading.Thread | None = None

    def follow(self, log: Path) -> None:
        os.close(self.stderr)
        self._thread = threading.Thread(target=self._copy, args=(log,))
        self._thread.start()

    def stall(self) -> None:
        """Stops reading; returns when it has stopped."""
        self._reads.clear()
        assert self._pauses.wait(SOON_S)

    def go_on(self) -> None:
        self._reads.set()

    def close_pipe(self) -> None:
        """Closes the pipe without reading the rest."""
        self._leaves = True
        self.finish()

    def finish(self) -> None:
        """Waits until the gateway has closed its end, and everything is read."""
        self.go_on()
        if self._thread is not None:
            self._thread.join()

    def _copy(self, log: Path) -> None:
        with log.open("ab", buffering=0) as stream:
            while not self._leaves:
                if not self._reads.is_set():
                    self._pauses.set()
                    self._reads.wait()
                elif select.select([self._pipe], [], [], 0.05)[0]:
                    text = os.read(self._pipe, 2**16)
                    if not text:
                        break
                    stream.write(text)
        os.close(self._pipe)


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def served(runner: GatewayRunner, reader: Reader, simulator: Simulator) -> Iterator[GatewayProcess]:
    assert simulator.calls == 0
    few = runner.patching({"proxy.telemetry.log_writer.MAX_LINES": FEW_LINES})
    found = runner.begin(stderr=reader.stderr, env=few, **OPEN)
    reader.follow(found.log)
    found.wait_until_serving()
    yield found
    found.end()
    reader.finish()


def ask_many(served: GatewayProcess, count: int) -> None:
    """Repeats a request on one connection, and asserts that each answer is a 200."""
    body = b'[{"model":"Flux"}]'
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nx-api-key: {DESIGN}\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(address_of(served.url), timeout=SOON_S) as connection:
        for _ in range(count // AT_ONCE):
            connection.sendall(AT_ONCE * (head.encode() + body))
            answers = b""
            while answers.count(ENDED) < AT_ONCE:
                answers += connection.recv(2**16)
            assert answers.count(b"HTTP/1.1 200 ") == AT_ONCE


def scraped(served: GatewayProcess) -> Scraped:
    with served.client() as client:
        return scrape(client)


def dropped(found: Scraped) -> int:
    count = found.value("log_lines_dropped_total")
    assert count is not None
    return int(count)


def answers(served: GatewayProcess) -> bool:
    with suppress(httpx2.TransportError):
        return served.ask().status_code == 200
    return False


def requests_in(served: GatewayProcess) -> list[Tree]:
    """Returns the lines of requests."""
    return [line for line in served.lines() if line["message"] == "request"]


def test_a_stalled_reader_stops_nothing_and_later_gets_the_number_of_lost_lines(
    served: GatewayProcess, reader: Reader
) -> None:
    reader.stall()
    asked = FEW_LINES + 2000
    ask_many(served, asked)
    assert served.get("/healthz").status_code == 200
    assert dropped(scraped(served)) > 0
    reader.go_on()
    served.wait_for_message("log lines are missing here")
    missing = dropped(scraped(served))
    # two scrapes have lines too; the last one may be written later than the supervisor's about its end
    wait_until(lambda: len(requests_in(served)) + missing == asked + 2)
    assert served.stop() == 0
    reader.finish()
    lines = served.lines()
    (gap,) = (line for line in lines if "missing here" in line["message"])
    assert (gap["level"], gap["lines"]) == ("error", missing)
    assert len(requests_in(served)) + missing == asked + 2
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_sigterm_ends_a_gateway_with_a_stalled_reader(served: GatewayProcess, reader: Reader) -> None:
    reader.stall()
    ask_many(served, PIPE_LINES)
    assert served.stop() == 0


def test_dead_workers_and_stores_are_replaced_while_the_reader_stalls(served: GatewayProcess, reader: Reader) -> None:
    reader.stall()
    ask_many(served, PIPE_LINES)
    kill(served.worker())
    wait_until(lambda: answers(served), within_s=START_S)
    kill(served.store("ledger"))
    wait_until(lambda: answers(served), within_s=START_S)
    reader.go_on()
    served.wait_for_message("died (status -9): starting another")
    served.wait_for_message("embedded store ledger was killed by signal 9")


def test_a_line_is_written_at_once(served: GatewayProcess) -> None:
    def took_s(request_id: str) -> float:
        served.ask(x_request_id=request_id)
        began = monotonic()
        wait_until(lambda: any(line.get("request_id") == request_id for line in served.lines()))
        return monotonic() - began

    assert min(map(took_s, "abcde")) < 0.1


@contextmanager
def unreadable(runner: GatewayRunner, how: str) -> Iterator[GatewayProcess]:
    """Starts a gateway whose standard error cannot be written, from the start or once it serves."""
    if how == "a pipe that its reader has left":
        reader = Reader()
        served = runner.begin(stderr=reader.stderr, **OPEN)
        reader.follow(served.log)
        served.wait_until_serving()
        reader.close_pipe()
        yield served
        reader.finish()
        return
    port = str(free_port())
    if how == "a full disk":
        full = os.open("/dev/full", os.O_WRONLY)
        served = runner.begin("--port", port, stderr=full, **OPEN)
        os.close(full)
    else:
        program = ("sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-m", "proxy")
        served = runner.begin("--port", port, command=program, **OPEN)
    served.url = f"http://127.0.0.1:{port}"
    wait_until(lambda: answers(served), within_s=START_S)
    yield served


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize(
    ("how", "counts"),
    [("a pipe that its reader has left", True), ("a full disk", True), ("closed", False)],
)
def test_a_gateway_that_cannot_write_its_log_keeps_serving(runner: GatewayRunner, how: str, *, counts: bool) -> None:
    with unreadable(runner, how) as served:
        ask_many(served, PIPE_LINES)
        wait_until(lambda: (dropped(scraped(served)) > 0) == counts)
        processes = [psutil.Process(served.process.pid), served.worker()]
        before_s = [sum(process.cpu_times()[:2]) for process in processes]
        sleep(IDLE_S)
        spent_s = [sum(process.cpu_times()[:2]) - before for process, before in zip(processes, before_s, strict=True)]
        assert max(spent_s) < IDLE_S / 3, "it keeps trying"
        assert served.stop() == 0
