"""The demo's live traffic: generates the requests of three teams, and counts the answers.

* The popularity of bodies follows Zipf's law: few are sent often, most seldom; some are sent for the first time.
* The same body is rarely sent twice in the same bytes: clients differ in member order, white space, numbers, escapes.
* The requests carry the query string `QUERY`, which is passed upstream. The simulated RenderNet only injects faults
  into requests with it, never into those that users paste.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import accumulate
from random import Random
from typing import Any, Final, TypeAlias

import httpx2

from proxy.upstream.address import ESTIMATE_PATH

Body: TypeAlias = list[dict[str, Any]]

QUERY: Final = "client=demo-traffic"

ARRIVALS_PER_S: Final = 5.0
"""Mean rate; an arrival is one request, or a burst of equal ones."""

FRESH_SHARE: Final = 0.15
BURST_SHARE: Final = 0.06
BURST_LEAST, BURST_MOST = 3, 7
TIMEOUT_S: Final = 10.0

_ESCAPED_SHARE: Final = 0.05
_LARGEST_EXACT_INTEGER: Final = 2**53
_SPACES: Final = ("", "", "", " ", "  ", "\n", "\t")

_IMAGES: Final = (
    ("iced tea on a sunlit window sill", "JuggernautXL", "Plus", 20, 1),
    ("leather boots on wet cobblestones", "JuggernautXL", "Plus", 30, 2),
    ("a bakery counter at seven in the morning", "Flux", "Plus", 20, 1),
    ("wool scarf, flat lay, beige background", "JuggernautXL", "Regular", 20, 4),
    ("trail runner above a sea of fog", "RealVisXL_V3.0_Turbo", "Plus", 15, 2),
    ("reading nook with a green armchair", "JuggernautXL", "Plus", 25, 1),
    ("crème brûlée, macro, hard light", "Flux", "Regular", 20, 2),
    ("electric bicycle in front of a brick wall", "JuggernautXL", "Plus", 20, 3),
    ("ceramic lamp in the style of the 1960s", "JuggernautXL", "Regular", 20, 1),
    ("two friends repairing a sailing boat", "Flux", "Plus", 30, 1),
    ("potted monstera, studio, soft shadow", "RealVisXL_V3.0_Turbo", "Regular", 10, 4),
    ("packaging for oat biscuits, front view", "JuggernautXL", "Plus", 40, 1),
    ("winter market, lights out of focus", "JuggernautXL", "Plus", 20, 1),
    ("smart watch on a climber's wrist", "Flux", "Plus", 25, 2),
    ("rain on the windows of a night train", "RealVisXL_V3.0_Turbo", "Plus", 20, 1),
    ("hands shaping clay on a wheel", "JuggernautXL", "Regular", 30, 2),
    ("空の青いカフェテラス", "Flux", "Regular", 20, 1),
    ("sneaker exploded into its parts", "JuggernautXL", "Plus", 50, 1),
    ("grandmother teaching chess in a park", "JuggernautXL", "Plus", 20, 2),
    ("poster for an open-air cinema", "Flux", "Plus", 20, 4),
)
"""Prompt, model, quality, steps, batch size."""

_STYLED: Final = (
    ("harbour cranes before a storm", "Cinematic", 1),
    ("portrait of a beekeeper", "Bokeh", 2),
    ("market hall, long exposure", "Black & White", 1),
    ("sunflowers along a railway", "Analog Film", 4),
    ("spice jars on a wooden shelf", "Raw Photo", 1),
    ("empty swimming pool, noon", "Realistic", 2),
)
"""Prompt, style, batch size."""

_REPLACED: Final = (
    ("ast_Bq03xWm1Zt", "grey sofa", "yellow sofa"),
    ("ast_Hd72LcR9pe", "paper cup", "glass with a straw"),
    ("ast_Vn58KsT4ya", "cloudy sky", "clear evening sky"),
)
_ENLARGED: Final = (("ast_Pz64GfQ8md", 2.0), ("ast_Jx19YuB5ok", 1.5), ("ast_Ec37RtN0wl", 4.0))
_NARRATED: Final = (
    ("ast_Ls81DhV6cq", "Three ways to fold a fitted sheet.", "Rachel"),
    ("ast_Tk45MjX2bn", "Our new opening hours begin on Monday.", "Adam"),
    ("ast_Wg90FpZ7ri", "What is in the box? Let us have a look together, piece by piece.", "Rachel"),
    ("ast_Ua26CsK3ve", "Grüße aus der Werkstatt: heute zeigen wir, wie eine Brille entsteht.", "Clara"),
)
_FILMED: Final = (
    ("ast_Ro53NbH1xu", "the camera circles the watch", 5),
    ("ast_Iy78QwD4gf", "waves roll in, slowly", 8),
    ("ast_Zm12TvE9hs", "she turns and smiles", 5),
    ("ast_Ck67XaP0jl", "steam rises from the cup", 10),
)


def _pool() -> Iterator[Body]:
    for prompt, model, quality, steps, batch_size in _IMAGES:
        picture = {"prompt": {"positive": prompt, "negative": "watermark, blurry"}, "model": model, "steps": steps}
        yield [{**picture, "quality": quality, "batch_size": batch_size, "aspect_ratio": "4:5", "cfg_scale": 7}]
    for prompt, style, batch_size in _STYLED:
        yield [{"style": style, "prompt": {"positive": prompt, "negative": ""}, "batch_size": batch_size}]
    for asset_id, find, replace in _REPLACED:
        yield [{"segment": {"asset_id": asset_id, "find": find, "replace": replace}}]
    for asset_id, factor in _ENLARGED:
        yield [{"true_touch": {"asset_id": asset_id, "enhance_strength": 0.35, "scale_factor": factor}}]
    for asset_id, script, voice in _NARRATED:
        yield [{"narrator": {"video_asset_id": asset_id, "script": script, "voice": voice}}]
    for media_id, prompt, duration in _FILMED:
        yield [{"video_anyone": {"media_id": media_id, "prompt": prompt, "duration": duration}}]


POOL: Final[Sequence[Body]] = tuple(_pool())
_POPULARITY: Final = tuple(accumulate(1 / rank for rank in range(1, len(POOL) + 1)))


def next_burst(random: Random) -> tuple[Body, int]:
    """The next body, and how often it is sent at once. A burst has a body that was not sent before."""
    [body] = random.choices(POOL, cum_weights=_POPULARITY)
    chance = random.random()
    if chance < BURST_SHARE:
        return _with_seed(body, random), random.randrange(BURST_LEAST, BURST_MOST)
    return (_with_seed(body, random) if chance < BURST_SHARE + FRESH_SHARE else body), 1


def _with_seed(body: Body, random: Random) -> Body:
    seed = random.randrange(2**48)
    return [{**item, "seed": seed} for item in body]


def respell(value: Any, random: Random) -> str:
    """The same JSON value in another spelling."""
    match value:
        case dict():
            members = random.sample(list(value.items()), len(value))
            spelled = (f"{_text(name, random)}{_space(random)}:{respell(member, random)}" for name, member in members)
            written = "{" + ",".join(spelled) + _space(random) + "}"
        case list():
            written = "[" + ",".join(respell(element, random) for element in value) + _space(random) + "]"
        case str():
            written = _text(value, random)
        case bool() | None:
            written = json.dumps(value)
        case _:
            written = _number(value, random)
    return _space(random) + written + _space(random)


def _text(text: str, random: Random) -> str:
    return f'"{"".join(_character(character, random) for character in text)}"'


def _character(character: str, random: Random) -> str:
    if random.random() < _ESCAPED_SHARE:
        units = character.encode("utf-16-be")
        return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
    return json.dumps(character, ensure_ascii=False)[1:-1]


def _number(number: float, random: Random) -> str:
    """`7` or `7.0`, where a double holds it exactly."""
    if number != int(number) or abs(number) > _LARGEST_EXACT_INTEGER:
        return repr(number)
    return random.choice((str(int(number)), f"{int(number)}.0"))


def _space(random: Random) -> str:
    return random.choice(_SPACES)


@dataclass(slots=True)
class TrafficTotals:
    """Counts answers: those with a price as hit, miss or collapsed, the others by their error.

    `balance` is the newest that an answer has shown.
    """

    priced: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    estimated: Decimal = Decimal()
    balance: float | None = None

    def record(self, status: int, cache_status: str, answer: object) -> None:
        """Counts one response by its status, its `Cache-Status` header (RFC 9211) and its body's JSON value."""
        match answer:
            case {"data": {"estimated": int() | float() as estimated, "balance": int() | float() as balance}}:
                self.estimated += Decimal(str(estimated))
                self.balance = balance
                parameters = {parameter.strip() for parameter in cache_status.split(";")}
                self.priced[next((kind for kind in ("hit", "collapsed") if kind in parameters), "miss")] += 1
            case {"error": {"code": str(code)}}:
                self.failed["unpriced" if status == httpx2.codes.OK else code] += 1
            case _:
                self.failed[f"status {status}"] += 1

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.failed.items()))
        failed = f"failed {self.failed.total()}" + (f" ({kinds})" if kinds else "")
        hits, misses, collapsed = (self.priced[kind] for kind in ("hit", "miss", "collapsed"))
        balance = "unknown" if self.balance is None else f"{self.balance:,}"
        return (
            f"requests {self.priced.total() + self.failed.total()}: hits {hits}, misses {misses}, "
            f"collapsed {collapsed}, {failed}; upstream calls saved {hits + collapsed}; "
            f"estimated credits {self.estimated:,.2f}; balance {balance}"
        )


class Traffic:
    """Sends requests to the gateway at `url` until cancelled, each with a random one of `tokens`."""

    def __init__(self, url: str, tokens: Sequence[str], totals: TrafficTotals, random: Random) -> None:
        self._url = f"{url}{ESTIMATE_PATH}?{QUERY}"
        self._tokens = tokens
        self._totals = totals
        self._random = random

    async def run(self) -> None:
        async with (
            httpx2.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client,
            asyncio.TaskGroup() as requests,
        ):
            while True:
                await asyncio.sleep(self._random.expovariate(ARRIVALS_PER_S))
                body, times = next_burst(self._random)
                for _ in range(times):
                    requests.create_task(self._send(client, body))

    async def _send(self, client: httpx2.AsyncClient, body: Body) -> None:
        headers = {"x-api-key": self._random.choice(self._tokens), "content-type": "application/json"}
        try:
            response = await client.post(self._url, content=respell(body, self._random).encode(), headers=headers)
            self._totals.record(response.status_code, response.headers.get("cache-status", ""), response.json())
        except httpx2.TransportError:
            self._totals.failed["no answer"] += 1
