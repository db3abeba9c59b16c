"""`estimate-proxy purge`: removes prices from the price book's store. An embedded one needs a running gateway."""

import os
from pathlib import Path
from typing import Any

import click

from proxy.cache.canonical import canonicalise
from proxy.cli.direct import change_store, purge_book
from proxy.cli.inputs import config_option, fail, load_settings
from proxy.problems import BadRequest


@click.command(short_help="Remove stored prices.")
@click.argument("file", type=click.File("rb"), required=False)
@config_option
@click.option("--account", default="default", show_default=True, metavar="ID", help="The account of the prices.")
@click.option("--all", "everything", is_flag=True, help="Remove all prices of the account.")
@click.option("--query", default="", metavar="TEXT", help="The query string of the request, such as type=image.")
def purge(file: Any, config: Path | None, account: str, everything: bool, query: str) -> None:  # noqa: FBT001 -- click passes it by name
    """Remove the price of the body in FILE (- is standard input), or all prices of an account."""
    if (file is None) is not everything:
        fail("give either a FILE with a body, or --all")
    settings = load_settings(config)
    if account not in settings.accounts:
        fail("--account is not an account in the settings")
    try:
        canonical = None if file is None else canonicalise(file.read())
        change = purge_book(settings, account, canonical, os.fsencode(query))
        click.echo(change_store(change, in_doubt="the prices may not be purged"))
    except BadRequest as error:
        fail(f"{file.name}: {error}")
