"""Every instrument, declared once. What they are called and labelled is an interface; so is what they count.

* No label comes from a request, but `model`, which the ledger bounds.
* What happens with every request is noted in memory and written twenty times a second, and for every scrape: files
  are slower. A worker that is killed takes that much along.
* Children are resolved once; those whose labels are known are there before their first event.
* Workers share their numbers through `proxy.telemetry.multiprocess`; each gauge says how several workers' become one.
* What the stores know is not counted here: see `proxy.http.metrics_endpoint`.
"""

import asyncio
from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.metrics import MetricWrapperBase

from proxy import __version__
from proxy.problems import NO_NAME, Outcome
from proxy.telemetry.multiprocess import SharedValues, series_of

UPSTREAM_STATUSES = ("2xx", "4xx", "5xx", "timeout", "error")
AUDIT_RESULTS = ("same", "changed", "ignored-member")

FLUSH_AFTER_S = 0.05

_REQUEST_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
_UPSTREAM_BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
_STORE_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5)


class BatchHistogram(Histogram):
    """A histogram that takes many observations at once, and writes each of its numbers once for all of them.

    Uses private attributes: `observe` would write two numbers for each observation. See test_private_apis.py.
    """

    def observe_all(self, durations_s: Sequence[float]) -> None:
        found = Counts(map(partial(bisect_left, self._upper_bounds), durations_s))
        self._sum.inc(sum(durations_s))
        for bucket, times in found.items():
            self._buckets[bucket].inc(times)


