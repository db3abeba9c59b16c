"""The minimal ACL rules in docs/configuration.md: a gateway needs all of them, and no others."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from redis.crc import key_slot

from deploy_files import PROJECT
from gateway_fixture import (
    API_KEY,
    DESIGN,
    MARKETING,
    GatewayFixture,
    UpstreamFixture,
    cache_status,
    running_gateway,
    settings,
)
from proxy.auth import digest_of
from proxy.open_stores import startup_errors
from proxy.problems import StoreUnavailable
from proxy.quota.counters import LedgerKeys
from proxy.store.access import StoreAccess
from proxy.store.client import Script, Store
from proxy.store.redirects import SLOTS
from quota_fixture import ADMIN, FLUX, ONE, exceeded, explained, get, requests, shown, team, used
from scripted_simulator import Simulator
from serving import wait_until
from topologies import BRANDS, LOCAL, NAME, Cluster, Member, ServerGroup, sentinel_setup, server_group

DOCUMENTED = (PROJECT / "docs" / "configuration.md").read_text().partition("**Least permissions.**")[2]
GATEWAY, SENTINEL_USER = re.findall(r"^```\n(user .*)\n```$", DOCUMENTED, re.MULTILINE)
CHANGES = {where: rights.split() for where, rights in re.findall(r"^\* (.*): `(.*)`$", DOCUMENTED, re.MULTILINE)}
LEDGER_ALONE, BOOK_ALONE, DATABASE, CLUSTER, CHECK = CHANGES
PASSWORD = "correct-horse"
KEYS = LedgerKeys("default")
REFUSABLE = {"client|setinfo", "config|get"}
"""Commands that the gateway tries, but does not need."""

NOWHERE = "redis://127.0.0.1:1"
"""These tests read no key themselves."""

UNPERSISTED = 'writes nothing to disk (appendonly no, save "")'
GET, PUT = Script("proxy.cache", "price_get", repeatable=True), Script("proxy.cache", "balance_put")


def acl_line(line: str, *changes: str) -> str:
    """Returns the documented ACL line with a password; options with `-` remove a right, with `+` add one."""
    taken = {f"+{change[1:]}" for change in changes if change[0] == "-"}
    assert taken <= set(line.split())
    words = [word for word in line.split() if word not in taken] + [change for change in changes if change[0] == "+"]
    return " ".join(words).replace("PASSWORD", PASSWORD)


def rights_of(line: str) -> set[str]:
    return {word[1:] for word in line.split() if word[0] == "+"}


def commands(member: Member, statistic: str) -> set[str]:
    """Returns the commands whose counter `calls`, `rejected_calls` or `failed_calls` is not 0."""
    counted: dict[str, Any] = member.client.info("commandstats")
    return {name.removeprefix("cmdstat_").lower() for name, found in counted.items() if found[statistic]}


def access(url: str) -> str:
    return url.replace("://", f"://gateway:{PASSWORD}@")


@contextmanager
def opened(upstream: UpstreamFixture, *, cache: str | None = None, **store: str) -> Iterator[GatewayFixture]:
    """Opens a gateway that has passed its start checks. `store`: settings section; `cache`: the price book's place."""
    upstream.simulator = Simulator(api_key=API_KEY, spend_every=0, latency_s=(0.1, 0.1))
    configured = settings(
        store.pop("url"),
        upstream.url,
        store=store,
        cache={"url": cache},
        admin={"tokens": [digest_of(ADMIN)]},
        teams={"design": team(DESIGN, requests(6)), "marketing": team(MARKETING)},
    )
    assert asyncio.run(startup_errors(configured, {})) is None
    with running_gateway(configured, NOWHERE, upstream.simulator) as gateway:
        yield gateway


