"""Answers estimate requests. `Gateway.estimate` has all steps and branches of a request, in order:

1. Authenticate the team by its token, then read and parse the body.
2. Look the price up: in this process's memory, then in the price book.
3. Decide, by the price's age and the request's `Cache-Control`, to serve it or to ask upstream. A price that is not
   stored for this body may be inferred: see `proxy.gateway.inferences`.
4. Serving: charge the team's quotas and answer. A stale price or an old balance is refreshed in the background, and
   some inferred prices are audited.
5. Asking upstream: check rate and quotas and book the request (admit), fetch the price, then book the result (settle).

An estimate above the request's ceiling is refused: the ledger checks the rate and quotas, and books no credits.

A request that fails or is denied becomes a `Problem`. Exceptions are for malformed requests, clients that have gone,
overload and defects: `proxy.http.endpoint` maps them to responses.
"""

import asyncio
from dataclasses import dataclass
from typing import assert_never

import orjson

from proxy.auth import Access, Team, team_disabled
from proxy.cache.canonical import present
from proxy.cache.price_book import PriceBook
from proxy.cache.prices import Balance, Lookup, Price, StoredPrice, document
from proxy.gateway.audits import Auditor
from proxy.gateway.cache_status import INFERRED, after_failure, forwarded, hit
from proxy.gateway.canonical_request import CanonicalRequest, RequestParser
from proxy.gateway.fetcher import Fetcher, FetchResult, timed_out
from proxy.gateway.freshness import Forward, NotCached, Serve, StaleLimits, choose
from proxy.gateway.inferences import Inference, Inferences
from proxy.gateway.live_config import ConfigHolder, RuntimeConfig
from proxy.gateway.quote_document import Basis, Known, Quoted, Unknown
from proxy.gateway.request import Answer, ClientRequest, Explanation, Learned, Trace
from proxy.learning.verdict import Inferred, NotInferred, Reason
from proxy.problems import Code, Outcome, Problem, StoreUnavailable
from proxy.quota.credits import micro_of, text_of
from proxy.quota.ledger import Admitted, Denied, Ledger
from proxy.quota.quotas import Charge
from proxy.upstream.replies import Failed, Priced, Rejected, Unpriced, rejection_of


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings about answers. They are not reloaded.

    balance_max_age_s: a hit whose balance is older starts an audit.
    timeout_s: of the whole answer; named in the problem of a request that exceeds it.
    refuse_unpriced: whether an answer without a price becomes a problem, or is passed on.
    """

    stale_limits: StaleLimits
    balance_max_age_s: float
    timeout_s: float
    refuse_unpriced: bool


@dataclass(frozen=True, slots=True)
class Unstored:
    """A question in a quote whose price is not stored. `lookup` is None if the price book is unavailable."""

    question: CanonicalRequest
    forward: Forward
    lookup: Lookup | None
    inference: Inference | None


class Gateway:
    """Answers estimates, explains them, and prices the questions of quotes."""

    def __init__(  # noqa: PLR0913, PLR0917 -- what a request passes through
        self,
        live: ConfigHolder,
        ledger: Ledger,
        book: PriceBook,
        fetcher: Fetcher,
        auditor: Auditor,
        inferences: Inferences,
        parser: RequestParser,
        *,
        policy: Policy,
    ) -> None:
        self._live = live
        self._ledger = ledger
        self._book = book
        self._fetcher = fetcher
        self._auditor = auditor
        self._inferences = inferences
        self._parser = parser
        self._policy = policy

    async def estimate(self, request: ClientRequest, trace: Trace) -> Answer | Problem:
        """Answers `POST /pub/v1/generations/estimate`. Raises `BadRequest`, `ClientGone`, `Overloaded`."""
        config = self._live.config
        team = authenticate(request, trace, config.access)
        if isinstance(team, Problem):
            return team
        canonical_request = self._parse(await request.read_body(), team, request.query, config)
        canonical_request.team = team.id
        trace.question = canonical_request

        lookup = self._book.get_local(canonical_request.key, team.account)
        if lookup is None:
            lookup = await self._look_up(canonical_request, trace)
        choice, inference = choose(lookup, request.directives, self._policy.stale_limits), None
        if lookup is not None and not isinstance(choice, Serve):
            with trace.timing_store():
                inference = await self._inferences.infer(canonical_request, lookup, request.directives, team, config)
            choice = choice if inference is None else inference.choice or choice
        match choice:
            case NotCached():
                return await self._refuse_uncached(team, trace)
            case Serve(stored, balance, stale):
                outcome = Outcome.INFERRED if inference is not None else Outcome.STALE if stale else Outcome.HIT
                answer = _stored_answer(outcome, stored, balance)
                result = _within_ceiling(answer, request.ceiling_micro)
                charge = _charge(result.outcome, canonical_request, stored.price)
                book = self._ledger.charge if result is answer else self._ledger.refuse_over_ceiling
                with trace.timing_store():
                    admission = await book(team.limits, charge)
                trace.record_admission(admission)
                if isinstance(admission, Denied):
                    return admission.problem
                if inference is None:
                    self._refresh_in_background(canonical_request, stored, balance, lookup, stale=stale)
                    trace.cache_status = hit(stored, detail="stale-while-revalidate" if stale else None)
                else:
                    self._check_in_background(canonical_request, inference.inferred, balance, lookup, stale=stale)
                    trace.record_inference(hit(stored, detail=INFERRED), inference.inferred.setting)
                return result
            case Forward() as forward:
                with trace.timing_store():
                    admission = await self._ledger.admit(team.limits)
                trace.record_admission(admission)
                if isinstance(admission, Denied):
                    return admission.problem

        fetched = await self._fetch(canonical_request, request, forward, lookup, trace)
        found = self._result_of(fetched, forward, canonical_request, inference, trace)
        result = _within_ceiling(found, request.ceiling_micro)
        price = found.price if isinstance(found, Answer) else None
        charge = _charge(result.outcome, canonical_request, price)
        return await self._settle(admission, charge, fetched, result, trace)

    def _parse(self, body: bytes, team: Team, query: bytes, config: RuntimeConfig) -> CanonicalRequest:
        return self._parser.parse(body, account=team.account, query=query, ignored=config.ignored)

    async def _look_up(self, canonical_request: CanonicalRequest, trace: Trace) -> Lookup | None:
        """What the price book has for a request; None if it is unavailable."""
        with trace.timing_store():
            try:
                return await self._book.look_up(canonical_request.key, canonical_request.account)
            except StoreUnavailable:
                return None

    async def _refuse_uncached(self, team: Team, trace: Trace) -> Problem:
        """The client wants only a stored answer, and none is usable. The request still uses one request of the rate."""
        with trace.timing_store():
            admission = await self._ledger.record_uncached(team.limits, Outcome.NOT_CACHED)
        trace.record_admission(admission)
        if isinstance(admission, Denied):
            return admission.problem
        return Problem(
            Code.NOT_CACHED,
            "No usable answer is stored, and Cache-Control: only-if-cached forbids asking RenderNet: send the request "
            "without it.",
        )

    def _refresh_in_background(
        self,
        canonical_request: CanonicalRequest,
        stored: StoredPrice,
        balance: Balance,
        lookup: Lookup | None,
        *,
        stale: bool,
    ) -> None:
        """Starts a refresh of a stale price, or an audit if the balance is old."""
        max_age_s = self._policy.balance_max_age_s
        if stale:
            self._fetcher.refresh(canonical_request, lookup)
        elif balance.age_s > max_age_s:
            self._auditor.audit(canonical_request, stored, lookup, max_age_s=max_age_s)

    def _check_in_background(
        self,
        canonical_request: CanonicalRequest,
        inferred: Inferred,
        balance: Balance,
        lookup: Lookup | None,
        *,
        stale: bool,
    ) -> None:
        """Counts an inferred answer, and audits it if its turn has come. Else as for a stored price, with its body."""
        max_age_s = self._policy.balance_max_age_s
        if self._inferences.count_answer(inferred):
            self._auditor.audit_inferred(canonical_request, inferred, lookup)
        elif stale:
            self._fetcher.refresh(canonical_request, lookup)
        elif balance.age_s > max_age_s:
            self._auditor.audit(canonical_request, None, lookup, max_age_s=max_age_s)

    async def _fetch(
        self,
        canonical_request: CanonicalRequest,
        request: ClientRequest,
        forward: Forward,
        lookup: Lookup | None,
        trace: Trace,
    ) -> FetchResult:
        """Upstream's reply; a failure if there is none at the request's deadline."""
        try:
            async with asyncio.timeout_at(request.deadline):
                if forward.reason == "request" and request.directives.bypasses_cache:
                    store = not request.directives.no_store
                    fetched = await self._fetcher.fetch_uncoalesced(canonical_request, store=store)
                else:
                    fetched = await self._fetcher.fetch(canonical_request, lookup)
        except TimeoutError:
            return timed_out(self._policy.timeout_s)
        trace.upstream_s = fetched.upstream_s
        return fetched

    def _result_of(
        self,
        fetched: FetchResult,
        forward: Forward,
        canonical_request: CanonicalRequest,
        inference: Inference | None,
        trace: Trace,
    ) -> Answer | Problem:
        """Turns upstream's reply into an answer. If upstream failed, a stale price may still be served."""
        newest = self._book.accounts.balance(canonical_request.account)
        if forward.fallback is not None and newest is not None and isinstance(fetched.reply, Failed):
            outcome = self._fall_back(fetched.reply, forward.fallback, inference, trace)
            return _stored_answer(outcome, forward.fallback, newest)
        if inference is not None and inference.choice is None:
            self._inferences.compare(inference.inferred, fetched.reply)
        trace.cache_status = forwarded(forward.reason, fetched, ttl_s=self._book.ttl_s)
        match fetched.reply:
            case Priced(price):
                body = document(price, newest)
                balance_age_s = None if newest is None else newest.age_s
                return Answer(_outcome(forward, fetched), 200, body, price, balance_age_s=balance_age_s)
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

    def _fall_back(self, failed: Failed, stored: StoredPrice, inference: Inference | None, trace: Trace) -> Outcome:
        """Serves a stale price, the request's own or an inferred one, because upstream failed."""
        if inference is None:
            trace.cache_status = after_failure(failed, stored)
            return Outcome.STALE
        self._inferences.count_unaudited_answer(inference.inferred)
        trace.record_inference(after_failure(failed, stored, detail=INFERRED), inference.inferred.setting)
        return Outcome.INFERRED

    async def _settle(
        self,
        admitted: Admitted,
        charge: Charge,
        fetched: FetchResult,
        result: Answer | Problem,
        trace: Trace,
    ) -> Answer | Problem:
        """Books the result of an admitted request. The price is known only now, and may exceed a quota."""
        settled: Admitted | Denied
        with trace.timing_store():
            if isinstance(result, Problem) and not fetched.was_asked:
                settled = await self._ledger.refund(admitted, charge, result)
            else:
                if charge.outcome is Outcome.MISS and fetched.upstream_s is not None:
                    charge.upstream_us = round(1_000_000 * fetched.upstream_s)
                settled = await self._ledger.settle(admitted, charge)
        trace.record_admission(settled)
        if isinstance(settled, Denied) and charge.credits_micro is not None:
            return settled.problem
        return result

    async def stored_price(
        self, question: CanonicalRequest, request: ClientRequest, team: Team, config: RuntimeConfig, trace: Trace
    ) -> Known | Problem | Unstored:
        """The stored price of a question in a quote. Uses one request of the rate, unless upstream must be asked."""
        lookup = self._book.get_local(question.key, team.account) or await self._look_up(question, trace)
        choice, inference = choose(lookup, request.directives, self._policy.stale_limits), None
        if lookup is not None and not isinstance(choice, Serve):
            inference = await self._inferences.infer(question, lookup, request.directives, team, config)
            choice = choice if inference is None else inference.choice or choice
        match choice:
            case NotCached():
                return await self._refuse_uncached(team, trace)
            case Serve(stored, balance, stale):
                with trace.timing_store():
                    admission = await self._ledger.use_rate(team.limits)
                trace.record_admission(admission)
                if isinstance(admission, Denied):
                    return admission.problem
                if inference is None:
                    self._refresh_in_background(question, stored, balance, lookup, stale=stale)
                    return _known(stored, "stored")
                self._check_in_background(question, inference.inferred, balance, lookup, stale=stale)
                return _known(stored, "inferred")
            case Forward() as forward:
                return Unstored(question, forward, lookup, inference)

    async def asked_price(self, unstored: Unstored, request: ClientRequest, team: Team, trace: Trace) -> Quoted:
        """Asks upstream for the price of a question in a quote.

        Uses one request of the rate and, if it is sent upstream, of the quotas on requests. Debits no credits.
        """
        question, forward = unstored.question, unstored.forward
        with trace.timing_store():
            admission = await self._ledger.admit(team.limits)
        trace.record_admission(admission)
        if isinstance(admission, Denied):
            return Unknown.of(admission.problem)
        fetched = await self._fetch(question, request, forward, unstored.lookup, trace)
        result = self._result_of(fetched, forward, question, unstored.inference, trace)
        if fetched.collapsed or not fetched.was_asked:
            await self._ledger.release(admission)
        else:
            await self._settle(admission, Charge(result.outcome), fetched, result, trace)
        return self._priced(result, fetched, forward)

    def _priced(self, result: Answer | Problem, fetched: FetchResult, forward: Forward) -> Quoted:
        """What a quote shows of the result."""
        if isinstance(result, Problem):
            return Unknown.of(result)
        if result.age_s is not None and forward.fallback is not None:
            return _known(forward.fallback, "inferred" if result.outcome is Outcome.INFERRED else "stored")
        if result.price is not None:
            ttl_s = self._book.ttl_s if fetched.stored else None
            return Known(result.price.estimated, "asked", age_s=0, ttl_s=ttl_s)
        if result.outcome is Outcome.UNPRICED:
            return Unknown(Code.UNPRICED, "RenderNet answered without a price for this body.")
        code, message = rejection_of(result.body)
        return Unknown(
            code or Outcome.UPSTREAM_REJECTED, message or f"RenderNet refused the body with status {result.status}."
        )

    async def explain(self, request: ClientRequest, trace: Trace) -> Explanation | Problem:
        """Answers `POST /v1/explain`. Does not ask upstream, and debits only the rate. Raises as `estimate`."""
        config = self._live.config
        team = authenticate(request, trace, config.access)
        if isinstance(team, Problem):
            return team
        canonical_request = self._parse(await request.read_body(), team, request.query, config)
        trace.question = canonical_request
        lookup = await self._look_up(canonical_request, trace)
        stored = None if lookup is None else lookup.stored
        verdict = None if lookup is None else await self._inferences.explain(canonical_request, config)
        if isinstance(verdict, Inferred) and not team.infer:
            verdict = NotInferred(Reason.EXACT_TEAM, verdict.scope, verdict.ticket)
        inferred = verdict.stored if isinstance(verdict, Inferred) and config.learn == "use" else None
        admission = await self._peek(team, stored or inferred, trace)
        if isinstance(admission, Denied) and admission.problem.code is Code.RATE_LIMITED:
            return admission.problem
        ignored = present(canonical_request.canonical, config.ignored)
        outcome = Outcome.BYPASS if lookup is None else Outcome.HIT if stored else Outcome.MISS
        learned = None if verdict is None else Learned(config.learn, verdict, None if stored else inferred)
        return Explanation(outcome, canonical_request, ignored, stored, admission, learned)

    async def _peek(self, team: Team, stored: StoredPrice | None, trace: Trace) -> Admitted | Denied | None:
        """Whether an estimate would be admitted now; None if the ledger is unavailable."""
        with trace.timing_store():
            try:
                admission = await self._ledger.peek(team.limits, micro_of(stored.price.estimated) if stored else None)
            except StoreUnavailable:
                return None
        trace.quota_state = admission.quota_state
        return admission

    async def finish(self, timeout_s: float) -> None:
        """Waits until calls to upstream are answered, stored and learned from, then until admissions are settled."""
        await asyncio.gather(self._fetcher.finish(timeout_s), self._auditor.finish(timeout_s))
        await self._inferences.finish(timeout_s)
        await self._ledger.close(timeout_s)


