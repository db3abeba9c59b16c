"""The process in front: it owns the listening socket, the signals, the embedded stores and the workers.

It has no event loop, and one thread beside that which writes log lines. It wakes for signals (through a pipe), for
words of a worker, and ten times a second to look after its children. What it promises:

* SIGTERM: workers say that they are not ready and go on serving for `drain_delay_s`; then nothing new is accepted,
  what runs has `drain_s` to finish, and the exit status is 0. SIGINT leaves out the delay, and so does a second
  signal during it; the next one ends everything at once.
* SIGHUP, and a change of the config or of a secret's file, reload what can be reloaded; see `proxy.settings.reload`.
* Workers that die are replaced; see `proxy.processes.workers`.
* The stores outlive the workers, and nobody outlives the supervisor, `kill -9` included.
"""

import contextlib
import errno
import logging
import os
import select
import signal
import socket
from collections.abc import Iterator
from time import monotonic

from proxy.embedded.stores import EmbeddedStores
from proxy.gateway.in_flight import ARRIVING_REQUEST_BYTES, MAX_ARRIVING_BYTES, MAX_IN_FLIGHT
from proxy.processes.messages import DRAIN, STOP
from proxy.processes.workers import WorkerContext, WorkerPool
from proxy.settings.loader import Source
from proxy.settings.reload import Reloader
from proxy.settings.schema import ServerSettings, Settings
from proxy.store.access import MAX_CONNECTIONS, Role
from proxy.telemetry.descriptors import raise_limit
from proxy.telemetry.metrics_files import metrics_files

TICK_S = 0.1
BACKLOG = 2048
KILL_GRACE_S = 5.0
"""After `drain_s`, for the last words."""

OTHER_DESCRIPTORS = 100
"""For the worker's own files, look-ups of names, and clients that are connected and do not ask."""


log = logging.getLogger(__name__)


class ListenError(Exception):
    """The address cannot be listened on; the message says why and what to do."""


def listen(server: ServerSettings) -> socket.socket:
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
            raise ListenError(_why_not(error, server)) from None
        undo.pop_all()
        return listener


def _why_not(error: OSError, server: ServerSettings) -> str:
    taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
    choose = "another port with --port" if taken else "another address with --host"
    return f"cannot listen on {_joined(server.host, server.port)}: {error.strerror}; choose {choose}"


def _embedded_roles(settings: Settings) -> list[Role]:
    """The stores that no setting names. A price book without a URL of its own is kept where the ledger is named."""
    if settings.store.url is not None:
        return []
    return ["ledger", "price-book"] if settings.cache.url is None else ["ledger"]


class Supervisor:
    """Runs one gateway until it is told to stop."""

    def __init__(self, settings: Settings, source: Source) -> None:
        self._settings = settings
        self._reloader = Reloader(source, settings)
        self._listener = listen(settings.server)
        self._stores = EmbeddedStores(settings.store.data_dir, _embedded_roles(settings))
        self._workforce: WorkerPool
        self._drain_until: float | None = None
        self._stop_by: float | None = None

    def run(self) -> int:
        """The exit status. Raises `EmbeddedStoreError`, `NoMetricsFileError` if it cannot begin."""
        if (warning := descriptor_warning(raise_limit(), self._settings)) is not None:
            log.warning("%s", warning)
        workers = self._settings.server.workers
        with self._listener, _signals() as signals, metrics_files(workers) as metrics_fds, self._stores_running():
            self._begin_to_listen()  # only now: until here nobody could be answered
            context = WorkerContext(self._listener, _url_of(self._listener), self._stores.urls, metrics_fds)
            self._workforce = WorkerPool(self._settings, context)
            try:
                return self._watch(signals)
            finally:
                self._workforce.end()

    def _begin_to_listen(self) -> None:
        try:
            self._listener.listen(BACKLOG)
        except OSError as error:  # somebody else was faster
            raise ListenError(_why_not(error, self._settings.server)) from None

    @contextlib.contextmanager
    def _stores_running(self) -> Iterator[None]:
        self._stores.start()
        try:
            yield
        finally:
            self._stores.stop()

    def _watch(self, signals: "_Signals") -> int:
        while True:
            select.select([signals.wakeup, *self._workforce.channels()], [], [], TICK_S)
            for number in signals.received():
                self._obey(number)
            self._advance_drain()
            if self._reloader.is_due():
                self._reload()
            for news in self._stores.poll():
                log.error("%s", news)
            if (status := self._workforce.look_after()) is not None:
                return status
            if self._stop_by is not None and monotonic() >= self._stop_by:
                log.error("not all workers finished in time: ended")
                return 1

    def _obey(self, number: int) -> None:
        """A first signal drains, a second one stops, a third one ends; SIGHUP reloads."""
        if number == signal.SIGHUP:
            self._reload()
            return
        now = monotonic()
        if self._stop_by is not None:
            self._stop_by = now
        elif self._drain_until is not None or number == signal.SIGINT:
            self._drain_until = now
        else:
            self._drain_until = now + self._settings.server.drain_delay_s
        log.info("%s: shutting down", signal.Signals(number).name)
        self._workforce.leave()
        self._workforce.say(DRAIN)

    def _reload(self) -> None:
        settings = self._reloader.reload()
        if settings is None:
            self._workforce.reload_failed()
        else:
            self._workforce.reload(settings)

    def _advance_drain(self) -> None:
        now = monotonic()
        if self._drain_until is not None and self._stop_by is None and now >= self._drain_until:
            self._stop_by = now + self._settings.server.drain_s + KILL_GRACE_S
            self._listener.close()
            self._workforce.say(STOP)


def descriptor_warning(limit: int, settings: Settings) -> str | None:
    """What is to be said if a process may have fewer file descriptors than a busy worker needs."""
    clients = MAX_IN_FLIGHT + MAX_ARRIVING_BYTES // ARRIVING_REQUEST_BYTES
    upstream, stores = settings.upstream.max_connections, 2 * MAX_CONNECTIONS
    needed = clients + upstream + stores + OTHER_DESCRIPTORS
    if limit >= needed:
        return None
    return (
        f"a process may have only {limit} file descriptors here, and a busy worker needs {needed}: "
        f"{clients} for clients, {upstream} for RenderNet, {stores} for the stores, {OTHER_DESCRIPTORS} for the "
        f"rest. Raise the limit: ulimit -n {needed}, or LimitNOFILE={needed} in the systemd unit"
    )


class _Signals:
    """SIGTERM and SIGINT as something to wait for; SIGCHLD only wakes."""

    def __init__(self, wakeup: int) -> None:
        self.wakeup = wakeup

    def received(self) -> Iterator[int]:
        with contextlib.suppress(BlockingIOError):
            yield from (number for number in os.read(self.wakeup, 4096) if number != signal.SIGCHLD)


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    before_fd = signal.set_wakeup_fd(writer)
    try:
        yield _Signals(reader)
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{_joined(host, port)}"


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
