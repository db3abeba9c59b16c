"""Reloads of a running gateway's settings, by signal and by changed files, with real processes."""

import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway_fixture import API_KEY, DESIGN, MARKETING, PATH, UpstreamFixture
from gateway_process import START_S, GatewayProcess, GatewayRunner, gateway_runner, kill
from lateness import assert_in_time
from load_generator import LogTail
from proxy.auth import digest_of, token_of
from proxy.settings.reload import CHECK_EVERY_S
from scripted_simulator import Simulator
from serving import NO_TLS, serving, wait_until

pytestmark = pytest.mark.usefixtures("measured_processes")

REVOKED_WITHIN_S = 5.0
QUICK_CHECK_S = 0.2
SAVED_S = 2 * (CHECK_EVERY_S - QUICK_CHECK_S)
"""By default a change of files is found this much later: two checks must have seen it."""

NEWCOMER = token_of("n" * 32)


@dataclass(frozen=True)
class Reloaded:
    """A gateway of two workers, so that a worker that misses a reload is noticed. Its tests change its config."""

    runner: GatewayRunner
    served: GatewayProcess

    @property
    def config(self) -> Path:
        return self.runner.folder / "estimate-proxy.toml"

    def reload(self, **sections: Any) -> None:
        log = LogTail(self.served)
        self.runner.config(metrics={"public": True}, **sections)
        self.served.send(signal.SIGHUP)
        wait_until(lambda: log.messages("settings reloaded"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamFixture) -> Iterator[Reloaded]:
    with gateway_runner(tmp_path_factory.mktemp("reload"), upstream.url) as runner:
        served = started(runner)
        yield Reloaded(runner, served)
        assert served.stop() == 0


@pytest.fixture
def gateway(shared: Reloaded, simulator: Simulator) -> Reloaded:
    """Has the settings of `GatewayRunner.config`, whatever the test before it has changed."""
    assert simulator.calls == 0
    token = token_of(secrets.token_hex(16))  # a team of this test only: it shows that both workers have the settings
    shared.reload(teams=teams(test=token))
    wait_until(lambda: statuses(shared.served, token) == {200})
    return shared


def teams(**tokens: str) -> dict[str, Any]:
    return {name: {"tokens": [digest_of(token)]} for name, token in tokens.items()}


def started(runner: GatewayRunner, **sections: Any) -> GatewayProcess:
    quick = runner.patching({"proxy.settings.reload.CHECK_EVERY_S": QUICK_CHECK_S})
    served = runner.begin("--workers", "2", env=quick, metrics={"public": True}, **sections)
    served.wait_until_serving(times=2)
    return served


def statuses(served: GatewayProcess, token: str, **headers: str) -> set[int]:
    """Returns the workers' statuses; each request has its own connection, so either worker may serve it."""
    named = {"x-api-key": token, **{name.replace("_", "-"): value for name, value in headers.items()}}
    fresh = httpx2.Limits(max_keepalive_connections=0)
    with httpx2.Client(
        base_url=served.url, trust_env=False, verify=NO_TLS, limits=fresh, headers=named, timeout=10
    ) as client:
        return {client.post(PATH, content=b"[{}]").status_code for _ in range(10)}


def metric(served: GatewayProcess, name: str) -> float:
    (line,) = (line for line in served.get("/metrics").text.splitlines() if line.startswith(f"{name} "))
    return float(line.rpartition(" ")[2])


def test_a_signal_reloads_teams_and_quotas_in_all_workers(gateway: Reloaded) -> None:
    served = gateway.served
    assert statuses(served, NEWCOMER) == {401}
    gateway.reload(teams=teams(newcomer=NEWCOMER))
    wait_until(lambda: statuses(served, NEWCOMER) == {200})
    nothing = [{"measure": "requests", "limit": 0, "per": "day"}]
    poor = {"newcomer": {**teams(newcomer=NEWCOMER)["newcomer"], "quotas": nothing}}
    gateway.reload(teams=poor)
    wait_until(lambda: statuses(served, NEWCOMER) == {429})
    assert statuses(served, DESIGN) == {200}


def test_viewer_tokens_and_cors_origins_are_added_and_removed_by_a_reload(gateway: Reloaded) -> None:
    served, page = gateway.served, "https://tools.example.com"
    assert statuses(served, NEWCOMER) == {401}
    assert preflight_statuses(served, page) == {403}
    gateway.reload(viewer={"tokens": [digest_of(NEWCOMER)]}, server={"cors_origins": [page]})
    wait_until(lambda: statuses(served, NEWCOMER) == {403} and preflight_statuses(served, page) == {204})
    gateway.reload()
    wait_until(lambda: statuses(served, NEWCOMER) == {401} and preflight_statuses(served, page) == {403})


def preflight_statuses(served: GatewayProcess, origin: str) -> set[int]:
    headers = {"origin": origin, "access-control-request-method": "POST"}
    return {httpx2.options(served.url + PATH, headers=headers, trust_env=False).status_code for _ in range(10)}


def test_a_teams_name_and_earlier_ids_are_reloaded(gateway: Reloaded) -> None:
    served = gateway.served
    gateway.reload(teams=teams(old=NEWCOMER))
    wait_until(lambda: statuses(served, NEWCOMER) == {200})
    renamed = {**teams(new=NEWCOMER)["new"], "name": "The New Ones", "was": ["old"]}
    gateway.reload(teams={"new": renamed})
    wait_until(lambda: statuses(served, NEWCOMER) == {200} and report(served, "/v1/quota").get("team") == "new")
    assert report(served, "/v1/quota")["team_name"] == "The New Ones"
    assert metric(served, 'estimate_proxy_team_info{name="The New Ones",team="new"}') == 1
    assert report(served, "/v1/usage")["total"]["requests"] >= 20, "ten before the change, under the old id"


def report(served: GatewayProcess, path: str) -> Any:
    with served.client() as client:
        return client.get(path, headers={"x-api-key": NEWCOMER}).json()


def test_a_removed_config_file_is_named_and_changes_nothing(runner: GatewayRunner) -> None:
    """A file in the current directory, which no option names: the shell drops the options that the runner adds."""
    shell = ("sh", "-c", f"exec {sys.executable} -m proxy serve --port 0 --workers 2")
    served = runner.begin(command=shell, metrics={"public": True}, teams=teams(design=DESIGN))
    served.wait_until_serving(times=2)
    (runner.folder / "estimate-proxy.toml").unlink()
    served.send(signal.SIGHUP)
    served.wait_for_message("the old settings stay in force: estimate-proxy.toml")
    assert statuses(served, DESIGN) == {200}
    assert served.stop() == 0


def test_a_revoked_token_is_refused_soon_after_its_file_has_changed(gateway: Reloaded) -> None:
    served = gateway.served
    assert statuses(served, MARKETING) == {200}
    changed_at = time.monotonic()
    gateway.runner.config(metrics={"public": True}, teams=teams(design=DESIGN, marketing=NEWCOMER))
    wait_until(lambda: statuses(served, MARKETING) == {401})
    assert_in_time(time.monotonic() - changed_at, REVOKED_WITHIN_S - SAVED_S)
    assert statuses(served, NEWCOMER) == statuses(served, DESIGN) == {200}


def test_a_file_rewritten_in_place_with_its_old_size_and_time_is_reloaded(gateway: Reloaded) -> None:
    """`cp -p`, configuration management and some editors do this."""
    served, config = gateway.served, gateway.config
    before = config.stat()
    config.write_text(config.read_text().replace(digest_of(MARKETING), digest_of(NEWCOMER)))
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = config.stat()
    same = ("st_ino", "st_size", "st_mtime_ns")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]
    wait_until(lambda: statuses(served, MARKETING) == {401})
    assert statuses(served, NEWCOMER) == {200}


