"""The topology of a store: one server, the primary that Sentinels name, or the servers of a cluster.

* redis-py's Sentinel and cluster clients are not used. Its cluster client sends ASKING on another connection than the
  call, closes connections with calls in flight, and ignores READONLY. Its Sentinel client queries one Sentinel after
  the other.
* The topology is refreshed when it turns out to be wrong, never per call. One refresh runs at a time, as a task that
  all waiting calls share. It queries all servers that may know at the same time, and takes the first answer.
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
from proxy.store.redirects import SLOTS, slot_owners
from proxy.store.scripts import Node, query
from proxy.urls import Address, StoreUrl, parse_store_url

MIN_REFRESH_INTERVAL_S = 1.0
"""Limits refreshes after MOVED: while slots move one after the other, each causes a redirect."""

MAX_QUERIED = 8
"""Limits the servers that one refresh queries, each over a new connection."""

CONNECTION = "connection"
"""Label of the only server, and of calls whose server is not known."""


class Topology(Protocol):
    """Finds the server of a key. `close` must be called."""

    @property
    def can_refresh(self) -> bool:
        """Whether there are servers to query for the topology."""

    def node_of(self, key: str) -> Node | None:
        """The server of a key; None if it is not known. Must be quick: it is called for every call."""

    def node_at(self, address: Address) -> Node:
        """The server at an address."""

    def record_move(self, key: str, address: Address) -> None:
        """Notes the new owner of the key's slot, which a server has named in a redirect."""

    async def refresh(self, within_s: float) -> None:
        """Queries the topology. Raises `RedisError`, `OSError` or `TimeoutError` if there is no answer."""

    def primaries(self) -> list[Node]:
        """All known servers that calls go to."""

    async def close(self) -> None: ...


def topology_of(url: str, access: StoreAccess = NO_ACCESS) -> Topology:
    """The topology that a URL describes. Raises `OSError` if a file of `access` cannot be used."""
    parsed = parse_store_url(url)
    match parsed.kind:
        case "sentinel":
            return SentinelTopology(parsed, access)
        case "cluster":
            return ClusterTopology(parsed, access)
        case "server":
            return SingleServer(_node(ConnectionFactory(parsed, access), parsed.addresses[0]))
        case "socket":
            pool = ConnectionFactory(parsed, access).pool(parsed.path)
            return SingleServer(Node(parsed.path, CONNECTION, parsed.path, pool))


class SingleServer:
    can_refresh = False

    def __init__(self, node: Node) -> None:
        self._node = node

    def node_of(self, key: str) -> Node:  # noqa: ARG002 -- it has all keys
        return self._node

    def node_at(self, address: Address) -> Node:  # noqa: ARG002 -- it is the only one
        return self._node

    def record_move(self, key: str, address: Address) -> None:
        """Does nothing: the URL does not describe a cluster, so a redirect is an error."""

    async def refresh(self, within_s: float) -> None:
        """Does nothing: each new connection resolves the host name again."""

    def primaries(self) -> list[Node]:
        return [self._node]

    async def close(self) -> None:
        await self._node.pool.close()


