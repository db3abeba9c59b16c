"""`estimate-proxy token list`: the configured tokens, and when each was last used."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import click

from proxy.auth import token_id_of
from proxy.cli.direct import from_store, read_token_uses
from proxy.cli.inputs import config_option, load_settings
from proxy.cli.tables import Column, name_columns, print_table, to_tsv
from proxy.gateway.live_config import directory_of
from proxy.problems import NO_NAME
from proxy.quota.windows import rfc3339
from proxy.settings.schema import UNLABELLED_CHARACTERS, Settings

COLUMNS = ("team", "label", "expires", "last_used", "digest", "team_name")


@dataclass(frozen=True, slots=True)
class _Token:
    """A configured token. If it belongs to no team, its label is its role."""

    team: str
    label: str
    last_day: str
    digest: str

    @property
    def digest_start(self) -> str:
        """Tells tokens with the same label apart."""
        return self.digest[:UNLABELLED_CHARACTERS]


@click.command(name="list", short_help="Show the tokens, and when each was last used.")
@config_option
def list_tokens(config: Path | None) -> None:
    """Show the tokens in the config, and when each was last used.

    Last uses are read from the store: of any gateway, within 400 days, to the hour. A use appears after 10 seconds.
    Times are in the time zone org.timezone. A token that belongs to no team has - as its team, and its role as its
    label. When piped, the table is tab-separated text.
    """
    settings = load_settings(config)
    zone, directory = settings.org.zone, directory_of(settings)
    tokens = list(_configured(settings))
    uses = from_store(read_token_uses(settings, [token.digest for token in tokens]))
    if not tokens:
        click.echo("estimate-proxy: no token is configured", err=True)
    used_at_s = [uses.get(token_id_of(token.digest)) for token in tokens]
    names = [directory.name_of(token.team) for token in tokens]
    if sys.stdout.isatty():
        columns = [
            Column("team", [token.team for token in tokens], is_text=True),
            *name_columns(names, rank=3),
            Column("label", [token.label for token in tokens], is_text=True),
            Column("expires", [token.last_day for token in tokens], rank=1, is_text=True),
            Column("last used", [_minute(at, zone) for at in used_at_s], is_text=True),
            Column("digest", [token.digest_start for token in tokens], rank=2, is_text=True),
        ]
        print_table(f"tokens, {zone.key}", columns)
    else:
        last_used = [NO_NAME if at is None else rfc3339(at, zone) for at in used_at_s]
        rows = [
            (token.team, token.label, token.last_day, used, token.digest_start, name)
            for token, used, name in zip(tokens, last_used, names, strict=True)
        ]
        click.echo(to_tsv([COLUMNS, *rows]), nl=False)


def _minute(at_s: int | None, zone: ZoneInfo) -> str:
    return NO_NAME if at_s is None else f"{datetime.fromtimestamp(at_s, zone):%Y-%m-%d %H:%M}"


def _configured(settings: Settings) -> Iterator[_Token]:
    for name, team in settings.teams.items():
        for token in team.tokens:
            yield _Token(name, token.label or NO_NAME, str(token.expires or NO_NAME), token.sha256)
    for role in ("metrics", "viewer", "admin"):
        for digest in getattr(settings, role).tokens:
            yield _Token(NO_NAME, role, NO_NAME, digest)
