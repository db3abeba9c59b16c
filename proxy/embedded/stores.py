"""The default stores: Valkey servers as child processes of the supervisor, one a role, in one data directory.

Rules of this file, beside those of `valkey`, which has the single server:

* A data directory has one user. It is taken by an flock that every child inherits, so it counts as taken as
  long as any of them or the supervisor lives, and it is free, whatever happened, once all are gone.
* All roles start or none does. From then on each dies and is restarted for itself.
* A server whose socket was removed is restarted, because it cannot make another one. If there can be no other, it goes
  on serving the connections that it has.
* `start` and `stop` may block, within limits; `poll` never does.
* A ledger is started with all of its data or not at all. A price book whose files are damaged begins empty.
* Every failure to start is an `EmbeddedStoreError` whose sentence says what to do, and it leaves nothing behind.
"""

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from proxy.embedded.aof import damage_of_tail, find_damage, has_files, keep_newest, put_back, remedy_of, set_aside
from proxy.embedded.socket_dir import SocketDir, make_private, remove_abandoned
from proxy.embedded.valkey import EmbeddedStoreError, ExitedError, Valkey
from proxy.store.access import Role

__all__ = ["EmbeddedStoreError", "EmbeddedStores", "running_url"]

"""What a store is for. It names the sub-directory of the data directory, and the socket."""

MAX_MEMORY_MB: Mapping[Role, int] = {"ledger": 1024, "price-book": 256}
"""Bounds, not reservations. A full price book forgets what was not asked for lately. A full ledger refuses every
request, so its bound is out of reach of what it is for, and only ends what has gone wrong before the machine does: a
team's day with 75 combinations of model and outcome takes about 6 KiB, so a hundred such teams fill 240 MiB in the 400
days for which usage is kept."""

_POLICIES: Mapping[Role, str] = {"ledger": "noeviction", "price-book": "allkeys-lru"}

_EXPENDABLE: frozenset[Role] = frozenset({"price-book"})
"""Stores that begin empty if their files are damaged. What is done about a ledger, which counts money, is not decided
here."""

_READY_TIMEOUT_S = 30.0
_READY_INTERVAL_S = 0.01
_STOP_TIMEOUT_S = 5.0
_LOCK_TIMEOUT_S = 3.0
"""A gateway that was killed a moment ago may still be going away."""
_LOCK_INTERVAL_S = 0.05

_LOCK_MAX_BYTES = 4096

log = logging.getLogger(__name__)


class EmbeddedStores:
    """The stores of `roles`, with their data below `data_dir` and their sockets in a private directory.

    Without roles there is nothing to run, and nothing is taken or made.
    """

    def __init__(
        self, data_dir: Path, roles: Sequence[Role], *, max_memory_mb: Mapping[Role, int] = MAX_MEMORY_MB
    ) -> None:
        self._data_dir = data_dir.absolute()
        self._roles = roles
        self._max_memory_mb = max_memory_mb
        self._lock = _Lock(self._data_dir)
        self._socket_dir: SocketDir | None = None
        self._servers: dict[Role, Valkey] = {}
        """Empty unless started."""
        self._aside: dict[Role, _Aside] = {}
        """The files of stores that begin empty, until it is known whether that helps."""

    @property
    def urls(self) -> dict[Role, str]:
        """`unix://` and the socket's path, percent-encoded as `redis.from_url` expects; restarts keep it."""
        return {role: _url_of(self._socket_of(role)) for role in self._roles}

    def start(self) -> None:
        """Takes the data directory, starts the servers and returns when all answer PING. At most some 33 s.

        Raises:
            EmbeddedStoreError: and nothing is left running, locked or lying about.

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
                f"{_remedy_of(error)}, or set store.data_dir to another directory"
            ) from error

    def poll(self) -> list[str]:
        """Restarts whoever died, and returns lines for the log; to be called about every 100 ms and on SIGCHLD.

        A server that keeps dying is restarted ever more slowly, and does not hold up the other.
        """
        if self._socket_dir is None:
            return []
        lost = [server for server in self._servers.values() if server.has_lost_socket()]
        news = [_replace_socket(server, self._socket_dir) for server in lost]
        return news + [line for server in self._servers.values() if (line := server.poll()) is not None]

    def stop(self) -> None:
        """Ends the servers, after `_STOP_TIMEOUT_S` by force, and gives back directory and lock. Idempotent.

        Files that were set aside in a start that failed are put back.
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
        self._take_data_dir()
        for role in self._roles:
            self._servers[role] = self._server_of(role)
            self._start_server(role)

    def _start_server(self, role: Role) -> None:
        damage = find_damage(self._directory_of(role))
        if damage is not None:
            if role not in _EXPENDABLE:
                raise EmbeddedStoreError(f"embedded store {role}: {damage}")
            self._set_aside(role, damage.what)
        self._servers[role].start()

    def _set_aside(self, role: Role, why: str) -> None:
        self._aside[role] = _Aside(set_aside(self._directory_of(role), datetime.now(UTC)), why)

    def _take_data_dir(self) -> None:
        make_private(self._data_dir)
        self._lock.acquire()
        remove_abandoned(self._lock.read().get("socket_dir"))
        self._socket_dir = SocketDir.make(self._data_dir, _socket_name(max(self._roles, key=len)))
        if self._socket_dir is None:
            raise EmbeddedStoreError(
                "there is no writable directory with a short path for the store's socket: set TMPDIR to one"
            )
        self._lock.write({"pid": os.getpid(), "socket_dir": str(self._socket_dir.path)})

    def _server_of(self, role: Role) -> Valkey:
        directory = self._directory_of(role)
        make_private(directory)
        settings = {"maxmemory": f"{self._max_memory_mb[role]}mb", "maxmemory-policy": _POLICIES[role]}
        return Valkey(role, settings, directory=directory, socket_path=self._socket_of(role), lock_fd=self._lock.fd)

    def _directory_of(self, role: Role) -> Path:
        return self._data_dir / role

    def _socket_of(self, role: Role) -> Path:
        if self._socket_dir is None:
            raise EmbeddedStoreError("the embedded store has no address: start it first")
        return self._socket_dir.path / _socket_name(role)

    def _wait_until_ready(self) -> None:
        """Each look is at all of them: one that has ended is noticed while another still reads its files."""
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while waiting := [role for role in self._servers if not self._is_ready(role)]:
            if time.monotonic() > deadline:
                raise self._servers[waiting[0]].late(_READY_TIMEOUT_S)
            time.sleep(_READY_INTERVAL_S)
        self._report()

    def _report(self) -> None:
        """What has become of the files, now that all have started."""
        while self._aside:
            role, aside = self._aside.popitem()
            log.error("embedded store %s: %s. It begins empty; its files are now in %s", role, aside.why, aside.path)
            keep_newest(self._directory_of(role))
        for server in self._servers.values():
            if (news := server.cut_off()) is not None:
                log.warning("%s", news)

    def _is_ready(self, role: Role) -> bool:
        try:
            return self._servers[role].answers()
        except ExitedError as error:
            if role not in _EXPENDABLE:
                raise EmbeddedStoreError(self._remedied(role, error)) from error
            self._try_without_files(role, error)
            return False

    def _remedied(self, role: Role, error: ExitedError) -> str:
        directory = self._directory_of(role)
        damage = damage_of_tail(directory, self._servers[role].program, datetime.now(UTC))
        return f"embedded store {role}: {damage}" if damage else f"{error}: {remedy_of(str(error), directory)}"

    def _try_without_files(self, role: Role, error: ExitedError) -> None:
        """If it does not start empty either, its files were not to blame: `stop` gives them back."""
        if role in self._aside or not has_files(self._directory_of(role)):
            raise EmbeddedStoreError(f"{error}: it does not start without its files either") from error
        self._set_aside(role, str(error))
        self._servers[role].start()


