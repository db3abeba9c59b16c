"""The default stores: Valkey servers as child processes of the supervisor, one per role, in one data directory.

Rules, besides those of `proxy.embedded.valkey`, which runs a single server:

* One gateway uses a data directory at a time. Its lock is inherited by all servers, so the directory stays locked
  until the supervisor and all servers have ended.
* All roles start, or none does. After that, each server is restarted on its own.
* A server whose socket was removed is restarted, because it cannot make another one. If no socket can be made, it
  keeps serving its open connections.
* `start` and `stop` may block for a limited time; `poll` never does.
* A ledger is started with all of its data or not at all. A price book whose files are damaged starts empty.
* Every failure to start is an `EmbeddedStoreError` that says what to do, and leaves nothing running or locked.
"""

import errno
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from proxy.embedded.aof import advice_for, damage_of_tail, find_damage, has_files, keep_newest, put_back, set_aside
from proxy.embedded.locks import DataDirLock, LockedError, socket_dir_of_running
from proxy.embedded.socket_dir import SocketDir, make_private, remove_abandoned
from proxy.embedded.valkey import EmbeddedStoreError, ExitedError, Valkey, find_server
from proxy.store.access import Role

MAX_MEMORY_MB: Mapping[Role, int] = {"ledger": 1024, "price-book": 256}
"""Upper limits, not reservations. A full price book evicts what was used least recently. A full ledger refuses every
request, so its limit is far above its needs and only protects the machine's memory: a team's day with 75 combinations
of model and outcome takes about 6 KiB, so a hundred such teams fill 240 MiB in the 400 days for which usage is kept."""

_POLICIES: Mapping[Role, str] = {"ledger": "noeviction", "price-book": "allkeys-lru"}

_EXPENDABLE: frozenset[Role] = frozenset({"price-book"})
"""Stores that start empty if their files are damaged. A ledger counts credits, so its operator decides."""

_READY_TIMEOUT_S = 30.0
_READY_INTERVAL_S = 0.01
_STOP_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Aside:
    """Where the files of a store were moved to, and why."""

    path: Path
    reason: str


