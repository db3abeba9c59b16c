"""`estimate-proxy usage` and `estimate-proxy quota`: read the ledger, whether or not a gateway is running."""

import sys
from datetime import date, timedelta
from pathlib import Path
from time import time
from urllib.parse import urlencode

import click
import orjson

from proxy.cli.direct import from_store, read_quotas, read_usage
from proxy.cli.inputs import config_option, fail, load_settings
from proxy.cli.tables import print_table, quota_columns, to_tsv, usage_columns
from proxy.gateway.live_config import directory_of
from proxy.problems import BadRequest
from proxy.quota.credits import text_of
from proxy.quota.csv_text import DIALECTS, Dialect, write_csv
from proxy.quota.quota_report import QUOTA_NAME_COLUMNS, quota_document, quota_lines
from proxy.quota.report_queries import read_usage_query
from proxy.quota.usage import SORTS, Sort, Usage, sort_usage
from proxy.quota.usage_report import cells_of, csv_of, json_of
from proxy.quota.windows import day_of

format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    help="table, the default, is for people; csv and json are for programs. json is what the endpoint returns.",
)
dialect_option = click.option(
    "--csv-dialect",
    "dialect",
    type=click.Choice(DIALECTS),
    help="rfc4180, the default, is for programs, and where spreadsheets have a decimal point; excel-semicolon is for "
    "spreadsheets in countries with a decimal comma. Implies --format csv.",
)


@click.command(short_help="Show what teams have used.")
@config_option
@click.option("--team", metavar="ID", help="Only this team. Default: all that ever had usage.")
@click.option(
    "--from",
    metavar="DAY",
    help="First day, as 2026-11-01. Default: the first of the month; on that day itself, the month before.",
)
@click.option("--to", metavar="DAY", help="Last day. Default: today.")
@click.option("--last-month", is_flag=True, help="The whole month before this one, instead of --from and --to.")
@click.option(
    "--by",
    metavar="NAMES",
    help="One row per day, week, month, team or model, or per combination, joined by commas. "
    "Default: team; with --team: day.",
)
@click.option(
    "--sort",
    type=click.Choice(SORTS),
    default="names",
    show_default=True,
    help="The order of rows: by what --by names, or the highest amounts first.",
)
@format_option
@dialect_option
def usage(
    config: Path | None, sort: Sort, form: str | None, dialect: Dialect | None, *, last_month: bool, **given: str | None
) -> None:
    """Show requests and estimated credits: exact figures, read from the store.

    Days are in the time zone org.timezone; weeks begin on Monday. When piped, the table is tab-separated text with a
    column for each outcome; the period and the total go to standard error.
    """
    form = chosen_form(form, dialect)
    settings = load_settings(config)
    zone, directory, currency = settings.org.zone, directory_of(settings), settings.org.counted_currency
    today = day_of(int(time()), zone)
    asked = {name: text for name, text in given.items() if text is not None}
    is_given = "from" in asked or "to" in asked
    if last_month and is_given:
        fail("--last-month cannot be combined with --from or --to: leave one of them out")
    is_first = today.day == 1 and not is_given
    if last_month or is_first:
        asked |= _month_before(today)
    asked.setdefault("by", "day" if "team" in asked else "team")
    try:
        query = read_usage_query(urlencode(asked, errors="replace").encode(), None, today=today)
        found = sort_usage(from_store(read_usage(settings, query)), sort)
    except BadRequest as error:
        fail(f"--{error}")
    because = " (last month, because today is the first)" if is_first and not last_month else ""
    period = f"{query.first} to {query.last}, {zone.key}{because}"
    if form == "table" and sys.stdout.isatty():
        print_table(period, usage_columns(found, query, directory, currency))
        return
    match form:
        case "csv":
            click.echo(csv_of(found, query.by, directory, currency, dialect or "rfc4180"), nl=False)
        case "json":
            click.echo(json_of(found, query, zone.key, directory, currency))
        case _:
            click.echo(to_tsv(cells_of(found, query.by, directory, currency)), nl=False)
    click.echo(f"estimate-proxy: {period}: {_total_text(found)}", err=True)


@click.command(short_help="Show quotas, and what is left of them.")
@click.argument("team", required=False)
@config_option
@format_option
@dialect_option
def quota(team: str | None, config: Path | None, form: str | None, dialect: Dialect | None) -> None:
    """Show the quotas of TEAM, or of all teams: used, remaining, and when the next window starts.

    These figures are exact, read from the store. Quotas per week and month also have a forecast, if usage goes back 14
    days: how much will be used at the end, and when the limit will be reached. When piped, the table is tab-separated
    text.
    """
    form = chosen_form(form, dialect)
    settings = load_settings(config)
    zone, directory = settings.org.zone, directory_of(settings)
    if team not in (None, *settings.teams):
        fail(f"{team!r} is not a team in the settings: they have {', '.join(settings.teams) or 'none'}")
    quota_states, forecasts = from_store(read_quotas(settings, team))
    if not any(quota_state.limits.quotas for quota_state in quota_states):
        click.echo("estimate-proxy: no quota is set", err=True)
    if form == "table" and sys.stdout.isatty():
        print_table(f"quotas on estimates, {zone.key}", quota_columns(quota_states, forecasts, zone, directory))
        return
    lines = quota_lines(quota_states, forecasts, zone, directory)
    match form:
        case "csv":
            click.echo(write_csv(lines, names=QUOTA_NAME_COLUMNS, dialect=dialect or "rfc4180"), nl=False)
        case "json":
            documents = [quota_document(quota_state, forecasts, zone, directory) for quota_state in quota_states]
            click.echo(orjson.dumps({"teams": documents} if team is None else documents[0]))
        case _:
            click.echo(to_tsv(lines), nl=False)


def chosen_form(form: str | None, dialect: Dialect | None) -> str:
    """The value of `--format`, or what `--csv-dialect` implies."""
    if dialect is None:
        return form or "table"
    if form not in (None, "csv"):
        fail("--csv-dialect is only for CSV: leave it out, or use --format csv")
    return "csv"


def _month_before(day: date) -> dict[str, str]:
    last = day.replace(day=1) - timedelta(days=1)
    return {"from": str(last.replace(day=1)), "to": str(last)}


def _total_text(usage: Usage) -> str:
    total = usage.total
    amounts = (
        (total.requests, "request" if total.requests == 1 else "requests"),
        (total.refused, "refused"),
        (text_of(total.credits_micro), "estimated credits"),
    )
    return ", ".join(f"{amount} {name}" for amount, name in amounts)
