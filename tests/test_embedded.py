"""The embedded store, with real servers and real deaths. What a test starts, it ends by its own pid."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import redis

from proxy import embedded
from proxy.embedded import EmbeddedStore, EmbeddedStoreError, restart_delay_s
from proxy.lifeline import die_with_parent

GATEWAY = """
import sys
from pathlib import Path
from proxy import embedded
if "--orphan" in sys.argv:
    embedded.die_with_parent = lambda parent_pid: None
store = embedded.EmbeddedStore(Path(sys.argv[1]))
store.start()
print(store.url, store._child.pid, flush=True)
sys.stdin.read()
store.stop()
"""
"""A gateway's supervisor as far as this file is concerned; it ends when its standard input does."""


@dataclass(frozen=True)
class Gateway:
    process: subprocess.Popen[str]
    socket_dir: Path
    store: psutil.Process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def clean_up(self) -> None:
        self.kill()
        with suppress(psutil.NoSuchProcess):
            self.store.kill()
        shutil.rmtree(self.socket_dir, ignore_errors=True)


@contextmanager
def gateway(data_dir: Path, *options: str) -> Iterator[Gateway]:
    command = [sys.executable, "-c", GATEWAY, str(data_dir), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url, store_pid = process.stdout.readline().split()
        started = Gateway(process, Path(url.removeprefix("unix://")).parent, psutil.Process(int(store_pid)))
        try:
            yield started
        finally:
            started.clean_up()


@contextmanager
def running(data_dir: Path, *, role: str = "price-book", max_memory_mb: int = 256) -> Iterator[EmbeddedStore]:
    store = EmbeddedStore(data_dir, role=role, max_memory_mb=max_memory_mb)
    store.start()
    try:
        yield store
    finally:
        store.stop()


@contextmanager
def client(store: EmbeddedStore) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(store.url, decode_responses=True) as connected:
        yield connected


def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def answers(store: EmbeddedStore) -> bool:
    with client(store) as connected, suppress(redis.ConnectionError):
        return bool(connected.ping())
    return False


def gone(pid: int) -> bool:
    """Whether the process ended; whoever inherits an orphan may be slow to collect it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pid_of(store: EmbeddedStore) -> int:
    assert store._child is not None
    return store._child.pid


def next_message(store: EmbeddedStore, timeout_s: float = 5.0) -> str:
    messages: list[str] = []
    until(lambda: messages.append(message) if (message := store.poll()) else messages, timeout_s)
    return messages[0]


def appended_file(data_dir: Path) -> Path:
    (found,) = (data_dir / "price-book" / "appendonlydir").glob("*.incr.aof")
    return found


def manifest(data_dir: Path) -> Path:
    return data_dir / "price-book" / "appendonlydir" / "appendonly.aof.manifest"


def socket_dir_of(store: EmbeddedStore) -> Path:
    assert store._socket_dir is not None
    return store._socket_dir


# Starting and stopping


def test_start_returns_when_the_server_answers(tmp_path: Path) -> None:
    with running(tmp_path) as store, client(store) as connected:
        assert connected.ping()
        assert store.poll() is None


def test_stop_leaves_no_process_no_directory_and_no_lock(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    store.start()
    pid, socket_dir = pid_of(store), socket_dir_of(store)
    store.stop()
    store.stop()
    assert gone(pid)
    assert not socket_dir.exists()
    assert (tmp_path / "lock").read_bytes() == b""
    assert store.poll() is None
    with running(tmp_path):
        pass


def test_stop_before_start_and_without_an_address(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path / "never")
    store.stop()
    assert store.poll() is None
    assert not (tmp_path / "never").exists()
    with pytest.raises(EmbeddedStoreError, match="start it first"):
        _ = store.url


def test_stop_kills_a_child_that_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_STOP_TIMEOUT_S", 0.1)
    with running(tmp_path) as store:
        pid = pid_of(store)
        os.kill(pid, signal.SIGSTOP)
        store.stop()
        assert gone(pid)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("appendonly", "yes"),
        ("appendfsync", "everysec"),
        ("aof-load-truncated", "yes"),
        ("save", ""),
        ("maxmemory", str(64 * 1024 * 1024)),
        ("maxmemory-policy", "allkeys-lru"),
        ("port", "0"),
        ("unixsocketperm", "700"),
        ("loglevel", "warning"),
    ],
)
def test_settings_are_in_force(small: EmbeddedStore, name: str, value: str) -> None:
    with client(small) as connected:
        assert connected.config_get(name) == {name: value}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    with running(tmp_path_factory.mktemp("store"), max_memory_mb=64) as store:
        yield store


def test_everything_is_private(tmp_path: Path) -> None:
    data_dir = tmp_path / "missing" / "too"
    with running(data_dir) as store:
        private = [data_dir.parent, data_dir, data_dir / "price-book", socket_dir_of(store)]
        assert {path.stat().st_mode & 0o777 for path in private} == {0o700}
        assert (data_dir / "lock").stat().st_mode & 0o777 == 0o600
        assert (socket_dir_of(store) / "price-book.sock").stat().st_mode & 0o777 == 0o700


def test_the_child_has_a_session_of_its_own(tmp_path: Path) -> None:
    with running(tmp_path) as store:
        assert os.getsid(pid_of(store)) == pid_of(store)


def test_the_child_gets_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Valkey writes its title over the environment that /proc shows, so a program that tells stands in for it."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexport -p\nexit 1\n")
    program.chmod(0o700)
    monkeypatch.setattr(embedded, "get_binary_path", lambda: program)
    monkeypatch.setenv("UPSTREAM_KEY", "canary-5b1e")
    with pytest.raises(EmbeddedStoreError):
        EmbeddedStore(tmp_path).start()
    told = (tmp_path / "price-book" / "valkey.log").read_text()
    assert "PWD" in told
    assert "canary-5b1e" not in told


# Where the socket lives


def test_a_long_data_dir_has_a_short_socket(tmp_path: Path) -> None:
    with running(tmp_path / ("d" * 130)) as store:
        assert len(store.url) < 104
        assert answers(store)


def test_a_long_temp_dir_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_dir = tmp_path / ("t" * 100)
    long_dir.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long_dir))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with running(tmp_path / "data") as store:
        assert socket_dir_of(store).parent == Path("/tmp")  # noqa: S108 -- that it is /tmp is the point
        assert answers(store)


def test_a_runtime_dir_comes_first_and_its_name_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="a ?#%41 b", dir="/tmp") as runtime_dir:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime_dir)
        with running(tmp_path) as store:
            assert socket_dir_of(store).parent == Path(runtime_dir)
            assert answers(store)


def test_a_runtime_dir_of_somebody_else_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime_dir:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime_dir)
        monkeypatch.setattr(os, "geteuid", lambda: Path(runtime_dir).stat().st_uid + 1)
        with running(tmp_path) as store:
            assert socket_dir_of(store).parent != Path(runtime_dir)


@pytest.mark.parametrize("runtime_dir", ["", ".", "/missing"])
def test_a_runtime_dir_that_is_none_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime_dir: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime_dir)
    with running(tmp_path) as store:
        assert socket_dir_of(store).parent in {Path(tempfile.gettempdir()), Path("/tmp")}  # noqa: S108 -- as above


def test_no_place_for_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_MAX_SOCKET_PATH_BYTES", 10)
    with pytest.raises(EmbeddedStoreError, match="set TMPDIR to one"):
        EmbeddedStore(tmp_path).start()


# What stays


def test_data_survive_stop_and_start(tmp_path: Path) -> None:
    with running(tmp_path) as store, client(store) as connected:
        connected.set("a", "1")
    with running(tmp_path) as store, client(store) as connected:
        assert connected.get("a") == "1"


def test_data_survive_the_death_of_the_child(tmp_path: Path) -> None:
    with running(tmp_path) as store:
        with client(store) as connected:
            connected.set("a", "1")
        url = store.url
        os.kill(pid_of(store), signal.SIGKILL)
        assert next_message(store) == (
            "embedded store price-book was killed by signal 9 (Killed); embedded store price-book restarted"
        )
        assert store.url == url
        until(lambda: answers(store))
        with client(store) as connected:
            assert connected.get("a") == "1"


def test_a_tail_cut_off_is_dropped(tmp_path: Path) -> None:
    with running(tmp_path) as store, client(store) as connected:
        connected.set("a", "1")
    with appended_file(tmp_path).open("ab") as appended:
        appended.write(b"*3\r\n$3\r\nSET\r\n$1\r\nb\r\n$10\r\nhal")
    with running(tmp_path) as store, client(store) as connected:
        assert connected.mget("a", "b") == ["1", None]


def test_start_waits_until_the_data_are_loaded(tmp_path: Path) -> None:
    with running(tmp_path) as store, client(store) as connected:
        connected.set("a", "1")
    lines = (f"*3\r\n$3\r\nSET\r\n${len(key)}\r\n{key}\r\n$1\r\n1\r\n" for key in map(str, range(300_000)))
    with appended_file(tmp_path).open("a", newline="") as appended:
        appended.writelines(lines)
    with running(tmp_path) as store, client(store) as connected:
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
        assert not embedded._answers_ping(path)
        replying.join()


def test_the_log_is_that_of_one_start(tmp_path: Path) -> None:
    log = tmp_path / "price-book" / "valkey.log"
    with running(tmp_path):
        log.write_text("from the first start")
    with running(tmp_path):
        assert "from the first start" not in log.read_text()


def test_a_log_that_is_gone_does_not_hide_the_story(tmp_path: Path) -> None:
    assert EmbeddedStore(tmp_path / "gone")._story(1).endswith("valkey.log ends: (unreadable)")


# What cannot start


def test_a_data_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedStoreError) as raised:
        EmbeddedStore(tmp_path / "file" / "data").start()
    data_dir = tmp_path / "file" / "data"
    assert str(raised.value) == (
        f"cannot use {data_dir} for the embedded store ([Errno 20] Not a directory: '{data_dir}'): "
        "make it writable, or set store.data_dir to another directory"
    )


def test_a_damaged_manifest_is_quoted_from_the_log(tmp_path: Path) -> None:
    with running(tmp_path):
        intact = manifest(tmp_path).read_bytes()
    manifest(tmp_path).write_text("garbage\n")
    store = EmbeddedStore(tmp_path)
    with pytest.raises(EmbeddedStoreError) as raised:
        store.start()
    assert "exited with status 1" in str(raised.value)
    assert "AOF manifest file" in str(raised.value)
    assert f"repair or move {tmp_path / 'price-book'}" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert store._child is None
    manifest(tmp_path).write_bytes(intact)
    with running(tmp_path) as store:
        assert answers(store)


def test_a_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_READY_TIMEOUT_S", -1.0)
    store = EmbeddedStore(tmp_path)
    with pytest.raises(EmbeddedStoreError, match="did not answer within"):
        store.start()
    assert store._child is None


def test_a_server_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "get_binary_path", lambda: tmp_path / "missing")
    with pytest.raises(EmbeddedStoreError, match="reinstall the package"):
        EmbeddedStore(tmp_path).start()


# Restarting


def test_the_delays() -> None:
    assert [restart_delay_s(deaths) for deaths in range(8)] == [0, 0.5, 1, 2, 4, 8, 10, 10]
    assert restart_delay_s(1_000_000) == 10


def test_a_child_that_keeps_dying_is_restarted_ever_more_slowly(tmp_path: Path) -> None:
    with running(tmp_path) as store:
        intact = manifest(tmp_path).read_bytes()
        manifest(tmp_path).write_text("garbage\n")
        os.kill(pid_of(store), signal.SIGKILL)
        began = time.monotonic()
        assert next_message(store).endswith("; embedded store price-book restarted")
        assert "AOF manifest file" in (second := next_message(store))
        assert second.endswith("; next start in 0.5 s")
        assert next_message(store) == "embedded store price-book restarted"
        assert time.monotonic() - began >= 0.5
        assert next_message(store).endswith("; next start in 1 s")
        manifest(tmp_path).write_bytes(intact)
        assert next_message(store) == "embedded store price-book restarted"
        assert time.monotonic() - began >= 1.5
        until(lambda: answers(store))
        assert store.poll() is None


def test_a_long_life_forgives_earlier_deaths(tmp_path: Path) -> None:
    with running(tmp_path) as store:
        store._deaths = 5
        store._spawned_at -= embedded._SETTLED_S
        os.kill(pid_of(store), signal.SIGKILL)
        assert next_message(store).endswith("restarted")


def test_poll_survives_a_server_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path) as store:
        with monkeypatch.context() as patched:
            patched.setattr(embedded, "get_binary_path", lambda: tmp_path / "missing")
            os.kill(pid_of(store), signal.SIGKILL)
            assert "No such file or directory" in (message := next_message(store))
            assert message.endswith("next start in 0.5 s")
        assert next_message(store) == "embedded store price-book restarted"


def test_stop_ends_a_wait_for_the_next_start(tmp_path: Path) -> None:
    with running(tmp_path) as store:
        store._deaths = 1
        os.kill(pid_of(store), signal.SIGKILL)
        assert next_message(store) == "embedded store price-book was killed by signal 9 (Killed); next start in 0.5 s"
        store._restart_at = 0.0
        store.stop()
        assert store.poll() is None
        store.start()
        os.kill(pid_of(store), signal.SIGKILL)
        assert next_message(store).endswith("; embedded store price-book restarted")


# One gateway a directory, and none left behind


def test_a_second_gateway_is_refused(tmp_path: Path) -> None:
    with gateway(tmp_path) as first:
        open_files = psutil.Process().num_fds()
        with pytest.raises(EmbeddedStoreError) as raised:
            EmbeddedStore(tmp_path).start()
        assert psutil.Process().num_fds() == open_files
        assert str(raised.value) == (
            f"another gateway (pid {first.process.pid}) is using {tmp_path}: "
            "stop it, or set store.data_dir to another directory"
        )
        assert not gone(first.store.pid)
        assert json.loads((tmp_path / "lock").read_text()) == {
            "pid": first.process.pid,
            "socket_dir": str(first.socket_dir),
        }


def test_no_orphan_and_a_quick_takeover_when_the_gateway_is_killed(tmp_path: Path) -> None:
    with gateway(tmp_path) as first:
        first.kill()
        began = time.monotonic()
        with running(tmp_path) as store:
            assert time.monotonic() - began < 3
            assert answers(store)
            assert gone(first.store.pid)
            assert not first.socket_dir.exists()


def test_no_orphan_without_a_successor(tmp_path: Path) -> None:
    with gateway(tmp_path) as first:
        first.kill()
        until(lambda: gone(first.store.pid))


def test_a_store_that_outlives_its_gateway_keeps_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_LOCK_TIMEOUT_S", 0.2)
    with gateway(tmp_path, "--orphan") as first:
        first.kill()
        with pytest.raises(EmbeddedStoreError, match="another gateway"):
            EmbeddedStore(tmp_path).start()
        first.store.kill()
        until(lambda: gone(first.store.pid))
        with running(tmp_path) as store:
            assert answers(store)


def test_a_gateway_that_ends_in_order_leaves_nothing(tmp_path: Path) -> None:
    with gateway(tmp_path) as first:
        assert first.process.stdin is not None
        first.process.stdin.close()
        assert first.process.wait(10) == 0
        assert gone(first.store.pid)
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
    with running(tmp_path) as store:
        assert answers(store)


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
    with running(tmp_path) as store:
        owner = {"pid": os.getpid(), "socket_dir": str(socket_dir_of(store))}
        assert json.loads((tmp_path / "lock").read_text()) == owner
