"""Panels: the few kinds that the dashboards use.

`About` requires a title, a description and a unit, so that no panel can be without them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from grafana_foundation_sdk.models import (
    common,
    dashboard,
    heatmap,
    piechart,
    prometheus,
    stat,
    statetimeline,
    timeseries,
)

DATA_SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")

# Grafana's names of units.
AMOUNT = "locale"  # digits in groups and nothing rounded: 12,345.5
SHORT = "short"
SHARE = "percentunit"
SECONDS = "s"
PER_SECOND = "reqps"
PER_MINUTE = "reqpm"
DATE = "dateTimeAsIso"  # of milliseconds
STATE = "none"  # each value has a text

GREEN, ORANGE, RED, BLUE, PURPLE, YELLOW, GREY = "green", "orange", "red", "blue", "purple", "yellow", "#808080"

Step = tuple[float | None, str]  # this colour from this value on; the first one has no value
PLAIN: Sequence[Step] = ((None, BLUE),)

BY_STEP = dashboard.FieldColorModeId.THRESHOLDS
BY_NAME = dashboard.FieldColorModeId.PALETTE_CLASSIC

HALF = 12  # columns: a wider chart has its legend on the right
ROWS_A_PAGE = 12
REST = "all others"
LAST = common.ReduceDataOptions(values=False, calcs=["lastNotNull"])
TOOLTIP = common.VizTooltipOptions(
    mode=common.TooltipDisplayMode.MULTI, sort=common.SortOrder.DESCENDING, hide_zeros=True
)


@dataclasses.dataclass(frozen=True)
class About:
    """Title, description, unit, and size on a grid of 24 columns."""

    title: str
    reads: str
    unit: str
    width: int
    height: int = 8


@dataclasses.dataclass(frozen=True)
class Line:
    """A query, and the names of its lines."""

    expr: str
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """How a chart is drawn. `limits` are dashed lines, `colours` belong to names of lines."""

    stacked: bool = False
    bars: bool = False
    limits: Sequence[Step] = ()
    colours: Mapping[str, str] = dataclasses.field(default_factory=dict)


LINES = Look()
AREAS = Look(stacked=True, colours={REST: GREY})
BARS = Look(stacked=True, bars=True)


def chart(about: About, *lines: Line, look: Look = LINES) -> dashboard.Panel:
    """Lines over time."""
    field = common.GraphFieldConfig(
        draw_style=common.GraphDrawStyle.BARS if look.bars else common.GraphDrawStyle.LINE,
        fill_opacity=40 if look.stacked else 0,
        line_width=1,
        show_points=common.VisibilityMode.AUTO,
        stacking=common.StackingConfig(
            mode=common.StackingMode.NORMAL if look.stacked else common.StackingMode.NONE, group="A"
        ),
        thresholds_style=common.GraphThresholdsStyleConfig(
            mode=common.GraphThresholdsStyleMode.DASHED if look.limits else common.GraphThresholdsStyleMode.OFF
        ),
    )
    placement = common.LegendPlacement.RIGHT if about.width > HALF else common.LegendPlacement.BOTTOM
    return panel(
        about,
        "timeseries",
        [over_time(line) for line in lines],
        options=timeseries.Options(
            legend=common.VizLegendOptions(
                display_mode=common.LegendDisplayMode.TABLE,
                placement=placement,
                show_legend=True,
                calcs=["lastNotNull"],
            ),
            tooltip=TOOLTIP,
        ),
        defaults=field_defaults(about, steps=look.limits or PLAIN, colour=BY_NAME, custom=field, min_val=0),
        overrides=coloured(look.colours),
    )


def number(about: About, expr: str, *, steps: Sequence[Step] = PLAIN, decimals: int | None = None) -> dashboard.Panel:
    """One number, at the end of the time range."""
    options = stat.Options(
        graph_mode=common.BigValueGraphMode.NONE,
        color_mode=common.BigValueColorMode.VALUE,
        text_mode=common.BigValueTextMode.VALUE,
        reduce_options=LAST,
    )
    return panel(
        about,
        "stat",
        [at_the_end(Line(expr, ""))],
        options=options,
        defaults=field_defaults(about, steps=steps, decimals=decimals),
    )


def pie(about: About, *parts: Line) -> dashboard.Panel:
    """Shares of a whole, at the end of the time range."""
    options = piechart.Options(
        pie_type=piechart.PieChartType.DONUT,
        display_labels=[],
        reduce_options=LAST,
        tooltip=TOOLTIP,
        legend=piechart.PieChartLegendOptions(
            display_mode=common.LegendDisplayMode.TABLE,
            placement=common.LegendPlacement.RIGHT,
            show_legend=True,
            values=[piechart.PieChartLegendValues.PERCENT],
        ),
    )
    return panel(
        about,
        "piechart",
        [at_the_end(part) for part in parts],
        options=options,
        defaults=field_defaults(about, colour=BY_NAME),
        overrides=coloured({REST: GREY}),
    )


def states(about: About, line: Line, words: Mapping[str, tuple[str, str]]) -> dashboard.Panel:
    """States over time. `words` gives the text and colour of each value."""
    options = statetimeline.Options(
        show_value=common.VisibilityMode.NEVER,
        row_height=0.8,
        per_page=ROWS_A_PAGE,
        legend=common.VizLegendOptions(show_legend=True),
        tooltip=TOOLTIP,
    )
    defaults = field_defaults(about, custom=statetimeline.FieldConfig(fill_opacity=80))
    defaults.mappings = [worded(words)]
    return panel(about, "state-timeline", [over_time(line)], options=options, defaults=defaults)


def density(about: About, expr: str) -> dashboard.Panel:
    """A histogram over time."""
    query = over_time(Line(expr, "{{le}}"))
    query.format_val = prometheus.PromQueryFormat.HEATMAP
    options = heatmap.Options(
        calculate=False,
        color=heatmap.HeatmapColorOptions(
            mode=heatmap.HeatmapColorMode.SCHEME,
            scheme="Blues",
            fill="dark-blue",
            scale=heatmap.HeatmapColorScale.EXPONENTIAL,
            exponent=0.5,
            steps=64,
        ),
        cell_values=heatmap.CellValues(unit=PER_SECOND),
        filter_values=heatmap.FilterValueRange(le=1e-9),
        legend=heatmap.HeatmapLegend(show=True),
        rows_frame=heatmap.RowsHeatmapOptions(layout=common.HeatmapCellLayout.AUTO),
        tooltip=heatmap.HeatmapTooltip(mode=common.TooltipDisplayMode.SINGLE, y_histogram=False),
        y_axis=heatmap.YAxisConfig(unit=about.unit, axis_placement=common.AxisPlacement.LEFT),
    )
    return panel(about, "heatmap", [query], options=options, defaults=field_defaults(about))


def panel(  # noqa: PLR0913  # the parts of a panel
    about: About,
    kind: str,
    targets: Sequence[prometheus.Dataquery],
    *,
    options: object,
    defaults: dashboard.FieldConfig,
    overrides: Sequence[dashboard.DashboardFieldConfigSourceOverrides] = (),
    transformations: Sequence[dashboard.DataTransformerConfig] = (),
) -> dashboard.Panel:
    """A panel without a position, which the board sets. Its queries get their letters here."""
    for letter, target in zip("ABCDEFGH", targets, strict=False):
        target.ref_id = letter
    return dashboard.Panel(
        type_val=kind,
        title=about.title,
        description=about.reads,
        datasource=DATA_SOURCE,
        grid_pos=dashboard.GridPos(h=about.height, w=about.width),
        targets=list(targets),
        options=options,
        field_config=dashboard.FieldConfigSource(defaults=defaults, overrides=list(overrides)),
        transformations=list(transformations) or None,
    )


def over_time(line: Line) -> prometheus.Dataquery:
    """A query at each step of the time range."""
    return prometheus.Dataquery(
        expr=line.expr,
        datasource=DATA_SOURCE,
        editor_mode=prometheus.QueryEditorMode.CODE,
        legend_format=line.name,
        instant=False,
        range_val=True,
    )


def at_the_end(line: Line) -> prometheus.Dataquery:
    """A query at the end of the time range only."""
    query = over_time(line)
    query.instant, query.range_val = True, False
    return query


def field_defaults(
    about: About,
    *,
    steps: Sequence[Step] = PLAIN,
    colour: dashboard.FieldColorModeId = BY_STEP,
    custom: object = None,
    decimals: int | None = None,
    min_val: float | None = None,
) -> dashboard.FieldConfig:
    """Defaults for each field of a panel: unit, colours, numbers."""
    return dashboard.FieldConfig(
        unit=about.unit,
        decimals=decimals,
        min_val=min_val,
        color=dashboard.FieldColor(mode=colour),
        thresholds=dashboard.ThresholdsConfig(mode=dashboard.ThresholdsMode.ABSOLUTE, steps=stepped(steps)),
        custom=custom,
    )


def stepped(steps: Sequence[Step]) -> list[dashboard.Threshold]:
    """Thresholds in Grafana's form."""
    return [dashboard.Threshold(value=value, color=colour) for value, colour in steps]


