"""The building blocks of the dashboards' PromQL expressions.

Rules for all of them:

* A gauge from the ledger is equal on every replica: `ledger` takes the maximum and never the sum.
* A counter belongs to its process: rates and increases are summed.
* A rate is over `$__rate_interval`. An increase over the whole time range is queried once, at its end (an instant
  query, or a selection with `@ end()`), because only there does `$__range` cover the selected range.
* A line or row of a team shows the team's name, which `named` adds as the label `name`.
* Charts draw a bounded number of lines: `leading` keeps the largest ones, `others` adds up the rest.
* No expression relies on a recording rule.
"""

REQUESTS = "estimate_proxy_requests_total"

HERE = ('job=~"$job"', 'instance=~"$instance"')
TEAM = 'team=~"$team"'
TEAM_OR_ORG = 'team=~"$team|-"'  # quotas of the organisation have the team `-`
ESTIMATE = 'operation="estimate"'
PRICED = 'outcome=~"hit|inferred|stale|miss|collapsed|bypass"'

QUANTILES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
LEADING = 10  # more lines than this cannot be told apart


def select(metric: str, *matchers: str) -> str:
    """The series of a metric on the selected jobs and instances."""
    return metric + "{" + ", ".join((*HERE, *matchers)) + "}"


def ledger(by: str, metric: str, *matchers: str) -> str:
    """A gauge from the ledger, which is equal on every replica."""
    return f"max by ({by}) ({select(metric, *matchers)})"


def rate(by: str, metric: str, *matchers: str) -> str:
    """Events a second."""
    return _summed(by, f"rate({select(metric, *matchers)}[$__rate_interval])")


def increase(by: str, metric: str, *matchers: str) -> str:
    """Events in the dashboard's time range: for instant queries."""
    return _summed(by, f"increase({select(metric, *matchers)}[$__range])")


def increase_at_end(by: str, metric: str, *matchers: str) -> str:
    """The same number at every step of a chart, to select lines by."""
    return _summed(by, f"increase({select(metric, *matchers)}[$__range] @ end())")


def _summed(by: str, expression: str) -> str:
    return f"sum by ({by}) ({expression})" if by else f"sum({expression})"


def quantile(q: float, by: str, histogram: str, *matchers: str) -> str:
    """A quantile in seconds; no line, instead of NaN, where nothing happened."""
    keys = f"le, {by}" if by else "le"
    happened = rate(by, f"{histogram}_count", *matchers)
    matching = f"on ({by})" if by else "on ()"
    return f"histogram_quantile({q}, {rate(keys, f'{histogram}_bucket', *matchers)}) and {matching} ({happened} > 0)"


def share(part: str, whole: str, by: str = "") -> str:
    """A part of a whole; no value where the whole is 0."""
    return f"{part} / ignoring ({by}) group_left () ({whole} > 0)" if by else f"{part} / ({whole} > 0)"


def leading(by: str, expression: str, size: str, limit: int = LEADING) -> str:
    """The lines of `expression` with the largest `size`."""
    return f"{expression} and on ({by}) topk({limit}, {size})"


def others(by: str, expression: str, size: str, limit: int = LEADING) -> str:
    """The sum of all lines that `leading` leaves out: 0 if there are none."""
    return f"clamp_min(sum({expression}) - sum({leading(by, expression, size, limit)}), 0)"


def named(by: str, expression: str) -> str:
    """An expression by team with the label `name`: the team's name, or its id if it has none.

    by: all labels of the expression. A team that is in no config any more, and the organisation's `-`, have no
    `team_info`. While gateways have different names for a team, one is chosen; the newest is for the whole time range.
    """
    info = f"max by (team, name) ({select('estimate_proxy_team_info')} @ end())"
    known = f"({expression}) * on (team) group_left (name) topk by (team) (1, {info})"
    return f'{known} or on ({by}) label_join({expression}, "name", "", "team")'
