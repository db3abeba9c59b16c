"""What the usage page makes of documents, in the browser: words about quotas, speed, and a front's path."""

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser import Browser
from gateway_fixture import DESIGN, MARKETING, GatewayFixture
from page_fixture import Page
from serving import NO_TLS, serving

Evaluate = Callable[[str], Any]

DAYS = {"reached_at": "2026-11-14T10:00:00+00:00", "reached_from": "2026-11-11", "reached_until": "2026-11-19"}
AT_END = {"at_end": 3400, "low": 2900, "high": 3912.5}
NEVER: dict[str, str | None] = {"reached_at": None, "reached_from": None, "reached_until": None}


@pytest.fixture
def evaluate(browser: Browser, gateway: GatewayFixture) -> Evaluate:
    """The value of an expression in which `quotas`, `exact`, `usage` and `calendar` are modules of the page."""
    browser.open(f"{gateway.url}/page/icon.svg")

    def value(expression: str) -> Any:
        return browser.driver.execute_async_script(
            f"const [base, done] = arguments; Promise.all(['quotas', 'exact', 'usage', 'calendar'].map((name) =>"
            f" import(`${{base}}/page/${{name}}.js`))).then(([quotas, exact, usage, calendar]) => done({expression}))",
            gateway.url,
        )

    return value


def test_a_forecast_is_a_date_and_a_range_in_words(evaluate: Evaluate) -> None:
    cases: dict[str, dict[str, str | None]] = {
        "Reached about 14 November, between 11 November and 19 November.": {**DAYS},
        "Reached about 14 November, at the earliest on 11 November, perhaps not at all.": {
            **DAYS,
            "reached_until": None,
        },
        "Probably not reached before it resets: about 3,400 (2,900 to 3,910) by then. "
        "At the earliest on 11 November.": {**NEVER, "reached_from": "2026-11-11"},
        "Not reached before it resets: about 3,400 (2,900 to 3,910) by then.": NEVER,
    }
    quota = {"limit": "5000", "used": "1", "resets_at": "2026-12-01T00:00:00+00:00"}
    for words, forecast in cases.items():
        document = json.dumps({**quota, "forecast": {**AT_END, **forecast}})
        assert evaluate(f"quotas.forecastInWords({document}, 'UTC')") == words
    assert evaluate(f"quotas.forecastInWords({json.dumps(quota)}, 'UTC')") is None
    used_up = json.dumps({**quota, "used": "5000"})
    assert evaluate(f"quotas.forecastInWords({used_up}, 'UTC')") == "Reached. Resets on 1 December."


LEVELS = {"49.999999": "", "50": "half", "80": "high", "94.99": "high", "95": "critical", "100": "full"}


def test_quotas_stand_out_at_50_80_and_95_percent(evaluate: Evaluate) -> None:
    given = json.dumps([{"used": used, "limit": "100"} for used in LEVELS])
    assert evaluate(f"{given}.map((quota) => quotas.levelOf(quota).name)") == list(LEVELS.values())


def test_pace_is_compared_with_an_even_use(evaluate: Evaluate) -> None:
    window = "per: 'month', window_start: '2026-11-01T00:00:00Z', resets_at: '2026-12-01T00:00:00Z'"
    for used, words in {"50": "even", "60": "20 % above even", "25": "50 % below even", "0": "not used yet"}.items():
        quota = f"{{ used: '{used}', limit: '100', {window} }}"
        assert evaluate(f"quotas.paceInWords(quotas.paceOf({quota}, new Date('2026-11-16T00:00:00Z')))") == words
    assert evaluate("quotas.paceOf({ per: 'minute' }, new Date())") is None


def test_numbers_are_read_from_the_text(evaluate: Evaluate) -> None:
    document = {"big": 1, "text": 'a "quoted":1.5 name: 2.50, "x":3', "none": None, "end\\": "7", "deep": [{"d": -0.5}]}
    text = json.dumps(json.dumps(document).replace('"big": 1', '"big":9007199254740993.000001').replace('": ', '":'))
    expected = {**document, "big": "9007199254740993.000001", "deep": [{"d": "-0.5"}]}
    assert evaluate(f"exact.parseExact({text})") == expected
    assert evaluate("exact.shownCredits(exact.microOf('9007199254740993.000001'))") == "9,007,199,254,740,993.000001"
    assert evaluate("exact.textOf(exact.microOf('-0.5'))") == "-0.5"


