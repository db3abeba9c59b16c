"""Third-party software: nginx as reverse proxy, and the HTTP clients of Java, curl, Node and Python."""

import http.client
import json
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway_fixture import DESIGN, MARKETING, PATH, GatewayFixture
from gateway_process import address_of
from programs import program
from serving import free_port, wait_until
from wire import Reader

pytestmark = pytest.mark.usefixtures("coverage_paused")

BODY = b'[{"batch_size":3}]'
PRICE = 3

NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  upstream gateway {{ server {address}; keepalive 4; }}
  server {{
    listen 127.0.0.1:{port}; keepalive_requests 100000;
    location / {{
      proxy_pass http://gateway; proxy_http_version 1.1; proxy_request_buffering off;
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_upgrade;
    }}
  }}
}}
"""

JAVA = """
import java.net.URI;
import java.net.http.*;

public class Client {
    public static void main(String[] args) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        for (int i = 0; i < 3; i++) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(args[0])).header("X-API-KEY", args[1])
                .POST(HttpRequest.BodyPublishers.ofString(args[2])).build();
            HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(response.statusCode() + " " + response.body());
        }
    }
}
"""

QUICK_JAVA = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
"""For programs that run for a second: they are not optimised."""

NODE = """
const [url, token, bytes] = process.argv.slice(1);
fetch(url, {method: "POST", headers: {"X-API-KEY": token}, body: Buffer.alloc(Number(bytes), " ")})
    .then(async response => console.log(response.status, (await response.json()).error.code));
"""


@pytest.fixture
def nginx(gateway: GatewayFixture, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Starts nginx in front of the gateway, with its manual's lines for websockets; yields the address."""
    binary, port, config = program("nginx"), free_port(), tmp_path / "nginx.conf"
    address = "{}:{}".format(*address_of(gateway.url))
    config.write_text(NGINX.format(folder=tmp_path, address=address, port=port))
    with subprocess.Popen([binary, "-p", tmp_path, "-c", config], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: _listens(port))
            yield "127.0.0.1", port
        finally:
            process.terminate()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def estimate(token: str, request_id: str, body: bytes, *fields: str) -> bytes:
    lines = [f"POST {PATH} HTTP/1.1", "Host: x", f"X-API-KEY: {token}", f"X-Request-Id: {request_id}", *fields]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def ask_many(nginx: tuple[str, int], token: str, times: int) -> Counter[str]:
    """Returns the number of correct answers, and the other answers."""
    found: Counter[str] = Counter()
    with socket.create_connection(nginx, timeout=30) as connection, Reader(connection) as reader:
        for number in range(times):
            price, request_id = number % 7 + 1, f"{token[3]}-{number}"
            connection.sendall(estimate(token, request_id, b'[{"batch_size":%d}]' % price))
            status, headers, body = reader.response()
            is_right = status == 200 and headers["x-request-id"] == request_id
            is_right = is_right and json.loads(body)["data"]["estimated"] == price
            found["right" if is_right else f"{status} {headers} {body!r}"] += 1
    return found


def send_smuggled_requests(nginx: tuple[str, int], times: int) -> None:
    """Sends upgrade requests whose bodies look like requests and arrive later than the heads."""
    smuggled = estimate(MARKETING, "smuggled", BODY) + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    for number in range(times):
        fields = ("Connection: Upgrade", f"Upgrade: {('h2c', 'websocket', 'TLS/1.2')[number % 3]}")
        request = estimate(DESIGN, f"hostile-{number}", smuggled, *fields)
        with socket.create_connection(nginx, timeout=30) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(request[: -len(smuggled)])
            connection.sendall(smuggled)
            assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_behind_nginx_no_answer_reaches_the_wrong_client(gateway: GatewayFixture, nginx: tuple[str, int]) -> None:
    gateway.ask(BODY)
    with ThreadPoolExecutor() as pool:
        hostile = pool.submit(send_smuggled_requests, nginx, 1000)
        asking = [pool.submit(ask_many, nginx, token, 2500) for token in (DESIGN, MARKETING, DESIGN, MARKETING)]
        found = sum((future.result() for future in asking), Counter[str]())
        hostile.result()
    assert found == {"right": 10_000}


def test_the_client_of_the_jdk_is_answered(gateway: GatewayFixture, tmp_path: Path) -> None:
    source = tmp_path / "Client.java"
    source.write_text(JAVA)
    command = [program("java"), *QUICK_JAVA, str(source), gateway.url + PATH, DESIGN, BODY.decode()]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert [line.partition(" ")[0] for line in output] == ["200"] * 3
    assert [json.loads(line.partition(" ")[2])["data"]["estimated"] for line in output] == [PRICE] * 3


@pytest.mark.parametrize("option", ["--http2", "--http1.1", "--http1.0"])
def test_curl_is_answered(gateway: GatewayFixture, option: str) -> None:
    command = [
        program("curl"),
        "-sS",
        option,
        "-H",
        f"X-API-KEY: {DESIGN}",
        "--json",
        BODY.decode(),
        gateway.url + PATH,
    ]
    output = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert json.loads(output)["data"]["estimated"] == PRICE


@pytest.mark.parametrize("megabytes", [1, 6, 60])
def test_nodes_fetch_receives_the_413(gateway: GatewayFixture, megabytes: int) -> None:
    command = [program("node"), "-e", NODE, gateway.url + PATH, DESIGN, str(megabytes * 10**6)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output == "413 body-too-large\n"


@pytest.mark.parametrize("megabytes", [1, 6, 60])
def test_pythons_http_client_receives_the_413(gateway: GatewayFixture, megabytes: int) -> None:
    connection = http.client.HTTPConnection(*address_of(gateway.url), timeout=60)
    connection.request("POST", PATH, body=b" " * (megabytes * 10**6), headers={"X-API-KEY": DESIGN})
    assert connection.getresponse().status == 413
    connection.close()
