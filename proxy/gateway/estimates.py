"""The story of a request: who asks, what is asked, what is known, whether it may, what upstream says.

`Gateway.estimate` tells it from top to bottom. `proxy.http.endpoint` brings what it asks for as `ClientRequest`, and
turns its `Answer` or `Problem` into bytes; what headers and the log line need goes into the
`Trace`.
"""

import asyncio
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, Self, assert_never

from proxy.auth import Access, Team
from proxy.cache.canonical import present
from proxy.cache.price_book import PriceBook
from proxy.cache.prices import Balance, Lookup, Price, StoredPrice, document
from proxy.gateway.cache_status import after_failure, forwarded, hit
from proxy.gateway.fetcher import Fetcher, FetchResult
from proxy.gateway.freshness import Directives, Forward, NotCached, Serve, StaleLimits, choose
from proxy.gateway.live_config import ConfigHolder, RuntimeConfig
from proxy.gateway.purge import read_purge
from proxy.gateway.questions import CanonicalRequest, RequestParser
from proxy.problems import Code, Outcome, Problem, StoreUnavailable
from proxy.quota.credits import micro_of
from proxy.quota.ledger import Admitted, Denied, Ledger
from proxy.quota.quotas import Charge, Quota, QuotaState
from proxy.upstream.replies import Failed, Priced, Rejected, Unpriced


@dataclass(frozen=True, slots=True)
class Policy:
    """What the settings say about answers."""

    stale_limits: StaleLimits
    balance_max_age_s: float
    timeout_s: float
    refuse_unpriced: bool


