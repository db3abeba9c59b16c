"""The documentation: its links, the files that it names and the log lines that it quotes exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy_files import PROJECT
from metric_names import families

PAGES = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")])
FOLDERS = "bench|deploy|docs|grafana|proxy|scripts|tests"
LOG_LINES = {
    "configuration.md": [
        *("price changed", "price list changed", "a member of cache.ignore decides prices"),
        *("inferred prices contradicted", "price list changed: learned prices are asked again"),
    ],
    "operations.md": ["a new ledger begins", "the ledger was lost", "giving up"],
    "runbook.md": ["upstream fails for the account", "half-opens", "no answer in time", "inferred prices contradicted"],
}
"""Log lines that a page quotes."""


def prose(page: Path) -> str:
    """Returns a page without its code blocks."""
    return re.sub("^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, made by GitHub's rules."""
    headings = re.findall("^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Yields the file and the anchor of each link within the project."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            yield (page.parent / file if file else page), anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_has_an_existing_file_and_heading(page: Path) -> None:
    broken = [f"{file}#{anchor}" for file, anchor in links(page) if not file.exists()]
    assert not broken
    missing = [f"{file}#{anchor}" for file, anchor in links(page) if anchor and anchor not in anchors(file)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_the_project_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(rf"`(?:\./)?((?:{FOLDERS})/[\w./-]*\w/?)[` ]", prose(page))
    assert not [path for path in named if not (PROJECT / path).exists()]


def test_the_architecture_page_names_every_folder_and_top_level_module() -> None:
    table = set(
        re.findall(r"^\| `([a-z_]+(?:/|\.py))` \|", (PROJECT / "docs/architecture.md").read_text(), re.MULTILINE)
    )
    found = {path.name for path in (PROJECT / "proxy").glob("[a-z]*.py")}
    found |= {f"{path.parent.name}/" for path in (PROJECT / "proxy").glob("*/__init__.py")}
    assert table == found


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, lines in LOG_LINES.items() for line in lines])
def test_log_lines_that_a_page_quotes_are_in_the_code(page: str, line: str) -> None:
    assert line in re.sub(r"\s+", " ", (PROJECT / "docs" / page).read_text())
    assert any(line in file.read_text() for file in (PROJECT / "proxy").rglob("*.py"))


def test_the_metrics_page_lists_every_metric_with_its_type_and_labels() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (counter|gauge|histogram) \|([^|]*)\|",
        (PROJECT / "docs/metrics.md").read_text(),
        re.MULTILINE,
    )
    listed = {f"estimate_proxy_{name}": (kind, frozenset(re.findall(r"\w+", labels))) for name, kind, labels in rows}
    assert listed == {name: (family.kind, family.labels) for name, family in families().items()}
    assert len(rows) == len(listed)


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 150
