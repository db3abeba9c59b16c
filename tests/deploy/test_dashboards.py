"""The dashboards: the committed files equal the generated ones, and each query uses metrics and labels that exist."""

import importlib.util
import itertools
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dashboard_queries import EVERYTHING, FILES, GRAFANA, VARIABLES, dashboards, panels, queries
from metric_names import families, metric_labels
from programs import program

FUNCTION_OVER_RANGE = re.compile(r"\b(\w+)\(\w+\{[^}]*\}\[([^]]+)\]( @ end\(\))?")
SELECTOR = re.compile(r"\b(\w+)\{([^}]*)\}")


def metrics_of_kind(*kinds: str) -> set[str]:
    """Returns the series of these types; type `ledger` is a gauge with the same value on every replica."""
    found = (family for family in families().values() if ("ledger" if family.from_ledger else family.kind) in kinds)
    return {name for family in found for name in family.series()}


def targets() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns each committed query with its panel."""
    for panel in itertools.chain.from_iterable(map(panels, dashboards())):
        for target in panel["targets"]:
            yield panel, target


def texts(value: object) -> Iterator[str]:
    """Yields every string in a JSON value."""
    match value:
        case str():
            yield value
        case dict():
            for member in value.values():
                yield from texts(member)
        case list():
            for item in value:
                yield from texts(item)


every_dashboard = pytest.mark.parametrize("dashboard", dashboards(), ids=FILES)


@pytest.mark.filterwarnings("ignore:Prefer using dashboardv2:DeprecationWarning")  # the old schema is a known warning
def test_the_committed_dashboards_equal_the_generated_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(GRAFANA)
    spec = importlib.util.spec_from_file_location("build", GRAFANA / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    committed = {path.name: path.read_text() for path in (GRAFANA / "dashboards").iterdir()}
    assert build.rendered() == committed, "run `python grafana/build.py`"


def test_both_have_the_uids_that_links_use() -> None:
    assert [(dashboard["uid"], dashboard["title"]) for dashboard in dashboards()] == [
        ("estimate-proxy-spend", "Estimated spend"),
        ("estimate-proxy-gateway", "Gateway"),
    ]


def test_each_links_to_the_other_and_keeps_the_selected_variables() -> None:
    spend, gateway = dashboards()
    for here, there in ((spend, gateway), (gateway, spend)):
        (link,) = here["links"]
        assert link["url"] == f"/d/{there['uid']}"
        assert link["includeVars"]
        assert link["keepTime"]


@every_dashboard
def test_ids_are_unique(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert sorted(ids) == list(range(1, len(ids) + 1))
    for panel in panels(dashboard):
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == list("ABCDEFGH")[: len(letters)]


@every_dashboard
def test_every_panel_has_a_description(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        assert panel["title"]
        assert len(panel["description"]) > 50, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(set(titles)) == len(titles)


@every_dashboard
def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ):
            assert taken.setdefault(cell, panel["title"]) == panel["title"]


@every_dashboard
def test_the_data_source_is_a_variable(dashboard: dict[str, Any]) -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    first, *choices = dashboard["templating"]["list"]
    assert (first["name"], first["type"], first["query"]) == ("datasource", "datasource", "prometheus")
    for part in (*choices, *panels(dashboard), *(t for panel in panels(dashboard) for t in panel["targets"])):
        assert part["datasource"] == source


@every_dashboard
def test_variables_allow_several_values_and_all(dashboard: dict[str, Any]) -> None:
    choices = dashboard["templating"]["list"][1:]
    assert tuple(choice["name"] for choice in choices) == VARIABLES
    for choice in choices:
        assert choice["multi"]
        assert choice["includeAll"]
        assert choice["allValue"] == ".*"
        query = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", choice["query"]["query"])
        assert query is not None
        metric, label = query.groups()
        assert label == choice["name"]
        assert label in metric_labels()[metric] | {"job", "instance"}


@every_dashboard
def test_credits_are_never_called_spent(dashboard: dict[str, Any]) -> None:
    """An estimated credit has not been spent."""
    for text in texts(dashboard):
        assert not re.search(r"\b(spent|spending|costs?|charged for)\b", text, re.IGNORECASE), text


def test_every_metric_and_label_exists() -> None:
    for panel, target in targets():
        expr, known = target["expr"], metric_labels()
        found = SELECTOR.findall(expr)
        assert len(found) == len(re.findall(r"\bestimate_proxy_\w+", expr)) > 0
        union = {"job", "instance"}
        for metric, matchers in found:
            assert set(re.findall(r'(\w+)[=!]~?"', matchers)) <= known[metric] | {"job", "instance"}
            union |= known[metric]
        for by, metric in re.findall(r"by \(([^)]*)\) \((?:\w+\()?(estimate_proxy_\w+)", expr):
            assert set(by.split(", ")) <= known[metric] | {"job", "instance"}
        for labels in re.findall(r"\b(?:by|on|ignoring|group_left) \(([^)]*)\)", expr):
            assert set(filter(None, labels.split(", "))) <= union
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= union, panel["title"]


def test_every_query_filters_by_the_variables() -> None:
    for panel, target in targets():
        for _, matchers in SELECTOR.findall(target["expr"]):
            assert 'job=~"$job", instance=~"$instance"' in matchers, panel["title"]
            assert set(re.findall(r"(\w+=~?)\"\$(\w+)", matchers)) <= {(f"{name}=~", name) for name in VARIABLES}
        of_a_team = [found for found in SELECTOR.findall(target["expr"]) if "team" in metric_labels()[found[0]]]
        if of_a_team and "resets(" not in target["expr"]:
            assert re.search(r'team=~"\$team(\|-)?"', of_a_team[0][1]), panel["title"]


def test_functions_over_time_use_the_matching_range() -> None:
    """`$__range` only ends at the end of the reader's range in an instant query, or with `@ end()`."""
    for panel, target in targets():
        calls = FUNCTION_OVER_RANGE.findall(target["expr"])
        assert len(calls) == target["expr"].count("[")
        for function, window, at_the_end in calls:
            if function == "rate" or window != "$__range":
                assert window == "$__rate_interval", panel["title"]
            else:
                assert target["instant"] or at_the_end, panel["title"]


