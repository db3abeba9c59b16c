"""The usage page in a browser, and ledgers for it to show."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import orjson
import redis

from browser import Browser
from proxy.auth import token_of
from proxy.gateway.live_config import directory_of, limits_of
from proxy.quota.counters import BASE_PERIODS, LedgerKeys
from proxy.quota.quota_report import quota_document
from proxy.quota.quotas import Quota, QuotaState
from proxy.quota.report_queries import Group, UsageQuery
from proxy.quota.usage import TeamDay, UsageTotals
from proxy.quota.usage_report import json_of
from proxy.quota.windows import Window, window_of
from proxy.settings.schema import Settings
from serving import wait_until

VIEWER = token_of("v" * 32)
KEYS = LedgerKeys("default")
AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text("utf-8")
STORED = "estimate-proxy-token"
"""The name of the page's item in sessionStorage."""

Fields = Mapping[str, int]
"""A usage hash: `model:outcome:measure`, with credits in micro-credits."""

Ledger = Mapping[tuple[date, str], Fields]


_READERS = """
let property = 'innerText';
const text = (element) => element.querySelector('.none') ? '' : element[property].replace(/[▲▼]/, '').trim();
const table = (css) => [...document.querySelectorAll(`${css} tr`)].map((row) => [...row.children].map(text));
const cards = () => [...document.querySelectorAll('#recent .big, #recent dd')].map(text);
const isDrawn = () => !document.body.classList.contains('reading') && !document.getElementById('usage').hidden;
async function drawn() {
  while (!isDrawn()) await new Promise((resume) => setTimeout(resume));
}
function seen() {
  property = 'textContent'; // innerText makes a layout for each change
  const found = [cards(), table('#quotas'), table('#usage-table')];
  document.getElementById('table-intervals').click();
  found.push(table('#usage-table'));
  document.getElementById('table-groups').click();
  return found;
}
async function play(answers) {
  const all = [];
  const token = await (await fetch('v1/token', { headers: { 'x-api-key': Object.values(sessionStorage)[0] } })).text();
  document.body.style.display = 'none'; // layout and painting would take most of the time
  for (const texts of answers) {
    window.fetch = async (url) => {
      const name = Object.keys(texts).find((part) => `${url}&`.includes(`${part}&`));
      return new Response(name ? texts[name] : token);
    };
    document.getElementById('refresh').click();
    await drawn();
    all.push(seen());
  }
  return all;
}
"""
"""Functions that read the page, in the page."""


@dataclass(frozen=True)
class Seen:
    """The texts of cards, and of tables by row and cell."""

    cards: list[str]
    quotas: list[list[str]]
    groups: list[list[str]]
    intervals: list[list[str]]


class Page:
    """The usage page in a tab."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser = browser
        self.url = url

    def open(self, query: str = "", token: str | None = None) -> None:
        """Opens the page. With a token it shows the usage, as after a reload in a tab that is signed in."""
        if token is not None:
            self.browser.open(f"{self.url}/page/icon.svg")
            self.browser.run("sessionStorage.setItem(arguments[0], arguments[1])", STORED, token)
        self.browser.open(f"{self.url}/{query}")
        if token is not None:
            self.wait_until_drawn()

    def sign_in(self, token: str) -> None:
        field = self.browser.find("#token")
        field.clear()
        field.send_keys(token)
        self.browser.click("#token-form button")

    def wait_until_drawn(self) -> None:
        """Waits until nothing is being read any more and the usage is shown."""
        wait_until(lambda: self.browser.run(f"{_READERS} return isDrawn()"))

    def choose(self, control: str, value: str) -> None:
        """Chooses an option of a select, or of a group of radio buttons."""
        self.browser.run(
            "const select = document.querySelector(`select#${arguments[0]}`);"
            "if (!select) document.getElementById([...arguments].join('-')).click();"
            "else { select.value = arguments[1]; select.dispatchEvent(new Event('change')); }",
            control,
            value,
        )
        self.wait_until_drawn()

    def table(self, css: str) -> list[list[str]]:
        """The texts of a table's cells, the header first and the footer last. "" where there is no data."""
        found: list[list[str]] = self.browser.run(f"{_READERS} return table(arguments[0])", css)
        return found

    def cards(self) -> list[str]:
        """The large numbers and the small ones under them. "" where there is no data."""
        found: list[str] = self.browser.run(f"{_READERS} return cards()")
        return found

    def read(self) -> "Seen":
        """All tables and cards."""
        return Seen(*self.browser.run(f"{_READERS} return seen()"))

    def play(self, answers: Sequence[Mapping[str, str]]) -> list["Seen"]:
        """What the page shows of each answer of the gateway: texts by the end of their URL. Nothing is painted.

        The page must be opened again afterwards.
        """
        return [Seen(*seen) for seen in self._run_async(f"{_READERS} play(arguments[0]).then(arguments[1])", answers)]

    def text(self) -> str:
        return str(self.browser.run("return document.body.innerText"))

    def serious_findings(self, *rules: str) -> list[str]:
        """What axe finds that is serious or critical: the rule and the elements. Without `rules` it tries all."""
        self.browser.run(AXE)
        found: list[str] = self._run_async(
            "const [rules, done] = arguments; axe.run(rules.length ? { runOnly: rules } : {})"
            ".then(({ violations }) => done(violations"
            ".filter(({ impact }) => impact === 'serious' || impact === 'critical')"
            ".map(({ id, nodes }) => `${id}: ${nodes.map(({ target }) => target).join(' ')}`)))",
            list(rules),
        )
        return found

    def _run_async(self, script: str, *arguments: object) -> Any:
        """The value with which `script` calls its last argument."""
        return self.browser.driver.execute_async_script(script, *arguments)