def test_400_days_of_50_models_are_shown(browser: Browser, gateway: GatewayFixture) -> None:
    page = Page(browser, gateway.url)
    page.open(token=DESIGN)
    script = """
      const done = arguments[0];
      Promise.all(['usage', 'exact', 'sections'].map((name) => import(`/page/${name}.js`))).then(async (modules) => {
        const [{ prepared }, { parseExact }, { UsageSection, RefusalSection, showCache }] = modules;
        const days = [...Array(400).keys()].map((at) => new Date(Date.UTC(2025, 0, 1 + at)).toISOString().slice(0, 10));
        const outcomes = { hit: 30, inferred: 12, stale: 1, miss: 9, 'rate-limited': 2, 'upstream-error': 1 };
        const row = (day, at) => ({ day, model: `model ${at}`, requests: 53, refused: 2, estimated_credits: at + 0.25,
          outcomes, share_percent: 2, upstream_calls_saved: 42, upstream_seconds_saved: 10.5 });
        const rows = days.flatMap((day) => [...Array(50).keys()].map((at) => row(day, at)));
        const total = { ...rows[0], estimated_credits: 400 * 1237.5 };
        const text = JSON.stringify({ from: days[0], to: days.at(-1), rows, total });
        const state = { by: 'day', group: 'model', table: 'intervals', sort: '-interval', cumulative: '', model: '' };
        const sections = [new UsageSection(() => {}), new RefusalSection()];
        window.show = async () => {
          const document = prepared(parseExact(text));
          sections.forEach((section) => section.show(document, state));
          showCache(document);
          await new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn)));
          return rows.length;
        };
        done(await window.show());
      });
    """
    rows = browser.driver.execute_async_script(script)
    assert rows == 20_000
    assert len(page.table("#usage-table")) == 401


def test_it_works_under_a_path_of_a_front(browser: Browser, gateway: GatewayFixture) -> None:
    async def front(request: Request) -> Response:
        path = request.url.path.removeprefix("/tools/estimates")
        async with httpx2.AsyncClient(base_url=gateway.url, trust_env=False, verify=NO_TLS) as client:
            sent = {name: value for name, value in request.headers.items() if name not in ("host", "accept-encoding")}
            found = await client.get(f"{path}?{request.url.query}".rstrip("?"), headers=sent)
        made_anew = ("content-length", "content-encoding", "date")
        kept = {name: value for name, value in found.headers.items() if name not in made_anew}
        return Response(found.content, found.status_code, kept)

    with serving(Starlette(routes=[Route("/tools/estimates/{path:path}", front)])) as url:
        page = Page(browser, f"{url}/tools/estimates")
        page.open(token=MARKETING)
        assert browser.text("#who") == "Team marketing"
        page.choose("by", "week")
        assert browser.driver.current_url == f"{url}/tools/estimates/?by=week&group=model"
        assert not [error for error in browser.errors() if "favicon.ico" not in error]


def test_a_team_asks_what_a_body_would_cost(browser: Browser, gateway: GatewayFixture) -> None:
    page = Page(browser, gateway.url)
    page.open(token=DESIGN)
    browser.click("#quote-form button")
    browser.wait_for_text("#quote-result", "this body")
    (_, shown) = page.table("#quote-result")
    body = browser.run("return document.getElementById('quote-body').value")
    asked = gateway.client.post("/v1/quote", content=f'{{"variants":[{{"label":"x","body":{body}}}]}}').json()
    assert shown[:2] == ["this body", str(asked["variants"][0]["estimated"])]
    browser.run("document.getElementById('quote-body').value = '[{'")
    browser.click("#quote-form button")
    wait_for = "not valid JSON"
    browser.wait_for_text("#quote-result .error", wait_for)