class SentinelTopology:
    """The primary of one name. Only the Sentinels of the URL are queried, not others that these know."""

    can_refresh = True

    def __init__(self, url: StoreUrl, access: StoreAccess) -> None:
        self._url = url
        self._to_sentinels = ConnectionFactory(url, access, to_sentinels=True)
        self._nodes = _NodeSet(ConnectionFactory(url, access), label=CONNECTION)
        self._primary: Node | None = None
        self._refresh = _Refresh(self._query, limit_s=access.connect_timeout_s + access.timeout_s)

    def node_of(self, key: str) -> Node | None:  # noqa: ARG002 -- the primary has all keys
        return self._primary

    def node_at(self, address: Address) -> Node:
        return self._nodes.at(address)

    def record_move(self, key: str, address: Address) -> None:
        """Does nothing: Sentinels do not watch clusters."""

    async def refresh(self, within_s: float) -> None:
        await self._refresh.wait(within_s)

    def primaries(self) -> list[Node]:
        return [] if self._primary is None else [self._primary]

    async def close(self) -> None:
        await self._refresh.close()
        await self._nodes.close()

    async def _query(self) -> None:
        address = await _first(self._primary_by(sentinel) for sentinel in self._url.addresses)
        self._primary = self._nodes.at(address)
        await self._nodes.retain({address})

    async def _primary_by(self, sentinel: Address) -> Address:
        reply = await _query_once(
            self._to_sentinels, sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._url.primary
        )
        if reply is None:
            raise NotConnectedError(f"the Sentinel {sentinel} does not watch {self._url.primary}")
        return Address(reply[0].decode(), int(reply[1]))


class ClusterTopology:
    """A cluster: the slot of a key determines its server."""

    can_refresh = True

    def __init__(self, url: StoreUrl, access: StoreAccess) -> None:
        self._seeds = url.addresses
        self._connections = ConnectionFactory(url, access)
        self._nodes = _NodeSet(self._connections)
        self._owners: list[Address | None] = [None] * SLOTS
        self._refresh = _Refresh(self._query, limit_s=access.connect_timeout_s + access.timeout_s)

    def node_of(self, key: str) -> Node | None:
        address = self._owners[key_slot(key.encode())]
        return None if address is None else self._nodes.at(address)

    def node_at(self, address: Address) -> Node:
        return self._nodes.at(address)

    def record_move(self, key: str, address: Address) -> None:
        """Updates this slot at once, and starts a refresh in the background: other slots have probably moved too."""
        self._owners[key_slot(key.encode())] = address
        self._refresh.start_if_due()

    async def refresh(self, within_s: float) -> None:
        await self._refresh.wait(within_s)

    def primaries(self) -> list[Node]:
        return [self._nodes.at(address) for address in sorted(self._addresses())]

    async def close(self) -> None:
        await self._refresh.close()
        await self._nodes.close()

    def _addresses(self) -> set[Address]:
        return {address for address in self._owners if address is not None}

    async def _query(self) -> None:
        queried = list(dict.fromkeys((*sorted(self._addresses()), *self._seeds)))[:MAX_QUERIED]
        self._owners = await _first(self._owners_by(address) for address in queried)
        await self._nodes.retain(self._addresses())

    async def _owners_by(self, address: Address) -> list[Address | None]:
        reply = await _query_once(self._connections, address, "CLUSTER", "SLOTS")
        owners = slot_owners(reply, address.host)
        if not any(owners):
            raise NotConnectedError(f"{address} knows no server of the cluster")
        return owners