class Metrics:
    """The instruments of one process, in a registry of their own.

    teams, accounts: those that are configured.
    shared: where the instruments of several workers meet; it must be installed. None: this process is the only one.
    """

    def __init__(
        self, teams: Collection[str] = (), accounts: Collection[str] = (), shared: SharedValues | None = None
    ) -> None:
        self.registry = CollectorRegistry()
        self._shared = shared
        self._declare_requests()
        self._declare_upstream()
        self._declare_stores()
        self._declare_process()
        self._ended: dict[tuple[str, str, Outcome], list[float]] = {}
        """Durations of requests that are to be counted, in seconds."""
        self._called: dict[str, list[float]] = {}
        """Durations of calls of the store that are to be counted, in seconds."""
        self._asked: dict[tuple[str, str], list[float]] = {}
        """Durations of exchanges with upstream that are to be counted, in seconds."""
        self._spent_micro: dict[tuple[str, str], int] = {}
        """Credits that are to be counted."""
        self.in_flight: Callable[[], int] = lambda: 0
        """How many requests are being worked on; `flush` asks for it."""
        self.take_dropped_log_lines: Callable[[], int] = lambda: 0
        """How many log lines were dropped since it was last called; `flush` calls it."""
        self._is_due = False
        self.descriptor_failures = 0
        """Of this process, since its start."""
        self.build_info.labels(__version__).set(1)
        self.config_last_reload_successful.set(1)
        self.begin(teams, accounts)

    def _declare_requests(self) -> None:
        self.requests = Counter(
            "estimate_proxy_requests",
            "Requests that have been answered, or left by their client.",
            ["team", "operation", "outcome"],
            registry=self.registry,
        )
        self.request_duration = BatchHistogram(
            "estimate_proxy_request_duration_seconds",
            "From a request's head to the end of its answer.",
            ["operation", "outcome"],
            buckets=_REQUEST_BUCKETS_S,
            registry=self.registry,
        )
        self.estimated_credits = Counter(
            "estimate_proxy_estimated_credits",
            "Credits of the estimates that have been answered, each time they were.",
            ["team", "model"],
            registry=self.registry,
        )
        self.unpriced = Counter(
            "estimate_proxy_unpriced",
            "Answers of upstream's without a usable price.",
            ["team"],
            registry=self.registry,
        )
        self.quota_warned = Counter(
            "estimate_proxy_quota_warned",
            "Answers that have passed a quota which only warns.",
            ["team", "measure", "per"],
            registry=self.registry,
        )
        self.requests_in_flight = Gauge(
            "estimate_proxy_requests_in_flight",
            "Requests that are being worked on.",
            multiprocess_mode="livesum",
            registry=self.registry,
        )

    def _declare_upstream(self) -> None:
        self.upstream_duration = BatchHistogram(
            "estimate_proxy_upstream_request_duration_seconds",
            "From asking upstream to the last byte of its answer.",
            ["account", "status"],
            buckets=_UPSTREAM_BUCKETS_S,
            registry=self.registry,
        )
        self.circuit_open = Gauge(
            "estimate_proxy_upstream_circuit_open",
            "Whether upstream is left alone because it has been failing.",
            ["account"],
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.price_audits = Counter(
            "estimate_proxy_price_audits",
            "Stored prices that were asked for again, by what came of it.",
            ["account", "result"],
            registry=self.registry,
        )

    def _declare_stores(self) -> None:
        self.store_duration = BatchHistogram(
            "estimate_proxy_store_duration_seconds",
            "From calling a script of the store to its reply.",
            ["call"],
            buckets=_STORE_BUCKETS_S,
            registry=self.registry,
        )
        self.store_up = Gauge(
            "estimate_proxy_store_up",
            "Whether the store served the last write, and answers.",
            ["role"],
            multiprocess_mode="livemin",
            registry=self.registry,
        )
        self.ledger_created = Gauge(
            "estimate_proxy_ledger_created_timestamp_seconds",
            "When the ledger of quotas and usage began.",
            multiprocess_mode="mostrecent",
            registry=self.registry,
        )
        self.ledger_lost = Counter(
            "estimate_proxy_ledger_lost",
            "How often a worker found another ledger than the one it knew.",
            registry=self.registry,
        )
        self.unanswered_debits = Counter(
            "estimate_proxy_unanswered_debits",
            "Debits that the store may or may not have booked: its reply was lost.",
            registry=self.registry,
        )
        self.buffered_debits = Gauge(
            "estimate_proxy_buffered_debits",
            "Requests that were admitted without the ledger and are not booked yet.",
            multiprocess_mode="livesum",
            registry=self.registry,
        )

    def _declare_process(self) -> None:
        self.config_last_reload_successful = Gauge(
            "estimate_proxy_config_last_reload_successful",
            "Whether the settings in force are those of the config file as it was last read.",
            multiprocess_mode="livemin",
            registry=self.registry,
        )
        self.descriptors_exhausted = Counter(
            "estimate_proxy_descriptors_exhausted",
            "Connections that failed, and looks once a second that found the same, for want of a file descriptor.",
            registry=self.registry,
        )
        self.build_info = Gauge(
            "estimate_proxy_build_info",
            "1, labelled with the version.",
            ["version"],
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.log_lines_dropped = Counter(
            "estimate_proxy_log_lines_dropped",
            "Log lines that standard error did not take in time, or at all.",
            registry=self.registry,
        )

    def collect(self) -> Iterator[Metric]:
        """What all workers have counted together, as a collector of prometheus_client."""
        if self._shared is not None:
            instruments = {
                family.name: instrument
                for instrument in vars(self).values()
                if isinstance(instrument, MetricWrapperBase)
                for family in instrument.describe()
            }
            for key in self._shared.read():
                with suppress(KeyError, ValueError):  # a bucket has a label more; another version has other instruments
                    family, labels = series_of(key)
                    instruments[family].labels(*labels)  # from now on this worker has the series, too
        yield from self.registry.collect()

    def begin(self, teams: Collection[str], accounts: Collection[str]) -> None:
        """Series whose labels are known begin at 0, so that their first event is an increase."""
        for outcome in Outcome:
            self.request_duration.labels("estimate", outcome.value)
            for team in (NO_NAME, *teams):
                self.requests.labels(team, "estimate", outcome.value)
        for team in teams:
            self.unpriced.labels(team)
        for account in accounts:
            self.circuit_open.labels(account)
            for status in UPSTREAM_STATUSES:
                self.upstream_duration.labels(account, status)
            for result in AUDIT_RESULTS:
                self.price_audits.labels(account, result)

    def preregister_warning(self, team: str, measure: str, per: str) -> None:
        """`team` is `NO_NAME` for a quota of the organisation."""
        self.quota_warned.labels(team, measure, per)

    def record_warning(self, team: str, measure: str, per: str) -> None:
        """An answer has passed a quota that only warns."""
        self.quota_warned.labels(team, measure, per).inc()

    def record_request(self, team: str, operation: str, outcome: Outcome, duration_s: float) -> None:
        kind = (team, operation, outcome)
        durations_s = self._ended.get(kind)
        if durations_s is None:
            self._ended[kind] = [duration_s]
            self.flush_soon()
        else:
            durations_s.append(duration_s)

    def record_credits(self, team: str, model: str, credits_micro: int) -> None:
        """`model` is as the ledger has bounded it."""
        self._spent_micro[team, model] = self._spent_micro.get((team, model), 0) + credits_micro
        self.flush_soon()

    def record_store_call(self, call: str, duration_s: float) -> None:
        self._called.setdefault(call, []).append(duration_s)
        self.flush_soon()

    def record_upstream_request(self, account: str, status: str, duration_s: float) -> None:
        """`status` is one of `UPSTREAM_STATUSES`."""
        self._asked.setdefault((account, status), []).append(duration_s)
        self.flush_soon()

    def record_descriptors_exhausted(self) -> None:
        """Something has failed because this process had no file descriptor left."""
        self.descriptor_failures += 1
        self.descriptors_exhausted.inc()

    def flush_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(FLUSH_AFTER_S, self.flush)

    def flush(self) -> None:
        """Counts what has been noted."""
        self._is_due = False
        self.requests_in_flight.set(self.in_flight())
        self.log_lines_dropped.inc(self.take_dropped_log_lines())
        ended, self._ended = self._ended, {}
        for kind, durations_s in ended.items():
            self._count_requests(*kind, durations_s)
        called, self._called = self._called, {}
        for call, durations_s in called.items():
            self.store_duration.labels(call).observe_all(durations_s)
        asked, self._asked = self._asked, {}
        for (account, status), durations_s in asked.items():
            self.upstream_duration.labels(account, status).observe_all(durations_s)
        spent_micro, self._spent_micro = self._spent_micro, {}
        for (team, model), credits_micro in spent_micro.items():
            self.estimated_credits.labels(team, model).inc(credits_micro / 1_000_000)

    def _count_requests(self, team: str, operation: str, outcome: Outcome, durations_s: Sequence[float]) -> None:
        self.requests.labels(team, operation, outcome.value).inc(len(durations_s))
        self.request_duration.labels(operation, outcome.value).observe_all(durations_s)
        if outcome is Outcome.UNPRICED:
            self.unpriced.labels(team).inc(len(durations_s))
