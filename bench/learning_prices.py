"""Bodies and price functions for the replay of learning: what clients ask, and what an upstream could charge for it."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Item = dict[str, Any]
MakeItem = Callable[[random.Random, str], Item]
PriceOf = Callable[[Item], int]

_WORDS = ("portrait", "of", "a", "man", "eye", "contact", "neon", "rain", "street", "in", "the", "style", "oil", "4k")
STATIC = "static"
_ASPECTS = ("1:1", "2:3", "3:2", "4:5", "16:9")


def prompt(chance: random.Random, shortest: int = 20, longest: int = 400) -> str:
    """A text of words, of a random length."""
    length = chance.randint(shortest, longest)
    text = " ".join(chance.choice(_WORDS) for _ in range(length // 3 + 1))
    return f"{chance.randrange(10**6)} {text}"[:length]


def plain(chance: random.Random, _team: str = "design") -> Item:
    """A body of one of 20 settings, with a new prompt and seed."""
    return {
        "aspect_ratio": chance.choice(_ASPECTS),
        "batch_size": chance.choice((1, 2)),
        "cfg_scale": 7,
        "model": "JuggernautXL",
        "prompt": {"negative": "nsfw, deformed", "positive": prompt(chance)},
        "quality": chance.choice(("Regular", "Plus")),
        "sampler": "DPM++ 2M Karras",
        "seed": chance.randrange(1, 2**32),
        "steps": 20,
    }


def list_price(item: Item) -> int:
    """Thousandths of a credit, by the members that make the 20 settings."""
    aspect = 1 + _ASPECTS.index(item["aspect_ratio"])
    return 1000 * int(item["batch_size"]) * (3 if item["quality"] == "Plus" else 2) + 100 * aspect


@dataclass(frozen=True, slots=True)
class Scenario:
    """price: before the change. changed: from then on, if there is one. moves: the change is a new price list."""

    name: str
    make: MakeItem = plain
    price: PriceOf = list_price
    changed: PriceOf | None = None
    moves: bool = False


def _with(**members: Callable[[random.Random], Any]) -> MakeItem:
    def make(chance: random.Random, team: str) -> Item:
        return plain(chance, team) | {name: draw(chance) for name, draw in members.items()}

    return make


def _team_prompts(chance: random.Random, team: str) -> Item:
    item = plain(chance, team)
    short = team == "marketing"
    return item | {"prompt": {"positive": prompt(chance, 5, 30) if short else prompt(chance, 80, 400)}}


def _loras(chance: random.Random, team: str) -> Item:
    weights = [round(chance.uniform(0.1, 1), 2) for _ in range(chance.randint(0, 4))]
    return plain(chance, team) | {"loras": [{"name": f"lora{n}", "weight": weight} for n, weight in enumerate(weights)]}


def _assets(chance: random.Random, _team: str) -> Item:
    asset = f"ast_{int(chance.paretovariate(0.8)) % 500}"
    return {
        "video_anyone": {"media_id": asset, "prompt": prompt(chance), "duration": 5},
        "seed": chance.randrange(10**9),
    }


def _asset_price(item: Item) -> int:
    return 1000 * (1 + int(item["video_anyone"]["media_id"][4:]) % 7)


def _thrice() -> MakeItem:
    waiting: list[str] = []

    def make(chance: random.Random, team: str) -> Item:
        if len(waiting) < 300:
            waiting.extend([prompt(chance)] * 3)
            chance.shuffle(waiting)
        return plain(chance, team) | {"prompt": {"positive": waiting.pop()}}

    return make


def _script(chance: random.Random, _team: str) -> Item:
    return {
        "narrator": {"script": prompt(chance, 10, 2000), "voice": chance.choice(("Rachel", "Adam"))},
        "seed": chance.randrange(10**9),
    }


def _optional(chance: random.Random, team: str) -> Item:
    item = plain(chance, team)
    for number in range(8):
        if chance.random() < 0.5:
            item[f"option_{number}"] = True
    return item


def _text(item: Item) -> str:
    return str(item["prompt"]["positive"])


def _plus(surcharge: Callable[[Item], int], base: PriceOf = list_price) -> PriceOf:
    return lambda item: base(item) + surcharge(item)


def _scenarios() -> list[Scenario]:
    seed_minus_one = _with(seed=lambda chance: -1 if chance.random() < 0.1 else chance.randrange(1, 2**32))
    models = _with(model=lambda chance: chance.choice(("Flux", "JuggernautXL", "RealVis")))
    ultra = _with(quality=lambda chance: "Ultra" if chance.random() < 0.005 else chance.choice(("Regular", "Plus")))
    steps = _with(
        steps=lambda chance: chance.randrange(15, 35),
        batch_size=lambda _: 1,
        quality=lambda _: "Plus",
        aspect_ratio=lambda _: "1:1",
    )
    return [
        Scenario(STATIC),
        Scenario("prompts longer than 200 cost more", price=_plus(lambda item: 500 * (len(_text(item)) > 200))),
        Scenario("prompts longer than 390 cost more", price=_plus(lambda item: 500 * (len(_text(item)) > 390))),
        Scenario("by each 50 characters of a prompt", price=_plus(lambda item: 10 * (len(_text(item)) // 50))),
        Scenario("by length of a script", _script, lambda item: 100 * (1 + len(item["narrator"]["script"]) // 500)),
        Scenario("seed -1 costs more", seed_minus_one, _plus(lambda item: 500 * (item["seed"] == -1))),
        Scenario(
            "for one model, by prompt",
            models,
            _plus(lambda item: 500 * (item["model"] == "Flux" and len(_text(item)) > 200)),
        ),
        Scenario("a second team's short prompts", _team_prompts, _plus(lambda item: -500 * (len(_text(item)) < 40))),
        Scenario("LoRAs, from the third on", _loras, _plus(lambda item: 700 * max(0, len(item["loras"]) - 2))),
        Scenario("assets whose length decides", _assets, _asset_price),
        Scenario("a rare value costs more", ultra, _plus(lambda item: 5000 * (item["quality"] == "Ultra"))),
        Scenario("each prompt three times", _thrice()),
        Scenario("20 steps, each its price", steps, _plus(lambda item: 10 * int(item["steps"]))),
        Scenario("eight optional members", _optional),
        Scenario("odd seeds begin to cost", changed=_plus(lambda item: 500 * (item["seed"] % 2))),
        Scenario("1 of 10 seeds begins to cost", changed=_plus(lambda item: 500 * (item["seed"] % 10 == 0))),
        Scenario("prompts over 200 begin to cost", changed=_plus(lambda item: 500 * (len(_text(item)) > 200))),
        Scenario("the list x 1.1", changed=lambda item: list_price(item) * 11 // 10, moves=True),
        Scenario(
            "the list x 1.1, by steps",
            steps,
            _plus(lambda item: 10 * int(item["steps"])),
            changed=lambda item: (list_price(item) + 10 * int(item["steps"])) * 11 // 10,
            moves=True,
        ),
    ]


SCENARIOS: Mapping[str, Scenario] = {scenario.name: scenario for scenario in _scenarios()}
