"""`estimate-proxy learned`: shows what was learned about prices, and forgets it. Reads the price book's store."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from zoneinfo import ZoneInfo

import click
import orjson

from proxy.cli.direct import change_store, forget_learned, from_store, read_learned
from proxy.cli.inputs import config_option, fail, load_settings
from proxy.cli.tables import Column, print_table, to_tsv
from proxy.learning.evidence import Scope
from proxy.learning.report import accounts_document, bound_in_words, percent_below
from proxy.quota.windows import rfc3339
from proxy.settings.schema import Settings

COLUMNS = (
    *("account", "scope", "state", "tests", "tests_needed", "fewer_than_percent", "asked", "answered"),
    *("would_have_answered", "would_have_been_wrong", "audits", "contradictions", "suspect_answers", "items"),
    *("left_out", "counting", "team", "last_asked"),
)


@click.group(short_help="Show what was learned about prices.", invoke_without_command=True)
@config_option
@click.option("--account", metavar="ID", help="Only this account. Default: all in the settings.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="table is for people; json is what the endpoint returns.",
)
@click.pass_context
def learned(context: click.Context, config: Path | None, account: str | None, form: str) -> None:
    """Show which members decide prices, as learned from RenderNet's answers, and how well that was tested.

    One row for each scope: bodies with the same members, models and number of items. When piped, the table is
    tab-separated text. docs/learning.md explains the words.
    """
    if context.invoked_subcommand is not None:
        return
    settings = load_settings(config)
    _check_account(settings, account)
    found = from_store(read_learned(settings, sorted(settings.accounts) if account is None else [account]))
    zone, learn = settings.org.zone, settings.cache.learn
    if form == "json":
        click.echo(orjson.dumps(accounts_document(learn, found, zone)))
    elif sys.stdout.isatty():
        print_table(f"learned about prices, {zone.key}, cache.learn = {learn}", _columns(found, zone))
        for scope in (scope for scopes in found.values() for scope in scopes if scope.tests):
            click.echo(f"{scope.id}: {bound_in_words(scope)}")
    else:
        click.echo(to_tsv([COLUMNS, *_rows(found, zone)]), nl=False)
    if not any(found.values()):
        click.echo("estimate-proxy: nothing is learned yet", err=True)


@learned.command(short_help="Forget what was learned, and begin again.")
@config_option
@click.option("--account", default="default", show_default=True, metavar="ID", help="The account of the scopes.")
@click.option("--scope", metavar="ID", help="Forget this scope, as `estimate-proxy learned` shows it.")
@click.option("--all", "everything", is_flag=True, help="Forget all scopes of the account.")
def forget(config: Path | None, account: str, scope: str | None, everything: bool) -> None:  # noqa: FBT001 -- click passes it by name
    """Forget what was learned in one scope, or in all scopes of an account. Gateways follow within two seconds.

    Stored prices stay; nothing is inferred until everything is learned again.
    """
    if (scope is None) is not everything:
        fail("give either --scope with a scope's id, or --all")
    settings = load_settings(config)
    _check_account(settings, account)
    change = forget_learned(settings, account, scope)
    number = change_store(change, in_doubt="what was learned may not be forgotten")
    if scope is not None and number == 0:
        fail(f"--scope: nothing was learned in {scope!r} for the account {account}")
    click.echo(f"forgot {number} scope{'' if number == 1 else 's'} of the account {account}")


def _check_account(settings: Settings, account: str | None) -> None:
    if account not in (None, *settings.accounts):
        fail(f"--account is not an account in the settings: they have {', '.join(sorted(settings.accounts))}")


def _columns(found: Mapping[str, Sequence[Scope]], zone: ZoneInfo) -> list[Column]:
    """Scopes for people."""
    ranks = {"scope": 0, "state": 0, "tests": 0, "left_out": 0, "items": 1, "fewer_than_percent": 2, "account": 2}
    headers = {"fewer_than_percent": "below %", "would_have_been_wrong": "wrong"}
    texts = {"account", "scope", "state", "items", "left_out", "counting", "team", "last_asked"}
    cells = zip(*_rows(found, zone), strict=True) if any(found.values()) else [()] * len(COLUMNS)
    return [
        Column(
            headers.get(name, name.replace("_", " ")),
            each,
            ranks.get(name, place + 3),
            is_text=name in texts,
            wraps=name in texts,
        )
        for place, (name, each) in enumerate(zip(COLUMNS, cells, strict=True))
    ]


def _rows(found: Mapping[str, Sequence[Scope]], zone: ZoneInfo) -> list[list[str]]:
    """By account, the most asked scope first."""
    return [
        _row(account, scope, zone)
        for account, scopes in found.items()
        for scope in sorted(scopes, key=lambda scope: -scope.asked)
    ]


def _row(account: str, scope: Scope, zone: ZoneInfo) -> list[str]:
    last = scope.last_contradiction
    suspects = 0 if last is None else last.suspects
    amounts = (scope.asked, scope.answered, scope.right + scope.wrong, scope.wrong, scope.audits, scope.contradictions)
    return [
        *(account, scope.id, scope.state.value, str(scope.tests), str(scope.needed), percent_below(scope.bound)),
        *map(str, (*amounts, suspects)),
        *map(", ".join, (scope.items, scope.left_out, scope.counting)),
        *(scope.team, rfc3339(scope.used_at_ms // 1000, zone)),
    ]
