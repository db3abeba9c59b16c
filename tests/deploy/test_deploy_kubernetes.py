"""The Kubernetes manifests of `deploy/`: secrets, rights, probes, draining, scaling and the network."""

from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from deploy_files import CONFIG, DEPLOY, drain_of, image_environment, of_image, said_by, settings_of
from programs import program
from proxy import __version__
from proxy.settings.schema import Settings
from proxy.urls import parse_store_url

KUBERNETES = DEPLOY / "kubernetes"
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
    """Returns the files that pods mount from Secrets."""
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
    """Kustomize adds a ConfigMap. kubectl is not in any Debian package."""
    kubectl = program("kubectl", "the manifests were read, not built", on_ci=False)
    built = {made["kind"]: made for made in yaml.safe_load_all(said_by(kubectl, "kustomize", KUBERNETES))}
    assert built.keys() == {"ConfigMap", *MANIFESTS}
    assert built["ConfigMap"]["metadata"]["name"] == volume("config")["configMap"]["name"]
    assert built["ConfigMap"]["data"] == {"config.toml": (KUBERNETES / "config.toml").read_text()}
    image = built["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"{CONTAINER['image']}:{__version__}"


def test_kubernetes_uses_the_image_of_this_version() -> None:
    assert KUSTOMIZATION["images"] == [{"name": CONTAINER["image"], "newTag": __version__}]


def test_a_changed_config_map_reaches_running_pods() -> None:
    """Its name stays the same, and it is mounted as a folder, because subPath mounts are never updated."""
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


def test_pods_are_stateless_and_use_external_stores(kubernetes_settings: Settings) -> None:
    for url in (kubernetes_settings.store.url, kubernetes_settings.cache.url):
        assert url is not None
        assert parse_store_url(url.get_secret_value()).tls
    assert kubernetes_settings.store.password is not None
    kinds = [kind for volume in POD["volumes"] for kind in volume if kind != "name"]
    assert kinds == ["configMap", "secret"]


def test_pods_run_without_privileges() -> None:
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


def test_pods_write_no_file() -> None:
    assert all(mount["readOnly"] for mount in CONTAINER["volumeMounts"])
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
    assert "replicas" not in DEPLOYMENT, "each `apply` would reset them"
    assert 2 <= spec["minReplicas"] < spec["maxReplicas"]
    assert spec["metrics"][0]["resource"]["name"] in CONTAINER["resources"]["requests"]


def test_every_selector_matches_these_pods() -> None:
    assert DEPLOYMENT["selector"] == {"matchLabels": POD_LABELS}
    assert MANIFESTS["Service"]["spec"]["selector"] == POD_LABELS
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["selector"] == {"matchLabels": POD_LABELS}
    assert MANIFESTS["NetworkPolicy"]["spec"]["podSelector"] == {"matchLabels": POD_LABELS}
    assert MANIFESTS["ServiceMonitor"]["spec"]["selector"] == {
        "matchLabels": MANIFESTS["Service"]["metadata"]["labels"]
    }
    (port,) = MANIFESTS["Service"]["spec"]["ports"]
    assert (port["name"], port["targetPort"]) == ("http", "http")


def test_the_network_policy_allows_only_the_needed_traffic(kubernetes_settings: Settings) -> None:
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


def test_the_service_monitor_scrapes_the_job_that_the_alerts_use() -> None:
    (endpoint,) = MANIFESTS["ServiceMonitor"]["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
    assert endpoint["authorization"]["credentials"].keys() == {"name", "key"}
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == MANIFESTS["Service"]["metadata"]["name"], "a service's name becomes the job's"
