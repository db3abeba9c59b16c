"""Where the value of a setting comes from: a line of the config file, an environment variable, or a secret's file."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.settings.errors import SettingsProblem, path_of
from proxy.settings.tree import KeyPath, leaves


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one value comes from.

    key: the setting that gives it, such as `("store", "password_file")` for `store.password`.
    variable: the environment variable; None for the config file.
    secret_file: the file that holds the value, if the setting only names it.
    """

    key: KeyPath
    variable: str | None
    secret_file: Path | None = None


Origins = dict[KeyPath, Origin]
"""By setting. Values without an origin are defaults, or options of the command line."""


def origins_of(layer: Mapping[str, Any], variable: str | None) -> Origins:
    """The origins of all values in `layer`, which comes from one source."""
    return {key: Origin(key, variable) for key, _ in leaves(layer)}


def name_variables(problems: list[SettingsProblem], origins: Origins) -> list[SettingsProblem]:
    """The problems; those whose value comes from an environment variable also name it."""
    variables = {path_of(*key): path_of(origin.variable) for key, origin in origins.items() if origin.variable}
    return [_name_variable(problem, variables) for problem in problems]


def _name_variable(problem: SettingsProblem, variables: Mapping[str, str]) -> SettingsProblem:
    for path, variable in variables.items():
        if _contains(path, problem.path) or _contains(problem.path, path):
            return SettingsProblem(problem.path, f"{problem.message} (set by the variable {variable})")
    return problem


def line_of(text: str, key: KeyPath) -> int | None:
    """The number of the line in a TOML document on which `key` gets its value.

    None if that is not one line: an inline table over several lines, for example.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    for index, line in enumerate(lines):
        before, through = ("\n".join(lines[:end]) for end in (index, index + 1))
        if key[-1] in line and _has_key(through, key) and not _has_key(before, key):
            return index + 1
    return None


def _has_key(text: str, key: KeyPath) -> bool:
    """Whether a part of a document is complete TOML with a value for `key`."""
    try:
        table: Any = tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # a value continues on the next line
        return False
    for name in key:
        table = table.get(name) if isinstance(table, dict) else None
    return table is not None


def _contains(path: str, other: str) -> bool:
    return other == path or other.startswith((f"{path}.", f"{path}["))
