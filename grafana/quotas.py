"""Panels about quotas: who is near one, when it will be reached, and what is used of each limit."""

from grafana_foundation_sdk.models import dashboard

from board import SPEND, Row, only_this_team
from panels import AMOUNT, GREEN, ORANGE, RED, SHARE, About, Line, Look, Step, chart, number
from promql import TEAM_OR_ORG, leading, ledger, named, select
from tables import NAME_COLUMN, Column, grid

QUOTA = "team, measure, per"  # the organisation's quotas have the team `-`
USED = ledger(QUOTA, "estimate_proxy_quota_used", TEAM_OR_ORG)
LIMIT = ledger(QUOTA, "estimate_proxy_quota_limit", TEAM_OR_ORG)
FORECAST = ledger(QUOTA, "estimate_proxy_quota_forecast_credits", TEAM_OR_ORG)
USED_SHARE = f"{USED} / {LIMIT}"
NEAR = 0.8
QUOTA_STEPS: tuple[Step, ...] = ((None, GREEN), (NEAR, ORANGE), (1, RED))

START = ledger("per", "estimate_proxy_window_start_timestamp_seconds")
END = ledger("per", "estimate_proxy_window_end_timestamp_seconds")

TEAM_COLUMN = Column(title="Team", label="team", words={"-": ("whole organisation", None)}, link=only_this_team(SPEND))
MEASURE_COLUMN = Column(title="Measure", label="measure", words={"estimated_credits": ("estimated credits", None)})
PER_COLUMN = Column(title="Per", label="per")
USED_COLUMN = Column(
    title="Used of the quota",
    expr=named(QUOTA, USED_SHARE),
    unit=SHARE,
    steps=QUOTA_STEPS,
    gauge=True,
    without="limit is 0",  # a limit of 0 has no ratio
)


def near() -> Row:
    return Row(
        "Who is near a quota, and when will it be reached at this pace?",
        (
            nearest_to_a_quota(),
            quotas_from(
                "Quotas used up",
                "Quotas with nothing left in their window, including those of the organisation.",
                1,
                RED,
            ),
            quotas_from(
                "Quotas from 80 %", "Quotas used to 80 % or more, including those that are used up.", NEAR, ORANGE
            ),
        ),
    )


def limits() -> Row:
    return Row("How much of each limit is used?", (used_against_limit(), used_over_time()))


def seconds_until_reached() -> str:
    """Seconds until each quota is used up at the pace so far; 0 if it is used up, -1 if not in this window.

    At an even pace a limit is reached after limit/used of the time that has passed since the window began, which is
    limit/used - 1 of that time from now.
    """
    ahead = f"({LIMIT} / {USED} - 1) * on (per) group_left () (time() - {START})"
    left = f"on (per) group_left () ({END} - time())"
    return f"clamp_min({ahead} < {left}, 0) or -sgn({ahead} >= {left})"


def quotas_from(title: str, reads: str, ratio: float, colour: str) -> dashboard.Panel:
    about = About(title, reads, AMOUNT, 4)
    return number(about, f"sum({USED} >= bool {LIMIT} * {ratio})", steps=((None, GREEN), (1, colour)))


def nearest_to_a_quota() -> dashboard.Panel:
    reads = (
        "Each quota of the selected teams and of the organisation, the fullest first: orange from 80 %, red when"
        " it is used up. 'Reached in' assumes the pace since the window began: it is computed from what is used,"
        " the limit, and how much of the window has passed."
    )
    return grid(
        About("Nearest to a quota", reads, AMOUNT, 16),
        TEAM_COLUMN,
        NAME_COLUMN,
        MEASURE_COLUMN,
        PER_COLUMN,
        USED_COLUMN,
        Column(
            title="Reached in, at this pace",
            expr=seconds_until_reached(),
            unit="dtdurations",
            decimals=1,
            words={"-1": ("not in this window", None), "0": ("reached", RED)},
        ),
        most=USED_COLUMN.title,
    )


def used_against_limit() -> dashboard.Panel:
    reads = (
        "The limit of each quota in its current window, what is used and what is left; the largest limit first. A"
        " negative amount left means that a quota only warns, or that its limit was lowered. The forecast is what"
        " the gateway expects to be used at the end of a week or month, from the usage of up to 90 days; it needs"
        " 14 days, and can be above the limit."
    )
    return grid(
        About("Used against limit, by team", reads, AMOUNT, 12, 10),
        TEAM_COLUMN,
        NAME_COLUMN,
        MEASURE_COLUMN,
        PER_COLUMN,
        Column(title="Used", expr=named(QUOTA, USED)),
        Column(title="Limit", expr=LIMIT),
        Column(title="Left", expr=f"{LIMIT} - {USED}"),
        Column(title="Forecast of the end", expr=FORECAST, decimals=0),
        most="Limit",
    )


def used_over_time() -> dashboard.Panel:
    now = " / ".join(
        f"max by ({QUOTA}) ({select(f'estimate_proxy_quota_{side}', TEAM_OR_ORG)} @ end())"
        for side in ("used", "limit")
    )
    reads = (
        "The ten quotas that are fullest at the end of the time range, as shares of their limits: orange line at 80"
        " %, red line at the limit. A line falls to 0 when a new window begins. The team `-` is the whole"
        " organisation."
    )
    about = About("The fullest quotas over time", reads, SHARE, 12, 10)
    line = Line(named(QUOTA, leading(QUOTA, USED_SHARE, now)), "{{name}}, {{measure}} per {{per}}")
    return chart(about, line, look=Look(limits=QUOTA_STEPS))
