"""Bodies in the shapes that public clients send, and other spellings of the same JSON value.

`BODIES` are small named cases. Two of them are the same question exactly if their `question` is the same; those
whose name begins alike differ in the one thing that the rest of the name says, and must stay apart.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Any


@dataclass(frozen=True, slots=True)
class Body:
    """A request body. `equals` names another case that is the same question in other words."""

    name: str
    items: list[dict[str, Any]]
    equals: str = ""

    @property
    def question(self) -> str:
        return self.equals or self.name

    @property
    def raw(self) -> bytes:
        return json.dumps(self.items).encode()


_IMAGE: dict[str, Any] = {
    "aspect_ratio": "2:3",
    "batch_size": 1,
    "cfg_scale": 7,
    "model": "JuggernautXL",
    "prompt": {"negative": "blurry, cropped, text", "positive": "watchmaker at her bench, window light"},
    "quality": "Plus",
    "sampler": "DPM++ 2M Karras",
    "seed": 4711,
    "steps": 20,
}

_EVERY_MODE: dict[str, Any] = {
    **_IMAGE,
    "character": {"character_id": "chr_k1", "weight": 0.6, "enable_facelock": True, "mode": "balanced"},
    "control_net": {"asset_id": "ast_k2", "control_mode": 0, "name": "Depth", "resize_mode": 0},
    "facelock": {"asset_id": "ast_k2"},
    "loras": [{"name": "ink_wash", "weight": 0.5}],
    "narrator": {
        "image_asset_id": "ast_k3",
        "video_asset_id": "ast_k4",
        "audio_asset_id": "ast_k5",
        "script": "Good morning from the harbour",
        "voice": "Rachel",
    },
    "segment": {"asset_id": "ast_k2", "find": "wool hat", "replace": "straw hat"},
    "style": "Bokeh",
    "style_detail": {"name": "Black & White", "base_model": "flux"},
    "true_touch": {"asset_id": "ast_k2", "enhance_strength": 0.5, "scale_factor": 1.5},
    "video_anyone": {"media_id": "ast_k2", "prompt": "slow pan, gulls pass", "duration": 5},
}

_LORAS: list[dict[str, Any]] = [
    {"name": "soft_light", "weight": 0.35},
    {"name": "rain", "weight": 1},
    {"name": "sharp", "weight": 0.8},
]
_STUDIO: dict[str, Any] = {
    "aspect_ratio": "3:5",
    "batch_size": 1,
    "cfg_scale": 5,
    "character": {"character_id": "chr_s7", "weight": 0.8, "mode": "strong"},
    "model": "RealVisXL_V3.0_Turbo",
    "prompt": {"negative": "lowres", "positive": "{Noor} passport photo, plain wall"},
    "sampler": "DPMSolverMultistepScheduler-Karras-SDE",
    "seed": -1,
    "style": "Cinematic",
    "style_detail": {"name": "Cinematic", "base_model": "flux"},
    "image_config": {"enhance_face": True, "enhance_non_face": True, "output_format": "webp", "output_quality": 100},
}
_FLUX: dict[str, Any] = {
    "aspect_ratio": "16:9",
    "batch_size": 1,
    "model": "Flux",
    "prompt": {"negative": "", "positive": "tram stop at dawn"},
}
_TOUCH: dict[str, Any] = {"true_touch": {"asset_id": "ast_t1", "enhance_strength": 0.25, "scale_factor": 2}}
_VIDEO: dict[str, Any] = {"video_anyone": {"media_id": "img_v1", "prompt": "the kite climbs", "duration": 5}}
_NEON: dict[str, Any] = {"aspect_ratio": "2:3", "batch_size": 1, "prompt": {"positive": "market", "negative": "N/A"}}
_RAW_PHOTO = {**_NEON, "style_detail": {"name": "Raw Photo", "base_model": "flux"}}
_FLUX_TOUCH = {**_NEON, "style_detail": {"name": "Flux TrueTouch", "base_model": "flux"}}


def _backwards(value: Any) -> Any:
    """`value` with the members of every object in reverse order."""
    match value:
        case dict():
            return {name: _backwards(value[name]) for name in reversed(value)}
        case list():
            return [_backwards(item) for item in value]
    return value


BODIES = (
    Body("every mode at once", [_EVERY_MODE]),
    Body("every mode at once, backwards", [_backwards(_EVERY_MODE)], equals="every mode at once"),
    Body("every mode at once, less the video", [{n: v for n, v in _EVERY_MODE.items() if n != "video_anyone"}]),
    Body("image", [_IMAGE]),
    Body("image, batch 1.0", [{**_IMAGE, "batch_size": 1.0}], equals="image"),
    Body("image, cfg 7.0 and steps 20.0", [{**_IMAGE, "cfg_scale": 7.0, "steps": 20.0}], equals="image"),
    Body("image, cfg 7.5", [{**_IMAGE, "cfg_scale": 7.5}]),
    Body("image, batch 2", [{**_IMAGE, "batch_size": 2}]),
    Body("image, batch '1'", [{**_IMAGE, "batch_size": "1"}]),
    Body("image, batch true", [{**_IMAGE, "batch_size": True}]),
    Body("image, seed 4712", [{**_IMAGE, "seed": 4712}]),
    Body("image, seed -1", [{**_IMAGE, "seed": -1}]),
    Body("image, seed of 15 digits", [{**_IMAGE, "seed": 724613509918273}]),
    Body("image, seed just above 2**53", [{**_IMAGE, "seed": 2**53 + 1}]),
    Body("image, seed 2**53", [{**_IMAGE, "seed": 2**53}]),
    Body("image, seed 2**64-1", [{**_IMAGE, "seed": 2**64 - 1}]),
    Body("image, seed 2**64-2", [{**_IMAGE, "seed": 2**64 - 2}]),
    Body("image, seed 0", [{**_IMAGE, "seed": 0}]),
    Body("image, seed -0.0", [{**_IMAGE, "seed": -0.0}], equals="image, seed 0"),
    Body("image, seed null", [{**_IMAGE, "seed": None}]),
    Body("image, no seed", [{n: v for n, v in _IMAGE.items() if n != "seed"}]),
    Body("image, facelock null", [{**_IMAGE, "facelock": None}]),
    Body("image, facelock object", [{**_IMAGE, "facelock": {"asset_id": "ast_f1"}}]),
    Body("image, facelock string", [{**_IMAGE, "facelock": "ast_f1"}]),
    Body("image, quality outside the list", [{**_IMAGE, "quality": "Standard"}]),
    Body("image, with a style too", [{**_IMAGE, "style": "Bokeh", "reference_image_id": "ast_r1"}]),
    Body("image, no loras", [{**_IMAGE, "loras": []}]),
    Body("image, three loras", [{**_IMAGE, "loras": _LORAS}]),
    Body("image, three loras the other way round", [{**_IMAGE, "loras": _LORAS[::-1]}]),
    Body("image, twice", [_IMAGE, _IMAGE]),
    Body("image, strings for numbers", [{**_IMAGE, "batch_size": "1", "cfg_scale": "7", "steps": "20"}]),
    Body("image, prompt positive first", [{**_IMAGE, "prompt": _backwards(_IMAGE["prompt"])}], equals="image"),
    Body("image, prompt composed", [{**_IMAGE, "prompt": {"positive": "caf\u00e9"}}]),
    Body("image, prompt decomposed", [{**_IMAGE, "prompt": {"positive": "cafe\u0301"}}]),
    Body("studio", [_STUDIO]),
    Body("studio, cfg 12 and png", [{**_STUDIO, "cfg_scale": 12, "image_config": {"output_format": "png"}}]),
    Body("studio, facelock 1", [{**_STUDIO, "character": {"character_id": "chr_s7", "enable_facelock": 1}}]),
    Body("studio, facelock true", [{**_STUDIO, "character": {"character_id": "chr_s7", "enable_facelock": True}}]),
    Body("flux", [_FLUX]),
    Body("flux, small letters", [{**_FLUX, "model": "flux"}]),
    Body("flux, Canny", [{**_FLUX, "control_net": {"asset_id": "ast_c1", "name": "Canny"}}]),
    Body("flux, character by mode only", [{**_FLUX, "character": {"character_id": "chr_c1", "mode": "balanced"}}]),
    Body("segment", [{"segment": _EVERY_MODE["segment"]}]),
    Body("true touch", [_TOUCH]),
    Body("narrator, sound on a still", [{"narrator": {"image_asset_id": "ast_n1", "audio_asset_id": "ast_n2"}}]),
    Body(
        "narrator, Japanese script",
        [{"narrator": {"video_asset_id": "ast_n3", "script": "朝の市場へようこそ。" * 12}}],
    ),
    Body(
        "narrator, script with emoji",
        [{"narrator": {"video_asset_id": "ast_n3", "script": "So long 👋🏽 & <thanks>"}}],
    ),
    Body("video", [_VIDEO]),
    Body("video, prompt of 500", [{"video_anyone": {**_VIDEO["video_anyone"], "prompt": "z" * 500}}]),
    Body("image, touch and video", [_IMAGE, _TOUCH, _VIDEO]),
    Body("video, touch and image", [_VIDEO, _TOUCH, _IMAGE]),
    Body("two styles", [_RAW_PHOTO, _FLUX_TOUCH]),
    Body("two styles, swapped", [_FLUX_TOUCH, _RAW_PHOTO]),
    Body("nothing said", [{}]),
    Body("nothing said, twice", [{}, {}]),
)


def respell(body: Any, random: Random) -> bytes:
    """The same JSON value in another spelling, as a client of any make might write it.

    Member order, white space, escapes, the form of numbers (their exact value is kept) and earlier members of
    the same name, which the last one hides, are left to `random`.
    """
    return "".join(_pieces(body, random)).encode()


def _pieces(value: Any, random: Random) -> Iterator[str]:
    yield _space(random)
    match value:
        case None | bool():
            yield json.dumps(value)
        case int() | float():
            yield _number(value, random)
        case str():
            yield _string(value, random)
        case list():
            yield from _joined("[]", [_pieces(item, random) for item in value])
        case dict():
            yield from _joined("{}", _members(value, random))
    yield _space(random)


def _joined(brackets: str, parts: list[Iterator[str]]) -> Iterator[str]:
    yield brackets[0]
    for index, part in enumerate(parts):
        yield "," * (index > 0)
        yield from part
    yield brackets[1]


def _members(value: dict[str, Any], random: Random) -> list[Iterator[str]]:
    members = [_member(name, value[name], random) for name in random.sample(list(value), len(value))]
    if value and random.random() < 0.3:
        hidden = random.choice(list(value))
        members.insert(0, _member(hidden, random.choice([0, "hidden", None, {"hidden": [0.5]}]), random))
    return members


def _member(name: str, value: Any, random: Random) -> Iterator[str]:
    yield _space(random)
    yield _string(name, random)
    yield _space(random)
    yield ":"
    yield from _pieces(value, random)


def _space(random: Random) -> str:
    return "" if random.random() < 0.7 else "".join(random.choices(" \t\n\r", k=random.randint(1, 3)))


_SHORT_ESCAPES = {
    '"': '\\"',
    "\\": "\\\\",
    "/": "\\/",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
}


def _string(text: str, random: Random) -> str:
    share = random.choice([0, 0.2, 1])
    return '"' + "".join(_character(c, random, escaped=random.random() < share) for c in text) + '"'


def _character(character: str, random: Random, *, escaped: bool) -> str:
    must_escape = character in '"\\' or character < " "
    if not (escaped or must_escape):
        return character
    if character in _SHORT_ESCAPES and random.random() < 0.5:
        return _SHORT_ESCAPES[character]
    units = character.encode("utf-16-be").hex()  # beyond U+FFFF a surrogate pair
    digits = random.choice([units, units.upper()])
    return "".join(f"\\u{digits[at : at + 4]}" for at in range(0, len(digits), 4))


def _number(number: float, random: Random) -> str:
    """`number` with its point moved and an exponent that takes it back, or as it is written everywhere."""
    integral = number == int(number)
    exact = Decimal(int(number) if integral else repr(number))
    if exact.is_zero():
        return random.choice(["0", "-0", "0.0", "-0.0", "0e0", "0.00E+7", "-0e-9"])
    if integral and (random.random() < 0.3 or Decimal(float(number)) != exact):
        return str(int(exact))
    plain = f"{exact:f}"
    if random.random() < 0.3 and len(plain) < 40:
        return plain + random.choice(["0", "000"] if "." in plain else [".0", ".00"])
    shift = random.choice([0, 1, -1, random.randint(-30, 30)])
    exponent = random.choice([f"{shift}", f"{shift:+}", f"{shift:+04}"])
    return f"{exact.scaleb(-shift):f}{random.choice('eE')}{exponent}"
