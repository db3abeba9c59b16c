"""`estimate-proxy prices`: reads price changes from the ledger's store. An embedded one needs a running gateway."""

from collections.abc import Sequence
from pathlib import Path
from time import time
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

import click

from proxy.cli.direct import from_store, read_price_changes
from proxy.cli.formats import chosen_form, dialect_option, format_option
from proxy.cli.inputs import config_option, fail, load_settings
from proxy.cli.tables import Column, moment, print_table, to_tsv
from proxy.problems import BadRequest
from proxy.quota.csv_text import Dialect, write_csv
from proxy.quota.price_changes import MAX_PER_DAY, NAME_COLUMNS, PriceChange, json_of, lines_of
from proxy.quota.report_queries import read_price_change_query
from proxy.quota.windows import day_of


@click.group(short_help="Show which prices have changed.")
def prices() -> None:
    """Show which of RenderNet's prices have changed."""


@prices.command()
@config_option
@click.option("--account", metavar="ID", help="Only this account. Default: all.")
@click.option("--from", metavar="DAY", help="First day, as 2026-11-01. Default: all that is kept, 400 days.")
@format_option
@dialect_option
def changed(config: Path | None, form: str | None, dialect: Dialect | None, **given: str | None) -> None:
    """Show each price that RenderNet has changed, with the old and the new price, the oldest change first.

    The date is the day on which a gateway found the change, by an audit, by a doubt about a learned price, or because a
    client asked. When piped, the table is tab-separated text, and the period goes to standard error.
    """
    form = chosen_form(form, dialect)
    settings = load_settings(config)
    zone = settings.org.zone
    asked = urlencode({name: text for name, text in given.items() if text is not None}, errors="replace")
    try:
        query = read_price_change_query(asked.encode(), None, today=day_of(int(time()), zone))
    except BadRequest as error:
        fail(f"--{error}")
    found = from_store(read_price_changes(settings, query))
    if not found.changes and query.account not in (None, *settings.accounts):
        fail(f"--account {query.account!r:.64} is not in the settings, and has no price change: check the name")
    period = f"{query.first} to {query.last}, {zone.key}"
    match form:
        case "table":
            print_table(f"price changes, {period}", _columns(found.changes, zone))
        case "csv":
            lines = lines_of(found, zone)
            click.echo(write_csv(lines, names=NAME_COLUMNS, dialect=dialect or "rfc4180"), nl=False)
        case "json":
            click.echo(json_of(found, query, zone))
        case _:
            click.echo(to_tsv(lines_of(found, zone)), nl=False)
    if form != "table":
        number = len(found.changes)
        click.echo(f"estimate-proxy: {period}: {number} price change{'' if number == 1 else 's'}", err=True)
    if found.not_kept:
        more = f"{found.not_kept} more were found, of all accounts: a day keeps the first {MAX_PER_DAY}"
        click.echo(f"estimate-proxy: {more}", err=True)


def _columns(changes: Sequence[PriceChange], zone: ZoneInfo) -> list[Column]:
    """Price changes for people."""
    return [
        Column("found at", [moment(change.at_s, zone) for change in changes], is_text=True),
        Column("account", [change.account for change in changes], rank=1, is_text=True),
        Column("model", [change.model for change in changes], is_text=True),
        Column("old", [change.old for change in changes]),
        Column("new", [change.new for change in changes]),
        Column("found by", [change.found_by for change in changes], rank=2, is_text=True),
        Column("key", [change.key for change in changes], rank=3, is_text=True),
    ]
