"""The metrics that a gateway serves, as its code declares them: dashboards and rules can name no others."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics import MetricWrapperBase

from proxy.http.metrics_endpoint import Snapshot, _AllMetrics
from proxy.quota.ledger_reader import WindowTotals
from proxy.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Family:
    """A metric of the contract, by the name that it is scraped under; a histogram has three series of that name.

    from_ledger: a gauge that is the same number at every gateway.
    """

    name: str
    kind: str
    labels: frozenset[str]
    from_ledger: bool = False

    def series(self) -> dict[str, set[str]]:
        """The names of its series with their labels."""
        if self.kind != "histogram":
            return {self.name: set(self.labels)}
        buckets = {f"{self.name}_bucket": {"le", *self.labels}}
        return buckets | {f"{self.name}_{part}": set(self.labels) for part in ("count", "sum")}


@cache
def families() -> dict[str, Family]:
    """By name: what workers count, and what a scrape reads from the stores and the configuration."""
    return {family.name: family for family in (*_counted(), *_read())}


@cache
def metric_labels() -> dict[str, set[str]]:
    """The labels of every series that a gateway shows, but for those that Prometheus adds."""
    return {name: labels for family in families().values() for name, labels in family.series().items()}


def _counted() -> Iterator[Family]:
    for instrument in vars(Metrics()).values():
        if isinstance(instrument, MetricWrapperBase):
            kind = str(instrument._type)
            name = instrument._name + "_total" * (kind == "counter")
            is_one_for_all = isinstance(instrument, Gauge) and instrument._multiprocess_mode == "mostrecent"
            yield Family(name, kind, frozenset(instrument._labelnames), is_one_for_all)


def _read() -> Iterator[Family]:
    nothing = Snapshot(WindowTotals({}, {}), (), {}, {}, 0.0)
    for family in _AllMetrics(CollectorRegistry(), nothing, {}, {}).collect():
        assert isinstance(family, GaugeMetricFamily)
        yield Family(family.name, family.type, frozenset(family._labelnames), from_ledger=True)
