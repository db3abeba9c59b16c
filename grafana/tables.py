"""Tables: a row for each group of labels, a column for each label and each query, sorted, in pages.

Every query runs once, at the end of the time range. Grafana merges the results by their common labels, so a row without
a result for one of the queries has an empty cell there and not a wrong one. Only the first query of a table needs the
teams' names.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from grafana_foundation_sdk.models import common, dashboard, prometheus, table

from panels import About, Line, Step, at_the_end, field_defaults, override, panel, stepped, unworded, worded

Words = Mapping[str, tuple[str, str | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column: the label `label`, or the results of `expr`."""

    title: str
    label: str = ""
    expr: str = ""
    unit: str = ""
    decimals: int | None = None
    steps: Sequence[Step] = ()
    gauge: bool = False
    words: Words = dataclasses.field(default_factory=dict)
    without: str = ""  # the text where there is no number
    link: str = ""
    width: int | None = None


NAME_COLUMN = Column(title="Name", label="name")  # of a team


def grid(about: About, *columns: Column, most: str) -> dashboard.Panel:
    """A table that is sorted by the column `most`, the largest value first."""
    sources = _sources(columns)
    queries = [at_the_end(Line(column.expr, "")) for column in columns if column.expr]
    for query in queries:
        query.format_val = prometheus.PromQueryFormat.TABLE
    return panel(
        about,
        "table",
        queries,
        options=_Paged(
            cell_height=common.TableCellHeight.SM,
            footer=common.TableFooterOptions(show=False, reducer=[], count_rows=False, enable_pagination=True),
            sort_by=[common.TableSortByFieldState(display_name=most, desc=True)],
        ),
        defaults=field_defaults(about, custom=common.TableFieldOptions(filterable=True)),
        overrides=[column_override(column) for column in columns],
        transformations=[
            dashboard.DataTransformerConfig(id_val="merge", options={}),
            dashboard.DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": {"Time": True},
                    "indexByName": {source: index for index, source in enumerate(sources)},
                    "renameByName": {source: column.title for source, column in zip(sources, columns, strict=True)},
                },
            ),
        ],
    )


class _Paged(table.Options):
    """Grafana 12.2 moved the switch for pages out of the footer. This sets it in both places."""

    def to_json(self) -> dict[str, object]:
        return super().to_json() | {"enablePagination": True}


def _sources(columns: Sequence[Column]) -> list[str]:
    """Grafana's names of the columns before they are renamed."""
    letters = iter("ABCDEFGH")
    single = sum(bool(column.expr) for column in columns) == 1
    return [column.label or ("Value" if single else f"Value #{next(letters)}") for column in columns]


def column_override(column: Column) -> dashboard.DashboardFieldConfigSourceOverrides:
    """The settings of one column."""
    properties: dict[str, object] = {}
    if column.unit:
        properties["unit"] = column.unit
    if column.decimals is not None:
        properties["decimals"] = column.decimals
    if column.steps:
        properties["thresholds"] = {"mode": "absolute", "steps": stepped(column.steps)}
    if column.gauge:
        properties |= {"min": 0, "max": 1, "custom__cellOptions": _GAUGE}
    if column.words:
        properties["mappings"] = [worded(column.words)]
    if any(colour for _, colour in column.words.values()):
        properties["custom__cellOptions"] = common.TableColorTextCellOptions()
        properties["thresholds"] = {"mode": "absolute", "steps": stepped(((None, "text"),))}
    if column.without:
        properties["mappings"] = [unworded(column.without)]
    if column.link:
        properties["links"] = [{"title": "Only this one", "url": column.link, "targetBlank": False}]
    if column.width:
        properties["custom__width"] = column.width
    return override(column.title, **properties)


_GAUGE = common.TableBarGaugeCellOptions(
    mode=common.BarGaugeDisplayMode.BASIC, value_display_mode=common.BarGaugeValueMode.TEXT
)
