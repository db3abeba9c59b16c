"""Finds problems that involve several settings, or a file that a setting names.

Works on unvalidated settings, so that these problems are reported together with those of single values.
"""

import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path

from proxy.settings.errors import KEY_HINT, SettingsProblem, path_of
from proxy.settings.files import MAX_CONFIG_BYTES, UnreadableError, read_text
from proxy.settings.tree import Tree, items_of, tables_of
from proxy.settings.values import is_identifier


def cross_problems(tree: Tree) -> Iterator[SettingsProblem]:
    """All of these problems in unvalidated settings."""
    teams = tables_of(tree, "teams")
    if tree.get("teams", {}) == {}:
        yield SettingsProblem(
            "teams", "is empty, so no client could use the gateway: `estimate-proxy token new TEAM` makes a token"
        )
    yield from _missing_accounts(tree, teams)
    yield from _repeated_tokens(tree, teams)
    yield from _earlier_id_problems(teams)
    for name in ("org", "team_defaults"):
        yield from _repeated_quotas(tree.get(name), name)
    for name, team in teams.items():
        yield from _repeated_quotas(team, "teams", name)
    yield from _ca_file_problems(tree, "upstream")
    yield from _ca_file_problems(tree, "store")
    yield from _cert_file_problems(tree)


def _missing_accounts(tree: Tree, teams: Mapping[str, Tree]) -> Iterator[SettingsProblem]:
    accounts = tree.get("accounts", {})
    if not isinstance(accounts, dict):
        return
    wanted = {name: team.get("account", "default") for name, team in teams.items()}
    for name, account in wanted.items() if wanted or accounts else [("", "default")]:
        if account == "default" and account not in accounts:
            yield SettingsProblem("accounts.default.api_key", f"is missing: {KEY_HINT}")
        elif isinstance(account, str) and is_identifier(account) and account not in accounts:
            message = "is not an account in the settings: add [accounts.<its id>] with an api_key_file"
            yield SettingsProblem(path_of("teams", name, "account"), message)


def _repeated_tokens(tree: Tree, teams: Mapping[str, Tree]) -> Iterator[SettingsProblem]:
    """A token stands once, at a team, `metrics`, `admin` or `viewer`: else it would be unclear what it may do."""
    holders: list[tuple[tuple[str, ...], object]] = [(("teams", name), team) for name, team in teams.items()]
    holders += [((name,), tree.get(name)) for name in ("metrics", "admin", "viewer")]
    seen: dict[str, str] = {}
    for path, holder in holders:
        for index, token in enumerate(items_of(holder, "tokens")):
            digest = token.get("sha256") if isinstance(token, dict) else token
            here = path_of(*path, "tokens", index)
            if isinstance(digest, str) and (first := seen.setdefault(digest, here)) != here:
                yield SettingsProblem(here, f"is the same token as {first}")


def _earlier_id_problems(teams: Mapping[str, Tree]) -> Iterator[SettingsProblem]:
    """An earlier id belongs to one team, and is not in use: otherwise its usage would be counted for two teams."""
    seen: dict[str, str] = {}
    for name, team in teams.items():
        for index, earlier in enumerate(items_of(team, "was")):
            if not isinstance(earlier, str):
                continue
            here = path_of("teams", name, "was", index)
            if earlier in teams:
                yield SettingsProblem(here, "is the id of a configured team: list only ids that are no longer in use")
            elif (first := seen.setdefault(earlier, here)) != here:
                yield SettingsProblem(here, f"repeats {first}: list an earlier id once, for one team")


def _repeated_quotas(scope: object, *path: str) -> Iterator[SettingsProblem]:
    """Two limits on the same measure and window: only the lower one would have an effect."""
    seen: dict[tuple[str, str], str] = {}
    for index, quota in enumerate(items_of(scope, "quotas")):
        match quota:
            case {"measure": str(measure), "per": str(per)}:
                here = path_of(*path, "quotas", index)
                if (first := seen.setdefault((measure, per), here)) != here:
                    yield SettingsProblem(here, f"repeats {first}: keep one limit for this measure and window")


def _ca_file_problems(tree: Tree, section: str) -> Iterator[SettingsProblem]:
    ca_file = _path_in(tree, section, "ca_file")
    if ca_file is None:
        return
    try:
        ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        is_read = isinstance(error, ssl.SSLError)
        reason = "has no certificates in PEM format" if is_read else f"cannot be read: {error.strerror}"
        yield SettingsProblem(f"{section}.ca_file", f"names {_shown_path(ca_file)}, which {reason}")


def _cert_file_problems(tree: Tree) -> Iterator[SettingsProblem]:
    """Problems with the store's client certificate and its key."""
    paths = {key: path for key in ("cert_file", "key_file") if (path := _path_in(tree, "store", key))}
    if "key_file" in paths and "cert_file" not in paths:
        yield SettingsProblem("store.cert_file", "is missing: store.key_file is its key")
    is_readable = True
    for key, path in paths.items():
        try:
            read_text(Path(path), MAX_CONFIG_BYTES)
        except UnreadableError as error:
            is_readable = False
            yield SettingsProblem(f"store.{key}", f"names {_shown_path(path)}, which {error}")
    if "cert_file" not in paths or not is_readable:
        return
    try:
        # The password is only given because OpenSSL would prompt for one.
        ssl.create_default_context().load_cert_chain(paths["cert_file"], paths.get("key_file"), password=lambda: "")
    except (ssl.SSLError, ValueError):  # ValueError: because of the empty passphrase
        message = "and store.key_file must be a certificate and its key, in PEM format and without a passphrase"
        yield SettingsProblem("store.cert_file", message)


def _shown_path(path: str) -> str:
    """A path, for messages, unless it could be a URL with a password that stands in the wrong place."""
    return "a file" if set(path) & set(":@") else path


def _path_in(tree: Tree, section: str, key: str) -> str | None:
    """None if it is not set or not a valid path; the section's validation reports the latter."""
    table = tree.get(section)
    path = table.get(key) if isinstance(table, dict) else None
    return path if isinstance(path, str) and path.isprintable() and path[:1] not in ("", "~") else None
