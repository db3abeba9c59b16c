"""The store with Sentinels, clusters and TLS, on real servers that fail, move and change their roles."""

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import date
from hashlib import sha1
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as NotConnectedError

from certificates import Certificates, make_certificates
from faulty_proxy import proxy_to
from gateway_fixture import UpstreamFixture
from gateway_process import gateway_runner
from lateness import assert_in_time
from learning_fixture import body
from lua_scripts import LUA_SCRIPTS
from programs import program
from proxy.cache.leases import Lease
from proxy.cache.price_book import PriceBook
from proxy.cache.prices import Price
from proxy.learning.learner import Learner
from proxy.learning.observation import Counted
from proxy.problems import Outcome, StoreOutcomeUnknown, StoreUnavailable
from proxy.quota.batches import LedgerBatcher
from proxy.quota.counters import LedgerKeys
from proxy.quota.ledger import Admitted, Ledger
from proxy.quota.ledger_reader import LedgerReader
from proxy.quota.price_change_log import PriceChangeLog
from proxy.quota.quotas import Charge, Rate, TeamLimits
from proxy.quota.report_queries import PriceChangeQuery, UsageQuery
from proxy.quota.token_uses import TokenUses
from proxy.store.access import StoreAccess
from proxy.store.client import TICK_S, TIMEOUT_S, Script, Store, was_unreachable
from proxy.store.redirects import SLOTS, is_not_serving, may_pass, slot_owners, target_of
from proxy.store.scripts import NO_REPLY, Call
from proxy.telemetry.metrics import Metrics
from proxy.urls import Address
from serving import free_port, wait_until
from topologies import BRANDS, LOCAL, NAME, Cluster, Member, sentinel_setup, server_group

ZONE = ZoneInfo("UTC")
KEYS = LedgerKeys("acme")
LEDGER_SLOT = key_slot(KEYS.id.encode())
HIT = Charge(Outcome.HIT, 4, "Flux")
TERMS = TeamLimits("design", Rate(100_000, 1_000_000), ())
GET, PUT = Script("proxy.cache", "price_get", repeatable=True), Script("proxy.cache", "balance_put")
EXPIRE_AND_SPIN = "redis.call('PEXPIRE', KEYS[2], 3) for _ = 1, 5e6 do end return 1"
"""Keeps the server busy for about 30 ms, in which the key expires."""

LATE_S = 0.3
"""Tolerance for a busy machine."""


@dataclass
class LedgerFixture:
    """A gateway's ledger under load; it records the result of each charge."""

    store: Store
    ledger: Ledger
    metrics: Metrics
    admitted: int = 0
    refused: int = 0
    longest_s: float = 0.0
    gap_s: float = 0.0
    """The longest time without an admitted charge."""
    _last: float = field(default_factory=time.monotonic)

    async def charge(self) -> None:
        began = time.monotonic()
        is_admitted = isinstance(await self.ledger.charge(TERMS, HIT), Admitted)
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - began)
        if is_admitted:
            self.admitted += 1
            self.gap_s, self._last = max(self.gap_s, now - self._last), now
        else:
            self.refused += 1

    async def busy(self, over: asyncio.Event) -> None:
        """Makes charges, a few at a time, until the change is over."""
        while not over.is_set():
            await self.charge()
            await asyncio.sleep(0.002)

    async def during(self, change: Callable[[], object], *, then_s: float = 0.3) -> Any:
        """Runs `change` under load, and returns its result."""
        over, self._last = asyncio.Event(), time.monotonic()
        traffic = [asyncio.create_task(self.busy(over)) for _ in range(4)]
        await asyncio.sleep(0.2)
        result = await asyncio.to_thread(change)
        before = self.admitted
        async with asyncio.timeout(15):
            while self.admitted < before + 50:  # noqa: ASYNC110 -- what happens in a server sends no event
                await asyncio.sleep(0.01)
        await asyncio.sleep(then_s)
        over.set()
        await asyncio.gather(*traffic)
        return result

    @property
    def unanswered(self) -> int:
        return int(self.metrics.registry.get_sample_value("estimate_proxy_unanswered_debits_total") or 0)

    async def booked(self) -> int:
        totals = await LedgerReader(self.store, KEYS, ZONE).window_totals(["design"])
        return totals.teams["design"]["month"].requests


