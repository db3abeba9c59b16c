"""`POST /v1/cache/purge`: removes one price, or all prices of an account, from the price book.

The body names what to purge, in one of two forms:

* `{"account":"default","body":[…],"query":"…"}`: one question, and the learned price of its setting. The query is
  empty unless given.
* `{"account":"default","all":true}`: the whole price book of the account, and all its learned prices.

The account is `default` unless given.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.cache.canonical import canonical_items, load
from proxy.cache.price_book import PriceBook
from proxy.gateway.authentication import refuse_unless_admin
from proxy.gateway.canonical_request import RequestParser
from proxy.gateway.live_config import ConfigHolder
from proxy.gateway.request import ClientRequest, Purged, Trace
from proxy.learning.learner import Learner
from proxy.problems import BadRequest, Code, Problem, StoreUnavailable

_FORMS = (
    'Send {"account":"default","body":[…]} to purge one question, or {"account":"default","all":true} to purge all.'
)


class PurgeHandler:
    """Purges prices for admin tokens."""

    def __init__(self, live: ConfigHolder, book: PriceBook, learner: Learner, parser: RequestParser) -> None:
        self._live = live
        self._book = book
        self._learner = learner
        self._parser = parser

    async def purge(self, request: ClientRequest, trace: Trace) -> Purged | Problem:
        """Purges what the body names. Raises `BadRequest`, `ClientGone`, `Overloaded`."""
        config = self._live.config
        refusal = refuse_unless_admin(request, trace, config.access)
        if refusal is not None:
            return refusal
        wanted = parse_purge(await request.read_body())
        if wanted.account not in config.accounts:
            return Problem(
                Code.INVALID_REQUEST,
                f"The body's account is not configured: use one of {', '.join(sorted(config.accounts))}.",
            )
        try:
            if wanted.canonical is None:
                await self._book.purge_account(wanted.account)
                await self._learner.drop_prices(wanted.account)
                return Purged(wanted.account)
            question = self._parser.from_canonical(
                wanted.canonical, account=wanted.account, query=wanted.query.encode(), ignored=config.ignored
            )
            trace.question = question
            found = await self._book.purge_question(question.key, wanted.account)
            await self._learner.drop_setting(question, config.never_learn)
            return Purged(wanted.account, question.key, found)
        except StoreUnavailable:
            detail = "The price book is unavailable, and the purge may not have happened: send it again."
            return Problem(Code.STORE_UNAVAILABLE, detail)


@dataclass(frozen=True, slots=True)
class PurgeRequest:
    """`canonical` is the canonical body of the question to purge; None purges the whole account."""

    account: str
    canonical: bytes | None
    query: str = ""


def parse_purge(raw: bytes) -> PurgeRequest:
    """Raises `BadRequest` unless `raw` has one of the two forms."""
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
        raise BadRequest(Code.INVALID_BODY, f"{name} must be a string. {_FORMS}")
    return value
