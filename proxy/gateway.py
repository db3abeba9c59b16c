"""The story of a request: who asks, what is asked, what is known, what upstream says.

`Gateway.estimate` tells it from top to bottom. `proxy.web` brings what it asks for as `Ask` and turns its `Answer` or
`Problem` into bytes; on its way the story writes into the `Trace` what headers and the log line need.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from time import perf_counter
from typing import assert_never
from zoneinfo import ZoneInfo

from proxy.asking import Asker, Question, Told
from proxy.cachestatus import after_failure, forwarded, hit
from proxy.canonical import canonicalise, present
from proxy.choices import Forward, NotCached, Serve, Windows, choose
from proxy.directives import Directives
from proxy.pricebook import PriceBook
from proxy.prices import Balance, Known, StoredPrice, document
from proxy.problems import Code, Outcome, Problem, StoreUnavailable
from proxy.purging import read_purge
from proxy.replies import Failed, Priced, Rejected, Reply, Unpriced
from proxy.teams import Team, Teams, digest_of
from proxy.upstream import Address


@dataclass(frozen=True, slots=True)
class Policy:
    """What the settings say about answers."""

    zone: ZoneInfo
    accounts: frozenset[str]
    admin_digests: frozenset[str]
    ignored: tuple[str, ...]
    windows: Windows
    balance_max_age_s: float
    timeout_s: float
    refuse_unpriced: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client wants: its token, a way to read its body, its query string, what it says of stored answers.

    `deadline` of the whole answer stands on the event loop's clock.
    """

    token: str | None
    read_body: Callable[[], Awaitable[bytes]]
    query: bytes
    directives: Directives
    deadline: float


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
    ignored: list[str]
    stored: StoredPrice | None


@dataclass(frozen=True, slots=True)
class Purged:
    """What has been forgotten: one question, by its key, or an account's whole book. `found`: was there a price."""

    account: str
    key: str | None = None
    found: bool | None = None


@dataclass(slots=True)
class Trace:
    """What happened on the way of one request. Durations are seconds."""

    team: str = "-"
    cache_status: str | None = None
    store_s: float | None = None
    upstream_s: float | None = None
    waited: bool = False
    """For upstream, or for another's request to it."""


