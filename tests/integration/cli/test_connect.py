"""`check --connect`: what it finds of the stores and of RenderNet."""

import re
import ssl
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from click.testing import Result

from certificates import make_certificates
from command_line import CANARY, CONFIG, Run
from fleet import store_process
from raw_upstream import raw_upstream
from serving import free_port
from shared_fixtures import debian_redis


def connected(result: Result) -> list[str]:
    """Returns the lines of the results, which come after the settings."""
    return [
        line for line in result.stdout.splitlines() if line.startswith(("# the ledger", "# the price", "# RenderN"))
    ]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_connect_reports_what_it_finds(run: Run, tmp_path: Path, scheme: str) -> None:
    made = make_certificates(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(made.cert("server"), made.key("server"))
    with raw_upstream(tls if scheme == "https" else None) as upstream, store_process(appendfsync="everysec") as store:
        store.start()
        trusted = f"ca_file = '{made.ca}'" if scheme == "https" else ""
        Path("here.toml").write_text(
            f"metrics.public = true\n{CONFIG}[store]\nurl = '{store.url}'\n[cache]\nurl = '{store.url}'\n"
            f"[upstream]\nbase_url = '{upstream.url}'\n{trusted}"
        )
        result = run("check", "--connect", "--config", "here.toml")
        assert upstream.requests == [], "no request"
    assert result.exit_code == 0, result.stderr
    ledger, book, rendernet = connected(result)
    facts = r"no TLS, Redis 7[.0-9]+ or compatible, maxmemory-policy noeviction, appendonly yes, appendfsync everysec, "
    assert re.fullmatch(rf"# the ledger \({store.url}\): {facts}save \"\", clock 0\.0\d\d s (ahead|behind)", ledger)
    assert book.startswith(f"# the price book ({store.url}): no TLS, Redis 7")
    if scheme == "http":
        assert rendernet == f"# RenderNet ({upstream.url}): connected, no TLS"
        assert result.stderr == ""
    else:
        last_day = (datetime.now(UTC) + timedelta(days=2)).date()
        assert rendernet == f"# RenderNet ({upstream.url}): connected, TLSv1.3, certificate until {last_day}"
        assert "has a certificate that ends on" in result.stderr
    assert tomllib.loads(result.stdout)["server"]["port"] == 8080


def test_connect_reports_failures(run: Run, valkey_url: str) -> None:
    Path("here.toml").write_text(
        f"metrics.public = true\n{CONFIG}[store]\nurl = 'redis://u:{CANARY}@127.0.0.1:{free_port()}'\n"
        f"[cache]\nurl = '{valkey_url}'\n[upstream]\nbase_url = 'http://127.0.0.1:{free_port()}'"
    )
    result = run("check", "--connect", "--config", "here.toml")
    assert result.exit_code == 2
    assert CANARY not in result.output
    ledger, rendernet = result.stderr.splitlines()
    assert re.match(
        r"estimate-proxy: the ledger \(redis://u:\*+@127.0.0.1:\d+\) cannot be used: nothing listens there", ledger
    )
    assert re.match(
        r"estimate-proxy: RenderNet \(http://127.0.0.1:\d+\) cannot be connected to: nothing listens there ", rendernet
    )


def test_connect_warns_about_a_ledger_that_may_lose_data(run: Run) -> None:
    with debian_redis() as url, redis.Redis.from_url(url) as client, raw_upstream() as upstream:
        client.config_set("maxmemory-policy", "allkeys-lru")
        Path("here.toml").write_text(
            f"metrics.public = true\n{CONFIG}[store]\nurl = '{url}'\n[upstream]\nbase_url = '{upstream.url}'"
        )
        result = run("check", "--connect", "--config", "here.toml")
    assert result.exit_code == 0
    evicting, unwritten = result.stderr.splitlines()
    assert "may evict keys (maxmemory-policy allkeys-lru)" in evicting
    assert "writes nothing to disk" in unwritten
    assert connected(result)[1] == "# the price book: in the ledger's store"


def test_connect_needs_no_running_gateway_for_embedded_stores(run: Run) -> None:
    with raw_upstream() as upstream:
        Path("here.toml").write_text(
            f"metrics.public = true\n{CONFIG}[store]\ndata_dir = 'data'\n[upstream]\nbase_url = '{upstream.url}'"
        )
        result = run("check", "--connect", "--config", "here.toml")
    assert (result.exit_code, result.stderr) == (0, "")
    found = "not tried: an embedded store runs only while its gateway does"
    assert connected(result)[0] == f"# the ledger (embedded, in data): {found}"
