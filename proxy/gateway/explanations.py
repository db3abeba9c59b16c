"""Answers `POST /v1/explain`: how the gateway reads a body, and what an estimate of it would get."""

from proxy.auth import Team
from proxy.cache.canonical import present
from proxy.cache.prices import StoredPrice
from proxy.gateway.authentication import authenticate
from proxy.gateway.canonical_request import RequestParser
from proxy.gateway.live_config import ConfigHolder
from proxy.gateway.pricing import Pricing
from proxy.gateway.request import ClientRequest, Explanation, Learned, Trace
from proxy.learning.verdict import Inferred, NotInferred, Reason
from proxy.problems import Code, Outcome, Problem, StoreUnavailable
from proxy.quota.credits import micro_of
from proxy.quota.ledger import Admitted, Denied


class Explanations:
    """The handler of explanations."""

    def __init__(self, live: ConfigHolder, parser: RequestParser, pricing: Pricing) -> None:
        self._live = live
        self._parser = parser
        self._pricing = pricing

    async def explain(self, request: ClientRequest, trace: Trace) -> Explanation | Problem:
        """Explains a body. Does not ask upstream, and debits only the rate. Raises as `Estimates.estimate`."""
        config = self._live.config
        team = authenticate(request, trace, config.access)
        if isinstance(team, Problem):
            return team
        body = await request.read_body()
        question = self._parser.parse(body, account=team.account, query=request.query, ignored=config.ignored)
        trace.question = question
        lookup = await self._pricing.look_up(question, trace)
        stored = None if lookup is None else lookup.stored
        verdict = None if lookup is None else await self._pricing.inferences.explain(question, config)
        if isinstance(verdict, Inferred) and not team.infer:
            verdict = NotInferred(Reason.EXACT_TEAM, verdict.scope, verdict.ticket)
        inferred = verdict.stored if isinstance(verdict, Inferred) and config.learn == "use" else None
        admission = await self._peek(team, stored or inferred, trace)
        if isinstance(admission, Denied) and admission.problem.code is Code.RATE_LIMITED:
            return admission.problem
        ignored = present(question.canonical, config.ignored)
        outcome = Outcome.BYPASS if lookup is None else Outcome.HIT if stored else Outcome.MISS
        learned = None if verdict is None else Learned(config.learn, verdict, None if stored else inferred)
        return Explanation(outcome, question, ignored, stored, admission, learned)

    async def _peek(self, team: Team, stored: StoredPrice | None, trace: Trace) -> Admitted | Denied | None:
        """Whether an estimate would be admitted now; None if the ledger is unavailable."""
        credits_micro = micro_of(stored.price.estimated) if stored else None
        with trace.timing_store():
            try:
                admission = await self._pricing.ledger.peek(team.limits, credits_micro)
            except StoreUnavailable:
                return None
        trace.quota_state = admission.quota_state
        return admission
