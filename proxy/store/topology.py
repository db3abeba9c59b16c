"""Where calls go: one server, the primary that Sentinels name, or the servers of a cluster.

* redis-py's Sentinel and cluster clients are not used. Its cluster client sends ASKING on another connection than the
  call, closes connections under calls in flight, and learns nothing from READONLY; Sentinels are asked one by one.
* The topology is asked for when it is found wrong, never per call: one inquiry at a time, beside the calls that wait
  for it. It goes to all who may know at once, and the first answer counts.
"""

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any, Protocol

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.crc import key_slot
from redis.driver_info import DriverInfo
from redis.exceptions import ConnectionError as NotConnectedError
from redis.exceptions import RedisError, ResponseError

from proxy.store.access import NO_ACCESS, StoreAccess
from proxy.store.connection_pool import HEALTH_CHECK_S, ConnectionPool
from proxy.store.redirects import SLOTS, homes_of
from proxy.store.scripts import Node, ask
from proxy.urls import Address, StoreUrl, parse_store_url

SELDOM_S = 1.0

MAX_ASKED = 8

CONNECTION = "connection"


class Servers(Protocol):
    """Which server a key's calls go to. `close` must be called."""

    @property
    def learns(self) -> bool:
        """Whether there is anybody to ask where the servers are."""

    def home(self, key: str) -> Node | None:
        """The server of a key, as far as is known. Must be quick: it is asked for every call."""

    def at(self, address: Address) -> Node:
        """The server there."""

    def move(self, key: str, address: Address) -> None:
        """A server has said where the key's home is now."""

    async def learn(self, within_s: float) -> None:
        """Looks again where the servers are. Raises `RedisError`, `OSError` or `TimeoutError` if nobody tells."""

    def primaries(self) -> list[Node]:
        """All servers that calls go to, as far as is known."""

    async def close(self) -> None: ...


def servers_of(url: str, access: StoreAccess = NO_ACCESS) -> Servers:
    """The servers that a URL names. Raises `OSError` if a file of `access` cannot be used."""
    place = parse_store_url(url)
    match place.kind:
        case "sentinel":
            return SentinelServers(place, access)
        case "cluster":
            return ClusterServers(place, access)
        case "server":
            return OneServer(_node(ConnectionFactory(place, access), place.addresses[0]))
        case "socket":
            pool = ConnectionFactory(place, access).pool(place.path)
            return OneServer(Node(place.path, CONNECTION, place.path, pool))


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

    async def learn(self, within_s: float) -> None:
        """There is nobody to ask: a new connection resolves the name again."""

    def primaries(self) -> list[Node]:
        return [self._node]

    async def close(self) -> None:
        await self._node.pool.close()


class SentinelServers:
    """The primary of one name. Who is one is asked of the Sentinels that the URL names, not of others they know."""

    learns = True

    def __init__(self, place: StoreUrl, access: StoreAccess) -> None:
        to_servers = ConnectionFactory(place, access)
        self._place = place
        self._to_sentinels = ConnectionFactory(place, access, to_sentinels=True)
        self._nodes = _Nodes(to_servers, label=CONNECTION)
        self._primary: Node | None = None
        self._inquiry = _Inquiry(self._look, limit_s=access.connect_timeout_s + access.timeout_s)

    def home(self, key: str) -> Node | None:  # noqa: ARG002 -- all keys have one home
        return self._primary

    def at(self, address: Address) -> Node:
        return self._nodes.at(address)

    def move(self, key: str, address: Address) -> None:
        """Sentinels watch no cluster."""

    async def learn(self, within_s: float) -> None:
        await self._inquiry.answer(within_s)

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
        reply = await _ask(self._to_sentinels, sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._place.primary)
        if reply is None:
            raise NotConnectedError(f"the Sentinel {sentinel} watches no {self._place.primary}")
        return Address(reply[0].decode(), int(reply[1]))


class ClusterServers:
    """A cluster: a key's slot says whose it is."""

    learns = True

    def __init__(self, place: StoreUrl, access: StoreAccess) -> None:
        to_servers = ConnectionFactory(place, access)
        self._seeds = place.addresses
        self._connections = to_servers
        self._nodes = _Nodes(to_servers)
        self._homes: list[Address | None] = [None] * SLOTS
        self._inquiry = _Inquiry(self._look, limit_s=access.connect_timeout_s + access.timeout_s)

    def home(self, key: str) -> Node | None:
        address = self._homes[key_slot(key.encode())]
        return None if address is None else self._nodes.at(address)

    def at(self, address: Address) -> Node:
        return self._nodes.at(address)

    def move(self, key: str, address: Address) -> None:
        """Of this slot at once; it is seldom the only one, so the others are looked up behind the call."""
        self._homes[key_slot(key.encode())] = address
        self._inquiry.begin_seldom()

    async def learn(self, within_s: float) -> None:
        await self._inquiry.answer(within_s)

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
        reply = await _ask(self._connections, address, "CLUSTER", "SLOTS")
        homes = homes_of(reply, address.host)
        if not any(homes):
            raise NotConnectedError(f"{address} knows no cluster")
        return homes


