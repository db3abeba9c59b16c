"""What a request to forget prices asks for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.cache.canonical import canonical_items, load
from proxy.problems import BadRequest, Code

_FORMS = 'Send {"account":"default","body":[…]} for one question, or {"account":"default","all":true} for all of them.'


@dataclass(frozen=True, slots=True)
class PurgeRequest:
    """`canonical` is the body of the one question to forget, asked with `query`; None means all questions."""

    account: str
    canonical: bytes | None
    query: str = ""


def read_purge(raw: bytes) -> PurgeRequest:
    """Raises `BadRequest` unless `raw` is one of the two forms."""
    match load(raw):
        case {"all": True, **rest} if rest.keys() <= {"account"}:
            return PurgeRequest(_text(rest, "account", "default"), None)
        case {"body": list(items), **rest} if rest.keys() <= {"account", "query"}:
            return PurgeRequest(_text(rest, "account", "default"), canonical_items(items), _text(rest, "query", ""))
        case _:
            raise BadRequest(Code.INVALID_BODY, _FORMS)


def _text(members: Mapping[Any, Any], name: str, default: str) -> str:
    value = members.get(name, default)
    if not isinstance(value, str):
        raise BadRequest(Code.INVALID_BODY, f"{name} must be text. {_FORMS}")
    return value