def coloured(colours: Mapping[str, str]) -> list[dashboard.DashboardFieldConfigSourceOverrides]:
    """Fixed colours of lines, whatever their value."""
    fixed = dashboard.FieldColorModeId.FIXED
    return [
        override(name, color=dashboard.FieldColor(mode=fixed, fixed_color=colour)) for name, colour in colours.items()
    ]


def override(name: str, **properties: object) -> dashboard.DashboardFieldConfigSourceOverrides:
    """Settings of the field with that name. In the name of a setting, `__` stands for a dot."""
    return dashboard.DashboardFieldConfigSourceOverrides(
        matcher=dashboard.MatcherConfig(id_val="byName", options=name),
        properties=[dashboard.DynamicConfigValue(key.replace("__", "."), value) for key, value in properties.items()],
    )


def worded(words: Mapping[str, tuple[str, str | None]]) -> dashboard.ValueMap:
    """Texts for values, some with a colour."""
    return dashboard.ValueMap(
        {
            value: dashboard.ValueMappingResult(text=text, color=colour, index=index)
            for index, (value, (text, colour)) in enumerate(words.items())
        }
    )


def unworded(text: str) -> dashboard.SpecialValueMap:
    """A text for values that are not numbers."""
    result = dashboard.ValueMappingResult(text=text, index=0)
    match = dashboard.SpecialValueMatch.NULL_AND_NAN
    return dashboard.SpecialValueMap(dashboard.DashboardSpecialValueMapOptions(match=match, result=result))