def script_of(text: str) -> Script:
    """Returns a script from text."""
    script = Script("proxy.store", "write_check")
    script.text = f"#!lua\n{text}".encode()
    script.digest = sha1(script.text, usedforsecurity=False).hexdigest()
    return script


Scenario = Callable[[LedgerFixture], Coroutine[Any, Any, None]]


@asynccontextmanager
async def opened(url: str, access: StoreAccess = StoreAccess()) -> AsyncIterator[LedgerFixture]:  # noqa: B008 -- it is frozen
    metrics = Metrics()
    store = Store(url, "ledger", metrics, access=access)
    ledger = Ledger(LedgerBatcher(store, KEYS, ZONE, metrics), metrics, admits_on_outage=False)
    try:
        await ledger.open()
        yield LedgerFixture(store, ledger, metrics)
    finally:
        await ledger.close(5)
        await store.close()


def run_scenario(url: str, scenario: Scenario, access: StoreAccess = StoreAccess()) -> None:  # noqa: B008 -- it is frozen
    async def tell() -> None:
        async with asyncio.timeout(40), opened(url, access) as fixture:
            await scenario(fixture)

    asyncio.run(tell())


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> None:
    """Empties the ledger before each test on the cluster."""
    if "fleet" in request.fixturenames:
        found: Cluster = request.getfixturevalue("fleet")
        for slot in (0, SLOTS // 2, SLOTS - 1, LEDGER_SLOT):
            found.home(slot).client.flushall()


def assert_counted_once(fixture: LedgerFixture, booked: int, *, lost: int = 0) -> None:
    """`lost`: how many debits a killed primary may have acknowledged and not replicated."""
    assert fixture.admitted - lost <= booked <= fixture.admitted + fixture.unanswered
    assert_in_time(fixture.longest_s, TIMEOUT_S + 2 * TICK_S + LATE_S)


# Errors of servers


@pytest.mark.parametrize(
    ("redirect", "target"),
    [
        (MovedError("12 10.0.0.1:7001"), Address("10.0.0.1", 7001)),
        (MovedError("12 ::1:7001"), Address("::1", 7001)),
        (MovedError("12 :7001"), Address("asked", 7001)),
        (AskError("12 h:1"), Address("h", 1)),
    ],
)
def test_a_redirect_names_a_server(redirect: AskError, target: Address) -> None:
    assert target_of(redirect, "asked") == target
    assert not is_not_serving(redirect)


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (b"reply", "final"),
        (None, "final"),
        (NoScriptError("no such script"), "final"),
        (TryAgainError(""), "may pass"),
        (ResponseError("Script attempted to access a non local key in a cluster node script: ab"), "may pass"),
        (ResponseError("Attempted to access a non local key in a cluster node script: ab"), "may pass"),
        (ReadOnlyError("", status_code="READONLY"), "not serving"),
        (ClusterDownError("", status_code="CLUSTERDOWN"), "not serving"),
        (MasterDownError("", status_code="MASTERDOWN"), "not serving"),
        (BusyLoadingError("", status_code="LOADING"), "not serving"),
        (ResponseError("NOREPLICAS Not enough good replicas to write."), "not serving"),
        (ResponseError("MISCONF It cannot persist to disk."), "not serving"),
        (OutOfMemoryError("", status_code="OOM"), "final"),
        (NoPermissionError("", status_code="NOPERM"), "final"),
        (NotConnectedError(""), "final"),
        (TimeoutError(), "final"),
        (OSError(), "final"),
    ],
)
def test_an_error_tells_whether_another_try_may_help(result: object, kind: str) -> None:
    assert is_not_serving(result) == (kind == "not serving")
    assert may_pass(result) == (kind == "may pass")


