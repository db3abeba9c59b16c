"""The story of a request: who asks, what is asked, what is known, what upstream says.

`Gateway.estimate` tells it from top to bottom. The outer floors bring what it asks for as `Ask` and turn its
`Answer` or `Problem` into bytes; on its way it writes into the `Trace` what headers and the log line need.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from time import perf_counter
from typing import assert_never
from zoneinfo import ZoneInfo

from proxy.canonical import canonicalise, key_of
from proxy.flight import Flights
from proxy.pricebook import PriceBook
from proxy.prices import Balance, Failed, Price, Priced, Rejected, Reply, StoredPrice, Unpriced, document
from proxy.problems import Code, Outcome, Problem, StoreUnavailable
from proxy.teams import Team, Teams
from proxy.upstream import Upstream


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client wants: its token, a way to read its body, its query string."""

    token: str | None
    read_body: Callable[[], Awaitable[bytes]]
    query: bytes


@dataclass(frozen=True, slots=True)
class Question:
    """A canonical body on its way: everything that its key is taken from."""

    account: str
    canonical: bytes
    query: str
    key: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client gets: a JSON body. `age_s` is set where the answer is a stored one."""

    outcome: Outcome
    status: int
    body: bytes
    age_s: float | None = None
    balance_age_s: float | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the gateway makes of a question. With the outcome `bypass` nobody knows what is stored."""

    outcome: Outcome
    question: Question
    stored: StoredPrice | None


@dataclass(slots=True)
class Trace:
    """What happened on the way of one request. Durations are seconds."""

    team: str = "-"
    cache_status: str | None = None
    store_s: float | None = None
    upstream_s: float | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """What a flight brings home to everybody who waits for it."""

    reply: Reply
    stored: bool
    upstream_s: float


