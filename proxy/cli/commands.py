"""The command line. Bad input is one clear line a problem on standard error, and exit status 2."""

import asyncio
import json
import os
import secrets
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from datetime import date
from decimal import Decimal
from pathlib import Path
from time import time
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlencode

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy import __version__
from proxy import auth as teams
from proxy.cache.canonical import canonicalise, present
from proxy.cli.direct import purge_book, read_quota_states, read_usage
from proxy.cli.tables import quota_lines, quota_table, to_tsv, usage_table
from proxy.demo import runner as demo
from proxy.embedded.stores import EmbeddedStoreError
from proxy.problems import BadRequest, StoreUnavailable
from proxy.processes.supervisor import ListenError, Supervisor
from proxy.quota.usage import cells_of, csv_of, json_of, read_usage_query
from proxy.quota.windows import day_of
from proxy.settings.errors import SettingsError
from proxy.settings.loader import DEFAULT_PATHS, Source, find_config, load, load_keying
from proxy.settings.schema import Settings, effective, is_identifier, warnings
from proxy.telemetry import logs
from proxy.telemetry.metrics_files import NoMetricsFileError
from proxy.upstream.address import UpstreamAddress

BAD_INPUT = 2
_Read = TypeVar("_Read")
_ID_RULE = "must be an id: 1 to 64 of a-z, 0-9 and -, beginning and ending with a letter or digit"


