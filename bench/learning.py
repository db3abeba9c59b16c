"""What learned prices save and risk: replays against price functions, on one gateway and on a fleet.

Each replay asks questions with new prompts and seeds. `wrong` counts answers whose price was another than upstream's.
Time is simulated; the learner, its scripts and the store are real.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import redis

from bench.learning_prices import SCENARIOS, STATIC, Scenario
from bench.learning_replay import Plan, Result, replay
from bench.parts import Part, Say, Table, Target
from proxy.embedded.stores import EmbeddedStores

QUESTIONS = 10_000
"""Of the scenario in which prices are the same for all prompts and seeds."""

FEWER_QUESTIONS = 4_000
"""Of each other scenario."""

RUNS = 8
"""Of that scenario, and of those in which something changes. The others are replayed once on each fleet. The list moves
at another place in each run."""

FLEETS = {"one process": Plan(), "three gateways of two workers": Plan(processes=6)}
_HOW = (
    f"{QUESTIONS:,} questions a replay of {STATIC} prices, {FEWER_QUESTIONS:,} of the others, 5 a second; upstream "
    "answers in 0.1 to 0.3 s; learn_from 100, audit_one_in 25"
)
_COLUMNS = (
    "prices",
    "answered, after the first quarter",
    "upstream calls",
    "wrong, mean",
    "wrong, most",
    "list moves",
    "contradictions",
    "µs a look-up",
)


def run(say: Say) -> Part:
    with tempfile.TemporaryDirectory() as directory:
        stores = EmbeddedStores(Path(directory), ["price-book"])
        stores.start()
        try:
            with redis.Redis.from_url(stores.urls["price-book"]) as client:
                return _part(client, say)
        finally:
            stores.stop()


def _part(client: redis.Redis, say: Say) -> Part:
    found: dict[str, dict[str, list[Result]]] = {}
    for fleet, plan in FLEETS.items():
        found[fleet] = {}
        for name, scenario in SCENARIOS.items():
            say(f"{fleet}: {name}")
            found[fleet][name] = _replays(client, scenario, plan)
    return Part(
        name="learning",
        how=_HOW,
        tables=[Table(fleet, _COLUMNS, [_row(*each) for each in by_name.items()]) for fleet, by_name in found.items()],
        targets=_targets(list(found.values())),
        raw={
            fleet: {name: [_numbers(each) for each in results] for name, results in by_name.items()}
            for fleet, by_name in found.items()
        },
    )


def _replays(client: redis.Redis, scenario: Scenario, plan: Plan) -> list[Result]:
    is_first = scenario.name == STATIC
    runs = RUNS if is_first or scenario.changed is not None else 1
    moves = [(number + 0.5) / runs if scenario.moves else 0.5 for number in range(runs)]
    plan = replace(plan, questions=QUESTIONS if is_first else FEWER_QUESTIONS)
    return [replay(client, scenario, replace(plan, change_at=at), seed) for seed, at in enumerate(moves)]


def _row(name: str, results: Sequence[Result]) -> list[str]:
    return [
        name,
        f"{mean(each.late_answered / each.late_questions for each in results):.1%}",
        f"{mean(each.asked / each.questions for each in results):.1%}",
        f"{mean(each.wrong for each in results):.1f}",
        str(max(each.wrong for each in results)),
        f"{mean(each.list_moves for each in results):.1f}",
        f"{mean(each.contradictions for each in results):.1f}",
        f"{1e6 * mean(each.look_up_s / each.questions for each in results):.0f}",
    ]


def _numbers(result: Result) -> dict[str, float]:
    return {name: getattr(result, name) for name in result.__slots__ if name != "log"}


def _targets(fleets: Sequence[dict[str, list[Result]]]) -> list[Target]:
    static = [each for by_name in fleets for each in by_name[STATIC]]
    changing = [
        each
        for by_name in fleets
        for name, results in by_name.items()
        for each in results
        if SCENARIOS[name].changed is not None and not SCENARIOS[name].moves
    ]
    moving = [each for by_name in fleets for each in by_name["the list x 1.1"]]
    every = [each for by_name in fleets for results in by_name.values() for each in results]
    wrong = sorted(each.wrong for each in changing)
    return [
        Target(
            "static: answered after the first quarter", 0.95, min(e.late_answered / e.late_questions for e in static)
        ),
        Target("static: upstream calls", 0.15, max(e.asked / e.questions for e in static), at_least=False),
        Target(
            "wrong before anything changed", 0, sum(e.wrong_before_change for e in every), at_least=False, form=".0f"
        ),
        Target("a member begins to count: mean wrong", 25, mean(wrong), at_least=False, form=".1f"),
        Target("and in 95 of 100 replays", 75, wrong[int(0.95 * (len(wrong) - 1))], at_least=False, form=".0f"),
        Target("the list moves: contradictions", 0, sum(e.contradictions for e in moving), at_least=False, form=".0f"),
        Target("inferred in doubt, after 2 s", 0, sum(e.after_doubt for e in every), at_least=False, form=".0f"),
    ]
