"""Reloads of a running gateway's settings, by signal and by changed files, with real processes."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway_fixture import API_KEY, DESIGN, MARKETING, PATH, UpstreamFixture
from gateway_process import GatewayProcess, GatewayRunner, gateway_runner, kill
from lateness import assert_in_time
from proxy.auth import digest_of, token_of
from scripted_simulator import Simulator
from serving import NO_TLS, serving, wait_until

pytestmark = pytest.mark.usefixtures("measured_processes")

REVOKED_WITHIN_S = 5.0
NEWCOMER = token_of("n" * 32)


@pytest.fixture
def runner(tmp_path: Path, upstream: UpstreamFixture, simulator: Simulator) -> Iterator[GatewayRunner]:  # noqa: ARG001 -- upstream uses it
    with gateway_runner(tmp_path, upstream.url) as opened:
        yield opened


def teams(**tokens: str) -> dict[str, Any]:
    return {name: {"tokens": [digest_of(token)]} for name, token in tokens.items()}


def started(runner: GatewayRunner, **sections: Any) -> GatewayProcess:
    """Starts two workers, so that a worker that misses a reload is noticed."""
    served = runner.begin("--workers", "2", metrics={"public": True}, **sections)
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


def reloaded(served: GatewayProcess, runner: GatewayRunner, *, times: int = 1, **sections: Any) -> None:
    runner.config(metrics={"public": True}, **sections)
    served.send(signal.SIGHUP)
    served.wait_for_message("settings reloaded", times=times)


def test_a_signal_reloads_teams_and_quotas_in_all_workers(runner: GatewayRunner) -> None:
    served = started(runner, teams=teams(design=DESIGN))
    assert statuses(served, NEWCOMER) == {401}
    reloaded(served, runner, teams=teams(design=DESIGN, newcomer=NEWCOMER))
    wait_until(lambda: statuses(served, NEWCOMER) == {200})
    nothing = [{"measure": "requests", "limit": 0, "per": "day"}]
    poor = {"newcomer": {**teams(newcomer=NEWCOMER)["newcomer"], "quotas": nothing}}
    reloaded(served, runner, times=2, teams={**teams(design=DESIGN), **poor})
    wait_until(lambda: statuses(served, NEWCOMER) == {429})
    assert statuses(served, DESIGN) == {200}
    assert served.stop() == 0


def test_viewer_tokens_and_cors_origins_are_added_and_removed_by_a_reload(runner: GatewayRunner) -> None:
    page = "https://tools.example.com"
    served = started(runner)
    assert statuses(served, NEWCOMER) == {401}
    assert preflight_statuses(served, page) == {403}
    reloaded(served, runner, viewer={"tokens": [digest_of(NEWCOMER)]}, server={"cors_origins": [page]})
    wait_until(lambda: statuses(served, NEWCOMER) == {403} and preflight_statuses(served, page) == {204})
    reloaded(served, runner, times=2)
    wait_until(lambda: statuses(served, NEWCOMER) == {401} and preflight_statuses(served, page) == {403})
    assert served.stop() == 0


def preflight_statuses(served: GatewayProcess, origin: str) -> set[int]:
    headers = {"origin": origin, "access-control-request-method": "POST"}
    return {httpx2.options(served.url + PATH, headers=headers, trust_env=False).status_code for _ in range(10)}


def test_a_teams_name_and_earlier_ids_are_reloaded(runner: GatewayRunner) -> None:
    served = started(runner, teams=teams(old=NEWCOMER))
    assert statuses(served, NEWCOMER) == {200}
    renamed = {**teams(new=NEWCOMER)["new"], "name": "The New Ones", "was": ["old"]}
    reloaded(served, runner, teams={"new": renamed})
    wait_until(lambda: statuses(served, NEWCOMER) == {200} and report(served, "/v1/quota").get("team") == "new")
    assert report(served, "/v1/quota")["team_name"] == "The New Ones"
    assert metric(served, 'estimate_proxy_team_info{name="The New Ones",team="new"}') == 1
    assert report(served, "/v1/usage")["total"]["requests"] >= 20, "ten before the change, under the old id"
    assert served.stop() == 0


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


def test_a_revoked_token_is_refused_soon_after_its_file_has_changed(runner: GatewayRunner) -> None:
    served = started(runner)
    assert statuses(served, MARKETING) == {200}
    changed_at = time.monotonic()
    runner.config(metrics={"public": True}, teams=teams(design=DESIGN, marketing=NEWCOMER))
    wait_until(lambda: statuses(served, MARKETING) == {401})
    assert_in_time(time.monotonic() - changed_at, REVOKED_WITHIN_S)
    assert statuses(served, NEWCOMER) == statuses(served, DESIGN) == {200}
    assert served.stop() == 0


def test_a_file_rewritten_in_place_with_its_old_size_and_time_is_reloaded(runner: GatewayRunner) -> None:
    """`cp -p`, configuration management and some editors do this."""
    served = started(runner)
    config = runner.folder / "estimate-proxy.toml"
    before = config.stat()
    config.write_text(config.read_text().replace(digest_of(MARKETING), digest_of(NEWCOMER)))
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = config.stat()
    same = ("st_ino", "st_size", "st_mtime_ns")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]
    wait_until(lambda: statuses(served, MARKETING) == {401})
    assert statuses(served, NEWCOMER) == {200}
    assert served.stop() == 0


def test_an_invalid_file_keeps_the_old_settings_and_is_reported(runner: GatewayRunner) -> None:
    served = started(runner)
    config = runner.folder / "estimate-proxy.toml"
    good = config.read_text()
    assert metric(served, "estimate_proxy_config_last_reload_successful") == 1
    config.write_text(good.replace("server.drain_delay_s", "server.drain_dealy_s"))
    message = served.wait_for_message("the old settings stay in force")
    assert message.endswith("server.drain_dealy_s is not a setting: did you mean drain_delay_s?")
    wait_until(lambda: metric(served, "estimate_proxy_config_last_reload_successful") == 0)
    assert statuses(served, DESIGN) == {200}
    for worker in served.workers():
        kill(worker)
    served.wait_until_serving(times=4)
    assert metric(served, "estimate_proxy_config_last_reload_successful") == 0, "new workers get them too"
    config.write_text(good)
    wait_until(lambda: metric(served, "estimate_proxy_config_last_reload_successful") == 1)
    assert len(served.messages("the old settings stay in force")) == 1, "it is logged once per change, not per check"
    assert served.stop() == 0


def test_settings_that_need_a_restart_are_named_and_keep_their_values(runner: GatewayRunner) -> None:
    served = started(runner)
    store = {"data_dir": str(runner.data_dir), "timeout_s": 0.3, "connect_timeout_s": 3}
    changed: dict[str, Any] = {"org": {"timezone": "Asia/Tokyo"}, "cache": {"ttl_s": 7}, "store": store}
    reloaded(served, runner, **changed, teams=teams(design=NEWCOMER))
    wait_until(lambda: statuses(served, NEWCOMER) == {200})
    assert served.messages("restart the gateway") == [
        f"{path} has changed: restart the gateway to apply it"
        for path in ("store.timeout_s", "store.connect_timeout_s", "cache.ttl_s", "org.timezone")
    ]
    assert "ttl=3" in served.ask(x_api_key=NEWCOMER).headers["cache-status"]
    assert served.stop() == 0


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


def test_ignored_members_can_change(runner: GatewayRunner) -> None:
    served = started(runner)
    bodies = [b'[{"model":"Flux","seed":%d}]' % seed for seed in range(2)]
    keys = {served.ask(body).headers["cache-status"].split("; ")[1] for body in bodies}
    assert keys == {"fwd=miss"}
    reloaded(served, runner, cache={"ignore": ["seed"]})
    served.ask(b'[{"model":"Flux","seed":7}]')
    wait_until(lambda: served.ask(b'[{"model":"Flux","seed":8}]').headers["cache-status"].split("; ")[1] == "hit")
    assert served.stop() == 0


def test_a_request_keeps_the_settings_it_started_with(runner: GatewayRunner, simulator: Simulator) -> None:
    served = started(runner)
    with simulator.hold() as hold, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(served.ask)
        assert simulator.arrived(1)
        reloaded(served, runner, teams=teams(design=NEWCOMER))
        wait_until(lambda: statuses(served, DESIGN, cache_control="only-if-cached") == {401})
        hold.release()
        assert asking.result(10).status_code == 200
    assert served.stop() == 0
