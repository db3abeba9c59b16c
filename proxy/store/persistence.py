"""Tells from the settings of the ledger's servers whether they persist their data.

Managed services and narrow ACLs forbid `CONFIG`. Then only `INFO` counts, and an unknown setting causes no warning.
"""

from collections.abc import Iterable
from dataclasses import dataclass

_NOTHING_WRITTEN = (
    'writes nothing to disk (appendonly no, save ""): a restart loses all quotas and usage. Set appendonly yes'
)
_WRITTEN_LATE = (
    "lets the kernel decide when its append-only file is written to disk (appendfsync no): a power loss takes the last "
    "half minute of quotas and usage, or more. Set appendfsync everysec"
)


@dataclass(frozen=True, slots=True)
class Persistence:
    """The settings of one server; None is unknown.

    append_only: `aof_enabled` of `INFO persistence`.
    save, appendfsync: as `CONFIG GET` shows them.
    """

    append_only: bool | None = None
    save: str | None = None
    appendfsync: str | None = None


def data_loss_warning(servers: Iterable[Persistence]) -> str | None:
    """The worst risk among the servers and what to set, as the predicate of a sentence; None if there is no risk."""
    found = {_warning_of(server) for server in servers}
    return next((warning for warning in (_NOTHING_WRITTEN, _WRITTEN_LATE) if warning in found), None)


def _warning_of(server: Persistence) -> str | None:
    if server.append_only is False and server.save == "":
        return _NOTHING_WRITTEN
    if server.append_only and server.appendfsync == "no":
        return _WRITTEN_LATE
    return None
