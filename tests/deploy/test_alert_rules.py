"""Prometheus' config, recording rules and alerts: what Prometheus' own promtool says of them, and what it cannot know.

It cannot know which metrics and labels there are, whether each alert was tried in both directions, and whether somebody
who is woken up finds a page to read.
"""

import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from alert_rules import ALERTS, FOLDER, RECORDED, RULES
from deploy_files import PROJECT, said_by
from metric_names import metric_labels
from programs import program

CASES = sorted((FOLDER / "tests").glob("*.yml"))
RUNBOOK = PROJECT / "docs" / "runbook.md"

TOKEN_FILE = "/run/secrets/estimate_proxy_metrics_token"
SEVERITIES = {"critical", "warning", "info"}
SCRAPED = {"job", "instance"}
"""Labels that Prometheus gives to whatever it scrapes."""

SHORT = {"quota": ("scope", "team", "measure", "per")}
"""What stands for several labels in the level of a recorded name."""


# --- what the files hold ----------------------------------------------------------------------------------------


each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
each_file = pytest.mark.parametrize("file", CASES, ids=lambda path: path.stem)
each_rule = pytest.mark.parametrize("rule", RECORDED + ALERTS, ids=lambda rule: rule.get("record", rule.get("alert")))


def labels_of(metric: str) -> set[str]:
    """The labels of a series; those of a recorded one stand in the level of its name."""
    if metric == "up":
        return SCRAPED
    if ":" not in metric:
        return metric_labels()[metric] | SCRAPED
    level, _, _ = metric.partition(":")
    return {label for word in level.split("_") for label in SHORT.get(word, (word,))}


def union(sets: Iterable[set[str]]) -> set[str]:
    return set().union(*sets)


def known_metrics() -> set[str]:
    return {"up", *metric_labels(), *(rule["record"] for rule in RECORDED)}


# --- reading expressions ----------------------------------------------------------------------------------------

_STRING = re.compile(r'"[^"]*"')
_LABEL_LIST = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"([a-z][\w:]*)\s*\{([^}]*)\}")
_DURATION = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
_WORD = re.compile(r"\b[a-z][\w:]*\b(?!\s*\()")
_OPERATORS = {"and", "or", "unless", "bool"}


def bare(expression: str) -> str:
    """An expression without its strings: what is left has no other quotation marks, braces or brackets in it."""
    return _STRING.sub('""', expression)


def metrics_in(expression: str) -> set[str]:
    text = _LABEL_LIST.sub("", bare(expression))
    text = _SELECTOR.sub(r"\1", _DURATION.sub("", text))
    return set(_WORD.findall(text)) - _OPERATORS


def matched_labels(expression: str) -> Iterator[tuple[str, str]]:
    """Each metric with a label by which its series are chosen."""
    for metric, matchers in _SELECTOR.findall(bare(expression)):
        for label in re.findall(r"(\w+)\s*[=!]", matchers):
            yield metric, label


def grouped_labels(expression: str) -> set[str]:
    lists = (labels for _, labels in _LABEL_LIST.findall(bare(expression)))
    return {label.strip() for labels in lists for label in labels.split(",") if label.strip()}


def queries_in(rule: dict[str, Any]) -> list[str]:
    """The expressions that the texts of an alert ask."""
    return re.findall(r'\bquery \(printf\s+"([^"]*)"', " ".join(rule.get("annotations", {}).values()))


def test_expressions_are_read_as_prometheus_reads_them() -> None:
    expression = """
        sum by (job, team) (increase(a_total{x="}(y", z!~"b"}[5m])) > 0
        unless on (job) l:b:max offset 1w
        or c
    """
    assert metrics_in(expression) == {"a_total", "l:b:max", "c"}
    assert set(matched_labels(expression)) == {("a_total", "x"), ("a_total", "z")}
    assert grouped_labels(expression) == {"job", "team"}


def test_queries_of_texts_are_found() -> None:
    rule = {"annotations": {"summary": "a", "description": '{{ with query (printf\n  "a{b=%q}" .c) }}x{{ end }}'}}
    assert queries_in(rule) == ["a{b=%q}"]
    texts = [note for alert in ALERTS for note in alert["annotations"].values()]
    assert sum(len(queries_in(alert)) for alert in ALERTS) == sum(text.count("query") for text in texts) > 0


# --- what promtool says -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def promtool() -> str:
    return program("promtool", "Prometheus' rules and config were not checked")


def test_rules_are_well_formed(promtool: str) -> None:
    assert "SUCCESS" in said_by(promtool, "check", "rules", "--lint=all", "--lint-fatal", *RULES)


@each_file
def test_rules_do_what_their_cases_say(promtool: str, file: Path) -> None:
    assert "SUCCESS" in said_by(promtool, "test", "rules", file)


