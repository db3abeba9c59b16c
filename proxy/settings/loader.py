"""Loads the settings from all sources, and finds everything that is wrong with them.

* Sources, in rising priority: defaults, the TOML file, `REDIS_URL` and `RENDERNET_API_KEY`, environment variables
  `ESTIMATE_PROXY_<SECTION>__<KEY>`, command-line options.
* Environment variables without `__` are ignored: Kubernetes injects `ESTIMATE_PROXY_PORT` and the like for a service of
  this name. A value that begins with `[` or `{` is read as JSON, unless it is a secret.
* Paths are relative to the config's directory.
* A secret may be in a file of its own, `<key>_file`. If a source sets `<key>` or `<key>_file`, both are removed from
  the sources before it.
* All problems are reported at once, each with its path. If there is any, the settings are not used.
"""

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from proxy.settings.cross_checks import cross_problems
from proxy.settings.errors import SECRET_KEYS, SettingsError, SettingsProblem, explain, path_of
from proxy.settings.files import MAX_CONFIG_BYTES, UnreadableError, read_text
from proxy.settings.origins import Origin, Origins, name_variables, origins_of
from proxy.settings.schema import CacheSettings, Settings, UpstreamSettings
from proxy.settings.tree import KeyPath, Tree, merge, nested, tables_of

PREFIX = "ESTIMATE_PROXY_"
CONFIG_VARIABLE = "ESTIMATE_PROXY_CONFIG"
DEFAULT_PATHS = (Path("estimate-proxy.toml"), Path("/etc/estimate-proxy/config.toml"))
WELL_KNOWN_ENV = {
    "RENDERNET_API_KEY": ("accounts", "default", "api_key"),
    "REDIS_URL": ("store", "url"),
}
PATH_KEYS = (
    ("upstream", "ca_file"),
    ("store", "data_dir"),
    ("store", "ca_file"),
    ("store", "cert_file"),
    ("store", "key_file"),
)
MAX_SECRET_BYTES = 64 * 2**10

_Model = TypeVar("_Model", bound=BaseModel)


def load(config: Path | None, environ: Mapping[str, str], *, overrides: Tree | None = None) -> Settings:
    """The settings from `config` (or the first of `DEFAULT_PATHS` that exists), the environment and `overrides`.

    Raises `SettingsError` with every problem found.
    """
    return load_with_origins(config, environ, overrides=overrides)[0]


def load_with_origins(
    config: Path | None, environ: Mapping[str, str], *, overrides: Tree | None = None
) -> tuple[Settings, Origins]:
    """The settings as `load` returns them, and where their values come from. Raises as `load`."""
    problems: list[SettingsProblem] = []
    source = find_config(config, environ)
    tree, origins = _gather(source, environ, problems)
    merge(tree, overrides or {})
    for key in origins_of(overrides or {}, None):
        origins.pop(key, None)
    folder = source.parent if source else Path()
    _read_secret_files(tree, folder, problems, origins)
    _resolve_paths(tree, folder)
    _default_data_dir(tree, environ)
    problems += dict.fromkeys(cross_problems(tree))
    return _validate(Settings, tree, problems, origins), origins


@dataclass(frozen=True, slots=True)
class Source:
    """The sources of a gateway's settings, to load them again. The fields are the parameters of `load`."""

    config: Path | None
    environ: Mapping[str, str]
    overrides: Tree

    def load(self) -> Settings:
        """Raises `SettingsError` with every problem found."""
        return load(self.config, self.environ, overrides=self.overrides)

    def files(self) -> list[Path]:
        """The config and the secret files that it names, whether they exist or not."""
        config = find_config(self.config, self.environ)
        try:
            tree, _ = _gather(config, self.environ, [])
        except SettingsError:
            tree = {}
        names = [table.get(f"{key}_file") for _, table, key in _secret_tables(tree)]
        folder = config.parent if config else Path()
        secrets = [folder / name for name in names if isinstance(name, str)]
        return [config, *secrets] if config else secrets


class KeySettings(BaseModel):
    """The sections that cache keys depend on."""

    upstream: UpstreamSettings = UpstreamSettings()
    cache: CacheSettings = CacheSettings()


def load_key_settings(config: Path | None, environ: Mapping[str, str]) -> KeySettings:
    """The settings that cache keys depend on. Secrets and teams may be missing. Raises `SettingsError`."""
    problems: list[SettingsProblem] = []
    sections = tuple(f"{PREFIX}{name.upper()}__" for name in KeySettings.model_fields)
    ours = {name: value for name, value in environ.items() if name.upper().startswith(sections)}
    tree, origins = _gather(find_config(config, environ), ours, problems)
    return _validate(KeySettings, tree, problems, origins)


