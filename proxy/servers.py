"""Where calls go: one server, the primary that Sentinels name, or the servers of a cluster.

* redis-py's connections and pools are used; its Sentinel and cluster clients are not: they retry by themselves, and
  would run a script again whose reply was lost.
* The topology is asked for when it is found wrong, never per call: one inquiry at a time, of at most `LEARN_S`. It goes
  to all who may know at once, and the first answer counts.
"""

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Protocol

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import AbstractConnection, Connection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import ConnectionError as NotConnectedError
from redis.exceptions import RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from proxy.redirects import SLOTS, homes_of
from proxy.scripts import Node
from proxy.settings_urls import Address, StoreUrl, parse_store_url

MAX_CONNECTIONS = 16
"""To one server."""

LEARN_S = 0.2
"""Less than a call has: while nobody can tell, what was known is tried."""

CLOSE_S = 1.0
"""For a connection to close: TLS waits for the other side."""

SELDOM_S = 1.0

MAX_ASKED = 8

CONNECTION = "connection"


@dataclass(frozen=True, slots=True)
class Access:
    """What servers are told, and which of them are believed. What stands in a URL comes before it."""

    username: str | None = None
    password: str | None = None
    sentinel_password: str | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


NO_ACCESS = Access()


class Servers(Protocol):
    """Which server a key's calls go to. `close` must be called."""

    @property
    def learns(self) -> bool:
        """Whether there is anybody to ask for better."""

    def home(self, key: str) -> Node | None:
        """The server of a key, as far as is known. Must be quick: it is asked for every call."""

    def at(self, address: Address) -> Node:
        """The server there."""

    def move(self, key: str, address: Address) -> None:
        """A server has said where the key's home is now."""

    async def learn(self) -> None:
        """Looks again where the servers are. Raises `RedisError`, `OSError` or `TimeoutError` if nobody tells."""

    def primaries(self) -> list[Node]:
        """All servers that calls go to, as far as is known."""

    async def close(self) -> None: ...


def servers_of(url: str, access: Access = NO_ACCESS) -> Servers:
    """The servers that a URL names. Raises `OSError` if a file of `access` cannot be used."""
    place = parse_store_url(url)
    to_servers = _Connections(place, access)
    match place.kind:
        case "sentinel":
            return SentinelServers(place, to_servers, _Connections(place, access, to_sentinels=True))
        case "cluster":
            return ClusterServers(place, to_servers)
        case "server":
            return OneServer(_node(to_servers, place.addresses[0]))
        case "socket":
            return OneServer(Node(place.path, CONNECTION, place.path, to_servers.pool({"path": place.path})))


class OneServer:
    learns = False

    def __init__(self, node: Node) -> None:
        self._node = node

    def home(self, key: str) -> Node:  # noqa: ARG002 -- all keys have one home
        return self._node

    def at(self, address: Address) -> Node:  # noqa: ARG002 -- it is the only one
        return self._node

    def move(self, key: str, address: Address) -> None:
        """It is not a cluster: its word is passed on as an error."""

    async def learn(self) -> None:
        """There is nobody to ask."""

    def primaries(self) -> list[Node]:
        return [self._node]

    async def close(self) -> None:
        await _close(self._node.pool)


class SentinelServers:
    """The primary of one name. Who is one is asked of the Sentinels that the URL names, not of others they know."""

    learns = True

    def __init__(self, place: StoreUrl, to_servers: "_Connections", to_sentinels: "_Connections") -> None:
        self._place = place
        self._to_sentinels = to_sentinels
        self._nodes = _Nodes(to_servers, label=CONNECTION)
        self._primary: Node | None = None
        self._inquiry = _Inquiry(self._look)

    def home(self, key: str) -> Node | None:  # noqa: ARG002 -- all keys have one home
        return self._primary

    def at(self, address: Address) -> Node:
        return self._nodes.at(address)

    def move(self, key: str, address: Address) -> None:
        """Sentinels watch no cluster."""

    async def learn(self) -> None:
        await self._inquiry.answer()

    def primaries(self) -> list[Node]:
        return [] if self._primary is None else [self._primary]

    async def close(self) -> None:
        await self._inquiry.close()
        await self._nodes.close()

    async def _look(self) -> None:
        address = await _first(self._primary_by(sentinel) for sentinel in self._place.addresses)
        self._primary = self._nodes.at(address)
        await self._nodes.keep({address})

    async def _primary_by(self, sentinel: Address) -> Address:
        command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._place.primary)
        reply = await _ask(self._to_sentinels.connection(sentinel), command)
        if reply is None:
            raise NotConnectedError(f"the Sentinel {sentinel} watches no {self._place.primary}")
        return Address(reply[0].decode(), int(reply[1]))


class ClusterServers:
    """A cluster: a key's slot says whose it is."""

    learns = True

    def __init__(self, place: StoreUrl, to_servers: "_Connections") -> None:
        self._seeds = place.addresses
        self._connections = to_servers
        self._nodes = _Nodes(to_servers)
        self._homes: list[Address | None] = [None] * SLOTS
        self._inquiry = _Inquiry(self._look)

    def home(self, key: str) -> Node | None:
        address = self._homes[key_slot(key.encode())]
        return None if address is None else self._nodes.at(address)

    def at(self, address: Address) -> Node:
        return self._nodes.at(address)

    def move(self, key: str, address: Address) -> None:
        """Of this slot at once; it is seldom the only one, so the others are looked up behind the call."""
        self._homes[key_slot(key.encode())] = address
        self._inquiry.begin_seldom()

    async def learn(self) -> None:
        await self._inquiry.answer()

    def primaries(self) -> list[Node]:
        return [self._nodes.at(address) for address in sorted(self._known())]

    async def close(self) -> None:
        await self._inquiry.close()
        await self._nodes.close()

    def _known(self) -> set[Address]:
        return {address for address in self._homes if address is not None}

    async def _look(self) -> None:
        asked = list(dict.fromkeys((*sorted(self._known()), *self._seeds)))[:MAX_ASKED]
        self._homes = await _first(self._homes_by(address) for address in asked)
        await self._nodes.keep(self._known())

    async def _homes_by(self, address: Address) -> list[Address | None]:
        reply = await _ask(self._connections.connection(address), ("CLUSTER", "SLOTS"))
        homes = homes_of(reply, address.host)
        if not any(homes):
            raise NotConnectedError(f"{address} knows no cluster")
        return homes


