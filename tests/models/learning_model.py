"""A small model of what the scripts learn: one account, its scopes and settings, written from the rules alone.

Bodies have four leaves: `model`, which makes the scope, `note`, `quality` and `seed`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count

LEARN_FROM, TTL_MS = 2, 20_000
VALUES, SHARE, BODIES, REACH, FACTOR, SCOPES, SETTINGS, DIGESTS = 3, 0.5, 3, 2, 4, 4, 5, 6
LEAVES = ("model", "note", "quality", "seed")

Key = tuple[object, ...]
Range = tuple[int, int]


@dataclass(frozen=True)
class Body:
    model: str
    note: str
    quality: str
    seed: int

    def value(self, leaf: str) -> str | int:
        value: str | int = getattr(self, leaf)
        return value


def is_sentinel(value: str | int) -> bool:
    return value in ("", 0, -1)


def class_of(value: str | int) -> object:
    if is_sentinel(value):
        return value
    return "text" if isinstance(value, str) else ("number", value > 0)


def measure(value: str | int) -> int:
    return len(value) if isinstance(value, str) else value


def measures(body: Body, left_out: frozenset[str]) -> dict[str, int]:
    values = {leaf: body.value(leaf) for leaf in left_out}
    return {leaf: measure(value) for leaf, value in values.items() if not is_sentinel(value)}


def setting_of(body: Body, left_out: frozenset[str]) -> Key:
    return tuple(class_of(body.value(leaf)) if leaf in left_out else body.value(leaf) for leaf in LEAVES)


def widened(ranges: dict[str, Range], added: dict[str, int]) -> dict[str, Range]:
    found = dict(ranges)
    for leaf, value in added.items():
        low, high = found.get(leaf, (value, value))
        found[leaf] = min(low, value), max(high, value)
    return found


@dataclass
class Memory:
    """Counts distinct values, with a memory that forgets all when it is full."""

    total: int = 0
    distinct: int = 0
    known: set[object] = field(default_factory=set)

    def add(self, value: object) -> bool:
        """Returns whether the value was known."""
        self.total += 1
        if value in self.known:
            return True
        self.distinct += 1
        self.known.add(value)
        if len(self.known) >= DIGESTS:
            self.total, self.distinct, self.known = self.total // 2, self.distinct // 2, set()
        return False


@dataclass
class Setting:
    epoch: int
    since: int
    at: int
    answer: int | None = None
    bodies: list[Body] = field(default_factory=list)
    reach: dict[str, Range] = field(default_factory=dict)
    doubt_at: int | None = None
    before: dict[str, Range] = field(default_factory=dict)
    """The reach before a doubt."""


@dataclass(frozen=True)
class Answer:
    """An answer of upstream. epoch: of the account when it was asked. fresh: an id that was not used yet."""

    body: Body
    price: int
    asked_at: int
    epoch: int | None
    now: int
    team: str
    fresh: int


@dataclass
class Doubt:
    at: int
    until: int
    epoch: int
    answering: bool


@dataclass
class Scope:
    proof: int | None
    team: str
    left_out: frozenset[str] = frozenset()
    ranges: dict[str, Range] = field(default_factory=dict)
    tests: int = 0
    factor: int = 1
    doubt: Doubt | None = None
    asked: int = 0
    list_moves: int = 0
    contradictions: int = 0
    settings: dict[Key, Setting] = field(default_factory=dict)
    count: int = 0
    """Of the settings; those that were purged before anything was known are not counted."""
    bodies: Memory = field(default_factory=Memory)
    leaves: dict[str, Memory] = field(default_factory=lambda: {leaf: Memory() for leaf in LEAVES})

    def needed(self) -> int:
        return LEARN_FROM * self.factor

    def make_room(self) -> None:
        """For one more setting. The quarter with the oldest answers goes."""
        self.count += 1
        if self.count > SETTINGS:
            oldest = sorted(self.settings, key=lambda other: self.settings[other].at)
            for other in oldest[: -(-len(oldest) // 4)]:
                del self.settings[other]
            self.count = len(self.settings) + 1

    def is_inside(self, body: Body, setting: Setting) -> bool:
        before = setting.before if self.is_marked(setting) else {}
        for leaf, value in measures(body, self.left_out).items():
            low, high = self.ranges.get(leaf, (1, 0))
            own = (*setting.reach.get(leaf, (0,)), *before.get(leaf, (0,)))
            if not low <= value <= high or abs(value) > REACH * max(map(abs, own)):
                return False
        return True

    def is_marked(self, setting: Setting) -> bool:
        """Whether the setting's next bodies resolve the scope's doubt."""
        return self.doubt is not None and setting.doubt_at == self.doubt.at


@dataclass
class Account:
    """epoch, proof: ids; None if the account is unknown. listed: when each scope was used last."""

    ids: Iterator[int] = field(default_factory=count)
    epoch: int | None = None
    proof: int | None = None
    doubts: dict[str, int] = field(default_factory=dict)
    listed: dict[str, tuple[int, str]] = field(default_factory=dict)
    scopes: dict[str, Scope] = field(default_factory=dict)

    def drop_prices(self) -> None:
        self.epoch, self.doubts = next(self.ids), {}
        self.proof = self.epoch if self.proof is None else self.proof

    def drop_setting(self, body: Body, now: int) -> None:
        scope = self.scopes.get(body.model)
        if scope is not None and self.epoch is not None:
            key = setting_of(body, scope.left_out)
            scope.settings[key] = Setting(self.epoch, now + 1, now)

    def forget(self, model: str) -> None:
        self.doubts.pop(model, None)
        self.listed.pop(model, None)
        self.scopes.pop(model, None)

    def evict(self) -> None:
        """The store loses the account's own key."""
        self.epoch, self.proof, self.doubts, self.listed = None, None, {}, {}

    def state(self, model: str) -> str:
        scope = self.scopes[model]
        if self.doubts or (scope.doubt is not None and scope.doubt.epoch == self.epoch):
            return "in doubt"
        if self.tests(scope) >= scope.needed():
            return "answering"
        return "contradicted" if scope.contradictions else "observing"

    def tests(self, scope: Scope) -> int:
        return scope.tests if scope.proof == self.proof else 0

    def verdict(self, body: Body) -> int | str | None:
        """The price that is inferred, or the reason for none."""
        scope = self.scopes.get(body.model)
        if scope is None or self.epoch is None:
            return "new-scope"
        state = self.state(body.model)
        if state != "answering":
            return "in-doubt" if state == "in doubt" else "too-few-tests"
        setting = scope.settings.get(setting_of(body, scope.left_out))
        if setting is None or setting.epoch != self.epoch or len(setting.bodies) < BODIES:
            return "new-setting"
        return setting.answer if scope.is_inside(body, setting) else "outside-range"

    def observe(self, answer: Answer) -> str:
        """What an answer does; with `!` after it if the scope's doubt had expired."""
        if answer.epoch != self.epoch:
            return "ignored"
        body = answer.body
        self.epoch = answer.fresh if self.epoch is None else self.epoch
        self.proof = answer.fresh if self.proof is None else self.proof
        scope = self.scopes.get(body.model) or Scope(self.proof, answer.team)
        expired = self._expire(body.model, scope, answer)
        if scope.proof != self.proof:
            scope.proof, scope.tests = self.proof, 0
        effect = self._judge(answer, scope, known=self._count(body, scope))
        scope.asked += 1
        if body.model not in self.listed:
            self._make_room(answer.team)
        self.scopes[body.model] = scope
        self.listed[body.model] = answer.now, scope.team
        return effect + "!" * expired

    def _expire(self, model: str, scope: Scope, answer: Answer) -> bool:
        for other, until in list(self.doubts.items()):
            if until <= answer.now and (other != model or scope.doubt is None):
                self.proof = answer.fresh
                del self.doubts[other]
        if scope.doubt is not None and scope.doubt.epoch != self.epoch:
            scope.doubt = None
        if scope.doubt is None or scope.doubt.until > answer.now:
            return False
        scope.doubt.answering = model in self.doubts
        self._contradict(model, scope, answer)
        return True

    def _contradict(self, model: str, scope: Scope, answer: Answer) -> None:
        assert scope.doubt is not None
        scope.tests, scope.factor = 0, min(FACTOR, 2 * scope.factor)
        scope.contradictions += 1
        if scope.doubt.answering:
            self.proof = answer.fresh
            self.doubts.pop(model, None)
        scope.proof, scope.doubt = self.proof, None

    def _count(self, body: Body, scope: Scope) -> bool:
        """Counts the leaves' values, and decides which leaves are left out. Returns whether the body was known."""
        known = scope.bodies.add(body)
        left_out = set()
        for leaf in LEAVES:
            value, memory = body.value(leaf), scope.leaves[leaf]
            is_left = leaf in scope.left_out
            if not known and not is_sentinel(value):
                memory.add(value)
                if is_left:
                    is_left = memory.distinct >= SHARE / 2 * memory.total
                else:
                    is_left = memory.distinct >= VALUES and memory.distinct > SHARE * memory.total
            left_out |= {leaf} if is_left else set()
        if left_out != scope.left_out:
            scope.factor = 1 if scope.left_out - left_out else scope.factor
            if scope.doubt is not None:
                self.doubts.pop(body.model, None)
            scope.left_out, scope.doubt = frozenset(left_out), None
            scope.ranges, scope.tests, scope.settings, scope.count = {}, 0, {}, 0
        return known

    def _judge(self, answer: Answer, scope: Scope, *, known: bool) -> str:
        assert self.epoch is not None
        body, now = answer.body, answer.now
        key, own = setting_of(body, scope.left_out), measures(body, scope.left_out)
        setting = scope.settings.get(key)
        is_new = setting is None
        if setting is None or setting.epoch != self.epoch:
            setting = Setting(self.epoch, 0, now)
        if answer.asked_at < setting.since:
            return "ignored"
        inside = bool(setting.bodies) and scope.is_inside(body, setting)
        is_marked = scope.is_marked(setting)
        if setting.answer == answer.price and setting.bodies:
            scope.settings[key] = replace(setting, at=now)
            return self._agree(answer, scope, scope.settings[key], is_test=inside and not known, is_marked=is_marked)
        if is_new:
            scope.make_room()
        if inside or (len(setting.bodies) < BODIES and not is_marked):
            scope.settings[key] = Setting(self.epoch, setting.since, now, answer.price, [body], widened({}, own))
        if not inside:
            return "outside" if setting.bodies else "new"
        scope.settings[key].since = now
        if is_marked:
            self._contradict(body.model, scope, answer)
            return "contradicted"
        scope.settings[key].before = setting.reach
        scope.settings[key].doubt_at = self._doubt(body.model, scope, now)
        return "doubt"

    def _doubt(self, model: str, scope: Scope, now: int) -> int:
        assert self.epoch is not None
        if scope.doubt is None:
            answering = scope.tests >= scope.needed()
            scope.doubt = Doubt(now, now + TTL_MS, self.epoch, answering)
            if answering:
                self.doubts[model] = scope.doubt.until
        return scope.doubt.at

    def _agree(self, answer: Answer, scope: Scope, setting: Setting, *, is_test: bool, is_marked: bool) -> str:
        body = answer.body
        if body in setting.bodies:
            return "agreed"
        if is_test and scope.doubt is None:
            scope.tests += 1
        own = measures(body, scope.left_out)
        for leaf, (low, high) in setting.reach.items():
            scope.ranges = widened(widened(scope.ranges, {leaf: low}), {leaf: high})
        scope.ranges, setting.reach = widened(scope.ranges, own), widened(setting.reach, own)
        setting.bodies = [*setting.bodies, body][:BODIES]
        if not is_marked or len(setting.bodies) < BODIES:
            return "agreed"
        self.epoch, self.doubts = answer.fresh, {}
        setting.epoch, setting.doubt_at, scope.doubt = answer.fresh, None, None
        scope.list_moves += 1
        return "list-moved"

    def _make_room(self, team: str) -> None:
        by_age = sorted(self.listed, key=lambda model: self.listed[model])
        of_team = [model for model in by_age if self.listed[model][1] == team]
        if len(of_team) >= SCOPES // 2:
            self.forget_evicted(of_team[0])
        elif len(by_age) >= SCOPES:
            self.forget_evicted(by_age[0])

    def forget_evicted(self, model: str) -> None:
        """The scope makes room. Its doubt stays: it expires."""
        del self.listed[model]
        self.scopes.pop(model, None)
