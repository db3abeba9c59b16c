"""`estimate-proxy explain`: shows how the gateway reads a body, without a gateway or a store."""

import os
from pathlib import Path
from typing import Any

import click

from proxy.cache.canonical import canonicalise, present
from proxy.cli.inputs import ID_RULE, config_option, fail, fail_settings
from proxy.problems import BadRequest
from proxy.settings.errors import SettingsError
from proxy.settings.loader import load_key_settings
from proxy.settings.values import is_identifier
from proxy.upstream.address import UpstreamAddress


@click.command(short_help="Show a body's canonical form and key.")
@click.argument("file", type=click.File("rb"))
@config_option
@click.option("--account", default="default", show_default=True, metavar="ID", help="The account that the key is for.")
@click.option("--query", default="", metavar="TEXT", help="The query string of the request, such as type=image.")
def explain(file: Any, config: Path | None, account: str, query: str) -> None:
    """Show the canonical body and the key of the body in FILE (- is standard input). Sends no request."""
    if not is_identifier(account):
        fail(f"--account {ID_RULE}")
    try:
        canonical = canonicalise(file.read())
        key_settings = load_key_settings(config, os.environ)
    except BadRequest as error:
        fail(f"{file.name}: {error}")
    except SettingsError as error:
        fail_settings(error)
    address = UpstreamAddress.of(key_settings.upstream.base_url)
    sent = address.query_as_sent(os.fsencode(query))
    click.echo(b"body  " + canonical)
    click.echo(f"key   {address.key_of(canonical, account=account, query=sent, ignored=key_settings.cache.ignore)}")
    if members := present(canonical, key_settings.cache.ignore):
        click.echo(f"not in the key: {', '.join(members)}")
