"""The dashboard *Gateway*: outcomes, savings of the price book, latencies, and failures."""

from grafana_foundation_sdk.models import dashboard

import learning
import machinery
from board import GATEWAY, SPEND, Row, link_to, made, only_this_team
from panels import (
    AMOUNT,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PER_SECOND,
    PURPLE,
    RED,
    SECONDS,
    SHARE,
    YELLOW,
    About,
    Line,
    Look,
    chart,
    density,
    number,
)
from promql import ESTIMATE, PRICED, QUANTILES, REQUESTS, TEAM, increase, increase_at_end, named, quantile, rate, share
from tables import NAME_COLUMN, Column, grid

DURATION = "estimate_proxy_request_duration_seconds"
UPSTREAM_COUNT = "estimate_proxy_upstream_request_duration_seconds_count"

HIT = 'outcome=~"hit|inferred|stale"'
AVOIDED = 'outcome=~"hit|inferred|stale|collapsed"'

OUTCOME_COLOURS = {
    "hit": GREEN,
    "inferred": "super-light-green",
    "stale": "light-green",
    "collapsed": "dark-green",
    "miss": BLUE,
    "bypass": "light-blue",
    "unpriced": PURPLE,
    "upstream-rejected": YELLOW,
    "rate-limited": "light-orange",
    "quota-exceeded": ORANGE,
    "over-ceiling": "dark-orange",
    "upstream-error": RED,
    "upstream-refused": "dark-red",
    "upstream-timeout": "light-red",
    "upstream-busy": "semi-dark-red",
    "internal-error": "dark-purple",
    "cancelled": GREY,
}


def board() -> dashboard.Dashboard:
    """The dashboard for operators."""
    return made(
        uid=GATEWAY,
        title="Gateway",
        reads="Outcomes of requests, savings of the price book, latencies, and failures.",
        since="now-6h",
        refresh="30s",
        link=link_to(SPEND, "Estimated spend", "What teams estimated, and their quotas"),
        rows=rows(),
    )


def rows() -> tuple[Row, ...]:
    """The rows, from top to bottom."""
    return (
        Row("How many requests, and how do they end?", (requests_by_outcome(), outcomes_in_range())),
        Row(
            "Does the price book work, and what does it save upstream?",
            (hit_ratio(), avoided_in_range(), hit_ratio_over_time(), avoided_over_time(), hit_ratio_by_team()),
        ),
        learning.learning(),
        Row(
            "How long do answers take?",
            (*(latency_by_outcome(q, name) for q, name in QUANTILES), latency_density()),
        ),
        machinery.upstream(),
        machinery.stores(),
        machinery.circuits(),
        machinery.prices(),
        machinery.processes(),
    )


def requests_by_outcome() -> dashboard.Panel:
    reads = (
        "Requests a second of the selected teams, by outcome; outcomes that did not occur in the time range are left"
        " out. Green: no upstream request of its own. Blue: an upstream request. Orange: refused. Red: failed"
        " upstream."
    )
    about = About("Requests, by outcome", reads, PER_SECOND, 16, 10)
    occurred = f"({increase_at_end('outcome', REQUESTS, TEAM)} > 0)"
    line = Line(f"{rate('outcome', REQUESTS, TEAM)} and on (outcome) {occurred}", "{{outcome}}")
    return chart(about, line, look=Look(stacked=True, colours=OUTCOME_COLOURS))


def outcomes_in_range() -> dashboard.Panel:
    total = increase("outcome", REQUESTS, TEAM)
    reads = "The number of requests of the selected teams by outcome, and their share, the largest first."
    return grid(
        About("Outcomes in the time range", reads, AMOUNT, 8, 10),
        Column(title="Outcome", label="outcome"),
        Column(title="Requests", expr=f"{total} > 0", decimals=0),
        Column(
            title="Share", expr=f"{share(total, increase('', REQUESTS, TEAM), 'outcome')} > 0", unit=SHARE, gauge=True
        ),
        most="Requests",
    )