class Gateway:
    """One organisation's gateway: its teams, the price book they share, and upstream."""

    def __init__(
        self, teams: Teams, book: PriceBook, upstream: Upstream, *, zone: ZoneInfo, refuse_unpriced: bool
    ) -> None:
        self._teams = teams
        self._book = book
        self._upstream = upstream
        self._zone = zone
        self._refuse_unpriced = refuse_unpriced
        self._flights = Flights[Told]()

    async def estimate(self, ask: Ask, trace: Trace) -> Answer | Problem:
        """What upstream says, or said, to the body. Raises `BadRequest`, `ClientGone`."""
        question = await self._hear(ask, trace)
        if isinstance(question, Problem):
            return question

        forwarded = "miss"
        try:
            stored, balance = await self._look_up(question, trace)
        except StoreUnavailable:
            forwarded = "bypass"
        else:
            if stored is not None and balance is not None:
                trace.cache_status = f"hit; ttl={int(stored.ttl_s)}"
                return _priced_answer(Outcome.HIT, stored.price, balance, age_s=stored.age_s)

        trace.cache_status = _forwarded(forwarded)
        told, joined = await self._flights.join(question.key, partial(self._ask_upstream, question))
        trace.upstream_s = told.upstream_s
        trace.cache_status = _forwarded(forwarded, told, ttl_s=self._book.ttl_s, collapsed=joined)
        return self._conclude(told.reply, question.account, _outcome(forwarded, joined=joined))

    async def explain(self, ask: Ask, trace: Trace) -> Explanation | Problem:
        """How the gateway reads a body and what it knows of it. Asks upstream nothing. Raises as `estimate`."""
        question = await self._hear(ask, trace)
        if isinstance(question, Problem):
            return question
        try:
            stored, _ = await self._look_up(question, trace)
        except StoreUnavailable:
            return Explanation(Outcome.BYPASS, question, None)
        return Explanation(Outcome.MISS if stored is None else Outcome.HIT, question, stored)

    async def finish(self, timeout_s: float) -> None:
        """Lets what was asked upstream come home and be stored."""
        await self._flights.land(timeout_s)

    async def _hear(self, ask: Ask, trace: Trace) -> Question | Problem:
        """Who asks, then what: nobody's body is read before its token is known."""
        team = self._authenticate(ask.token, trace)
        if isinstance(team, Problem):
            return team
        canonical = canonicalise(await ask.read_body())
        address = self._upstream.address
        query = address.query_as_sent(ask.query)
        key = key_of(canonical, origin=address.origin, account=team.account, path=address.path, query=query)
        return Question(team.account, canonical, query, key)

    def _authenticate(self, token: str | None, trace: Trace) -> Team | Problem:
        if token is None:
            return Problem(
                Code.UNKNOWN_TOKEN, "Send your team's token as X-API-KEY, or as Authorization: Bearer <token>."
            )
        team = self._teams.find(token, datetime.now(self._zone).date())
        if team is None:
            return Problem(
                Code.UNKNOWN_TOKEN, "This token is unknown, expired or mistyped: ask the gateway's operator for one."
            )
        trace.team = team.id
        if team.disabled:
            return Problem(Code.TEAM_DISABLED, f"The team {team.id!r} is disabled: ask the gateway's operator.")
        return team

    async def _look_up(self, question: Question, trace: Trace) -> tuple[StoredPrice | None, Balance | None]:
        started = perf_counter()
        try:
            return await self._book.look_up(question.key, question.account)
        finally:
            trace.store_s = perf_counter() - started

    async def _ask_upstream(self, question: Question) -> Told:
        started = perf_counter()
        reply = await self._upstream.estimate(question.account, question.canonical, question.query)
        upstream_s = perf_counter() - started
        stored = await self._remember(question, reply)
        return Told(reply, stored, upstream_s)

    async def _remember(self, question: Question, reply: Reply) -> bool:
        """Whether the reply is in the book now. The balance is kept whatever became of the price."""
        match reply:
            case Priced(price, balance):
                noting = [] if balance is None else [self._book.note_balance(question.account, balance)]
                stored, *_ = await asyncio.gather(self._book.put(question.key, price), *noting)
                return bool(stored)
            case Unpriced(balance=bytes(balance)):
                await self._book.note_balance(question.account, balance)
        return False

    def _conclude(self, reply: Reply, account: str, outcome: Outcome) -> Answer | Problem:
        match reply:
            case Priced(price):
                return _priced_answer(outcome, price, self._book.balance(account))
            case Unpriced() if self._refuse_unpriced:
                return Problem(Code.UNPRICED, "Upstream answered without a price for this body.")
            case Unpriced(body):
                return Answer(Outcome.UNPRICED, 200, body)
            case Rejected(status, body):
                return Answer(Outcome.UPSTREAM_REJECTED, status, body)
            case Failed(problem):
                return problem
            case _:
                assert_never(reply)


def _priced_answer(outcome: Outcome, price: Price, balance: Balance | None, *, age_s: float | None = None) -> Answer:
    balance_age_s = None if balance is None else balance.age_s
    return Answer(outcome, 200, document(price, balance), age_s=age_s, balance_age_s=balance_age_s)


def _outcome(forwarded: str, *, joined: bool) -> Outcome:
    if forwarded == "bypass":
        return Outcome.BYPASS
    return Outcome.COLLAPSED if joined else Outcome.MISS


def _forwarded(reason: str, told: Told | None = None, *, ttl_s: float = 0, collapsed: bool = False) -> str:
    """The parameters of `Cache-Status` (RFC 9211 §2) for a question that went upstream."""
    parameters = [f"fwd={reason}"]
    if reason == "bypass":
        parameters.append("detail=store-unavailable")
    elif told is not None:
        if (status := _upstream_status(told.reply)) is not None:
            parameters.append(f"fwd-status={status}")
        if told.stored:
            parameters += ["stored", f"ttl={int(ttl_s)}"]
    if collapsed:
        parameters.append("collapsed")
    return "; ".join(parameters)


def _upstream_status(reply: Reply) -> int | None:
    match reply:
        case Priced() | Unpriced():
            return 200
        case Rejected(status):
            return status
        case Failed(upstream_status=status):
            return status
        case _:
            assert_never(reply)