def test_the_config_is_well_formed(promtool: str, tmp_path: Path) -> None:
    """With a token, and with nothing else changed: promtool looks for the file."""
    folder = shutil.copytree(FOLDER, tmp_path / "prometheus")
    config, token = folder / "prometheus.yml", tmp_path / "token"
    token.write_text("ep_token")
    text = config.read_text()
    assert text.count(TOKEN_FILE) == 1
    config.write_text(text.replace(TOKEN_FILE, str(token)))
    said = said_by(promtool, "check", "config", "--lint=all", "--lint-fatal", config)
    assert said.count("rules found") == len(RULES)


# --- what promtool cannot know ----------------------------------------------------------------------------------


@each_rule
def test_expressions_use_what_gateways_serve(rule: dict[str, Any]) -> None:
    for expression in (rule["expr"], *queries_in(rule)):
        metrics = metrics_in(expression)
        assert metrics <= known_metrics()
        for metric, label in matched_labels(expression):
            assert label in labels_of(metric), f"{metric} has no label {label}"
        assert grouped_labels(expression) <= union(map(labels_of, metrics))


def test_recorded_names_say_level_metric_and_operations() -> None:
    labels = union(metric_labels().values()) | SCRAPED
    for name in (rule["record"] for rule in RECORDED):
        assert re.fullmatch(r"[a-z_]+:estimate_proxy_[a-z_]+:[a-z0-9_]+", name)
        assert labels_of(name) <= labels, name


def test_alerts_have_names_of_their_own() -> None:
    names = [alert["alert"] for alert in ALERTS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("EstimateProxy") for name in names)


@each_alert
def test_alerts_say_how_urgent_what_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in SEVERITIES
    assert alert["for"]
    notes = alert["annotations"]
    assert notes.keys() == {"summary", "description", "runbook_url"}
    assert all("spent" not in note.lower() for note in notes.values()), "estimated is what is known here"
    assert notes["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"


def sections() -> dict[str, str]:
    """The runbook by headings of alerts."""
    parts = re.split(r"^### (\w+)\n", RUNBOOK.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_runbook_has_a_section_for_each_alert_and_no_other() -> None:
    assert sorted(sections()) == sorted(alert["alert"] for alert in ALERTS)


@each_alert
def test_sections_say_what_it_means_where_to_look_and_what_to_do(alert: dict[str, Any]) -> None:
    for question in ("Means", "Look", "Do"):
        assert f"* **{question}.** " in sections()[alert["alert"]]


def test_links_within_the_runbook_lead_to_sections() -> None:
    anchors = {heading.lower() for heading in sections()}
    links = set(re.findall(r"\]\(#([^)]*)\)", RUNBOOK.read_text()))
    assert links
    assert links <= anchors


# --- what the cases try -----------------------------------------------------------------------------------------


def cases() -> Iterator[dict[str, Any]]:
    """All tests of all files."""
    for file in CASES:
        yield from yaml.safe_load(file.read_text())["tests"]


def tried() -> dict[str, set[bool]]:
    """Each alert with whether there is a case in which it fires, and one in which it does not."""
    found: dict[str, set[bool]] = defaultdict(set)
    for test in cases():
        for case in test.get("alert_rule_test", ()):
            found[case["alertname"]].add(bool(case["exp_alerts"]))
    return found


@each_alert
def test_each_alert_was_seen_to_fire_and_to_keep_quiet(alert: dict[str, Any]) -> None:
    assert tried()[alert["alert"]] == {True, False}


def test_cases_are_about_alerts_that_exist() -> None:
    assert tried().keys() <= {alert["alert"] for alert in ALERTS}


def test_cases_feed_series_that_gateways_serve() -> None:
    """A series with a label too few, or of another name, would try a rule on what never comes."""
    for series in (given["series"] for test in cases() for given in test["input_series"]):
        metric, _, matchers = series.partition("{")
        assert metric in known_metrics(), series
        assert set(re.findall(r"(\w+)=", bare(matchers))) <= labels_of(metric), series


def test_each_recorded_series_is_tried_or_feeds_an_alert() -> None:
    asked = [test["expr"] for case in cases() for test in case.get("promql_expr_test", ())]
    used = union(metrics_in(expression) for expression in (*asked, *(alert["expr"] for alert in ALERTS)))
    assert {rule["record"] for rule in RECORDED} <= used | union(metrics_in(rule["expr"]) for rule in RECORDED)


@each_file
def test_an_order_of_groups_names_all_of_them(file: Path) -> None:
    """Promtool evaluates first what an order leaves out."""
    order = yaml.safe_load(file.read_text()).get("group_eval_order")
    groups = {group["name"] for rules_file in RULES for group in yaml.safe_load(rules_file.read_text())["groups"]}
    assert order is None or set(order) == groups
