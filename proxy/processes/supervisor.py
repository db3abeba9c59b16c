"""The supervisor: the process that owns the listening socket, the signals, the embedded stores and the workers.

It has no event loop; its only other thread writes log lines. It wakes up for signals (through a pipe), for messages
from workers, and ten times per second to check its child processes. It guarantees:

* SIGTERM: workers report "not ready" and keep serving for `drain_delay_s`. Then no new connection is accepted, running
  requests have `drain_s` to finish, and the exit status is 0. SIGINT skips the delay, and so does a second signal
  during the delay. The next signal ends everything at once.
* SIGHUP, and a change of the config or of a secret's file, reload what can be reloaded; see `proxy.settings.reload`.
* Workers that die are replaced; see `proxy.processes.workers`.
* The stores outlive the workers, and no child outlives the supervisor, not even after `kill -9`.

It stays in memory as long as the gateway, so it does not import the application.
"""

import contextlib
import errno
import logging
import os
import select
import signal
import socket
from time import monotonic

from proxy.embedded.stores import EmbeddedStores
from proxy.gateway.in_flight import ARRIVING_REQUEST_BYTES, MAX_ARRIVING_BYTES, MAX_IN_FLIGHT
from proxy.processes.messages import DRAIN, STOP
from proxy.processes.workers import WorkerContext, WorkerPool
from proxy.settings.loader import Source
from proxy.settings.reload import Reloader
from proxy.settings.schema import ServerSettings, Settings
from proxy.store.access import MAX_CONNECTIONS
from proxy.telemetry.descriptors import raise_limit
from proxy.telemetry.metrics_files import metrics_files

TICK_S = 0.1
BACKLOG = 2048
KILL_GRACE_S = 5.0
"""After `drain_s`, for workers to close what they have open."""

OTHER_DESCRIPTORS = 100
"""For the worker's own files, DNS look-ups and idle client connections."""

log = logging.getLogger(__name__)


class ListenError(Exception):
    """The gateway cannot listen on the address; the message says why and what to do."""


def bind(server: ServerSettings) -> socket.socket:
    """The listening socket, bound. Raises `ListenError`."""
    with contextlib.ExitStack() as undo:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ListenError(_listen_error(error, server)) from None
        undo.pop_all()
        return listener


def _listen_error(error: OSError, server: ServerSettings) -> str:
    taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
    choose = "another port with --port" if taken else "another address with --host"
    return f"cannot listen on {_host_and_port(server.host, server.port)}: {error.strerror}; choose {choose}"


class Supervisor:
    """Runs one gateway until a signal stops it."""

    def __init__(self, settings: Settings, source: Source) -> None:
        self._settings = settings
        self._reloader = Reloader(source, settings)
        self._listener = bind(settings.server)
        self._stores = EmbeddedStores(settings.store.data_dir, settings.embedded_roles)
        self._workers: WorkerPool
        self._drain_until: float | None = None
        self._stop_deadline: float | None = None

    def run(self) -> int:
        """Returns the exit status. Raises `ListenError`, `EmbeddedStoreError` or `NoMetricsFileError`."""
        if (warning := descriptor_warning(raise_limit(), self._settings)) is not None:
            log.warning("%s", warning)
        signals = _signals_as_bytes()
        with (
            self._listener,
            metrics_files(self._settings.server.workers) as metrics_fds,
            contextlib.ExitStack() as undo,
        ):
            undo.callback(self._stores.stop)
            context = WorkerContext(self._listener, _url_of(self._listener), metrics_fds)
            self._workers = WorkerPool(self._settings, context)  # they import while the stores start
            undo.callback(self._workers.end)
            self._stores.start()
            self._listen()  # not earlier, so that clients do not wait for a gateway that fails to start
            self._workers.serve(self._stores.urls)
            return self._watch(signals)

    def _listen(self) -> None:
        try:
            self._listener.listen(BACKLOG)
        except OSError as error:  # another process has bound the address, and listens first
            raise ListenError(_listen_error(error, self._settings.server)) from None

    def _watch(self, signals: int) -> int:
        while True:
            select.select([signals, *self._workers.channels()], [], [], TICK_S)
            with contextlib.suppress(BlockingIOError):
                for number in os.read(signals, 4096):
                    self._handle(number)
            self._advance_drain()
            if self._reloader.is_due():
                self._reload()
            for line in self._stores.poll():
                log.error("%s", line)
            if (status := self._workers.check()) is not None:
                return status
            if self._stop_deadline is not None and monotonic() >= self._stop_deadline:
                log.error("not all workers finished in time: killing them")
                return 1

    def _handle(self, number: int) -> None:
        """The first SIGTERM drains, the second stops, the third kills; SIGINT stops; SIGHUP reloads.

        SIGCHLD has woken the supervisor up, and that is all: it checks its children in any case.
        """
        if number == signal.SIGCHLD:
            return
        if number == signal.SIGHUP:
            self._reload()
            return
        now = monotonic()
        if self._stop_deadline is not None:
            self._stop_deadline = now
        elif self._drain_until is not None or number == signal.SIGINT:
            self._drain_until = now
        else:
            self._drain_until = now + self._settings.server.drain_delay_s
        log.info("%s: shutting down", signal.Signals(number).name)
        self._workers.stop_restarting()
        self._workers.send(DRAIN)

    def _reload(self) -> None:
        settings = self._reloader.reload()
        if settings is None:
            self._workers.reload_failed()
        else:
            self._workers.reload(settings)

    def _advance_drain(self) -> None:
        now = monotonic()
        if self._drain_until is not None and self._stop_deadline is None and now >= self._drain_until:
            self._stop_deadline = now + self._settings.server.drain_s + KILL_GRACE_S
            self._listener.close()
            self._workers.send(STOP)


def descriptor_warning(limit: int, settings: Settings) -> str | None:
    """A line for the log if a process may have fewer file descriptors than a busy worker needs."""
    clients = MAX_IN_FLIGHT + MAX_ARRIVING_BYTES // ARRIVING_REQUEST_BYTES
    upstream, stores = settings.upstream.max_connections, 2 * MAX_CONNECTIONS
    needed = clients + upstream + stores + OTHER_DESCRIPTORS
    if limit >= needed:
        return None
    return (
        f"a process may have only {limit} file descriptors here, but a busy worker needs {needed}: "
        f"{clients} for clients, {upstream} for RenderNet, {stores} for the stores, {OTHER_DESCRIPTORS} for the "
        f"rest. Raise the limit: ulimit -n {needed}, or LimitNOFILE={needed} in the systemd unit"
    )


def _signals_as_bytes() -> int:
    """A descriptor from which each signal can be read as a byte, and that `select` can wait for.

    It stays open, and the handlers stay installed, until the process ends: a signal must not kill it on its way out.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return reader


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{_host_and_port(host, port)}"


def _host_and_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