@pytest.mark.parametrize(
    ("result", "sent", "unreachable"),
    [
        (NotConnectedError(""), False, True),
        (NotConnectedError(""), True, False),
        (TimeoutError(), False, True),
        (OSError(), True, False),
        (BusyLoadingError("", status_code="LOADING"), False, False),
        (NO_REPLY, False, False),
    ],
)
def test_a_server_is_unreachable_if_nothing_was_sent(result: object, sent: bool, unreachable: bool) -> None:  # noqa: FBT001 -- a row
    async def scenario() -> None:
        future = asyncio.get_running_loop().create_future()
        call = Call(GET, ("key",), (), future, 0.0, sent=sent, result=result)
        assert was_unreachable(call) == unreachable

    asyncio.run(scenario())


def test_slot_owners_are_parsed() -> None:
    homes = slot_owners([[0, 1, [b"h", 1, b"id"]], [3, 4, [None, 2], [b"replica", 3]], [5, 5, [b"?", 4]]], "asked")
    assert homes[:6] == [Address("h", 1)] * 2 + [None] + [Address("asked", 2)] * 2 + [Address("asked", 4)]
    assert homes[6:] == [None] * (SLOTS - 6)


# A cluster


class _RecordingStore(Store):
    """Records the keys of each script call."""

    def __init__(self, url: str) -> None:
        super().__init__(url, "ledger")
        self.noted: list[tuple[str, tuple[str, ...]]] = []

    async def call(self, script: Script, *keys: str, args: tuple[bytes | int | str, ...] = ()) -> Any:
        self.noted.append((script.name, keys))
        return await super().call(script, *keys, args=args)

    async def call_at_once(self, script: Script, *keys: str, args: tuple[bytes | int | str, ...] = ()) -> Any:
        self.noted.append((script.name, keys))
        return await super().call_at_once(script, *keys, args=args)


async def _use_everything(store: Store) -> None:
    book = PriceBook(store, origin="https://upstream.example", ttl_s=60, stale_s=30)
    key = "ab" * 32
    for word in (b"", b"word"):
        lease = await book.leases.take(key, "default", force=True)
        assert isinstance(lease, Lease)
        assert await book.leases.keep(lease)
        await book.leases.watch(key, "default")
        assert await book.leases.end(lease, failure=word)
    lease = await book.leases.take(key, "default", force=True)
    assert isinstance(lease, Lease)
    assert (await book.put(lease, Price(b"5", b""), b"digest")).is_current
    await book.accounts.record_balance("default", b"7")
    await book.accounts.claim_audit("default", max_age_s=1, for_s=1)
    await book.accounts.record_price_change("default", key)
    await PriceBook(store, origin="https://upstream.example", ttl_s=60, stale_s=30).look_up(key, "default")
    await book.purge_question(key, "default")
    await book.purge_account("default")
    metrics = Metrics()
    ledger = Ledger(LedgerBatcher(store, KEYS, ZONE, metrics), metrics, admits_on_outage=False)
    assert isinstance(await ledger.charge(TERMS, HIT), Admitted)
    reports, today = LedgerReader(store, KEYS, ZONE), date.today()  # noqa: DTZ011 -- any two days will do
    await reports.usage(UsageQuery(today, today, ("team",), None, csv=False))
    await reports.quota_states([TERMS])
    await reports.token_uses(["ab"])
    changes = PriceChangeLog(store, KEYS, ZONE)
    changes.record("ask", account="default", model="Flux", key=key, old=b"5", new=b"6")
    await changes.close(1)
    await reports.price_changes(PriceChangeQuery(today, today, None, csv=False, dialect="rfc4180"))
    await ledger.close(1)
    uses = TokenUses(store, KEYS)
    uses.record("ab")
    await uses.flush()
    await _learn(store)


