"""`estimate-proxy usage`: reads usage from the ledger's store. An embedded one needs a running gateway."""

from datetime import date, timedelta
from pathlib import Path
from time import time
from urllib.parse import urlencode

import click

from proxy.cli.direct import from_store, read_usage
from proxy.cli.formats import chosen_form, dialect_option, format_option
from proxy.cli.inputs import config_option, fail, load_settings
from proxy.cli.tables import Column, name_columns, print_table, to_tsv
from proxy.gateway.live_config import directory_of
from proxy.problems import NO_NAME, BadRequest
from proxy.quota.credits import Currency, text_of
from proxy.quota.csv_text import Dialect
from proxy.quota.report_queries import UsageQuery, read_usage_query
from proxy.quota.team_directory import TeamDirectory
from proxy.quota.usage import SORTS, Sort, Usage, sort_usage
from proxy.quota.usage_report import amounts_of, cells_of, csv_of, json_of, share_of
from proxy.quota.windows import day_of


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
    is_first = today.day == 1 and not is_given and not last_month
    if last_month or is_first:
        asked |= _month_before(today)
    asked.setdefault("by", "day" if "team" in asked else "team")
    try:
        query = read_usage_query(urlencode(asked, errors="replace").encode(), None, today=today)
        found = sort_usage(from_store(read_usage(settings, query)), sort)
    except BadRequest as error:
        fail(f"--{error}")
    because = " (last month, because today is the first)" if is_first else ""
    period = f"{query.first} to {query.last}, {zone.key}{because}"
    match form:
        case "table":
            print_table(period, _columns(found, query, directory, currency))
        case "csv":
            click.echo(csv_of(found, query.by, directory, currency, dialect or "rfc4180"), nl=False)
        case "json":
            click.echo(json_of(found, query, zone.key, directory, currency))
        case _:
            click.echo(to_tsv(cells_of(found, query.by, directory, currency)), nl=False)
    if form != "table":
        click.echo(f"estimate-proxy: {period}: {_total_text(found)}", err=True)


def _month_before(day: date) -> dict[str, str]:
    last = day.replace(day=1) - timedelta(days=1)
    return {"from": str(last.replace(day=1)), "to": str(last)}


def _total_text(usage: Usage) -> str:
    total = usage.total
    requests = "1 request" if total.requests == 1 else f"{total.requests} requests"
    return f"{requests}, {total.refused} refused, {text_of(total.credits_micro)} estimated credits"


def _columns(usage: Usage, query: UsageQuery, directory: TeamDirectory, currency: Currency | None) -> list[Column]:
    """Usage for people, with the outcomes that occurred."""
    groups = zip(*(row.group for row in usage.rows), strict=True) if usage.rows else [()] * len(query.by)
    columns = [
        Column(group, cells, total="total" if place == 0 else "", is_text=True)
        for place, (group, cells) in enumerate(zip(query.by, groups, strict=True))
    ]
    if "team" in query.by:
        names = [directory.name_of(row.group[query.by.index("team")]) for row in usage.rows]
        columns += name_columns(names, rank=3)
    outcomes = tuple(usage.total.outcomes)
    amounts = zip(*(amounts_of(row, outcomes) for row in (*usage.rows, usage.total)), strict=True)
    headers = [("requests", 1), ("refused", 4), ("estimated credits", 0), *((outcome, 5) for outcome in outcomes)]
    for (header, rank), (*cells, total) in zip(headers, amounts, strict=True):
        columns.append(Column(header, cells, rank, total))
    beside_credits = [Column("share %", [share_of(row, usage) for row in usage.rows], rank=2)]
    if currency is not None:
        *costs, total_cost = [currency.rounded_text(row.credits_micro) for row in (*usage.rows, usage.total)]
        beside_credits.insert(0, Column(f"derived {currency.code}", costs, rank=1, total=total_cost))
    place = len(columns) - len(outcomes)
    return [*columns[:place], *beside_credits, *columns[place:], *_saved_columns(usage)]


def _saved_columns(usage: Usage) -> list[Column]:
    *calls, all_calls = [str(row.upstream_calls_saved) for row in (*usage.rows, usage.total)]
    *seconds, all_seconds = [_seconds(row.saved_us) for row in (*usage.rows, usage.total)]
    return [Column("calls saved", calls, 6, all_calls), Column("seconds saved", seconds, 6, all_seconds)]


def _seconds(duration_us: int | None) -> str:
    return NO_NAME if duration_us is None else f"{duration_us / 1_000_000:.1f}"
