"""Answers `POST /v1/quote`: what would these bodies cost, and why?

1. Authenticate the team, then read the quote: at most `MAX_QUESTIONS` distinct questions.
2. Price each question as an estimate does: stored, or asked once for all gateways. At most `MAX_ASKED` of a call are
   asked at a time. What is not answered at the deadline of the call has an error.
3. Hide the prices of estimates that a quota would refuse, and answer.

Questions use the rate, and those sent to RenderNet the quotas on requests. None uses credits.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from zoneinfo import ZoneInfo

from proxy.auth import Team
from proxy.cache.prices import Lookup, StoredPrice
from proxy.gateway.authentication import authenticate
from proxy.gateway.canonical_request import CanonicalRequest, RequestParser
from proxy.gateway.freshness import Forward, NotCached, Serve, choose
from proxy.gateway.in_flight import InFlightTracker
from proxy.gateway.live_config import ConfigHolder, RuntimeConfig
from proxy.gateway.pricing import UNPRICED, Pricing
from proxy.gateway.quote_document import Basis, Known, Quoted, QuotedVariant, Unknown, quote_document, shown_to_team
from proxy.gateway.quote_request import MAX_QUESTIONS, QuoteRequest, Variant, read_quote
from proxy.gateway.request import Answer, ClientRequest, Document, Trace
from proxy.learning.verdict import Inferred
from proxy.problems import BadRequest, Code, Outcome, Problem
from proxy.quota.ledger import Denied
from proxy.quota.quotas import Charge, QuotaState
from proxy.upstream.replies import rejection_of

MAX_ASKED = 8
"""Questions of a call that are asked at a time, so that one call does not take RenderNet's connections from others."""

