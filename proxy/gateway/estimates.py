"""The story of a request: who asks, what is asked, what is known, whether it may, what upstream says.

`Gateway.estimate` tells it from top to bottom. `proxy.http.endpoint` brings what it asks for as `Ask` and turns its
`Answer` or `Problem` into bytes; on its way the story writes into the `Trace` what headers and the log line need.
"""

import asyncio
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, Self, assert_never

from proxy.auth import Access, Team
from proxy.cache.canonical import present
from proxy.cache.price_book import PriceBook
from proxy.cache.prices import Balance, Known, Price, StoredPrice, document
from proxy.gateway.cache_status import after_failure, forwarded, hit
from proxy.gateway.fetcher import Asker, Told
from proxy.gateway.freshness import Directives, Forward, NotCached, Serve, Windows, choose
from proxy.gateway.live_config import InForce, Rules
from proxy.gateway.purge import read_purge
from proxy.gateway.questions import Question, Reader
from proxy.problems import Code, Outcome, Problem, StoreUnavailable
from proxy.quota.credits import micro_of
from proxy.quota.ledger import Admitted, Denied, Ledger
from proxy.quota.quotas import Charge, Quota, Standing
from proxy.upstream.replies import Failed, Priced, Rejected, Unpriced


@dataclass(frozen=True, slots=True)
class Policy:
    """What the settings say about answers."""

    windows: Windows
    balance_max_age_s: float
    timeout_s: float
    refuse_unpriced: bool


class Ask(Protocol):
    """What a client wants: its token, its query string, what it says of stored answers, and a body.

    accept: the media types that it takes, as it says.
    deadline: of the whole answer, on the event loop's clock.
    """

    token: str | None
    query: bytes
    directives: Directives
    accept: str | None
    deadline: float

    async def read_body(self) -> bytes:
        """The body, which is there once. Raises `BadRequest`, `ClientGone`."""


@dataclass(slots=True)
class Answer:
    """What a client gets: a JSON body. `price` is set where it has one, `age_s` where it is a stored one."""

    outcome: Outcome
    status: int
    body: bytes
    price: Price | None = None
    age_s: float | None = None
    balance_age_s: float | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the gateway makes of a question. With the outcome `bypass` nobody knows what is stored.

    admission: what would be said to an estimate now; None if nobody knows.
    """

    outcome: Outcome
    question: Question
    ignored: list[str]
    stored: StoredPrice | None
    admission: Admitted | Denied | None


@dataclass(frozen=True, slots=True)
class Purged:
    """What has been forgotten: one question, by its key, or an account's whole book. `found`: was there a price."""

    account: str
    key: str | None = None
    found: bool | None = None


class Trace:
    """What happened on the way of one request. Durations are seconds."""

    team: str = "-"
    cache_status: str | None = None
    store_s: float | None = None
    upstream_s: float | None = None
    waited: bool = False
    """For upstream, or for another's request to it."""
    standing: Standing | None = None
    """Of the team, as the ledger has said it last."""
    warnings: tuple[Quota, ...] = ()
    """Quotas that only warn, and that this answer has passed."""

    def note(self, admission: Admitted | Denied) -> None:
        """What is refused passes no quota, whatever it passed on its way."""
        self.standing = admission.standing or self.standing
        if isinstance(admission, Denied):
            self.warnings = ()
        elif admission.standing is not None:
            self.warnings = admission.standing.warnings()

    def at_store(self) -> Self:
        """Counts the time that is spent within."""
        return self

    def __enter__(self) -> None:
        self._since = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.store_s = (self.store_s or 0.0) + perf_counter() - self._since


