"""A worker process: one event loop and one application, on a socket that the supervisor owns.

Run as `python -m proxy.processes.worker <listener fd> <channel fd> <metrics fd> [<metrics fd of another worker>...]`.

* The first message has the settings and the URLs of the embedded stores. A worker that starts with the gateway imports
  its modules while the stores start, and then gets it. Later messages are new settings and `proxy.processes.messages`.
* When the channel closes, the supervisor is dead, and the worker exits.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from multiprocessing.connection import Connection
from time import monotonic

import uvloop
from starlette.applications import Starlette

from proxy.app import build
from proxy.gateway.in_flight import InFlightTracker
from proxy.http.server import Server
from proxy.open_stores import startup_errors
from proxy.processes.messages import CANNOT_SERVE, READY, RELOAD_FAILED, STOP
from proxy.settings.schema import Settings
from proxy.store.access import Role
from proxy.telemetry import logs
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.multiprocess import SharedValues

ORPHAN_GRACE_S = 2.0
"""For an orderly exit after the supervisor's death; then the worker ends itself."""

GC_THRESHOLD = 10_000
"""New objects before a collection of the youngest generation; Python's default is 700. Few objects here are in cycles,
and a collection stops the event loop."""

log = logging.getLogger(__name__)


class Worker:
    """`run` makes the application and its server: what they need comes through the channel."""

    def __init__(self, listener: socket.socket, channel: Connection, shared: SharedValues) -> None:
        self._listener = listener
        self._channel = channel
        self._shared = shared
        self._tracker = InFlightTracker()
        self._app: Starlette
        self._metrics: Metrics
        self._server: Server
        self._drain_s: float

    def run(self) -> int:
        """Serves until it is told to stop. Returns the process's exit status."""
        try:
            settings, embedded_urls = self._channel.recv()
        except EOFError:  # the supervisor ended before it could start the stores
            return 1
        log_writer = logs.configure(settings.log.level, settings.log.format)
        self._shared.install()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._serve(settings, embedded_urls, log_writer))

    async def _serve(self, settings: Settings, embedded_urls: dict[Role, str], log_writer: logs.Writer) -> int:
        if (reason := await startup_errors(settings, embedded_urls)) is not None:
            log.error("cannot serve: %s", reason)
            return CANNOT_SERVE
        self._drain_s = settings.server.drain_s
        self._metrics = Metrics(settings.teams, settings.accounts, self._shared)
        self._metrics.take_dropped_log_lines = log_writer.take_dropped
        self._app = build(settings, embedded_urls, self._tracker, self._metrics)
        head_timeout_s = settings.server.head_timeout_s
        self._server = Server(self._app, head_timeout_s=head_timeout_s, drain_s=self._drain_s, announce=self._announce)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel.fileno(), self._receive)
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        await self._server.serve([self._listener])
        loop.remove_reader(self._channel.fileno())
        return 0

    def _announce(self) -> None:
        """Reports that this worker accepts requests. Excludes all objects created so far from garbage collection."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        self._channel.send(READY)

    def _receive(self) -> None:
        try:
            message = self._channel.recv()
        except (EOFError, OSError):
            self._stop_as_orphan()
            return
        if message == RELOAD_FAILED:
            self._metrics.config_last_reload_successful.set(False)
        elif isinstance(message, Settings):
            self._app.state.reload(message)
            self._metrics.config_last_reload_successful.set(True)
        elif message == STOP:
            self._stop()
        else:
            self._tracker.draining = True

    def _stop(self) -> None:
        self._tracker.draining = True
        self._tracker.stop_deadline = monotonic() + self._drain_s
        self._server.should_exit = True

    def _stop_as_orphan(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._channel.fileno())
        log.error("the supervisor has died: stopping")
        self._server.should_exit = self._server.force_exit = True
        loop.call_later(ORPHAN_GRACE_S, os._exit, 1)


def main() -> None:
    listener_fd, channel_fd, metrics_fd, *others = map(int, sys.argv[1:])
    with socket.socket(fileno=listener_fd) as listener, Connection(channel_fd) as channel:
        sys.exit(Worker(listener, channel, SharedValues(metrics_fd, others)).run())


if __name__ == "__main__":
    main()
