"""What is asked: requests as the bytes that go over the wire, prepared before anything is measured.

A traffic is written into a file that both loads read, wrk's script and the bench's own. Its first line is either

* `listed <requests> <turns>`: then come the requests, each behind a line with its length, and the turns, one a line:
  which request is whose turn, counted from 1, over and over; or
* `counted <distinct>`: then come two pieces, each behind a line with its length, between which a number of twelve
  digits goes: another one for each request, or, where `distinct` is not 0, one of so many by chance.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

from gateway_fixture import PATH
from proxy.auth import token_of

ANSWER = b'{"data":{"estimated":5,"balance":20},"error":{}}'
"""Upstream's, and of the bare routes."""

FIRST_NUMBER = 10**11
"""Those drawn by chance begin here, those that are counted a good way behind."""

SEED = 7
ZIPF_EXPONENT = 1.05

TEAMS = ("design", "marketing", "sales")
UNKNOWN_TOKEN = token_of("u" * 32)

_EXAMPLE = {
    "aspect_ratio": "1:1",
    "batch_size": 1,
    "cfg_scale": 7,
    "character": {"character_id": "chr_01", "weight": 0.6, "enable_facelock": True, "mode": "balanced"},
    "control_net": {"asset_id": "ast_01", "control_mode": 0, "name": "Normal", "resize_mode": 0},
    "facelock": {"asset_id": "ast_01"},
    "loras": [{"name": "lora_name", "weight": 0.5}],
    "model": "JuggernautXL",
    "prompt": {"negative": "nsfw, deformed, extra limbs, bad anatomy", "positive": "a man looking into the camera"},
    "quality": "Plus",
    "sampler": "DPM++ 2M Karras",
    "seed": 1234,
    "steps": 20,
    "style": "Bokeh",
}
"""The image part of the example in RenderNet's documentation: some 520 bytes as JSON."""


_WORDS = "a portrait in soft light, seen from below, on film, with a little grain, "


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """`turns` are indices of `requests`, counted from 0."""

    requests: Sequence[bytes]
    turns: Sequence[int] = (0,)

    def sample(self, _: int) -> bytes:
        return self.requests[self.turns[0]]

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            file.write(b"listed %d %d\n" % (len(self.requests), len(self.turns)))
            file.writelines(_framed(self.requests))
            file.writelines(b"%d\n" % (turn + 1) for turn in self.turns)


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """`distinct` numbers by chance, or a new one each time."""

    before: bytes
    after: bytes
    distinct: int = 0

    def sample(self, number: int) -> bytes:
        return self.before + b"%d" % number + self.after

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            file.write(b"counted %d\n" % self.distinct)
            file.writelines(_framed((self.before, self.after)))


Traffic = Listed | Counted


def token(team: str) -> str:
    """The token of one of the bench's teams."""
    return token_of(team.replace("-", "").ljust(32, "x"))


def request(body: bytes, key: str) -> bytes:
    """An estimate's request as it goes over the wire."""
    lines = (
        f"POST {PATH} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"X-API-KEY: {key}",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def example(seed: int = 1234) -> bytes:
    """RenderNet's example."""
    return _json([{**_EXAMPLE, "seed": seed}])


def sized(size_bytes: int, seed: int = FIRST_NUMBER) -> bytes:
    """A body of one item and of this size, most of it prompt."""
    item = {"model": "Flux", "quality": "Plus", "seed": seed, "steps": 20, "prompt": {"positive": ""}}
    missing = size_bytes - len(_json([item]))
    item["prompt"] = {"positive": (_WORDS * (missing // len(_WORDS) + 1))[:missing]}
    return _json([item])


def items(count: int, seed: int = FIRST_NUMBER) -> bytes:
    """A body of so many small items."""
    return _json([{"model": "Flux", "quality": "Plus", "seed": seed + n, "steps": 20 + n} for n in range(count)])


def hot(key: str, body: bytes = b"") -> Listed:
    """One body, over and over."""
    return Listed((request(body or example(), key),))


def fresh(key: str, body: bytes = b"", *, distinct: int = 0) -> Counted:
    """A body with another seed each time. `body` must hold `FIRST_NUMBER` somewhere."""
    whole = request(body or example(FIRST_NUMBER), key)
    before, after = whole.split(b"%d" % FIRST_NUMBER, 1)
    return Counted(before, after, distinct)


def zipf(bodies: int, turns: int) -> Listed:
    """Three teams ask for `bodies` bodies, whose shares follow Zipf's law, in an order drawn by chance."""
    chance = Random(SEED)
    weights = list(accumulate((rank + 1) ** -ZIPF_EXPONENT for rank in range(bodies)))
    ranks = chance.choices(range(bodies), cum_weights=weights, k=turns)
    asked = [(rank, chance.choice(TEAMS)) for rank in ranks]
    places = {question: place for place, question in enumerate(dict.fromkeys(asked))}
    requests = [request(example(rank), token(team)) for rank, team in places]
    return Listed(requests, [places[question] for question in asked])


def once_each(traffic: Listed) -> Listed:
    """Every request of `traffic` in turn."""
    return Listed(traffic.requests, range(len(traffic.requests)))


def by_turns(teams: Sequence[str]) -> Listed:
    """The same question by each of these teams in turn."""
    return once_each(Listed([request(example(), token(team)) for team in teams]))


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _framed(pieces: Sequence[bytes]) -> Iterator[bytes]:
    return (b"%d\n%b" % (len(piece), piece) for piece in pieces)
