"""The demo as a real process: its commands run in a real shell, and every way in which it can end."""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.auth import digest_of, new_token
from proxy.cache.canonical import canonicalise
from proxy.demo.runner import FAULTS
from proxy.demo.setup import (
    RESPELLED_BODY,
    SAMPLE_BODY,
    TEAMS,
    DemoEnvironment,
    config_text,
    environment,
    introduction,
    last_errors,
)
from proxy.demo.simulator import ESTIMATE_PATH, Simulator
from proxy.demo.traffic import BURST_LEAST, BURST_MOST, POOL, QUERY, Body, TrafficTotals, next_burst, respell
from proxy.gateway.live_config import limits_of, teams_of
from proxy.settings.loader import load
from serving import NO_TLS, free_port, serving, wait_until

pytestmark = pytest.mark.usefixtures("measured_processes")

FOREIGN = ("ESTIMATE_PROXY_", "REDIS_URL", "RENDERNET_API_KEY", "FORCE_COLOR", "NO_COLOR", "TTY_", "TERM")
INVITATION = "Press Ctrl-C to end the demo."
ENDED = "The demo has ended; its files are gone."
STOP_S = 10.0
GONE_S = 5.0


@dataclass
class RunningDemo:
    """A running demo. `folder` has all its files."""

    process: psutil.Popen
    folder: Path
    screen: int
    errors: Path
    _printed: bytearray = field(default_factory=bytearray)

    def printed(self) -> str:
        """Returns everything that it has printed so far."""
        with suppress(OSError):  # nothing yet, or a terminal whose other end is closed
            while chunk := os.read(self.screen, 65536):
                self._printed += chunk
        return self._printed.decode().replace("\r\n", "\n")

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.printed() or self.process.poll() is not None, within_s=20)
        assert text in self.printed(), self.errors.read_text()

    def wait_for_totals(self, count: int) -> None:
        """Waits until its live line has shown so many different numbers of requests."""
        wait_until(lambda: len(set(re.findall(r"requests [1-9]\d*", self.printed()))) >= count, within_s=20)

    def stop_reading(self) -> None:
        """Closes the reading end of its output, and makes it write."""
        with Path(os.devnull).open() as nowhere:
            os.dup2(nowhere.fileno(), self.screen)

    def commands(self) -> list[str]:
        """Returns the commands that it suggests."""
        return re.findall(r"^(?:curl|echo|\S*estimate-proxy|\S+ -m proxy) (?:.*\\\n)*.*$", self.printed(), re.MULTILINE)

    def estimates_logged(self) -> int:
        [log] = self.folder.glob("*/gateway.log")
        return log.read_text().count('"operation":"estimate"')

    def end(self, *signals: int) -> int:
        """Sends these signals, returns the exit status, and asserts that no process or file is left."""
        everybody = self.process.children(recursive=True)
        assert len(everybody) >= 3, "supervisor, worker, store"
        for number in signals:
            self.process.send_signal(number)
        status = self.process.wait(STOP_S)
        assert all(gone(process) for process in everybody)
        assert list(self.folder.iterdir()) == []
        return int(status)


def gone(process: psutil.Process) -> bool:
    """Returns whether a process has ended; the parent of an orphan may be slow to collect it."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def demo(*options: str, terminal: bool = False) -> Iterator[RunningDemo]:
    """Starts a demo that prints to a pipe or a terminal, and kills it at the end of the test."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    command = [sys.executable, "-W", "always::ResourceWarning", "-m", "proxy", "demo", *options]
    screen, theirs = pty.openpty() if terminal else os.pipe()
    os.set_blocking(screen, False)
    # Short and private: files that a killed demo leaves are deleted with it.
    with tempfile.TemporaryDirectory(prefix="ep-") as outer:
        folder, errors = Path(outer) / "t", Path(outer) / "stderr"
        folder.mkdir()
        environ |= {"TMPDIR": str(folder), "TERM": "xterm", "XDG_RUNTIME_DIR": str(folder)}
        with errors.open("wb") as stderr:
            process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=stderr, env=environ)
        os.close(theirs)
        try:
            yield RunningDemo(process, folder, screen, errors)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            os.close(screen)