@dataclass(slots=True, eq=False)
class _Nodes:
    """The servers that calls have gone to. Who is one no longer is let go as soon as nobody waits for it."""

    connections: "_Connections"
    label: str = ""
    _nodes: dict[Address, Node] = field(default_factory=dict)
    _left: list[BlockingConnectionPool] = field(default_factory=list)

    def at(self, address: Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = _node(self.connections, address, self.label or f"{CONNECTION} to {address}")
        return node

    async def keep(self, addresses: set[Address]) -> None:
        self._left += [self._nodes.pop(address).pool for address in self._nodes.keys() - addresses]
        for pool in self._left:
            with suppress(RedisError, OSError):
                await pool.disconnect(inuse_connections=False)
        self._left = [pool for pool in self._left if _in_use(pool)]

    async def close(self) -> None:
        for pool in (*self._left, *(node.pool for node in self._nodes.values())):
            await _close(pool)


class _Inquiry:
    """`look`, once at a time, for all who wait for it. Who stops waiting does not end it for the others."""

    def __init__(self, look: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._look = look
        self._running: asyncio.Task[Exception | None] | None = None
        self._began = -inf

    def begin(self) -> asyncio.Task[Exception | None]:
        if self._running is None or self._running.done():
            loop = asyncio.get_running_loop()
            self._began = loop.time()
            self._running = loop.create_task(self._run())
        return self._running

    def begin_seldom(self) -> None:
        """While slots move one after the other, each is told of by itself."""
        if asyncio.get_running_loop().time() - self._began > SELDOM_S:
            self.begin()

    async def answer(self) -> None:
        task = self.begin()
        await asyncio.wait({task})
        if (error := task.result()) is not None:
            raise error from None

    async def close(self) -> None:
        if self._running is not None:
            await asyncio.wait({self._running})

    async def _run(self) -> Exception | None:
        try:
            async with asyncio.timeout(LEARN_S):
                await self._look()
        except (RedisError, OSError, TimeoutError) as error:
            return error
        return None


class _TlsConnection(Connection):
    """With a context that is made once: to read the system's certificates takes longer than a call may."""

    def __init__(self, *, tls: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self._tls = tls

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "ssl": self._tls}


class _Connections:
    """Connections of one kind, and pools of them."""

    def __init__(self, place: StoreUrl, access: Access, *, to_sentinels: bool = False) -> None:
        self._class = _class_of(place)
        self._options: dict[str, Any] = {
            "socket_timeout": None,  # a call's time is counted by the store, once
            "socket_connect_timeout": CLOSE_S,  # for closing, that is: it is longer than any call has
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "legacy_responses": False,
        }
        if place.tls:
            self._options["tls"] = _tls_context(access)
        if to_sentinels:
            self._options["password"] = access.sentinel_password
        else:
            self._options["username"] = place.username or access.username
            self._options["password"] = place.password or access.password
            self._options["db"] = place.database

    def connection(self, address: Address) -> AbstractConnection:
        made: AbstractConnection = self._class(host=address.host, port=address.port, **self._options)
        return made

    def pool(self, where: Mapping[str, Any]) -> BlockingConnectionPool:
        return BlockingConnectionPool(
            connection_class=self._class,
            max_connections=MAX_CONNECTIONS,
            timeout=None,
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
            **where,
            **self._options,
        )


def _class_of(place: StoreUrl) -> type[Any]:
    if place.kind == "socket":
        return UnixDomainSocketConnection
    return _TlsConnection if place.tls else Connection


def _tls_context(access: Access) -> ssl.SSLContext:
    """Believes the system's certificates, or those of `ca_file` alone. Raises `OSError`."""
    context = ssl.create_default_context(cafile=access.ca_file)
    if access.cert_file is not None:
        context.load_cert_chain(
            access.cert_file, access.key_file, password=lambda: ""
        )  # else OpenSSL asks the terminal for one
    return context


def _node(connections: _Connections, address: Address, label: str = CONNECTION) -> Node:
    return Node(str(address), label, address.host, connections.pool(address._asdict()))


async def _ask(connection: AbstractConnection, command: tuple[str, ...]) -> Any:
    """The reply to a command, on a connection that is there for it alone."""
    try:
        await connection.connect()  # type: ignore[no-untyped-call]  # redis-py's
        await connection.send_command(*command)
        return await connection.read_response()
    finally:
        await connection.disconnect(nowait=True)


async def _first(inquiries: Iterable[Coroutine[Any, Any, Any]]) -> Any:
    """The first answer. Raises the last failure if there is none."""
    tasks = [asyncio.ensure_future(inquiry) for inquiry in inquiries]
    failure: Exception = ResponseError("there is nobody to ask")
    try:
        for answer in asyncio.as_completed(tasks):
            try:
                return await answer
            except (RedisError, OSError) as error:
                failure = error
        raise failure
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _in_use(pool: BlockingConnectionPool) -> bool:
    (_, _), (used, _) = pool.get_connection_count()
    return used > 0


async def _close(pool: BlockingConnectionPool) -> None:
    with suppress(RedisError, OSError):
        await pool.aclose()