def authenticate(request: ClientRequest, trace: Trace, access: Access) -> Team | Problem:
    """The team of the request's token. Called before the body is read: bodies of unknown clients are never read."""
    credential = access.credential(request.token)
    if isinstance(credential, Problem):
        return credential
    trace.record_credential(credential)
    team = credential.team
    return team_disabled(team) if team.disabled else team


def _charge(outcome: Outcome, canonical_request: CanonicalRequest, price: Price | None) -> Charge:
    if price is None:
        return Charge(outcome)
    return Charge(outcome, micro_of(price.estimated), canonical_request.model)


def _known(stored: StoredPrice, basis: Basis) -> Known:
    return Known(stored.price.estimated, basis, stored.age_s, stored.ttl_s)


def _within_ceiling(answer: Answer | Problem, ceiling_micro: int | None) -> Answer | Problem:
    """The answer, or the refusal of one whose price is above the request's ceiling.

    Comparing micro-credits is exact: the ceiling is a whole number of them, and the price is rounded up.
    """
    if ceiling_micro is None or isinstance(answer, Problem) or answer.price is None:
        return answer
    estimated = answer.price.estimated
    if micro_of(estimated) <= ceiling_micro:
        return answer
    ceiling = text_of(ceiling_micro)
    detail = (
        f"The estimate is {estimated.decode()} credits, and the request accepts at most {ceiling}: make the generation "
        "cheaper, or raise Estimate-Proxy-Max-Credits."
    )
    members = {"estimated": orjson.Fragment(estimated), "ceiling": orjson.Fragment(ceiling)}
    return Problem(Code.OVER_CEILING, detail, members=members)


def _stored_answer(outcome: Outcome, stored: StoredPrice, balance: Balance) -> Answer:
    return Answer(outcome, 200, document(stored.price, balance), stored.price, stored.age_s, balance.age_s)


def _outcome(forward: Forward, fetched: FetchResult) -> Outcome:
    if forward.reason == "bypass":
        return Outcome.BYPASS
    return Outcome.COLLAPSED if fetched.collapsed else Outcome.MISS
