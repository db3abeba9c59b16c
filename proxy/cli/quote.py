"""`estimate-proxy quote`: asks a gateway what bodies would cost, and tells a script whether that is within a limit."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

import click
import httpx2
import orjson

from proxy.cli.inputs import fail
from proxy.cli.quote_input import BadInput, Body, Input, calls_of, document_of, read_input
from proxy.cli.quote_report import COLUMNS, HEADERS, Report, markdown, quota_lines, report_of, rows_of, verdict
from proxy.cli.tables import Column, print_table, to_tsv

TIMEOUT_S = 120
"""For one call. The gateway's own deadline, `server.request_timeout_s`, is shorter."""

RATE_PAUSE_S = 1.0
MAX_RATE_PAUSES = 30
"""Bodies of a plan that the team's rate did not allow are asked again after a pause, this often without progress."""

_CREDITS = re.compile(r"[0-9]+(\.[0-9]{1,6})?")


@click.command(short_help="Show what bodies would cost.")
@click.argument("file", type=click.File("rb"))
@click.option("--url", envvar="ESTIMATE_PROXY_URL", metavar="URL", help="The gateway. Default: $ESTIMATE_PROXY_URL.")
@click.option(
    "--token",
    envvar="ESTIMATE_PROXY_TOKEN",
    metavar="TOKEN",
    help="A team's token. Default: $ESTIMATE_PROXY_TOKEN, which other users of this machine cannot see.",
)
@click.option("--max-total", metavar="N", help="Exit with 1 if the total is more than N credits.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "md", "json"]),
    default="table",
    show_default=True,
    help="The output.",
)
def quote(file: Any, url: str | None, token: str | None, max_total: str | None, form: str) -> None:
    """Ask a running gateway what the bodies in FILE (- is standard input) would cost. Uses no credits.

    FILE is a quote document (variants, or base and vary), one body, or a plan: one body a line (JSON Lines). The total
    of a document is its cheapest variant, times its quantity; the total of a plan is the sum of its bodies.

    share_percent is a body's share of a plan's total, a variant's of the first variant, a line's of its variant.

    The exit status is 0 within the limits, 1 over --max-total or a quota, and 2 for bad input, any unknown price, a
    refused token, or a gateway out of reach.
    """
    limit = _limit(max_total)
    endpoint = _endpoint(url)
    if not token:
        fail("give a team's token with --token, or set ESTIMATE_PROXY_TOKEN")
    try:
        wanted = read_input(file.read())
    except BadInput as error:
        fail(f"{file.name}: {error}")
    with httpx2.Client(headers=_headers(token), timeout=TIMEOUT_S) as client, _progress() as show:
        answers = _GatewayClient(client, endpoint, show).answers(wanted)
    report = report_of(answers, is_plan=wanted.document is None and len(wanted.bodies) > 1)
    status, reason = verdict(report, limit)
    _print(report, answers, form, reason)
    sys.exit(status)


class _GatewayClient:
    """Posts quotes. `show`: writes progress."""

    def __init__(self, client: httpx2.Client, endpoint: str, show: Callable[[str], None]) -> None:
        self._client = client
        self._endpoint = endpoint
        self._show = show

    def answers(self, wanted: Input) -> list[Mapping[str, Any]]:
        if wanted.document is not None:
            self._show("asking the gateway")
            return [self._post(wanted.document)]
        return list(self._plan(wanted.bodies))

    def _plan(self, bodies: Sequence[Body]) -> Iterator[Mapping[str, Any]]:
        done = 0
        for batch in calls_of(bodies):
            self._show(f"{done} of {len(bodies)} bodies priced")
            yield self._patiently(batch)
            done += len(batch)

    def _patiently(self, batch: Sequence[Body]) -> Mapping[str, Any]:
        """The answer to a call; asks again for what the rate did not allow."""
        answer = dict(self._post(document_of(batch)))
        pauses = 0
        while (limited := _rate_limited(answer)) and pauses < MAX_RATE_PAUSES:
            self._show(f"waiting for the team's rate: {len(limited)} bodies are left")
            time.sleep(RATE_PAUSE_S)
            again = self._post(document_of([body for body in batch if body.label in limited]))
            found = {variant["label"]: variant for variant in again["variants"]}
            answer = {**again, "variants": [found.get(one["label"], one) for one in answer["variants"]]}
            pauses = 0 if len(_rate_limited(answer)) < len(limited) else pauses + 1
        return answer

    def _post(self, document: bytes) -> Mapping[str, Any]:
        try:
            response = self._client.post(self._endpoint, content=document)
        except httpx2.HTTPError as error:
            fail(f"the gateway at {self._endpoint} is out of reach: {error or type(error).__name__}")
        if response.status_code != 200:  # noqa: PLR2004 -- RFC 9110 §15.3.1
            fail(f"the gateway at {self._endpoint} answered {response.status_code}: {_detail(response)}")
        try:
            answer: Mapping[str, Any] = json.loads(response.text, parse_float=Decimal)
        except ValueError:
            answer = {}
        if not isinstance(answer, dict) or not answer.get("variants"):
            fail(f"{self._endpoint} did not answer with a quote: check --url")
        return answer


