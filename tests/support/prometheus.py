"""Metrics as Prometheus sees them: read by its own rules, and by a real one on a port of its own."""

import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx2
import yaml
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from gateway_process import START_S
from metric_names import families, metric_labels
from programs import program
from proxy.auth import token_of
from proxy.quota.windows import Period
from serving import NO_TLS, free_port, wait_until

SCRAPER = token_of("s" * 32)
"""A metrics token, where a gateway's settings have its digest."""

DEPLOYED = Path(__file__).parents[2] / "deploy" / "prometheus"
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
"""What Prometheus 2 prefers, in short."""

INTERVAL_MS = 500
"""Between two scrapes of a test."""

MORNING = "UTC" if datetime.now(UTC).hour < 12 else "Etc/GMT+12"
"""A zone where no day ends within hours: for `org.timezone`, where windows are compared with usage."""

PERS: tuple[Period, ...] = ("day", "week", "month")

Labels = frozenset[tuple[str, str]]


class Scraped:
    """What a gateway shows. Metrics are named without `estimate_proxy_`."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self.kinds = {_full_name(family): family.type for family in families}
        self.samples: dict[tuple[str, Labels], float] = {}
        for sample in (sample for family in families for sample in family.samples):
            key = sample.name, frozenset(sample.labels.items())
            assert key not in self.samples, f"{key} is there twice"
            self.samples[key] = float(sample.value)

    def value(self, name: str, **labels: str) -> float | None:
        """Of the series with exactly these labels."""
        return self.samples.get((f"estimate_proxy_{name}", frozenset(labels.items())))

    def counted(self) -> dict[tuple[str, Labels], float]:
        """The series that only grow."""
        growing = ("_total", "_count", "_sum", "_bucket")
        return {key: value for key, value in self.samples.items() if key[0].endswith(growing)}

    def series(self, name: str, *by: str) -> dict[tuple[str, ...], float]:
        """All series of that name, by the values of these labels, which are all that they have."""
        found = {labels: value for (other, labels), value in self.samples.items() if other == f"estimate_proxy_{name}"}
        assert all(dict(labels).keys() == set(by) for labels in found)
        return {tuple(dict(labels)[label] for label in by): value for labels, value in found.items()}


def _full_name(family: Metric) -> str:
    return family.name + "_total" * (family.type == "counter")


def text_of(client: httpx2.Client, token: str = SCRAPER, accept: str = "text/plain") -> str:
    answer = client.get("/metrics", headers={"x-api-key": token, "accept": accept})
    assert answer.status_code == 200, answer.text
    return answer.text


def scrape(client: httpx2.Client) -> Scraped:
    """What it shows now, in the older format. One process adds creation times, which several do not have."""
    families = read_text(text_of(client))
    return Scraped([family for family in families if not family.name.endswith("_created")])


def scrape_openmetrics(client: httpx2.Client) -> Scraped:
    """The same in OpenMetrics."""
    scraped = Scraped(list(read_openmetrics(text_of(client, accept=OPENMETRICS))))  # type: ignore[no-untyped-call]  # it has no types
    scraped.samples = {key: value for key, value in scraped.samples.items() if not key[0].endswith("_created")}
    return scraped


def assert_as_declared(scraped: Scraped) -> None:
    """Exactly the names, types and labels of the code, and a series for each."""
    declared = families()
    assert scraped.kinds == {name: family.kind for name, family in declared.items()}
    labels_of = metric_labels()
    assert {name for name, _ in scraped.samples} == labels_of.keys()
    for name, labels in scraped.samples:
        assert {label for label, _ in labels} == labels_of[name], name


def booked(scraped: Scraped) -> dict[tuple[str, str], tuple[float, float]]:
    """Requests and estimated credits by team and window."""
    requests, amounts = (scraped.series(f"window_{n}", "team", "per") for n in ("requests", "estimated_credits"))
    assert requests.keys() == amounts.keys()
    return {(team, per): (value, amounts[team, per]) for (team, per), value in requests.items()}


def usage(client: httpx2.Client, admin: str, teams: Collection[str]) -> dict[tuple[str, str], tuple[float, float]]:
    """The same as `GET /v1/usage` has it, in a gateway whose zone is `MORNING`."""
    today = datetime.now(ZoneInfo(MORNING)).date()
    found: dict[tuple[str, str], tuple[float, float]] = {(team, per): (0, 0) for team in teams for per in PERS}
    for per in PERS:
        query = {"from": _first_day(per, today).isoformat(), "to": today.isoformat(), "by": "team"}
        answer = client.get("/v1/usage", params=query, headers={"x-api-key": admin})
        assert answer.status_code == 200, answer.text
        found |= {(row["team"], per): (row["requests"], row["estimated_credits"]) for row in answer.json()["rows"]}
    return found


def _first_day(per: Period, today: date) -> date:
    if per == "month":
        return today.replace(day=1)
    return today - timedelta(days=today.weekday() if per == "week" else 0)


def said_by_promtool(client: httpx2.Client) -> str:
    """What `promtool check metrics` has to say of a scrape."""
    command = [program("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=text_of(client), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Point:
    """A series that an expression gives, at one moment."""

    labels: dict[str, str]
    value: float


class Prometheus:
    """A running server. Moments are seconds since 1970."""

    def __init__(self, client: httpx2.Client) -> None:
        self._client = client

    def is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx2.TransportError:
            return False

    def at(self, moment: float | None, expr: str) -> list[Point]:
        """What `expr` gives at a moment, or now."""
        asked = {"query": expr} if moment is None else {"query": expr, "time": moment}
        return [Point(found["metric"], float(found["value"][1])) for found in self._get("query", asked)["result"]]

    def until(self, moment: float, expr: str, *, since_s: int) -> list[Point]:
        """What `expr` gives, second by second, in the time before that moment."""
        asked = {"query": expr, "start": moment - since_s, "end": moment, "step": 1}
        series = self._get("query_range", asked)["result"]
        return [Point(found["metric"], float(value)) for found in series for _, value in found["values"]]

    def groups(self) -> list[dict[str, Any]]:
        """The rules in force, each with how its last evaluation went."""
        found: list[dict[str, Any]] = self._get("rules", {})["groups"]
        return found

    def alerts(self) -> list[dict[str, Any]]:
        """Those that are true now, be it not for long enough to be sent."""
        found: list[dict[str, Any]] = self._get("alerts", {})["alerts"]
        return found

    def _get(self, path: str, asked: dict[str, Any]) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=asked)
        assert answer.status_code == 200, f"{asked}: {answer.text}"
        assert "warnings" not in answer.json(), answer.text
        return answer.json()["data"]


@contextmanager
def prometheus(*targets: str) -> Iterator[Prometheus]:
    """A Prometheus with the project's own config and rules, which scrapes `targets` (`host:port`) all the time."""
    server, port = program("prometheus"), free_port()
    with tempfile.TemporaryDirectory(prefix="ep-prometheus-") as name:
        folder, address = Path(name), f"127.0.0.1:{port}"
        options = [f"--config.file={_config(folder, targets)}", f"--storage.tsdb.path={folder / 'data'}"]
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen([server, *options, f"--web.listen-address={address}"], stdout=log, stderr=log) as process,
            httpx2.Client(base_url=f"http://{address}", trust_env=False, verify=NO_TLS, timeout=10) as client,
        ):
            try:
                running = Prometheus(client)
                wait_until(lambda: running.is_ready() or process.poll() is not None, within_s=START_S)
                assert process.poll() is None, (folder / "log").read_text()
                yield running
            finally:
                process.kill()  # its data go too


def _config(folder: Path, targets: Sequence[str]) -> Path:
    """What is deployed, with a scraper's token and these targets, and faster: a minute becomes `INTERVAL_MS`."""
    config = shutil.copytree(DEPLOYED, folder / "deployed") / "prometheus.yml"
    token = folder / "token"
    token.write_text(SCRAPER)
    tree = yaml.safe_load(config.read_text())
    tree["global"] = {
        f"{name}": f"{INTERVAL_MS}ms" for name in ("scrape_interval", "scrape_timeout", "evaluation_interval")
    }
    (job,) = tree["scrape_configs"]
    job["authorization"]["credentials_file"] = str(token)
    job["static_configs"] = [{"targets": list(targets)}]
    config.write_text(yaml.safe_dump(tree))
    for rules in config.parent.glob("rules/*.yml"):
        rules.write_text(yaml.safe_dump(_at_every_evaluation(yaml.safe_load(rules.read_text()))))
    return config


def _at_every_evaluation(rules: Any) -> Any:
    """The rules without the intervals of their groups."""
    return {"groups": [{key: group[key] for key in group if key != "interval"} for group in rules["groups"]]}
