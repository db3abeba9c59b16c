"""`/docs` in a browser: it shows the whole OpenAPI document, and its snippets run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from browser import Browser
from gateway_fixture import DESIGN, GatewayFixture
from page_fixture import Page
from programs import program
from proxy.http.openapi.document import openapi_document
from proxy.http.openapi.problems import EXAMPLES

READ = """
const texts = (within, css) => Array.from(within.querySelectorAll(css), (node) => node.textContent);
return Object.fromEntries(Array.from(document.querySelectorAll("section"), (section) => [section.id, {
  title: section.querySelector("h2").textContent,
  text: section.textContent,
  folded: texts(section, "summary"),
  code: Object.fromEntries(Array.from(section.querySelectorAll("details:has(> pre)"), (details) =>
    [details.querySelector("summary").textContent, details.querySelector("pre").textContent])),
}]));
"""


@pytest.fixture
def sections(gateway: GatewayFixture, browser: Browser) -> dict[str, Any]:
    """The sections of the page: by their ids, their titles, whole texts, folded parts and code."""
    browser.open(f"{gateway.url}/docs")
    browser.find("#errors")
    found: dict[str, Any] = browser.run(READ)
    assert browser.errors() == []
    return found


def test_it_is_accessible(gateway: GatewayFixture, browser: Browser) -> None:
    """With one of the sections, which are all made by the same code: axe takes seconds for the whole page."""
    page = Page(browser, gateway.url)
    browser.open(f"{gateway.url}/docs")
    browser.find("#errors")
    browser.run("for (const other of document.querySelectorAll('section:not(#purge)')) other.remove()")
    browser.run("for (const folded of document.querySelectorAll('details')) folded.open = true")
    browser.prefer(prefers_color_scheme="light")
    assert page.serious_findings() == []
    browser.prefer(prefers_color_scheme="dark")
    assert page.serious_findings("color-contrast") == []


def test_it_shows_every_path_parameter_answer_and_error(sections: dict[str, Any]) -> None:
    document = orjson.loads(orjson.dumps(openapi_document()))
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            shown = sections[operation["operationId"]]
            assert shown["title"] == f"{method.upper()} {path}"
            assert operation["summary"] in shown["text"]
            assert operation["description"].replace("`", "") in shown["text"]
            for parameter in operation["parameters"]:
                assert parameter.get("name", "X-Request-Id") in shown["text"]
            answers = [text.partition(" ")[0] for text in shown["folded"]]
            assert [status for status in operation["responses"] if status in answers] == list(operation["responses"])
    assert [text.split(" ")[:2] for text in sections["errors"]["folded"]] == [
        [str(problem.status), problem.code] for problem in EXAMPLES
    ]
    assert "violated-policies" in sections["errors"]["text"]


def test_members_are_shown_with_their_paths(sections: dict[str, Any]) -> None:
    assert "rows[].share_percent" in sections["usage"]["text"].replace("\n", "")
    assert "data.estimated" in sections["estimate"]["text"]


@pytest.mark.parametrize("operation", ["estimate", "usage", "liveness"])
def test_its_snippets_run(gateway: GatewayFixture, sections: dict[str, Any], operation: str, tmp_path: Path) -> None:
    snippets = sections[operation]["code"]
    commands = {
        "curl": ("sh", "snippet.sh"),
        "Python": (sys.executable, "snippet.py"),
        "JavaScript": (program("node", "the snippets in JavaScript were not run"), "snippet.mjs"),
    }
    for language, (interpreter, name) in commands.items():
        (tmp_path / name).write_text(snippets[language])
        environment = {**os.environ, "TOKEN": DESIGN, "NO_PROXY": "*"}
        ran = subprocess.run([interpreter, name], cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert b"200" in ran.stdout
        assert gateway.url.encode() in snippets[language].encode()
