"""Bodies reduced to scope, leaves, classes and setting."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from json_values import leaves as leaf_values
from json_values import plain, questions
from proxy.cache.canonical import canonicalise, remove_members
from proxy.learning.leaves import (
    MAX_LEAVES,
    MAX_PATH_CHARACTERS,
    LeafClass,
    Reduced,
    class_of,
    reduce,
    setting_id,
    text_of,
)

FLUX = {"model": "Flux", "prompt": {"positive": "a man"}, "loras": [{"name": "x", "weight": 0.5}], "seed": 7}


def reduced(
    *items: dict[str, Any], query: str = "", ignored: tuple[str, ...] = (), never: tuple[str, ...] = ()
) -> Reduced:
    found = reduce(canonicalise(plain(list(items))), query=query, ignored=ignored, never_learn=never)
    assert found is not None
    return found


def test_paths_go_through_objects_and_arrays() -> None:
    found = reduced(FLUX, {"tags": [], "style": {}})
    assert dict(zip(found.paths, found.values, strict=True)) == {
        "0.loras.0.name": "x",
        "0.loras.0.weight": 0.5,
        "0.model": "Flux",
        "0.prompt.positive": "a man",
        "0.seed": 7,
        "1.style": {},
        "1.tags": [],
    }
    assert found.items == ("model Flux", "style")


@pytest.mark.parametrize(
    "other",
    [
        {**FLUX, "model": "RealVis"},
        {**FLUX, "style": None, "segment": {"asset_id": "a"}},
        {**FLUX, "loras": [{"name": "x", "weight": 0.5}] * 2},
        {**FLUX, "loras": []},
        {**FLUX, "loras": {}},
        {name: value for name, value in FLUX.items() if name != "seed"},
    ],
)
def test_another_model_mode_or_set_of_leaves_is_another_scope(other: dict[str, Any]) -> None:
    assert reduced(other).scope != reduced(FLUX).scope


def test_the_scope_depends_on_query_ignored_members_and_number_of_items() -> None:
    scopes = [
        reduced(FLUX).scope,
        reduced(FLUX, query="type=image").scope,
        reduced(FLUX, ignored=("absent",)).scope,
        reduced(FLUX, FLUX).scope,
    ]
    assert len(set(scopes)) == len(scopes)


def test_values_other_than_the_model_do_not_change_the_scope() -> None:
    other = {"model": "Flux", "prompt": {"positive": ""}, "loras": [{"name": None, "weight": -1}], "seed": "x"}
    assert reduced(other).scope == reduced(FLUX).scope
    assert reduced(other, ignored=("b", "a", "a")).scope == reduced(FLUX, ignored=("a", "b")).scope


def test_ignored_members_are_no_leaves() -> None:
    assert "0.seed" not in reduced(FLUX, ignored=("seed",)).paths
    assert "0.loras.0.weight" in reduced(FLUX, ignored=("loras.0.weight",)).paths, "cache.ignore ends at arrays"


@pytest.mark.parametrize(
    "item",
    [
        {"a.b": 1},
        {"a": {"b.c": 1}},
        {"a": [{"0": 1}]},
        {"0": [1]},
        {f"m{number}": 1 for number in range(MAX_LEAVES + 1)},
        {"m" * MAX_PATH_CHARACTERS: 1},
    ],
)
def test_ambiguous_and_endless_paths_are_not_learned_from(item: dict[str, Any]) -> None:
    assert reduce(canonicalise(plain([item])), query="", ignored=()) is None


@given(questions, questions)
def test_bodies_of_one_scope_have_the_same_leaves(one: list[Any], other: list[Any]) -> None:
    first, second = (reduce(canonicalise(plain(body)), query="", ignored=()) for body in (one, other))
    if first is not None and second is not None:
        assert (first.scope == second.scope) == ((first.paths, first.items) == (second.paths, second.items))
        left_out = "0" * len(first.paths)
        if first.scope == second.scope:
            same = canonicalise(plain(one)) == canonicalise(plain(other))
            assert (setting_id(first, left_out) == setting_id(second, left_out)) == same


@given(questions, st.lists(st.text(max_size=3), max_size=2))
def test_ignored_members_make_no_difference(body: list[Any], ignored: list[str]) -> None:
    without = orjson.loads(canonicalise(plain(body)))
    remove_members(without, ignored)
    first = reduce(canonicalise(plain(body)), query="", ignored=tuple(ignored))
    second = reduce(orjson.dumps(without), query="", ignored=tuple(ignored))
    assert first == second


@pytest.mark.parametrize(
    ("name", "never"),
    [
        ("id", True),
        ("asset_id", True),
        ("reference_ids", True),
        ("image_url", True),
        ("idea", False),
        ("android", False),
        ("url", False),
    ],
)
def test_ids_and_urls_are_never_left_out(name: str, never: bool) -> None:  # noqa: FBT001 -- a parameter of the test
    assert reduced({name: "x"}).never_left_out == (never,)
    assert reduced({name: [{"deep": 1}]}).never_left_out == (never,)


@pytest.mark.parametrize(
    ("never", "expected"),
    [
        ("seed", {"0.seed", "1.seed"}),
        ("loras", {"0.loras.0.weight", "0.loras.1.weight"}),
        ("loras.1", {"0.loras.1.weight"}),
        ("loras.1.weight", {"0.loras.1.weight"}),
        ("loras.weight", {"0.loras.0.weight", "0.loras.1.weight"}),
        ("lora", set()),
        ("weight", set()),
    ],
)
def test_never_learn_names_members_and_all_in_them(never: str, expected: set[str]) -> None:
    found = reduced({"seed": 1, "loras": [{"weight": 1}, {"weight": 2}]}, {"seed": 2}, never=(never,))
    assert {path for path, is_never in zip(found.paths, found.never_left_out, strict=True) if is_never} == expected


@pytest.mark.parametrize("value", [None, "", 0, -1, True, False, [], {}, "0", "-1", "0.0", "-1.00"])
def test_sentinels_are_classes_of_their_own(value: Any) -> None:
    found = class_of(value)
    assert found.is_sentinel
    assert found.number is None
    assert not any(class_of(other).name == found.name for other in (1, 2.5, -3, "text", "7"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, LeafClass("+i", is_sentinel=False, number=5)),
        (-5, LeafClass("-i", is_sentinel=False, number=-5)),
        (0.5, LeafClass("+f", is_sentinel=False, number=0.5)),
        (-0.5, LeafClass("-f", is_sentinel=False, number=-0.5)),
        ("a man", LeafClass("s", is_sentinel=False, length=5)),
        ("true", LeafClass("s", is_sentinel=False, length=4)),
        ("20", LeafClass('"+i', is_sentinel=False, number=20, length=2)),
        (" -2.50 ", LeafClass('"-f', is_sentinel=False, number=-2.5, length=7)),
        ("1e999", LeafClass("s", is_sentinel=False, length=5)),
        ("1" * 65, LeafClass("s", is_sentinel=False, length=65)),
    ],
)
def test_numbers_and_strings_have_a_class_and_what_their_range_is_measured_by(value: Any, expected: LeafClass) -> None:
    assert class_of(value) == expected


@given(leaf_values, leaf_values)
def test_only_equal_values_have_equal_texts(one: Any, other: Any) -> None:
    first, second = (canonicalise(plain([{"v": value}])) for value in (one, other))
    values = (orjson.loads(body)[0]["v"] for body in (first, second))
    assert (len({text_of(value) for value in values}) == 1) == (first == second)


@given(leaf_values)
def test_a_value_that_is_no_sentinel_has_a_measure(value: Any) -> None:
    found = class_of(orjson.loads(canonicalise(plain([{"v": value}])))[0]["v"])
    assert found.is_sentinel or (found.number, found.length) != (None, None)


def test_a_left_out_leaf_counts_with_its_class_alone() -> None:
    left_out = "".join("1" if path == "0.seed" else "0" for path in reduced(FLUX).paths)
    settings = {
        seed: setting_id(reduced({**FLUX, "seed": seed}), left_out) for seed in (7, 8, 0, -1, -2, 0.5, "x", "8")
    }
    assert settings.pop(8) == settings[7]
    assert len(set(settings.values())) == len(settings)
    assert setting_id(reduced({**FLUX, "prompt": {"positive": "a dog"}}), left_out) != settings[7]
