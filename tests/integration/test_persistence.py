"""Log lines at the start about a ledger's server that may lose its data."""

import asyncio
from collections.abc import Iterator
from itertools import product

import pytest
import redis

from gateway_fixture import settings
from proxy.open_stores import startup_errors
from proxy.store.persistence import Persistence, data_loss_warning
from proxy.store.redirects import SLOTS
from topologies import Cluster, server_group

NOTHING_WRITTEN = (
    'the ledger\'s server writes nothing to disk (appendonly no, save ""): a restart loses all quotas and usage. '
    "Set appendonly yes"
)
WRITTEN_LATE = (
    "the ledger's server lets the kernel decide when its append-only file is written to disk (appendfsync no): "
    "a power loss takes the last half minute of quotas and usage, or more. Set appendfsync everysec"
)
SETTINGS: dict[str, list[tuple[dict[str, str], list[str]]]] = {
    "no": [({"appendonly": "no", "save": "", "appendfsync": fsync}, [NOTHING_WRITTEN]) for fsync in ("everysec", "no")],
    "late": [({"appendonly": "yes", "save": save, "appendfsync": "no"}, [WRITTEN_LATE]) for save in ("", "60 1")],
    "yes": [
        ({"appendonly": "no", "save": "60 1", "appendfsync": "no"}, []),
        ({"appendonly": "yes", "save": "", "appendfsync": "everysec"}, []),
        ({"appendonly": "yes", "save": "", "appendfsync": "always"}, []),
    ],
}


def logged_at_start(url: str, caplog: pytest.LogCaptureFixture, **store: str) -> list[str]:
    caplog.clear()
    assert asyncio.run(startup_errors(settings(url, "http://127.0.0.1:1", store=store), {})) is None
    assert {record.levelname for record in caplog.records} <= {"ERROR"}
    return [record.getMessage() for record in caplog.records if "evict" not in record.getMessage()]


@pytest.fixture
def configurable(server: redis.Redis) -> Iterator[redis.Redis]:
    names = ("appendfsync", "save", "appendonly")
    before = {name: server.config_get(name)[name] or "" for name in names}
    yield server
    for name in names:
        server.config_set(name, before[name])


@pytest.mark.parametrize("kept", SETTINGS)
def test_possible_data_loss_is_logged_at_the_start(
    any_store_url: str, configurable: redis.Redis, caplog: pytest.LogCaptureFixture, kept: str
) -> None:
    for wanted, expected in SETTINGS[kept]:
        for name, value in wanted.items():
            configurable.config_set(name, value)
        assert logged_at_start(any_store_url, caplog) == expected


def test_without_access_to_config_nothing_is_logged(
    any_store_url: str, configurable: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    configurable.config_set("appendonly", "no")
    configurable.config_set("save", "")
    access = {"username": "narrow", "password": "secret"}
    for rights, expected in (("-config", []), ("+config", [NOTHING_WRITTEN]), ("-info", [])):
        configurable.execute_command("ACL", "SETUSER", "narrow", "on", ">secret", "~*", "+@all", rights)  # type: ignore[no-untyped-call]  # redis-py's
        assert logged_at_start(any_store_url, caplog, **access) == expected
    configurable.acl_deluser("narrow")


def test_the_worst_of_several_servers_counts(fleet: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    primaries = [fleet.home(slot).client for slot in (0, SLOTS // 2, SLOTS - 1)]
    for primary in primaries:
        primary.config_set("appendonly", "yes")
    assert logged_at_start(fleet.url, caplog) == []
    primaries[1].config_set("appendfsync", "no")
    assert logged_at_start(fleet.url, caplog) == [WRITTEN_LATE]
    primaries[2].config_set("appendonly", "no")
    assert logged_at_start(fleet.url, caplog) == [NOTHING_WRITTEN]


def test_an_unreachable_server_causes_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with server_group("valkey") as group:
        member = group.member()
        member.kill()
        assert logged_at_start(f"redis://127.0.0.1:{member.port}", caplog) == []


def test_warnings_use_the_facts_of_one_server_only() -> None:
    """Facts of two servers are never combined into a warning that applies to neither."""
    for append_only, save, appendfsync in product((None, True, False), (None, "", "60 1"), (None, "no", "everysec")):
        one = data_loss_warning([Persistence(append_only, save, appendfsync)])
        nothing_written, written_late = (append_only, save) == (False, ""), (append_only, appendfsync) == (True, "no")
        assert (one is not None) == (nothing_written or written_late)
    snapshots, appended = Persistence(append_only=False, save="60 1"), Persistence(append_only=True, save="")
    assert data_loss_warning([snapshots, appended]) is None
    assert data_loss_warning([]) is None
