"""What works at the servers of one role, and what does not: for readiness, the gauge `store_up`, log and cool-downs.

A *part* fails and recovers by itself: the connection to a server; writing to it, which a server can refuse as a whole;
and one script, such as by an ACL. A role is up while no part is down.

* Only a script that is refused whenever the server refuses writes shows that writing works again.
* A call that failed after having waited, for an answer or for the next primary, makes a cool-down: calls to that server
  fail at once for `COOLDOWN_S`. A server that hangs costs one wait then, not one a request.
"""

import logging
from collections.abc import Sequence

from redis.exceptions import MovedError, NoPermissionError, ResponseError

from proxy.problems import StoreOutcomeUnknown, StoreUnavailable
from proxy.store.redirects import NotServing, ReplyKind, explained, kind_of, may_have_run, refuses_writes
from proxy.store.scripts import UNSAID, Call, Unsaid
from proxy.store.topology import CONNECTION, Servers
from proxy.telemetry.descriptors import ran_out
from proxy.telemetry.incidents import IncidentLog
from proxy.telemetry.metrics import Metrics

COOLDOWN_S = 0.5

Cooldowns = dict[str, float]
"""Until when a server is not called, by its label, on the event loop's clock; `CONNECTION` is the label
of the only server there is, and of calls whose server is not known."""

log = logging.getLogger(__name__)


class StoreHealth:
    """Of the calls to `servers`. `cooldowns` may be shared by roles that are on the same ones."""

    def __init__(self, role: str, metrics: Metrics | None, servers: Servers, *, cooldowns: Cooldowns) -> None:
        self._role = role
        self._metrics = metrics
        self._servers = servers
        self._cooldowns = cooldowns
        self._incidents = IncidentLog()
        self._down: dict[str, Call] = {}
        """By part, the call that failed last."""
        self._shown_up: bool | None = None
        self._show()

    @property
    def is_up(self) -> bool:
        return not self._down

    def down_before(self, moment: float) -> list[tuple[str, Call]]:
        """The parts that are down, and for which no call has begun since, each with its call."""
        return [(part, call) for part, call in self._down.items() if call.began < moment]

    def is_cooling_down(self, label: str, now: float) -> bool:
        return now < self._cooldowns.get(label, now)

    def skipped(self, call: Call, label: str) -> None:
        """A call was not sent because of a cool-down. Mostly the reason is known; else it is the other role's."""
        if not self._down:
            self._failed(label, call, "it failed in its other role", call.began)
            self._show()

    def ended(self, calls: Sequence[Call], now: float) -> None:
        """Calls have come to their end, each with a word or without one."""
        if not self._down and not self._incidents and not any(isinstance(c.word, Exception | Unsaid) for c in calls):
            return
        by_label: dict[str, list[Call]] = {}
        for call in calls:
            by_label.setdefault(label_of(call), []).append(call)
        for label, group in by_label.items():
            self._server_ended(label, group, now)
        self._show()

    def checked(self, part: str, check: Call, now: float) -> None:
        """A write check has ended that has the same keys as the call for which `part` is down."""
        if _failed_part(check) is None:
            self._server_ended(label_of(check), [check], now)
            if part in self._down and isinstance(self._down[part].word, NoPermissionError):
                self._recovered(part, now)
            self._show()

    def _server_ended(self, label: str, calls: Sequence[Call], now: float) -> None:
        failed: dict[str, Call] = {}
        for call in calls:
            if (part := _failed_part(call)) is None:
                self._recovered(call.script.name, now)
                if call.script.tells_of_writes:
                    self._recovered(_writing(label), now)
            else:
                failed.setdefault(part, call)
        if label not in failed:
            self._reached(label, now)
        for part, call in failed.items():
            self._part_failed(part, call, now)

    def _part_failed(self, part: str, call: Call, now: float) -> None:
        label = label_of(call)
        if part == label and _has_answered_since(call):
            return
        if self._metrics is not None and _lacks_descriptor(call):
            self._metrics.record_descriptors_exhausted()
        if part == label or (self._servers.learns and kind_of_call(call) == NotServing()):
            self._cooldowns[label] = now + COOLDOWN_S
        self._failed(part, call, reason_of(call), now)

    def _failed(self, part: str, call: Call, reason: str, now: float) -> None:
        if part != call.script.name or call.script.writes:
            self._down[part] = call
        if self._incidents.begins(part, reason, now):
            log.error("the %s's %s fails: %s", self._role, part, reason)

    def _reached(self, label: str, now: float) -> None:
        """A server has answered. Nothing is said any more of servers that calls do not go to by now."""
        if not self._down:
            return
        for part in {label, CONNECTION} & self._down.keys():
            self._cooldowns.pop(part, None)
            self._recovered(part, now)
        ours = {CONNECTION, *(node.label for node in self._servers.primaries())}
        for part in [part for part, call in self._down.items() if label_of(call) not in ours]:
            self._recovered(part, now, "is not needed any more")

    def _recovered(self, part: str, now: float, how: str = "works again") -> None:
        self._down.pop(part, None)
        if self._incidents and self._incidents.ends(part, now):
            log.info("the %s's %s %s", self._role, part, how)

    def _show(self) -> None:
        if self._metrics is not None and self.is_up != self._shown_up:
            self._shown_up = self.is_up
            self._metrics.store_up.labels(self._role).set(self.is_up)


def label_of(call: Call) -> str:
    return call.node.label if call.node else CONNECTION


def kind_of_call(call: Call) -> ReplyKind:
    return kind_of(call.word, sent=call.sent, host=call.node.host if call.node else "")


def failure_of(call: Call) -> StoreUnavailable | None:
    """Why a call was not served; `StoreOutcomeUnknown` if a server may have run it."""
    if not isinstance(call.word, Exception | Unsaid):
        return None
    kind = StoreOutcomeUnknown if may_have_run(call.word, sent=call.sent) else StoreUnavailable
    return kind(reason_of(call))


def reason_of(call: Call) -> str:
    if isinstance(call.word, MovedError):
        return "the keys are on another server of a cluster, which is found if the URL begins with redis+cluster"
    if _lacks_descriptor(call):
        return "this gateway has no file descriptor left for a connection"
    return "no answer in time" if call.word is UNSAID else explained(call.word) or "no answer in time"


def _lacks_descriptor(call: Call) -> bool:
    return isinstance(call.word, Exception) and ran_out(call.word)


def _failed_part(call: Call) -> str | None:
    """What a call's word, or that there is none, speaks against; None if the call was served."""
    if not isinstance(call.word, Exception | Unsaid):
        return None
    if isinstance(call.word, ResponseError):
        if refuses_writes(call.word):
            return _writing(label_of(call))
        if kind_of_call(call) != NotServing():
            return call.script.name
    return label_of(call)


def _writing(label: str) -> str:
    return "writing" + label.removeprefix(CONNECTION)


def _has_answered_since(call: Call) -> bool:
    """Whether the call's server is well: it has answered a later call, so it was the connection that led nowhere; or
    it has answered others while the call, which was never sent, waited for a connection.
    """
    if call.node is None:
        return False
    return call.node.answered > call.began or (not call.sent and call.node.answered_at > call.began)
