"""Price changes: how the ledger keeps them, and reports of them as JSON, CSV or text.

A change says that RenderNet gave another price for a question than before, and how the gateway noticed. The ledger has
a hash for each day: a field for each change, named by a random id, and `FOUND`, their number. A day keeps the first
`MAX_PER_DAY` of them, and counts the rest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

import orjson

from proxy.quota.report_queries import PriceChangeQuery
from proxy.quota.windows import rfc3339

FoundBy = Literal["audit", "doubt", "ask"]
"""An audit compared a stored price; a learned price was in doubt; or a client's request, or a refresh, replaced one."""

MAX_PER_DAY = 500
"""Some 100 kB a day. A new price list can change the prices of many thousand bodies at once."""

FOUND = b"found"

COLUMNS = ("at", "account", "model", "key", "old", "new", "found_by")
NAME_COLUMNS = ("account", "model", "key")
"""The columns whose cells users can choose, or that a spreadsheet could take for a number."""


@dataclass(frozen=True, slots=True)
class PriceChange:
    """A change that was found at `at_s` by a gateway's clock.

    model: the name of what was priced, as in usage, but never `other` for lack of places.
    key: the beginning of the question's key, as in log lines.
    old, new: credits, as decimal numbers.
    """

    at_s: int
    account: str
    model: str
    key: str
    old: str
    new: str
    found_by: FoundBy

    def encoded(self) -> bytes:
        return orjson.dumps(asdict(self))


class PriceChanges(NamedTuple):
    """The oldest first. `not_kept`: how many more were found, of all accounts."""

    changes: Sequence[PriceChange]
    not_kept: int


def decode_days(days: Iterable[Mapping[bytes, bytes]], account: str | None) -> PriceChanges:
    """The changes of an account, or with None of all, in the hashes of several days."""
    changes: list[PriceChange] = []
    not_kept = 0
    for day_fields in days:
        kept = [_decoded(text) for name, text in day_fields.items() if name != FOUND]
        not_kept += max(0, int(day_fields.get(FOUND, 0)) - len(kept))
        changes += [change for change in kept if account in (None, change.account)]
    return PriceChanges(sorted(changes, key=lambda change: (change.at_s, change.account, change.key)), not_kept)


def json_of(found: PriceChanges, query: PriceChangeQuery, zone: ZoneInfo) -> bytes:
    """Price changes as a JSON document. Amounts are exact decimal numbers."""
    rows = []
    for change in found.changes:
        amounts = {"old": orjson.Fragment(change.old), "new": orjson.Fragment(change.new)}
        rows.append(dict(zip(COLUMNS, _cells(change, zone), strict=True)) | amounts)
    days = {"from": query.first, "to": query.last, "timezone": zone.key}
    return orjson.dumps({**days, "changes": rows, "not_kept": found.not_kept})


def lines_of(found: PriceChanges, zone: ZoneInfo) -> list[list[str]]:
    """Price changes as rows of text, the header first."""
    return [list(COLUMNS), *(_cells(change, zone) for change in found.changes)]


def _cells(change: PriceChange, zone: ZoneInfo) -> list[str]:
    at = rfc3339(change.at_s, zone)
    return [at, change.account, change.model, change.key, change.old, change.new, change.found_by]


def _decoded(text: bytes) -> PriceChange:
    members = orjson.loads(text)
    return PriceChange(**{member.name: members[member.name] for member in fields(PriceChange)})