class EmbeddedStores:
    """The stores of `roles`, with their data below `data_dir` and their sockets in a private directory.

    A role names its sub-directory of `data_dir` and its socket. Without roles, nothing is run, locked or created.
    """

    def __init__(
        self, data_dir: Path, roles: Sequence[Role], *, max_memory_mb: Mapping[Role, int] = MAX_MEMORY_MB
    ) -> None:
        self._data_dir = data_dir.absolute()
        self._roles = roles
        self._max_memory_mb = max_memory_mb
        self._lock = DataDirLock(self._data_dir)
        self._socket_dir: SocketDir | None = None
        self._servers: dict[Role, Valkey] = {}
        """Empty before the start."""
        self._aside: dict[Role, _Aside] = {}
        """Damaged files that were moved away, by role. Emptied once all servers have started."""

    @property
    def urls(self) -> dict[Role, str]:
        """`unix://` and the socket's path, percent-encoded as `redis.from_url` expects. Restarts keep it."""
        return {role: _url_of(self._socket_of(role)) for role in self._roles}

    def start(self) -> None:
        """Locks the data directory, starts the servers and returns when all answer PING: after 33 s at most.

        Raises:
            EmbeddedStoreError: if a store cannot start. Nothing is left running or locked.

        """
        if not self._roles:
            return
        try:
            with ExitStack() as undo:
                undo.callback(self.stop)
                self._start_servers()
                self._wait_until_ready()
                undo.pop_all()
        except OSError as error:
            raise EmbeddedStoreError(
                f"cannot use {self._data_dir} for the embedded store ({error}): "
                f"{_advice_for(error)}, or set store.data_dir to another directory"
            ) from error

    def poll(self) -> list[str]:
        """Restarts servers that died, and returns lines for the log. Call it every 100 ms and on SIGCHLD.

        A server that keeps dying is restarted after growing delays, and does not delay the other.
        """
        if self._socket_dir is None:
            return []
        lost = [server for server in self._servers.values() if server.has_lost_socket()]
        lines = [_replace_socket(server, self._socket_dir) for server in lost]
        return lines + [line for server in self._servers.values() if (line := server.poll()) is not None]

    def stop(self) -> None:
        """Ends the servers, removes the socket directory and releases the lock. Idempotent.

        Servers that are still running after `_STOP_TIMEOUT_S` are killed. Files that were set aside in a start that
        failed are put back.
        """
        servers, self._servers = self._servers, {}
        for server in servers.values():
            server.terminate()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for server in servers.values():
            server.end(max(0.0, deadline - time.monotonic()))
        if self._socket_dir is not None:
            self._socket_dir.remove()
            self._socket_dir = None
        try:
            while self._aside:
                role, aside = self._aside.popitem()
                put_back(self._directory_of(role), aside.path)
        finally:
            self._lock.release()

    def _start_servers(self) -> None:
        self._lock_data_dir()
        for role in self._roles:
            directory = self._directory_of(role)
            make_private(directory)
            self._servers[role] = self._server_of(role)
            if (damage := find_damage(directory)) is not None:
                if role not in _EXPENDABLE:
                    raise EmbeddedStoreError(f"embedded store {role}: {damage}")
                self._set_aside(role, damage.description)
            self._servers[role].start()

    def _set_aside(self, role: Role, reason: str) -> None:
        self._aside[role] = _Aside(set_aside(self._directory_of(role), datetime.now(UTC)), reason)

    def _lock_data_dir(self) -> None:
        make_private(self._data_dir)
        try:
            self._lock.acquire()
        except LockedError as error:
            raise EmbeddedStoreError(
                f"another gateway (pid {error.pid}), or a Valkey server that it left behind, is using "
                f"{self._data_dir}: end it, or set store.data_dir to another directory"
            ) from None
        remove_abandoned(self._lock.read_owner().get("socket_dir"))
        self._socket_dir = SocketDir.make(self._data_dir, _socket_name(max(self._roles, key=len)))
        if self._socket_dir is None:
            raise EmbeddedStoreError(
                "there is no writable directory with a path short enough for the store's socket: set TMPDIR to one"
            )
        self._lock.write_owner({"pid": os.getpid(), "socket_dir": str(self._socket_dir.path)})

    def _server_of(self, role: Role) -> Valkey:
        settings = {"maxmemory": f"{self._max_memory_mb[role]}mb", "maxmemory-policy": _POLICIES[role]}
        directory, socket_path = self._directory_of(role), self._socket_of(role)
        return Valkey(role, settings, directory=directory, socket_path=socket_path, lock_fd=self._lock.fd)

    def _directory_of(self, role: Role) -> Path:
        return self._data_dir / role

    def _socket_of(self, role: Role) -> Path:
        if self._socket_dir is None:
            raise EmbeddedStoreError("the embedded store has no address before it is started")
        return self._socket_dir.path / _socket_name(role)

    def _wait_until_ready(self) -> None:
        """Each round checks all servers: one that has ended is noticed while another still reads its files."""
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while waiting := [role for role in self._servers if not self._is_ready(role)]:
            if time.monotonic() > deadline:
                raise self._servers[waiting[0]].timeout_error(_READY_TIMEOUT_S)
            time.sleep(_READY_INTERVAL_S)
        self._report()

    def _report(self) -> None:
        """Logs what happened to the files, once all servers have started."""
        while self._aside:
            role, aside = self._aside.popitem()
            log.error("embedded store %s: %s. It starts empty; its files are now in %s", role, aside.reason, aside.path)
            keep_newest(self._directory_of(role))
        for server in self._servers.values():
            if (warning := server.truncation_warning()) is not None:
                log.warning("%s", warning)

    def _is_ready(self, role: Role) -> bool:
        try:
            return self._servers[role].answers()
        except ExitedError as error:
            if role not in _EXPENDABLE:
                raise EmbeddedStoreError(self._with_advice(role, error)) from error
            self._start_without_files(role, error)
            return False

    def _with_advice(self, role: Role, error: ExitedError) -> str:
        directory = self._directory_of(role)
        damage = damage_of_tail(directory, find_server(), datetime.now(UTC))
        return f"embedded store {role}: {damage}" if damage else f"{error}: {advice_for(str(error), directory)}"

    def _start_without_files(self, role: Role, error: ExitedError) -> None:
        """If it does not start empty either, its files were not the cause: `stop` puts them back."""
        if role in self._aside or not has_files(self._directory_of(role)):
            raise EmbeddedStoreError(f"{error}: it does not start without its files either") from error
        self._set_aside(role, str(error))
        self._servers[role].start()


def running_url(data_dir: Path, *, role: Role) -> str:
    """The URL of the store of a running gateway. Raises `EmbeddedStoreError` if none runs on `data_dir`."""
    socket_dir = socket_dir_of_running(data_dir)
    if socket_dir is not None and (path := socket_dir / _socket_name(role)).is_socket():
        return _url_of(path)
    raise EmbeddedStoreError(f"no gateway is running on {data_dir}: start one, or set store.url")


def _replace_socket(server: Valkey, socket_dir: SocketDir) -> str:
    """Ends a server whose socket was removed, so that it is restarted with another. Returns a line for the log.

    If no socket can be made, the server goes on.
    """
    try:
        socket_dir.restore()
    except OSError as error:
        return f"{server.name} lost its socket, and another cannot be made ({error}): restart the gateway"
    server.terminate()
    return f"{server.name} lost its socket {server.socket_path}: restarting it"


def _socket_name(role: Role) -> str:
    return f"{role}.sock"


def _advice_for(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "free some space there"
        case errno.EACCES | errno.EPERM:
            return f"all of it must belong to the user that runs the gateway (uid {os.geteuid()})"
        case _:
            return "make it writable"


def _url_of(path: Path) -> str:
    return f"unix://{quote(str(path))}"
