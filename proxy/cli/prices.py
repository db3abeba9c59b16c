"""`estimate-proxy prices`: reads price changes from the ledger, whether or not a gateway is running."""

import sys
from pathlib import Path
from time import time
from urllib.parse import urlencode

import click

from proxy.cli.direct import from_store, read_price_changes
from proxy.cli.inputs import config_option, fail, load_settings
from proxy.cli.tables import price_change_columns, print_table, to_tsv
from proxy.cli.usage import chosen_form, dialect_option, format_option
from proxy.problems import BadRequest
from proxy.quota.csv_text import Dialect, write_csv
from proxy.quota.price_changes import MAX_PER_DAY, NAME_COLUMNS, json_of, lines_of
from proxy.quota.report_queries import read_price_change_query
from proxy.quota.windows import day_of


@click.group(short_help="Show which prices have changed.")
def prices() -> None:
    """Show which of RenderNet's prices have changed."""


@prices.command()
@config_option
@click.option("--account", metavar="NAME", help="Only this account. Default: all.")
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
    if form == "table" and sys.stdout.isatty():
        print_table(f"price changes, {period}", price_change_columns(found.changes, zone))
    else:
        match form:
            case "csv":
                lines = lines_of(found, zone)
                click.echo(write_csv(lines, names=NAME_COLUMNS, dialect=dialect or "rfc4180"), nl=False)
            case "json":
                click.echo(json_of(found, query, zone))
            case _:
                click.echo(to_tsv(lines_of(found, zone)), nl=False)
        click.echo(f"estimate-proxy: {period}: {len(found.changes)} price changes", err=True)
    if found.not_kept:
        more = f"{found.not_kept} more were found, of all accounts: a day keeps the first {MAX_PER_DAY}"
        click.echo(f"estimate-proxy: {more}", err=True)
