"""Runs the demo: the real gateway, a simulated RenderNet and three teams, on this machine, in one temporary folder.

* The gateway is `serve` as a child process, with a config file that users may read as an example. Environment variables
  that could change its settings are removed.
* One asyncio task does everything else. SIGINT, SIGTERM and a closed terminal cancel it once. It then closes what it
  has opened: traffic, gateway, simulated RenderNet, folder.
* If the demo is killed with -9, the gateway ends too; the folder is not removed.
* The folder is locked, so that systemd-tmpfiles does not clean it during a long demo.
* Commands are printed without line breaks or colours, so that they can be pasted.
"""

import asyncio
import os
import re
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Final
from zoneinfo import ZoneInfo

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from proxy.auth import new_token
from proxy.demo.past_usage import DAYS, put_past_usage
from proxy.demo.setup import (
    API_KEY,
    HOST,
    TEAMS,
    DemoEnvironment,
    config_text,
    environment,
    introduction,
    last_errors,
    scrape_config_text,
)
from proxy.demo.simulator import Responder, Simulator, busy, chunked, error_in_200, html_page, server_error
from proxy.demo.traffic import QUERY, TIMEOUT_S, Traffic, TrafficTotals
from proxy.embedded.child import die_with_parent
from proxy.embedded.locks import lock_dir
from proxy.embedded.stores import running_url
from proxy.http.server import Server
from proxy.quota.counters import LedgerKeys
from proxy.telemetry.descriptors import raise_limit

LATENCY_S: Final = (0.06, 0.25)
BALANCE: Final = 10_000
SPEND_EVERY: Final = 3
FAULTS: Final[Mapping[Responder, float]] = {
    server_error: 0.04,
    busy: 0.03,  # without Retry-After, because a pause would hold for pasted commands too
    error_in_200: 0.04,
    chunked: 0.06,
    html_page: 0.03,
}
"""Probabilities, for requests of the live traffic only."""

READY_TIMEOUT_S: Final = 15.0
STOP_TIMEOUT_S: Final = 5.0
POLL_S: Final = 0.05
REFRESH_S: Final = 0.25
CANNOT_START: Final = 2
GATEWAY_DIED: Final = 1

_ANNOUNCEMENT: Final = re.compile(r"\bserving on (http://[^\s\"]+)")


class DemoError(Exception):
    """The demo cannot start or go on; the message is one line that says why."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def run(*, port: int, traffic: bool, prometheus: bool) -> int:
    """Runs until Ctrl-C or SIGTERM. Returns the exit status.

    port: the gateway's; 0: any free one. prometheus: whether to write a Prometheus configuration.
    """
    raise_limit()
    console = Console()
    totals = TrafficTotals()
    try:
        with suppress(asyncio.CancelledError):
            asyncio.run(_run(console, totals, port=port, traffic=traffic, prometheus=prometheus))
    except DemoError as error:
        click.echo(f"estimate-proxy: {error}", err=True)
        return error.exit_status
    with suppress(OSError):  # the demo also ends when its terminal is closed
        _print(console, f"The demo has ended; its files are gone. {totals if traffic else ''}".rstrip())
    return 0


async def _run(console: Console, totals: TrafficTotals, *, port: int, traffic: bool, prometheus: bool) -> None:
    """Starts everything, then waits until a signal cancels it. Raises `DemoError`."""
    _let_signals_cancel()
    with TemporaryDirectory(prefix="estimate-proxy-demo-", ignore_cleanup_errors=True) as folder:
        lock_dir(Path(folder))  # until this process ends
        async with _simulated_rendernet() as upstream_url:
            demo = DemoEnvironment(Path(folder), upstream_url, {team: new_token() for team in TEAMS}, new_token())
            demo.config.write_text(config_text(demo, port=port), encoding="utf-8")
            async with _gateway(demo) as gateway:
                url = await _wait_until_ready(gateway, demo.log)
                if traffic:
                    ledger_url = running_url(demo.data_dir, role="ledger")
                    put_past_usage(ledger_url, LedgerKeys("default"), int(time.time()), ZoneInfo("UTC"))
                if prometheus:
                    demo.scrape_config.write_text(scrape_config_text(url), encoding="utf-8")
                _introduce(console, demo, url, traffic=traffic)
                if traffic:
                    teams = Traffic(url, list(demo.tokens.values()), totals, Random())  # noqa: S311 -- no secret
                    await _run_traffic(gateway, teams, console, totals)
                status = await gateway.wait()
                errors = _errors_in(demo.log) or "its log does not say why"
                raise DemoError(f"the gateway ended unexpectedly, with status {status}: {errors}", GATEWAY_DIED)


def _introduce(console: Console, demo: DemoEnvironment, url: str, *, traffic: bool) -> None:
    for heading, text in introduction(demo, url, past_days=DAYS if traffic else 0):
        _print(console, heading, "bold")
        _print(console, text + "\n")
    sending = "Three teams are sending requests now. " if traffic else ""
    _print(console, f"{sending}Press Ctrl-C to end the demo.", "bold")


async def _run_traffic(gateway: Process, teams: Traffic, console: Console, totals: TrafficTotals) -> None:
    """Sends traffic and shows a live line about it until the gateway ends."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(teams.run()), group.create_task(_show(console, totals))]
        await gateway.wait()
        for task in tasks:
            task.cancel()