class Gateway:
    """One organisation's gateway: its teams, the price book they share, and the way upstream."""

    def __init__(self, teams: Teams, book: PriceBook, asker: Asker, address: Address, policy: Policy) -> None:
        self._teams = teams
        self._book = book
        self._asker = asker
        self._address = address
        self._policy = policy

    async def estimate(self, ask: Ask, trace: Trace) -> Answer | Problem:
        """What upstream says, or said, to the body. Raises `BadRequest`, `ClientGone`."""
        question = await self._hear(ask, trace)
        if isinstance(question, Problem):
            return question

        known = await self._look_up(question, trace)
        match choose(known, ask.directives, self._policy.windows):
            case NotCached():
                return Problem(
                    Code.NOT_CACHED, "No stored answer will do, and RenderNet was not to be asked (only-if-cached)."
                )
            case Serve(stored, balance, stale=False):
                self._audit_if_old(question, stored, balance, known)
                trace.cache_status = hit(stored)
                return _stored_answer(Outcome.HIT, stored, balance)
            case Serve(stored, balance):
                self._asker.refresh(question, seen_ms=_seen(known))
                trace.cache_status = hit(stored, detail="stale-while-revalidate")
                return _stored_answer(Outcome.STALE, stored, balance)
            case Forward() as forward:
                told, collapsed = await self._ask(question, ask, forward, known, trace)

        newest = self._book.balance(question.account)
        if forward.fallback is not None and newest is not None and isinstance(told.reply, Failed):
            trace.cache_status = after_failure(told.reply, forward.fallback)
            return _stored_answer(Outcome.STALE, forward.fallback, newest)
        trace.cache_status = forwarded(forward.reason, told, ttl_s=self._book.ttl_s, collapsed=collapsed)
        return self._conclude(told.reply, newest, _outcome(forward, collapsed=collapsed))

    async def explain(self, ask: Ask, trace: Trace) -> Explanation | Problem:
        """How the gateway reads a body and what it knows of it. Asks upstream nothing. Raises as `estimate`."""
        question = await self._hear(ask, trace)
        if isinstance(question, Problem):
            return question
        ignored = present(question.canonical, self._policy.ignored)
        known = await self._look_up(question, trace)
        if known is None:
            return Explanation(Outcome.BYPASS, question, ignored, None)
        outcome = Outcome.MISS if known.stored is None else Outcome.HIT
        return Explanation(outcome, question, ignored, known.stored)

    async def purge(self, ask: Ask, trace: Trace) -> Purged | Problem:
        """Forgets one question of an account, or all of them. For admin tokens. Raises as `estimate`."""
        denial = self._deny_all_but_admins(ask.token, trace)
        if denial is not None:
            return denial
        wanted = read_purge(await ask.read_body())
        if wanted.account not in self._policy.accounts:
            return Problem(Code.INVALID_REQUEST, f"There is no account {wanted.account!r}.")
        try:
            if wanted.canonical is None:
                await self._book.purge_account(wanted.account)
                return Purged(wanted.account)
            key = self._question(wanted.account, wanted.canonical, wanted.query.encode()).key
            return Purged(wanted.account, key, await self._book.purge_question(key))
        except StoreUnavailable:
            return Problem(Code.STORE_UNAVAILABLE, "The price book is out of reach: nothing was purged; try again.")

    async def finish(self, timeout_s: float) -> None:
        """Lets what was asked upstream come home and be stored."""
        await self._asker.finish(timeout_s)

    async def _hear(self, ask: Ask, trace: Trace) -> Question | Problem:
        """Who asks, then what: nobody's body is read before its token is known."""
        team = self._authenticate(ask.token, trace)
        if isinstance(team, Problem):
            return team
        return self._question(team.account, canonicalise(await ask.read_body()), ask.query)

    def _question(self, account: str, canonical: bytes, raw_query: bytes) -> Question:
        query = self._address.query_as_sent(raw_query)
        key = self._address.key_of(canonical, account=account, query=query, ignored=self._policy.ignored)
        return Question(account, canonical, query, key)

    def _authenticate(self, token: str | None, trace: Trace) -> Team | Problem:
        if token is None:
            return Problem(
                Code.UNKNOWN_TOKEN, "Send your team's token as X-API-KEY, or as Authorization: Bearer <token>."
            )
        team = self._teams.find(token, datetime.now(self._policy.zone).date())
        if team is None:
            return Problem(
                Code.UNKNOWN_TOKEN, "This token is unknown, expired or mistyped: ask the gateway's operator for one."
            )
        trace.team = team.id
        if team.disabled:
            return Problem(Code.TEAM_DISABLED, f"The team {team.id!r} is disabled: ask the gateway's operator.")
        return team

    def _deny_all_but_admins(self, token: str | None, trace: Trace) -> Problem | None:
        if token is not None and digest_of(token) in self._policy.admin_digests:
            return None
        team = self._authenticate(token, trace)
        if isinstance(team, Problem):
            return team
        return Problem(Code.FORBIDDEN, "This needs an admin token; yours is a team's.")

    async def _look_up(self, question: Question, trace: Trace) -> Known | None:
        """What the book knows; None if it is out of reach."""
        started = perf_counter()
        try:
            return await self._book.look_up(question.key, question.account)
        except StoreUnavailable:
            return None
        finally:
            trace.store_s = perf_counter() - started

    async def _ask(
        self, question: Question, ask: Ask, forward: Forward, known: Known | None, trace: Trace
    ) -> tuple[Told, bool]:
        """What upstream says within the request's deadline, and whether another request had asked already."""
        trace.waited = True
        try:
            async with asyncio.timeout_at(ask.deadline):
                if known is None:
                    told, collapsed = await self._asker.ask_without_store(question)
                elif forward.reason == "request" and ask.directives.asks_anew:
                    store = not ask.directives.no_store
                    told, collapsed = await self._asker.ask_anew(question, store=store), False
                else:
                    told, collapsed = await self._asker.ask(question, seen_ms=known.seen_ms)
        except TimeoutError:
            late = Problem(Code.UPSTREAM_TIMEOUT, f"There was no answer within {self._policy.timeout_s:g} s.")
            return Told(Failed(late)), False
        trace.upstream_s = told.upstream_s
        return told, collapsed

    def _audit_if_old(self, question: Question, stored: StoredPrice, balance: Balance, known: Known | None) -> None:
        max_age_s = self._policy.balance_max_age_s
        if balance.age_s > max_age_s:
            self._asker.audit(question, stored, seen_ms=_seen(known), max_age_s=max_age_s)

    def _conclude(self, reply: Reply, balance: Balance | None, outcome: Outcome) -> Answer | Problem:
        match reply:
            case Priced(price):
                balance_age_s = None if balance is None else balance.age_s
                return Answer(outcome, 200, document(price, balance), balance_age_s=balance_age_s)
            case Unpriced() if self._policy.refuse_unpriced:
                return Problem(Code.UNPRICED, "RenderNet answered without a price for this body.")
            case Unpriced(body):
                return Answer(Outcome.UNPRICED, 200, body)
            case Rejected(status, body):
                return Answer(Outcome.UPSTREAM_REJECTED, status, body)
            case Failed(problem):
                return problem
            case _:
                assert_never(reply)


def _stored_answer(outcome: Outcome, stored: StoredPrice, balance: Balance) -> Answer:
    body = document(stored.price, balance)
    return Answer(outcome, 200, body, age_s=stored.age_s, balance_age_s=balance.age_s)


def _outcome(forward: Forward, *, collapsed: bool) -> Outcome:
    if forward.reason == "bypass":
        return Outcome.BYPASS
    return Outcome.COLLAPSED if collapsed else Outcome.MISS


def _seen(known: Known | None) -> int | None:
    return None if known is None else known.seen_ms