async def _learn(store: Store) -> None:
    learner = Learner(store, origin="https://upstream.example", ttl_s=60, learn_from=1, audit_one_in=25)
    ticket = (await learner.look_up(body({"model": "Flux", "seed": 100}))).ticket
    assert ticket is not None
    await learner.observe(ticket, Price(b"5", b""), team="design")
    learner._counts.add(("default", ticket.reduced.scope), Counted.RIGHT)
    await learner.close()
    assert len(await learner.scopes("default")) == 1
    await learner.drop_setting(body({"model": "Flux", "seed": 100}))
    await learner.drop_prices("default")
    assert await learner.forget("default") == 1


def test_each_script_has_its_keys_in_one_slot(fleet: Cluster) -> None:
    async def scenario() -> None:
        store = _RecordingStore(fleet.url)
        try:
            await _use_everything(store)
        finally:
            await store.close()
        others = LUA_SCRIPTS.keys() - {"write_check"}  # it uses the keys of another script
        assert {name for name, _ in store.noted} == others
        for name, keys in store.noted:
            assert len({key_slot(key.encode()) for key in keys}) == 1, (name, keys)

    asyncio.run(scenario())


def test_calls_of_one_iteration_are_sent_together_to_each_server(fleet: Cluster) -> None:
    primaries = [fleet.home(slot) for slot in (0, SLOTS // 2, SLOTS - 1)]

    def reads() -> int:
        return sum(int(member.info("stats", "total_reads_processed")) for member in primaries)

    async def scenario(fixture: LedgerFixture) -> None:
        await asyncio.gather(*(fixture.store.call(GET, str(n)) for n in range(100)))
        before = reads()
        replies = await asyncio.gather(*(fixture.store.call(GET, str(n)) for n in range(100)))
        assert [reply[0] for reply in replies] == [None] * 100
        assert reads() - before < 60  # the servers also send traffic to each other and to this test

    run_scenario(fleet.url, scenario)


def test_all_primaries_are_checked(fleet: Cluster) -> None:
    evicting = fleet.home(SLOTS - 1)

    async def scenario(fixture: LedgerFixture) -> None:
        assert await fixture.store.ping()
        version = await fixture.store.version()
        assert version is not None
        assert version >= (7, 0)
        assert await fixture.store.eviction_policy() == "noeviction"
        evicting.client.config_set("maxmemory-policy", "allkeys-lru")
        assert await fixture.store.eviction_policy() == "allkeys-lru"
        with evicting.hanging():
            assert not await fixture.store.ping()

    run_scenario(fleet.url, scenario)
    evicting.client.config_set("maxmemory-policy", "noeviction")


def test_a_slot_that_moves_under_load_loses_no_debit(fleet: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """Keys move one by one: MOVED, ASK and TRYAGAIN."""
    source = fleet.home(LEDGER_SLOT)
    target = fleet.home(0 if fleet.home(0) is not source else SLOTS - 1)
    answered: Counter[str] = Counter()

    async def reading(store: Store, over: asyncio.Event) -> None:
        while not over.is_set():
            for name in ("usage", "other", "third"):
                reply = await store.call(GET, f"ep1:{{acme}}:{name}")
                assert reply[0] is None
                answered[name] += 1

    async def scenario(fixture: LedgerFixture) -> None:
        over = asyncio.Event()
        reads = asyncio.create_task(reading(fixture.store, over))
        await fixture.during(lambda: fleet.move_slot(LEDGER_SLOT, target, pause_s=0.002))
        over.set()
        await reads
        assert (fixture.refused, fixture.unanswered) == (0, 0), caplog.text
        assert_counted_once(fixture, await fixture.booked())

    run_scenario(fleet.url, scenario)
    errors = source.client.info("errorstats")
    assert {"errorstat_MOVED", "errorstat_ASK"} <= errors.keys()
    assert fleet.home(LEDGER_SLOT) is target
    assert min(answered.values()) > 50


def test_a_call_whose_key_expires_as_it_starts_in_a_moving_slot_is_repeated(fleet: Cluster) -> None:
    """The server checks the keys of the second call with the start time of the first one."""
    source = fleet.home(LEDGER_SLOT)
    target = fleet.home(0 if fleet.home(0) is not source else SLOTS - 1)
    lives, expires = "ep1:{acme}:lives", "ep1:{acme}:expires"
    assert key_slot(lives.encode()) == LEDGER_SLOT

    def end_move() -> None:
        for member in (source, target):
            member.ask("CLUSTER", "SETSLOT", LEDGER_SLOT, "STABLE")

    async def scenario() -> None:
        spin, read = script_of(EXPIRE_AND_SPIN), script_of("return redis.call('GET', KEYS[2])")
        store = Store(fleet.url, "ledger", preload=(spin, read))
        await store.open()
        source.ask("SET", lives, "1")
        source.ask("SET", expires, "1")
        target.ask("CLUSTER", "SETSLOT", LEDGER_SLOT, "IMPORTING", fleet.names[source.port])
        source.ask("CLUSTER", "SETSLOT", LEDGER_SLOT, "MIGRATING", fleet.names[target.port])
        asyncio.get_running_loop().call_later(0.1, end_move)
        try:
            replies = await asyncio.gather(*(store.call(script, lives, expires) for script in (spin, read)))
        finally:
            end_move()
            source.ask("DEL", lives, expires)
            await store.close()
        assert replies == [1, None]

    asyncio.run(scenario())


def test_a_planned_failover_under_load_loses_no_debit(fleet: Cluster) -> None:
    old = fleet.home(LEDGER_SLOT)
    new = fleet.replica_of(old)

    def change() -> None:
        new.ask("CLUSTER", "FAILOVER")
        wait_until(lambda: fleet.home(LEDGER_SLOT, [new]) is new)

    async def scenario(fixture: LedgerFixture) -> None:
        await fixture.during(change)
        assert_counted_once(fixture, await fixture.booked())

    run_scenario(fleet.url, scenario)


def test_a_dead_primary_is_replaced_while_the_others_serve(fleet: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    dead = fleet.home(LEDGER_SLOT)
    new = fleet.replica_of(dead)
    wait_until(lambda: new.info("replication", "master_link_status") == "up")
    others = [key for key in map(str, range(40)) if fleet.home(key_slot(key.encode())) is not dead]
    served: Counter[str] = Counter()

    def change() -> None:
        dead.kill()
        wait_until(lambda: fleet.home(LEDGER_SLOT, [new]) is new, within_s=20)

    async def elsewhere(store: Store, over: asyncio.Event) -> None:
        while not over.is_set():
            await store.call(GET, others[0])
            await store.call(GET, others[-1])
            served["elsewhere"] += 1
            await asyncio.sleep(0.005)

    async def scenario(fixture: LedgerFixture) -> None:
        over = asyncio.Event()
        calls = asyncio.create_task(elsewhere(fixture.store, over))
        await fixture.during(change)
        over.set()
        await calls
        assert fixture.refused > 0
        assert_counted_once(fixture, await fixture.booked(), lost=8)
        assert fixture.metrics.registry.get_sample_value("estimate_proxy_store_up", {"role": "ledger"}) == 1

    with caplog.at_level(logging.INFO):
        run_scenario(fleet.url, scenario)
    assert served["elsewhere"] > 50
    assert len([record for record in caplog.records if record.name == "proxy.store.health"]) < 12
    dead.start()


def test_a_cluster_with_a_single_servers_url_logs_the_right_scheme(
    fleet: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    one = fleet.home(0)
    key = next(key for key in map(str, range(40)) if fleet.home(key_slot(key.encode())) is not one)

    async def scenario() -> None:
        store = Store(f"redis://{LOCAL}:{one.port}", "ledger")
        with pytest.raises(StoreUnavailable):
            await store.call(GET, key)
        await store.close()

    asyncio.run(scenario())
    assert "redis+cluster" in caplog.text


def test_a_hanging_primary_delays_only_its_own_calls(fleet: Cluster) -> None:
    hanging = fleet.home(0)
    keys = list(map(str, range(40)))
    theirs = [key for key in keys if fleet.home(key_slot(key.encode())) is hanging]
    others = [key for key in keys if key not in theirs]

    async def timed(store: Store, key: str) -> tuple[bool, float]:
        began = time.monotonic()
        try:
            await store.call(PUT, key, args=(b"1",))
        except StoreOutcomeUnknown:
            return False, time.monotonic() - began
        return True, time.monotonic() - began

    async def scenario(fixture: LedgerFixture) -> None:
        await asyncio.gather(*(fixture.store.call(GET, key) for key in keys))
        before = sets(hanging)
        with hanging.hanging():
            calls = [timed(fixture.store, key) for key in (theirs[0], others[0], others[-1])]
            lost, *served = await asyncio.gather(*calls)
        assert not lost[0]
        assert lost[1] >= TIMEOUT_S
        assert_in_time(lost[1], TIMEOUT_S + 2 * TICK_S + LATE_S)
        assert [is_served for is_served, _ in served] == [True, True]
        assert_in_time(max(took_s for _, took_s in served), TIMEOUT_S / 2)
        async with asyncio.timeout(5):
            while not await is_run(fixture.store):  # noqa: ASYNC110 -- what happens in a server sends no event
                await asyncio.sleep(0.05)
        assert sets(hanging) - before == 2, "the one whose reply was lost, and the next one"

    async def is_run(store: Store) -> bool:
        with suppress(StoreUnavailable):
            await store.call(PUT, theirs[0], args=(b"2",))
            return True
        return False

    hanging.client.script_load(PUT.text)
    run_scenario(fleet.url, scenario)


def sets(member: Member) -> int:
    return (
        int(member.info("commandstats", "cmdstat_hset")["calls"]) if member.info("commandstats", "cmdstat_hset") else 0
    )


# Sentinels


@pytest.mark.parametrize(("brand", "is_planned"), [("valkey", False), ("redis", False), ("valkey", True)])
def test_a_sentinel_failover_under_load_loses_no_acknowledged_debit(
    brand: str,
    is_planned: bool,  # noqa: FBT001 -- a row
    caplog: pytest.LogCaptureFixture,
) -> None:
    access = StoreAccess(password="pa:ss", sentinel_password="wörd")

    async def scenario(fixture: LedgerFixture) -> None:
        idle = Store(setup.url, "price-book", access=access)
        assert await idle.ping()
        first = setup.primary()

        def change() -> Member:
            if is_planned:
                setup.sentinels[-1].ask("SENTINEL", "FAILOVER", NAME)
            else:
                first.kill()
            return setup.until_replaced(first)

        await fixture.during(change)
        async with asyncio.timeout(5):
            while not await idle.ping():  # noqa: ASYNC110 -- what happens in a server sends no event
                await asyncio.sleep(0.05)
        await idle.close()
        assert fixture.refused > 0 or is_planned
        assert_counted_once(fixture, await fixture.booked(), lost=8)

    with sentinel_setup(brand, password="pa:ss", sentinel_password="wörd") as setup:
        setup.sentinels[0].kill()
        with caplog.at_level(logging.INFO):
            run_scenario(setup.url, scenario, access)
        assert len([record for record in caplog.records if record.name == "proxy.store.health"]) < 12
        run_scenario(setup.url, _is_refused, replace(access, sentinel_password="wrong"))
        run_scenario(setup.url, _is_refused, replace(access, password="wrong"))
        run_scenario(setup.url.replace("/mymaster", "/other"), _is_refused, access)


async def _charges(fixture: LedgerFixture) -> None:
    await fixture.charge()
    assert fixture.admitted == 1


async def _is_refused(fixture: LedgerFixture) -> None:
    assert not await fixture.store.ping()
    with pytest.raises(StoreUnavailable) as caught:
        await fixture.store.call(GET, "x")
    assert not isinstance(caught.value, StoreOutcomeUnknown)


def test_a_gateway_survives_a_failover(tmp_path: Path, upstream: UpstreamFixture, simulator: object) -> None:
    assert simulator
    with sentinel_setup("valkey") as setup, gateway_runner(tmp_path, upstream.url) as runner:
        served = runner.start(store={"url": setup.url})
        with served.client() as client:
            answers = [client.post("/pub/v1/generations/estimate", content=b'[{"model":"A"}]') for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200] * 3
            first = setup.primary()
            first.kill()
            statuses, began = Counter[int](), time.monotonic()
            while statuses[200] < 20:
                assert time.monotonic() - began < 20
                statuses[client.post("/pub/v1/generations/estimate", content=b'[{"model":"A"}]').status_code] += 1
            assert statuses.keys() <= {200, 503}
        assert len(served.messages(" fails: ")) < 12
        assert served.stop() == 0


# One host name, whose servers change


FAILOVER_S = 4


@pytest.mark.parametrize("brand", BRANDS)
def test_a_failover_of_a_host_name_loses_no_answer(brand: str) -> None:
    """Like a managed service: the old primary stays up as a replica, and old connections stay on it.

    Writes are paused during the failover, sometimes for longer than the default timeout.
    """
    with server_group(brand) as group:
        old = group.member()
        wait_until(old.answers)
        new = group.member(f"replicaof {LOCAL} {old.port}")
        wait_until(lambda: new.answers() and new.info("replication", "master_link_status") == "up")

        def change() -> None:
            old.ask("CLIENT", "PAUSE", 5000, "WRITE")
            wait_until(
                lambda: new.info("replication", "master_repl_offset") == old.info("replication", "master_repl_offset")
            )
            new.client.replicaof("NO", "ONE")
            store_proxy.redirect_to(f"redis://{LOCAL}:{new.port}")
            old.client.replicaof(LOCAL, str(new.port))
            old.ask("CLIENT", "UNPAUSE")

        async def scenario(fixture: LedgerFixture) -> None:
            await fixture.during(change)
            assert fixture.refused == fixture.unanswered == 0
            assert await fixture.booked() == fixture.admitted

        with proxy_to(f"redis://{LOCAL}:{old.port}") as store_proxy:
            run_scenario(store_proxy.url, scenario, StoreAccess(timeout_s=FAILOVER_S))


# One server, with TLS and passwords


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def guarded(certified: Certificates) -> Iterator[Member]:
    """Starts a Redis with TLS only, which requires client certificates."""
    program("redis-server")
    with server_group("redis") as group:
        lines = (*tls_lines(certified), "tls-auth-clients yes", "user gateway on >pa:ss ~* +@all")
        own = {"ssl_certfile": str(certified.cert("client")), "ssl_keyfile": str(certified.key("client"))}
        server = group.member(*lines, ssl=True, ssl_ca_certs=str(certified.ca), **own)
        wait_until(server.answers)
        yield server


def tls_lines(certified: Certificates) -> tuple[str, ...]:
    return (
        f"tls-cert-file {certified.cert('server')}",
        f"tls-key-file {certified.key('server')}",
        f"tls-ca-cert-file {certified.ca}",
    )


def access_with(certified: Certificates) -> StoreAccess:
    return StoreAccess(ca_file=certified.ca, cert_file=certified.cert("client"), key_file=certified.key("client"))


def test_tls_with_a_client_certificate(guarded: Member, certified: Certificates) -> None:
    own = access_with(certified)
    run_scenario(f"rediss://localhost:{guarded.port}", _charges, replace(own, username="gateway", password="pa:ss"))
    guarded.client.flushall()
    run_scenario(f"rediss://gateway:pa%3Ass@{LOCAL}:{guarded.port}/3", _charges, own)


def test_sentinels_and_a_cluster_with_tls(certified: Certificates) -> None:
    lines = (*tls_lines(certified), "tls-auth-clients no", "tls-replication yes", "tls-cluster yes")
    asked: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(certified.ca)}
    with server_group("redis") as group:
        server = group.member(*lines, **asked)
        monitor = f"sentinel monitor {NAME} {LOCAL} {server.port} 1"
        sentinel = group.member(*lines, monitor, options=["--sentinel"], **asked)
        clustered = group.member(*lines, "cluster-enabled yes", f"cluster-port {free_port()}", **asked)
        wait_until(lambda: server.answers() and sentinel.answers() and clustered.answers())
        clustered.ask("CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)
        access = StoreAccess(ca_file=certified.ca, timeout_s=2)  # a busy machine is slow to begin TLS
        run_scenario(f"rediss+sentinel://localhost:{sentinel.port}/{NAME}", _charges, access)
        wait_until(lambda: clustered.client.cluster("INFO")["cluster_state"] == "ok")
        run_scenario(f"rediss+cluster://localhost:{clustered.port}", _charges, access)
        run_scenario(f"rediss+sentinel://{LOCAL}:{sentinel.port}/{NAME}", _is_refused)
        run_scenario(f"rediss+cluster://{LOCAL}:{clustered.port}", _is_refused)


def test_a_slot_without_a_server_does_not_affect_other_slots() -> None:
    with server_group("valkey") as group:
        server = group.member("cluster-enabled yes", f"cluster-port {free_port()}", "cluster-require-full-coverage no")
        wait_until(server.answers)
        missing, served = "missing", "served"
        server.ask("CLUSTER", "ADDSLOTS", key_slot(served.encode()))
        wait_until(lambda: server.client.cluster("INFO")["cluster_state"] == "ok")

        async def scenario() -> None:
            store = Store(f"redis+cluster://{LOCAL}:{server.port}", "price-book")
            await store.open()
            try:
                with pytest.raises(StoreUnavailable, match="no server has these keys"):
                    await store.call(GET, missing)
                reply = await store.call(GET, served)
                assert reply[0] is None
            finally:
                await store.close()

        asyncio.run(scenario())


@pytest.mark.parametrize(
    ("without", "reason"),
    [
        (("ca_file", "cert_file"), "CERTIFICATE_VERIFY_FAILED"),
        (
            ("cert_file",),
            "CERTIFICATE_REQUIRED|SERVER_CLOSED|RESET_BY_PEER",
        ),  # with TLS 1.3 the server reports it late, or closes the connection
        (("ca_file",), "CERTIFICATE_VERIFY_FAILED"),
    ],
)
def test_untrusted_tls_is_refused_with_its_reason(
    guarded: Member, certified: Certificates, without: tuple[str, ...], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    nothing: dict[str, Any] = dict.fromkeys(without)
    access = replace(access_with(certified), **nothing)
    run_scenario(f"rediss://{LOCAL}:{guarded.port}", _is_refused, access)
    (message,) = (record.getMessage() for record in caplog.records if record.name == "proxy.store.health")
    assert message.startswith("the ledger's connection fails: ")
    assert re.search(reason, message.upper().replace(" ", "_"))


def test_a_unix_socket_with_user_and_password(any_store_url: str) -> None:
    with redis.Redis.from_url(any_store_url) as client:
        client.flushall()  # other tests leave rates in the future
        client.acl_setuser("guest", enabled=True, passwords=["+pa:ss"], keys="*", commands=["+@all"])
        run_scenario(any_store_url.replace("unix://", "unix://guest:pa%3Ass@"), _charges)
        run_scenario(any_store_url, _charges, StoreAccess(username="guest", password="pa:ss"))
        run_scenario(any_store_url.replace("unix://", "unix://guest:wrong@"), _is_refused)
        client.acl_deluser("guest")
