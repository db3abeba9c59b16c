"""The demo: the real gateway, a simulated RenderNet and three teams, all on this machine and in one temporary folder.

* The gateway is `serve` as a child process, with a config file that a user may read as an example. Of the environment
  it gets nothing that could change it.
* One asyncio task does everything else. SIGINT, SIGTERM and a closed terminal cancel it, once, and what was opened is
  closed on the way out: traffic, gateway, simulated RenderNet, folder.
* Killed with -9, the demo takes the gateway along; its folder stays behind.
* The folder is locked, so that systemd-tmpfiles does not clean it however long the demo runs.
* Commands are printed unwrapped and uncoloured: they are there to be pasted.
"""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Final

import click
import httpx2
import uvicorn
from rich.console import Console
from rich.live import Live
from rich.text import Text

from proxy.demo.setup import (
    API_KEY,
    HOST,
    TEAMS,
    DemoEnvironment,
    config_text,
    environment,
    introduction,
    last_errors,
    new_token,
    scrape_config_text,
)
from proxy.demo.simulator import Responder, Simulator, busy, chunked, error_in_200, html_page, server_error
from proxy.demo.traffic import QUERY, Tally, Traffic
from proxy.embedded.child import die_with_parent
from proxy.embedded.locks import locked_dir
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
    """The demo cannot run, or not go on; the message is one line that says why."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def run(*, port: int, traffic: bool, prometheus: bool) -> int:
    """Runs until Ctrl-C or SIGTERM; the exit status. `port` is the gateway's, 0 takes a free one.

    prometheus: whether to write a configuration for it.
    """
    raise_limit()
    console = Console()
    tally = Tally()
    try:
        asyncio.run(_until_told_to_stop(console, tally, port=port, traffic=traffic, prometheus=prometheus))
    except DemoError as error:
        click.echo(f"estimate-proxy: {error}", err=True)
        return error.exit_status
    with suppress(OSError):  # a closed terminal ends the demo too, and hears nothing any more
        _say(console, f"The demo has ended; its files are gone. {tally if traffic else ''}".rstrip())
    return 0


async def _until_told_to_stop(console: Console, tally: Tally, *, port: int, traffic: bool, prometheus: bool) -> None:
    _let_signals_cancel()
    with suppress(asyncio.CancelledError):
        await _play(console, tally, port=port, traffic=traffic, prometheus=prometheus)


async def _play(console: Console, tally: Tally, *, port: int, traffic: bool, prometheus: bool) -> None:
    """The whole demo: sets the stage, lets gateway and teams act; it never returns by itself. Raises `DemoError`."""
    with (
        TemporaryDirectory(prefix="estimate-proxy-demo-", ignore_cleanup_errors=True) as folder,
        locked_dir(Path(folder)),
    ):
        async with _simulated_rendernet() as upstream_url:
            stage = DemoEnvironment(Path(folder), upstream_url, {team: new_token() for team in TEAMS})
            stage.config.write_text(config_text(stage, port=port), encoding="utf-8")
            async with _gateway(stage) as gateway:
                url = await _ready(gateway, stage.log)
                if prometheus:
                    stage.scrape_config.write_text(scrape_config_text(url), encoding="utf-8")
                _introduce(console, stage, url, traffic=traffic)
                if traffic:
                    teams = Traffic(url, list(stage.tokens.values()), tally, Random())  # noqa: S311 -- no secret
                    await _perform(gateway, teams, console, tally)
                status = await _ended(gateway)
                errors = _errors_in(stage.log) or "it does not say why"
                raise DemoError(f"the gateway ended by itself, with status {status}: {errors}", GATEWAY_DIED)


def _introduce(console: Console, stage: DemoEnvironment, url: str, *, traffic: bool) -> None:
    for heading, text in introduction(stage, url):
        _say(console, heading, "bold")
        _say(console, text + "\n")
    _say(console, "The three teams are asking now. Ctrl-C ends it all." if traffic else "Ctrl-C ends it all.", "bold")


async def _perform(gateway: subprocess.Popen[bytes], teams: Traffic, console: Console, tally: Tally) -> None:
    """Traffic, and a live line about it, for as long as the gateway lives."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(teams.run()), group.create_task(_show(console, tally))]
        await _ended(gateway)
        for task in tasks:
            task.cancel()


