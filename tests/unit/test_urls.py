"""URLs of upstream, proxy and stores, and the certificates for them: which are accepted, and why others are not."""

import os
from datetime import date
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from yarl import URL

from certificates import make_certificates
from configs import CANARY, ENV, MINIMAL, Problems, Read
from proxy.settings.errors import SettingsError
from proxy.settings.loader import load_key_settings
from proxy.settings.masking import SecretUrl
from proxy.settings.warnings import warnings
from proxy.upstream.address import ESTIMATE_PATH, UpstreamAddress

CLEAR = "would send the API key in clear text: use https, or set upstream.insecure = true"
NO_URL = "is not a valid URL: a port is 1 to 65535"
NO_HOST = "must name a host"
TODAY = date(2026, 11, 30)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://api.example", CLEAR),
        ("http://10.0.0.1", CLEAR),
        ("http://localhost.example", CLEAR),
        ("http://[2001:db8::1]", CLEAR),
        (f"https://u:{CANARY}@h", "has a user, a query or a fragment"),
        ("https://@h", "has a user, a query or a fragment"),
        (f"https://h/?k={CANARY}", "has a user, a query or a fragment"),
        ("https://h?", "has a user, a query or a fragment"),
        ("https://h#", "has a user, a query or a fragment"),
        ("ftp://h", "must be a URL that begins with https:// or http://"),
        ("api.example", "must be a URL that begins with https://"),
        ("//h", "must be a URL that begins with https://"),
        ("", "must be a URL that begins with https://"),
        ("https://", NO_HOST),
        ("https:///x", NO_HOST),
        ("https://:443", NO_HOST),
        ("https://höst", NO_HOST),
        ("https://a\\\\b", NO_HOST),
        ("https://1.2.3", NO_HOST),
        ("https://[v1.a]", NO_HOST),
        ("https://h:0", NO_URL),
        ("https://h:99999", NO_URL),
        ("https://h:x", NO_URL),
        ("https://[::1", NO_HOST),
        ("https://a b", NO_URL),
        ("https://h\\n", NO_URL),
        (f"https://h/{'a' * 2048}", NO_URL),
    ],
)
def test_an_invalid_base_url_is_refused(problems_of: Problems, url: str, message: str) -> None:
    found = problems_of(MINIMAL + f'[upstream]\nbase_url = "{url}"')
    assert list(found) == ["upstream.base_url"]
    assert found["upstream.base_url"].startswith(message)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "http://LOCALHOST:1",
        "http://127.0.0.2:80/x",
        "http://[::1]:9",
        "HTTPS://h",
        "https://h/a/",
    ],
)
def test_a_valid_base_url_is_accepted(read: Read, url: str) -> None:
    assert read(MINIMAL + f'[upstream]\nbase_url = "{url}"').upstream.base_url == url


def test_clear_text_needs_insecure(read: Read, problems_of: Problems) -> None:
    clear = MINIMAL + '[upstream]\nbase_url = "http://mock.example"\n'
    assert read(clear + "insecure = true").upstream.insecure
    assert read(clear, {f"{ENV}UPSTREAM__INSECURE": "true"}).upstream.insecure
    assert problems_of(clear + "insecure = false") == {"upstream.base_url": CLEAR}
    for no in ("false", "0", "no", "off"):
        assert problems_of(clear, {f"{ENV}UPSTREAM__INSECURE": no}) == {"upstream.base_url": CLEAR}
    assert list(problems_of(clear, {f"{ENV}UPSTREAM__INSECURE": CANARY})) == ["upstream.insecure"]


SERVER_POOL = (
    st.text("az09.-_[]:@%\\/é ", max_size=12) | st.from_regex(r"\A(\d{1,3}\.){3}\d{1,4}\Z") | st.ip_addresses().map(str)
)


