"""The topology of a store: one server, the primary that Sentinels name, or the servers of a cluster.

* redis-py's Sentinel and cluster clients are not used. Its cluster client sends ASKING on another connection than the
  call, closes connections with calls in flight, and ignores READONLY. Its Sentinel client queries one Sentinel after
  the other.
* The topology is refreshed when it turns out to be wrong, never per call. One refresh runs at a time, as a task that
  all waiting calls share. It queries all servers that may know at the same time, and takes the first answer.
"""

import asyncio
import ssl
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable
from functools import partial
from math import inf
from typing import Any, Protocol

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.crc import key_slot
from redis.driver_info import DriverInfo
from redis.exceptions import ConnectionError as NotConnectedError
from redis.exceptions import RedisError, ResponseError

from proxy.store.access import StoreAccess
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


def topology_of(url: str, access: StoreAccess) -> Topology:
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


class _QueriedTopology(ABC):
    """A topology that servers describe. Keeps one `Node` for each address that calls have gone to.

    Refreshes are single-flight: one at a time, shared by all that wait. A caller that times out does not cancel it.
    """

    can_refresh = True

    def __init__(self, access: StoreAccess, connections: "ConnectionFactory", *, label: str = "") -> None:
        """label: of all servers; if empty, each has its own."""
        self._connections = connections
        self._label = label
        self._nodes: dict[Address, Node] = {}
        self._retired: list[ConnectionPool] = []
        """Pools of servers that have left the topology, and whose connections were still in use."""
        self._limit_s = access.connect_timeout_s + access.timeout_s
        """Limits one refresh; a new connection has to fit into it."""
        self._refreshing: asyncio.Task[Exception | None] | None = None
        self._refreshed_at = -inf
        """When the last refresh started."""

    @abstractmethod
    async def _query(self) -> set[Address]:
        """Queries the topology, and returns its primaries. Raises `RedisError`, `OSError`."""

    def node_at(self, address: Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            label = self._label or f"{CONNECTION} to {address}"
            node = self._nodes[address] = _node(self._connections, address, label)
        return node

    async def refresh(self, within_s: float) -> None:
        task = self._start_refresh()
        await asyncio.wait({task}, timeout=within_s)
        if not task.done():
            raise TimeoutError("no server described the topology in time")
        if (error := task.result()) is not None:
            raise error from None

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait({self._refreshing})
        pools = (*self._retired, *(node.pool for node in self._nodes.values()))
        await asyncio.gather(*(pool.close() for pool in pools))

    def _start_refresh(self) -> asyncio.Task[Exception | None]:
        """The running refresh, or a new one."""
        if self._refreshing is None or self._refreshing.done():
            loop = asyncio.get_running_loop()
            self._refreshed_at = loop.time()
            self._refreshing = loop.create_task(self._run_refresh())
        return self._refreshing

    async def _run_refresh(self) -> Exception | None:
        try:
            async with asyncio.timeout(self._limit_s):
                await self._retain(await self._query())
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            return error
        return None

    async def _retain(self, addresses: set[Address]) -> None:
        """Drops all other servers. Connections in use are closed after a later refresh."""
        self._retired += [self._nodes.pop(address).pool for address in self._nodes.keys() - addresses]
        for pool in self._retired:
            await pool.close_idle()
        self._retired = [pool for pool in self._retired if pool.is_in_use]


class SentinelTopology(_QueriedTopology):
    """The primary of one name. Only the Sentinels of the URL are queried, not others that these know."""

    def __init__(self, url: StoreUrl, access: StoreAccess) -> None:
        super().__init__(access, ConnectionFactory(url, access), label=CONNECTION)
        self._url = url
        self._to_sentinels = ConnectionFactory(url, access, to_sentinels=True)
        self._primary: Node | None = None

    def node_of(self, key: str) -> Node | None:  # noqa: ARG002 -- the primary has all keys
        return self._primary

    def record_move(self, key: str, address: Address) -> None:
        """Does nothing: Sentinels do not watch clusters."""

    def primaries(self) -> list[Node]:
        return [] if self._primary is None else [self._primary]

    async def _query(self) -> set[Address]:
        address = await _first(self._primary_by(sentinel) for sentinel in self._url.addresses)
        self._primary = self.node_at(address)
        return {address}

    async def _primary_by(self, sentinel: Address) -> Address:
        command = "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._url.primary
        reply = await _query_once(self._to_sentinels, sentinel, *command)
        if reply is None:
            raise NotConnectedError(f"the Sentinel {sentinel} does not watch {self._url.primary}")
        return Address(reply[0].decode(), int(reply[1]))


class ClusterTopology(_QueriedTopology):
    """A cluster: the slot of a key determines its server."""

    def __init__(self, url: StoreUrl, access: StoreAccess) -> None:
        super().__init__(access, ConnectionFactory(url, access))
        self._seeds = url.addresses
        self._owners: list[Address | None] = [None] * SLOTS

    def node_of(self, key: str) -> Node | None:
        address = self._owners[key_slot(key.encode())]
        return None if address is None else self.node_at(address)

    def record_move(self, key: str, address: Address) -> None:
        """Updates this slot at once, and starts a refresh in the background: other slots have probably moved too."""
        self._owners[key_slot(key.encode())] = address
        if asyncio.get_running_loop().time() - self._refreshed_at > MIN_REFRESH_INTERVAL_S:
            self._start_refresh()

    def primaries(self) -> list[Node]:
        return [self.node_at(address) for address in sorted(self._addresses())]

    def _addresses(self) -> set[Address]:
        return {address for address in self._owners if address is not None}

    async def _query(self) -> set[Address]:
        queried = list(dict.fromkeys((*sorted(self._addresses()), *self._seeds)))[:MAX_QUERIED]
        self._owners = await _first(self._owners_by(address) for address in queried)
        return self._addresses()

    async def _owners_by(self, address: Address) -> list[Address | None]:
        reply = await _query_once(self._connections, address, "CLUSTER", "SLOTS")
        owners = slot_owners(reply, address.host)
        if not any(owners):
            raise NotConnectedError(f"{address} knows no server of the cluster")
        return owners


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
        # redis-py's own context would trust the system's certificates besides a CA file.
        connection.ssl_context.context = self._tls
        return connection


def _tls_context(access: StoreAccess) -> ssl.SSLContext:
    """Trusts the system's certificates, or only those of `ca_file`. Raises `OSError`."""
    context = ssl.create_default_context(cafile=access.ca_file)
    if access.cert_file is not None:
        # Without a password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(access.cert_file, access.key_file, password=lambda: "")
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
