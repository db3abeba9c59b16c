"""`estimate-proxy token`: makes tokens for teams."""

import secrets

import click

from proxy.auth import BASE62, RANDOM_CHARACTERS, digest_of, token_of
from proxy.cli.inputs import ID_RULE, fail
from proxy.settings.schema import is_identifier


@click.group()
def token() -> None:
    """Make tokens for teams."""


@token.command()
@click.argument("team")
def new(team: str) -> None:
    """Print a new token for TEAM, once, and the line for the config."""
    if not is_identifier(team):
        fail(f"TEAM {ID_RULE}")
    made = token_of("".join(secrets.choice(BASE62) for _ in range(RANDOM_CHARACTERS)))
    click.echo(made)
    click.echo(
        f"\nThis is the only time it is shown: give it to the team. In the config:\n\n"
        f'[teams.{team}]\ntokens = ["{digest_of(made)}"]\n\n'
        "# For an operator or Prometheus the same line stands under [admin] or [metrics] instead.",
    )
