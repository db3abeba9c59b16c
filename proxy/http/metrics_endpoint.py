"""`GET /metrics`: the metrics of all workers, and gauges that are read from the stores.

* Windows, quotas and balances are read from the stores on a scrape, at most once per `SNAPSHOT_S`. So they are exact,
  the same on every gateway, and present for idle teams too.
* While a store is unavailable, its gauges are missing rather than stale.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from proxy.cache.price_book import PriceBook
from proxy.cache.prices import Balance
from proxy.gateway.live_config import ConfigHolder
from proxy.gateway.request import ClientRequest, Document, Trace
from proxy.problems import Code, Problem, StoreUnavailable
from proxy.quota.batches import LedgerBatcher
from proxy.quota.credits import MICRO
from proxy.quota.forecast import Forecasts
from proxy.quota.history import UsageHistory
from proxy.quota.ledger_reader import LedgerReader, WindowTotals
from proxy.quota.quota_report import quota_uses
from proxy.quota.quotas import QuotaState
from proxy.quota.windows import Period, Window
from proxy.telemetry.metrics import Metrics

SNAPSHOT_S = 3.0
"""How long a snapshot of the stores is reused: several scrapers cost no more than one."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Numbers read from the stores. `totals` is None, or the others empty, if their store was unavailable."""

    totals: WindowTotals | None
    quota_states: Sequence[QuotaState]
    forecasts: Forecasts
    balances: Mapping[str, Balance]
    taken_at: float


class MetricsEndpoint:
    """The handler of `GET /metrics`."""

    def __init__(
        self,
        live: ConfigHolder,
        metrics: Metrics,
        batcher: LedgerBatcher,
        ledger_reader: LedgerReader,
        history: UsageHistory,
        book: PriceBook,
    ) -> None:
        self._live = live
        self._metrics = metrics
        self._batcher = batcher
        self._ledger_reader = ledger_reader
        self._history = history
        self._book = book
        self._snapshot: Snapshot | None = None
        self._snapshot_lock = asyncio.Lock()

    async def metrics(self, request: ClientRequest, trace: Trace) -> Document | Problem:
        """All metrics, in the format that the scraper prefers."""
        denial = self._denial(request, trace)
        if denial is not None:
            return denial
        snapshot = await self._current_snapshot()
        encode, media_type = choose_encoder(_media_types(request.accept or ""))
        self._metrics.flush()
        registry = CollectorRegistry()
        registry.register(_AllMetrics(self._metrics, snapshot, self._live.config.token_ends, self._team_names()))
        return Document(await asyncio.to_thread(encode, registry), media_type)

    def _team_names(self) -> Mapping[str, str]:
        """Each configured team's name; its id if it has none."""
        config = self._live.config
        return {team: config.directory.name_of(team) or team for team in config.team_limits}

    def _denial(self, request: ClientRequest, trace: Trace) -> Problem | None:
        access = self._live.config.access
        if access.may_scrape(request.token):
            return None
        if access.is_viewer(request.token):
            return Problem(Code.FORBIDDEN, "This needs a metrics token or an admin token; you sent a viewer token.")
        credential = access.credential(request.token)
        if isinstance(credential, Problem):
            return Problem(
                Code.UNKNOWN_TOKEN,
                "This needs a metrics token or an admin token: send it as Authorization: Bearer <token>.",
            )
        trace.record_credential(credential)
        return Problem(Code.FORBIDDEN, "This needs a metrics token or an admin token; you sent a team's token.")

    async def _current_snapshot(self) -> Snapshot:
        async with self._snapshot_lock:
            now = monotonic()
            if self._snapshot is None or now - self._snapshot.taken_at >= SNAPSHOT_S:
                from_ledger, balances = await asyncio.gather(self._read_ledger(), self._read_balances())
                self._snapshot = Snapshot(*from_ledger, balances, taken_at=now)
            return self._snapshot

    async def _read_ledger(self) -> tuple[WindowTotals | None, Sequence[QuotaState], Forecasts]:
        config = self._live.config
        try:
            await self._batcher.open()  # so that an idle gateway notices a lost ledger, too
            totals, quota_states = await asyncio.gather(
                self._ledger_reader.window_totals(list(config.team_limits)),
                self._ledger_reader.quota_states(list(config.team_limits.values())),
            )
            return totals, quota_states, await self._history.forecasts(quota_states, config.directory)
        except StoreUnavailable:
            return None, (), {}

    async def _read_balances(self) -> Mapping[str, Balance]:
        try:
            return await self._book.accounts.balances(self._live.config.accounts)
        except StoreUnavailable:
            return {}


