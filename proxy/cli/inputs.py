"""What the commands share: the option `--config`, the settings, and errors about bad input."""

import os
from pathlib import Path
from typing import Any, NoReturn

import click

from proxy.settings.errors import SettingsError
from proxy.settings.loader import DEFAULT_PATHS, find_config, load_with_origins
from proxy.settings.origins import Origins
from proxy.settings.schema import Settings
from proxy.settings.values import IDENTIFIER_RULE

BAD_INPUT = 2
"""The exit status."""

ID_RULE = f"must be an id: {IDENTIFIER_RULE}"

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The TOML file with the settings. Default: the first of $ESTIMATE_PROXY_CONFIG, ./estimate-proxy.toml and "
    "/etc/estimate-proxy/config.toml that exists.",
)


def load_settings(config: Path | None, overrides: dict[str, Any] | None = None) -> Settings:
    """The settings. If they have problems, prints each and exits."""
    return load_settings_with_origins(config, overrides)[0]


def load_settings_with_origins(
    config: Path | None, overrides: dict[str, Any] | None = None
) -> tuple[Settings, Origins]:
    """As `load_settings`, and where the values come from."""
    try:
        return load_with_origins(config, os.environ, overrides=overrides)
    except SettingsError as error:
        if find_config(config, os.environ) is None:
            places = ", ".join(map(str, DEFAULT_PATHS))
            click.echo(f"estimate-proxy: there is no config file: looked for {places}", err=True)
        fail_settings(error)


def fail_settings(error: SettingsError) -> NoReturn:
    for problem in error.problems:
        click.echo(f"estimate-proxy: {problem.path} {problem.message}", err=True)
    raise SystemExit(BAD_INPUT)


def fail(message: str) -> NoReturn:
    click.echo(f"estimate-proxy: {message}", err=True)
    raise SystemExit(BAD_INPUT)
