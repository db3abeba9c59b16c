"""The samples of reverse proxies in `deploy/`, run by nginx and Caddy, with other ports, paths and gateways."""

import re
import ssl
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest

from certificates import Certificates, make_certificates
from deploy_files import DEPLOY
from gateway_fixture import DESIGN, PATH, GatewayFixture, code_of
from gateway_process import address_of
from programs import program
from proxy.http.connection import KEEP_ALIVE_S
from proxy.settings.schema import ServerSettings
from raw_upstream import RawUpstream, Turn
from serving import free_port, wait_until

BODY = b'[{"steps":7}]'
NGINX, CADDY = DEPLOY / "nginx" / "estimate-proxy.conf", DEPLOY / "caddy" / "Caddyfile"

NGINX_MAIN = """
daemon off; user root; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ }}
http {{
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  include {folder}/estimate-proxy.conf;
}}
"""

Front = Callable[..., httpx2.Client]
"""Starts a reverse proxy in front of gateways, each as host:port. Returns a client of the team `design`."""


def replaced(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def nginx(folder: Path, port: int, certificates: Certificates, gateways: Sequence[str]) -> list[str]:
    sample = replaced(
        NGINX.read_text(),
        ("server 127.0.0.1:8080;", " ".join(f"server {gateway};" for gateway in gateways)),
        ("listen 443 ssl http2;", f"listen 127.0.0.1:{port} ssl http2;"),
        ("/etc/ssl/estimates.example.org.pem", str(certificates.cert("server"))),
        ("/etc/ssl/private/estimates.example.org.key", str(certificates.key("server"))),
        ("/var/log/nginx/estimate-proxy.log", f"{folder}/access.log"),
    )
    (folder / "estimate-proxy.conf").write_text(sample)
    (folder / "nginx.conf").write_text(NGINX_MAIN.format(folder=folder))
    return [program("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf")]


def caddy(folder: Path, port: int, certificates: Certificates, gateways: Sequence[str]) -> list[str]:
    own = f"tls {certificates.cert('server')} {certificates.key('server')}"
    sample = replaced(
        CADDY.read_text(),
        ("\tauto_https ", "\tadmin off\n\tauto_https "),
        ("\nestimates.example.org {", f"\nhttps://127.0.0.1:{port} {{"),
        ("# tls /etc/ssl/estimates.example.org.pem /etc/ssl/private/estimates.example.org.key", own),
        ("\treverse_proxy 127.0.0.1:8080 {", f"\treverse_proxy {' '.join(gateways)} {{"),
        ("\tlog {\n", f"\tlog {{\n\t\toutput file {folder}/access.log\n"),
    )
    (folder / "Caddyfile").write_text(sample)
    return [program("caddy"), "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(params=[nginx, caddy])
def front(request: pytest.FixtureRequest, tmp_path: Path, certificates: Certificates) -> Iterator[Front]:
    trusted = ssl.create_default_context(cafile=certificates.ca)
    with ExitStack() as opened:

        def start(*gateways: str) -> httpx2.Client:
            port = free_port()
            command = request.param(tmp_path, port, certificates, gateways)
            opened.enter_context(running(command, tmp_path))
            url, key = f"https://127.0.0.1:{port}", {"x-api-key": DESIGN}
            client = httpx2.Client(base_url=url, verify=trusted, trust_env=False, headers=key)
            opened.enter_context(client)
            wait_until(lambda: answers(client))
            return client

        yield start


@contextmanager
def running(command: Sequence[str], folder: Path) -> Iterator[None]:
    environment = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def answers(client: httpx2.Client) -> bool:
    try:
        return client.get("/metrics").status_code == 404
    except httpx2.ConnectError:
        return False


def place_of(url: str) -> str:
    return "{}:{}".format(*address_of(url))


@pytest.fixture
def raw() -> Iterator[tuple[RawUpstream, RawUpstream]]:
    """Starts two upstreams that a test can make fail."""
    gateways = RawUpstream(), RawUpstream()
    yield gateways
    for gateway in gateways:
        gateway.close()


def test_estimates_are_passed_on_unchanged(front: Front, gateway: GatewayFixture, tmp_path: Path) -> None:
    client = front(place_of(gateway.url))
    first, second = (client.post(PATH, content=BODY, headers={"x-request-id": f"id-{n}"}) for n in range(2))
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json() == second.json() == gateway.ask(BODY).json()
    assert second.headers["cache-status"].startswith("estimate-proxy; hit; ttl=")
    assert second.headers["x-request-id"] == "id-1"
    wait_until(lambda: "id-1" in (tmp_path / "access.log").read_text())
    assert DESIGN not in (tmp_path / "access.log").read_text()


def test_a_large_body_is_refused_by_the_gateway_in_json(front: Front, gateway: GatewayFixture) -> None:
    answer = front(place_of(gateway.url)).post(PATH, content=b" " * 300_000)
    assert (answer.status_code, code_of(answer)) == (413, "body-too-large")


def test_metrics_are_not_passed_on(front: Front, raw: tuple[RawUpstream, RawUpstream]) -> None:
    assert front(place_of(raw[0].url)).get("/metrics").status_code == 404
    assert raw[0].requests == []


@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_sent_estimate_is_never_repeated(front: Front, raw: tuple[RawUpstream, RawUpstream], end: str) -> None:
    client = front(*(place_of(gateway.url) for gateway in raw))
    for _ in range(4):  # so that connections to both are open
        assert client.post(PATH, content=BODY).status_code == 200
    for gateway in raw:
        gateway.requests.clear()
        gateway.script(Turn(end=end))  # type: ignore[arg-type] # a literal
    assert client.post(PATH, content=BODY).status_code == 502
    assert sum(len(gateway.requests) for gateway in raw) == 1


@pytest.mark.parametrize("front", [nginx], indirect=True)  # Caddy does this since 2.11.2, which Debian does not have
def test_a_gateway_that_is_down_is_skipped(front: Front, gateway: GatewayFixture) -> None:
    client = front(f"127.0.0.1:{free_port()}", place_of(gateway.url))
    assert {client.post(PATH, content=BODY).status_code for _ in range(6)} == {200}


@pytest.mark.parametrize(
    ("sample", "idle", "wait"),
    [(NGINX, "keepalive_timeout", "proxy_read_timeout"), (CADDY, "keepalive", "response_header_timeout")],
)
def test_the_timeouts_match_the_gateways(sample: Path, idle: str, wait: str) -> None:
    seconds = {name: int(value) for name, value in re.findall(r"^\s*(\w+) (\d+)s\b", sample.read_text(), re.MULTILINE)}
    assert seconds[idle] < KEEP_ALIVE_S
    assert seconds[wait] > ServerSettings().request_timeout_s