def paste(command: str) -> str:
    """Runs a command in a shell, and returns its output."""
    if command.startswith("curl") and shutil.which("curl") is None:
        return sent_without_curl(command)
    environ = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        ["/bin/sh", "-c", command], env=environ, capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout


def sent_without_curl(command: str) -> str:
    _, options, url, *rest = shlex.split(command.replace("\\\n", ""))
    given = list(zip(rest[::2], rest[1::2], strict=True))
    headers = dict(value.split(": ") for option, value in given if option == "-H")
    body = next((value for option, value in given if option == "-d"), None)
    method = "GET" if body is None else "POST"
    response = httpx2.request(method, url, headers=headers, content=body, trust_env=False, verify=NO_TLS)
    head = [f"HTTP/1.1 {response.status_code}", *(f"{name}: {value}" for name, value in response.headers.items())]
    return ("\n".join(head) + "\n\n" if "i" in options else "") + response.text


def cache_status(response: str) -> str:
    head = response.partition("\n\n")[0]
    return head.lower().partition("cache-status: ")[2].partition("\n")[0]


def test_pasted_commands_show_a_miss_then_a_hit_then_the_stored_price() -> None:
    with demo("--port", "0", "--no-traffic") as running_demo:
        running_demo.wait_for(INVITATION)
        question, respelled, explain, own, quotas, all_teams, offline = running_demo.commands()

        first, second = paste(question), paste(respelled)
        explained = json.loads(paste(explain))

        assert "fwd=miss; fwd-status=200; stored" in cache_status(first)
        assert cache_status(second).startswith("estimate-proxy; hit; ttl=")
        assert (
            first.splitlines()[-1] == second.splitlines()[-1] == '{"data":{"estimated":4,"balance":10000},"error":{}}'
        )
        assert "60 days" not in running_demo.printed(), "past usage belongs to the traffic"
        assert explained["stored"]
        assert explained["estimated"] == 4
        assert explained["key"] in paste(offline)
        usage, quota = json.loads(paste(own)), json.loads(paste(quotas))
        assert (usage["total"]["requests"], usage["total"]["estimated_credits"]) == (1, 4)
        assert {quota_state["scope"]: quota_state["used"] for quota_state in quota["quotas"]} == {"team": 4, "org": 8}
        assert "design" in paste(all_teams)

        assert running_demo.end(signal.SIGTERM) == 0
        assert running_demo.printed().endswith(f"{INVITATION}\n{ENDED}\n")
        assert running_demo.errors.read_text() == ""


def test_ctrl_c_ends_the_traffic_with_totals() -> None:
    port = free_port()
    with demo("--port", str(port)) as running_demo:
        running_demo.wait_for(INVITATION)
        [own_folder] = running_demo.folder.iterdir()
        assert own_folder.stat().st_mode & 0o777 == 0o700
        wait_until(lambda: running_demo.estimates_logged() >= 10, within_s=15)

        assert running_demo.end(signal.SIGINT, signal.SIGINT) == 0

        assert "the usage of the 60 days before today" in running_demo.printed()
        totals = running_demo.printed().splitlines()[-1]
        assert f"http://127.0.0.1:{port}\n" in running_demo.printed()
        assert re.match(re.escape(ENDED) + r" requests \d\d+: hits \d+, misses \d+, collapsed \d+, failed \d+", totals)
        assert re.search(r"upstream calls saved \d+; estimated credits [\d,]+\.\d\d; balance [\d,]+$", totals)
        assert "\x1b" not in running_demo.printed()
        assert running_demo.errors.read_text() == ""


def test_a_killed_demo_leaves_no_process() -> None:
    with demo("--port", "0") as running_demo:
        running_demo.wait_for(INVITATION)
        everybody = running_demo.process.children(recursive=True)
        assert len(everybody) >= 3

        running_demo.process.kill()

        wait_until(lambda: all(map(gone, everybody)), within_s=GONE_S)