class Answers:
    """What the gateway's endpoints answer about a ledger, written by their own functions, without a store."""

    def __init__(self, ledger: Ledger, first: date, configured: Settings) -> None:
        self._ledger = ledger
        self._directory = directory_of(configured)
        self.usage_by_team = exact(self._usage(first, "team"))
        texts = {
            "by=week%2Cteam": self._usage(first, "week", "team"),
            "by=team%2Cmodel": self._usage(first, "team", "model"),
            "by=day": self._usage(today() - timedelta(days=62), "day"),
            "v1/quota": self._quotas(configured),
            f"v1/prices/changes?from={first}": '{"changes":[],"not_kept":0}',
        }
        self.quotas = exact(texts["v1/quota"])
        self.texts = texts

    def _usage(self, first: date, *by: Group) -> str:
        totals = UsageTotals(by, {})
        for (day, team), fields in self._ledger.items():
            if first <= day:
                totals.add(TeamDay(day, team, {name.encode(): b"%d" % count for name, count in fields.items()}))
        query = UsageQuery(first, today(), by, None, csv=False)
        return json_of(totals.usage(), query, "UTC", self._directory).decode()

    def _quotas(self, configured: Settings) -> str:
        zone, now_s = ZoneInfo("UTC"), int(datetime.now(UTC).timestamp())
        windows = {per: window_of(per, now_s, zone) for per in BASE_PERIODS}
        teams = []
        for team, limits in limits_of(configured).items():
            used = [
                self._used(team if quota.scope == "team" else None, quota, windows[quota.per])
                for quota in limits.quotas
            ]
            state = QuotaState(limits, windows, now_s * 10**6, 0, used)
            teams.append(quota_document(state, {}, zone, self._directory))
        return orjson.dumps({"teams": teams}).decode()

    def _used(self, team: str | None, quota: Quota, window: Window) -> int:
        days = [
            fields
            for (day, booked), fields in self._ledger.items()
            if team in (None, booked) and _start_of(day) in window
        ]
        return sums_of(days)["requests" if quota.measure == "requests" else "credits"]


def exact(text: str) -> Any:
    """A JSON document, numbers with all their digits."""
    return json.loads(text, parse_float=Decimal)


def amount(text: str) -> Decimal:
    """A number as the page shows it."""
    return Decimal(text.replace(",", ""))


def credits_of(micro: int) -> Decimal:
    return Decimal(micro) / 10**6


def today() -> date:
    return datetime.now(UTC).date()


def book(store: redis.Redis, ledger: Ledger) -> None:
    """Replaces the usage in the store, and the counters of today's windows, by these."""
    now_s = int(datetime.now(UTC).timestamp())
    windows = {per: window_of(per, now_s, ZoneInfo("UTC")) for per in BASE_PERIODS}
    pipe = store.pipeline()
    pipe.flushdb()
    for (day, team), fields in ledger.items():
        pipe.sadd(KEYS.teams, team)
        if fields:
            pipe.hset(KEYS.usage(team, day), mapping={name: str(count) for name, count in fields.items()})
        for per, window in windows.items():
            if _start_of(day) in window:
                for counted in (team, None):
                    for measure, sum_ in sums_of([fields]).items():
                        pipe.hincrby(KEYS.counter(counted, per, window), measure, sum_)
    pipe.execute()


def _start_of(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())


def sums_of(days: Iterable[Fields]) -> dict[str, int]:
    """Requests and micro-credits of some usage hashes."""
    sums = {"requests": 0, "credits": 0}
    for fields in days:
        for name, count in fields.items():
            measure = name.rpartition(":")[2]
            if measure in sums:
                sums[measure] += count
    return sums


def random_ledger(chance: random.Random, teams: Iterable[str], days: int) -> dict[tuple[date, str], Fields]:
    """Usage on some of the last days, with amounts of very different size."""
    ledger: dict[tuple[date, str], Fields] = {}
    for team in teams:
        for back in chance.sample(range(days), chance.randint(0, min(6, days))):
            ledger[today() - timedelta(days=back), team] = dict(_fields(chance))
    return ledger


def _fields(chance: random.Random) -> Iterable[tuple[str, int]]:
    for model in chance.sample(["Flux", "JuggernautXL", "other", "mixed", "-1+1", "DreamShaper", "A.b", "narrator"], 3):
        for outcome in ("hit", "miss", "inferred"):
            yield f"{model}:{outcome}:requests", chance.randint(1, 10 ** chance.randint(1, 9))
            yield f"{model}:{outcome}:credits", chance.randint(0, 10 ** chance.randint(1, 17))
    yield "-:upstream-error:requests", chance.randint(1, 5)
    yield "-:rate-limited:refused", chance.randint(1, 10**6)