@dataclass(slots=True, eq=False)
class _NodeSet:
    """The servers that calls have gone to, by address."""

    connections: "ConnectionFactory"
    label: str = ""
    _nodes: dict[Address, Node] = field(default_factory=dict)
    _retired: list[ConnectionPool] = field(default_factory=list)
    """Pools of servers that have left the topology, and whose connections were still in use."""

    def at(self, address: Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = _node(self.connections, address, self.label or f"{CONNECTION} to {address}")
        return node

    async def retain(self, addresses: set[Address]) -> None:
        """Drops all other servers. Connections in use are closed after a later refresh."""
        self._retired += [self._nodes.pop(address).pool for address in self._nodes.keys() - addresses]
        for pool in self._retired:
            await pool.close_idle()
        self._retired = [pool for pool in self._retired if pool.is_in_use]

    async def close(self) -> None:
        pools = (*self._retired, *(node.pool for node in self._nodes.values()))
        await asyncio.gather(*(pool.close() for pool in pools))


class _Refresh:
    """Single-flight `query`: one at a time, shared by all that wait. A caller that times out does not cancel it.

    limit_s: limits one query; a new connection has to fit into it.
    """

    def __init__(self, query: Callable[[], Coroutine[Any, Any, None]], *, limit_s: float) -> None:
        self._query = query
        self._limit_s = limit_s
        self._task: asyncio.Task[Exception | None] | None = None
        self._started_at = -inf

    def start(self) -> asyncio.Task[Exception | None]:
        """The running refresh, or a new one."""
        if self._task is None or self._task.done():
            loop = asyncio.get_running_loop()
            self._started_at = loop.time()
            self._task = loop.create_task(self._run())
        return self._task

    def start_if_due(self) -> None:
        """Starts a refresh, unless one was started within `MIN_REFRESH_INTERVAL_S`."""
        if asyncio.get_running_loop().time() - self._started_at > MIN_REFRESH_INTERVAL_S:
            self.start()

    async def wait(self, within_s: float) -> None:
        task = self.start()
        await asyncio.wait({task}, timeout=within_s)
        if not task.done():
            raise TimeoutError("no server described the topology in time")
        if (error := task.result()) is not None:
            raise error from None

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> Exception | None:
        try:
            async with asyncio.timeout(self._limit_s):
                await self._query()
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            return error
        return None


class ConnectionFactory:
    """Makes redis-py connections with the certificates and credentials of one role."""

    def __init__(self, url: StoreUrl, access: StoreAccess, *, to_sentinels: bool = False) -> None:
        self._tls = _tls_context(access) if url.tls else None
        self._connect_timeout_s = access.connect_timeout_s
        self._options: dict[str, Any] = {
            "db": 0 if to_sentinels else url.database,
            "username": None if to_sentinels else url.username or access.username,
            "password": access.sentinel_password if to_sentinels else url.password or access.password,
            "protocol": 2,
            "socket_timeout": None,  # calls have their own timeout; this one would make a task for each send
            "socket_connect_timeout": access.connect_timeout_s,
            "health_check_interval": HEALTH_CHECK_S,
            "driver_info": DriverInfo("estimate-proxy", lib_version=None),
        }

    def pool(self, where: Address | str) -> ConnectionPool:
        """A pool for the server at an address, or at the path of a socket."""
        return ConnectionPool(partial(self.make, where), connect_timeout_s=self._connect_timeout_s)

    def make(self, where: Address | str) -> AbstractConnection:
        """A connection that is not open yet, to the server at an address, or at the path of a socket."""
        if not isinstance(where, Address):
            return UnixDomainSocketConnection(path=where, **self._options)
        if self._tls is None:
            return Connection(host=where.host, port=where.port, **self._options)
        connection = SSLConnection(host=where.host, port=where.port, **self._options)
        connection.ssl_context.context = (
            self._tls
        )  # redis-py's own would trust the system's certificates besides a CA file
        return connection


def _tls_context(access: StoreAccess) -> ssl.SSLContext:
    """Trusts the system's certificates, or only those of `ca_file`. Raises `OSError`."""
    context = ssl.create_default_context(cafile=access.ca_file)
    if access.cert_file is not None:
        context.load_cert_chain(
            access.cert_file, access.key_file, password=lambda: ""
        )  # without it OpenSSL would prompt on the terminal
    return context


def _node(connections: ConnectionFactory, address: Address, label: str = CONNECTION) -> Node:
    return Node(str(address), label, address.host, connections.pool(address))


async def _query_once(connections: ConnectionFactory, address: Address, *command: str) -> Any:
    """The reply to a command, over a new connection that is closed afterwards."""
    connection = connections.make(address)
    try:
        await connection.connect_check_health(check_health=False, retry_socket_connect=False)
        return await query(connection, *command)
    finally:
        await connection.disconnect(nowait=True)


async def _first(queries: Iterable[Coroutine[Any, Any, Any]]) -> Any:
    """The first answer; cancels the other queries. Raises the last failure if all fail."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in queries]
    failure: Exception = ResponseError("there is no server to query")
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