def test_a_port_in_use_is_reported_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with demo("--port", str(port)) as running_demo:
            assert running_demo.process.wait(STOP_S) == 2

            assert running_demo.errors.read_text() == (
                f"estimate-proxy: cannot listen on 127.0.0.1:{port}: Address already in use; "
                "choose another port with --port\n"
            )
            assert running_demo.printed() == ""
            assert list(running_demo.folder.iterdir()) == []


def test_a_gateway_that_dies_ends_the_demo() -> None:
    with demo("--port", "0") as running_demo:
        running_demo.wait_for(INVITATION)
        [gateway] = running_demo.process.children()

        gateway.kill()

        assert running_demo.process.wait(STOP_S) == 1
        assert running_demo.errors.read_text().startswith(
            "estimate-proxy: the gateway ended unexpectedly, with status -9"
        )
        assert list(running_demo.folder.iterdir()) == []


def test_a_terminal_shows_a_live_line() -> None:
    with demo("--port", "0", terminal=True) as running_demo:
        running_demo.wait_for_totals(2)

        assert running_demo.commands()[0].endswith(f"\n  -d '{SAMPLE_BODY}'"), "neither wrapped nor coloured"

        assert running_demo.end(signal.SIGINT) == 0
        assert "\x1b[?25h" in running_demo.printed(), "the cursor is back"
        assert ENDED in running_demo.printed()