def hit_ratio() -> dashboard.Panel:
    reads = (
        "The share of estimates served from the price book (hit, inferred, stale) among all that were answered with a"
        " price in the time range (those, miss, collapsed, bypass)."
    )
    about = About("Hit ratio", reads, SHARE, 4)
    answered = increase("", REQUESTS, ESTIMATE, TEAM, PRICED)
    return number(about, share(increase("", REQUESTS, ESTIMATE, TEAM, HIT), answered))


def avoided_in_range() -> dashboard.Panel:
    reads = (
        "Estimates in the time range that needed no upstream request of their own: hit, inferred, stale, or"
        " collapsed into another request."
    )
    about = About("Upstream requests avoided", reads, AMOUNT, 4)
    return number(about, increase("", REQUESTS, ESTIMATE, TEAM, AVOIDED), decimals=0)


def hit_ratio_over_time() -> dashboard.Panel:
    reads = (
        "The share of hit, inferred and stale among estimates answered with a price. It falls when many prices expire"
        " together, after a purge, when the price list changes, or when a team starts to send new bodies. A gap:"
        " nothing was answered."
    )
    about = About("Hit ratio over time", reads, SHARE, 8)
    answered = rate("", REQUESTS, ESTIMATE, TEAM, PRICED)
    return chart(about, Line(share(rate("", REQUESTS, ESTIMATE, TEAM, HIT), answered), "hit ratio"))


def avoided_over_time() -> dashboard.Panel:
    reads = (
        "Avoided: estimates of the selected teams that needed no upstream request of their own. Made: every upstream"
        " request of all teams, background refreshes and audits included. Together they show what the price book"
        " saves."
    )
    about = About("Upstream requests, made and avoided", reads, PER_SECOND, 8)
    return chart(
        about,
        Line(rate("", REQUESTS, ESTIMATE, TEAM, AVOIDED), "avoided"),
        Line(rate("", UPSTREAM_COUNT), "made"),
        look=Look(stacked=True, colours={"avoided": GREEN, "made": BLUE}),
    )


def hit_ratio_by_team() -> dashboard.Panel:
    answered = increase("team", REQUESTS, ESTIMATE, TEAM, PRICED)
    reads = (
        "Estimates of each selected team that were answered with a price in the time range, and the share from"
        " the price book; the busiest team first. A busy team with a low ratio sends a different body each time:"
        " find out which members it could leave out."
    )
    return grid(
        About("Hit ratio, by team", reads, AMOUNT, 24),
        Column(title="Team", label="team", link=only_this_team(GATEWAY)),
        NAME_COLUMN,
        Column(title="Answered with a price", expr=named("team", answered), decimals=0),
        Column(title="Upstream requests avoided", expr=increase("team", REQUESTS, ESTIMATE, TEAM, AVOIDED), decimals=0),
        Column(
            title="Time saved", expr=increase("team", "estimate_proxy_upstream_seconds_saved_total", TEAM), unit=SECONDS
        ),
        Column(
            title="Hit ratio",
            expr=f"{increase('team', REQUESTS, ESTIMATE, TEAM, HIT)} / ({answered} > 0)",
            unit=SHARE,
            gauge=True,
        ),
        most="Answered with a price",
    )


def latency_by_outcome(q: float, name: str) -> dashboard.Panel:
    reads = (
        f"{q:.0%} of the estimates with that outcome were answered faster than this: from the request's head to the end"
        " of the answer, all teams. A hit takes milliseconds; a miss takes as long as RenderNet."
    )
    about = About(f"Latency {name}, by outcome", reads, SECONDS, 8, 9)
    return chart(
        about, Line(quantile(q, "outcome", DURATION, ESTIMATE), "{{outcome}}"), look=Look(colours=OUTCOME_COLOURS)
    )


def latency_density() -> dashboard.Panel:
    reads = (
        "The distribution of latencies of all teams, in estimates a second: the darker, the more. Two bands are"
        " normal: answers from the price book, and answers from RenderNet."
    )
    about = About("Latency of all estimates", reads, SECONDS, 24)
    return density(about, rate("le", f"{DURATION}_bucket", ESTIMATE))
