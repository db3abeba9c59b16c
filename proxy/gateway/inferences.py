"""Infers prices of bodies that are not known exactly, and learns from upstream's answers, as `cache.learn` says.

* `off`: neither. `observe`: learns, and compares what it would have answered with upstream's answer, but changes no
  answer and asks nothing more. `use`: answers, and audits.
* A client that asks for an exact answer (`no-cache`, `no-store`, `max-age=0`) gets one, as does a team with
  `infer = false`. Upstream's answers to them are learned from, except with `no-store`.
* Learning runs in the background, so no answer waits for it. If the store is unavailable, nothing is inferred or
  learned: evidence that is lost is gathered again.
"""

import logging
from contextlib import suppress
from dataclasses import replace
from itertools import count

from proxy.auth import Team
from proxy.cache.account_book import AccountBooks
from proxy.cache.prices import Lookup, Price, StoredPrice
from proxy.cache.single_flight import SingleFlight
from proxy.gateway.canonical_request import CanonicalRequest
from proxy.gateway.freshness import Choice, Directives, Forward, Serve, StaleLimits, choose
from proxy.gateway.live_config import ConfigHolder, RuntimeConfig
from proxy.learning.answers import data_digest
from proxy.learning.evidence import Contradiction
from proxy.learning.learner import Learner
from proxy.learning.observation import Counted, Effect
from proxy.learning.ticket import Ticket
from proxy.learning.verdict import Inferred, NotInferred
from proxy.problems import StoreUnavailable
from proxy.quota.price_change_log import PriceChangeLog
from proxy.telemetry.logs import event
from proxy.telemetry.metrics import Metrics
from proxy.upstream.replies import Priced, Reply

log = logging.getLogger(__name__)