@dataclass(slots=True, eq=False)
class _Nodes:
    """The servers that calls have gone to. Who is one no longer is let go as soon as nobody waits for it."""

    connections: "ConnectionFactory"
    label: str = ""
    _nodes: dict[Address, Node] = field(default_factory=dict)
    _left: list[ConnectionPool] = field(default_factory=list)

    def at(self, address: Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = _node(self.connections, address, self.label or f"{CONNECTION} to {address}")
        return node

    async def keep(self, addresses: set[Address]) -> None:
        self._left += [self._nodes.pop(address).pool for address in self._nodes.keys() - addresses]
        for pool in self._left:
            await pool.close_idle()
        self._left = [pool for pool in self._left if pool.is_in_use]

    async def close(self) -> None:
        pools = (*self._left, *(node.pool for node in self._nodes.values()))
        await asyncio.gather(*(pool.close() for pool in pools))


class _Inquiry:
    """`look`, once at a time, for all who wait for it. A caller that stops waiting does not end it.

    limit_s: a new connection has to fit into it.
    """

    def __init__(self, look: Callable[[], Coroutine[Any, Any, None]], *, limit_s: float) -> None:
        self._look = look
        self._limit_s = limit_s
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

    async def answer(self, within_s: float) -> None:
        task = self.begin()
        await asyncio.wait({task}, timeout=within_s)
        if not task.done():
            raise TimeoutError("nobody has said in time where the servers are")
        if (error := task.result()) is not None:
            raise error from None

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})

    async def _run(self) -> Exception | None:
        try:
            async with asyncio.timeout(self._limit_s):
                await self._look()
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            return error
        return None


class ConnectionFactory:
    """Makes connections of one kind: redis-py's, with our certificates and credentials."""

    def __init__(self, place: StoreUrl, access: StoreAccess, *, to_sentinels: bool = False) -> None:
        self._tls = _tls_context(access) if place.tls else None
        self._connect_timeout_s = access.connect_timeout_s
        self._options: dict[str, Any] = {
            "db": 0 if to_sentinels else place.database,
            "username": None if to_sentinels else place.username or access.username,
            "password": access.sentinel_password if to_sentinels else place.password or access.password,
            "protocol": 2,
            "socket_timeout": None,  # calls have a limit of their own; one here would make a task of each send
            "socket_connect_timeout": access.connect_timeout_s,
            "health_check_interval": HEALTH_CHECK_S,
            "driver_info": DriverInfo("estimate-proxy", lib_version=None),
        }

    def pool(self, where: Address | str) -> ConnectionPool:
        """To the server there, or at the path of a socket."""
        return ConnectionPool(partial(self.make, where), connect_timeout_s=self._connect_timeout_s)

    def make(self, where: Address | str) -> AbstractConnection:
        """A connection that is not open yet."""
        if not isinstance(where, Address):
            return UnixDomainSocketConnection(path=where, **self._options)
        if self._tls is None:
            return Connection(host=where.host, port=where.port, **self._options)
        connection = SSLConnection(host=where.host, port=where.port, **self._options)
        connection.ssl_context.context = self._tls  # redis-py's own trusts the system beside a CA file
        return connection


def _tls_context(access: StoreAccess) -> ssl.SSLContext:
    """Trusts the system's certificates, or those of `ca_file` alone. Raises `OSError`."""
    context = ssl.create_default_context(cafile=access.ca_file)
    if access.cert_file is not None:
        context.load_cert_chain(
            access.cert_file, access.key_file, password=lambda: ""
        )  # else OpenSSL asks the terminal for one
    return context


def _node(connections: ConnectionFactory, address: Address, label: str = CONNECTION) -> Node:
    return Node(str(address), label, address.host, connections.pool(address))


async def _ask(connections: ConnectionFactory, address: Address, *command: str) -> Any:
    """The reply to a command, on a connection that is there for it alone."""
    connection = connections.make(address)
    try:
        await connection.connect_check_health(check_health=False, retry_socket_connect=False)
        return await ask(connection, *command)
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
