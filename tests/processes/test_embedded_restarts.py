"""Restarts of embedded stores that die: each independently, with growing delays."""

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from deploy_files import said_by
from embedded_stores import (
    BOTH,
    answers,
    client,
    kept,
    manifest,
    mode_of,
    next_message,
    pid_of,
    put,
    running,
    socket_dir_of,
    until,
)
from programs import program
from proxy.embedded import valkey
from proxy.embedded.child import STABLE_S, restart_delay_s


def test_the_delays() -> None:
    assert [restart_delay_s(deaths) for deaths in range(8)] == [0, 0.5, 1, 2, 4, 8, 10, 10]
    assert restart_delay_s(1_000_000) == 10


def test_a_store_that_keeps_dying_is_restarted_with_growing_delays(tmp_path: Path) -> None:
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


def test_a_store_that_keeps_dying_does_not_delay_the_other(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        stores._servers["ledger"]._backoff._quick_deaths = 1_000
        os.kill(pid_of(stores, "ledger"), signal.SIGKILL)
        assert next_message(stores) == "embedded store ledger was killed by signal 9 (Killed); next start in 10 s"
        os.kill(pid_of(stores, "price-book"), signal.SIGKILL)
        assert next_message(stores).endswith("; embedded store price-book restarted")
        until(lambda: answers(stores, "price-book"))
        assert not answers(stores, "ledger")


def test_two_deaths_at_once_are_two_log_lines(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        pids = [pid_of(stores, role) for role in BOTH]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        messages: list[str] = []

        def both_are_logged() -> bool:
            messages.extend(stores.poll())
            return len(messages) == len(BOTH)

        until(both_are_logged)
        assert sorted(messages) == [
            f"embedded store {role} was killed by signal 9 (Killed); embedded store {role} restarted" for role in BOTH
        ]


def test_a_long_run_resets_the_delay(tmp_path: Path) -> None:
    with running(tmp_path) as stores:
        stores._servers["ledger"]._backoff._quick_deaths = 5
        stores._servers["ledger"]._backoff._started_at -= STABLE_S
        os.kill(pid_of(stores), signal.SIGKILL)
        assert next_message(stores).endswith("restarted")


def test_poll_survives_a_server_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path) as stores:
        with monkeypatch.context() as patched:
            patched.setattr(valkey, "find_server", lambda: tmp_path / "missing")
            os.kill(pid_of(stores), signal.SIGKILL)
            assert "No such file or directory" in (message := next_message(stores))
            assert message.endswith("next start in 0.5 s")
        assert next_message(stores) == "embedded store ledger restarted"


def test_stop_ends_a_wait_for_the_next_start(tmp_path: Path) -> None:
    with running(tmp_path) as stores:
        stores._servers["ledger"]._backoff._quick_deaths = 1
        os.kill(pid_of(stores), signal.SIGKILL)
        assert next_message(stores) == "embedded store ledger was killed by signal 9 (Killed); next start in 0.5 s"
        stores._servers["ledger"]._backoff._next_start_at = 0.0
        stores.stop()
        assert stores.poll() == []
        stores.start()
        os.kill(pid_of(stores), signal.SIGKILL)
        assert next_message(stores).endswith("; embedded store ledger restarted")


# Servers whose socket was removed


def test_a_server_whose_socket_was_removed_is_restarted_with_its_data(tmp_path: Path) -> None:
    with running(tmp_path, BOTH) as stores:
        put(stores)
        assert stores.poll() == []
        path = socket_dir_of(stores) / "ledger.sock"
        other = pid_of(stores, "price-book")
        path.unlink()
        assert next_message(stores) == f"embedded store ledger lost its socket {path}: restarting it"
        assert next_message(stores).endswith("; embedded store ledger restarted")
        until(lambda: answers(stores))
        assert kept(stores) == list(BOTH)
        assert pid_of(stores, "price-book") == other


@pytest.mark.parametrize("levels", [0, 1])
def test_all_servers_are_restarted_if_their_directory_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: int
) -> None:
    """Removes the directory alone, or with its parent."""
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime_dir:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime_dir)
        with running(tmp_path, BOTH) as stores:
            put(stores)
            assert stores.poll() == []
            socket_dir = socket_dir_of(stores)
            shutil.rmtree([socket_dir, *socket_dir.parents][levels])
            assert "ledger lost its socket" in next_message(stores)
            assert mode_of(socket_dir) == 0o700
            until(lambda: stores.poll() == [] and all(answers(stores, role) for role in BOTH))
            assert kept(stores) == list(BOTH)
        assert list(Path(runtime_dir).iterdir()) == []


def test_nothing_is_created_in_a_replaced_directory(tmp_path: Path) -> None:
    """A link in its place does not receive the sockets, and open connections keep working."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with running(tmp_path / "data") as stores, client(stores) as connected:
        assert connected.ping()
        assert stores.poll() == []
        socket_dir = socket_dir_of(stores)
        shutil.rmtree(socket_dir)
        socket_dir.symlink_to(elsewhere)
        message = next_message(stores)
        assert message.startswith("embedded store ledger lost its socket, and another cannot be made (")
        assert message.endswith("): restart the gateway")
        assert stores.poll() == []
        assert connected.ping()
        socket_dir.unlink()
    assert list(elsewhere.iterdir()) == []


def test_a_directory_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    with running(tmp_path) as stores:
        assert stores.poll() == []
        socket_dir = socket_dir_of(stores)
        shutil.rmtree(socket_dir)
        socket_dir.mkdir(mode=0o755)
        assert "is open to others" in next_message(stores)


def test_systemd_tmpfiles_leaves_the_sockets_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs its /tmp rules for any age; a second directory proves that they delete something."""
    tmpfiles = program("systemd-tmpfiles", "sockets were not tried against it")
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime_dir:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime_dir)
        with running(tmp_path) as stores:
            socket_dir = socket_dir_of(stores)
            (socket_dir / "old").touch()
            beside = socket_dir.with_name("beside")
            beside.mkdir()
            rules = tmp_path / "test.conf"
            rules.write_text(f"e {runtime_dir} - - - 0\n")
            said_by(tmpfiles, "--clean", f"--prefix={runtime_dir}", rules)
            assert not beside.exists()
            assert (socket_dir / "old").exists()
            (socket_dir / "old").unlink()
            assert answers(stores)
