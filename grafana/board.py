"""What the two dashboards have in common: variables, links to each other, rows of panels in places."""

import dataclasses
from collections.abc import Sequence

from grafana_foundation_sdk.models import dashboard

from panels import DATA_SOURCE
from promql import select

COLUMNS = 24
SPEND = "estimate-proxy-spend"
GATEWAY = "estimate-proxy-gateway"


@dataclasses.dataclass(frozen=True)
class Row:
    """A question, and the panels that answer it, from left to right."""

    question: str
    panels: Sequence[dashboard.Panel]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Board:
    """A dashboard before its panels have places."""

    uid: str
    title: str
    reads: str
    since: str
    refresh: str
    link: dashboard.DashboardLink
    rows: Sequence[Row]


def made(board: Board) -> dashboard.Dashboard:
    """The dashboard as Grafana reads it."""
    return dashboard.Dashboard(
        uid=board.uid,
        title=board.title,
        description=board.reads,
        tags=["estimate-proxy"],
        timezone="browser",
        editable=False,
        graph_tooltip=dashboard.DashboardCursorSync.CROSSHAIR,
        time=dashboard.DashboardDashboardTime(from_val=board.since, to="now"),
        refresh=board.refresh,
        templating=dashboard.DashboardDashboardTemplating(variables()),
        links=[board.link],
        panels=placed(board.rows),
    )


def placed(rows: Sequence[Row]) -> list[dashboard.Panel | dashboard.RowPanel]:
    """Panels from left to right and from top to bottom, each with an id of its own."""
    result: list[dashboard.Panel | dashboard.RowPanel] = []
    top = 0
    for row in rows:
        result.append(dashboard.RowPanel(title=row.question, grid_pos=dashboard.GridPos(h=1, w=COLUMNS, x=0, y=top)))
        top = _fill(row.panels, top + 1)
        result.extend(row.panels)
    for number, item in enumerate(result, 1):
        item.id_val = number
    return result


def _fill(panels: Sequence[dashboard.Panel], top: int) -> int:
    """Gives each panel its place, and returns the first line below all of them."""
    left = height = 0
    for panel in panels:
        place = panel.grid_pos
        assert place is not None  # noqa: S101  # each panel comes with its size
        if left + place.w > COLUMNS:
            left, top, height = 0, top + height, 0
        place.x, place.y = left, top
        left, height = left + place.w, max(height, place.h)
    return top + height


def variables() -> list[dashboard.VariableModel]:
    """What a reader can choose by; both dashboards have the same, so that a link keeps the choice."""
    return [
        dashboard.VariableModel(
            type_val=dashboard.VariableType.DATASOURCE,
            name="datasource",
            label="Data source",
            description="The Prometheus that scrapes the gateways.",
            query="prometheus",
            current=dashboard.VariableOption(),
            auto=None,
            auto_min=None,
            auto_count=None,
        ),
        _labels("job", "Job", "estimate_proxy_build_info", "Choose one where jobs have ledgers of their own."),
        _labels(
            "instance", "Instance", 'estimate_proxy_build_info{job=~"$job"}', "A process or replica of the gateway."
        ),
        _labels("team", "Team", select("estimate_proxy_window_requests"), "As the gateway's config names it."),
    ]


def _labels(name: str, label: str, series: str, reads: str) -> dashboard.VariableModel:
    """A choice of the values of one label: several, or all of them."""
    query = f"label_values({series}, {name})"
    everything = dashboard.VariableOption(selected=True, text=["All"], value=["$__all"])
    return dashboard.VariableModel(
        type_val=dashboard.VariableType.QUERY,
        name=name,
        label=label,
        description=reads,
        datasource=DATA_SOURCE,
        query={"query": query, "refId": f"variable-{name}"},
        definition=query,
        refresh=dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED,
        sort=dashboard.VariableSort.NATURAL_ASC,
        multi=True,
        include_all=True,
        all_value=".*",
        current=everything,
        auto=None,
        auto_min=None,
        auto_count=None,
    )


def link_to(uid: str, title: str, tooltip: str) -> dashboard.DashboardLink:
    """To the other dashboard, with the same choice and time."""
    return dashboard.DashboardLink(
        title=title,
        type_val=dashboard.DashboardLinkType.LINK,
        icon="dashboard",
        tooltip=tooltip,
        url=f"/d/{uid}",
        include_vars=True,
        keep_time=True,
    )


def only_this_team(uid: str) -> str:
    """The address of a dashboard for the team in the clicked cell; the rest of the choice stays."""
    kept = "${__url_time_range}&${datasource:queryparam}&${job:queryparam}&${instance:queryparam}"
    return f"/d/{uid}?{kept}&var-team=${{__value.raw}}"
