"""`estimate-proxy token`: makes tokens for teams, viewers, operators and Prometheus, and lists the configured ones."""

import json
from datetime import date
from importlib import import_module

import click

from proxy.auth import digest_of, new_token
from proxy.cli.inputs import ID_RULE, fail
from proxy.settings.values import is_identifier

_ROLES = {
    "viewer": "May read all teams' reports, price changes and what was learned, nothing else.",
    "metrics": "May read /metrics, nothing else.",
    "admin": "May purge, read all that viewers may read, and read /metrics.",
}
"""The section of each role in the config, and what its tokens may do."""


class _TokenCommands(click.Group):
    """Imports `list` when it is used: unlike the others, it needs the client of the store."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted((*super().list_commands(ctx), "list"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name != "list":
            return super().get_command(ctx, cmd_name)
        command: click.Command = import_module("proxy.cli.token_list").list_tokens
        return command


@click.group(cls=_TokenCommands, short_help="Make tokens, and show when each was last used.")
def token() -> None:
    """Make tokens for teams, viewers, operators and Prometheus, and show when they were last used."""


@token.command()
@click.argument("team", required=False)
@click.option("--label", metavar="TEXT", help="What the token is for, such as ci: shown wherever people read.")
@click.option("--expires", metavar="DAY", help="The last day on which it works, as 2027-06-30. Default: it never ends.")
@click.option("--viewer", is_flag=True, help=f"Not for a team. {_ROLES['viewer']}")
@click.option("--metrics", is_flag=True, help=f"Not for a team. {_ROLES['metrics']}")
@click.option("--admin", is_flag=True, help=f"Not for a team. {_ROLES['admin']}")
@click.option("--quiet", is_flag=True, help="Print only the token on standard output, the rest on standard error.")
def new(team: str | None, label: str | None, expires: str | None, quiet: bool, **roles: bool) -> None:  # noqa: FBT001 -- click passes a flag by name
    """Print a new token for TEAM, once, and the line for the config.

    The gateway only knows the token's digest, which is what the config has.
    """
    chosen = [name for name, is_chosen in roles.items() if is_chosen]
    if len(chosen) > 1:
        fail(f"--{chosen[0]} and --{chosen[1]} exclude each other: make a token for each")
    role = chosen[0] if chosen else None
    if team is None and role is None:
        raise click.UsageError("Missing argument 'TEAM', or one of --viewer, --metrics and --admin.")
    if team is not None and not is_identifier(team):
        fail(f"TEAM {ID_RULE}")
    if label is not None and not (label and label.isprintable()):
        fail("--label must be one line of text without control characters")
    if role is not None and expires is not None:
        fail(f"--expires is only for tokens of teams: those of [{role}] work until they are removed")
    last_day = None if expires is None else _future_day(expires)
    made = new_token()
    digest = digest_of(made)
    click.echo(made)
    lines = _role_lines(role, digest, team, label) if role else _team_lines(team, digest, label, last_day)
    click.echo(f"\nThe token is shown only this once. In the config:\n\n{lines}", err=quiet)


def _future_day(text: str) -> date:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        fail("--expires must be a date, such as 2027-06-30")
    if day < date.today():  # noqa: DTZ011 -- a day off in another zone is no harm
        fail("--expires is in the past")
    return day


def _team_lines(team: str | None, digest: str, label: str | None, last_day: date | None) -> str:
    """The team's table with the token; a table of its own if there is more to say than the digest."""
    members = [f'sha256 = "{digest}"']
    if label:
        members.append(f"label = {json.dumps(label, ensure_ascii=False)}")
    if last_day:
        members.append(f"expires = {last_day}")
    entry = f"{{ {', '.join(members)} }}" if len(members) > 1 else f'"{digest}"'
    return f"[teams.{team}]\ntokens = [{entry}]  # if the team has tokens, add this one to its list"


def _role_lines(role: str, digest: str, team: str | None, label: str | None) -> str:
    note = ", ".join(text for text in (team, label) if text)
    return f'[{role}]\ntokens = ["{digest}"]  # {note}{": " * bool(note)}if there are tokens, add this one to the list'