def _rate_limited(answer: Mapping[str, Any]) -> set[str]:
    """The labels of the bodies that the rate did not allow."""
    return {one["label"] for one in answer["variants"] if one.get("error", {}).get("code") == "rate-limited"}


def _detail(response: httpx2.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"{response.reason_phrase or 'no reason'}: check --url"


def _limit(text: str | None) -> Decimal | None:
    if text is not None and not _CREDITS.fullmatch(text):
        fail("--max-total must be a number of credits with at most 6 decimals, such as 20 or 2.5")
    return None if text is None else Decimal(text)


def _endpoint(url: str | None) -> str:
    if not url:
        fail("give the gateway's address with --url, or set ESTIMATE_PROXY_URL")
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query
    except ValueError:
        is_usable = False
    if not is_usable:
        fail("--url must be an address like https://estimates.example")
    return url.rstrip("/") + "/v1/quote"


def _headers(token: str) -> dict[str, str]:
    if not token.isascii() or not token.isprintable():
        fail("the token has characters that no token has: check --token, or ESTIMATE_PROXY_TOKEN")
    return {"x-api-key": token, "content-type": "application/json", "accept": "application/json"}


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Writes progress into one line of standard error, if that is a terminal, and removes it at the end."""
    is_terminal = sys.stderr.isatty()

    def show(text: str) -> None:
        if is_terminal:
            click.echo(f"\r\x1b[K{text} …", nl=False, err=True)

    try:
        yield show
    finally:
        if is_terminal:
            click.echo("\r\x1b[K", nl=False, err=True)


def _print(report: Report, answers: Sequence[Mapping[str, Any]], form: str, reason: str) -> None:
    """Prints the report. If it is for a program, the reason goes to standard error."""
    match form:
        case "md":
            click.echo(markdown(report, reason), nl=False)
            return
        case "table" if sys.stdout.isatty():
            print_table(reason, _columns(report))
            for line in quota_lines(report):
                click.echo(line)
            return
        case "json":
            click.echo(_json(report, answers))
        case _:
            click.echo(to_tsv([COLUMNS, *rows_of(report)]), nl=False)
    click.echo(f"estimate-proxy: {reason}", err=True)


def _columns(report: Report) -> list[Column]:
    cells = zip(*rows_of(report), strict=True)
    ranks = (0, 0, 1, 2, 4, 5, 3)
    columns = [
        Column(header, column, rank, is_text=header in ("variant", "basis", "note"), wraps=header == "note")
        for header, column, rank in zip(HEADERS, cells, ranks, strict=True)
    ]
    return [column for column in columns if any(column.cells)]


def _json(report: Report, answers: Sequence[Mapping[str, Any]]) -> bytes:
    """The gateway's answer; for a plan, its answers as one."""
    members = {
        "variants": report.variants,
        "cheapest": report.cheapest,
        "quotas": report.quotas,
        "balance": answers[-1]["balance"],
        "balance_age_s": answers[-1]["balance_age_s"],
        "total": report.total,
    }
    if "quantity" in answers[-1]:
        members["quantity"] = answers[-1]["quantity"]
    return orjson.dumps(members, default=lambda amount: orjson.Fragment(format(amount, "f")))
