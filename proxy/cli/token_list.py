"""`estimate-proxy token list`: the configured tokens, and when each was last used."""

import sys
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path

import click

from proxy.auth import token_id_of
from proxy.cli.direct import from_store, read_token_uses
from proxy.cli.inputs import config_option, load_settings
from proxy.cli.tables import ListedToken, print_table, to_tsv, token_columns, token_lines
from proxy.gateway.live_config import directory_of
from proxy.problems import NO_NAME
from proxy.settings.schema import Settings


@click.command(name="list", short_help="Show the tokens, and when each was last used.")
@config_option
def list_tokens(config: Path | None) -> None:
    """Show the tokens in the config, and when each was last used.

    Last uses are read from the store: of any gateway, within 400 days, to the hour. A use appears after 10 seconds.
    Times are in the time zone org.timezone. A token that belongs to no team has - as its team, and its role as its
    label. When piped, the table is tab-separated text.
    """
    settings = load_settings(config)
    digests = [digest for _, _, _, digest in _configured(settings)]
    tokens = list(_listed(settings, from_store(read_token_uses(settings, digests))))
    if not tokens:
        click.echo("estimate-proxy: no token is configured", err=True)
    zone, directory = settings.org.zone, directory_of(settings)
    if sys.stdout.isatty():
        print_table(f"tokens, {zone.key}", token_columns(tokens, zone, directory))
    else:
        click.echo(to_tsv(token_lines(tokens, zone, directory)), nl=False)


def _listed(settings: Settings, used_at_s: Mapping[str, int]) -> Iterator[ListedToken]:
    for team, label, expires, digest in _configured(settings):
        yield ListedToken(team, label, expires, digest, used_at_s.get(token_id_of(digest)))


def _configured(settings: Settings) -> Iterator[tuple[str, str, date | None, str]]:
    """Team, label, last day and digest of each token. The label of a token without a team is its role."""
    for name, team in settings.teams.items():
        for token in team.tokens:
            yield name, token.label or NO_NAME, token.expires, token.sha256
    roles = {
        "metrics": settings.metrics.tokens,
        "viewer": settings.viewer.tokens,
        "admin": settings.admin.tokens,
    }
    for role, digests in roles.items():
        for digest in digests:
            yield NO_NAME, role, None, digest
