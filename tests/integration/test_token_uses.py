"""When tokens were last used: what a gateway records, and what the ledger's reader finds."""

import asyncio
import time
from zoneinfo import ZoneInfo

import pytest
import redis

from faulty_proxy import HEALTHY, Conditions, FaultyProxy
from gateway_fixture import (
    API_KEY,
    DESIGN,
    EXPIRED,
    MARKETING,
    RETIRED,
    OpenGateway,
    UpstreamFixture,
    running_gateway,
    settings,
)
from proxy.auth import digest_of, token_id_of, token_of
from proxy.quota import token_uses as module
from proxy.quota.counters import LedgerKeys
from proxy.quota.ledger_reader import LedgerReader
from proxy.quota.token_uses import HOUR_S, KEPT_S, TokenUses
from proxy.store.client import Store
from quota_fixture import ADMIN, get
from scripted_simulator import Simulator
from serving import wait_until

KEYS, UTC = LedgerKeys("default"), ZoneInfo("UTC")
CI, LAPTOP = (token_id_of(digest_of(token)) for token in (DESIGN, MARKETING))
SCRAPER, STRANGER = token_of("s" * 32), token_of("z" * 32)
REFUSED = Conditions(accepts=False)


def key_of(token: str) -> str:
    return KEYS.token(token_id_of(digest_of(token)))


def recorded(store: redis.Redis) -> dict[str, int]:
    """The hours in the store, by key."""
    return {key.decode(): int(store.get(key)) for key in store.keys("ep1:*:token:*")}  # type: ignore[arg-type,union-attr] # bytes


def hour(ago_s: float = 0) -> int:
    return int(time.time() - ago_s) // HOUR_S * HOUR_S


def test_a_gateway_records_each_valid_token_and_no_other(
    open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.05)
    gateway = open_gateway(admin={"tokens": [digest_of(ADMIN)]}, metrics={"tokens": [digest_of(SCRAPER)]})
    began = hour()
    assert gateway.ask().status_code == 200
    assert gateway.ask(x_api_key=RETIRED).status_code == 403, "a token of a disabled team is used, too"
    assert get(gateway, "/v1/quota", MARKETING).status_code == 200
    assert get(gateway, "/v1/usage", ADMIN).status_code == 200
    assert get(gateway, "/metrics", SCRAPER).status_code == 200
    for token in (EXPIRED, STRANGER):
        assert gateway.ask(x_api_key=token).status_code == 401
    used = {key_of(token) for token in (DESIGN, RETIRED, MARKETING, ADMIN, SCRAPER)}
    wait_until(lambda: recorded(gateway.store).keys() >= used)
    found = recorded(gateway.store)
    assert found.keys() == used
    assert set(found.values()) <= {began, hour()}
    assert all(KEPT_S - 60 < gateway.store.ttl(key) <= KEPT_S for key in used)


def test_a_gateway_that_stops_records_what_is_not_recorded_yet(valkey_url: str, upstream: UpstreamFixture) -> None:
    upstream.simulator = Simulator(api_key=API_KEY)
    with running_gateway(settings(valkey_url, upstream.url), valkey_url, upstream.simulator) as gateway:
        gateway.store.flushall()
        assert gateway.ask().status_code == 200
        assert recorded(gateway.store) == {}
    with redis.Redis.from_url(valkey_url) as store:
        assert recorded(store).keys() == {key_of(DESIGN)}


class _Clock:
    """The process's monotonic clock, ahead by `ahead_s`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_s = 0.0
        monkeypatch.setattr(module, "monotonic", self)

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    return _Clock(monkeypatch)


def test_a_token_is_written_once_an_hour(any_store_url: str, server: redis.Redis, clock: _Clock) -> None:
    def written() -> list[int]:
        counted = server.info("commandstats")
        return [int(counted.get(f"cmdstat_{name}", {"calls": 0})["calls"]) for name in ("evalsha", "set")]

    async def scenario() -> None:
        store = Store(any_store_url, "ledger")
        uses = TokenUses(store, KEYS)
        await uses.flush()
        assert written() == [0, 0], "nothing was used"
        for _ in range(3):
            for token in (CI, LAPTOP):
                uses.record(token)
            await uses.flush()
        calls, sets = written()
        assert sets == 2
        uses.record(CI)
        await uses.flush()
        assert written() == [calls, 2]
        clock.ahead_s = HOUR_S
        uses.record(CI)
        await uses.flush()
        assert written() == [calls + 1, 2], "the process takes it for the next hour; the store knows better"
        await store.close()

    wait_until(lambda: time.time() % HOUR_S < HOUR_S - 5)
    asyncio.run(scenario())


def test_a_use_during_an_outage_is_recorded_with_its_own_time(
    store_proxy: FaultyProxy, server: redis.Redis, clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.store.health.COOLDOWN_S", 0.0)

    async def scenario() -> None:
        store = Store(store_proxy.url, "ledger")
        uses = TokenUses(store, KEYS)
        store_proxy.set_conditions(REFUSED)
        uses.record(CI)
        await uses.flush()
        clock.ahead_s = 2 * HOUR_S
        uses.record(LAPTOP)
        await uses.flush()
        assert recorded(server) == {}
        store_proxy.set_conditions(HEALTHY)
        await uses.flush()
        assert recorded(server) == {KEYS.token(CI): hour(2 * HOUR_S), KEYS.token(LAPTOP): hour()}
        uses.record(CI)
        await uses.flush()
        assert recorded(server) == {KEYS.token(CI): hour(), KEYS.token(LAPTOP): hour()}, "it counts again this hour"
        await store.close()

    wait_until(lambda: time.time() % HOUR_S < HOUR_S - 5)
    asyncio.run(scenario())


def test_a_late_write_does_not_replace_a_later_use(any_store_url: str, server: redis.Redis) -> None:
    later = hour() + HOUR_S
    server.set(KEYS.token(CI), later, ex=60)

    async def scenario() -> None:
        store = Store(any_store_url, "ledger")
        uses = TokenUses(store, KEYS)
        uses.record(CI)
        await uses.flush()
        found = await LedgerReader(store, KEYS, UTC).token_uses([LAPTOP, CI])
        assert found == {CI: later}
        assert await LedgerReader(store, KEYS, UTC).token_uses([]) == {}
        await store.close()

    asyncio.run(scenario())
    assert server.ttl(KEYS.token(CI)) <= 60
