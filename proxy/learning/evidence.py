"""The evidence of a scope: decodes what the store has, and derives the state and error bound that reports show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from proxy.cache.prices import Price
from proxy.learning.leaves import LEFT_OUT

CONFIDENCE = 0.95


class State(StrEnum):
    OBSERVING = "observing"
    ANSWERING = "answering"
    IN_DOUBT = "in doubt"
    CONTRADICTED = "contradicted"
    """Observing again, after a contradiction."""


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Inferred answers that may have been wrong.

    since_ms: of the last test that agreed. until_ms: of the contradiction. Unix time, on the store's clock.
    suspects: how many prices were inferred and answered in between.
    """

    since_ms: int
    until_ms: int
    suspects: int


@dataclass(frozen=True, slots=True)
class Scope:
    """What was learned in a scope.

    items: for each item of the body the mode that wins, with the name of a model or style.
    counting, left_out: paths of the leaves whose value counts, and of those that only count with their class.
    tests: without a contradiction. needed: how many it takes to infer.
    asked: answers of upstream that were learned from. answered: prices that were inferred and answered.
    right, wrong: in observe mode, prices that would have been answered.
    team: the one that brought the scope. used_at_ms: when upstream was last asked.
    """

    id: str
    items: tuple[str, ...]
    counting: tuple[str, ...]
    left_out: tuple[str, ...]
    state: State
    tests: int
    needed: int
    settings: int
    asked: int
    answered: int
    right: int
    wrong: int
    audits: int
    list_moves: int
    contradictions: int
    last_contradiction: Contradiction | None
    team: str
    used_at_ms: int

    @property
    def bound(self) -> float:
        """With 95 % confidence, fewer than this share of bodies cost otherwise; 1.0 if there was no test."""
        return 1.0 if self.tests == 0 else 1 - (1 - CONFIDENCE) ** (1 / self.tests)


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting's answer.

    bodies: how many distinct bodies agree, counted up to 3.
    at_ms: of the newest agreeing answer.
    reach: the smallest and largest measure of its own bodies.
    """

    price: Price
    bodies: int
    at_ms: int
    reach: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Evidence:
    """A scope's evidence, with what its account knows.

    epoch: of the account's prices; empty if nothing is known about the account.
    left: a character for each leaf, `LEFT_OUT` if it is left out. ranges: the smallest and largest of each measure.
    in_doubt: something in the scope, or in the account, is in doubt.
    """

    epoch: str
    left: str
    ranges: Mapping[str, Sequence[str]]
    in_doubt: bool
    scope: Scope | None


def decode_evidence(scope_id: str, reply: Sequence[Any], *, learn_from: int) -> Evidence:
    """Decodes a reply of `learned_get.lua`, less the setting."""
    epoch, proof, doubts, entry, head_text, members_text, *counts = reply[:9]
    if epoch is None or head_text is None or members_text is None:
        return Evidence(_text(epoch), "", {}, in_doubt=bool(doubts), scope=None)
    head, members = orjson.loads(head_text), orjson.loads(members_text)
    doubt = head.get("doubt")
    in_doubt = bool(doubts) or (doubt is not None and doubt["epoch"] == _text(epoch))
    tests = head["tests"] if head["proof"] == _text(proof) else 0
    needed = learn_from * head["factor"]
    marked = list(zip(members["paths"], head["left"], strict=True))
    used_at_ms, _, _ = (entry or b"0 ").partition(b" ")
    answered, right, wrong = (int(count or 0) for count in counts)
    scope = Scope(
        scope_id,
        tuple(members["items"]),
        counting=tuple(path for path, mark in marked if mark != LEFT_OUT),
        left_out=tuple(path for path, mark in marked if mark == LEFT_OUT),
        state=_state(in_doubt=in_doubt, proven=tests >= needed, contradicted=head["contradictions"] > 0),
        tests=tests,
        needed=needed,
        settings=head["settings"],
        asked=head["asked"],
        answered=answered,
        right=right,
        wrong=wrong,
        audits=head["audits"],
        list_moves=head["list_moves"],
        contradictions=head["contradictions"],
        last_contradiction=contradiction_of(head.get("last")),
        team=head["team"],
        used_at_ms=int(used_at_ms),
    )
    return Evidence(_text(epoch), head["left"], head["ranges"], in_doubt=in_doubt, scope=scope)


def decode_setting(text: bytes | None, epoch: str) -> Setting | None:
    """Decodes a setting; None if it has no price, or one of an older epoch."""
    if text is None:
        return None
    at_ms, _, fields = text.partition(b" ")
    setting = orjson.loads(fields)
    if setting["epoch"] != epoch or not setting["bodies"]:
        return None
    price = Price(setting["estimated"].encode(), setting["rest"].encode())
    return Setting(price, len(setting["bodies"]), int(at_ms), setting["reach"])


def contradiction_of(fields: Mapping[str, int] | None) -> Contradiction | None:
    return None if fields is None else Contradiction(fields["since"], fields["until"], fields["suspects"])


def _state(*, in_doubt: bool, proven: bool, contradicted: bool) -> State:
    if in_doubt:
        return State.IN_DOUBT
    if proven:
        return State.ANSWERING
    return State.CONTRADICTED if contradicted else State.OBSERVING


def _text(value: bytes | None) -> str:
    return "" if value is None else value.decode()