class Inferences:
    """The inferences of one process."""

    def __init__(
        self,
        live: ConfigHolder,
        learner: Learner,
        accounts: AccountBooks,
        price_changes: PriceChangeLog,
        metrics: Metrics,
        *,
        stale_limits: StaleLimits,
    ) -> None:
        self._live = live
        self._learner = learner
        self._accounts = accounts
        self._price_changes = price_changes
        self._metrics = metrics
        self._stale_limits = stale_limits
        self._lessons = SingleFlight[None]()
        self._sequence = count()

    async def infer(
        self,
        choice: Choice,
        question: CanonicalRequest,
        lookup: Lookup,
        directives: Directives,
        team: Team,
        config: RuntimeConfig,
    ) -> Choice:
        """What to do with a question whose exact price cannot be served: `choice`, unless its price can be inferred.

        lookup: what the price book had.
        """
        if config.learn == "off":
            return choice
        verdict = question.verdict = await self._learner.look_up(question, config.never_learn)
        wants_exact = not team.infer or directives.bypasses_cache or directives.max_age_s == 0
        if not isinstance(verdict, Inferred) or lookup.stored is not None or wants_exact:
            return choice
        inferred = choose(replace(lookup, stored=verdict.stored), directives, self._stale_limits)
        match config.learn, inferred, choice:
            case "use", Serve() | Forward(fallback=StoredPrice()), _:
                return replace(inferred, inferred=verdict)
            case "observe", Serve(), Forward():
                return replace(choice, inferred=verdict)
        return choice

    async def explain(self, question: CanonicalRequest, config: RuntimeConfig) -> Inferred | NotInferred | None:
        """What was learned about a body, for people; None if `cache.learn` is `off`."""
        if config.learn == "off":
            return None
        return await self._learner.look_up(question, config.never_learn, pays_audit=False)

    def count_answer(self, inferred: Inferred) -> bool:
        """Counts an inferred price that was answered. Returns whether it must be audited."""
        self._metrics.record_inference(inferred.ticket.account, Counted.ANSWERED)
        return self._learner.count(inferred, Counted.ANSWERED)

    def compare(self, inferred: Inferred, reply: Reply) -> None:
        """Compares a price that would have been inferred with upstream's answer, and counts the result."""
        if isinstance(reply, Priced):
            is_right = data_digest(reply.price) == data_digest(inferred.stored.price)
            counted = Counted.RIGHT if is_right else Counted.WRONG
            self._metrics.record_inference(inferred.ticket.account, counted)
            self._learner.count(inferred, counted)

    def owe_audit(self, inferred: Inferred) -> None:
        """An audit that is due cannot be asked: the next price of this setting is not inferred."""
        self._learner.owe_audit(inferred)

    async def ticket(self, question: CanonicalRequest) -> Ticket | None:
        """What is needed to learn from upstream's answer to a question. None if it is not learned from.

        Call it before upstream is asked.
        """
        if question.verdict is None:
            config = self._live.config
            if config.learn == "off":
                return None
            question.verdict = await self._learner.look_up(question, config.never_learn)
        return question.verdict.ticket

    def learn(self, ticket: Ticket, question: CanonicalRequest, price: Price, *, is_audit: bool) -> None:
        """Learns from upstream's answer to a question, in the background. `is_audit`: it was asked to audit."""
        self._lessons.start(str(next(self._sequence)), lambda: self._learn(ticket, question, price, is_audit=is_audit))

    async def drop_prices(self, account: str) -> None:
        """Drops all learned prices of an account, because it was repriced."""
        with suppress(StoreUnavailable):  # they are dropped by the first answer that does not agree
            await self._learner.drop_prices(account)

    async def finish(self, timeout_s: float) -> None:
        """Waits until running lessons are stored, at most `timeout_s`."""
        await self._lessons.drain(timeout_s)
        await self._learner.close()

    async def _learn(self, ticket: Ticket, question: CanonicalRequest, price: Price, *, is_audit: bool) -> None:
        try:
            observed = await self._learner.observe(ticket, price, team=question.team, is_audit=is_audit)
        except StoreUnavailable:
            return
        facts = {"account": question.account, "scope": observed.scope, "setting": observed.setting, "key": question.key}
        if observed.old is not None and observed.effect is not Effect.AGREED:
            facts |= {"old": observed.old.estimated.decode(), "new": price.estimated.decode()}
        match observed.effect:
            case Effect.AGREED if is_audit:
                self._count_audit(question.account, "same")
            case Effect.DOUBT:
                event(log, logging.DEBUG, "a learned price is in doubt", facts)
            case Effect.LIST_MOVED:
                await self._list_moved(question, observed.old, price, facts)
        if observed.contradiction is not None:
            self._contradicted(observed.contradiction, facts)

    async def _list_moved(
        self, question: CanonicalRequest, old: Price | None, price: Price, facts: dict[str, str]
    ) -> None:
        """A doubt was resolved: prices have changed.

        Only with `use` that is a price change and counts towards repricing, which makes exact prices stale: `observe`
        changes no answer, and nobody has decided yet that what it learns is right.
        """
        self._count_audit(question.account, "list-moved")
        is_used = self._live.config.learn == "use"
        level = logging.WARNING if is_used else logging.INFO
        event(log, level, "price list changed: learned prices are asked again", facts)
        if is_used and old is not None:
            changed = {"account": question.account, "model": question.model, "key": question.key}
            self._price_changes.record("doubt", **changed, old=old.estimated, new=price.estimated)
            with suppress(StoreUnavailable):
                if await self._accounts.record_price_change(question.account, question.key):
                    event(log, logging.WARNING, "price list changed: older prices are stale", facts)

    def _contradicted(self, contradiction: Contradiction, facts: dict[str, str]) -> None:
        """A left-out member decides prices. Nobody was told a wrong price if there is no suspect answer."""
        self._count_audit(facts["account"], "contradicted")
        self._metrics.suspect_answers.labels(facts["account"]).inc(contradiction.suspects)
        level = logging.ERROR if contradiction.suspects else logging.INFO
        span = {"since_ms": contradiction.since_ms, "until_ms": contradiction.until_ms}
        event(log, level, "inferred prices contradicted", {**facts, "suspect_answers": contradiction.suspects, **span})

    def _count_audit(self, account: str, result: str) -> None:
        self._metrics.inference_audits.labels(account, result).inc()
