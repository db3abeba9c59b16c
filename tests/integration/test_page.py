"""The usage page in a browser, with a real gateway and ledger."""

import csv
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import date, timedelta
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from browser import Browser
from faulty_proxy import HEALTHY, proxy_to
from gateway_fixture import DESIGN, MARKETING, GatewayFixture, OpenGateway, settings
from page_fixture import (
    STORED,
    VIEWER,
    Answers,
    Ledger,
    Page,
    Seen,
    amount,
    book,
    credits_of,
    random_ledger,
    sums_of,
    today,
)
from proxy.auth import digest_of, token_of
from quota_fixture import ADMIN, exactly, get, quota, requests
from serving import wait_until

EVIL = '<img src=x onerror="document.title=1">=1+1'
UNKNOWN = token_of("u" * 32)
TEAMS = ("design", "marketing")
SECTIONS: dict[str, Any] = {
    "admin": {"tokens": [digest_of(ADMIN)]},
    "viewer": {"tokens": [digest_of(VIEWER)]},
    "org": {"quotas": [quota(10**9)]},
    "teams": {
        "design": {
            "name": "Die Designer",
            "tokens": [{"sha256": digest_of(DESIGN), "expires": "2999-12-31"}],
            "quotas": [quota(1000), requests(0, "day", "warn")],
        },
        "marketing": {"name": EVIL, "tokens": [digest_of(MARKETING)], "quotas": [quota(5 * 10**8)]},
    },
}

A_LEDGER: Ledger = {
    (today(), "design"): {"Flux:hit:requests": 3, "Flux:hit:credits": 900_000_001, "-:rate-limited:refused": 4},
    (today(), "marketing"): {"Flux:miss:requests": 1, "Flux:miss:credits": 2_750_000, "SDXL:hit:requests": 1},
    (today() - timedelta(days=1), "design"): {"SDXL:miss:requests": 1, "SDXL:miss:credits": 10**15 + 1},
    (today() - timedelta(days=3), "design"): {"Flux:inferred:requests": 2, "Flux:inferred:credits": 5},
    (today() - timedelta(days=60), "former"): {"Flux:hit:requests": 1, "Flux:hit:credits": 7_000_000},
}


@pytest.fixture
def gateway(open_gateway: OpenGateway) -> GatewayFixture:
    opened = open_gateway(**SECTIONS)
    book(opened.store, A_LEDGER)
    return opened


@pytest.fixture
def page(browser: Browser, gateway: GatewayFixture) -> Iterator[Page]:
    """The page; its console must stay empty but for the answers to requests that fail."""
    yield Page(browser, gateway.url)
    errors = [error for error in browser.errors() if "Failed to load resource" not in error]
    assert errors == []


