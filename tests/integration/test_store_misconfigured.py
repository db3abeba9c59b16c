"""Log lines about a misconfigured store: the problem, and what to do."""

import asyncio
from collections.abc import Iterator

import pytest

from certificates import Certificates, make_certificates
from proxy.problems import StoreUnavailable
from proxy.store.access import StoreAccess
from proxy.store.client import Script, Store
from raw_upstream import Listener
from serving import free_port, wait_until
from topologies import LOCAL, Member, ServerGroup, server_group

PUT = Script("proxy.cache", "balance_put")


@pytest.fixture(params=["valkey", "redis"])
def servers(request: pytest.FixtureRequest) -> Iterator[ServerGroup]:
    with server_group(request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def started(member: Member) -> Member:
    wait_until(member.answers)
    return member


async def call(url: str, access: StoreAccess, args: int) -> None:
    store = Store(url, "ledger", access=access)
    with pytest.raises(StoreUnavailable):
        await store.call(PUT, "x", args=(b"1",) * args)
    await store.close()


def logged_line(caplog: pytest.LogCaptureFixture, url: str, access: StoreAccess | None = None, *, args: int = 1) -> str:
    """Makes a call, and returns its log line."""
    caplog.clear()
    asyncio.run(call(url, access or StoreAccess(), args))
    (line,) = (message for message in caplog.messages if " fails: " in message)
    return line.partition(" fails: ")[2]


@pytest.mark.parametrize("args", [1, 12])  # Redis has another message for a command of more than ten parts
def test_a_server_that_requires_a_password(servers: ServerGroup, caplog: pytest.LogCaptureFixture, args: int) -> None:
    member = started(servers.member("requirepass right", password="right"))
    line = logged_line(caplog, f"redis://{LOCAL}:{member.port}", args=args)
    assert line.startswith("the server requires a password (")
    assert line.endswith("): set store.password_file; the password for cache.url is a part of that URL")


def test_a_server_that_does_not_accept_the_password(servers: ServerGroup, caplog: pytest.LogCaptureFixture) -> None:
    member = started(servers.member("requirepass right", password="right"))
    line = logged_line(caplog, f"redis://:wrong@{LOCAL}:{member.port}")
    assert line.startswith("the server does not accept the user or the password (")
    assert line.endswith("): check store.username and store.password_file, or those in the URL")
    assert "wrong" not in line


@pytest.mark.parametrize(
    ("url", "meaning", "remedy"),
    [
        ("redis://:any@{}", "the server has no password for this user", "set one at the server, or remove it"),
        ("redis://{}/99", "the server has no database of this number", "use a lower one in the URL, usually 0"),
        ("redis+cluster://{}", "the server is not part of a cluster", "write the URL without +cluster"),
        (
            "redis+sentinel://{}/mymaster",
            "the server is not a Sentinel",
            "name the Sentinels, or write the URL without",
        ),
    ],
)
def test_a_server_of_another_kind(
    servers: ServerGroup, caplog: pytest.LogCaptureFixture, url: str, meaning: str, remedy: str
) -> None:
    line = logged_line(caplog, url.format(f"{LOCAL}:{started(servers.member()).port}"))
    assert line.startswith(f"{meaning} (")
    assert f"): {remedy}" in line


def test_a_sentinel_in_place_of_a_server(servers: ServerGroup, caplog: pytest.LogCaptureFixture) -> None:
    line = logged_line(caplog, f"redis://{LOCAL}:{started(servers.member(options=['--sentinel'])).port}")
    assert line.startswith("the server runs no scripts (unknown command 'EVALSHA'")
    assert line.endswith("one that names Sentinels begins with redis+sentinel")


def test_a_server_without_a_connection_left(servers: ServerGroup, caplog: pytest.LogCaptureFixture) -> None:
    member = started(servers.member())
    member.client.config_set("maxclients", 1)
    line = logged_line(caplog, f"redis://{LOCAL}:{member.port}")
    assert line == "the server accepts no more connections (max number of clients reached): raise its maxclients"


def test_keys_of_another_program(servers: ServerGroup, caplog: pytest.LogCaptureFixture) -> None:
    member = started(servers.member())
    member.client.set("x", "1")
    line = logged_line(caplog, f"redis://{LOCAL}:{member.port}", args=2)
    assert line.startswith("WRONGTYPE Operation against a key")
    assert line.endswith("another program uses keys that begin with ep1: move it to another server or database")


@pytest.mark.parametrize(
    ("url", "meaning", "remedy"),
    [
        (
            "redis://127.0.0.1:{port}",
            "nothing listens there",
            "check that the server runs, and host and port in the URL",
        ),
        ("redis://no-such-host.invalid", "the host name is unknown", "check it in the URL, and the machine's DNS"),
        ("unix:///nowhere/x.sock", "the socket does not exist", "check that the server runs, and the path in the URL"),
    ],
)
def test_an_address_without_a_server(caplog: pytest.LogCaptureFixture, url: str, meaning: str, remedy: str) -> None:
    line = logged_line(caplog, url.format(port=free_port()))
    assert line.startswith(f"{meaning} (Error ")
    assert line.endswith(f"): {remedy}")


def test_a_web_server_in_place_of_a_store(caplog: pytest.LogCaptureFixture) -> None:
    web = Listener(lambda connection, _: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    line = logged_line(caplog, f"redis://{LOCAL}:{web.port}")
    web.close()
    assert line.startswith('it is not a Redis or Valkey server (Protocol error, got "H" as reply type byte')
    assert line.endswith("check host and port in the URL")


def test_a_certificate_that_is_not_trusted(caplog: pytest.LogCaptureFixture, certificates: Certificates) -> None:
    lines = (
        f"tls-cert-file {certificates.cert('server')}",
        f"tls-key-file {certificates.key('server')}",
        f"tls-ca-cert-file {certificates.ca}",
        "tls-auth-clients no",
    )
    with server_group("redis") as servers:
        member = started(servers.member(*lines, ssl=True, ssl_ca_certs=str(certificates.ca)))
        line = logged_line(caplog, f"rediss://{LOCAL}:{member.port}")
    assert line.startswith("the server's certificate is not trusted (")
    assert line.endswith("): set store.ca_file to the certificate of the CA that signed it")