def test_an_invalid_file_keeps_the_old_settings_and_is_reported(gateway: Reloaded) -> None:
    served, config = gateway.served, gateway.config
    log = LogTail(served)
    good = config.read_text()
    assert metric(served, "estimate_proxy_config_last_reload_successful") == 1
    config.write_text(good.replace("server.drain_delay_s", "server.drain_dealy_s"))
    wait_until(lambda: log.messages("the old settings stay in force"))
    (message,) = log.messages("the old settings stay in force")
    assert message.endswith("server.drain_dealy_s is not a setting: did you mean drain_delay_s?")
    wait_until(lambda: metric(served, "estimate_proxy_config_last_reload_successful") == 0)
    assert statuses(served, DESIGN) == {200}
    for worker in served.workers():
        kill(worker)
    wait_until(lambda: len(log.messages("serving on ")) == 2, within_s=START_S)
    assert metric(served, "estimate_proxy_config_last_reload_successful") == 0, "new workers get them too"
    config.write_text(good)
    wait_until(lambda: metric(served, "estimate_proxy_config_last_reload_successful") == 1)
    assert len(log.messages("the old settings stay in force")) == 1, "it is logged once per change, not per check"


def test_settings_that_need_a_restart_are_named_and_keep_their_values(gateway: Reloaded) -> None:
    served, log = gateway.served, LogTail(gateway.served)
    store = {"data_dir": str(gateway.runner.data_dir), "timeout_s": 0.3, "connect_timeout_s": 3}
    changed: dict[str, Any] = {"org": {"timezone": "Asia/Tokyo"}, "cache": {"ttl_s": 7}, "store": store}
    gateway.reload(**changed, teams=teams(design=NEWCOMER))
    wait_until(lambda: statuses(served, NEWCOMER) == {200})
    assert log.messages("restart the gateway") == [
        f"{path} has changed: restart the gateway to apply it"
        for path in ("store.timeout_s", "store.connect_timeout_s", "cache.ttl_s", "org.timezone")
    ]
    assert "ttl=3" in served.ask(x_api_key=NEWCOMER).headers["cache-status"]


