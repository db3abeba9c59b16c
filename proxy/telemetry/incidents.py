"""What is out of order, and what of it is to be said: a trouble is a few lines in the log, not one a request. Pure.

* It is said when it begins and when it is over. In between each other reason is said once, though they take turns.
* What is over may be back at once, and go again: so soon it is said only if it stays. Otherwise an upstream that fails
  one time in five would be two lines for every five requests.

Times are seconds on one monotonic clock, passed in.
"""

MAX_REASONS = 8


class IncidentLog:
    """Of the parts of something. `quiet_s`: for so long after its end a trouble does not begin anew."""

    def __init__(self, *, quiet_s: float = 0.0) -> None:
        self._quiet_s = quiet_s
        self._reasons: dict[str, set[str]] = {}
        self._quiet_until: dict[str, float] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._reasons)

    def begins(self, part: str, reason: str, now: float) -> bool:
        """Whether it is to be said that `part` fails for that reason."""
        if part not in self._reasons and now < self._quiet_until.get(part, now):
            return False
        reasons = self._reasons.setdefault(part, set())
        if reason in reasons or len(reasons) == MAX_REASONS:
            return False
        reasons.add(reason)
        return True

    def ends(self, part: str, now: float) -> bool:
        """Whether it is to be said that `part` works again."""
        if self._reasons.pop(part, None) is None:
            return False
        self._quiet_until[part] = now + self._quiet_s
        return True
