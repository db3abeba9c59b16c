"""Embedded stores of the tests' own process: how they are run, what is put into them, and what is seen of them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import redis

from proxy.embedded.stores import MAX_MEMORY_MB, EmbeddedStores
from proxy.store.access import Role

LEDGER: tuple[Role] = ("ledger",)
"""One will do where it makes no difference that there are two."""
BOTH: tuple[Role, Role] = ("ledger", "price-book")


@contextmanager
def running(
    data_dir: Path, roles: Sequence[Role] = LEDGER, *, max_memory_mb: Mapping[Role, int] = MAX_MEMORY_MB
) -> Iterator[EmbeddedStores]:
    stores = EmbeddedStores(data_dir, roles, max_memory_mb=max_memory_mb)
    stores.start()
    try:
        yield stores
    finally:
        stores.stop()


@contextmanager
def client(stores: EmbeddedStores, role: Role = "ledger") -> Iterator[redis.Redis]:
    with redis.Redis.from_url(stores.urls[role], decode_responses=True) as connected:
        yield connected


def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def answers(stores: EmbeddedStores, role: Role = "ledger") -> bool:
    with client(stores, role) as connected, suppress(redis.ConnectionError):
        return bool(connected.ping())
    return False


def gone(pid: int) -> bool:
    """Whether the process ended; whoever inherits an orphan may be slow to collect it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pid_of(stores: EmbeddedStores, role: Role = "ledger") -> int:
    child = stores._servers[role]._child
    assert child is not None
    return child.pid


def next_message(stores: EmbeddedStores, timeout_s: float = 5.0) -> str:
    deadline = time.monotonic() + timeout_s
    while not (messages := stores.poll()):
        assert time.monotonic() < deadline, "there was nothing to tell"
        time.sleep(0.01)
    return messages[0]


def manifest(data_dir: Path, role: Role = "ledger") -> Path:
    return data_dir / role / "appendonlydir" / "appendonly.aof.manifest"


def socket_dir_of(stores: EmbeddedStores) -> Path:
    assert stores._socket_dir is not None
    return stores._socket_dir.path


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def put(stores: EmbeddedStores) -> None:
    """Into each store a word of its own."""
    for role in BOTH:
        with client(stores, role) as connected:
            connected.set("role", role)


def kept(stores: EmbeddedStores) -> list[str]:
    def read(role: Role) -> str:
        with client(stores, role) as connected:
            return str(connected.get("role"))

    return [read(role) for role in BOTH]