def works(gateway: GatewayFixture) -> None:
    """Uses everything that a gateway does with its stores, over HTTP as teams and operator."""
    assert gateway.client.get("/readyz").json() == {"status": "ready", "degraded": []}
    assert cache_status(gateway.ask(FLUX)).startswith("fwd=miss; fwd-status=200; stored")
    assert cache_status(gateway.ask(FLUX)).startswith("hit")
    assert cache_status(gateway.ask(ONE, cache_control="no-cache")).startswith("fwd=request; fwd-status=200; stored")
    assert gateway.ask(b'[{"segment":{"asset_id":"ast_missing"}}]').status_code == 404
    assert shown(gateway, "/v1/usage")["total"]["requests"] == 4
    assert used(gateway) == [4]
    for body in ({"body": [{"model": "Flux"}]}, {"all": True}):
        purged = gateway.client.post("/v1/cache/purge", json=body, headers={"x-api-key": ADMIN})
        assert purged.status_code == 200
        assert cache_status(gateway.ask(FLUX)).startswith("fwd=miss; fwd-status=200; stored")
    exceeded(gateway.ask(FLUX), 429)
    assert cache_status(gateway.ask(FLUX, x_api_key=MARKETING)).startswith("hit")
    assert explained(gateway)["stored"]
    assert shown(gateway, "/v1/usage?by=team", ADMIN)["total"]["requests"] == 7
    assert "estimate_proxy_quota_used" in get(gateway, "/metrics", ADMIN).text
    assert gateway.client.get("/readyz").json() == {"status": "ready", "degraded": []}


def ready(group: ServerGroup, line: str) -> Member:
    """Prepares a server with this user, reset command statistics, and a ledger with a model to forget."""
    member = group.member(line)
    wait_until(member.answers)
    member.client.sadd(KEYS.models, "old")
    member.client.hset(KEYS.model_uses, "old", "1:design")
    member.client.config_resetstat()
    return member


def place(member: Member) -> str:
    return access(f"redis://{LOCAL}:{member.port}")


def set_user(line: str, *members: Member) -> None:
    """Applies an ACL line to running servers."""
    _, name, *rules = line.split()
    for member in members:
        member.ask("ACL", "SETUSER", name, "reset", *rules)


