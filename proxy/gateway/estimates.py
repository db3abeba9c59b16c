"""Answers estimate requests. `Estimates.estimate` has all steps and branches of a request, in order:

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

import orjson

from proxy.cache.prices import Price
from proxy.gateway.authentication import authenticate
from proxy.gateway.cache_status import INFERRED, hit
from proxy.gateway.canonical_request import CanonicalRequest, RequestParser
from proxy.gateway.freshness import NotCached, Serve, choose
from proxy.gateway.live_config import ConfigHolder
from proxy.gateway.pricing import Pricing, stored_answer
from proxy.gateway.request import Answer, ClientRequest, Trace
from proxy.problems import Code, Outcome, Problem
from proxy.quota.credits import micro_of, text_of
from proxy.quota.ledger import Denied
from proxy.quota.quotas import Charge


class Estimates:
    """The handler of estimates."""

    def __init__(self, live: ConfigHolder, parser: RequestParser, pricing: Pricing) -> None:
        self._live = live
        self._parser = parser
        self._pricing = pricing

    async def estimate(self, request: ClientRequest, trace: Trace) -> Answer | Problem:
        """Answers `POST /pub/v1/generations/estimate`. Raises `BadRequest`, `ClientGone`, `Overloaded`."""
        config, pricing = self._live.config, self._pricing
        team = authenticate(request, trace, config.access)
        if isinstance(team, Problem):
            return team
        body = await request.read_body()
        question = self._parser.parse(body, account=team.account, query=request.query, ignored=config.ignored)
        question.team = team.id
        trace.question = question

        lookup = pricing.book.get_local(question.key, team.account)
        if lookup is None:
            lookup = await pricing.look_up(question, trace)
        choice = choose(lookup, request.directives, pricing.policy.stale_limits)
        if lookup is not None and not isinstance(choice, Serve):
            with trace.timing_store():
                choice = await pricing.inferences.infer(choice, question, lookup, request.directives, team, config)
        match choice:
            case NotCached():
                return await pricing.refuse_uncached(team, trace)
            case Serve(stored, balance, stale, inferred):
                outcome = Outcome.INFERRED if inferred is not None else Outcome.STALE if stale else Outcome.HIT
                answer = stored_answer(outcome, stored, balance)
                result = _within_ceiling(answer, request.ceiling_micro)
                charge = _charge(result.outcome, question, stored.price)
                book = pricing.ledger.charge if result is answer else pricing.ledger.refuse_over_ceiling
                with trace.timing_store():
                    admission = await book(team.limits, charge)
                trace.record_admission(admission)
                if isinstance(admission, Denied):
                    return admission.problem
                pricing.check_in_background(question, choice, lookup)
                if inferred is None:
                    trace.cache_status = hit(stored, detail="stale-while-revalidate" if stale else None)
                else:
                    trace.record_inference(hit(stored, detail=INFERRED), inferred.setting)
                return result

        with trace.timing_store():
            admission = await pricing.ledger.admit(team.limits)
        trace.record_admission(admission)
        if isinstance(admission, Denied):
            return admission.problem
        fetched = await pricing.ask(question, request, choice, lookup, trace)
        found = pricing.answer_of(fetched, choice, question, trace)
        result = _within_ceiling(found, request.ceiling_micro)
        charge = _charge(result.outcome, question, found.price if isinstance(found, Answer) else None)
        return await pricing.settle(admission, charge, fetched, result, trace)


def _charge(outcome: Outcome, question: CanonicalRequest, price: Price | None) -> Charge:
    if price is None:
        return Charge(outcome)
    return Charge(outcome, micro_of(price.estimated), question.model)


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
