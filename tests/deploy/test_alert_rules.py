"""Prometheus' config, recording rules and alerts, checked by promtool and by rules that promtool lacks.

These are: every metric and label exists, a test case makes each alert fire and another one does not, and each alert has
a section in the runbook.
"""

import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
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
"""Labels that Prometheus adds to every scraped series."""

SHORT = {"quota": ("scope", "team", "measure", "per")}
"""Abbreviations for several labels in the level of a recorded name."""


# --- content of the files ----------------------------------------------------------------------------------------


@cache
def content_of(file: Path) -> dict[str, Any]:
    """Returns the content of a YAML file. Reading all of them takes a second, and most tests need them."""
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    return content


def name_of(rule: dict[str, Any]) -> str:
    name: str = rule.get("record") or rule["alert"]
    return name


each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
each_file = pytest.mark.parametrize("file", CASES, ids=lambda path: path.stem)
each_rule = pytest.mark.parametrize("rule", RECORDED + ALERTS, ids=name_of)


def labels_of(metric: str) -> set[str]:
    """Returns the labels of a series. The name of a recorded series lists them in its level."""
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


def without_strings(expression: str) -> str:
    """Returns an expression without its strings, so no quotation mark, brace or bracket of a string is left."""
    return _STRING.sub('""', expression)


def metrics_in(expression: str) -> set[str]:
    text = _LABEL_LIST.sub("", without_strings(expression))
    text = _SELECTOR.sub(r"\1", _DURATION.sub("", text))
    return set(_WORD.findall(text)) - _OPERATORS


def matched_labels(expression: str) -> Iterator[tuple[str, str]]:
    """Yields each metric with a label that a matcher uses."""
    for metric, matchers in _SELECTOR.findall(without_strings(expression)):
        for label in re.findall(r"(\w+)\s*[=!]", matchers):
            yield metric, label


def grouped_labels(expression: str) -> set[str]:
    lists = (labels for _, labels in _LABEL_LIST.findall(without_strings(expression)))
    return {label.strip() for labels in lists for label in labels.split(",") if label.strip()}


def queries_in(rule: dict[str, Any]) -> list[str]:
    """Returns the queries in an alert's annotations."""
    return re.findall(r'\bquery \(printf\s+"([^"]*)"', " ".join(rule.get("annotations", {}).values()))


def test_expressions_are_parsed_like_prometheus_parses_them() -> None:
    expression = """
        sum by (job, team) (increase(a_total{x="}(y", z!~"b"}[5m])) > 0
        unless on (job) l:b:max offset 1w
        or c
    """
    assert metrics_in(expression) == {"a_total", "l:b:max", "c"}
    assert set(matched_labels(expression)) == {("a_total", "x"), ("a_total", "z")}
    assert grouped_labels(expression) == {"job", "team"}


def test_queries_in_annotations_are_found() -> None:
    rule = {"annotations": {"summary": "a", "description": '{{ with query (printf\n  "a{b=%q}" .c) }}x{{ end }}'}}
    assert queries_in(rule) == ["a{b=%q}"]
    texts = [note for alert in ALERTS for note in alert["annotations"].values()]
    assert sum(len(queries_in(alert)) for alert in ALERTS) == sum(text.count("query") for text in texts) > 0


# --- checked by promtool -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def promtool() -> str:
    return program("promtool", "Prometheus' rules and config were not checked")


def test_rules_are_well_formed(promtool: str) -> None:
    assert "SUCCESS" in said_by(promtool, "check", "rules", "--lint=all", "--lint-fatal", *RULES)


@each_file
def test_rules_pass_their_promtool_cases(promtool: str, file: Path, tmp_path: Path) -> None:
    """Runs them with the rules that can affect them: promtool evaluates each rule at each moment, which takes long."""
    wanted = rules_for(content_of(file))
    folder = shutil.copytree(FOLDER, tmp_path / "prometheus")
    for rules_file in folder.glob("rules/*.yml"):
        groups = yaml.safe_load(rules_file.read_text())["groups"]
        for group in groups:
            group["rules"] = [rule for rule in group["rules"] if name_of(rule) in wanted]
        rules_file.write_text(yaml.safe_dump({"groups": groups}))
    assert "SUCCESS" in said_by(promtool, "test", "rules", folder / "tests" / file.name)


def rules_for(content: dict[str, Any]) -> set[str]:
    """Returns the names of the tested alerts, of the queried series, and of the series that these depend on."""
    wanted = {case["alertname"] for test in content["tests"] for case in test.get("alert_rule_test", ())}
    wanted |= union(metrics_in(case["expr"]) for test in content["tests"] for case in test.get("promql_expr_test", ()))
    known: set[str] = set()
    while new := wanted - known:
        known |= new
        for rule in RECORDED + ALERTS:
            if name_of(rule) in new:
                wanted = wanted | union(map(metrics_in, (rule["expr"], *queries_in(rule))))
    return wanted