def find_config(config: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read: `config`, else `$ESTIMATE_PROXY_CONFIG`, else the first of `DEFAULT_PATHS` that exists."""
    if config is None and (path := environ.get(CONFIG_VARIABLE)):
        config = Path(path)
    return config or next((path for path in DEFAULT_PATHS if os.path.lexists(path)), None)


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without the variables that hold settings."""
    return {
        name: value for name, value in environ.items() if not name.startswith(PREFIX) and name not in WELL_KNOWN_ENV
    }


def _gather(path: Path | None, environ: Mapping[str, str], problems: list[SettingsProblem]) -> tuple[Tree, Origins]:
    """The values of the file and the environment, laid over each other, and where they come from."""
    tree: Tree = {}
    config = _read_config(path)
    origins = origins_of(config, None)
    well_known: Tree = {}
    for name, keys in WELL_KNOWN_ENV.items():
        if environ.get(name):
            merge(well_known, nested(keys, environ[name]))
            origins[keys] = Origin(keys, name)
    for layer in (config, well_known, _read_environment(environ, problems, origins)):
        _unset_replaced_secrets(tree, layer, problems)
        merge(tree, layer)
    return tree, origins


def _validate(model: type[_Model], tree: Tree, problems: list[SettingsProblem], origins: Origins) -> _Model:
    try:
        settings = model.model_validate(tree)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise SettingsError(name_variables([*problems, *map(explain, details)], origins)) from None
    if problems:
        raise SettingsError(name_variables(problems, origins))
    return settings


def _read_config(path: Path | None) -> Tree:
    if path is None:
        return {}
    try:
        return tomllib.loads(read_text(path, MAX_CONFIG_BYTES))
    except UnreadableError as error:
        message = str(error)
    except tomllib.TOMLDecodeError as error:
        message = f"is not valid TOML: {error}"
    except (RecursionError, ValueError):  # tomllib raises these without a line number
        message = "is not valid TOML: it is nested too deeply, or has a number with too many digits"
    raise SettingsError([SettingsProblem(str(path), message)])


def read_config_text(path: Path) -> str:
    """The text of the config file; empty if it cannot be read any more."""
    try:
        return read_text(path, MAX_CONFIG_BYTES)
    except UnreadableError:
        return ""


def _read_environment(environ: Mapping[str, str], problems: list[SettingsProblem], origins: Origins) -> Tree:
    """The values of our variables. Adds where they come from to `origins`."""
    tree: Tree = {}
    ours = {name: value for name, value in environ.items() if name.startswith(PREFIX) and "__" in name}
    for name, value in sorted(ours.items()):
        keys = tuple(name.removeprefix(PREFIX).lower().split("__"))
        if not all(keys):
            problems.append(SettingsProblem(name, f"must be a name like {PREFIX}SERVER__PORT"))
            continue
        try:
            is_json = value[:1] in ("[", "{") and keys[-1] not in SECRET_KEYS
            layer = nested(keys, json.loads(value) if is_json else value)
            merge(tree, layer)
            origins.update(origins_of(layer, name))
        except (ValueError, RecursionError):
            problems.append(SettingsProblem(name, "begins like JSON, but is not valid JSON"))
    return tree


def _secret_tables(tree: Tree) -> Iterator[tuple[KeyPath, Tree, str]]:
    """For each secret: the path of its table, the table, and the secret's key."""
    for name, account in tables_of(tree, "accounts").items():
        yield ("accounts", name), account, "api_key"
    if isinstance(store := tree.get("store"), dict):
        yield ("store",), store, "password"
        yield ("store",), store, "sentinel_password"


def _unset_replaced_secrets(tree: Tree, layer: Tree, problems: list[SettingsProblem]) -> None:
    """Removes from `tree` the secrets that `layer` sets, as `<key>` or `<key>_file`."""
    earlier = {path: table for path, table, _ in _secret_tables(tree)}
    for path, table, key in _secret_tables(layer):
        names = {key, f"{key}_file"}
        if names <= table.keys():
            message = f"is set together with {key}: keep one of them"
            problems.append(SettingsProblem(path_of(*path, f"{key}_file"), message))
            del table[f"{key}_file"]
        if names & table.keys():
            for name in names:
                earlier.get(path, {}).pop(name, None)


def _read_secret_files(tree: Tree, folder: Path, problems: list[SettingsProblem], origins: Origins) -> None:
    """Replaces each `<secret>_file` in `tree` with the content of the file."""
    for path, table, key in _secret_tables(tree):
        name = table.pop(f"{key}_file", None)
        if name is None:
            continue
        try:
            table[key] = _read_secret(folder, name)
            if (origin := origins.get((*path, f"{key}_file"))) is not None:
                origins[*path, key] = replace(origin, secret_file=folder / str(name))
        except UnreadableError as error:
            problems.append(SettingsProblem(path_of(*path, f"{key}_file"), str(error)))
            table[key] = "unread"  # so that it is not reported as missing too


def _read_secret(folder: Path, name: object) -> str:
    if not isinstance(name, str) or not name:
        raise UnreadableError("must be a path")
    try:
        secret = read_text(folder / name, MAX_SECRET_BYTES).rstrip("\r\n")
    except UnreadableError as error:
        raise UnreadableError(f"names {_shown(folder, name)}, which {error}") from None
    if not secret:
        raise UnreadableError(f"names {_shown(folder, name)}, which is empty")
    return secret


def _shown(folder: Path, name: str) -> str:
    """A secret's file, for messages. A relative name is left out: the secret itself could stand there by mistake."""
    return name if Path(name).is_absolute() and name.isprintable() else f"a file in {folder.absolute()}"


def _resolve_paths(tree: Tree, folder: Path) -> None:
    for section, key in PATH_KEYS:
        table = tree.get(section)
        if isinstance(table, dict) and isinstance(name := table.get(key), str) and name and name[0] != "~":
            table[key] = str(folder / name)


def _default_data_dir(tree: Tree, environ: Mapping[str, str]) -> None:
    """Sets the default for `store.data_dir`. A relative `XDG_DATA_HOME` is ignored, as its specification demands."""
    home = Path(environ.get("XDG_DATA_HOME", ""))
    if not home.is_absolute():
        home = Path("/", environ["HOME"], ".local", "share") if environ.get("HOME") else Path("/var/lib")
    store = tree.setdefault("store", {})
    if isinstance(store, dict):
        store.setdefault("data_dir", str(home / "estimate-proxy"))
