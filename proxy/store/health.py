"""Health of one role's servers: for readiness, the gauge `store_up`, the log and cool-downs.

A *part* fails and recovers on its own. Parts are the connection to a server; writes to a server; and one script, for
example if an ACL forbids it. A role is up while no part is down.

* Only a script with `proves_writes` shows that writes work again.
* A call that failed after a wait, for a reply or for the next primary, starts a cool-down: calls to that server fail at
  once for `COOLDOWN_S`. So a server that hangs costs one wait per cool-down, not one per request.
"""

import logging
from collections.abc import Sequence

from redis.exceptions import MovedError, NoPermissionError, ResponseError

from proxy.problems import StoreOutcomeUnknown, StoreUnavailable
from proxy.store.redirects import describe, is_not_serving, may_have_run, refuses_writes
from proxy.store.scripts import Call
from proxy.store.topology import CONNECTION, Topology
from proxy.telemetry.descriptors import ran_out
from proxy.telemetry.incidents import IncidentLog
from proxy.telemetry.metrics import Metrics

COOLDOWN_S = 0.5
"""How long calls to a server fail at once after one failed: two call timeouts, and short for a server that recovers."""

Cooldowns = dict[str, float]
"""The end of each server's cool-down by the server's label, on the event loop's clock."""

log = logging.getLogger(__name__)


class StoreHealth:
    """Health of the servers in `topology`, as the results of calls show it.

    cooldowns: may be shared with another role on the same servers.
    """

    def __init__(self, role: str, metrics: Metrics | None, topology: Topology, *, cooldowns: Cooldowns) -> None:
        self._role = role
        self._metrics = metrics
        self._topology = topology
        self._cooldowns = cooldowns
        self._incidents = IncidentLog()
        self._down: dict[str, Call] = {}
        """The call that failed last, by part."""
        self._shown_up: bool | None = None
        self._update_gauge()

    @property
    def is_up(self) -> bool:
        return not self._down

    def down_before(self, moment: float) -> list[tuple[str, Call]]:
        """The parts that are down and whose last failed call started before `moment`, each with that call."""
        return [(part, call) for part, call in self._down.items() if call.started_at < moment]

    def is_cooling_down(self, label: str, now: float) -> bool:
        return now < self._cooldowns.get(label, now)

    def record_skipped(self, call: Call, label: str) -> None:
        """Records a call that was not sent because of a cool-down, which the other role may have started."""
        if not self._down:
            other_role = "price-book" if self._role == "ledger" else "ledger"
            reason = f"a call of the {other_role} to the same server failed: the log line of the {other_role} says why"
            self._failed(label, call, reason, call.started_at)
            self._update_gauge()

    def record_ended(self, calls: Sequence[Call], now: float) -> None:
        """Records calls whose results are final."""
        has_failures = any(isinstance(call.result, Exception) for call in calls)
        if not has_failures and not self._down and not self._incidents:
            return
        by_label: dict[str, list[Call]] = {}
        for call in calls:
            by_label.setdefault(label_of(call), []).append(call)
        for label, group in by_label.items():
            self._server_ended(label, group, now)
        self._update_gauge()

    def record_write_check(self, part: str, check: Call, now: float) -> None:
        """Records a write check, with the keys of the call for which `part` is down."""
        if _failed_part(check) is None:
            self._server_ended(label_of(check), [check], now)
            if part in self._down and isinstance(self._down[part].result, NoPermissionError):
                self._recovered(part, now)
            self._update_gauge()

    def _server_ended(self, label: str, calls: Sequence[Call], now: float) -> None:
        failed: dict[str, Call] = {}
        for call in calls:
            if (part := _failed_part(call)) is None:
                self._recovered(call.script.name, now)
                if call.script.proves_writes:
                    self._recovered(_writing(label), now)
            else:
                failed.setdefault(part, call)
        if label not in failed:
            self._reached(label, now)
        for part, call in failed.items():
            self._part_failed(part, call, now)

    def _part_failed(self, part: str, call: Call, now: float) -> None:
        label = label_of(call)
        if part == label and _has_replied_since(call):
            return
        if self._metrics is not None and _lacks_descriptor(call):
            self._metrics.record_descriptors_exhausted()
        if part == label or (self._topology.can_refresh and is_not_serving(call.result)):
            self._cooldowns[label] = now + COOLDOWN_S
        self._failed(part, call, reason_of(call), now)

    def _failed(self, part: str, call: Call, reason: str, now: float) -> None:
        if part != call.script.name or call.script.writes:
            self._down[part] = call
        if self._incidents.opened(part, reason, now):
            log.error("the %s's %s fails: %s", self._role, part, reason)

    def _reached(self, label: str, now: float) -> None:
        """Records that a server has replied. Parts of servers that have left the topology count as recovered."""
        if not self._down:
            return
        for part in {label, CONNECTION} & self._down.keys():
            self._cooldowns.pop(part, None)
            self._recovered(part, now)
        labels = {CONNECTION, *(node.label for node in self._topology.primaries())}
        for part in [part for part, call in self._down.items() if label_of(call) not in labels]:
            self._recovered(part, now, "is no longer needed")

    def _recovered(self, part: str, now: float, how: str = "works again") -> None:
        self._down.pop(part, None)
        if self._incidents and self._incidents.closed(part, now):
            log.info("the %s's %s %s", self._role, part, how)

    def _update_gauge(self) -> None:
        if self._metrics is not None and self.is_up != self._shown_up:
            self._shown_up = self.is_up
            self._metrics.store_up.labels(self._role).set(self.is_up)


def label_of(call: Call) -> str:
    return call.node.label if call.node else CONNECTION


def failure_of(call: Call) -> StoreUnavailable | None:
    """The error for a call that failed: `StoreOutcomeUnknown` if a server may have run it. None if it succeeded."""
    if not isinstance(call.result, Exception):
        return None
    kind = StoreOutcomeUnknown if may_have_run(call.result, sent=call.sent) else StoreUnavailable
    return kind(reason_of(call))


def reason_of(call: Call) -> str:
    if isinstance(call.result, MovedError):
        return (
            "the keys are on another server of a cluster: write the URL with redis+cluster to reach all of its servers"
        )
    if _lacks_descriptor(call):
        return "this gateway has no file descriptor left for a connection"
    return describe(call.result) or "no answer in time"


def _lacks_descriptor(call: Call) -> bool:
    return isinstance(call.result, Exception) and ran_out(call.result)


def _failed_part(call: Call) -> str | None:
    """The part that a failed call shows to be down; None if the call succeeded."""
    if not isinstance(call.result, Exception):
        return None
    if isinstance(call.result, ResponseError):
        if refuses_writes(call.result):
            return _writing(label_of(call))
        if not is_not_serving(call.result):
            return call.script.name
    return label_of(call)


def _writing(label: str) -> str:
    return "writing" + label.removeprefix(CONNECTION)


def _has_replied_since(call: Call) -> bool:
    """Whether the server of a failed call is well nevertheless.

    It has replied to a later call, so only the connection was dead; or it has replied to other calls while this one,
    which was never sent, waited for a connection.
    """
    if call.node is None:
        return False
    is_connection_dead = call.node.served_call_started_at > call.started_at
    return is_connection_dead or (not call.sent and call.node.replied_at > call.started_at)
