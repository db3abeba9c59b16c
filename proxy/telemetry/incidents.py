"""Decides which failures to log: an incident is a few log lines, not one per request.

* The beginning and the end of an incident are logged. In between, each further reason is logged once, even if reasons
  alternate.
* An incident that reopens within `quiet_s` is logged only if the failures go on after `quiet_s` is over. Otherwise an
  upstream that fails one request in five would cause two lines for every five requests.

Times are seconds on one monotonic clock, passed in.
"""

MAX_REASONS = 8
"""Limits the reasons that are logged for one incident: a text with a number in it could differ each time."""


class IncidentLog:
    """The open incidents of one component, by part.

    quiet_s: time after the end of an incident in which a new one of the same part is not opened.
    """

    def __init__(self, *, quiet_s: float = 0.0) -> None:
        self._quiet_s = quiet_s
        self._reasons: dict[str, set[str]] = {}
        self._quiet_until: dict[str, float] = {}

    def __bool__(self) -> bool:
        """Whether an incident is open."""
        return bool(self._reasons)

    def opened(self, part: str, reason: str, now: float) -> bool:
        """Records a failure of `part`. Returns whether to log it."""
        if part not in self._reasons and now < self._quiet_until.get(part, now):
            return False
        reasons = self._reasons.setdefault(part, set())
        if reason in reasons or len(reasons) == MAX_REASONS:
            return False
        reasons.add(reason)
        return True

    def closed(self, part: str, now: float) -> bool:
        """Records that `part` works. Returns whether to log its recovery."""
        if self._reasons.pop(part, None) is None:
            return False
        self._quiet_until[part] = now + self._quiet_s
        return True
