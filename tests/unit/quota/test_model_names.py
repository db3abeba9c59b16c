"""The name that a body's credits count under: limited in length and alphabet, for any body."""

import json
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bodies import BODIES, Body, respell
from proxy.cache.canonical import canonicalise
from proxy.problems import NO_NAME
from proxy.quota.model_names import MIXED, OTHER, model_of

MODES = ("segment", "style", "model", "true_touch", "narrator", "video_anyone")
ALPHABET = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 ._-")


def named(*items: dict[str, Any]) -> str:
    """The name of a body, as a client sends it."""
    return model_of(canonicalise(json.dumps(items).encode()))


# --- One item ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "name"),
    [
        ({"model": "Flux"}, "Flux"),
        ({"style": "Bokeh"}, "Bokeh"),
        ({"segment": {"asset_id": "a"}}, "segment"),
        ({"true_touch": {"scale_factor": 2}}, "true_touch"),
        ({"narrator": {"script": "x"}}, "narrator"),
        ({"video_anyone": {"duration": 5}}, "video_anyone"),
        ({"model": "JuggernautXL v9.1_turbo-2"}, "JuggernautXL v9.1_turbo-2"),
        ({"model": "a" * 64}, "a" * 64),
        # none
        ({}, NO_NAME),
        ({"seed": 1, "prompt": {"positive": "x"}}, NO_NAME),
        ({"style_detail": {"name": "Raw Photo"}}, NO_NAME),
        ({"Model": "Flux"}, NO_NAME),
        ({"prompt": {"model": "Flux"}}, NO_NAME),
        # null is absent, anything else is there
        ({"segment": None, "style": None, "model": "Flux"}, "Flux"),
        ({"model": None, "video_anyone": {}}, "video_anyone"),
        (dict.fromkeys(MODES), NO_NAME),
        ({"segment": False, "model": "Flux"}, "segment"),
        ({"segment": 0}, "segment"),
        ({"segment": "a name"}, "segment"),
        ({"true_touch": "a name"}, "true_touch"),
        # a style or model that has no name of its own
        ({"style": {"name": "Bokeh"}, "model": "Flux"}, "style"),
        ({"style": 3}, "style"),
        ({"style": []}, "style"),
        ({"style": True}, "style"),
        ({"model": {"name": "Flux"}}, "model"),
        ({"model": 1.5}, "model"),
        # names that cannot be
        ({"model": ""}, OTHER),
        ({"style": "", "model": "Flux"}, OTHER),
        ({"model": "a" * 65}, OTHER),
        ({"model": "Flüx"}, OTHER),
        ({"model": "a\nb"}, OTHER),
        ({"model": "Flux\n"}, OTHER),
        ({"model": "a\tb"}, OTHER),
        ({"model": "a/b"}, OTHER),
        ({"model": "a:b"}, OTHER),
        ({"model": '"}'}, OTHER),
        ({"model": "\u0661"}, OTHER),  # a digit, but not of ASCII
        ({"style": "朝"}, OTHER),
        # names that mean something else here
        ({"model": "-"}, OTHER),
        ({"style": "mixed"}, OTHER),
        ({"model": "other"}, OTHER),
        ({"model": "Mixed"}, "Mixed"),
        ({"model": "--"}, "--"),
    ],
)
def test_the_name_of_an_item(item: dict[str, Any], name: str) -> None:
    assert named(item) == name
    assert named(item, item) == name


@pytest.mark.parametrize("at", range(len(MODES)))
def test_the_first_mode_present_decides(at: int) -> None:
    item = {mode: f"the {mode}" for mode in MODES[at:]} | dict.fromkeys(MODES[:at])
    mode = MODES[at]
    assert named(item) == (f"the {mode}" if mode in ("style", "model") else mode)


# --- Several items ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "name"),
    [
        ([{"model": "Flux"}, {"model": "Flux", "seed": 2}], "Flux"),
        ([{"model": "Flux"}, {"style": "Flux"}], "Flux"),
        ([{"model": "Flux"}, {"model": "flux"}], MIXED),
        ([{"model": "Flux"}, {}], MIXED),
        ([{}, {"model": None}], NO_NAME),
        ([{"model": "Flux"}, {"model": "a/b"}], MIXED),
        ([{"model": "a/b"}, {"model": "c/d"}], OTHER),
        ([{"narrator": {"script": "a"}}, {"narrator": {"script": "b"}}], "narrator"),
        ([{"model": "a"}, {"model": "b"}, {"model": "a"}], MIXED),
    ],
)
def test_the_name_of_a_body(items: list[dict[str, Any]], name: str) -> None:
    assert named(*items) == name
    assert named(*reversed(items)) == name


# --- Bodies of clients ------------------------------------------------------------------------------------------

BY_FIRST_WORDS = {
    "every mode at once": "segment",
    "image": "JuggernautXL",
    "studio": "Cinematic",
    "flux": "Flux",
    "segment": "segment",
    "true touch": "true_touch",
    "narrator": "narrator",
    "video": "video_anyone",
    "two styles": NO_NAME,  # in style_detail alone
    "nothing said": NO_NAME,
}
BY_NAME = {
    "image, with a style too": "Bokeh",
    "image, touch and video": MIXED,
    "video, touch and image": MIXED,
    "flux, small letters": "flux",
}


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
def test_the_names_of_bodies_that_clients_send(body: Body) -> None:
    expected = BY_NAME.get(body.name) or BY_FIRST_WORDS[body.name.partition(",")[0]]
    assert model_of(canonicalise(body.raw)) == expected
    for seed in range(5):
        assert model_of(canonicalise(respell(body.items, Random(seed)))) == expected


# --- Anything ---------------------------------------------------------------------------------------------------

values = (
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=70) | st.from_regex(r"\A[A-Za-z0-9 ._-]{60,66}\Z")
)
anything = st.dictionaries(st.sampled_from([*MODES, "style_detail", "seed"]), values | st.lists(values, max_size=2))


@given(st.lists(anything, min_size=1, max_size=4))
def test_any_body_has_one_bounded_name(items: list[dict[str, Any]]) -> None:
    name = named(*items)
    assert 1 <= len(name) <= 64
    assert set(name) <= ALPHABET


@given(st.lists(anything, min_size=1, max_size=4))
def test_a_body_is_mixed_exactly_if_its_items_differ(items: list[dict[str, Any]]) -> None:
    apart = {named(item) for item in items}
    assert MIXED not in apart
    assert named(*items) == (apart.pop() if len(apart) == 1 else MIXED)


@given(
    st.text(st.sampled_from(sorted(ALPHABET)), min_size=1, max_size=64).filter(lambda name: name not in ("-", "mixed"))
)
def test_an_allowed_name_is_kept(name: str) -> None:
    assert named({"model": name}) == named({"style": name, "model": "x"}) == name


@given(st.text(min_size=1, max_size=66).filter(lambda name: len(name) > 64 or not set(name) <= ALPHABET))
def test_any_other_name_counts_as_other(name: str) -> None:
    assert named({"model": name}) == OTHER