async def _show(console: Console, totals: TrafficTotals) -> None:
    """Shows the totals in one live line, if the output is a terminal."""
    if not console.is_terminal:
        return
    line = Live(console=console, get_renderable=lambda: Text(str(totals)), auto_refresh=False, transient=True)
    with suppress(OSError), line:
        while True:
            line.refresh()
            await asyncio.sleep(REFRESH_S)


def _print(console: Console, line: str, style: str | None = None) -> None:
    """Prints a line without breaking it, even on a narrow terminal."""
    console.out(line, style=style, highlight=False)


def _let_signals_cancel() -> None:
    """Cancels the current task at the first signal. Later signals are ignored, so that the clean-up can finish."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()

    def cancel_once() -> None:
        if task is not None and not task.cancelling():
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, cancel_once)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        loop.add_signal_handler(signal.SIGHUP, cancel_once)


@asynccontextmanager
async def _simulated_rendernet() -> AsyncIterator[str]:
    """Runs a simulated RenderNet on a free port of this machine. Yields its URL."""
    simulator = Simulator(
        api_key=API_KEY,
        balance=BALANCE,
        spend_every=SPEND_EVERY,
        latency_s=LATENCY_S,
        faults=FAULTS,
        seed=time.time_ns(),
    )
    simulator.is_spared = lambda received: received.query != QUERY.encode()
    server = Server(simulator.app, head_timeout_s=TIMEOUT_S, drain_s=1, announce=lambda: None)
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://{HOST}:{port}"
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def _gateway(demo: DemoEnvironment) -> AsyncIterator[Process]:
    """Runs the gateway as a child process; ends it on exit."""
    with demo.log.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "serve", "--config", demo.config),
            cwd=Path(__file__).parents[2],  # `-m` looks here first, so a `proxy` in the user's folder is not run
            stdin=DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(os.environ, demo.folder),
            start_new_session=True,  # Ctrl-C in a terminal reaches only the demo, which then ends the gateway
            preexec_fn=die_with_parent(os.getpid()),
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _wait_until_ready(gateway: Process, log: Path) -> str:
    """Waits until the gateway serves and returns its URL. Raises `DemoError` if it ends or takes too long.

    The URL is read from the gateway's log: if the port is taken, another program could answer on it.
    """
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while gateway.returncode is None:
                if (url := _announced_url(log)) is not None:
                    return url
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise DemoError(f"the gateway was not ready within {READY_TIMEOUT_S:g} s", CANNOT_START) from None
    raise DemoError(_errors_in(log) or f"the gateway ended with status {gateway.returncode}", CANNOT_START)


def _announced_url(log: Path) -> str | None:
    announcement = _ANNOUNCEMENT.search(log.read_text("utf-8"))
    return None if announcement is None else announcement[1]


def _errors_in(log: Path) -> str:
    return last_errors(log.read_text("utf-8"))
