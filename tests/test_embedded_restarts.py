"""Embedded stores that die are started again, with real deaths: each on its own, and ever more slowly."""

import os
import signal
import time
from pathlib import Path

import pytest

from embedded_stores import BOTH, answers, manifest, next_message, pid_of, running, until
from proxy import valkey
from proxy.valkey import restart_delay_s


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
        told: list[str] = []

        def all_are_told() -> bool:
            told.extend(stores.poll())
            return len(told) == len(BOTH)

        until(all_are_told)
        assert sorted(told) == [
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
