"""The workers of one gateway: N processes on one socket, each replaced when it dies.

* A worker is started again after a delay that grows with each quick death in a row: at once, 0.5 s, 1 s, … 10 s. A
  start that the system refuses (no process, no file descriptor) is repeated after the same delays.
* One that dies again and again before it ever served is given up, loudly; with the last one ends the gateway.
* Called by one thread, and never blocks.
"""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from time import monotonic

from proxy.embedded.child import die_with_parent
from proxy.embedded.valkey import restart_delay_s
from proxy.processes.messages import CANNOT_SERVE, READY, RELOAD_FAILED
from proxy.settings.loader import PREFIX, WELL_KNOWN_ENV
from proxy.settings.schema import Settings
from proxy.store.access import EmbeddedUrls
from proxy.telemetry.metrics_files import vacate

MAX_FAILED_STARTS = 3
SETTLED_S = 30.0
"""A worker that lived this long did not die quickly."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What all workers have in common. `metrics_fds`: for each of them the file in which it counts."""

    listener: socket.socket
    url: str
    embedded_urls: EmbeddedUrls
    metrics_fds: Sequence[int]


class _Worker:
    """A worker as its supervisor sees it. It counts in the file at `metrics_fd`."""

    def __init__(self, context: WorkerContext, settings: Settings, metrics_fd: int) -> None:
        self.channel, theirs = Pipe()
        self.ready = False
        self.began_at = monotonic()
        with theirs:
            others = (fd for fd in context.metrics_fds if fd != metrics_fd)
            fds = (context.listener.fileno(), theirs.fileno(), metrics_fd, *others)
            self.process = subprocess.Popen(  # noqa: S603 -- our own module, no shell
                [sys.executable, *_path_options(), "-m", "proxy.processes.worker", *map(str, fds)],
                stdin=subprocess.DEVNULL,
                env=_environment_without_settings(),
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C in a terminal is the supervisor's to handle
                preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 -- needs no lock
            )
        self.say((settings, context.embedded_urls))

    def say(self, word: object) -> None:
        with suppress(OSError):  # it is dead, and about to be noticed
            self.channel.send(word)

    def has_become_ready(self) -> bool:
        """Whether it has just said that it serves."""
        with suppress(EOFError, OSError):
            if not self.ready and self.channel.poll() and self.channel.recv() == READY:
                self.ready = True
                return True
        return False

    def end(self) -> None:
        """By force if it still runs. Idempotent."""
        self.process.kill()
        self.process.wait()
        self.channel.close()


class _Slot:
    """A place for one worker, and how its workers have fared.

    worker: None before the first start, while the next one's time has not come, and when there is to be none.
    """

    def __init__(self, name: str, metrics_fd: int) -> None:
        self.name = name
        self.metrics_fd = metrics_fd
        self.worker: _Worker | None = None
        self.status: int | None = None
        self.next_at: float | None = monotonic()
        self._failed_starts = 0
        self._quick_deaths = 0

    def start(self, context: WorkerContext, settings: Settings) -> str | None:
        """Starts a worker. If the system refuses, returns what is to be said of it, and there is a next start."""
        try:
            self.worker, self.next_at = _Worker(context, settings, self.metrics_fd), None
        except OSError as error:
            return f"{self.name} cannot be started ({error.strerror}): trying again{self._back_off()}"
        return None

    def serves(self) -> None:
        self._failed_starts = 0

    def lose(self, worker: _Worker, status: int) -> str | None:
        """Notes a death, and whether and when there is a next start. Returns what is to be said of it."""
        now = monotonic()
        self.worker, self.status = None, status
        self._failed_starts += not worker.ready
        if status == CANNOT_SERVE:
            return None  # it has said so itself
        if self._failed_starts >= MAX_FAILED_STARTS:
            return f"{self.name} died {self._failed_starts} times before it served (status {status}): giving up"
        if now - worker.began_at >= SETTLED_S:
            self._quick_deaths = 0
        return f"{self.name} died (status {status}): starting another{self._back_off()}"

    def _back_off(self) -> str:
        """Sets the time of the next start; the words for it."""
        delay_s = restart_delay_s(self._quick_deaths)
        self._quick_deaths += 1
        self.next_at = monotonic() + delay_s
        return f" in {delay_s:g} s" if delay_s else ""


class WorkerPool:
    """All workers of a gateway. `end` must be called."""

    def __init__(self, settings: Settings, context: WorkerContext) -> None:
        self._settings = settings
        self._context = context
        self._reload_failed = False
        count = settings.server.workers
        names = ["the worker"] if count == 1 else [f"worker {number} of {count}" for number in range(1, count + 1)]
        self._slots = [_Slot(name, fd) for name, fd in zip(names, context.metrics_fds, strict=True)]
        self._leaving = False
        self.look_after()

    def channels(self) -> list[int]:
        """Those on which a worker is about to say that it serves."""
        return [worker.channel.fileno() for worker in self._workers() if not worker.ready]

    def say(self, word: object) -> None:
        for worker in self._workers():
            worker.say(word)

    def reload(self, settings: Settings) -> None:
        """Those who work take these settings, and those who begin later too."""
        self._settings, self._reload_failed = settings, False
        self.say(settings)

    def reload_failed(self) -> None:
        """There are newer settings that cannot be used; those who begin later hear of it too."""
        self._reload_failed = True
        self.say(RELOAD_FAILED)

    def leave(self) -> None:
        """From now on nobody is replaced. Who is missing just now has finished."""
        self._leaving = True
        for post in self._slots:
            post.status = 0 if post.worker is None else None

    def look_after(self) -> int | None:
        """Hears who serves, buries the dead and starts the next; the exit status once there is nobody left."""
        for post in self._slots:
            self._look_after(post)
        if any(post.worker is not None or (post.next_at is not None and not self._leaving) for post in self._slots):
            return None
        return 0 if self._leaving and all(post.status == 0 for post in self._slots) else 1

    def end(self) -> None:
        """By force, whoever still runs."""
        for worker in self._workers():
            worker.end()

    def _look_after(self, post: _Slot) -> None:
        worker = post.worker
        if worker is None:
            if post.next_at is not None and monotonic() >= post.next_at and not self._leaving:
                self._start(post)
            return
        if worker.has_become_ready():
            post.serves()
            which = "" if len(self._slots) == 1 else f" ({post.name})"
            log.info("serving on %s%s", self._context.url, which)
        status = worker.process.poll()
        if status is not None:
            self._reap(post, worker, status)

    def _reap(self, post: _Slot, worker: _Worker, status: int) -> None:
        worker.end()
        vacate(post.metrics_fd)
        if self._leaving:
            post.worker, post.status = None, status
            return
        if (news := post.lose(worker, status)) is not None:
            log.error("%s", news)
        self._look_after(post)

    def _workers(self) -> Iterator[_Worker]:
        return (post.worker for post in self._slots if post.worker is not None)

    def _start(self, post: _Slot) -> None:
        if (refusal := post.start(self._context, self._settings)) is not None:
            log.error("%s", refusal)
        elif post.worker is not None and self._reload_failed:
            post.worker.say(RELOAD_FAILED)


def _path_options() -> list[str]:
    """`-m` looks into the current folder first. A worker does so only where this process did: see `python -P`."""
    return [] if sys.path[0] == os.getcwd() else ["-P"]  # noqa: PTH109 -- compared as Python itself made it


def _environment_without_settings() -> dict[str, str]:
    """The settings go through the channel; a secret among them has no business in an environment."""
    return {k: v for k, v in os.environ.items() if not k.startswith(PREFIX) and k not in WELL_KNOWN_ENV}