async def _show(console: Console, tally: Tally) -> None:
    """The live line, on a terminal; for as long as there is one."""
    if not console.is_terminal:
        return
    line = Live(console=console, get_renderable=lambda: Text(str(tally)), auto_refresh=False, transient=True)
    with suppress(OSError), line:
        while True:
            line.refresh()
            await asyncio.sleep(REFRESH_S)


def _say(console: Console, line: str, style: str | None = None) -> None:
    """Prints a line as it is, however narrow the terminal."""
    console.out(line, style=style, highlight=False)


def _let_signals_cancel() -> None:
    """Cancels the current task at the first signal; a second one would only cut short the cleaning up."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()

    def cancel_once() -> None:
        if task is not None and not task.cancelling():
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, cancel_once)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        loop.add_signal_handler(signal.SIGHUP, cancel_once)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def _simulated_rendernet() -> AsyncIterator[str]:
    """A simulated RenderNet on a free port of this machine; yields its URL."""
    simulator = Simulator(
        api_key=API_KEY,
        balance=BALANCE,
        spend_every=SPEND_EVERY,
        latency_s=LATENCY_S,
        faults=FAULTS,
        seed=time.time_ns(),
    )
    simulator.spare(lambda received: received.query != QUERY.encode())
    config = uvicorn.Config(
        simulator.app, lifespan="off", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = _Server(config)
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://{HOST}:{port}"
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def _gateway(stage: DemoEnvironment) -> AsyncIterator[subprocess.Popen[bytes]]:
    """The gateway as a child process, ended on the way out."""
    process = _start(stage)
    try:
        yield process
    finally:
        process.terminate()
        try:
            await asyncio.wait_for(_ended(process), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            process.wait()


def _start(stage: DemoEnvironment) -> subprocess.Popen[bytes]:
    with stage.log.open("wb") as log:
        return subprocess.Popen(  # noqa: S603 -- our own module, no shell
            [sys.executable, "-m", "proxy", "serve", "--config", str(stage.config)],
            cwd=Path(__file__).parents[2],  # -m looks here first, and no user's folder has another `proxy`
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(os.environ, stage.folder),
            start_new_session=True,  # Ctrl-C in a terminal is for the demo, which then ends the gateway
            preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 -- no threads here
        )


async def _ended(process: subprocess.Popen[bytes]) -> int:
    while (status := process.poll()) is None:  # noqa: ASYNC110 -- a process sets no event
        await asyncio.sleep(POLL_S)
    return status


async def _ready(gateway: subprocess.Popen[bytes], log: Path) -> str:
    """The gateway's URL, once it serves there. Raises `DemoError` if it ends instead, or takes too long.

    It is the gateway itself that says where it serves: on a port that is taken, somebody else could say to be ready.
    """
    try:
        async with asyncio.timeout(READY_TIMEOUT_S), httpx2.AsyncClient(trust_env=False) as client:
            while gateway.poll() is None:
                url = _announced(log)
                if url is not None and await _is_ready(client, url):
                    return url
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise DemoError(f"the gateway was not ready within {READY_TIMEOUT_S:g} s", CANNOT_START) from None
    raise DemoError(_errors_in(log) or f"the gateway ended with status {gateway.returncode}", CANNOT_START)


def _announced(log: Path) -> str | None:
    announcement = _ANNOUNCEMENT.search(log.read_text("utf-8"))
    return None if announcement is None else announcement[1]


async def _is_ready(client: httpx2.AsyncClient, url: str) -> bool:
    with suppress(httpx2.TransportError):
        return (await client.get(f"{url}/readyz")).is_success
    return False


def _errors_in(log: Path) -> str:
    return last_errors(log.read_text("utf-8"))
