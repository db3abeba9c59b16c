"""What the two dashboards share: variables, links to each other, rows of panels and their positions."""

import dataclasses
from collections.abc import Sequence
from functools import partial

from grafana_foundation_sdk.models import dashboard

from panels import DATA_SOURCE
from promql import select

COLUMNS = 24
SPEND = "estimate-proxy-spend"
GATEWAY = "estimate-proxy-gateway"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: its title is a question, its panels answer it, from left to right."""

    question: str
    panels: Sequence[dashboard.Panel]


def made(  # noqa: PLR0913  # the parts of a dashboard
    *,
    uid: str,
    title: str,
    reads: str,
    since: str,
    refresh: str,
    link: dashboard.DashboardLink,
    rows: Sequence[Row],
) -> dashboard.Dashboard:
    """A dashboard as Grafana reads it."""
    return dashboard.Dashboard(
        uid=uid,
        title=title,
        description=reads,
        tags=["estimate-proxy"],
        timezone="browser",
        editable=False,
        graph_tooltip=dashboard.DashboardCursorSync.CROSSHAIR,
        time=dashboard.DashboardDashboardTime(from_val=since, to="now"),
        refresh=refresh,
        templating=dashboard.DashboardDashboardTemplating(variables()),
        links=[link],
        panels=placed(rows),
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
    """Sets each panel's position, and returns the first line below all of them."""
    left = height = 0
    for panel in panels:
        place = panel.grid_pos
        assert place is not None  # noqa: S101  # each panel comes with its size
        if left + place.w > COLUMNS:
            left, top, height = 0, top + height, 0
        place.x, place.y = left, top
        left, height = left + place.w, max(height, place.h)
    return top + height


_variable = partial(dashboard.VariableModel, auto=None, auto_min=None, auto_count=None)
"""Without the members of variables of other types."""


def variables() -> list[dashboard.VariableModel]:
    """The variables. Both dashboards have the same ones, so that a link keeps the selection."""
    return [
        _variable(
            type_val=dashboard.VariableType.DATASOURCE,
            name="datasource",
            label="Data source",
            description="The Prometheus that scrapes the gateways.",
            query="prometheus",
            current=dashboard.VariableOption(),
        ),
        _labels("job", "Job", "estimate_proxy_build_info", "Select one if jobs have separate ledgers."),
        _labels(
            "instance", "Instance", 'estimate_proxy_build_info{job=~"$job"}', "A process or replica of the gateway."
        ),
        _labels("team", "Team", select("estimate_proxy_window_requests"), "The team's id in the gateway's config."),
    ]


def _labels(name: str, label: str, series: str, reads: str) -> dashboard.VariableModel:
    """A variable with the values of one label: several can be selected, or all."""
    query = f"label_values({series}, {name})"
    everything = dashboard.VariableOption(selected=True, text=["All"], value=["$__all"])
    return _variable(
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
    )


def link_to(uid: str, title: str, tooltip: str) -> dashboard.DashboardLink:
    """A link to the other dashboard, with the same selection and time range."""
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
    """The URL of a dashboard for the team in the clicked cell; other variables keep their selection."""
    kept = "${__url_time_range}&${datasource:queryparam}&${job:queryparam}&${instance:queryparam}"
    return f"/d/{uid}?{kept}&var-team=${{__value.raw}}"
