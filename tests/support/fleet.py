"""Several gateways on one store, as processes. Each test takes a team whose account no other test uses."""

import asyncio
import json
import secrets
import signal
import string
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import redis
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway_fixture import API_KEY, PATH, answers, cache_status
from gateway_process import SOON_S, GatewayProcess, Tree, gateway_runner
from proxy.auth import digest_of, token_of
from proxy.cache.account_book import BOOK_REREAD_S
from proxy.cache.leases import LEASE_S
from proxy.demo.simulator import Exchange, Responder
from proxy.embedded.valkey import Valkey
from proxy.settings.loader import PREFIX
from serving import wait_until

ADMIN = token_of("0" * 32)
BODY = b'[{"model":"Flux","steps":30}]'

MAX_HELD_S = 20

SETTLE_S = 0.4
"""Until a request that a gateway has read waits for another gateway's answer: nothing tells of that."""


@dataclass(frozen=True)
class Fleet:
    """`name` begins the names of its accounts: fleets share a store, not prices."""

    name: str
    gateways: Sequence[GatewayProcess]
    clients: Sequence[httpx2.Client]
    store: redis.Redis
    pool: ThreadPoolExecutor
    _letters: Iterator[str] = field(default_factory=lambda: iter(string.ascii_uppercase))

    def team(self) -> "TeamClient":
        return TeamClient(self, next(self._letters))

    def leases(self) -> list[Any]:
        return list(self.store.scan_iter("ep1:*:lease"))


@dataclass(frozen=True)
class TeamClient:
    """A team with an account of its own, and so with a book, a balance and circuits of its own, at every gateway."""

    fleet: Fleet
    letter: str

    @property
    def token(self) -> str:
        return token_of(self.letter * 32)

    @property
    def account(self) -> str:
        return f"{self.fleet.name}-{self.letter.lower()}"

    def ask(self, at: int, content: bytes = BODY, path: str = PATH, **headers: str) -> httpx2.Response:
        """An estimate, asked at the gateway of that number."""
        named = {"x-api-key": self.token} | {name.replace("_", "-"): value for name, value in headers.items()}
        return self.fleet.clients[at].post(path, content=content, headers=named)

    def asking(self, at: int, content: bytes = BODY, path: str = PATH, **headers: str) -> Future[httpx2.Response]:
        return self.fleet.pool.submit(self.ask, at, content, path, **headers)

    def waiting(self, *where: int, content: bytes = BODY) -> list[Future[httpx2.Response]]:
        """Requests that wait for what another one has asked, as far as can be known from outside."""
        futures = [self.asking(at, content) for at in where]
        for at in set(where):
            wait_until(lambda at=at: not unread(self.fleet.gateways[at].url))  # type: ignore[misc] # a default
        time.sleep(SETTLE_S)
        assert not [future for future in futures if future.done()]
        return futures

    def has(self, at: int, content: bytes = BODY) -> bool:
        """Whether that gateway can answer out of what is stored."""
        answer = self.ask(at, content, cache_control="only-if-cached")
        assert answer.status_code in {200, 504}, answer.text
        return answer.status_code == 200

    def explain(self, at: int, content: bytes = BODY) -> Tree:
        found: Tree = self.ask(at, content, "/v1/explain").json()
        return found

    def purge(self, at: int, what: bytes) -> None:
        """`what` is a JSON member: which question, or all."""
        wanted = b'{"account":"%b",%b}' % (self.account.encode(), what)
        answer = self.ask(at, wanted, "/v1/cache/purge", x_api_key=ADMIN)
        assert answer.status_code == 200, answer.text

    def age(self, seconds: int, content: bytes = BODY) -> None:
        """Makes a stored price older, and waits until no gateway has it at hand as it was."""
        key, store = f"ep1:{{{self.explain(0, content)['key']}}}:price", self.fleet.store
        text = store.get(key)
        assert isinstance(text, bytes)
        encoding, put_at, rest = text.split(b" ", 2)
        store.set(key, b"%b %d %b" % (encoding, int(put_at) - seconds * 1000, rest), keepttl=True)
        store.hincrby(self.book.decode(), "drops", 1)
        time.sleep(BOOK_REREAD_S + 0.05)

    @property
    def book(self) -> bytes:
        """The key of the account's book in the store."""
        (key,) = self.fleet.store.scan_iter(f"ep1:book:*:{self.account}")
        assert isinstance(key, bytes)
        return key


PURGES = {"question": b'"body":' + BODY, "account": b'"all":true'}