@dataclass(frozen=True, eq=False)
class _AllMetrics:
    """A collector for prometheus_client: the instruments, the gauges of a snapshot, and those of the configuration.

    token_ends: as in `RuntimeConfig`.
    team_names: the names of the configured teams, by id.
    """

    instruments: Collector
    snapshot: Snapshot
    token_ends: Mapping[tuple[str, str], float]
    team_names: Mapping[str, str]

    def collect(self) -> Iterator[Metric]:
        yield from self.instruments.collect()
        yield from _windows(self.snapshot)
        yield from _quotas(self.snapshot)
        yield from _balances(self.snapshot)
        yield _tokens(self.token_ends)
        yield _teams(self.team_names)


def _media_types(accept: str) -> str:
    """An `Accept` header without parameters: prometheus_client fails on a version that is not a number."""
    return ",".join(part.partition(";")[0].strip().lower() for part in accept.split(","))


def _windows(snapshot: Snapshot) -> Iterator[Metric]:
    """The current calendar windows: the usage booked in them, their starts and ends."""
    if snapshot.totals is None:
        return
    used_credits = _gauge("window_estimated_credits", "Credits estimated in the current window.", "team", "per")
    requests = _gauge("window_requests", "Requests counted in the current window.", "team", "per")
    for team, counts in snapshot.totals.teams.items():
        for per, count in counts.items():
            used_credits.add_metric([team, per], count.credits_micro / MICRO)
            requests.add_metric([team, per], count.requests)
    windows: dict[Period, Window] = dict(snapshot.totals.windows)
    for quota_state in snapshot.quota_states:
        windows |= quota_state.windows
    starts = _gauge("window_start_timestamp_seconds", "Start of the current window.", "per")
    ends = _gauge("window_end_timestamp_seconds", "End of the current window.", "per")
    for per, window in windows.items():
        starts.add_metric([per], window.start_s)
        ends.add_metric([per], window.end_s)
    yield from (used_credits, requests, starts, ends)


def _quotas(snapshot: Snapshot) -> Iterator[Metric]:
    labels = "scope", "team", "measure", "per"
    limits = _gauge("quota_limit", "Limit of a quota in its window.", *labels)
    used = _gauge("quota_used", "Used part of a quota in its current window.", *labels)
    ends = _gauge("quota_forecast_credits", "Forecast of a quota's use at the end of its window.", *labels)
    for use in quota_uses(snapshot.quota_states, snapshot.forecasts):
        quota = use.quota
        values = [quota.scope, use.team, quota.measure, quota.per]
        limits.add_metric(values, quota.limit / quota.unit)
        used.add_metric(values, use.used / quota.unit)
        if use.forecast is not None:
            ends.add_metric(values, use.forecast.at_end / quota.unit)
    yield from (limits, used, ends)


def _balances(snapshot: Snapshot) -> Iterator[Metric]:
    amounts = _gauge("balance_credits", "Newest balance in a response of upstream.", "account")
    ages = _gauge("balance_age_seconds", "Age of the newest balance.", "account")
    for account, balance in snapshot.balances.items():
        amounts.add_metric([account], float(balance.amount))
        ages.add_metric([account], balance.age_s + monotonic() - snapshot.taken_at)
    yield from (amounts, ages)


def _tokens(token_ends: Mapping[tuple[str, str], float]) -> Metric:
    ends = _gauge("token_expires_timestamp_seconds", "End of a token's last day; +Inf: never.", "team", "label")
    for (team, label), ends_at_s in token_ends.items():
        ends.add_metric([team, label], ends_at_s)
    return ends


def _teams(team_names: Mapping[str, str]) -> Metric:
    names = _gauge("team_info", "Always 1; the team's name, or its id if it has none, is a label.", "team", "name")
    for team, name in team_names.items():
        names.add_metric([team, name], 1)
    return names


def _gauge(name: str, meaning: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"estimate_proxy_{name}", meaning, labels=labels)