def is_served(url: str, key: str, *, sentinel_password: str | None = None) -> bool:
    """Returns whether scripts that read and write can run on this key."""

    async def scenario() -> bool:
        store = Store(url, "ledger", access=StoreAccess(sentinel_password=sentinel_password))
        try:
            return bool(await store.call(GET, key) and await store.call(PUT, key + "book", args=(b"1",)))
        except StoreUnavailable:
            return False
        finally:
            await store.close()

    return asyncio.run(scenario())


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every wait renew its lease and read the store."""
    monkeypatch.setattr("proxy.gateway.fetcher.LEASE_S", 0.2)
    monkeypatch.setattr("proxy.cache.memory.MAX_AGE_S", -1.0)
    monkeypatch.setattr("proxy.cache.account_book.BOOK_REREAD_S", -1.0)


@pytest.mark.parametrize("brand", BRANDS)
def test_a_server_with_both_roles_needs_exactly_the_documented_rights(
    brand: str, upstream: UpstreamFixture, caplog: pytest.LogCaptureFixture
) -> None:
    line = acl_line(GATEWAY)
    with server_group(brand) as group:
        member = ready(group, line)
        with opened(upstream, url=place(member)) as gateway:
            works(gateway)
        assert commands(member, "calls") >= rights_of(line)
        assert commands(member, "rejected_calls") <= REFUSABLE
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("brand", BRANDS)
def test_each_role_alone_needs_fewer_rights(brand: str, upstream: UpstreamFixture) -> None:
    of_ledger, of_book = (acl_line(GATEWAY, *CHANGES[where]) for where in (LEDGER_ALONE, BOOK_ALONE))
    with server_group(brand) as group:
        ledger, book = ready(group, of_ledger), ready(group, of_book)
        with opened(upstream, url=place(ledger), cache=place(book), on_outage="admit") as gateway:
            works(gateway)
            called = commands(ledger, "calls")
            rejected = commands(ledger, "rejected_calls") | commands(book, "rejected_calls")
            ledger.kill()
            assert gateway.ask(FLUX, x_api_key=MARKETING).status_code == 200
            ledger.start()
            wait_until(lambda: "exists" in commands(ledger, "calls"))  # so a debit from an outage is not counted twice
        assert called | {"exists"} >= rights_of(of_ledger)
        assert commands(book, "calls") >= rights_of(of_book)
        assert rejected | commands(ledger, "rejected_calls") <= REFUSABLE


@pytest.mark.parametrize("brand", BRANDS)
def test_without_any_one_of_the_rights_it_fails(brand: str) -> None:
    """The tests above show that each command within the scripts is called."""
    with server_group(brand) as group:
        member = ready(group, acl_line(GATEWAY))
        url = place(member)
        assert is_served(url, "ep1:a")
        for missing in ("~ep1:*", "+evalsha", "+script|load", "+time"):
            member.client.script_flush()
            set_user(acl_line(GATEWAY).replace(f" {missing} ", " "), member)
            assert not is_served(url, "ep1:a"), missing
        set_user(acl_line(GATEWAY), member)
        assert not is_served(url, "ep2:a"), "other programs' keys are not accessible"


@pytest.mark.parametrize("brand", BRANDS)
def test_another_database_needs_select(brand: str, upstream: UpstreamFixture) -> None:
    with server_group(brand) as group:
        member = ready(group, acl_line(GATEWAY, *CHANGES[DATABASE]))
        url = f"{place(member)}/1"
        with opened(upstream, url=url) as gateway:
            works(gateway)
        set_user(acl_line(GATEWAY), member)
        assert not is_served(url, "ep1:a")


@pytest.mark.parametrize("brand", BRANDS)
def test_the_check_at_the_start_needs_config_get(brand: str, caplog: pytest.LogCaptureFixture) -> None:
    with server_group(brand) as group:
        member = ready(group, acl_line(GATEWAY, *CHANGES[CHECK]))
        configured = settings(place(member), "http://127.0.0.1:1")
        assert asyncio.run(startup_errors(configured, {})) is None
        assert UNPERSISTED in caplog.text


def test_a_cluster_needs_its_slots_and_asking(fleet: Cluster, upstream: UpstreamFixture) -> None:
    added, url = CHANGES[CLUSTER], access(fleet.url)
    set_user(acl_line(GATEWAY, *added), *fleet.members)
    with opened(upstream, url=url) as gateway:
        works(gateway)
    key, slot = "ep1:{asked}:price", key_slot(b"asked")
    source = fleet.home(slot)
    target = fleet.home(0 if fleet.home(0) is not source else SLOTS - 1)
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", fleet.names[source.port])
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", fleet.names[target.port])
    assert is_served(url, key)
    for missing in added:
        set_user(acl_line(GATEWAY, *(right for right in added if right != missing)), *fleet.members)
        assert not is_served(url, key), f"{missing} is not needed"


@pytest.mark.parametrize("brand", BRANDS)
def test_a_sentinel_needs_one_command(brand: str, upstream: UpstreamFixture) -> None:
    """The Sentinels use another user."""
    keeper = {"username": "keeper", "password": "keeper"}
    lines = (
        "user keeper on >keeper ~* &* +@all",
        "sentinel sentinel-user keeper",
        "sentinel sentinel-pass keeper",
        acl_line(SENTINEL_USER),
    )
    with sentinel_setup(brand, sentinel_lines=lines, sentinel_access=keeper) as setup:
        set_user(acl_line(GATEWAY), *setup.servers)
        url, secret = access(setup.url), {"sentinel_password": PASSWORD}
        with opened(upstream, url=url, **secret) as gateway:
            works(gateway)
            primary = setup.primary()
            setup.sentinels[-1].ask("SENTINEL", "FAILOVER", NAME)
            setup.until_replaced(primary)
            wait_until(lambda: gateway.ask(FLUX, x_api_key=MARKETING).status_code == 200)
        assert is_served(url, "ep1:a", **secret)
        for sentinel in setup.sentinels:
            set_user(acl_line(SENTINEL_USER, "-sentinel|get-master-addr-by-name"), sentinel)
        assert not is_served(url, "ep1:a", **secret)
