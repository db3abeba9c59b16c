"""No output contains a secret: gateways with canaries as secrets produce every outcome, and all output is searched.

Each canary has a unique core of letters and digits, which survives quoting. The search also covers encodings of it.
"""

import base64
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import psutil
import pytest
import redis
from click.testing import CliRunner

import proxy
from faulty_rendernet import Fault
from gateway_fixture import PATH, answers, break_off
from gateway_process import GatewayProcess, GatewayRunner, address_of, gateway_runner
from proxy.auth import digest_of, token_of
from proxy.cli.commands import main
from proxy.embedded.stores import EmbeddedStores
from proxy.problems import Outcome
from scripted_simulator import Simulator
from serving import NO_TLS, serving, wait_until

KEY = "rn/KestrelWing1+\"x\\y'%7E=&<z>"
TOKEN = token_of("TamarinTail2" + "t" * 20)
DISABLED = token_of("OcelotPaw3x4" + "o" * 20)
SLOW, POOR, ADMIN = (token_of(letter * 32) for letter in "spa")
STORE_PASSWORD = 'st/MarmotNose5+"\\%41@:#'
PROXY_PASSWORD = "px/HeronFeather6+%41@:#"
STORE_URL = f"redis://:{quote(STORE_PASSWORD, safe='')}@127.0.0.1:1/0"
CORES = ("KestrelWing1", "TamarinTail2", "OcelotPaw3x4", "MarmotNose5", "HeronFeather6")

DEFECT = """
import sys
if "proxy.processes.worker" in sys.orig_argv:
    from proxy.upstream import client as upstream
    read_reply = upstream.read_reply
    def defective(status, body, *, secret, **rest):
        if b"defect" not in body:
            return read_reply(status, body, secret=secret, **rest)
        try:
            raise KeyError("a first defect")
        except KeyError:
            raise RuntimeError("a second defect")
    upstream.read_reply = defective
"""
"""Breaks the worker at the point where it holds the key."""


def encodings_of(core: str) -> dict[str, bytes]:
    """Returns every form that `core` could have in an output, in lower case except Base64."""
    plain = core.encode()
    forms = {
        "plain": plain.lower(),
        "JSON": "".join(f"\\u{byte:04x}" for byte in plain).lower().encode(),
        "percent": "".join(f"%{byte:02x}" for byte in plain).encode(),
        "hex": plain.hex().encode(),
    }
    for offset in range(3):
        # a group of three bytes may begin at any offset; the first and last group depend on their neighbours
        encoded = base64.b64encode(b"\0" * offset + plain)
        forms[f"base64 {offset}"] = encoded[4 if offset else 0 : -4]
    return forms


def forms_in(core: str, output: bytes) -> list[str]:
    """Returns the forms of `core` that `output` contains."""
    lower = output.lower()
    return [name for name, form in encodings_of(core).items() if form in (output if "base64" in name else lower)]


def leaks(text: str) -> list[str]:
    return [core for core in CORES if forms_in(core, text.encode())]


@pytest.mark.parametrize(
    "disguise",
    [
        lambda text: text,
        str.upper,
        json.dumps,
        repr,
        lambda text: quote(text, safe=""),
        lambda text: "".join(f"%{ord(letter):02X}" for letter in text),
        lambda text: "".join(f"\\u{ord(letter):04X}" for letter in text),
        lambda text: text.encode().hex(),
        lambda text: base64.b64encode(text.encode()).decode(),
        lambda text: base64.b64encode(b"u:" + text.encode()).decode(),
        lambda text: base64.b64encode(b"u" + text.encode()).decode(),
    ],
)
@pytest.mark.parametrize("secret", [KEY, TOKEN, STORE_PASSWORD, PROXY_PASSWORD, DISABLED])
def test_the_search_finds_every_encoding(secret: str, disguise: Callable[[str], str]) -> None:
    assert leaks(f"before {disguise(secret)} after") == [core for core in CORES if core in secret]


