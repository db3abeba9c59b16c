"""The expressions of the dashboards, in pieces that have a name each.

What holds for every one of them:

* A gauge from the ledger is equal on every replica: `ledger` takes the greatest one and never adds them up.
* A counter belongs to its process: rates and increases are added up.
* A rate is over `$__rate_interval`. An increase over the whole time range is asked once, at its end (an instant query,
  or a selection with `@ end()`), because only there does `$__range` cover what the reader has chosen.
* Charts draw a bounded number of lines: `leading` keeps the biggest ones, `others` adds up what is left.
* No expression relies on a recording rule.
"""

HERE = ('job=~"$job"', 'instance=~"$instance"')
TEAM = 'team=~"$team"'
TEAM_OR_ORG = 'team=~"$team|-"'  # quotas of the organisation bear the team `-`
ESTIMATE = 'operation="estimate"'

QUANTILES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
LEADING = 10  # more lines than this cannot be told apart


def select(metric: str, *matchers: str) -> str:
    """The series of a metric on the chosen jobs and instances."""
    return metric + "{" + ", ".join((*HERE, *matchers)) + "}"


def ledger(by: str, metric: str, *matchers: str) -> str:
    """A gauge that every replica reads from the same place."""
    return f"max by ({by}) ({select(metric, *matchers)})"


def rate(by: str, metric: str, *matchers: str) -> str:
    """Events a second."""
    return _summed(by, f"rate({select(metric, *matchers)}[$__rate_interval])")


def increase(by: str, metric: str, *matchers: str) -> str:
    """Events in the dashboard's time range: for instant queries."""
    return _summed(by, f"increase({select(metric, *matchers)}[$__range])")


def increase_at_end(by: str, metric: str, *matchers: str) -> str:
    """The same number at every step of a chart, to select its lines by."""
    return _summed(by, f"increase({select(metric, *matchers)}[$__range] @ end())")


def _summed(by: str, expression: str) -> str:
    return f"sum by ({by}) ({expression})" if by else f"sum({expression})"


def quantile(q: float, by: str, histogram: str, *matchers: str) -> str:
    """A quantile in seconds; no line where nothing happened, rather than one of NaN."""
    keys = f"le, {by}" if by else "le"
    happened = rate(by, f"{histogram}_count", *matchers)
    matching = f"on ({by})" if by else "on ()"
    return f"histogram_quantile({q}, {rate(keys, f'{histogram}_bucket', *matchers)}) and {matching} ({happened} > 0)"


def share(part: str, whole: str, by: str = "") -> str:
    """A part of a whole; nothing where the whole is nothing."""
    return f"{part} / ignoring ({by}) group_left () ({whole} > 0)" if by else f"{part} / ({whole} > 0)"


def leading(by: str, expression: str, size: str, limit: int = LEADING) -> str:
    """The lines of `expression` that have the greatest `size`."""
    return f"{expression} and on ({by}) topk({limit}, {size})"


def others(by: str, expression: str, size: str, limit: int = LEADING) -> str:
    """All lines that `leading` leaves out, as one: 0 where there are none."""
    return f"clamp_min(sum({expression}) - sum({leading(by, expression, size, limit)}), 0)"
