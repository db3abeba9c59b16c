"""The dashboard *Estimated spend*: what teams estimated, in calendar windows, and how close they are to their quotas.

Amounts come from the ledger's gauges, which are exact. Only what the gauges do not have (credits by model, events in
the time range) comes from counters, and the panel says so.
"""

from grafana_foundation_sdk.models import dashboard

import quotas
from board import GATEWAY, SPEND, Row, link_to, made, only_this_team
from panels import (
    AMOUNT,
    AREAS,
    ORANGE,
    PER_MINUTE,
    RED,
    REST,
    SECONDS,
    SHARE,
    SHORT,
    YELLOW,
    About,
    Line,
    Look,
    chart,
    number,
    pie,
)
from promql import (
    ESTIMATE,
    LEADING,
    REQUESTS,
    TEAM,
    TEAM_OR_ORG,
    increase,
    increase_at_end,
    leading,
    ledger,
    named,
    others,
    rate,
    select,
    share,
)
from tables import NAME_COLUMN, Column, grid

CREDITS = "estimate_proxy_estimated_credits_total"
BALANCE = "estimate_proxy_balance_credits"
BALANCE_AGE = "estimate_proxy_balance_age_seconds"

REASONS = (
    "quota-exceeded",
    "over-ceiling",
    "rate-limited",
    "team-disabled",
    "unauthenticated",
    "invalid",
    "not-cached",
    "overloaded",
    "store-unavailable",
)
REFUSED = 'outcome=~"' + "|".join(REASONS) + '"'


def board() -> dashboard.Dashboard:
    """The dashboard for finance and for those who set quotas."""
    return made(
        uid=SPEND,
        title="Estimated spend",
        reads="What teams estimated, by team and model, and how close they are to their quotas.",
        since="now-7d",
        refresh="1m",
        link=link_to(GATEWAY, "Gateway", "The state of the gateway itself"),
        rows=rows(),
    )


def rows() -> tuple[Row, ...]:
    """The rows, from top to bottom."""
    return (
        Row(
            "How much has been estimated?",
            (
                estimated_in("today", "day"),
                estimated_in("this week", "week"),
                estimated_in("this month", "month"),
                estimated_at_this_pace(),
                estimated_by_team(),
                shares_of_teams(),
                estimated_by_model(),
                shares_of_models(),
            ),
        ),
        quotas.near(),
        quotas.limits(),
        Row("When was it estimated?", (credits_an_hour(),)),
        Row(
            "What was refused, admitted with a warning, or unpriced?",
            (refused_over_time(), refused_by_team(), warned(), unpriced()),
        ),
        Row("What is left on the account?", (balance_over_time(), balance_and_age())),
    )


def window_credits(per: str) -> str:
    """Estimated credits of each team in the current day, week or month."""
    return ledger("team", "estimate_proxy_window_estimated_credits", TEAM, f'per="{per}"')


def estimated_in(title: str, per: str) -> dashboard.Panel:
    reads = (
        f"Credits estimated for the selected teams in the current calendar {per}, in the organisation's time zone."
        " Exact, from the ledger. Every answered estimate counts, hit or miss, each time it is requested: this is what"
        " teams plan, not what the account was charged."
    )
    about = About(f"Estimated {title}", reads, AMOUNT, 6, 4)
    return number(about, f"sum({window_credits(per)})")


def estimated_at_this_pace() -> dashboard.Panel:
    reads = "The total of the current month at its pace so far. On its first day this says little."
    about = About("This month, at this pace", reads, AMOUNT, 6, 4)
    start, end = (select(f"estimate_proxy_window_{edge}_timestamp_seconds", 'per="month"') for edge in ("start", "end"))
    month = f"sum({window_credits('month')}) * (max({end}) - max({start})) / (time() - max({start}))"
    return number(about, month, decimals=0)


def estimated_by_team() -> dashboard.Panel:
    month = window_credits("month")
    everyone = ledger("team", "estimate_proxy_window_estimated_credits", 'per="month"')
    requests = ledger("team", "estimate_proxy_window_requests", TEAM, 'per="month"')
    reads = (
        "The current day, week and month of each selected team, the largest month first. Exact, from the ledger."
        " The share is of all teams, selected or not. Click a team to see only that team."
    )
    return grid(
        About("Estimated credits, by team", reads, AMOUNT, 16, 9),
        Column(title="Team", label="team", link=only_this_team(SPEND)),
        NAME_COLUMN,
        Column(title="Today", expr=named("team", window_credits("day"))),
        Column(title="This week", expr=window_credits("week")),
        Column(title="This month", expr=month),
        Column(title="Share of this month", expr=share(month, f"sum({everyone})", "team"), unit=SHARE, gauge=True),
        Column(title="Requests this month", expr=requests),
        most="This month",
    )


def shares_of_teams() -> dashboard.Panel:
    reads = "The ten teams with the most estimated credits in the current month, and all other selected teams together."
    about = About("Shares of this month, by team", reads, AMOUNT, 8, 9)
    largest, rest = _largest("team", window_credits("month"))
    return pie(about, Line(named("team", largest.expr), "{{name}}"), rest)