@contextmanager
def fleet_of(
    count: int, folder: Path, *, store_url: str, upstream_url: str, env: Sequence[dict[str, str]] = (), **sections: Tree
) -> Iterator[Fleet]:
    """So many gateways on the store at that URL; `env` is given to the first ones."""
    name = secrets.token_hex(4)
    with gateway_runner(folder, upstream_url) as runner, ExitStack() as opened:
        how: dict[str, Any] = _sections(name, store_url, sections)
        gateways = [runner.begin(env=variables, **how) for variables in (*env, *[{}] * (count - len(env)))]
        for served in gateways:
            served.wait_until_serving()
        clients = [opened.enter_context(served.client()) for served in gateways]
        store = opened.enter_context(redis.Redis.from_url(store_url))
        fleet = Fleet(name, gateways, clients, store, opened.enter_context(ThreadPoolExecutor(64)))
        yield fleet
        _end(fleet)


def _sections(name: str, store_url: str, sections: dict[str, Tree]) -> dict[str, Tree]:
    accounts = {letter: f"{name}-{letter.lower()}" for letter in string.ascii_uppercase}
    common: dict[str, Tree] = {
        "store": {"url": store_url},
        "upstream": {"timeout_s": 5},
        "server": {"request_timeout_s": 8, "drain_delay_s": 0},
        "admin": {"tokens": [digest_of(ADMIN)]},
        "accounts": {account: {"api_key": API_KEY} for account in accounts.values()},
        "teams": {
            account: {"account": account, "tokens": [digest_of(token_of(letter * 32))]}
            for letter, account in accounts.items()
        },
    }
    return {part: {**common.get(part, {}), **sections.get(part, {})} for part in {*common, *sections}}


def limiting(**quotas: Sequence[Tree]) -> dict[str, str]:
    """For `env`: the quotas of `org`, or of all teams by `team_defaults`. Config files of tests have no such arrays."""
    return {f"{PREFIX}{section.upper()}__QUOTAS": json.dumps(limits) for section, limits in quotas.items()}


class StoreProcess:
    """A store as a gateway embeds it, but without fsync. It can be killed, and comes back with its data under its URL.

    With `appendfsync everysec` Valkey writes nothing while an fsync runs, and answers nothing after 2 s of that: on a
    machine with a slow disk a kill would lose what was answered, and a request would get no answer from its ledger.
    """

    def __init__(self, folder: Path, lock_fd: int, settings: Mapping[str, str]) -> None:
        path = folder / "ledger.sock"
        self.url = f"unix://{path}"
        common = {"maxmemory-policy": "noeviction", "appendfsync": "no"}
        self._server = Valkey("ledger", {**common, **settings}, directory=folder, socket_path=path, lock_fd=lock_fd)

    def start(self) -> None:
        self._server.start()
        wait_until(self._server.answers)

    def kill(self) -> None:
        self._server.end(0)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        process = psutil.Process(self._server._child.pid)  # type: ignore[union-attr] # it is running
        process.suspend()
        try:
            yield
        finally:
            process.resume()


@contextmanager
def store_process(**settings: str) -> Iterator[StoreProcess]:
    """One that is not started yet, with `settings` besides those that all have."""
    with tempfile.TemporaryDirectory(prefix="ep-l-") as folder, (Path(folder) / "lock").open("wb") as lock:
        ledger = StoreProcess(Path(folder), lock.fileno(), settings)
        try:
            yield ledger
        finally:
            ledger.kill()


def _end(fleet: Fleet) -> None:
    """In good order: no lease is left, nothing is under way that an exit would wait for, nothing went wrong unseen."""
    wait_until(lambda: not fleet.leases(), within_s=LEASE_S + 1)
    for served in fleet.gateways:
        served.send(signal.SIGTERM)
    for served in fleet.gateways:
        assert served.exit_status(within_s=SOON_S) == 0
        wrong = [line for line in served.lines() if "exception" in line or "Task " in line["message"]]
        assert not wrong, wrong


def unread(url: str) -> bool:
    """Whether bytes wait on connections to `url` that its process has not read, or not even accepted."""
    port = f":{int(url.rpartition(':')[2]):04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(row[1].endswith(port) and row[3] == "01" and not row[4].endswith(":00000000") for row in rows)


def priced(estimated: int) -> Responder:
    return answers(b'{"data":{"estimated":%d,"balance":7},"error":{}}' % estimated)


def after(release: threading.Event, handler: Responder) -> Responder:
    """The handler's answer, as soon as `release` is set."""

    def held(exchange: Exchange) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.to_thread(release.wait, MAX_HELD_S)
            await handler(exchange)(scope, receive, send)

        return app

    return held


def kinds(responses: Sequence[httpx2.Response]) -> list[str]:
    """What their `Cache-Status` say, sorted."""
    return sorted(map(cache_status, responses))


def results(futures: Sequence[Future[httpx2.Response]]) -> list[httpx2.Response]:
    return [future.result(15) for future in futures]


def seconds_until(condition: Callable[[], object], *, within_s: float) -> float:
    started = time.monotonic()
    wait_until(condition, within_s=within_s)
    return time.monotonic() - started