class _Commands(click.Group):
    """Tells of bad usage as of any bad input."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _bad_usage_in_one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _bad_usage_in_one_line():
            return super().invoke(ctx)


@contextmanager
def _bad_usage_in_one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _fail(" ".join(error.format_message().split()) + hint)


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The TOML file with the settings. Default: $ESTIMATE_PROXY_CONFIG, ./estimate-proxy.toml or "
    "/etc/estimate-proxy/config.toml, whichever is there first.",
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="estimate-proxy")
def main() -> None:
    """A shared gateway for RenderNet price estimates.

    Teams ask it with tokens of their own; it asks RenderNet with the organisation's key, and asks nothing twice.
    """


@main.command()
@config_option
@click.option("--host", metavar="HOST", help="Listen here instead of server.host.")
@click.option("--port", type=int, metavar="PORT", help="Listen here instead of server.port; 0 takes a free one.")
@click.option("--workers", type=int, metavar="N", help="So many processes instead of server.workers.")
def serve(config: Path | None, host: str | None, port: int | None, workers: int | None) -> None:
    """Run the gateway. SIGTERM drains it, SIGHUP reloads its settings."""
    given = {"host": host, "port": port, "workers": workers}
    chosen = {name: value for name, value in given.items() if value is not None}
    source = Source(config, dict(os.environ), {"server": chosen})
    settings = _load(config, source.overrides)
    logs.configure(settings.log.level, settings.log.format)
    try:
        status = Supervisor(settings, source).run()
    except (ListenError, EmbeddedStoreError, NoMetricsFileError) as error:
        _fail(str(error))
    sys.exit(status)


@main.command(name="demo", short_help="Try it without any account.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    metavar="PORT",
    help="Listen here; 0 takes a free one.",
)
@click.option("--traffic/--no-traffic", default=True, help="Let three teams ask all the time (the default), or not.")
@click.option("--prometheus", is_flag=True, help="Write a configuration with which Prometheus scrapes the demo.")
def demo_command(port: int, traffic: bool, prometheus: bool) -> None:  # noqa: FBT001 -- click passes a flag by name
    """Try all of it without an account: simulated RenderNet, three teams, live traffic."""
    sys.exit(demo.run(port=port, traffic=traffic, prometheus=prometheus))


@main.command(short_help="Validate and show the settings.")
@config_option
def check(config: Path | None) -> None:
    """Validate the settings; report all problems at once, or show what is in force."""
    settings = _load(config)
    for warning in warnings(settings):
        click.echo(f"estimate-proxy: warning: {warning}", err=True)
    source = find_config(config, os.environ) or "no file: defaults and the environment"
    rows = [(path, None if value is None else _toml(value)) for path, value in effective(settings)]
    if not sys.stdout.isatty():
        click.echo(f"# from {source}")
        for path, value in rows:
            click.echo(f"# {path} is not set" if value is None else f"{path} = {value}")
        return
    table = Table("setting", "value", title=Text(f"from {source}"), title_justify="left", box=None)
    for path, value in rows:
        table.add_row(path, Text(value or "-", overflow="fold"))
    Console().print(table)


def _toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float() | Decimal() | date():
            return str(value)
        case tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            filled = {key: member for key, member in value.items() if member not in (None, "")}
            return f"{{ {', '.join(f'{key} = {_toml(member)}' for key, member in filled.items())} }}"
        case _:
            return json.dumps(str(value), ensure_ascii=False)


@main.group()
def token() -> None:
    """Make tokens for teams."""


@token.command()
@click.argument("team")
def new(team: str) -> None:
    """Print a new token for TEAM, once, and the line for the config."""
    if not is_identifier(team):
        _fail(f"TEAM {_ID_RULE}")
    made = teams.token_of("".join(secrets.choice(teams.BASE62) for _ in range(teams.RANDOM_CHARACTERS)))
    click.echo(made)
    click.echo(
        f"\nThis is the only time it is shown: give it to the team. In the config:\n\n"
        f'[teams.{team}]\ntokens = ["{teams.digest_of(made)}"]\n\n'
        "# For an operator or Prometheus the same line stands under [admin] or [metrics] instead.",
    )


@main.command(short_help="Show a body's canonical form and key.")
@click.argument("file", type=click.File("rb"))
@config_option
@click.option("--account", default="default", show_default=True, metavar="ID", help="The account that the key is for.")
@click.option("--query", default="", metavar="TEXT", help="The query string of the request, such as type=image.")
def explain(file: Any, config: Path | None, account: str, query: str) -> None:
    """Show the canonical body and the key of the body in FILE (- is standard input). Asks nobody."""
    if not is_identifier(account):
        _fail(f"--account {_ID_RULE}")
    try:
        canonical = canonicalise(file.read())
        keying = load_keying(config, os.environ)
    except BadRequest as error:
        _fail(f"{file.name}: {error}")
    except SettingsError as error:
        _fail_settings(error)
    address = UpstreamAddress.of(keying.upstream.base_url)
    sent = address.query_as_sent(os.fsencode(query))
    click.echo(b"body  " + canonical)
    click.echo(f"key   {address.key_of(canonical, account=account, query=sent, ignored=keying.cache.ignore)}")
    if members := present(canonical, keying.cache.ignore):
        click.echo(f"not in the key: {', '.join(members)}")


@main.command(short_help="Forget stored prices.")
@click.argument("file", type=click.File("rb"), required=False)
@config_option
@click.option("--account", default="default", show_default=True, metavar="ID", help="Whose prices to forget.")
@click.option("--all", "everything", is_flag=True, help="Forget the account's whole price book.")
@click.option("--query", default="", metavar="TEXT", help="The query string of the request, such as type=image.")
def purge(file: Any, config: Path | None, account: str, everything: bool, query: str) -> None:  # noqa: FBT001 -- as demo
    """Forget the price of the body in FILE (- is standard input), or all prices of an account."""
    if (file is None) is not everything:
        _fail("give either a FILE with a body, or --all")
    settings = _load(config)
    if account not in settings.accounts:
        _fail("--account names no account of the settings")
    try:
        canonical = None if file is None else canonicalise(file.read())
        click.echo(asyncio.run(purge_book(settings, account, canonical, os.fsencode(query))))
    except BadRequest as error:
        _fail(f"{file.name}: {error}")
    except EmbeddedStoreError as error:
        _fail(str(error))
    except StoreUnavailable:
        _fail("the store is out of reach: nothing is sure to be purged; try again")


@main.command(name="usage", short_help="Show what teams have used.")
@config_option
@click.option("--team", metavar="ID", help="Of this team alone. Default: all that ever had usage.")
@click.option("--from", "first", metavar="DAY", help="First day, as 2026-11-01. Default: the first of the month.")
@click.option("--to", "last", metavar="DAY", help="Last day. Default: today.")
@click.option(
    "--by",
    metavar="NAMES",
    help="A row for each of day, team or model, or of several joined by commas. Default: team; with --team: day.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
    help="A table for people, or what GET /v1/usage answers.",
)
def usage_command(
    config: Path | None, team: str | None, first: str | None, last: str | None, by: str | None, form: str
) -> None:
    """Show requests and estimated credits, exactly as the store has them.

    Days are those of org.timezone. When piped, the table is tab-separated text with a column for each outcome and
    without the total.
    """
    settings = _load(config)
    zone = settings.org.zone
    given = {"from": first, "to": last, "team": team, "by": by}
    asked = {"by": "team" if team is None else "day"} | {name: text for name, text in given.items() if text is not None}
    try:
        query = read_usage_query(urlencode(asked, errors="replace").encode(), None, today=day_of(int(time()), zone))
        usage = _from_store(read_usage(settings, query))
    except BadRequest as error:
        _fail(f"--{error}")
    if form != "table":
        click.echo(csv_of(usage, query.by) if form == "csv" else json_of(usage, query, zone.key) + b"\n", nl=False)
    elif sys.stdout.isatty():
        console = Console()
        console.print(usage_table(usage, query, zone, console))
    else:
        click.echo(to_tsv(cells_of(usage, query.by)), nl=False)


@main.command(name="quota", short_help="Show quotas, and what is left of them.")
@click.argument("team", required=False)
@config_option
def quota_command(team: str | None, config: Path | None) -> None:
    """Show the quotas of TEAM, or of all teams: what is used, what is left, when they start anew.

    Exactly as the store has it. When piped, the table is tab-separated text.
    """
    settings = _load(config)
    if team not in (None, *settings.teams):
        _fail("TEAM names no team of the settings")
    quota_states = _from_store(read_quota_states(settings, team))
    if not any(quota_state.limits.quotas for quota_state in quota_states):
        click.echo("estimate-proxy: no quota is set", err=True)
    if sys.stdout.isatty():
        Console().print(quota_table(quota_states, settings.org.zone))
    else:
        click.echo(to_tsv(quota_lines(quota_states, settings.org.zone)), nl=False)


def _from_store(reading: Coroutine[Any, Any, _Read]) -> _Read:
    """What the store says, or the end of the command."""
    try:
        return asyncio.run(reading)
    except EmbeddedStoreError as error:
        _fail(str(error))
    except StoreUnavailable:
        _fail("the store is out of reach")


def _load(config: Path | None, overrides: dict[str, Any] | None = None) -> Settings:
    try:
        return load(config, os.environ, overrides=overrides)
    except SettingsError as error:
        if find_config(config, os.environ) is None:
            click.echo(
                f"estimate-proxy: there is no config file: looked for {', '.join(map(str, DEFAULT_PATHS))}", err=True
            )
        _fail_settings(error)


def _fail_settings(error: SettingsError) -> NoReturn:
    for problem in error.problems:
        click.echo(f"estimate-proxy: {problem.path} {problem.message}", err=True)
    sys.exit(BAD_INPUT)


def _fail(message: str) -> NoReturn:
    click.echo(f"estimate-proxy: {message}", err=True)
    sys.exit(BAD_INPUT)