def estimated_by_model() -> dashboard.Panel:
    priced = increase("model", CREDITS, TEAM)
    reads = (
        "Estimated credits of the selected teams in the time range, the largest first. Prometheus computes this"
        " from counters and extrapolates to the edges of the range; for exact numbers in calendar days use"
        " `/v1/usage` or `estimate-proxy usage`, by model."
    )
    return grid(
        About("Estimated credits, by model", reads, AMOUNT, 16, 9),
        Column(title="Model", label="model"),
        Column(title="Estimated in the time range", expr=priced, decimals=1),
        Column(title="Share", expr=share(priced, increase("", CREDITS, TEAM), "model"), unit=SHARE, gauge=True),
        most="Estimated in the time range",
    )


def shares_of_models() -> dashboard.Panel:
    reads = (
        "The ten models with the most estimated credits in the time range, and all others together. Extrapolated by"
        " Prometheus."
    )
    about = About("Shares of the time range, by model", reads, AMOUNT, 8, 9)
    return pie(about, *_largest("model", increase("model", CREDITS, TEAM)))


def _largest(label: str, amounts: str) -> tuple[Line, Line]:
    """The largest amounts, and the sum of the others: 0 if there are none."""
    largest = f"topk({LEADING}, {amounts})"
    return Line(largest, f"{{{{{label}}}}}"), Line(f"clamp_min(sum({amounts}) - sum({largest}), 0)", REST)


def credits_an_hour() -> dashboard.Panel:
    pace, size = f"{rate('team', CREDITS, TEAM)} * 3600", increase_at_end("team", CREDITS, TEAM)
    reads = (
        "The pace in credits an hour: the ten teams with the most in the time range, and all other selected teams"
        " together. From counters, so use it for the shape and not for amounts."
    )
    about = About("Estimated credits an hour, by team", reads, SHORT, 24, 10)
    return chart(
        about,
        Line(named("team", leading("team", pace, size)), "{{name}}"),
        Line(others("team", pace, size), REST),
        look=AREAS,
    )


def refused_over_time() -> dashboard.Panel:
    reads = (
        "Estimates that the gateway itself refused, a minute: over a quota, over the rate, without a valid token, and"
        " so on. RenderNet's refusals and failures are on the other dashboard."
    )
    about = About("Estimates refused, by reason", reads, PER_MINUTE, 14)
    colours = {"quota-exceeded": RED, "over-ceiling": YELLOW, "rate-limited": ORANGE}
    line = Line(f"{rate('outcome', REQUESTS, ESTIMATE, TEAM, REFUSED)} * 60", "{{outcome}}")
    return chart(about, line, look=Look(stacked=True, colours=colours))


def refused_by_team() -> dashboard.Panel:
    refused = increase("team, outcome", REQUESTS, ESTIMATE, TEAM, REFUSED)
    reads = (
        "Estimates that the gateway refused in the time range, by team and reason, the largest first. The team"
        " `-` stands for requests without a valid token."
    )
    return grid(
        About("Estimates refused, by team", reads, AMOUNT, 10),
        Column(title="Team", label="team"),
        NAME_COLUMN,
        Column(title="Reason", label="outcome"),
        Column(title="Estimates", expr=named("team, outcome", f"{refused} > 0"), decimals=0),
        most="Estimates",
    )


def warned() -> dashboard.Panel:
    estimates = increase(quotas.QUOTA, "estimate_proxy_quota_warned_total", TEAM_OR_ORG)
    reads = (
        'Estimates that exceeded a quota with `on_exceed = "warn"` in the time range: answered, counted, and flagged.'
    )
    return grid(
        About("Admitted over a quota that warns", reads, AMOUNT, 14),
        Column(title="Team", label="team"),
        NAME_COLUMN,
        quotas.MEASURE_COLUMN,
        quotas.PER_COLUMN,
        Column(title="Estimates", expr=named(quotas.QUOTA, estimates), decimals=0),
        most="Estimates",
    )


def unpriced() -> dashboard.Panel:
    estimates = increase("team", "estimate_proxy_unpriced_total", TEAM)
    reads = (
        "RenderNet's answers without a usable price in the time range, by team: passed on or refused, and missing"
        " from every amount above. An unknown price is never 0."
    )
    return grid(
        About("Answered without a price", reads, AMOUNT, 10),
        Column(title="Team", label="team"),
        NAME_COLUMN,
        Column(title="Estimates", expr=named("team", estimates), decimals=0),
        most="Estimates",
    )


def balance_over_time() -> dashboard.Panel:
    lowest = f"bottomk({LEADING}, max by (account) ({select(BALANCE)} @ end()))"
    reads = (
        "Credits left at RenderNet, from its newest answer; the ten accounts with the least. Generations reduce it,"
        " and they do not pass through this gateway; estimates do not."
    )
    about = About("Balance of the account", reads, AMOUNT, 14)
    return chart(about, Line(f"{ledger('account', BALANCE)} and on (account) {lowest}", "{{account}}"))


def balance_and_age() -> dashboard.Panel:
    reads = (
        "The newest known balance of each account, and how long ago RenderNet reported it. Without requests it"
        " grows old."
    )
    return grid(
        About("Balance and its age", reads, AMOUNT, 10),
        Column(title="Account", label="account"),
        Column(title="Balance", expr=ledger("account", BALANCE)),
        Column(title="Age", expr=f"min by (account) ({select(BALANCE_AGE)})", unit=SECONDS),
        most="Age",
    )