def test_an_alert_is_tested_with_all_that_it_depends_on() -> None:
    assert {rule.get("record") for rule in RECORDED} & rules_for(
        {"tests": [{"alert_rule_test": [{"alertname": "EstimateProxyRefusedByQuota"}]}]}
    ) == {
        "job_quota:estimate_proxy_quota_limit:max",
        "job_quota:estimate_proxy_quota_used:exhausted",
        "job_quota:estimate_proxy_quota_used:max",
        "job_quota:estimate_proxy_quota_used:ratio",
    }


def test_the_config_is_well_formed(promtool: str, tmp_path: Path) -> None:
    """Creates the token file, because promtool checks that it exists."""
    folder = shutil.copytree(FOLDER, tmp_path / "prometheus")
    config, token = folder / "prometheus.yml", tmp_path / "token"
    token.write_text("ep_token")
    text = config.read_text()
    assert text.count(TOKEN_FILE) == 1
    config.write_text(text.replace(TOKEN_FILE, str(token)))
    said = said_by(promtool, "check", "config", "--lint=all", "--lint-fatal", config)
    assert said.count("rules found") == len(RULES)


# --- not checked by promtool ----------------------------------------------------------------------------------


@each_rule
def test_expressions_use_only_metrics_of_the_gateway(rule: dict[str, Any]) -> None:
    for expression in (rule["expr"], *queries_in(rule)):
        metrics = metrics_in(expression)
        assert metrics <= known_metrics()
        for metric, label in matched_labels(expression):
            assert label in labels_of(metric), f"{metric} has no label {label}"
        assert grouped_labels(expression) <= union(map(labels_of, metrics))


def test_names_of_recorded_series_consist_of_level_metric_and_operations() -> None:
    labels = union(metric_labels().values()) | SCRAPED
    for name in (rule["record"] for rule in RECORDED):
        assert re.fullmatch(r"[a-z_]+:estimate_proxy_[a-z_]+:[a-z0-9_]+", name)
        assert labels_of(name) <= labels, name


def test_names_of_alerts_are_unique() -> None:
    names = [alert["alert"] for alert in ALERTS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("EstimateProxy") for name in names)


@each_alert
def test_alerts_have_a_severity_texts_and_a_runbook_link(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in SEVERITIES
    assert alert["for"]
    notes = alert["annotations"]
    assert notes.keys() == {"summary", "description", "runbook_url"}
    assert all("spent" not in note.lower() for note in notes.values()), "credits are only estimated"
    assert notes["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"


def sections() -> dict[str, str]:
    """The runbook's sections, by alert."""
    parts = re.split(r"^### (\w+)\n", RUNBOOK.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_runbook_has_exactly_one_section_for_each_alert() -> None:
    assert sorted(sections()) == sorted(alert["alert"] for alert in ALERTS)


@each_alert
def test_sections_have_meaning_diagnosis_and_action(alert: dict[str, Any]) -> None:
    for question in ("Means", "Look", "Do"):
        assert f"* **{question}.** " in sections()[alert["alert"]]


def test_links_within_the_runbook_lead_to_sections() -> None:
    anchors = {heading.lower() for heading in sections()}
    links = set(re.findall(r"\]\(#([^)]*)\)", RUNBOOK.read_text()))
    assert links
    assert links <= anchors


# --- coverage of the cases -----------------------------------------------------------------------------------------


def cases() -> Iterator[dict[str, Any]]:
    """Returns all promtool test cases of all files."""
    for file in CASES:
        yield from content_of(file)["tests"]


def alerts_with_cases() -> dict[str, set[bool]]:
    """Returns each tested alert with whether the case expects it to fire."""
    found: dict[str, set[bool]] = defaultdict(set)
    for test in cases():
        for case in test.get("alert_rule_test", ()):
            found[case["alertname"]].add(bool(case["exp_alerts"]))
    return found


@each_alert
def test_each_alert_has_a_case_that_fires_and_one_that_does_not(alert: dict[str, Any]) -> None:
    assert alerts_with_cases()[alert["alert"]] == {True, False}


def test_cases_name_alerts_that_exist() -> None:
    assert alerts_with_cases().keys() <= {alert["alert"] for alert in ALERTS}


def test_cases_feed_only_series_of_the_gateway() -> None:
    """A series with a missing label or a wrong name would test a rule on data that never exists."""
    for series in (given["series"] for test in cases() for given in test["input_series"]):
        metric, _, matchers = series.partition("{")
        assert metric in known_metrics(), series
        assert set(re.findall(r"(\w+)=", without_strings(matchers))) <= labels_of(metric), series


def test_each_recorded_series_is_tested_or_feeds_an_alert() -> None:
    asked = [test["expr"] for case in cases() for test in case.get("promql_expr_test", ())]
    used = union(metrics_in(expression) for expression in (*asked, *(alert["expr"] for alert in ALERTS)))
    assert {rule["record"] for rule in RECORDED} <= used | union(metrics_in(rule["expr"]) for rule in RECORDED)


@each_file
def test_an_evaluation_order_names_all_groups(file: Path) -> None:
    """Promtool evaluates groups that the order leaves out first."""
    order = content_of(file).get("group_eval_order")
    groups = {group["name"] for rules_file in RULES for group in content_of(rules_file)["groups"]}
    assert order is None or set(order) == groups