def test_a_key_is_rotated_by_swapping_a_symbolic_link(tmp_path: Path) -> None:
    """Kubernetes updates a mounted Secret this way: it replaces the link to the directory, not the file."""
    simulator = Simulator(api_key=API_KEY, spend_every=0)
    for number, key in enumerate((API_KEY, "rn-another-key")):
        (tmp_path / f"v{number}").mkdir()
        (tmp_path / f"v{number}" / "key").write_text(key)
    (tmp_path / "secrets").symlink_to("v0")
    with serving(simulator.app) as url, gateway_runner(tmp_path, url) as runner:
        served = started(runner, accounts={"default": {"api_key_file": "secrets/key"}})
        assert served.ask(b"[{}]").status_code == 200
        (tmp_path / "next").symlink_to("v1")
        (tmp_path / "next").rename(tmp_path / "secrets")
        served.wait_for_message("settings reloaded")
        for number in range(6):
            served.ask(b'[{"seed":%d}]' % number)
        keys = [key for one in simulator.received for key in one.api_keys]
        assert keys == [API_KEY.encode(), *[b"rn-another-key"] * 6]
        assert served.stop() == 0


def test_ignored_members_can_change(gateway: Reloaded) -> None:
    served = gateway.served
    bodies = [b'[{"model":"Flux","seed":%d}]' % seed for seed in range(2)]
    keys = {served.ask(body).headers["cache-status"].split("; ")[1] for body in bodies}
    assert keys == {"fwd=miss"}
    gateway.reload(cache={"ignore": ["seed"]})
    served.ask(b'[{"model":"Flux","seed":7}]')
    wait_until(lambda: served.ask(b'[{"model":"Flux","seed":8}]').headers["cache-status"].split("; ")[1] == "hit")


def test_a_request_keeps_the_settings_it_started_with(gateway: Reloaded, simulator: Simulator) -> None:
    served, calls = gateway.served, simulator.calls
    with simulator.hold() as hold, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(served.ask, b'[{"model":"Held"}]')
        assert simulator.arrived(calls + 1)
        gateway.reload(teams=teams(design=NEWCOMER))
        wait_until(lambda: statuses(served, DESIGN, cache_control="only-if-cached") == {401})
        hold.release()
        assert asking.result(10).status_code == 200


def test_learned_prices_stop_answering_within_seconds(runner: GatewayRunner) -> None:
    learning = {"learn_from": 1, "audit_one_in": 10_000}
    served = started(runner, cache={"learn": "use", **learning})
    numbers = count(5000)

    def is_inferred() -> bool:
        answer = served.ask(b'[{"model":"Flux","seed":%d}]' % next(numbers))
        return "detail=inferred" in answer.headers["cache-status"]

    for seed in (*range(4000, 4012), 9999, 4500):
        served.ask(b'[{"model":"Flux","seed":%d}]' % seed)
    wait_until(is_inferred)
    gateway = Reloaded(runner, served)
    gateway.reload(cache={"learn": "off", **learning})
    changed_at = time.monotonic()
    wait_until(lambda: not any(is_inferred() for _ in range(10)))
    assert_in_time(time.monotonic() - changed_at, REVOKED_WITHIN_S)
    gateway.reload(cache={"learn": "use", **learning})
    wait_until(is_inferred)  # what was learned is kept
    assert served.stop() == 0
