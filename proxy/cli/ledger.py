"""`estimate-proxy usage` and `estimate-proxy quota`: read the ledger, whether or not a gateway is running."""

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from time import time
from typing import Any, TypeVar
from urllib.parse import urlencode

import click
from rich.console import Console

from proxy.cli.direct import read_quota_states, read_usage
from proxy.cli.inputs import config_option, fail, load_settings
from proxy.cli.tables import quota_lines, quota_table, to_tsv, usage_table
from proxy.embedded.valkey import EmbeddedStoreError
from proxy.problems import BadRequest, StoreUnavailable
from proxy.quota.usage import cells_of, csv_of, json_of, read_usage_query
from proxy.quota.windows import day_of

_Read = TypeVar("_Read")


@click.command(short_help="Show what teams have used.")
@config_option
@click.option("--team", metavar="ID", help="Only this team. Default: all that ever had usage.")
@click.option("--from", "first", metavar="DAY", help="First day, as 2026-11-01. Default: the first of the month.")
@click.option("--to", "last", metavar="DAY", help="Last day. Default: today.")
@click.option(
    "--by",
    metavar="NAMES",
    help="One row per day, team or model, or per combination, joined by commas. Default: team; with --team: day.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
    help="table is for people; csv and json are what GET /v1/usage returns.",
)
def usage(
    config: Path | None, team: str | None, first: str | None, last: str | None, by: str | None, form: str
) -> None:
    """Show requests and estimated credits: exact figures, read from the store.

    Days are in the time zone org.timezone. When piped, the table is tab-separated text with a column for each outcome
    and no total.
    """
    settings = load_settings(config)
    zone = settings.org.zone
    given = {"from": first, "to": last, "team": team, "by": by}
    asked = {"by": "team" if team is None else "day"} | {name: text for name, text in given.items() if text is not None}
    try:
        query = read_usage_query(urlencode(asked, errors="replace").encode(), None, today=day_of(int(time()), zone))
        found = _from_store(read_usage(settings, query))
    except BadRequest as error:
        fail(f"--{error}")
    if form != "table":
        click.echo(csv_of(found, query.by) if form == "csv" else json_of(found, query, zone.key) + b"\n", nl=False)
    elif sys.stdout.isatty():
        console = Console()
        console.print(usage_table(found, query, zone, console))
    else:
        click.echo(to_tsv(cells_of(found, query.by)), nl=False)


@click.command(short_help="Show quotas, and what is left of them.")
@click.argument("team", required=False)
@config_option
def quota(team: str | None, config: Path | None) -> None:
    """Show the quotas of TEAM, or of all teams: used, remaining, and when the next window starts.

    Exact figures, read from the store. When piped, the table is tab-separated text.
    """
    settings = load_settings(config)
    if team not in (None, *settings.teams):
        fail("TEAM is not a team in the settings")
    quota_states = _from_store(read_quota_states(settings, team))
    if not any(quota_state.limits.quotas for quota_state in quota_states):
        click.echo("estimate-proxy: no quota is set", err=True)
    if sys.stdout.isatty():
        Console().print(quota_table(quota_states, settings.org.zone))
    else:
        click.echo(to_tsv(quota_lines(quota_states, settings.org.zone)), nl=False)


def _from_store(reading: Coroutine[Any, Any, _Read]) -> _Read:
    """The result. If the store cannot be read, prints why and exits."""
    try:
        return asyncio.run(reading)
    except EmbeddedStoreError as error:
        fail(str(error))
    except StoreUnavailable:
        fail("the store is unreachable")