@pytest.fixture
def sighup_not_ignored() -> Iterator[None]:
    """Lets SIGHUP end the started processes, even if the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("sighup_not_ignored")
def test_a_closed_terminal_ends_it() -> None:
    with demo("--port", "0", terminal=True) as running_demo:
        running_demo.wait_for_totals(1)

        running_demo.stop_reading()

        assert running_demo.end(signal.SIGHUP) == 0
        assert running_demo.errors.read_text() == ""


def test_a_closed_output_pipe_ends_it_without_a_traceback() -> None:
    with demo("--port", "0") as running_demo:
        running_demo.wait_for(INVITATION)
        running_demo.stop_reading()

        running_demo.end(signal.SIGINT)

        assert running_demo.errors.read_text() == ""


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(-(2.0**63), 2.0**63, allow_nan=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(texts, json_values, max_size=4), min_size=1, max_size=3), st.randoms())
def test_respelling_keeps_the_request(body: Body, random: Random) -> None:
    plain = json.dumps(body).encode()

    assert canonicalise(respell(body, random).encode()) == canonicalise(plain)


def test_respelling_is_rarely_the_same() -> None:
    random = Random(7)

    assert len({respell(POOL[0], random) for _ in range(50)}) == 50


def test_the_pool_has_forty_different_requests() -> None:
    assert len({canonicalise(json.dumps(body).encode()) for body in POOL}) == len(POOL) == 40


def test_popular_requests_repeat_and_bursts_are_new() -> None:
    random = Random(7)
    moments = [next_burst(random) for _ in range(2000)]
    bursts = [body for body, times in moments if times > 1]
    again = [body for body, times in moments if body in POOL]

    assert {times for _, times in moments} == {1, *range(BURST_LEAST, BURST_MOST)}
    assert 80 < len(bursts) < 160
    assert not any(body in POOL for body in bursts)
    assert 1500 < len(again) < 1700
    assert again.count(POOL[0]) > 10 * again.count(POOL[-1]) > 0


def test_both_spellings_are_one_request() -> None:
    assert canonicalise(SAMPLE_BODY.encode()) == canonicalise(RESPELLED_BODY.encode())
    assert SAMPLE_BODY not in RESPELLED_BODY


PRICED = {"data": {"estimated": 2.75, "balance": 9000}, "error": {}}


@pytest.mark.parametrize(
    ("status", "header", "answer", "expected"),
    [
        (
            200,
            "estimate-proxy; hit; ttl=9",
            PRICED,
            "hits 1, misses 0, collapsed 0, failed 0; upstream calls saved 1",
        ),
        (
            200,
            "estimate-proxy; fwd=miss; stored",
            PRICED,
            "hits 0, misses 1, collapsed 0, failed 0; upstream calls saved 0",
        ),
        (200, "estimate-proxy; fwd=miss; collapsed", PRICED, "collapsed 1, failed 0; upstream calls saved 1"),
        (200, "estimate-proxy; fwd=miss", {"data": None, "error": {"code": "x"}}, "failed 1 (unpriced 1)"),
        (502, "estimate-proxy; fwd=miss", {"data": None, "error": {"code": "upstream-error"}}, "(upstream-error 1)"),
        (500, "", None, "failed 1 (status 500 1); upstream calls saved 0; estimated credits 0.00; balance unknown"),
    ],
)
def test_responses_are_counted_by_kind(status: int, header: str, answer: Any, expected: str) -> None:
    traffic_totals = TrafficTotals()

    traffic_totals.record(status, header, answer)

    assert expected in str(traffic_totals)
    assert str(traffic_totals).startswith("requests 1: ")


def test_credits_add_up_exactly() -> None:
    traffic_totals = TrafficTotals()
    for balance in range(10_000, 9_000, -1):
        traffic_totals.record(200, "estimate-proxy; hit", {"data": {"estimated": 1.1, "balance": balance}, "error": {}})

    assert traffic_totals.estimated == Decimal(1100)
    assert str(traffic_totals).endswith("estimated credits 1,100.00; balance 9,001")


def demo_environment(folder: Path) -> DemoEnvironment:
    return DemoEnvironment(folder, "http://127.0.0.1:4711", {team: new_token() for team in TEAMS}, new_token())


def test_the_gateway_accepts_the_generated_config(tmp_path: Path) -> None:
    odd = tmp_path / 'a "quoted" földer'
    odd.mkdir()
    there = demo_environment(odd)
    there.config.write_text(config_text(there, port=8080), encoding="utf-8")

    settings = load(there.config, {})

    assert settings.store.data_dir == odd / "store"
    assert settings.upstream.base_url == there.upstream_url
    assert list(settings.teams) == list(TEAMS)
    assert all(value not in there.config.read_text("utf-8") for value in there.tokens.values())
    assert teams_of(settings, limits_of(settings))


def test_commands_can_be_pasted_anywhere(tmp_path: Path) -> None:
    expected = "\n".join(
        line for entry in introduction(demo_environment(tmp_path), "http://127.0.0.1:8080") for line in entry
    )

    assert expected.isascii()
    assert "spent" not in expected


def test_the_usage_page_and_its_token_are_shown(tmp_path: Path) -> None:
    demo = demo_environment(tmp_path)
    demo.config.write_text(config_text(demo, port=8080), encoding="utf-8")

    shown = dict(introduction(demo, "http://127.0.0.1:8080"))

    assert (
        shown["The usage page: open it in a browser, and paste this token."]
        == f"http://127.0.0.1:8080/   {demo.viewer}"
    )
    assert load(demo.config, {}).viewer.tokens == (digest_of(demo.viewer),)


def test_the_environment_changes_no_setting(tmp_path: Path) -> None:
    environ = {"REDIS_URL": "r", "RENDERNET_API_KEY": "k", "ESTIMATE_PROXY_SERVER__PORT": "1", "LANG": "C.UTF-8"}
    environ |= {"XDG_RUNTIME_DIR": "/run/user/1", "RUNTIME_DIRECTORY": "/run/other"}

    assert environment(environ, tmp_path) == {"LANG": "C.UTF-8", "TMPDIR": str(tmp_path)}


def test_last_errors_are_only_errors() -> None:
    log = '{"level":"info","message":"request"}\n{"level":"error","message":"first"}\nestimate-proxy: second\n'

    assert last_errors(log) == "first | second"
    assert last_errors("") == ""


def test_random_faults_never_affect_pasted_commands() -> None:
    simulator = Simulator(api_key="k", faults=dict.fromkeys(FAULTS, 1.0))
    simulator.is_spared = lambda received: received.query != QUERY.encode()
    with (
        serving(simulator.app) as url,
        httpx2.Client(trust_env=False, verify=NO_TLS, headers={"x-api-key": "k"}) as client,
    ):
        asked = url + ESTIMATE_PATH

        assert client.post(asked, content=SAMPLE_BODY).status_code == 200
        assert client.post(f"{asked}?{QUERY}", content=SAMPLE_BODY).status_code == 500