class TestSigningIn:
    def test_a_wrong_token_is_refused_in_words_and_not_kept(self, page: Page) -> None:
        page.open()
        assert "They are not what RenderNet has charged" in " ".join(page.text().split())
        page.sign_in(UNKNOWN)
        page.browser.wait_for_text("#token-error", "The token is unknown or mistyped")
        page.sign_in("späte")
        page.browser.wait_for_text("#token-error", "a token begins with ep_")
        assert page.browser.run("return sessionStorage.length") == 0

    def test_the_token_is_in_this_tabs_storage_and_nowhere_else(
        self, page: Page, caplog: pytest.LogCaptureFixture
    ) -> None:
        page.open()
        page.sign_in(DESIGN)
        page.wait_until_drawn()
        assert page.browser.run("return sessionStorage.getItem(arguments[0])", STORED) == DESIGN
        assert page.browser.run("return localStorage.length + document.cookie.length") == 0
        requested = page.browser.run("return performance.getEntries().map(({ name }) => name)")
        assert not [text for text in (*requested, page.browser.driver.current_url, caplog.text) if DESIGN in text]
        assert DESIGN not in page.browser.run("return document.documentElement.outerHTML")
        page.browser.click("#sign-out")
        assert page.browser.run("return sessionStorage.length") == 0
        assert "Die Designer" not in page.text()

    def test_each_role_sees_what_it_may(self, page: Page) -> None:
        page.open(token=VIEWER)
        assert page.browser.text("#who") == "All teams, viewer token"
        assert "viewer token is enough" not in page.text()
        page.open(token=ADMIN)
        assert "A viewer token is enough for this page" in page.text()
        page.open(token=DESIGN)
        assert page.browser.text("#who") == "Team Die Designer, token works until 2999-12-31"

    def test_a_team_never_sees_another(self, page: Page) -> None:
        for query in ("", "?group=team&team=marketing", "?period=400d&table=intervals"):
            page.open(query, DESIGN)
            whole = page.browser.run("return document.documentElement.outerHTML + performance.getEntries().join()")
            assert "marketing" not in whole
            assert "former" not in whole
            assert "onerror" not in whole

    def test_a_token_that_expires_is_asked_for_again(self, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
        page.open("?by=week", DESIGN)
        monkeypatch.setattr("proxy.auth.Credential.works_on", lambda *_: False)
        page.browser.click("#refresh")
        page.browser.wait_for_text("#token-error", "The token has expired")
        assert page.browser.run("return sessionStorage.length") == 0
        monkeypatch.undo()
        page.sign_in(DESIGN)
        page.wait_until_drawn()
        assert page.browser.driver.current_url.endswith("/?by=week")


class TestLooking:
    def test_a_link_shows_the_same_again(self, page: Page) -> None:
        page.open(token=VIEWER)
        page.choose("period", "90d")
        page.choose("by", "week")
        page.choose("group", "model")
        page.choose("team", "design")
        page.browser.click("#cumulative")
        page.browser.click("#usage-table [data-key=sort-requests]")
        shown = page.table("#usage-table")
        url = page.browser.driver.current_url
        assert url.endswith("/?period=90d&by=week&group=model&team=design&sort=-requests&cumulative=yes")
        page.open(url.rpartition("/")[2], VIEWER)
        assert page.table("#usage-table") == shown
        assert page.browser.run("return document.getElementById('cumulative').checked")
        assert page.browser.text("#chart-title") == "Estimated credits by model, cumulative"
        page.browser.driver.back()

    def test_a_link_to_a_team_that_is_gone_shows_everything_and_says_so(self, page: Page) -> None:
        page.open("?period=90d&team=nobody", VIEWER)
        page.browser.wait_for_text("#banner", "The page shows everything instead.")
        assert "nobody" in page.browser.text("#banner")
        assert page.browser.driver.current_url == f"{page.url}/"

    def test_rows_sort_in_both_directions(self, page: Page) -> None:
        page.open("?period=90d", VIEWER)
        orders = []
        for _ in range(2):
            page.browser.click("#usage-table [data-key=sort-name]")
            orders.append([row[0] for row in page.table("#usage-table tbody")])
        assert orders[0] == sorted(orders[0])
        assert orders[1] == orders[0][::-1]
        assert page.browser.run("return document.activeElement.dataset.key") == "sort-name"

    def test_filters_narrow_every_number(self, page: Page) -> None:
        page.open("?period=90d&team=design&model=Flux", VIEWER)
        assert page.table("#usage-table")[1:] == [
            ["Die Designer design", "5", "0", "900.000006", "100 %", "100 %"],
            ["Total", "5", "0", "900.000006", "", "100 %"],
        ]
        assert page.cards()[0] == "900.000001"
        assert "have no model" in page.browser.text("#refusal-text")
        page.browser.click("#clear")
        page.wait_until_drawn()
        assert "former" in page.text()

    def test_what_is_shown_can_be_saved(self, page: Page, tmp_path: Path) -> None:
        driver = page.browser.driver
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
        page.open("?period=90d&sort=name", VIEWER)
        first, last = today() - timedelta(days=89), today()
        assert _saved(page, tmp_path / f"usage-by-team-{first}-{last}.csv") == [
            ["team", "team_name", "requests", "refused", "estimated_credits", "share_percent", "from_cache_percent"],
            ["marketing", EVIL, "2", "0", "2.75", "0", "50"],
            ["design", "Die Designer", "6", "4", "1000000900.000007", "99.9", "83.3"],
            ["former", "", "1", "0", "7", "0", "100"],
        ]
        page.choose("table", "intervals")
        rows = _saved(page, tmp_path / f"usage-by-day-{first}-{last}.csv")
        assert rows[:3] == [
            ["day", "total", "design", "former", "marketing"],
            [str(last), "902.750001", "900.000001", "", "2.75"],
            [str(last - timedelta(days=1)), "1000000000.000001", "1000000000.000001", "", ""],
        ]

    def test_no_data_is_not_0(self, page: Page, gateway: GatewayFixture) -> None:
        page.open("?table=intervals&period=7d", VIEWER)
        rows = page.table("#usage-table")
        assert rows[0] == ["Day", "Total", "Die Designer", EVIL]
        assert [row[1:] for row in rows[1:5]] == [
            ["902.750001", "900.000001", "2.75"],
            ["1,000,000,000.000001", "1,000,000,000.000001", ""],
            ["", "", ""],
            ["0.000005", "0.000005", ""],
        ]
        book(gateway.store, {})
        page.browser.click("#refresh")
        page.wait_until_drawn()
        assert page.cards() == [""] * 12
        assert "No data: nothing was estimated in this period." in page.text()
        assert " 0 " not in f" {page.browser.text('#chart-total')} "

    def test_a_bar_is_read_with_the_keyboard(self, page: Page) -> None:
        page.open("?period=7d", VIEWER)
        page.browser.run("document.querySelector('#chart .plot').focus()")
        page.browser.find("#chart .plot").send_keys("\ue012")  # the left arrow key
        status = page.browser.run("return document.querySelector('#chart [role=status]').textContent")
        assert status.startswith(f"{today():%a} {today().day} {today():%b %Y}: 902.750001; Die Designer: 900.000001")

    def test_quotas_stand_out_and_say_how_fast_they_are_used(self, page: Page) -> None:
        page.open(token=DESIGN)
        rows = {row[0]: row[1:] for row in page.table("#quotas tbody")}
        assert rows["Die Designer\nRequests per day; only warns"][3] == "Every request is refused."
        used = rows["Die Designer\nEstimated credits per month"]
        assert "used up" in used[0] or "over 80 %" in used[0]
        assert "above even" in used[2] or "times even use" in used[2] or "below even" in used[2]


def _saved(page: Page, file: Path) -> list[list[str]]:
    """The rows of the CSV that the page saves."""
    page.browser.click("#csv")
    wait_until(lambda: file.exists() and file.stat().st_size)
    return list(csv.reader(StringIO(file.read_text("utf-8"), newline="")))


def test_names_are_text(page: Page) -> None:
    page.open("?period=90d", VIEWER)
    assert f"{EVIL} marketing" in [row[0] for row in page.table("#usage-table")]
    assert page.browser.run("return document.title") == "Usage · estimate-proxy"


def test_every_number_is_that_of_the_api(page: Page, gateway: GatewayFixture) -> None:
    chance = random.Random(19)
    page.open("?period=90d&by=week", VIEWER)
    for _ in range(5):
        ledger = random_ledger(chance, ("design", "marketing", "former", "a-b"), 75)
        book(gateway.store, ledger)
        page.browser.run("document.getElementById('refresh').click()")
        page.wait_until_drawn()
        usage = get(gateway, f"/v1/usage?by=team&from={today() - timedelta(days=89)}", VIEWER)
        _compare(page.read(), ledger, exactly(usage), exactly(get(gateway, "/v1/quota", VIEWER)))


def test_every_number_is_exact_for_many_ledgers(page: Page) -> None:
    """200 ledgers, whose documents are written by the endpoints' own functions: storing them would take a minute."""
    chance = random.Random(20)
    ledgers = [random_ledger(chance, ("design", "marketing", "former", "a-b"), 75) for _ in range(200)]
    page.open("?period=90d&by=week", VIEWER)
    configured = settings("redis://nowhere", "http://127.0.0.1:9", **SECTIONS)
    answers = [Answers(ledger, today() - timedelta(days=89), configured) for ledger in ledgers]
    for seen, ledger, answer in zip(page.play([one.texts for one in answers]), ledgers, answers, strict=True):
        _compare(seen, ledger, answer.usage_by_team, answer.quotas)


def _compare(seen: Seen, ledger: Ledger, usage: Any, quotas: Any) -> None:
    expected = {f"{row['team_name']} {row['team']}".strip(): row for row in usage["rows"]}
    assert {row[0] for row in seen.groups[1:-1]} == set(expected)
    for name, asked, refused, credits_, *_ in seen.groups[1:]:
        found = usage["total"] if name == "Total" else expected[name]
        shown = [amount(asked), amount(refused), amount(credits_)]
        assert shown == [found["requests"], found["refused"], found["estimated_credits"]]
    used = {quota["used"] for team in quotas["teams"] for quota in team["quotas"]}
    assert {amount(row[1].split(" of ")[0]) for row in seen.quotas[1:]} == used
    assert seen.cards[:8] == _cards(ledger)
    assert _weeks_seen(seen.intervals) == _weeks(ledger)


def _cards(ledger: Ledger) -> list[str]:
    """Today, this week and this month, with the period before."""
    now = today()
    monday, first = now - timedelta(days=now.weekday()), now.replace(day=1)
    week, before = timedelta(days=7), first - timedelta(days=1)
    same_day = before.replace(day=min(now.day, before.day))
    periods = [
        (now, now),
        (now - timedelta(days=1), now - timedelta(days=1)),
        (monday, now),
        (monday - week, monday - timedelta(days=1)),
        (monday - week, now - week),
        (first, now),
        (before.replace(day=1), before),
        (before.replace(day=1), same_day),
    ]
    return [_sum_in_words(ledger, *days) for days in periods]


def _sum_in_words(ledger: Ledger, first: date, last: date) -> str:
    days = [fields for (day, _), fields in ledger.items() if first <= day <= last]
    return f"{credits_of(sums_of(days)['credits']).normalize():,f}" if days else ""


def _weeks(ledger: Ledger) -> dict[str, dict[str, Decimal]]:
    weeks: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for (day, team), fields in ledger.items():
        monday = day - timedelta(days=day.weekday())
        weeks[f"Week of {monday:%a} {monday.day} {monday:%b %Y}"][team] += sums_of([fields])["credits"]
    return {
        week: {"Total": credits_of(sums.total())} | {team: credits_of(micro) for team, micro in sums.items()}
        for week, sums in weeks.items()
    }


def _weeks_seen(table: list[list[str]]) -> dict[str, dict[str, Decimal]]:
    """The amounts of the table by week and team; without weeks that have no data."""
    ids = {"Die Designer": "design", EVIL: "marketing"}
    header, *rows = table
    weeks = {
        week: {ids.get(name, name): amount(cell) for name, cell in zip(header[1:], cells, strict=True) if cell}
        for week, *cells in rows
    }
    return {week: amounts for week, amounts in weeks.items() if amounts}


class TestTrouble:
    def test_the_ledger_is_away(self, browser: Browser, open_gateway: OpenGateway, valkey_url: str) -> None:
        with proxy_to(valkey_url) as store:
            gateway = open_gateway(store={"url": store.url}, cache={"url": valkey_url}, **SECTIONS)
            book(gateway.store, A_LEDGER)
            page = Page(browser, gateway.url)
            page.open("?period=7d", VIEWER)
            shown = page.table("#usage-table")
            store.cut()
            browser.click("#refresh")
            browser.wait_for_text("#banner", "No new numbers, because of the ledger. The ledger is unavailable")
            assert page.table("#usage-table") == shown, "the old numbers stay, with their time"
            assert "As of" in browser.text("#banner")
            store.set_conditions(HEALTHY)
            wait_until(lambda: not browser.run("return !document.getElementById('banner').hidden"))

    def test_the_gateway_restarts(self, browser: Browser, gateway: GatewayFixture) -> None:
        with proxy_to(gateway.url) as front:
            page = Page(browser, front.url)
            page.open("?period=7d", VIEWER)
            front.cut()
            browser.click("#refresh")
            browser.wait_for_text("#banner", "The gateway does not answer; it may be restarting. Trying again.")
            front.set_conditions(HEALTHY)
            wait_until(lambda: not browser.run("return !document.getElementById('banner').hidden"))
            assert "Die Designer" in page.text()


class TestAccess:
    def test_axe_finds_nothing_serious(self, page: Page) -> None:
        page.open()
        assert page.serious_findings() == []
        page.open(token=ADMIN)
        assert page.serious_findings() == []
        page.browser.resize(360, 800)
        page.open("?table=intervals", DESIGN)
        assert page.serious_findings() == []

    def test_dark_has_enough_contrast(self, page: Page) -> None:
        page.browser.prefer(prefers_color_scheme="dark")
        page.open()
        assert page.serious_findings("color-contrast") == []
        page.open(token=ADMIN)
        assert page.serious_findings("color-contrast") == []


@pytest.mark.parametrize("width", [360, 820, 3840])
def test_it_fits_into_every_width(page: Page, width: int) -> None:
    page.browser.resize(width, 800)
    for token in (VIEWER, DESIGN):
        page.open("?period=90d", token)
        assert page.browser.run("return document.documentElement.scrollWidth") <= width


def test_a_disabled_page_is_not_found(open_gateway: OpenGateway) -> None:
    browsers = {"accept": "text/html"}
    off, on = open_gateway(page={"enabled": False}), open_gateway()
    answers = [gateway.client.get("/", headers=headers) for gateway in (off, on) for headers in (browsers, {})]
    assert [answer.status_code for answer in answers] == [404, 404, 200, 404]
    assert off.client.get("/page/main.js").status_code == 404
    assert "accept" in answers[2].headers["vary"]
    assert answers[3].json()["detail"] == answers[0].json()["detail"]
