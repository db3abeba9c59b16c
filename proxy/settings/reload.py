"""Reloads settings when the config file, or the file of a secret, changes.

* Files are compared by inode, times and size, through symbolic links: Kubernetes updates a mounted ConfigMap by
  replacing a link to a directory. A tool that restores the modification time of a file that it rewrote (`cp -p`,
  `rsync -t`) still changes the inode or ctime.
* A change is read after two looks found the same: the file may not be written completely yet.
* A reload applies completely or not at all. A setting that needs a restart keeps its value, and the log names it.
"""

import logging
from pathlib import Path
from time import monotonic

from proxy.settings.errors import SettingsError
from proxy.settings.loader import Source
from proxy.settings.schema import Settings, effective

LOOK_EVERY_S = 1.0

log = logging.getLogger(__name__)

Fingerprint = tuple[tuple[str, int, int, int, int] | None, ...]


class Reloader:
    """`settings` are those that `source` gave at first."""

    def __init__(self, source: Source, settings: Settings) -> None:
        self.settings = settings
        self._source = source
        self._seen = self._pending = _fingerprint(source.files())
        self._next_look = monotonic() + LOOK_EVERY_S

    def is_due(self) -> bool:
        """Whether the files have changed and are still now. Looks at them once in `LOOK_EVERY_S`."""
        now = monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + LOOK_EVERY_S
        found = _fingerprint(self._source.files())
        is_still, self._pending = found == self._pending, found
        return is_still and found != self._seen

    def reload(self) -> Settings | None:
        """The settings that are in force from now on; None if the files cannot be used, and the old ones stay."""
        self._seen = self._pending = _fingerprint(self._source.files())
        try:
            found = self._source.load()
        except SettingsError as error:
            _log_errors(error)
            return None
        self.settings = merged(self.settings, found)
        for path in differences(self.settings, found):
            log.warning("%s has changed: restart the gateway for it", path)
        log.info("the settings were read again; teams: %d", len(self.settings.teams))
        return self.settings


def _log_errors(error: SettingsError) -> None:
    for problem in error.problems:
        log.error("the old settings stay in force: %s %s", problem.path, problem.message)


def merged(old: Settings, new: Settings) -> Settings:
    """`old` with all of `new` that can change while the gateway runs."""
    sections = ("accounts", "teams", "team_defaults", "metrics", "admin")
    return old.model_copy(
        update={
            **{name: getattr(new, name) for name in sections},
            "org": old.org.model_copy(update={"quotas": new.org.quotas}),
            "cache": old.cache.model_copy(update={"ignore": new.cache.ignore}),
        }
    )


def differences(one: Settings, other: Settings) -> list[str]:
    """The paths of the settings in which two differ."""
    mine, others = dict(effective(one)), dict(effective(other))
    return [path for path in mine | others if mine.get(path) != others.get(path)]


def _fingerprint(files: list[Path]) -> Fingerprint:
    return tuple(map(_state_of, files))


def _state_of(file: Path) -> tuple[str, int, int, int, int] | None:
    """Compares ctime, too: unlike mtime it cannot be set, and a change of the permissions updates it."""
    try:
        found = file.stat()
    except OSError:
        return None
    return str(file), found.st_ino, found.st_ctime_ns, found.st_mtime_ns, found.st_size
