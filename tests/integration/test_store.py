"""The store and the price book on Valkey and on Redis 7.0."""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import redis

from faulty_proxy import HEALTHY, Conditions, proxy_to
from gateway_fixture import settings
from lateness import assert_in_time
from proxy.cache.leases import Lease
from proxy.cache.price_book import PriceBook
from proxy.cache.prices import Lookup, Price
from proxy.open_stores import open_book_store, open_ledger_store, startup_errors
from proxy.problems import StoreUnavailable
from proxy.settings.schema import Settings
from proxy.store.access import EmbeddedUrls
from proxy.store.client import COOLDOWN_S, TIMEOUT_S, Script, Store
from proxy.telemetry.metrics import Metrics
from serving import free_port

KEY = "ab" * 32
PRICE = Price(b"5.10", b'"note":"x y"')
BALANCE, GET = Script("proxy.cache", "balance_put"), Script("proxy.cache", "price_get")


@pytest.fixture
def server(any_store_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(any_store_url) as client:
        client.flushall()
        client.script_flush()
        client.config_resetstat()
        yield client
        client.config_set("maxmemory", "256mb")


def run(url: str, scenario: Callable[[Store], Awaitable[None]]) -> None:
    """Runs `scenario` with a store, and closes the store."""

    async def tell() -> None:
        store = Store(url, "price-book")
        try:
            await scenario(store)
        finally:
            await store.close()

    asyncio.run(tell())


def book_of(store: Store, ttl_s: float = 60) -> PriceBook:
    return PriceBook(store, origin="https://upstream.example", ttl_s=ttl_s, stale_s=30)


async def stored(book: PriceBook) -> bool:
    """Takes a lease, and returns whether a price could be stored with it."""
    try:
        lease = await book.leases.take(KEY, "default", force=True)
        assert isinstance(lease, Lease)
        return (await book.put(lease, PRICE, b"digest")).is_current
    except StoreUnavailable:
        return False


def calls(server: redis.Redis, command: str) -> int:
    """Returns how often the server has run a command since the test began."""
    return int(server.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


def test_a_stored_price_is_found_with_its_age(any_store_url: str, server: redis.Redis) -> None:
    async def scenario(store: Store) -> None:
        book = book_of(store)
        assert await book.look_up(KEY, "default") == Lookup(None, None, None)
        assert await stored(book)
        await book.accounts.record_balance("default", b"19.5")
        for reader in (book, book_of(store)):
            known = await reader.look_up(KEY, "default")
            assert known.stored is not None
            assert known.balance is not None
            assert (known.stored.price, known.balance.amount) == (PRICE, b"19.5")
            assert 0 <= known.stored.age_s < 5
            assert 55 < known.stored.ttl_s <= 60

    run(any_store_url, scenario)
    assert 85_000 < int(server.pttl(f"ep1:{{{KEY}}}:price")) <= 90_000
    assert not server.exists(f"ep1:{{{KEY}}}:lease")
    assert server.hgetall("ep1:book:https://upstream.example:default")[b"balance"] == b"19.5"


def test_scripts_flushed_by_the_server_are_loaded_again_and_run_once(any_store_url: str, server: redis.Redis) -> None:
    async def scenario(store: Store) -> None:
        notes = [store.call(BALANCE, f"book{n}", args=(b"1",)) for n in range(3)]
        await asyncio.gather(*notes)
        server.script_flush()
        await store.call(BALANCE, "book", args=(b"1",))

    run(any_store_url, scenario)
    assert calls(server, "hset") == 4


def test_scripts_are_loaded_before_the_first_call(any_store_url: str, server: redis.Redis) -> None:
    async def scenario() -> None:
        store = Store(any_store_url, "price-book", preload=(GET,))
        await store.open()
        try:
            assert server.script_exists(GET.digest) == [True]
            await store.call(GET, "k")
        finally:
            await store.close()

    asyncio.run(scenario())
    assert "errorstat_NOSCRIPT" not in server.info("errorstats")


def test_calls_of_one_iteration_are_sent_together(any_store_url: str, server: redis.Redis) -> None:
    async def scenario(store: Store) -> None:
        await store.call(GET, "warm")
        before = int(server.info("stats")["total_reads_processed"])
        await asyncio.gather(*(store.call(GET, f"{n}") for n in range(100)))
        reads = int(server.info("stats")["total_reads_processed"]) - before
        assert reads <= 3  # the batch, which may arrive in two pieces, and the INFO call itself

    run(any_store_url, scenario)


def test_a_cancelled_call_does_not_affect_other_replies(any_store_url: str, server: redis.Redis) -> None:
    server.set("present", "1 text")

    async def scenario(store: Store) -> None:
        tasks = [asyncio.create_task(store.call(GET, "present")) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        replies = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(replies[1], asyncio.CancelledError)
        assert [reply[0] for reply in (replies[0], replies[2])] == [b"1 text"] * 2  # type: ignore[index] # replies

    run(any_store_url, scenario)


def test_with_a_full_store_every_request_is_answered(
    any_store_url: str, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    policy = server.config_get("maxmemory-policy")["maxmemory-policy"]
    server.config_set("maxmemory-policy", "noeviction")
    server.config_set("maxmemory", "1")

    async def scenario(store: Store) -> None:
        book = book_of(store)
        for _ in range(5):
            assert not await stored(book)
            assert (await book.look_up(KEY, "default")).stored is None
        server.config_set("maxmemory", "256mb")
        assert await stored(book)

    with caplog.at_level(logging.INFO, "proxy"):
        run(any_store_url, scenario)
    server.config_set("maxmemory-policy", policy or "")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("the price-book's writing fails: OOM command not allowed when used memory")
    assert messages[0].endswith(": raise maxmemory, or move other data off this server")
    assert messages[1] == "the price-book's writing works again"


def test_an_unreachable_store_raises(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(store: Store) -> None:
        book = book_of(store)
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await book.look_up(KEY, "default")
            assert not await stored(book)
        assert not await store.ping()
        assert await store.version() is None

    run(f"redis://127.0.0.1:{free_port()}", scenario)
    assert [record.getMessage() for record in caplog.records] == [caplog.records[0].getMessage()]
    assert "connection fails" in caplog.text


def test_the_balance_is_known_in_the_process_without_the_store() -> None:
    async def scenario(store: Store) -> None:
        book = book_of(store)
        with pytest.raises(StoreUnavailable):
            await book.accounts.record_balance("default", b"7")
        balance = book.accounts.balance("default")
        assert balance is not None
        assert balance.amount == b"7"

    run(f"redis://127.0.0.1:{free_port()}", scenario)


def test_a_newer_balance_of_another_process_is_read_but_not_an_older_one(
    any_store_url: str, server: redis.Redis
) -> None:
    async def scenario(store: Store) -> None:
        ours, theirs = book_of(store), book_of(store)
        await ours.accounts.record_balance("default", b"10")
        await theirs.accounts.record_balance("default", b"9")
        assert await newest(ours) == b"9"
        server.hset("ep1:book:https://upstream.example:default", mapping={"balance": "50", "balance_at_ms": "1"})
        assert await newest(book_of(store)) == b"50"
        await ours.accounts.read("default")
        assert await newest(ours) == b"9"

    run(any_store_url, scenario)


def test_many_requests_of_one_iteration_read_their_book_once(any_store_url: str, server: redis.Redis) -> None:
    async def scenario(store: Store) -> None:
        book = book_of(store)
        await store.call(GET, "warm")
        leases = await asyncio.gather(*(book.leases.take(f"{n}" * 64, "default") for n in range(8)))
        assert len({lease.generations for lease in leases if isinstance(lease, Lease)}) == 1
        assert len(leases) == 8
        assert calls(server, "hmget") == 1
        amounts = [b"20", b"20", b"19", b"20", b"20"]
        await asyncio.gather(*(book.accounts.record_balance("default", amount) for amount in amounts))
        assert calls(server, "hset") == 1 + 3  # the new book, and the balance whenever it changes
        assert server.hget("ep1:book:https://upstream.example:default", "balance") == b"20"
        await book.leases.take("9" * 64, "default")
        assert calls(server, "hmget") == 2

    run(any_store_url, scenario)


async def newest(book: PriceBook) -> bytes | None:
    """Returns the balance that an estimate shows now."""
    balance = (await book.look_up(KEY, "default")).balance
    return None if balance is None else balance.amount


def test_a_late_reply_is_a_failure_and_the_call_is_not_repeated(any_store_url: str, server: redis.Redis) -> None:
    async def scenario(store: Store) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        with pytest.raises(StoreUnavailable):
            await store.call(BALANCE, "late", args=(b"1",))
        waited = loop.time() - started
        assert waited >= TIMEOUT_S
        assert_in_time(waited, TIMEOUT_S + 0.25)
        started = loop.time()
        with pytest.raises(StoreUnavailable):
            await store.call(BALANCE, "late", args=(b"1",))
        assert_in_time(loop.time() - started, TIMEOUT_S / 2)

    server.script_load(BALANCE.text)
    path = unquote(any_store_url.removeprefix("unix://"))
    with withholding_replies(Path(path)) as url:
        run(url, scenario)
    assert calls(server, "hset") == 1


def test_reads_are_repeated_once(any_store_url: str, server: redis.Redis) -> None:
    async def scenario(store: Store) -> None:
        await book_of(store).look_up(KEY, "default")
        server.client_pause(350)
        assert (await book_of(store).look_up(KEY, "default")).stored is None

    run(any_store_url, scenario)


def test_the_store_recovers_by_itself(any_store_url: str, server: redis.Redis) -> None:
    async def scenario(store: Store) -> None:
        server.client_pause(600)
        with pytest.raises(StoreUnavailable):
            await store.call(GET, "x")
        async with asyncio.timeout(COOLDOWN_S + 5):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    await store.call(GET, "x")
                    break
                await asyncio.sleep(0.05)

    run(any_store_url, scenario)


def test_a_failure_of_an_older_call_starts_no_cooldown_after_a_newer_reply(
    any_store_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection was dead, but the server is healthy."""
    caplog.set_level("INFO", "proxy.store.health")

    async def scenario(store: Store) -> None:
        await store.call(GET, "x")
        store_proxy.set_conditions(Conditions(swallows=b""))
        old = asyncio.ensure_future(store.call(BALANCE, "x", args=(b"1",)))
        assert await asyncio.to_thread(store_proxy.swallowed.wait, 5)
        store_proxy.set_conditions(HEALTHY)
        await store.call(GET, "x")
        with pytest.raises(StoreUnavailable, match="no answer in time"):
            await old
        await store.call(GET, "x")
        assert caplog.messages == []

    with proxy_to(any_store_url) as store_proxy:
        run(store_proxy.url, scenario)


def test_a_failing_server_is_in_cooldown_for_both_roles(any_store_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "proxy.store.health")
    metrics = Metrics()

    async def scenario() -> None:
        configured = settings(store_proxy.url, "http://127.0.0.1:1")
        ledger = open_ledger_store(configured, {}, metrics)
        book = open_book_store(configured, {}, metrics, ledger=ledger)
        store_proxy.set_conditions(Conditions(swallows=b""))
        with pytest.raises(StoreUnavailable):
            await book.call(GET, "x")
        with pytest.raises(StoreUnavailable, match="cool-down"):
            await ledger.call(BALANCE, "x", args=(b"1",))
        assert (
            "the ledger's connection fails: a call of the price-book to the same server failed: the log line of the "
            "price-book says why"
        ) in caplog.messages
        assert metrics.registry.get_sample_value("estimate_proxy_store_up", {"role": "ledger"}) == 0
        store_proxy.set_conditions(HEALTHY)
        await asyncio.sleep(COOLDOWN_S)
        await ledger.call(GET, "x")
        assert caplog.messages[-1] == "the ledger's connection works again"
        assert metrics.registry.get_sample_value("estimate_proxy_store_up", {"role": "ledger"}) == 1
        await book.close()
        await ledger.close()

    with proxy_to(any_store_url) as store_proxy:
        asyncio.run(scenario())


def test_the_configured_credentials_are_used(any_store_url: str, server: redis.Redis) -> None:
    server.acl_setuser("gateway", enabled=True, passwords=["+pa:ss/wörd"], keys="*", commands=["+@all"])
    for password, works in (("pa:ss/wörd", True), ("wrong", False)):
        configured = settings(any_store_url, "http://127.0.0.1:1", store={"username": "gateway", "password": password})

        async def scenario(configured: Settings = configured, *, works: bool = works) -> None:
            for open_role in (open_ledger_store, open_book_store):
                store = open_role(configured, {})
                try:
                    assert await store.ping() is works
                finally:
                    await store.close()

        asyncio.run(scenario())
    server.acl_deluser("gateway")


def test_an_old_server_version_is_refused(any_store_url: str) -> None:
    configured = settings(any_store_url, "http://127.0.0.1:1")
    assert asyncio.run(startup_errors(configured, {})) is None
    with answering(b"redis_version:6.2.14\r\n") as url:
        error = asyncio.run(startup_errors(settings(url, "http://127.0.0.1:1"), {}))
    assert error == "the store is Redis 6.2.14: use Redis 7.0 or newer, or Valkey 7.2 or newer"


def test_only_a_ledger_that_may_evict_causes_a_warning(
    any_store_url: str, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    policy = server.config_get("maxmemory-policy")["maxmemory-policy"]
    configured = settings(any_store_url, "http://127.0.0.1:1")
    for wanted, warnings in (("noeviction", 0), ("allkeys-lru", 1)):
        server.config_set("maxmemory-policy", wanted)
        caplog.clear()
        assert asyncio.run(startup_errors(configured, {})) is None
        messages = [record.getMessage().split(",")[0] for record in caplog.records if "evict" in record.getMessage()]
        assert messages == [f"the ledger's server may evict keys (maxmemory-policy {wanted})"] * warnings
    server.config_set("maxmemory-policy", str(policy))


def test_the_price_book_uses_its_own_store_or_the_ledgers_or_an_embedded_one() -> None:
    def where(embedded: EmbeddedUrls, **sections: dict[str, str]) -> list[str]:
        configured = settings("redis://ledger/0", "http://127.0.0.1:1", **sections)
        if "store" in sections:
            configured = configured.model_copy(update={"store": configured.store.model_copy(update={"url": None})})
        stores = open_ledger_store(configured, embedded), open_book_store(configured, embedded)
        return [node.host for store in stores for node in store._topology.primaries()]

    embedded: EmbeddedUrls = {"ledger": "unix:///ledger.sock", "price-book": "unix:///book.sock"}
    assert where({}) == ["ledger", "ledger"]
    assert where({}, cache={"url": "redis://book/0"}) == ["ledger", "book"]
    assert where(embedded, store={}) == ["/ledger.sock", "/book.sock"]
    assert where(embedded, store={}, cache={"url": "redis://book/0"}) == ["/ledger.sock", "book"]


@contextlib.contextmanager
def withholding_replies(server: Path) -> Iterator[str]:
    """A proxy to a unix socket that passes all requests, but no reply after the handshake's."""
    over = threading.Event()

    def proxy_to(client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as upstream:
            upstream.connect(str(server))
            client.settimeout(0.05)
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    if not (received := client.recv(65536)):
                        return
                    upstream.sendall(received)
                    if b"EVALSHA" not in received:
                        client.sendall(upstream.recv(65536))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)

        def accept() -> None:
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    proxy_to(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        over.set()
        thread.join()


@contextlib.contextmanager
def answering(info: bytes) -> Iterator[str]:
    """Starts a server with this answer to INFO, and OK to everything else, for one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                while received := client.recv(65536):
                    for command in received.split(b"*")[1:]:
                        asked = b"$4\r\nINFO\r\n" in command
                        client.sendall(b"$%d\r\n%s\r\n" % (len(info), info) if asked else b"+OK\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()
