"""Whether the ledger's servers write their data to disk, by what they say about it.

A server may say nothing: managed services and narrow ACLs forbid `CONFIG`. Then only what `INFO` says counts, and where
nothing is known nothing is claimed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

_NOTHING_WRITTEN = (
    'writes nothing to disk (appendonly no, save ""): a restart loses all quotas and usage. Set appendonly yes'
)
_WRITTEN_LATE = (
    "leaves it to the kernel when its append-only file reaches the disk (appendfsync no): a power loss takes the last "
    "half minute of quotas and usage, or more. Set appendfsync everysec"
)


@dataclass(frozen=True, slots=True)
class Persistence:
    """What one server says; None is unknown.

    append_only: `aof_enabled` of `INFO persistence`.
    save, appendfsync: as `CONFIG GET` shows them.
    """

    append_only: bool | None = None
    save: str | None = None
    appendfsync: str | None = None


def data_loss_warning(servers: Iterable[Persistence]) -> str | None:
    """The worst that a server's settings allow, as the predicate of a sentence, and what to set; None if nothing."""
    found = {_warning_of(server) for server in servers}
    return next((warning for warning in (_NOTHING_WRITTEN, _WRITTEN_LATE) if warning in found), None)


def _warning_of(server: Persistence) -> str | None:
    if server.append_only is False and server.save == "":
        return _NOTHING_WRITTEN
    if server.append_only and server.appendfsync == "no":
        return _WRITTEN_LATE
    return None