class ClientRequest(Protocol):
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
    question: CanonicalRequest
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
    quota_state: QuotaState | None = None
    """Of the team, as the ledger has said it last."""
    warnings: tuple[Quota, ...] = ()
    """Quotas that only warn, and that this answer has passed."""

    def note(self, admission: Admitted | Denied) -> None:
        """What is refused passes no quota, whatever it passed on its way."""
        self.quota_state = admission.quota_state or self.quota_state
        if isinstance(admission, Denied):
            self.warnings = ()
        elif admission.quota_state is not None:
            self.warnings = admission.quota_state.warnings()

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
        self,
        live: ConfigHolder,
        ledger: Ledger,
        book: PriceBook,
        fetcher: Fetcher,
        reader: RequestParser,
        policy: Policy,
    ) -> None:
        self._live = live
        self._ledger = ledger
        self._book = book
        self._fetcher = fetcher
        self._reader = reader
        self._policy = policy

    async def estimate(self, request: ClientRequest, trace: Trace) -> Answer | Problem:
        """What upstream says, or said, to the body. Raises `BadRequest`, `ClientGone`."""
        config = self._live.config
        team = _who_asks(request, trace, config.access)
        if isinstance(team, Problem):
            return team
        question = self._read(await request.read_body(), team, request.query, config)

        known = self._book.get_local(question.key, question.account) or await self._look_up(question, trace)
        match choose(known, request.directives, self._policy.stale_limits):
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

        fetched, collapsed = await self._ask(question, request, forward, known, trace)
        ending = self._conclude(fetched, forward, question, collapsed=collapsed, trace=trace)
        return await self._settle(admission, question, fetched, ending, trace)

    async def explain(self, request: ClientRequest, trace: Trace) -> Explanation | Problem:
        """How the gateway reads a body and what it knows of it. Asks upstream nothing. Raises as `estimate`."""
        config = self._live.config
        team = _who_asks(request, trace, config.access)
        if isinstance(team, Problem):
            return team
        question = self._read(await request.read_body(), team, request.query, config)
        known = await self._look_up(question, trace)
        stored = None if known is None else known.stored
        admission = await self._peek(team, stored, trace)
        if isinstance(admission, Denied) and admission.problem.code is Code.RATE_LIMITED:
            return admission.problem
        ignored = present(question.canonical, config.ignored)
        outcome = Outcome.BYPASS if known is None else Outcome.HIT if stored else Outcome.MISS
        return Explanation(outcome, question, ignored, stored, admission)

    async def purge(self, request: ClientRequest, trace: Trace) -> Purged | Problem:
        """Forgets one question of an account, or all of them. For admin tokens. Raises as `estimate`."""
        config = self._live.config
        denial = _deny_all_but_admins(config.access, request.token, trace)
        if denial is not None:
            return denial
        wanted = read_purge(await request.read_body())
        if wanted.account not in config.accounts:
            return Problem(Code.INVALID_REQUEST, f"There is no account {wanted.account!r}.")
        try:
            if wanted.canonical is None:
                await self._book.purge_account(wanted.account)
                return Purged(wanted.account)
            query = wanted.query.encode()
            key = self._reader.of(wanted.canonical, account=wanted.account, query=query, ignored=config.ignored).key
            return Purged(wanted.account, key, await self._book.purge_question(key, wanted.account))
        except StoreUnavailable:
            detail = "The price book is out of reach: nothing is sure to be purged; try again."
            return Problem(Code.STORE_UNAVAILABLE, detail)

    async def finish(self, timeout_s: float) -> None:
        """Lets what was asked upstream come home and be stored, and what was admitted be settled."""
        await self._fetcher.finish(timeout_s)
        await self._ledger.close(timeout_s)

    def _read(self, body: bytes, team: Team, query: bytes, config: RuntimeConfig) -> CanonicalRequest:
        return self._reader.read(body, account=team.account, query=query, ignored=config.ignored)

    async def _look_up(self, question: CanonicalRequest, trace: Trace) -> Lookup | None:
        """What the book knows; None if it is out of reach."""
        with trace.at_store():
            try:
                return await self._book.look_up(question.key, question.account)
            except StoreUnavailable:
                return None

    async def _pass_over(self, team: Team, trace: Trace) -> Problem:
        """The client wants a stored answer or none, and there is none."""
        with trace.at_store():
            admission = await self._ledger.record_uncached(team.terms, Outcome.NOT_CACHED)
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
        trace.quota_state = admission.quota_state
        return admission

    async def _ask(
        self, question: CanonicalRequest, request: ClientRequest, forward: Forward, known: Lookup | None, trace: Trace
    ) -> tuple[FetchResult, bool]:
        """What upstream says within the request's deadline, and whether another request had asked already."""
        trace.waited = True
        try:
            async with asyncio.timeout_at(request.deadline):
                if forward.reason == "request" and request.directives.bypasses_cache:
                    store = not request.directives.no_store
                    fetched, collapsed = await self._fetcher.fetch_uncoalesced(question, store=store), False
                else:
                    fetched, collapsed = await self._fetcher.fetch(question, known)
        except TimeoutError:
            late = Problem(Code.UPSTREAM_TIMEOUT, f"There was no answer within {self._policy.timeout_s:g} s.")
            return FetchResult(Failed(late)), False
        trace.upstream_s = fetched.upstream_s
        return fetched, collapsed

    def _look_behind(
        self, question: CanonicalRequest, stored: StoredPrice, balance: Balance, known: Lookup | None, *, stale: bool
    ) -> None:
        """Behind the answer: a stale price is asked again, and an old balance too."""
        max_age_s = self._policy.balance_max_age_s
        if stale:
            self._fetcher.refresh(question, known)
        elif balance.age_s > max_age_s:
            self._fetcher.audit(question, stored, known, max_age_s=max_age_s)

    def _conclude(
        self, fetched: FetchResult, forward: Forward, question: CanonicalRequest, *, collapsed: bool, trace: Trace
    ) -> Answer | Problem:
        newest = self._book.accounts.balance(question.account)
        if forward.fallback is not None and newest is not None and isinstance(fetched.reply, Failed):
            trace.cache_status = after_failure(fetched.reply, forward.fallback)
            return _stored_answer(Outcome.STALE, forward.fallback, newest)
        trace.cache_status = forwarded(forward.reason, fetched, ttl_s=self._book.ttl_s, collapsed=collapsed)
        match fetched.reply:
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
                assert_never(fetched.reply)

    async def _settle(
        self,
        admitted: Admitted,
        question: CanonicalRequest,
        fetched: FetchResult,
        ending: Answer | Problem,
        trace: Trace,
    ) -> Answer | Problem:
        """Books how an admitted question has ended, which may turn out to be more than a quota allows."""
        with trace.at_store():
            if isinstance(ending, Problem) and isinstance(fetched.reply, Failed) and not fetched.reply.asked:
                quota_state = await self._ledger.refund(admitted, ending.outcome)
                trace.note(Denied(ending, quota_state))
                return ending
            price = ending.price if isinstance(ending, Answer) else None
            settled = await self._ledger.settle(admitted, _charge(ending.outcome, question, price))
        trace.note(settled)
        if isinstance(settled, Denied) and price is not None:
            return settled.problem
        return ending


def _who_asks(request: ClientRequest, trace: Trace, access: Access) -> Team | Problem:
    """Nobody's body is read before its token is known."""
    team = access.team(request.token)
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


def _charge(outcome: Outcome, question: CanonicalRequest, price: Price | None) -> Charge:
    if price is None:
        return Charge(outcome)
    return Charge(outcome, micro_of(price.estimated), question.model)


def _stored_answer(outcome: Outcome, stored: StoredPrice, balance: Balance) -> Answer:
    return Answer(outcome, 200, document(stored.price, balance), stored.price, stored.age_s, balance.age_s)


def _outcome(forward: Forward, *, collapsed: bool) -> Outcome:
    if forward.reason == "bypass":
        return Outcome.BYPASS
    return Outcome.COLLAPSED if collapsed else Outcome.MISS