BYTES_IN_A_TURN = 64 * 2**10
"""Bodies that are parsed without letting other requests run: it takes about a millisecond."""

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks the questions of a quote, and the configuration when the quote began."""

    request: ClientRequest
    team: Team
    config: RuntimeConfig


@dataclass(frozen=True, slots=True)
class Questions:
    """The distinct questions of a quote by key, and the keys of each variant: its own, then those of its lines."""

    by_key: Mapping[str, CanonicalRequest]
    keys: list[tuple[Variant, list[str]]]


class Quotes:
    """The handler of quotes. `zone`: the time zone of the reset times in refusals by quotas."""

    def __init__(
        self, live: ConfigHolder, parser: RequestParser, pricing: Pricing, tracker: InFlightTracker, zone: ZoneInfo
    ) -> None:
        self._live = live
        self._parser = parser
        self._pricing = pricing
        self._tracker = tracker
        self._zone = zone

    async def quote(self, request: ClientRequest, trace: Trace) -> Document | Problem:
        """Answers a quote. Raises `BadRequest`, `ClientGone`, `Overloaded`."""
        config = self._live.config
        team = authenticate(request, trace, config.access)
        if isinstance(team, Problem):
            return team
        wanted = read_quote(await request.read_body())
        questions = await self._questions(wanted, request, team, config.ignored)
        priced = await self._price_all(questions, Asker(request, team, config), trace)
        shown = {key: shown_to_team(found, trace.quota_state, self._zone) for key, found in priced.items()}
        variants = [
            QuotedVariant(variant, shown[own], [shown[key] for key in lines])
            for variant, (own, *lines) in questions.keys
        ]
        all_stored = all(isinstance(found, Known) and found.basis != "asked" for found in priced.values())
        body = quote_document(wanted, variants, trace.quota_state, self._pricing.book.accounts.balance(team.account))
        return Document(body, JSON, Outcome.HIT if all_stored else Outcome.MISS)

    async def _questions(
        self, wanted: QuoteRequest, request: ClientRequest, team: Team, ignored: tuple[str, ...]
    ) -> Questions:
        """Lets other requests run after each `BYTES_IN_A_TURN`: a quote can have megabytes of bodies."""
        by_key: dict[str, CanonicalRequest] = {}
        keys, size = [], 0
        for variant in wanted.variants():
            bodies = (variant.canonical, *(line.canonical for line in variant.lines))
            found = [
                self._parser.from_canonical(body, account=team.account, query=request.query, ignored=ignored)
                for body in bodies
            ]
            for question in found:
                question.team = team.id
            by_key |= {question.key: question for question in found}
            keys.append((variant, [question.key for question in found]))
            size += sum(map(len, bodies))
            if size >= BYTES_IN_A_TURN:
                size = 0
                await asyncio.sleep(0)
        if len(by_key) > MAX_QUESTIONS:
            raise BadRequest(
                Code.INVALID_BODY,
                f"The quote would ask {len(by_key)} distinct questions, and at most {MAX_QUESTIONS} are allowed: send "
                "fewer variants, or leave out the breakdown.",
            )
        return Questions(by_key, keys)

    async def _price_all(self, questions: Questions, asker: Asker, trace: Trace) -> dict[str, Quoted]:
        slots = asyncio.Semaphore(MAX_ASKED)
        traces = [Trace() for _ in questions.by_key]
        async with asyncio.TaskGroup() as tasks:
            running = {
                key: tasks.create_task(self._price(question, asker, own_trace, slots))
                for (key, question), own_trace in zip(questions.by_key.items(), traces, strict=True)
            }
        states = [own_trace.quota_state for own_trace in traces if own_trace.quota_state is not None]
        trace.quota_state = max(states, key=_progress, default=None)
        trace.upstream_s = max((own.upstream_s for own in traces if own.upstream_s is not None), default=None)
        return {key: task.result() for key, task in running.items()}

    async def _price(self, question: CanonicalRequest, asker: Asker, trace: Trace, slots: asyncio.Semaphore) -> Quoted:
        """The price of a question. A stored one uses one request of the rate."""
        pricing, request, team = self._pricing, asker.request, asker.team
        lookup = pricing.book.get_local(question.key, team.account) or await pricing.look_up(question, trace)
        choice = choose(lookup, request.directives, pricing.policy.stale_limits)
        if lookup is not None and not isinstance(choice, Serve):
            choice = await pricing.inferences.infer(choice, question, lookup, request.directives, team, asker.config)
        match choice:
            case NotCached():
                return Unknown.of(await pricing.refuse_uncached(team, trace))
            case Serve():
                admission = await pricing.ledger.use_rate(team.limits)
                trace.record_admission(admission)
                if isinstance(admission, Denied):
                    return Unknown.of(admission.problem)
                pricing.check_in_background(question, choice, lookup)
                return _known(choice.stored, choice.inferred)
        try:
            async with asyncio.timeout_at(request.deadline):
                await slots.acquire()
        except TimeoutError:
            return Unknown(Code.UPSTREAM_TIMEOUT, "No time was left to ask RenderNet: send the quote again.")
        self._tracker.in_flight += 1  # it waits for upstream as a request of its own would
        try:
            return await self._ask(question, asker, choice, lookup, trace)
        finally:
            self._tracker.in_flight -= 1
            slots.release()

    async def _ask(
        self, question: CanonicalRequest, asker: Asker, forward: Forward, lookup: Lookup | None, trace: Trace
    ) -> Quoted:
        """Asks upstream. Uses one request of the rate and, if it is sent upstream, of the quotas on requests."""
        pricing = self._pricing
        admission = await pricing.ledger.admit(asker.team.limits)
        trace.record_admission(admission)
        if isinstance(admission, Denied):
            return Unknown.of(admission.problem)
        fetched = await pricing.ask(question, asker.request, forward, lookup, trace)
        result = pricing.answer_of(fetched, forward, question, trace)
        if fetched.collapsed or not fetched.was_asked:
            await pricing.ledger.release(admission)
        else:
            await pricing.settle(admission, Charge(result.outcome), fetched, result, trace)
        return _quoted(result, forward, ttl_s=pricing.book.ttl_s if fetched.stored else None)


def _quoted(result: Answer | Problem, forward: Forward, *, ttl_s: float | None) -> Quoted:
    """What a quote shows of the result. `ttl_s`: of a price just stored."""
    if isinstance(result, Problem):
        return Unknown.of(result)
    if result.age_s is not None and forward.fallback is not None:
        return _known(forward.fallback, forward.inferred)
    if result.price is not None:
        return Known(result.price.estimated, "asked", age_s=0, ttl_s=ttl_s)
    if result.outcome is Outcome.UNPRICED:
        return Unknown.of(UNPRICED)
    code, message = rejection_of(result.body)
    message = message or f"RenderNet refused the body with status {result.status}."
    return Unknown(code or Outcome.UPSTREAM_REJECTED, message)


def _known(stored: StoredPrice, inferred: Inferred | None) -> Known:
    basis: Basis = "stored" if inferred is None else "inferred"
    return Known(stored.price.estimated, basis, stored.age_s, stored.ttl_s)


def _progress(state: QuotaState) -> tuple[int, ...]:
    """Orders the states of one team: those of one ledger call have the same time."""
    return (state.now_us, state.tat_us, *state.used)
