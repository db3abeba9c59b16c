"""The steps that estimates and quotes share: look a price up, refuse, ask upstream, book the result.

`Estimates.estimate` and `Quotes` call them in order, and decide between them.
"""

import asyncio
from dataclasses import dataclass
from typing import assert_never

from proxy.auth import Team
from proxy.cache.price_book import PriceBook
from proxy.cache.prices import Balance, Lookup, StoredPrice, document
from proxy.gateway.audits import Auditor
from proxy.gateway.cache_status import INFERRED, after_failure, forwarded
from proxy.gateway.canonical_request import CanonicalRequest
from proxy.gateway.fetcher import Fetcher, FetchResult, timed_out
from proxy.gateway.freshness import Forward, Serve, StaleLimits
from proxy.gateway.inferences import Inferences
from proxy.gateway.request import Answer, ClientRequest, Trace
from proxy.learning.verdict import Inferred
from proxy.problems import Code, Outcome, Problem, StoreUnavailable
from proxy.quota.ledger import Admitted, Denied, Ledger
from proxy.quota.quotas import Charge
from proxy.upstream.replies import Failed, Priced, Rejected, Unpriced

UNPRICED = Problem(Code.UNPRICED, "RenderNet answered without a price for this body.")


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
class Pricing:
    """The parts that price a question, and the steps that use them."""

    ledger: Ledger
    book: PriceBook
    fetcher: Fetcher
    auditor: Auditor
    inferences: Inferences
    policy: Policy

    async def look_up(self, question: CanonicalRequest, trace: Trace) -> Lookup | None:
        """What the price book has for a question; None if it is unavailable."""
        with trace.timing_store():
            try:
                return await self.book.look_up(question.key, question.account)
            except StoreUnavailable:
                return None

    async def refuse_uncached(self, team: Team, trace: Trace) -> Problem:
        """The client wants only a stored answer, and none is usable. The request still uses one request of the rate."""
        with trace.timing_store():
            admission = await self.ledger.record_uncached(team.limits, Outcome.NOT_CACHED)
        trace.record_admission(admission)
        if isinstance(admission, Denied):
            return admission.problem
        return Problem(
            Code.NOT_CACHED,
            "No usable answer is stored, and Cache-Control: only-if-cached forbids asking RenderNet: send the request "
            "without it.",
        )

    def check_in_background(self, question: CanonicalRequest, served: Serve, lookup: Lookup | None) -> None:
        """Counts an inferred answer, and audits it if its turn has come.

        Otherwise starts a refresh of a stale price, or an audit if the balance is old.
        """
        inferred, max_age_s = served.inferred, self.policy.balance_max_age_s
        if inferred is not None and self.inferences.count_answer(inferred):
            self.auditor.audit_inferred(question, inferred, lookup)
        elif served.stale:
            self.fetcher.refresh(question, lookup)
        elif served.balance.age_s > max_age_s:
            stored = served.stored if inferred is None else None
            self.auditor.audit(question, stored, lookup, max_age_s=max_age_s)

    async def ask(
        self, question: CanonicalRequest, request: ClientRequest, forward: Forward, lookup: Lookup | None, trace: Trace
    ) -> FetchResult:
        """Upstream's reply; a failure if there is none at the request's deadline."""
        try:
            async with asyncio.timeout_at(request.deadline):
                if forward.reason == "request" and request.directives.bypasses_cache:
                    store = not request.directives.no_store
                    fetched = await self.fetcher.fetch_uncoalesced(question, store=store)
                else:
                    fetched = await self.fetcher.fetch(question, lookup)
        except TimeoutError:
            return timed_out(self.policy.timeout_s)
        trace.upstream_s = fetched.upstream_s
        return fetched

    def answer_of(
        self, fetched: FetchResult, forward: Forward, question: CanonicalRequest, trace: Trace
    ) -> Answer | Problem:
        """Turns upstream's reply into an answer. If upstream failed, a stale price may still be served."""
        newest = self.book.accounts.balance(question.account)
        if forward.fallback is not None and newest is not None and isinstance(fetched.reply, Failed):
            outcome = self._fall_back(fetched.reply, forward.fallback, forward.inferred, trace)
            return stored_answer(outcome, forward.fallback, newest)
        if forward.fallback is None and forward.inferred is not None:
            self.inferences.compare(forward.inferred, fetched.reply)
        trace.cache_status = forwarded(forward.reason, fetched, ttl_s=self.book.ttl_s)
        match fetched.reply:
            case Priced(price):
                body = document(price, newest)
                balance_age_s = None if newest is None else newest.age_s
                return Answer(_outcome(forward, fetched), 200, body, price, balance_age_s=balance_age_s)
            case Unpriced() if self.policy.refuse_unpriced:
                return UNPRICED
            case Unpriced(body):
                return Answer(Outcome.UNPRICED, 200, body)
            case Rejected(status, body):
                return Answer(Outcome.UPSTREAM_REJECTED, status, body)
            case Failed(problem):
                return problem
            case _:
                assert_never(fetched.reply)

    def _fall_back(self, failed: Failed, stored: StoredPrice, inferred: Inferred | None, trace: Trace) -> Outcome:
        """Serves a stale price, the question's own or an inferred one, because upstream failed."""
        if inferred is None:
            trace.cache_status = after_failure(failed, stored)
            return Outcome.STALE
        if self.inferences.count_answer(inferred):
            self.inferences.owe_audit(inferred)
        trace.record_inference(after_failure(failed, stored, detail=INFERRED), inferred.setting)
        return Outcome.INFERRED

    async def settle(
        self, admitted: Admitted, charge: Charge, fetched: FetchResult, result: Answer | Problem, trace: Trace
    ) -> Answer | Problem:
        """Books the result of an admitted request. The price is known only now, and may exceed a quota."""
        settled: Admitted | Denied
        with trace.timing_store():
            if isinstance(result, Problem) and not fetched.was_asked:
                settled = await self.ledger.refund(admitted, charge, result)
            else:
                if charge.outcome is Outcome.MISS and fetched.upstream_s is not None:
                    charge.upstream_us = round(1_000_000 * fetched.upstream_s)
                settled = await self.ledger.settle(admitted, charge)
        trace.record_admission(settled)
        if isinstance(settled, Denied) and charge.credits_micro is not None:
            return settled.problem
        return result

    async def finish(self, timeout_s: float) -> None:
        """Waits until calls to upstream are answered, stored and learned from, then until admissions are settled."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        await asyncio.gather(self.fetcher.finish(timeout_s), self.auditor.finish(timeout_s))
        await self.inferences.finish(max(0.0, deadline - clock()))
        await self.ledger.close(max(0.0, deadline - clock()))


def stored_answer(outcome: Outcome, stored: StoredPrice, balance: Balance) -> Answer:
    return Answer(outcome, 200, document(stored.price, balance), stored.price, stored.age_s, balance.age_s)


def _outcome(forward: Forward, fetched: FetchResult) -> Outcome:
    if forward.reason == "bypass":
        return Outcome.BYPASS
    return Outcome.COLLAPSED if fetched.collapsed else Outcome.MISS
