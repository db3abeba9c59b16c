"""Reloads settings when the config file, or the file of a secret, changes.

* Files are compared by inode, times and size, through symbolic links: Kubernetes updates a mounted ConfigMap by
  replacing a link to a directory. A tool that restores the modification time of a file that it rewrote (`cp -p`,
  `rsync -t`) still changes the inode or ctime.
* A change is applied when two checks in a row have found the same: the file may not be written completely yet.
* A reload applies completely or not at all. A setting that needs a restart keeps its value, and the log names it.
"""

import logging
from pathlib import Path
from time import monotonic

from proxy.settings.errors import SettingsError
from proxy.settings.loader import Source
from proxy.settings.schema import Settings, effective

CHECK_EVERY_S = 1.0

MAX_NAMED = 5
"""Changed settings that a log line names: a new team alone changes six or more."""

log = logging.getLogger(__name__)

Fingerprint = tuple[tuple[str, int, int, int, int] | None, ...]


class Reloader:
    """`settings`: the settings in force, at first those that were loaded from `source`."""

    def __init__(self, source: Source, settings: Settings) -> None:
        self.settings = settings
        self._source = source
        self._applied = self._pending = _fingerprint(source.files())
        self._next_check_at = monotonic() + CHECK_EVERY_S

    def is_due(self) -> bool:
        """Whether the files have changed, and were the same at the last two checks. Checks once per `CHECK_EVERY_S`."""
        now = monotonic()
        if now < self._next_check_at:
            return False
        self._next_check_at = now + CHECK_EVERY_S
        found = _fingerprint(self._source.files())
        is_stable, self._pending = found == self._pending, found
        return is_stable and found != self._applied

    def reload(self) -> Settings | None:
        """Loads the settings. Returns those now in force; None if the new ones are invalid and the old ones stay."""
        self._applied = self._pending = _fingerprint(self._source.files())
        try:
            loaded = self._source.load()
        except SettingsError as error:
            for problem in error.problems:
                log.error("the old settings stay in force: %s %s", problem.path, problem.message)  # noqa: TRY400 -- no traceback needed
            return None
        before, self.settings = self.settings, merged(self.settings, loaded)
        for path in differences(self.settings, loaded):
            log.warning("%s has changed: restart the gateway to apply it", path)
        changed = _listed(differences(before, self.settings))
        log.info("settings reloaded; changed: %s; teams: %d", changed, len(self.settings.teams))
        return self.settings


def merged(old: Settings, new: Settings) -> Settings:
    """`old`, updated with those parts of `new` that can change while the gateway runs."""
    sections = ("accounts", "teams", "team_defaults", "metrics", "admin", "viewer")
    cache = {name: getattr(new.cache, name) for name in ("ignore", "learn", "never_learn")}
    return old.model_copy(
        update={
            **{name: getattr(new, name) for name in sections},
            "org": old.org.model_copy(update={"quotas": new.org.quotas}),
            "server": old.server.model_copy(update={"cors_origins": new.server.cors_origins}),
            "cache": old.cache.model_copy(update=cache),
        }
    )


def differences(one: Settings, other: Settings) -> list[str]:
    """The paths of the settings that differ."""
    mine, others = dict(effective(one)), dict(effective(other))
    return [path for path in mine | others if mine.get(path) != others.get(path)]


def _listed(paths: list[str]) -> str:
    more = f", and {len(paths) - MAX_NAMED} more" if len(paths) > MAX_NAMED else ""
    return ", ".join(paths[:MAX_NAMED]) + more or "nothing"


def _fingerprint(files: list[Path]) -> Fingerprint:
    return tuple(map(_state_of, files))


def _state_of(file: Path) -> tuple[str, int, int, int, int] | None:
    """Compares ctime, too: unlike mtime it cannot be set, and a change of the permissions updates it."""
    try:
        found = file.stat()
    except OSError:
        return None
    return str(file), found.st_ino, found.st_ctime_ns, found.st_mtime_ns, found.st_size
