"""The servers of a run. Each is started when a case first needs it, and all end with the run."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from bench.gateways import GatewayVariant, gateway
from bench.load import Kind, Loads
from bench.machine import Cores
from bench.sites import Site, Store, Upstream, Workspace, bare, nginx_pass, peer, store, upstream
from bench.traffic import TEAMS

_Opened = TypeVar("_Opened")

FULL = GatewayVariant("full", TEAMS)
WITHOUT_QUOTAS = GatewayVariant("without-quotas", TEAMS, quotas=False)
LOGGED = GatewayVariant("logged", TEAMS, logged=True)


class Servers:
    def __init__(self, workspace: Workspace, kind: Kind, opened: ExitStack) -> None:
        self.workspace = workspace
        self.loads = Loads(kind, workspace.folder, workspace.cores.load)
        self._opened = opened
        self._gateways: dict[GatewayVariant, Site] = {}

    def gateway(self, variant: GatewayVariant) -> Site:
        if variant not in self._gateways:
            self._gateways[variant] = self._enter(
                gateway(self.workspace, variant, *self._stores, self.upstream.site.url)
            )
        return self._gateways[variant]

    @contextmanager
    def another_gateway(self, variant: GatewayVariant) -> Iterator[Site]:
        """Starts a gateway that ends before the others."""
        with gateway(self.workspace, variant, *self._stores, self.upstream.site.url) as opened:
            yield opened

    @cached_property
    def full(self) -> Site:
        """Returns the gateway with all features on."""
        return self.gateway(FULL)

    @cached_property
    def without_quotas(self) -> Site:
        return self.gateway(WITHOUT_QUOTAS)

    @cached_property
    def logged(self) -> Site:
        """Like `full`, with a log line per request in a file."""
        return self.gateway(LOGGED)

    @cached_property
    def starlette(self) -> Site:
        return self._enter(bare(self.workspace, "starlette"))

    @cached_property
    def asgi(self) -> Site:
        return self._enter(bare(self.workspace, "asgi"))

    @cached_property
    def forward(self) -> Site:
        return self._enter(bare(self.workspace, "httpx2", self.upstream.site.url))

    @cached_property
    def aiohttp(self) -> Site:
        return self._enter(bare(self.workspace, "aiohttp", self.upstream.site.url))

    @cached_property
    def nginx(self) -> Site:
        return self._enter(nginx_pass(self.workspace, self.upstream.site.url))

    @cached_property
    def peer(self) -> Site:
        return self._enter(peer(self.workspace, self._enter(store(self.workspace, "peer-store"))))

    @cached_property
    def upstream(self) -> Upstream:
        return self._enter(upstream(self.workspace))

    @cached_property
    def _stores(self) -> tuple[Store, Store]:
        """Returns the stores for ledgers and for price books."""
        return self._enter(store(self.workspace, "ledger")), self._enter(store(self.workspace, "price-book"))

    def _enter(self, opening: AbstractContextManager[_Opened]) -> _Opened:
        return self._opened.enter_context(opening)


@contextmanager
def start_servers(cores: Cores, kind: Kind) -> Iterator[Servers]:
    with tempfile.TemporaryDirectory(prefix="ep-bench-") as folder, ExitStack() as opened:
        yield Servers(Workspace(Path(folder), cores), kind, opened)
