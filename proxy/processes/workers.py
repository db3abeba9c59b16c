"""The worker processes of one gateway: N on one socket, each replaced when it dies.

* A worker is restarted after a delay that grows with each quick death in a row; see `RestartBackoff`. A start that the
  system refuses (no process, no file descriptor) is repeated after the same delays.
* A worker that dies `MAX_FAILED_STARTS` times in a row before it served is not restarted, and the log says so. When
  the last one is given up, the gateway ends.
* All methods are called by one thread, and do not block.
"""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe

from proxy.embedded.child import RestartBackoff, die_with_parent
from proxy.processes.messages import CANNOT_SERVE, READY, RELOAD_FAILED
from proxy.settings.loader import without_settings
from proxy.settings.schema import Settings
from proxy.store.access import EmbeddedUrls
from proxy.telemetry.metrics_files import vacate

MAX_FAILED_STARTS = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What all workers share. `metrics_fds`: one file per worker, to which it writes its metrics."""

    listener: socket.socket
    url: str
    metrics_fds: Sequence[int]


class _WorkerProcess:
    """A worker process as its supervisor sees it."""

    def __init__(self, context: WorkerContext, metrics_fd: int) -> None:
        self.channel, theirs = Pipe()
        self.ready = False
        with theirs:
            others = (fd for fd in context.metrics_fds if fd != metrics_fd)
            fds = (context.listener.fileno(), theirs.fileno(), metrics_fd, *others)
            self.process = subprocess.Popen(  # noqa: S603 -- our own module, no shell
                [sys.executable, *_path_options(), "-m", "proxy.processes.worker", *map(str, fds)],
                stdin=subprocess.DEVNULL,
                env=without_settings(os.environ),  # secrets go through the channel, and do not stay in an environment
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C in a terminal is for the supervisor
                preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 -- needs no lock
            )

    def send(self, message: object) -> None:
        with suppress(OSError):  # it has died; the next check notices it
            self.channel.send(message)

    def has_become_ready(self) -> bool:
        """Whether it has reported, since the last call, that it accepts requests."""
        with suppress(EOFError, OSError):
            if not self.ready and self.channel.poll() and self.channel.recv() == READY:
                self.ready = True
                return True
        return False

    def end(self) -> None:
        """Kills it if it still runs. Idempotent."""
        self.process.kill()
        self.process.wait()
        self.channel.close()


@dataclass(slots=True)
class _Slot:
    """A place for one worker, with the history of its workers.

    worker: None before the first start, between a death and the next start, and after the last death.
    status: the exit status of the last worker that has ended.
    failed_starts: workers in a row that died before they served.
    """

    name: str
    metrics_fd: int
    worker: _WorkerProcess | None = None
    status: int | None = None
    given_up: bool = False
    failed_starts: int = 0
    backoff: RestartBackoff = field(default_factory=RestartBackoff)

    def record_death(self) -> str:
        """Records a death, or a start that failed. Returns when the next start is due, for the log."""
        delay_s = self.backoff.record_death()
        return f" in {delay_s:g} s" if delay_s else ""


class WorkerPool:
    """All workers of a gateway. `end` must be called.

    Their processes start at once and import the application. They serve once `serve` has been called.
    """

    def __init__(self, settings: Settings, context: WorkerContext) -> None:
        self._settings = settings
        self._context = context
        self._embedded_urls: EmbeddedUrls | None = None
        """None before `serve`."""
        self._reload_failed = False
        count = settings.server.workers
        names = ["the worker"] if count == 1 else [f"worker {number} of {count}" for number in range(1, count + 1)]
        self._slots = [_Slot(name, fd) for name, fd in zip(names, context.metrics_fds, strict=True)]
        self._stopping = False
        self.check()

    def serve(self, embedded_urls: EmbeddedUrls) -> None:
        """Sends the settings to the workers, those that are started later included."""
        self._embedded_urls = embedded_urls
        self.send((self._settings, embedded_urls))

    def channels(self) -> list[int]:
        """The descriptors on which workers will report that they are ready."""
        return [worker.channel.fileno() for worker in self._workers() if not worker.ready]

    def send(self, message: object) -> None:
        for worker in self._workers():
            worker.send(message)

    def reload(self, settings: Settings) -> None:
        """Applies new settings to all workers, those that are started later included."""
        self._settings, self._reload_failed = settings, False
        self.send(settings)

    def reload_failed(self) -> None:
        """Reports invalid new settings to all workers, those that are started later included."""
        self._reload_failed = True
        self.send(RELOAD_FAILED)

    def stop_restarting(self) -> None:
        """From now on no worker is replaced. An empty slot counts as stopped with status 0."""
        self._stopping = True
        for slot in self._slots:
            slot.status = 0 if slot.worker is None else None

    def check(self) -> int | None:
        """Reads readiness messages, reaps dead workers and starts those that are due.

        Returns the gateway's exit status once no worker is left, else None.
        """
        for slot in self._slots:
            self._check(slot)
        if any(slot.worker is not None or not (slot.given_up or self._stopping) for slot in self._slots):
            return None
        return 0 if self._stopping and all(slot.status == 0 for slot in self._slots) else 1

    def end(self) -> None:
        """Kills the workers that still run. Idempotent."""
        for worker in self._workers():
            worker.end()

    def _check(self, slot: _Slot) -> None:
        worker = slot.worker
        if worker is None:
            if not (slot.given_up or self._stopping) and slot.backoff.is_due():
                self._start(slot)
            return
        if worker.has_become_ready():
            slot.failed_starts = 0
            which = "" if len(self._slots) == 1 else f" ({slot.name})"
            log.info("serving on %s%s", self._context.url, which)
        status = worker.process.poll()
        if status is not None:
            self._reap(slot, worker, status)

    def _reap(self, slot: _Slot, worker: _WorkerProcess, status: int) -> None:
        """Decides whether a dead worker is replaced, and when."""
        worker.end()
        vacate(slot.metrics_fd)
        slot.worker, slot.status = None, status
        if self._stopping:
            return
        slot.failed_starts += not worker.ready
        if status == CANNOT_SERVE:  # the worker has logged the reason
            slot.given_up = True
        elif slot.failed_starts >= MAX_FAILED_STARTS:
            slot.given_up = True
            facts = (slot.name, slot.failed_starts, status)
            log.error("%s died %d times before it served (status %d): giving up", *facts)
        else:
            log.error("%s died (status %d): starting another%s", slot.name, status, slot.record_death())
            self._check(slot)

    def _start(self, slot: _Slot) -> None:
        """Starts a worker. If the system refuses, the start is tried again later."""
        slot.backoff.record_start()
        try:
            slot.worker = worker = _WorkerProcess(self._context, slot.metrics_fd)
        except OSError as error:
            delay = slot.record_death()
            log.error("%s cannot be started (%s): trying again%s", slot.name, error.strerror, delay)  # noqa: TRY400 -- no traceback needed
            return
        if self._embedded_urls is not None:
            worker.send((self._settings, self._embedded_urls))
            if self._reload_failed:
                worker.send(RELOAD_FAILED)

    def _workers(self) -> Iterator[_WorkerProcess]:
        return (slot.worker for slot in self._slots if slot.worker is not None)


def _path_options() -> list[str]:
    """`-P`, unless this process itself looks for modules in the current directory first, as `python -m` does."""
    return [] if sys.path[0] == os.getcwd() else ["-P"]  # noqa: PTH109 -- compared with what Python itself put there
