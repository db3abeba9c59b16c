"""`estimate-proxy check`: validates the settings, and shows them with where they come from."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
from pydantic import Secret
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy.cli.connect import Finding, probe
from proxy.cli.inputs import BAD_INPUT, config_option, load_settings_with_origins
from proxy.settings.loader import find_config, read_config_text
from proxy.settings.origins import Origins, line_of
from proxy.settings.schema import Settings, effective, inherited
from proxy.settings.warnings import warnings

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class _Row:
    """A setting. `value` is None if it is not set; `origin` is empty for what the file says in plain sight."""

    path: str
    value: str | None
    origin: str


@click.command(short_help="Validate and show the settings.")
@config_option
@click.option("--connect", is_flag=True, help="Also connect to the stores and to RenderNet's host.")
def check(config: Path | None, connect: bool) -> None:  # noqa: FBT001 -- click passes a flag by name
    """Validate the settings: report all problems at once, or show the effective settings.

    Secrets are masked. Shows where each secret comes from (file, variable, or line of the config), and each value that
    is not in the config file: a variable, a default, or a setting that it is inherited from.

    With --connect, also shows what it finds: TLS and, of stores, version, eviction, persistence and the difference of
    the clocks. It sends RenderNet no request and no key.
    """
    settings, origins = load_settings_with_origins(config)
    for warning in warnings(settings, datetime.now(settings.org.zone).date()):
        click.echo(f"estimate-proxy: warning: {warning}", err=True)
    source = find_config(config, os.environ)
    rows = list(_rows(settings, origins, source))
    findings = asyncio.run(probe(settings)) if connect else []
    title = f"from {source or 'no file: defaults and the environment'}"
    if sys.stdout.isatty():
        Console().print(_table(rows, title))
    else:
        click.echo(f"# {title}")
        for row in rows:
            click.echo(_line(row))
    _report(findings)


def _report(findings: Sequence[Finding]) -> None:
    """Prints what was found at each place, and exits if the gateway would not work."""
    for finding in findings:
        click.echo(f"# {finding.place}: {finding.facts}")
        for warning in finding.warnings:
            click.echo(f"estimate-proxy: warning: {finding.place} {warning}", err=True)
        for error in finding.errors:
            click.echo(f"estimate-proxy: {finding.place} {error}", err=True)
    if any(finding.errors for finding in findings):
        raise SystemExit(BAD_INPUT)


def _rows(settings: Settings, origins: Origins, config: Path | None) -> Iterator[_Row]:
    by_path = {".".join(key): origin for key, origin in origins.items()}
    text = "" if config is None else read_config_text(config)
    followed = inherited(settings)
    for path, value in effective(settings):
        origin = by_path.get(path)
        if value is None:
            source, value_there = followed.get(path, ("", None))
            shown = f"inherited from {source}: {_toml(value_there)}" if source else ""
            yield _Row(path, None, shown)
        elif origin is None:
            yield _Row(path, _toml(value), DEFAULT)
        elif origin.variable or isinstance(value, Secret):
            line = None if origin.variable else line_of(text, origin.key)
            place = origin.variable or (f"{config}, line {line}" if line else str(config))
            named = f"{origin.secret_file}, named in {place}" if origin.secret_file else place
            yield _Row(path, _toml(value), named)
        else:
            yield _Row(path, _toml(value), "")


def _line(row: _Row) -> str:
    """A row as a line of TOML."""
    if row.value is None:
        return f"# {row.path} is {row.origin or 'not set'}"
    return f"{row.path} = {row.value}" + (f"  # {row.origin}" if row.origin else "")


def _table(rows: list[_Row], title: str) -> Table:
    table = Table("setting", "value", "from", title=Text(title), title_justify="left", box=None)
    for row in rows:
        table.add_row(row.path, Text(row.value or "-", overflow="fold"), Text(row.origin, overflow="fold"))
    return table


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