def test_counters_are_only_read_through_rate_or_increase() -> None:
    for panel, target in targets():
        for before, metric in re.findall(r"(\w+)?\(?\b(estimate_proxy_\w+)\{", target["expr"]):
            growing = before in {"rate", "increase", "resets"}
            assert growing == (metric in metrics_of_kind("counter", "histogram")), panel["title"]


def test_gauges_of_the_ledger_are_never_summed_over_replicas() -> None:
    for panel, target in targets():
        for before, metric in re.findall(r"((?:\w+ by \([^)]*\) |\w+)\()(estimate_proxy_\w+)\{", target["expr"]):
            if metric in metrics_of_kind("ledger"):
                assert re.match(r"(max|min)( by |\()", before), panel["title"]


def test_no_query_replaces_missing_data_by_zero() -> None:
    for panel, target in targets():
        assert "vector(" not in target["expr"], panel["title"]
        assert "absent" not in target["expr"], panel["title"]
        assert ":" not in target["expr"], "recording rules may not be loaded"


def test_dashboards_stay_readable_with_sixty_teams() -> None:
    """Graphs show only the largest teams, and tables have pages."""
    for panel, target in targets():
        if panel["type"] == "table":
            assert panel["options"]["footer"]["enablePagination"]
            assert panel["options"]["sortBy"]
            assert target["instant"]
            assert target["format"] == "table"
        elif set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) & {
            "team",
            "name",
            "model",
            "account",
            "instance",
        }:
            assert re.search(r"\b(topk|bottomk)\(10, ", target["expr"]), panel["title"]


def test_wherever_a_team_is_shown_its_name_is_too() -> None:
    for dashboard in dashboards():
        for panel in panels(dashboard):
            assert not any("{{team}}" in target["legendFormat"] for target in panel["targets"]), panel["title"]
            columns = panel["transformations"][1]["options"]["renameByName"] if panel["type"] == "table" else {}
            assert ("team" in columns) == ("name" in columns), panel["title"]
            by_name = "name" in columns or any("{{name}}" in target["legendFormat"] for target in panel["targets"])
            assert by_name == ("group_left (name)" in panel["targets"][0]["expr"]), panel["title"]


def test_panels_without_a_time_axis_use_instant_queries() -> None:
    for dashboard in dashboards():
        once = {panel["title"]: panel["type"] in {"stat", "table", "piechart"} for panel in panels(dashboard)}
        assert all(query.instant == once[query.panel] for query in queries(dashboard))
        assert all(target["range"] != target["instant"] for panel in panels(dashboard) for target in panel["targets"])


def test_variables_are_replaced_by_the_selected_values() -> None:
    for dashboard in dashboards():
        for query in queries(dashboard, {"job": "gateway", "instance": ".*", "team": "design|web"}):
            assert "$" not in query.expr
            assert 'job=~"gateway", instance=~".*"' in query.expr
    assert any(
        'team=~"design|web|-"' in query.expr for query in queries(dashboards()[0], {**EVERYTHING, "team": "design|web"})
    )


def test_prometheus_can_parse_every_query(tmp_path: Path) -> None:
    promtool = program("promtool", "no query was parsed")
    every = [query for dashboard in dashboards() for query in queries(dashboard)]
    rules = [{"record": f"query:{number}", "expr": query.expr} for number, query in enumerate(every)]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))  # JSON is YAML
    checked = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert f"{len(every)} rules found" in checked.stdout


def test_provisioning_and_its_documentation_name_the_same_folders() -> None:
    provider = (GRAFANA / "provisioning/dashboards/estimate-proxy.yml").read_text()
    documented = (GRAFANA.parent / "docs/dashboards.md").read_text()
    assert "path: /var/lib/grafana/dashboards\n" in provider
    assert "grafana/dashboards:/var/lib/grafana/dashboards" in documented
    assert "grafana/provisioning:/etc/grafana/provisioning" in documented
