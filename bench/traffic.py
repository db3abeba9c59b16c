"""Traffic: requests as bytes on the wire, prepared before a measurement.

A traffic file is read by both load generators, wrk's script and the bench's own. Its first line is either

* `listed <requests> <turns>`: the requests follow, each after a line with its length, then the turns, one per line: the
  number of the request to send, counted from 1, repeated endlessly; or
* `counted <distinct>`: two pieces follow, each after a line with its length. Each request has a number of twelve digits
  between them: a new one, or, if `distinct` is not 0, a random one of that many.
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
"""The body of upstream's and the bare routes' answers."""

FIRST_NUMBER = 10**11
"""Random numbers start here, counted ones far above."""

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
"""The image part of the example in RenderNet's documentation, about 520 bytes of JSON."""


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
    """Requests with one of `distinct` random numbers, or with a new one each time."""

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
    """Returns the token of one of the bench's teams."""
    return token_of(team.replace("-", "").ljust(32, "x"))


def request(body: bytes, key: str) -> bytes:
    """Returns an estimate's request as bytes on the wire."""
    lines = (
        f"POST {PATH} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"X-API-KEY: {key}",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def example(seed: int = 1234) -> bytes:
    """Returns the body of RenderNet's documentation."""
    return _json([{**_EXAMPLE, "seed": seed}])


def sized(size_bytes: int, seed: int = FIRST_NUMBER) -> bytes:
    """Returns a body of this size with one item, most of it prompt."""
    item = {"model": "Flux", "quality": "Plus", "seed": seed, "steps": 20, "prompt": {"positive": ""}}
    missing = size_bytes - len(_json([item]))
    item["prompt"] = {"positive": (_WORDS * (missing // len(_WORDS) + 1))[:missing]}
    return _json([item])


def items(count: int, seed: int = FIRST_NUMBER) -> bytes:
    """Returns a body with this number of small items."""
    return _json([{"model": "Flux", "quality": "Plus", "seed": seed + n, "steps": 20 + n} for n in range(count)])


def hot(key: str, body: bytes = b"") -> Listed:
    """Returns traffic with one body only."""
    return Listed((request(body or example(), key),))


def fresh(key: str, body: bytes = b"", *, distinct: int = 0) -> Counted:
    """Returns traffic with a new seed in each body. `body` must contain `FIRST_NUMBER`."""
    whole = request(body or example(FIRST_NUMBER), key)
    before, after = whole.split(b"%d" % FIRST_NUMBER, 1)
    return Counted(before, after, distinct)


def zipf(bodies: int, turns: int) -> Listed:
    """Returns traffic of three teams for `bodies` bodies with Zipf-distributed shares, in random order."""
    chance = Random(SEED)
    weights = list(accumulate((rank + 1) ** -ZIPF_EXPONENT for rank in range(bodies)))
    ranks = chance.choices(range(bodies), cum_weights=weights, k=turns)
    drawn = [(rank, chance.choice(TEAMS)) for rank in ranks]
    indices = {question: index for index, question in enumerate(dict.fromkeys(drawn))}
    requests = [request(example(rank), token(team)) for rank, team in indices]
    return Listed(requests, [indices[question] for question in drawn])


def once_each(traffic: Listed) -> Listed:
    """Returns traffic that sends every request of `traffic` in turn."""
    return Listed(traffic.requests, range(len(traffic.requests)))


def by_turns(teams: Sequence[str]) -> Listed:
    """Returns traffic that sends the same body as each of these teams in turn."""
    return once_each(Listed([request(example(), token(team)) for team in teams]))


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _framed(pieces: Sequence[bytes]) -> Iterator[bytes]:
    return (b"%d\n%b" % (len(piece), piece) for piece in pieces)
