"""The process in front: it owns the listening socket, the signals, the embedded store and the workers.

It has no event loop and one thread. It wakes for signals (through a pipe), for words of a worker, and ten times a
second to look after its children. What it promises:

* SIGTERM: workers say that they are not ready and go on serving for `drain_delay_s`; then nothing new is accepted,
  what runs has `drain_s` to finish, and the exit status is 0. SIGINT leaves out the delay, and so does a second
  signal during it; the next one ends everything at once.
* SIGHUP changes nothing, and says so.
* A worker that dies is replaced, unless it dies again and again before it ever served: then so does the supervisor.
* The store outlives the workers, and nobody outlives the supervisor, `kill -9` included.
"""

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from time import monotonic

from proxy.config import FAMILIAR_VARIABLES, PREFIX
from proxy.embedded import EmbeddedStore
from proxy.lifeline import die_with_parent
from proxy.settings import Server, Settings
from proxy.worker import CANNOT_SERVE, DRAIN, READY, STOP

TICK_S = 0.1
BACKLOG = 2048
KILL_GRACE_S = 5.0
"""After `drain_s`, for the last words."""

MAX_FAILED_STARTS = 3

log = logging.getLogger(__name__)


class ListenError(Exception):
    """The address cannot be listened on; the message says why and what to do."""


def listen(server: Server) -> socket.socket:
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


def _why_not(error: OSError, server: Server) -> str:
    taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
    choose = "another port with --port" if taken else "another address with --host"
    return f"cannot listen on {_joined(server.host, server.port)}: {error.strerror}; choose {choose}"


class _WorkerProcess:
    """A worker as its supervisor sees it."""

    def __init__(self, listener: socket.socket, settings: Settings, embedded_url: str | None) -> None:
        self.channel, theirs = Pipe()
        self.ready = False
        with theirs:
            fds = (listener.fileno(), theirs.fileno())
            self.process = subprocess.Popen(  # noqa: S603 -- our own module, no shell
                [sys.executable, *_path_options(), "-m", "proxy.worker", *map(str, fds)],
                stdin=subprocess.DEVNULL,
                env=_environment_without_settings(),
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C in a terminal is the supervisor's to handle
                preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 -- no threads here
            )
        self.say((settings, embedded_url))

    def say(self, word: object) -> None:
        with contextlib.suppress(OSError):  # it is dead, and about to be noticed
            self.channel.send(word)

    def hear(self) -> bool:
        """Whether it has just said that it serves."""
        with contextlib.suppress(EOFError, OSError):
            if self.channel.poll() and self.channel.recv() == READY:
                self.ready = True
                return True
        return False

    def end(self) -> None:
        """By force if it still runs. Idempotent."""
        self.process.kill()
        self.process.wait()
        self.channel.close()


def _path_options() -> list[str]:
    """`-m` looks into the current folder first. A worker does so only where this process did: see `python -P`."""
    return [] if sys.path[0] == os.getcwd() else ["-P"]  # noqa: PTH109 -- compared as Python itself made it


def _environment_without_settings() -> dict[str, str]:
    """The settings go through the channel; a secret among them has no business in an environment."""
    return {k: v for k, v in os.environ.items() if not k.startswith(PREFIX) and k not in FAMILIAR_VARIABLES}


class Supervisor:
    """Runs one gateway until it is told to stop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._listener = listen(settings.server)
        self._url = _url_of(self._listener)
        self._store = EmbeddedStore(settings.store.data_dir) if settings.store.url is None else None
        self._worker: _WorkerProcess
        """From the first on there is always one: a dead one until the next has begun."""
        self._failed_starts = 0
        self._drain_until: float | None = None
        self._stop_by: float | None = None

    def run(self) -> int:
        """The exit status. Raises `EmbeddedStoreError` if there is no store to begin with."""
        with self._listener, _signals() as signals, self._store_running():
            self._begin_to_listen()  # only now: until here nobody could be answered
            self._start_worker()
            try:
                return self._watch(signals)
            finally:
                self._worker.end()

    def _begin_to_listen(self) -> None:
        try:
            self._listener.listen(BACKLOG)
        except OSError as error:  # somebody else was faster
            raise ListenError(_why_not(error, self._settings.server)) from None

    @contextlib.contextmanager
    def _store_running(self) -> Iterator[None]:
        if self._store is None:
            yield
            return
        self._store.start()
        try:
            yield
        finally:
            self._store.stop()

    def _watch(self, signals: "_Signals") -> int:
        while True:
            ready = [signals.wakeup]
            if not self._worker.ready:
                ready.append(self._worker.channel.fileno())
            select.select(ready, [], [], TICK_S)
            for number in signals.received():
                self._obey(number)
            self._advance_drain()
            if self._store is not None and (news := self._store.poll()) is not None:
                log.error("%s", news)
            if (status := self._look_after_worker()) is not None:
                return status

    def _obey(self, number: int) -> None:
        """A first signal drains, a second one stops, a third one ends; SIGHUP is told that nothing comes of it."""
        if number == signal.SIGHUP:
            log.warning("SIGHUP: settings are read at the start alone; restart the gateway to change them")
            return
        now = monotonic()
        if self._stop_by is not None:
            self._stop_by = now
        elif self._drain_until is not None or number == signal.SIGINT:
            self._drain_until = now
        else:
            self._drain_until = now + self._settings.server.drain_delay_s
        log.info("%s: shutting down", signal.Signals(number).name)
        self._worker.say(DRAIN)

    def _advance_drain(self) -> None:
        now = monotonic()
        if self._drain_until is not None and self._stop_by is None and now >= self._drain_until:
            self._stop_by = now + self._settings.server.drain_s + KILL_GRACE_S
            self._listener.close()
            self._worker.say(STOP)

    def _start_worker(self) -> None:
        embedded_url = None if self._store is None else self._store.url
        self._worker = _WorkerProcess(self._listener, self._settings, embedded_url)

    def _look_after_worker(self) -> int | None:
        """Replaces a dead worker; the exit status once there is to be none."""
        worker = self._worker
        if not worker.ready and worker.hear():
            self._failed_starts = 0
            log.info("serving on %s", self._url)
        status = worker.process.poll()
        if status is None:
            return self._give_up_late_worker()
        worker.end()
        if self._drain_until is not None:
            return 0 if status == 0 else 1
        return self._replace(worker, status)

    def _give_up_late_worker(self) -> int | None:
        if self._stop_by is None or monotonic() < self._stop_by:
            return None
        log.error("the worker did not finish in time: ended")
        return 1

    def _replace(self, worker: _WorkerProcess, status: int) -> int | None:
        if status == CANNOT_SERVE:
            return 1
        self._failed_starts += not worker.ready
        if self._failed_starts >= MAX_FAILED_STARTS:
            log.error("the worker died %d times before it served (status %d): giving up", self._failed_starts, status)
            return 1
        log.error("the worker died (status %d): starting another", status)
        self._start_worker()
        return None


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
