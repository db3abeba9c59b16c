"""Data and log files of embedded stores after stops and crashes, with real servers."""

import os
import signal
import socket
import tempfile
import threading
from pathlib import Path

import pytest

from embedded_stores import BOTH, LEDGER, answers, client, kept, next_message, pid_of, put, running, until
from proxy.embedded import valkey
from proxy.store.access import Role


def appended_file(data_dir: Path) -> Path:
    (found,) = (data_dir / "ledger" / "appendonlydir").glob("*.incr.aof")
    return found


def test_data_survive_stop_and_start(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        put(stores)
    with running(tmp_path, BOTH) as stores:
        assert kept(stores) == list(BOTH)


def test_data_of_a_role_that_is_not_used_are_kept(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        put(stores)
    with running(tmp_path, LEDGER) as stores:
        assert list(stores.urls) == ["ledger"]
    with running(tmp_path, BOTH) as stores:
        assert kept(stores) == list(BOTH)


@pytest.mark.parametrize(("dies", "lives"), [BOTH, BOTH[::-1]])
def test_data_survive_the_death_of_a_store_and_the_other_store_is_not_affected(
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


def test_a_truncated_tail_is_dropped(tmp_path: Path) -> None:
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


def test_the_log_file_has_the_lines_of_one_start(tmp_path: Path) -> None:
    log = tmp_path / "ledger" / "valkey.log"
    with running(tmp_path):
        log.write_text("from the first start")
    with running(tmp_path):
        assert "from the first start" not in log.read_text()


def test_a_deleted_log_file_does_not_hide_the_error(tmp_path: Path) -> None:
    with running(tmp_path) as stores:
        (tmp_path / "ledger" / "valkey.log").unlink()
        assert stores._servers["ledger"]._describe_end(1).endswith("valkey.log ends: (unreadable)")