@given(host=SERVER_POOL, path=st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
@example(host="a[b]", path="")
@example(host="[::1]a:1", path="")
@example(host="[::1]:", path="%zz/../é")
def test_the_checked_address_is_the_one_that_is_used(host: str, path: str) -> None:
    """One parser checks a URL and another one uses it: they must agree."""
    url = f"https://{host}/{path}"
    try:
        base_url = load_key_settings(Path(os.devnull), {f"{ENV}UPSTREAM__BASE_URL": url}).upstream.base_url
    except SettingsError:
        return
    address = UpstreamAddress.of(base_url)
    connected = URL(address.origin, encoded=True)  # as in `proxy.upstream.http_client`
    assert connected.host == urlsplit(url).hostname
    assert connected.port == (urlsplit(url).port or 443)
    assert address.path.endswith("/pub/v1/generations/estimate")


BASE_URLS = st.builds(
    "{}://{}{}{}".format,
    st.sampled_from(["https", "http", "HTTPS", "hTTp"]),
    st.sampled_from(["h", "API.Example.com", "xn--bcher-kva.example", "a_b.c.", "10.0.0.1", "[::1]", "[2001:DB8::A]"]),
    st.sampled_from(["", ":", ":80", ":443", ":08080", ":0443"]),
    st.lists(
        st.sampled_from(
            ["/", "//", ".", "..", "a", "A.b", "%", "%zz", "%2f", "é", "日本", "[|]", "`{}^", '<">', "~;=&,+!$'()*:\\"]
        )
    ).map(lambda parts: "".join(["/", *parts]) if parts else ""),
)


@given(BASE_URLS)
@example("https://h/../../a")
@example("HTTPS://h:443/%41/../é/./b//..//")
def test_the_spelling_of_addresses_in_keys_has_not_changed(base_url: str) -> None:
    """Older gateways stored prices under the spelling that httpx2 produced."""
    was = httpx2.URL(base_url.rstrip("/") + ESTIMATE_PATH)
    address = UpstreamAddress.of(base_url)
    assert (address.origin, address.path) == (f"{was.scheme}://{was.netloc.decode()}", was.raw_path.decode())


@given(st.binary(max_size=20))
@example(b"a=%2F&b=%zz&c='\xff\"")
def test_the_spelling_of_queries_has_not_changed(query: bytes) -> None:
    sent = UpstreamAddress.of("https://h").query_as_sent(query)
    assert sent.isascii()
    assert sent.isprintable()
    assert " " not in sent
    assert httpx2.URL("https://h", query=sent.encode()).query.decode() == sent


@pytest.mark.parametrize(
    ("url", "right"),
    [
        ("https://api.rendernet.ai/pub/v1", "https://api.rendernet.ai"),
        ("https://api.rendernet.ai/pub/v1/", "https://api.rendernet.ai"),
        ("https://api.rendernet.ai/pub/v1/generations", "https://api.rendernet.ai"),
        ("https://h:8443/a//pub/v1/generations/estimate//", "https://h:8443/a"),
    ],
)
def test_a_base_url_that_includes_rendernets_path_is_refused(problems_of: Problems, url: str, right: str) -> None:
    message = f"ends in a path of RenderNet's API, which the gateway adds itself: use {right}"
    assert problems_of(MINIMAL + f'[upstream]\nbase_url = "{url}"') == {"upstream.base_url": message}


@pytest.mark.parametrize("url", ["https://pub/v1", "https://pub", "https://h/pub/v1/other", "https://h/xpub/v1"])
def test_a_base_url_with_another_path_is_accepted(read: Read, url: str) -> None:
    assert read(MINIMAL + f'[upstream]\nbase_url = "{url}"').upstream.base_url == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis+unix://h", "must be a URL that begins with redis://, rediss://, unix://, redis+sentinel://, "),
        ("redis+sentinel://h:1", "must name the primary, such as redis+sentinel://host:26379/mymaster/0"),
        ("redis+sentinel://h:1/m/prod", "must name the primary"),
        (f"redis+sentinel://:{CANARY}@h:1,,i:2/m", NO_HOST),
        ("redis+sentinel://h:1,i:0/m", NO_URL),
        ("redis+sentinel:///m", NO_HOST),
        ("redis+cluster://h:port", NO_URL),
        ("redis+cluster://h,i h", NO_URL),
        ("redis+cluster://h,-", NO_HOST),
        ("redis+cluster://h/1", "must not name a database other than 0: a cluster has no other"),
        ("rediss+cluster://h?protocol=3", "has options other than db, username and password"),
        ("rediss+cluster://h?ssl_cert_reqs=none", "has the option ssl_cert_reqs: certificates are always verified: "),
        ("rediss://h?db=1&ssl_ca_certs=/ca.pem", "has the option ssl_ca_certs: set store.ca_file instead"),
        (f"redis+cluster://{'h,' * 32}h", "names more than 32 servers"),
        ("h:6379", "must be a URL that begins with redis://"),
        ("", "must be a URL that begins with redis://"),
        ("redis://", NO_HOST),
        ("redis:///0", NO_HOST),
        ("redis://h:0", NO_URL),
        ("redis://h:port", NO_URL),
        (f"redis://:{CANARY}/x@h", NO_URL),
        ("redis://h/prod", "must name its database by number"),
        ("redis://h?db=x", "must name its database by number"),
        ("redis://h?socket_timeout=60", "has the option socket_timeout: set store.timeout_s instead"),
        (f"redis://h/0#{CANARY}", "has options other than db, username and password"),
        ("unix://", "must name a socket by its full path"),
        ("unix://run/valkey.sock", "must name a socket by its full path"),
    ],
)
def test_an_invalid_store_url_is_refused(problems_of: Problems, url: str, message: str) -> None:
    for section in ("store", "cache"):
        variable = {f"{ENV}{section.upper()}__URL": url}
        for found in (problems_of(MINIMAL + f'[{section}]\nurl = "{url}"'), problems_of(environ=variable)):
            assert list(found) == [f"{section}.url"]
            assert found[f"{section}.url"].startswith(message)


