"""Prometheus metrics of the gateway, all declared here. Names, labels and meanings are a public interface.

* No label value comes from a request, except `model`, whose number the ledger limits.
* Per-request numbers are buffered in memory and written to the metrics files twenty times a second, and before each
  scrape: file writes are slow. A worker that is killed loses the buffered ones.
* Series whose labels are known start at 0 before their first event.
* Workers share their numbers through `proxy.telemetry.multiprocess`. Each gauge declares how they are merged.
* Values that are read from the stores are in `proxy.http.metrics_endpoint`.
"""

import asyncio
from bisect import bisect_left
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.metrics import MetricWrapperBase

from proxy import __version__
from proxy.problems import NO_NAME, SAVES_CALL, SAVES_TIME, Outcome
from proxy.telemetry.multiprocess import SharedValues, series_of

UPSTREAM_STATUSES = ("2xx", "4xx", "5xx", "timeout", "error")
AUDIT_RESULTS = ("same", "changed", "ignored-member")
INFERENCE_RESULTS = ("answered", "right", "wrong")
INFERENCE_AUDIT_RESULTS = ("same", "list-moved", "contradicted")

FLUSH_AFTER_S = 0.05
"""Limits how long numbers stay buffered."""

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
    """The metrics of one process, in its own registry.

    teams, accounts: the configured ones.
    shared: connects the workers' metrics; it must be installed. None: this process is the only one.
    """

    def __init__(
        self, teams: Collection[str] = (), accounts: Collection[str] = (), shared: SharedValues | None = None
    ) -> None:
        self.registry = CollectorRegistry()
        self._counter = partial(Counter, registry=self.registry)
        self._gauge = partial(Gauge, registry=self.registry)
        self._histogram = partial(BatchHistogram, registry=self.registry)
        self._shared = shared
        self._declare_requests()
        self._declare_upstream()
        self._declare_stores()
        self._declare_process()
        self._request_durations_s: dict[tuple[str, str, Outcome], list[float]] = {}
        """Buffered durations of requests, by team, operation and outcome."""
        self._durations_s = defaultdict[tuple[BatchHistogram, tuple[str, ...]], list[float]](list)
        """Buffered durations of store calls and upstream requests, by histogram and labels."""
        self._credits_micro: Counts[tuple[str, str]] = Counts()
        """Buffered micro-credits, by team and model."""
        self._time_saving_answers = Counts[str]()
        """Answers whose saved time is not counted yet, by team."""
        self._inferred: Counts[tuple[str, str]] = Counts()
        """Buffered inferences, by account and result."""
        self.in_flight: Callable[[], int] = lambda: 0
        """The number of requests in progress; `flush` calls it."""
        self.take_dropped_log_lines: Callable[[], int] = lambda: 0
        """The number of log lines dropped since the last call; `flush` calls it."""
        self._is_due = False
        self.descriptor_failures = 0
        """Failures for lack of a file descriptor, in this process since its start."""
        self.build_info.labels(__version__).set(1)
        self.config_last_reload_successful.set(1)
        self.preregister(teams, accounts)

    def _declare_requests(self) -> None:
        self.requests = self._counter(
            "estimate_proxy_requests",
            "Requests that were answered, or abandoned by their client.",
            ["team", "operation", "outcome"],
        )
        self.request_duration = self._histogram(
            "estimate_proxy_request_duration_seconds",
            "Time from the head of a request to the end of its response.",
            ["operation", "outcome"],
            buckets=_REQUEST_BUCKETS_S,
        )
        self.estimated_credits = self._counter(
            "estimate_proxy_estimated_credits",
            "Credits of the estimates in responses, stored ones included.",
            ["team", "model"],
        )
        self.unpriced = self._counter("estimate_proxy_unpriced", "Upstream answers without a usable price.", ["team"])
        self.quota_warned = self._counter(
            "estimate_proxy_quota_warned",
            "Responses that exceeded a quota which only warns.",
            ["team", "measure", "per"],
        )
        self.requests_in_flight = self._gauge(
            "estimate_proxy_requests_in_flight", "Requests in progress.", multiprocess_mode="livesum"
        )

    def _declare_upstream(self) -> None:
        self.upstream_duration = self._histogram(
            "estimate_proxy_upstream_request_duration_seconds",
            "Time from sending a request to upstream to the end of its response.",
            ["account", "status"],
            buckets=_UPSTREAM_BUCKETS_S,
        )
        self.circuit_open = self._gauge(
            "estimate_proxy_upstream_circuit_open",
            "1 if the circuit breaker of an account is open or half-open.",
            ["account"],
            multiprocess_mode="livemax",
        )
        self.upstream_calls_saved = self._counter(
            "estimate_proxy_upstream_calls_saved",
            "Answers to estimates that caused no request to upstream.",
            ["team"],
        )
        self.upstream_seconds_saved = self._counter(
            "estimate_proxy_upstream_seconds_saved",
            "Time that answers did not wait for upstream, by the mean of the day so far.",
            ["team"],
        )
        self.price_audits = self._counter(
            "estimate_proxy_price_audits",
            "Stored prices that were compared with upstream again, by result.",
            ["account", "result"],
        )
        self.inferences = self._counter(
            "estimate_proxy_inferences",
            "Prices that were inferred: answered, or only compared with upstream's answer, right or wrong.",
            ["account", "result"],
        )
        self.inference_audits = self._counter(
            "estimate_proxy_inference_audits",
            "Inferred answers that were compared with upstream, by result.",
            ["account", "result"],
        )
        self.suspect_answers = self._counter(
            "estimate_proxy_suspect_answers",
            "Inferred answers that may have been wrong, counted when a contradiction was found.",
            ["account"],
        )

    def _declare_stores(self) -> None:
        self.store_duration = self._histogram(
            "estimate_proxy_store_duration_seconds",
            "Time from calling a script of the store to its reply.",
            ["call"],
            buckets=_STORE_BUCKETS_S,
        )
        self.store_up = self._gauge(
            "estimate_proxy_store_up",
            "1 if the store served the last write, and replies.",
            ["role"],
            multiprocess_mode="livemin",
        )
        self.ledger_created = self._gauge(
            "estimate_proxy_ledger_created_timestamp_seconds",
            "Time at which the ledger of quotas and usage was created.",
            multiprocess_mode="mostrecent",
        )
        self.ledger_lost = self._counter(
            "estimate_proxy_ledger_lost", "Times that a worker found a new ledger in place of the one it had used."
        )
        self.unanswered_debits = self._counter(
            "estimate_proxy_unanswered_debits",
            "Debits whose reply was lost: the store may or may not have booked them.",
        )
        self.buffered_debits = self._gauge(
            "estimate_proxy_buffered_debits",
            "Requests that were admitted without the ledger and are not booked yet.",
            multiprocess_mode="livesum",
        )

    def _declare_process(self) -> None:
        self.config_last_reload_successful = self._gauge(
            "estimate_proxy_config_last_reload_successful",
            "1 if the last reload of the config file succeeded.",
            multiprocess_mode="livemin",
        )
        self.descriptors_exhausted = self._counter(
            "estimate_proxy_descriptors_exhausted",
            "Connections, and checks once a second, that failed because no file descriptor was left.",
        )
        self.build_info = self._gauge(
            "estimate_proxy_build_info", "Always 1; the version is a label.", ["version"], multiprocess_mode="livemax"
        )
        self.log_lines_dropped = self._counter(
            "estimate_proxy_log_lines_dropped",
            "Log lines that were dropped because standard error was too slow or closed.",
        )

    def collect(self) -> Iterator[Metric]:
        """The metrics of all workers together, as a prometheus_client collector."""
        if self._shared is not None:
            instruments = {
                family.name: instrument
                for instrument in vars(self).values()
                if isinstance(instrument, MetricWrapperBase)
                for family in instrument.describe()
            }
            for key in self._shared.read():
                # a bucket has one label more; another version may have other metrics
                with suppress(KeyError, ValueError):
                    family, labels = series_of(key)
                    instruments[family].labels(*labels)  # creates the series in this worker too
        yield from self.registry.collect()

    def preregister(self, teams: Collection[str], accounts: Collection[str]) -> None:
        """Creates the series whose labels are known, at 0, so that their first event is an increase."""
        for outcome in Outcome:
            self.request_duration.labels("estimate", outcome.value)
            for team in (NO_NAME, *teams):
                self.requests.labels(team, "estimate", outcome.value)
        for team in teams:
            self.unpriced.labels(team)
            self.upstream_calls_saved.labels(team)
            self.upstream_seconds_saved.labels(team)
        for account in accounts:
            self.circuit_open.labels(account)
            for status in UPSTREAM_STATUSES:
                self.upstream_duration.labels(account, status)
            for result in AUDIT_RESULTS:
                self.price_audits.labels(account, result)
            for result in INFERENCE_RESULTS:
                self.inferences.labels(account, result)
            for result in INFERENCE_AUDIT_RESULTS:
                self.inference_audits.labels(account, result)
            self.suspect_answers.labels(account)

    def record_request(self, team: str, operation: str, outcome: Outcome, duration_s: float) -> None:
        kind = (team, operation, outcome)
        durations_s = self._request_durations_s.get(kind)
        if durations_s is None:
            self._request_durations_s[kind] = [duration_s]
            self.flush_soon()
        else:
            durations_s.append(duration_s)

    def record_credits(self, team: str, model: str, credits_micro: int) -> None:
        """`model` is the name under which the ledger booked the credits, such as `other`."""
        self._credits_micro[team, model] += credits_micro
        self.flush_soon()

    def record_inference(self, account: str, result: str) -> None:
        """`result` is one of `INFERENCE_RESULTS`."""
        self._inferred[account, result] += 1
        self.flush_soon()

    def record_store_call(self, call: str, duration_s: float) -> None:
        self._durations_s[self.store_duration, (call,)].append(duration_s)
        self.flush_soon()

    def record_upstream_request(self, account: str, status: str, duration_s: float) -> None:
        """`status` is one of `UPSTREAM_STATUSES`."""
        self._durations_s[self.upstream_duration, (account, status)].append(duration_s)
        self.flush_soon()

    def take_time_saving_answers(self) -> dict[str, int]:
        """The answers since the last call that saved time, by team. For each one, `record_saved_time` is due."""
        answers, self._time_saving_answers = self._time_saving_answers, Counts()
        return answers

    def record_saved_time(self, answers: Mapping[str, int], mean_us: float) -> None:
        for team, count in answers.items():
            self.upstream_seconds_saved.labels(team).inc(count * mean_us / 1_000_000)

    def record_descriptors_exhausted(self) -> None:
        """Counts a failure for lack of a file descriptor."""
        self.descriptor_failures += 1
        self.descriptors_exhausted.inc()

    def flush_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(FLUSH_AFTER_S, self.flush)

    def flush(self) -> None:
        """Writes the buffered numbers."""
        self._is_due = False
        self.requests_in_flight.set(self.in_flight())
        self.log_lines_dropped.inc(self.take_dropped_log_lines())
        requests, self._request_durations_s = self._request_durations_s, {}
        for kind, durations_s in requests.items():
            self._count_requests(*kind, durations_s)
        for (histogram, labels), durations_s in self._durations_s.items():
            histogram.labels(*labels).observe_all(durations_s)
        self._durations_s.clear()
        for (team, model), credits_micro in self._credits_micro.items():
            self.estimated_credits.labels(team, model).inc(credits_micro / 1_000_000)
        self._credits_micro.clear()
        for (account, result), number in self._inferred.items():
            self.inferences.labels(account, result).inc(number)
        self._inferred.clear()

    def _count_requests(self, team: str, operation: str, outcome: Outcome, durations_s: Sequence[float]) -> None:
        self.requests.labels(team, operation, outcome.value).inc(len(durations_s))
        self.request_duration.labels(operation, outcome.value).observe_all(durations_s)
        if outcome is Outcome.UNPRICED:
            self.unpriced.labels(team).inc(len(durations_s))
        if operation == "estimate" and outcome in SAVES_CALL:
            self.upstream_calls_saved.labels(team).inc(len(durations_s))
            if outcome in SAVES_TIME:
                self._time_saving_answers[team] += len(durations_s)
