"""The systemd unit of `deploy/`: how it stops, where its data is, its key, and its hardening."""

import sys
from collections import defaultdict
from pathlib import Path, PurePosixPath

import pytest

from deploy_files import CONFIG, DEPLOY, STORES_GRACE_S, drain_of, said_by, settings_of
from programs import program
from proxy.settings.schema import Settings

UNIT = DEPLOY / "systemd" / "estimate-proxy.service"
CREDENTIALS = PurePosixPath("/run/credentials", UNIT.name)


def unit() -> dict[str, list[str]]:
    """Returns the unit's directives by name; a name may occur more than once."""
    found = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found[name].append(value)
    return found


@pytest.fixture
def machine_settings(tmp_path: Path) -> Settings:
    loaded = [credential.partition(":")[0] for credential in unit()["LoadCredential"]]
    return settings_of(UNIT.parent / "config.toml", {}, [CREDENTIALS / name for name in loaded], tmp_path)


def test_the_unit_uses_the_installed_config() -> None:
    assert unit()["ExecStart"] == [f"/opt/estimate-proxy/bin/estimate-proxy serve --config {CONFIG}"]
    assert unit()["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


def test_the_unit_sends_sigterm_only_to_the_supervisor(machine_settings: Settings) -> None:
    """If the stores also got the first SIGTERM, they would stop before the workers have drained."""
    assert unit()["KillMode"] == ["mixed"]
    assert int(unit()["TimeoutStopSec"][0]) > drain_of(machine_settings) + STORES_GRACE_S
    assert unit()["OOMPolicy"] == ["continue"]
    assert unit()["Restart"] == ["on-failure"]


def test_the_unit_has_directories_for_data_and_sockets(machine_settings: Settings) -> None:
    (name,) = unit()["StateDirectory"]
    assert machine_settings.store.data_dir == Path("/var/lib", name)
    assert machine_settings.store.url is machine_settings.cache.url is None, "the embedded stores"
    assert len(unit()["RuntimeDirectory"]) == 1, "systemd names it in RUNTIME_DIRECTORY"
    assert unit()["StateDirectoryMode"] == unit()["RuntimeDirectoryMode"] == ["0700"]


def test_the_unit_passes_the_key_as_a_credential(machine_settings: Settings) -> None:
    assert machine_settings.accounts["default"].api_key.get_secret_value() == "secret"
    assert "Environment" not in unit()


def test_the_unit_is_hardened_as_far_as_the_gateway_allows() -> None:
    yes = [name for name, values in unit().items() if values == ["yes"]]
    assert set(yes) >= {"DynamicUser", "NoNewPrivileges", "PrivateTmp", "ProtectHome", "MemoryDenyWriteExecute"}
    assert unit()["ProtectSystem"] == ["strict"]
    assert unit()["CapabilityBoundingSet"] == [""]
    assert unit()["SystemCallFilter"] == ["@system-service", "~@privileged"]
    assert "AF_UNIX" in unit()["RestrictAddressFamilies"][0].split(), "the embedded stores have no other sockets"


def test_systemd_accepts_the_unit_and_rates_its_exposure_low(tmp_path: Path) -> None:
    analyze = program("systemd-analyze", "the unit was not tried")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/estimate-proxy/bin/estimate-proxy", sys.executable))
    assert UNIT.name not in said_by(analyze, "verify", "--man=no", copy)
    said_by(analyze, "security", "--offline=true", "--threshold=20", "--no-pager", copy)
