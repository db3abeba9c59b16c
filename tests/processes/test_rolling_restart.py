"""A rolling restart under load loses no request."""

import re
import signal
import subprocess
from pathlib import Path

import pytest
import redis

from balancer import Balancer, balancing
from gateway_fixture import DESIGN, PATH
from gateway_process import SOON_S, GatewayProcess, GatewayRunner
from programs import program
from scripted_simulator import Simulator
from serving import wait_until

DRAIN_DELAY_S = 1.0
LOAD_S = 60
"""Maximum duration; the load ends with the last restart."""

CONNECTIONS = 16
DELAY_MS = 20
"""Between two requests of a connection. Without it the load would take the processors that replicas need to start."""

SCRIPT = f"""
wrk.method = "POST"
wrk.path = "{PATH}"
wrk.headers["X-API-KEY"] = "{DESIGN}"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '[{{"model":"Flux"}}]'
function delay() return {DELAY_MS} end
"""


@pytest.fixture(scope="module")
def wrk() -> str:
    return program("wrk", "the rolling restart was not tested under load")


def replica(runner: GatewayRunner, store_url: str) -> GatewayProcess:
    server = {"drain_delay_s": DRAIN_DELAY_S, "drain_s": 5}
    return runner.start(server=server, store={"url": store_url})


def replace(old: GatewayProcess, runner: GatewayRunner, store_url: str, balancer: Balancer) -> GatewayProcess:
    """Starts a new replica, then stops the old one."""
    new = replica(runner, store_url)
    balancer.add(new.url)
    wait_until(lambda: balancer.is_ready(new.url))
    old.send(signal.SIGTERM)
    assert old.exit_status(within_s=DRAIN_DELAY_S + SOON_S) == 0
    balancer.remove(old.url)
    return new


@pytest.mark.usefixtures("simulator")
def test_a_rolling_restart_loses_no_request(
    runner: GatewayRunner, valkey_url: str, wrk: str, tmp_path: Path, simulator: Simulator
) -> None:
    with redis.Redis.from_url(valkey_url) as store:
        store.flushall()
    first, second = replica(runner, valkey_url), replica(runner, valkey_url)
    (tmp_path / "load.lua").write_text(SCRIPT)
    with balancing(first.url, second.url) as balancer:
        wait_until(lambda: balancer.is_ready(first.url) and balancer.is_ready(second.url))
        wants = [f"-c{CONNECTIONS}", f"-d{LOAD_S}s", f"--timeout={SOON_S:.0f}s"]  # a late answer is not lost
        command = [wrk, "-t1", *wants, "-s", str(tmp_path / "load.lua"), balancer.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as load:
            newer = [replace(old, runner, valkey_url, balancer) for old in (first, second)]
            assert load.poll() is None, "the load ran all the time"
            load.send_signal(signal.SIGINT)  # it ends, and prints its results
            summary, _ = load.communicate(timeout=SOON_S)
    answered = int(re.search(r"(\d+) requests in", summary)[1])  # type: ignore[index] # wrk's summary
    assert answered > 500
    assert "Non-2xx" not in summary, summary
    assert "Socket errors" not in summary, summary
    assert simulator.calls == 1
    assert [served.stop() for served in newer] == [0, 0]