# The recording


@dataclass
class Recording:
    """One gateway and all its output, by place."""

    gateway_runner: GatewayRunner
    served: GatewayProcess
    simulator: Simulator
    store_out_of_order: AbstractContextManager[None]
    output: dict[str, bytes] = field(default_factory=dict)

    def ask(self, content: bytes | None = None, *, token: str | None = TOKEN, **headers: str) -> httpx2.Response:
        """Sends a new request, or `content`."""
        body = b'[{"steps":%d}]' % len(self.output) if content is None else content
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            named["x-api-key"] = token
        return self.call("POST", PATH, content=body, headers=named)

    def call(self, method: str, path: str, **request: Any) -> httpx2.Response:
        with httpx2.Client(base_url=self.served.url, trust_env=False, verify=NO_TLS, timeout=15) as client:
            response = client.request(method, path, **request)
        head = b"".join(b"%b: %b\n" % header for header in response.headers.raw)
        self.output[f"answer {len(self.output)}, {response.status_code}"] = head + response.content
        return response

    def connect(self, request: str) -> socket.socket:
        """Opens a connection, and sends `request`."""
        connection = socket.create_connection(address_of(self.served.url), timeout=15)
        connection.sendall(request.encode())
        return connection

    def receive(self, connection: socket.socket) -> None:
        with connection:
            self.output[f"answer {len(self.output)}"] = b"".join(iter(lambda: connection.recv(65536), b""))

    def run(self, *arguments: str, **environment: str) -> None:
        """Runs a command that succeeds and prints something."""
        finished = subprocess.run(
            [sys.executable, "-m", "proxy", *arguments],
            env=self.gateway_runner.environment(**environment),
            capture_output=True,
            timeout=20,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        self.output[" ".join(arguments)] = finished.stdout + finished.stderr

    def look_at_processes(self) -> None:
        """The supervisor's environment may contain secrets, its children's may not."""
        children = self.served.children()
        for process in children:
            self.output[f"environment of {process.pid}"] = str(process.environ()).encode()
        for process in (psutil.Process(self.served.process.pid), *children):
            self.output[f"arguments of {process.pid}"] = str(process.cmdline()).encode()

    def look_at_files(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.output[f"file {path}"] = path.read_bytes()

    @property
    def outcomes(self) -> set[str]:
        return set(re.findall(r'outcome"?[=:]"?([a-z-]+)', self.served.log.read_text()))


def request(body: str, *headers: str) -> str:
    lines = (f"POST {PATH} HTTP/1.1", "host: gateway", "connection: close", f"content-length: {len(body)}", *headers)
    return "\r\n".join((*lines, "", body))


def record_answers(recording: Recording) -> None:
    """Records hits, misses, and every kind of answer of upstream."""
    recording.ask(b"[{}]")
    recording.ask(b"[ {} ]")
    recording.ask(b"[{}]", token=None, authorization=f"Bearer {TOKEN}")
    for fault in Fault:
        recording.simulator.script(fault)
        recording.ask()
        wait_until(lambda: recording.ask().status_code == 200)  # upstream may have sent a retry-after
        recording.ask()  # more answers than failures keep the circuit closed
    recording.ask(b'[{"asset":"ast_missing"}]')
    recording.simulator.script(answers(b'{"data":{"estimated":1},"defect":true}'))
    recording.ask()


def record_inferred(recording: Recording) -> None:
    """Records inferred answers, and what was learned."""
    seeds = iter([*range(1000, 1012), 99_999, 1, *range(2000, 9000)])
    wait_until(lambda: recording.ask(b'[{"seed":%d}]' % next(seeds)) and "inferred" in recording.outcomes)
    recording.call("GET", "/v1/learned", headers={"x-api-key": ADMIN})
    recording.call("POST", "/v1/explain", content=b'[{"seed":5}]', headers={"x-api-key": TOKEN})


def record_collapsing(recording: Recording) -> None:
    """Records two equal requests, and one whose client leaves."""
    calls = recording.simulator.calls
    with recording.simulator.hold() as hold:
        asking = [recording.connect(request('[{"a":"b"}]', f"x-api-key: {TOKEN}")) for _ in range(2)]
        leaving = recording.connect(request('[{"c":"d"}]', f"x-api-key: {TOKEN}"))
        assert recording.simulator.arrived(calls + 2)
        break_off(leaving)
        recording.call("GET", "/healthz")  # sent after them, so both have been accepted
        hold.release()
    for connection in asking:
        recording.receive(connection)
    wait_until(lambda: "cancelled" in recording.outcomes)


def record_refusals(recording: Recording) -> None:
    """Records almost correct tokens, and all other invalid requests."""
    for wrong in (TOKEN[:-1], TOKEN + "x", TOKEN[:-1] + "!", TOKEN.swapcase(), f"x{TOKEN}", f"{TOKEN},{TOKEN}", KEY):
        recording.ask(token=wrong)
        recording.ask(token=None, authorization=f"Bearer {wrong}")
        recording.ask(token=None, authorization=f"Basic {base64.b64encode(wrong.encode()).decode()}")
    recording.ask(token=DISABLED)
    recording.ask(b"[{}]", token=SLOW)
    recording.ask(b"[{}]", token=SLOW)
    recording.ask(b"[{}]", token=POOR)
    for path in ("/v1/usage?format=csv", f"/v1/usage?by={TOKEN}", "/v1/quota", f"/v1/quota?team={TOKEN}"):
        recording.call("GET", path, headers={"x-api-key": TOKEN})
    recording.ask(b"[{}]", estimate_proxy_max_credits="0.5")
    recording.ask(cache_control="only-if-cached")
    recording.ask(token=None, cookie=f"token={TOKEN}")
    recording.ask(b"[{")
    recording.ask(content_type=f"text/{TOKEN}")
    recording.ask(content_encoding=TOKEN)
    recording.ask(x_request_id=f"no id: {TOKEN}")
    recording.call("POST", PATH, content=b"[{}]", headers=[("x-api-key", TOKEN), ("x-api-key", TOKEN)])
    recording.call("POST", "/v1/explain", content=b"[{}]", headers={"x-api-key": TOKEN})
    recording.call("POST", f"/pub/v1/{TOKEN}", content=b"[{}]")
    recording.call("PUT", PATH, headers={"x-api-key": TOKEN})
    recording.call("GET", f"/readyz?x-api-key={TOKEN}")
    recording.receive(recording.connect(request("[{}]", f"x-api-key: {TOKEN}", f" {TOKEN}")))
    recording.receive(recording.connect(f"{TOKEN} {TOKEN}\r\n\r\n"))


def record_outages(recording: Recording, end_upstream: Callable[[], None]) -> None:
    wait_until(lambda: recording.ask(b"[{}]") and "stale" in recording.outcomes)
    with recording.store_out_of_order:
        recording.ask()
        recording.call("POST", "/v1/cache/purge", content=b'{"all":true}', headers={"x-api-key": ADMIN})
        recording.call("POST", "/v1/explain", content=b"[{}]", headers={"x-api-key": TOKEN})
        assert "price-book" in recording.call("GET", "/readyz").json()["degraded"]
    end_upstream()
    recording.ask()
    recording.call("GET", "/readyz")


@contextmanager
def hanging(store: psutil.Process) -> Iterator[None]:
    store.suspend()
    yield
    store.resume()


@contextmanager
def with_another_password(store: redis.Redis) -> Iterator[None]:
    store.config_set("requirepass", "changed")
    store.client_kill_filter(_type="normal", skipme=True)
    yield


def sections(folder: Path, upstream_url: str, style: str) -> dict[str, Any]:
    """Returns the settings of both gateways; upstream is its own proxy."""
    (folder / "sitecustomize.py").write_text(DEFECT)
    host, port = address_of(upstream_url)
    return {
        "upstream": {"timeout_s": 1, "proxy": f"http://us:{quote(PROXY_PASSWORD, safe='')}@{host}:{port}"},
        "teams": {
            "design": {"tokens": [digest_of(TOKEN)]},
            "retired": {"tokens": [digest_of(DISABLED)], "disabled": True},
            "slow": {"tokens": [digest_of(SLOW)], "rate": {"per_s": 0.001, "burst": 1}},
            "poor": {
                "tokens": [digest_of(POOR)],
                "quotas": [{"measure": "estimated_credits", "limit": 0, "per": "month"}],
            },
        },
        "admin": {"tokens": [digest_of(ADMIN)]},
        "cache": {"ttl_s": 4, "learn": "use", "learn_from": 1, "never_learn": ["steps"]},
        "log": {"level": "debug", "format": style},
    }


@contextmanager
def on_its_own(folder: Path, simulator: Simulator, upstream_url: str) -> Iterator[Recording]:
    """JSON lines; the key in the environment; embedded stores, one of which hangs for a while."""
    with gateway_runner(folder, upstream_url) as runner:
        served = runner.start(
            env={"RENDERNET_API_KEY": KEY, "PYTHONPATH": str(folder)},
            accounts={"default": {}},
            **sections(folder, upstream_url, "json"),
        )
        recording = Recording(runner, served, simulator, hanging(served.store("price-book")))
        recording.run("check", "--config", str(folder / "estimate-proxy.toml"), RENDERNET_API_KEY=KEY)
        yield recording


@contextmanager
def with_a_store(folder: Path, simulator: Simulator, upstream_url: str) -> Iterator[Recording]:
    """Text lines; the key in a file; one store for all with a password, which changes while it runs."""
    stores = EmbeddedStores(folder / "data", ["ledger"])
    stores.start()
    store_url = stores.urls["ledger"]
    with ExitStack() as opened:
        opened.callback(stores.stop)
        admin = opened.enter_context(redis.Redis.from_url(store_url))
        admin.config_set("requirepass", STORE_PASSWORD)
        (folder / "key").write_text(f"{KEY}\n")
        url = store_url.replace("unix://", f"unix://:{quote(STORE_PASSWORD, safe='')}@")
        runner = opened.enter_context(gateway_runner(folder, upstream_url))
        served = runner.start(
            env={"REDIS_URL": url, "PYTHONPATH": str(folder)},
            accounts={"default": {"api_key_file": "key"}},
            store={"on_outage": "admit"},
            server={"drain_delay_s": 0, "drain_s": 0.3},  # it waits this long for a store that never comes back
            **sections(folder, upstream_url, "text"),
        )
        recording = Recording(runner, served, simulator, with_another_password(admin))
        recording.run("check", "--config", str(folder / "estimate-proxy.toml"), REDIS_URL=url)
        yield recording


@pytest.fixture(scope="module", params=[on_its_own, with_a_store], ids=lambda setup: setup.__name__)
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Records from the first request to the end of the process."""
    folder = tmp_path_factory.mktemp("recording")
    simulator = Simulator(api_key=KEY, spend_every=0)
    with ExitStack() as upstream, ExitStack() as opened:
        url = upstream.enter_context(serving(simulator.app))
        recording: Recording = opened.enter_context(request.param(folder, simulator, url))
        record_answers(recording)
        record_inferred(recording)
        record_collapsing(recording)
        record_refusals(recording)
        recording.look_at_processes()
        record_outages(recording, upstream.close)
        assert recording.served.stop() == 0
        recording.output["log"] = recording.served.log.read_bytes()
        recording.look_at_files(recording.gateway_runner.data_dir)
    return recording


def test_every_outcome_was_recorded(recording: Recording) -> None:
    assert set(Outcome) - recording.outcomes == {Outcome.OVERLOADED}, "which takes 2000 requests at a time"
    assert b"a second defect" in recording.output["log"]
    assert b"fwd=bypass; detail=store-unavailable" in b"".join(recording.output.values())


def test_the_secrets_were_used(recording: Recording) -> None:
    assert {key for one in recording.simulator.received for key in one.api_keys} == {KEY.encode()}
    proxied = {value for one in recording.simulator.received for name, value in one.headers if b"proxy-auth" in name}
    assert proxied == {b"Basic " + base64.b64encode(f"us:{PROXY_PASSWORD}".encode())}


@pytest.mark.parametrize("core", CORES, ids=range(len(CORES)))  # pytest puts a test's name into the environment
def test_no_output_contains_a_secret(core: str, recording: Recording) -> None:
    assert [(where, forms) for where, output in recording.output.items() if (forms := forms_in(core, output))] == []


# Output without a gateway


@pytest.mark.parametrize("command", [[], *([name] for name in main.commands), ["token", "new"]])
def test_help_shows_no_secret_from_the_environment(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--help"], env={"RENDERNET_API_KEY": KEY, "REDIS_URL": STORE_URL})
    assert result.exit_code == 0
    assert not leaks(result.output)


@pytest.mark.parametrize(
    "line",
    [
        f"accounts.default = {json.dumps(KEY)}",
        f"accounts.default.key = {json.dumps(KEY)}",
        f"accounts.default.api_key = [{json.dumps(KEY)}]",
        f"accounts.default.api_key = {json.dumps(KEY + 'ü')}",
        f"accounts.default.api_key_file = {json.dumps(KEY)}",
        f"accounts.default.api_key = {KEY}",
        f"teams.design.tokens = [{json.dumps(TOKEN)}]",
        f"teams.design.tokens = {json.dumps(TOKEN)}",
        f"teams.design = {json.dumps(TOKEN)}",
        f"server.port = {json.dumps(KEY)}",
        f"server.host = {json.dumps(KEY)}",
        f"upstream.base_url = 'https://us:{quote(KEY)}@api.rendernet.ai'",
        f"upstream.base_url = 'https://api.rendernet.ai/?key={quote(KEY)}'",
        f"upstream.proxy = 'socks5://us:{quote(PROXY_PASSWORD)}@proxy:1080'",
        f"upstream.proxy = 'http://us:{PROXY_PASSWORD}@proxy:3128'",
        f"store.url = 'redis://:{STORE_PASSWORD}@store:6379/0'",
        f"store.url = 'http://:{quote(STORE_PASSWORD)}@store:6379/0'",
        f"store.passwort = {json.dumps(STORE_PASSWORD)}",
    ],
)
def test_a_secret_in_a_wrong_place_is_not_repeated(line: str, tmp_path: Path) -> None:
    config = tmp_path / "estimate-proxy.toml"
    config.write_text(f"{line}\n")
    for command in ("check", "serve"):
        result = CliRunner().invoke(main, [command, "--config", str(config)], env={"RENDERNET_API_KEY": ""})
        assert result.exit_code == 2, result.output
        assert result.output.startswith("estimate-proxy: ")
        assert not leaks(result.output)


def test_secrets_are_revealed_where_they_are_used_and_nowhere_else() -> None:
    package = Path(proxy.__file__).parent
    sources = {str(path.relative_to(package)): path.read_text() for path in package.glob("**/*.py")}
    assert {name for name, text in sources.items() if "get_secret_value" in text} == {
        "cli/connect.py",  # masks the stores' URLs in what it prints
        "settings/warnings.py",  # looks at the URLs' schemes
        "settings/values.py",  # checks them
        "settings/masking.py",  # shows URLs without their secrets
        "open_stores.py",  # authenticates at the store
        "upstream/client.py",  # adds the account's key to upstream requests, and authenticates at the proxy
    }