@pytest.mark.parametrize(
    "url",
    [
        *("redis://h", "redis://h/", "redis://u:p@h:1/15", "redis://:p%23@[::1]?db=1", "rediss://u:p@h:1/2"),
        *("unix:///s", "unix://u:p@/s?db=2"),
        *("redis+sentinel://h/m", "rediss+sentinel://u:p@h:1,i,[::1]:2/my-master/3", "redis+sentinel://h/m?db=1"),
        *("redis+cluster://h", "rediss+cluster://u:p@h:1,[::1]:2,127.0.0.1", "redis+cluster://h/0"),
    ],
)
def test_a_valid_store_url_is_accepted(read: Read, url: str) -> None:
    settings = read(environ={"REDIS_URL": url, f"{ENV}CACHE__URL": url})
    assert settings.store.url == settings.cache.url == SecretUrl(url)


def test_redis_url_only_sets_the_ledgers_store(read: Read) -> None:
    settings = read(environ={"REDIS_URL": "redis://h"})
    assert settings.store.url == SecretUrl("redis://h")
    assert settings.cache.url is None


@pytest.mark.parametrize("url", ["socks5://h", f"u:{CANARY}@h", "http://", f"http://u:{CANARY}@h:0", ""])
def test_an_invalid_proxy_is_refused(problems_of: Problems, url: str) -> None:
    assert list(problems_of(MINIMAL + f'[upstream]\nproxy = "{url}"')) == ["upstream.proxy"]


@pytest.mark.parametrize("section", ["upstream", "store"])
def test_a_ca_file_must_contain_certificates(read: Read, problems_of: Problems, tmp_path: Path, section: str) -> None:
    text = MINIMAL + f'[{section}]\nca_file = "ca.pem"'
    path = f"{section}.ca_file"
    assert problems_of(text) == {path: f"names {tmp_path / 'ca.pem'}, which cannot be read: No such file or directory"}
    (tmp_path / "ca.pem").write_text(CANARY)
    assert problems_of(text) == {path: f"names {tmp_path / 'ca.pem'}, which has no certificates in PEM format"}
    (tmp_path / "ca.pem").unlink()
    (tmp_path / "ca.pem").mkdir()
    assert problems_of(text) == {path: f"names {tmp_path / 'ca.pem'}, which cannot be read: Is a directory"}
    certificates = next(Path(os.__file__).parent.rglob("*/cacert.pem"), None)
    if certificates is not None:
        found = read(MINIMAL + f'[{section}]\nca_file = "{certificates}"')
        assert (found.upstream if section == "upstream" else found.store).ca_file == certificates


def test_unused_certificates_are_warned_of(read: Read, tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    text = f'{MINIMAL}[metrics]\npublic = true\n[store]\nca_file = "{made.ca}"\n'
    assert list(warnings(read(text), TODAY)) == [
        "store.ca_file and store.cert_file are not used: neither store.url nor cache.url begins with rediss"
    ]
    assert not list(warnings(read(text + 'url = "rediss+sentinel://h/m"'), TODAY))
    assert not list(warnings(read(text + '[cache]\nurl = "rediss://h"'), TODAY))


def test_a_client_certificate_needs_its_key(read: Read, problems_of: Problems, tmp_path: Path) -> None:
    text = MINIMAL + '[store]\ncert_file = "client.pem"\nkey_file = "client.key"\n'
    cert, key = (
        f"names {tmp_path / name}, which cannot be read: No such file or directory"
        for name in ("client.pem", "client.key")
    )
    assert problems_of(text) == {"store.cert_file": cert, "store.key_file": key}
    assert problems_of(MINIMAL + '[store]\nkey_file = "client.key"') == {
        "store.cert_file": "is missing: store.key_file is its key",
        "store.key_file": key,
    }
    made = make_certificates(tmp_path)
    settings = read(text)
    assert (settings.store.cert_file, settings.store.key_file) == (made.cert("client"), made.key("client"))
    no_pair = "and store.key_file must be a certificate and its key, in PEM format and without a passphrase"
    assert problems_of(text.replace("client.key", "server.key")) == {"store.cert_file": no_pair}
    (tmp_path / "client.pem").write_text(CANARY)
    assert problems_of(text) == {"store.cert_file": no_pair}
