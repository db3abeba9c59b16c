"""`estimate-proxy check`: validates the settings and shows them."""

import json
import os
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy.cli.inputs import config_option, load_settings
from proxy.settings.loader import find_config
from proxy.settings.schema import effective, warnings


@click.command(short_help="Validate and show the settings.")
@config_option
def check(config: Path | None) -> None:
    """Validate the settings: report all problems at once, or show the effective settings."""
    settings = load_settings(config)
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