class Gateway:
    """One organisation's gateway: its teams, the price book they share, and the way upstream."""

    def __init__(
        self, in_force: InForce, ledger: Ledger, book: PriceBook, asker: Asker, reader: Reader, policy: Policy
    ) -> None:
        self._in_force = in_force
        self._ledger = ledger
        self._book = book
        self._asker = asker
        self._reader = reader
        self._policy = policy

    async def estimate(self, ask: Ask, trace: Trace) -> Answer | Problem:
        """What upstream says, or said, to the body. Raises `BadRequest`, `ClientGone`."""
        rules = self._in_force.rules
        team = _who_asks(ask, trace, rules.access)
        if isinstance(team, Problem):
            return team
        question = self._read(await ask.read_body(), team, ask.query, rules)

        known = self._book.at_hand(question.key, question.account) or await self._look_up(question, trace)
        match choose(known, ask.directives, self._policy.windows):
            case NotCached():
                return await self._pass_over(team, trace)
            case Serve(stored, balance, stale):
                charge = _charge(Outcome.STALE if stale else Outcome.HIT, question, stored.price)
                with trace.at_store():
                    admission = await self._ledger.charge(team.terms, charge)
                trace.note(admission)
                if isinstance(admission, Denied):
                    return admission.problem
                self._look_behind(question, stored, balance, known, stale=stale)
                trace.cache_status = hit(stored, detail="stale-while-revalidate" if stale else None)
                return _stored_answer(charge.outcome, stored, balance)
            case Forward() as forward:
                with trace.at_store():
                    admission = await self._ledger.admit(team.terms)
                trace.note(admission)
                if isinstance(admission, Denied):
                    return admission.problem

        told, collapsed = await self._ask(question, ask, forward, known, trace)
        ending = self._conclude(told, forward, question, collapsed=collapsed, trace=trace)
        return await self._settle(admission, question, told, ending, trace)

    async def explain(self, ask: Ask, trace: Trace) -> Explanation | Problem:
        """How the gateway reads a body and what it knows of it. Asks upstream nothing. Raises as `estimate`."""
        rules = self._in_force.rules
        team = _who_asks(ask, trace, rules.access)
        if isinstance(team, Problem):
            return team
        question = self._read(await ask.read_body(), team, ask.query, rules)
        known = await self._look_up(question, trace)
        stored = None if known is None else known.stored
        admission = await self._peek(team, stored, trace)
        if isinstance(admission, Denied) and admission.problem.code is Code.RATE_LIMITED:
            return admission.problem
        ignored = present(question.canonical, rules.ignored)
        outcome = Outcome.BYPASS if known is None else Outcome.HIT if stored else Outcome.MISS
        return Explanation(outcome, question, ignored, stored, admission)

    async def purge(self, ask: Ask, trace: Trace) -> Purged | Problem:
        """Forgets one question of an account, or all of them. For admin tokens. Raises as `estimate`."""
        rules = self._in_force.rules
        denial = _deny_all_but_admins(rules.access, ask.token, trace)
        if denial is not None:
            return denial
        wanted = read_purge(await ask.read_body())
        if wanted.account not in rules.accounts:
            return Problem(Code.INVALID_REQUEST, f"There is no account {wanted.account!r}.")
        try:
            if wanted.canonical is None:
                await self._book.purge_account(wanted.account)
                return Purged(wanted.account)
            query = wanted.query.encode()
            key = self._reader.of(wanted.canonical, account=wanted.account, query=query, ignored=rules.ignored).key
            return Purged(wanted.account, key, await self._book.purge_question(key, wanted.account))
        except StoreUnavailable:
            detail = "The price book is out of reach: nothing is sure to be purged; try again."
            return Problem(Code.STORE_UNAVAILABLE, detail)

    async def finish(self, timeout_s: float) -> None:
        """Lets what was asked upstream come home and be stored, and what was admitted be settled."""
        await self._asker.finish(timeout_s)
        await self._ledger.close(timeout_s)

    def _read(self, body: bytes, team: Team, query: bytes, rules: Rules) -> Question:
        return self._reader.read(body, account=team.account, query=query, ignored=rules.ignored)

    async def _look_up(self, question: Question, trace: Trace) -> Known | None:
        """What the book knows; None if it is out of reach."""
        with trace.at_store():
            try:
                return await self._book.look_up(question.key, question.account)
            except StoreUnavailable:
                return None

    async def _pass_over(self, team: Team, trace: Trace) -> Problem:
        """The client wants a stored answer or none, and there is none."""
        with trace.at_store():
            admission = await self._ledger.pass_over(team.terms, Outcome.NOT_CACHED)
        trace.note(admission)
        if isinstance(admission, Denied):
            return admission.problem
        return Problem(Code.NOT_CACHED, "No stored answer will do, and RenderNet was not to be asked (only-if-cached).")

    async def _peek(self, team: Team, stored: StoredPrice | None, trace: Trace) -> Admitted | Denied | None:
        with trace.at_store():
            try:
                admission = await self._ledger.peek(team.terms, micro_of(stored.price.estimated) if stored else None)
            except StoreUnavailable:
                return None
        trace.standing = admission.standing
        return admission

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

    def _look_behind(
        self, question: Question, stored: StoredPrice, balance: Balance, known: Known | None, *, stale: bool
    ) -> None:
        """Behind the answer: a stale price is asked again, and an old balance too."""
        max_age_s = self._policy.balance_max_age_s
        seen_ms = None if known is None else known.seen_ms
        if stale:
            self._asker.refresh(question, seen_ms=seen_ms)
        elif balance.age_s > max_age_s:
            self._asker.audit(question, stored, seen_ms=seen_ms, max_age_s=max_age_s)

    def _conclude(
        self, told: Told, forward: Forward, question: Question, *, collapsed: bool, trace: Trace
    ) -> Answer | Problem:
        newest = self._book.balance(question.account)
        if forward.fallback is not None and newest is not None and isinstance(told.reply, Failed):
            trace.cache_status = after_failure(told.reply, forward.fallback)
            return _stored_answer(Outcome.STALE, forward.fallback, newest)
        trace.cache_status = forwarded(forward.reason, told, ttl_s=self._book.ttl_s, collapsed=collapsed)
        match told.reply:
            case Priced(price):
                body = document(price, newest)
                balance_age_s = None if newest is None else newest.age_s
                return Answer(_outcome(forward, collapsed=collapsed), 200, body, price, balance_age_s=balance_age_s)
            case Unpriced() if self._policy.refuse_unpriced:
                return Problem(Code.UNPRICED, "RenderNet answered without a price for this body.")
            case Unpriced(body):
                return Answer(Outcome.UNPRICED, 200, body)
            case Rejected(status, body):
                return Answer(Outcome.UPSTREAM_REJECTED, status, body)
            case Failed(problem):
                return problem
            case _:
                assert_never(told.reply)

    async def _settle(
        self, admitted: Admitted, question: Question, told: Told, ending: Answer | Problem, trace: Trace
    ) -> Answer | Problem:
        """Books how an admitted question has ended, which may turn out to be more than a quota allows."""
        with trace.at_store():
            if isinstance(ending, Problem) and isinstance(told.reply, Failed) and not told.reply.asked:
                standing = await self._ledger.refund(admitted, ending.outcome)
                trace.note(Denied(ending, standing))
                return ending
            price = ending.price if isinstance(ending, Answer) else None
            settled = await self._ledger.settle(admitted, _charge(ending.outcome, question, price))
        trace.note(settled)
        if isinstance(settled, Denied) and price is not None:
            return settled.problem
        return ending


def _who_asks(ask: Ask, trace: Trace, access: Access) -> Team | Problem:
    """Nobody's body is read before its token is known."""
    team = access.team(ask.token)
    if isinstance(team, Problem):
        return team
    trace.team = team.id
    return access.refusal(team) if team.disabled else team


def _deny_all_but_admins(access: Access, token: str | None, trace: Trace) -> Problem | None:
    if access.is_admin(token):
        return None
    team = access.team(token)
    if isinstance(team, Problem):
        return team
    trace.team = team.id
    return Problem(Code.FORBIDDEN, "This needs an admin token; yours is a team's.")


def _charge(outcome: Outcome, question: Question, price: Price | None) -> Charge:
    if price is None:
        return Charge(outcome)
    return Charge(outcome, micro_of(price.estimated), question.model)


def _stored_answer(outcome: Outcome, stored: StoredPrice, balance: Balance) -> Answer:
    return Answer(outcome, 200, document(stored.price, balance), stored.price, stored.age_s, balance.age_s)


def _outcome(forward: Forward, *, collapsed: bool) -> Outcome:
    if forward.reason == "bypass":
        return Outcome.BYPASS
    return Outcome.COLLAPSED if collapsed else Outcome.MISS