@dataclass(frozen=True, slots=True)
class _Aside:
    """Files that were set aside: where they are, and why."""

    path: Path
    why: str


class _Lock:
    """An exclusive flock on `<data_dir>/lock`, whose content names the owner: `{"pid": …, "socket_dir": …}`.

    It is given back by closing the descriptor, never by LOCK_UN: that would take it from the child as well.
    The file is never deleted: a second process could hold a lock on the deleted one.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self.fd = -1

    def acquire(self) -> None:
        with ExitStack() as undo:
            fd = os.open(self._data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, fd)
            if not _flock_within(fd, _LOCK_TIMEOUT_S):
                owner = _read_json(fd).get("pid", "unknown")
                raise EmbeddedStoreError(
                    f"another gateway (pid {owner}), or a Valkey server that it left behind, is using "
                    f"{self._data_dir}: end it, or set store.data_dir to another directory"
                )
            undo.pop_all()
        self.fd = fd

    def read(self) -> dict[str, Any]:
        return _read_json(self.fd)

    def write(self, owner: dict[str, Any]) -> None:
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        if self.fd < 0:
            return
        os.ftruncate(self.fd, 0)
        os.close(self.fd)
        self.fd = -1


def running_url(data_dir: Path, *, role: Role) -> str:
    """Where the store of a running gateway is. Raises `EmbeddedStoreError` if none runs on `data_dir`."""
    with suppress(OSError, ValueError, KeyError):
        owner = json.loads((data_dir / "lock").read_bytes())
        path = Path(owner["socket_dir"]) / _socket_name(role)
        if path.is_socket():
            return _url_of(path)
    raise EmbeddedStoreError(f"no gateway is running on {data_dir}: start one, or set store.url")


def _replace_socket(server: Valkey, socket_dir: SocketDir) -> str:
    """Restarts a server whose socket was removed, if it can have another one. Returns a line for the log."""
    try:
        socket_dir.restore()
    except OSError as error:
        return f"{server.name} lost its socket, and there can be no other ({error}): restart the gateway"
    server.terminate()
    return f"{server.name} lost its socket {server.socket_path}: restarting it"


def _socket_name(role: Role) -> str:
    return f"{role}.sock"


def _remedy_of(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "free some space there"
        case errno.EACCES | errno.EPERM:
            return f"all of it must belong to the user that runs the gateway (uid {os.geteuid()})"
        case _:
            return "make it writable"


def _url_of(path: Path) -> str:
    return f"unix://{quote(str(path))}"


def _flock_within(fd: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOCK_INTERVAL_S)


def _read_json(fd: int) -> dict[str, Any]:
    """The JSON object in a small file; {} when there is none, as after a clean stop or a torn write."""
    with suppress(ValueError):
        content = json.loads(os.pread(fd, _LOCK_MAX_BYTES, 0))
        if isinstance(content, dict):
            return content
    return {}
