"""Cache keys: the fields they are made from, and ignored members."""

from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bodies import BODIES, Body
from canonical_model import MAX, MIN, meaning
from examples import examples
from json_values import FIELDS, key, plain, questions, texts, values
from proxy.cache.canonical import canonicalise, key_of, present

# --- the key ----------------------------------------------------------------------------------------------------


def test_the_key_of_a_request_has_not_changed() -> None:
    """Prices are stored under it: if this value must change, change `KEY_FORMAT` too."""
    raw = b'[{"steps": 20.0, "prompt": {"positive": "caf\\u00e9"}}]'
    fields = {
        "origin": "https://api.rendernet.ai",
        "account": "default",
        "path": FIELDS["path"],
        "query": "type=image",
    }
    assert key_of(canonicalise(raw), **fields) == "167ba2a8a73fd512fc8e7d6c14e031cae29bb66111e58c98c9190731d67657a0"


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_alone_changes_the_key(name: str) -> None:
    canonical = canonicalise(b"[{}]")
    keys = {key_of(canonical, **FIELDS | {name: FIELDS[name] + more}) for more in ("", "x", "X", " ", "\n[{}]")}
    assert len(keys) == 5


@given(st.text(st.sampled_from('ab",\n[]{}\\'), max_size=12), st.data())
def test_moving_a_character_to_the_next_field_changes_the_key(text: str, data: st.DataObject) -> None:
    def key_when_cut(cuts: list[int]) -> str:
        origin, account, path, query = (text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
        return key_of(b"[{}]", origin=origin, account=account, path=path, query=query)

    some_cuts = st.lists(st.integers(0, len(text)), min_size=3, max_size=3).map(sorted)
    one, other = data.draw(some_cuts), data.draw(some_cuts)
    assert (key_when_cut(one) == key_when_cut(other)) == (one == other)


def test_body_and_query_are_not_interchangeable() -> None:
    assert key_of(b'[{"a":1}]', **FIELDS) != key_of(b"[{}]", **FIELDS | {"query": '[{"a":1}]'})


# --- ignored members ----------------------------------------------------------------------------------------------

Paths = tuple[str, ...]


def key_without(question: Any, *ignored: str) -> str:
    return key_of(canonicalise(plain(question)), **FIELDS, ignored=ignored)


def without_paths(value: Any, paths: set[Paths]) -> Any:
    """A copy of `value` without the members at the paths."""
    if not isinstance(value, dict):
        return value
    return {
        name: without_paths(member, {path[1:] for path in paths if path[0] == name and len(path) > 1})
        for name, member in value.items()
        if (name,) not in paths
    }


names = st.sampled_from("abc")
small_values: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from([None, 0, 0.5, "a", [], {}, [{"a": 1}]]),
    lambda inner: st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
small_questions = st.lists(st.dictionaries(names, small_values, max_size=3), min_size=1, max_size=2)
ignored_paths = st.lists(st.lists(names, min_size=1, max_size=3).map(".".join), max_size=3)


@examples(5)
@given(small_questions, small_questions, ignored_paths)
@example([{"a": {"b": 1}}], [{"a": {}}], ["a.b"])
@example([{"a": {}}], [{}], ["a.b"])
@example([{"a": {"b": 1}, "c": 1}], [{"c": 1}], ["a.b", "a"])
def test_two_bodies_share_a_key_if_they_are_equal_without_ignored_members(
    one: Any, other: Any, ignored: list[str]
) -> None:
    paths: set[Paths] = {tuple(path.split(".")) for path in ignored}
    counted = [meaning([without_paths(item, paths) for item in question]) for question in (one, other)]
    assert (key_without(one, *ignored) == key_without(other, *ignored)) == (counted[0] == counted[1])


@given(small_questions, ignored_paths, st.randoms(use_true_random=False))
def test_order_and_repetition_of_ignored_members_do_not_matter(
    question: Any, ignored: list[str], random: Random
) -> None:
    otherwise = random.sample(ignored, len(ignored)) + ignored[:2]
    assert key_without(question, *otherwise) == key_without(question, *ignored)


@given(questions, ignored_paths, ignored_paths)
def test_another_list_of_ignored_members_gives_another_key(
    question: Any, ignored: list[str], others: list[str]
) -> None:
    """Even if the body has none of them: prices stored under another list must not be found."""
    assert (key_without(question, *ignored) == key_without(question, *others)) == (set(ignored) == set(others))


@given(questions, texts.filter(lambda name: "." not in name), values)
def test_neither_value_nor_absence_of_an_ignored_member_changes_the_key(question: Any, name: str, new: Any) -> None:
    without = [{n: m for n, m in item.items() if n != name} for item in question]
    changed = [{**item, name: new} for item in question]
    assert key_without(question, name) == key_without(without, name) == key_without(changed, name)
    assert key_without(without) != key_without(changed)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
def test_an_ignored_seed_never_changes_the_key(body: Body) -> None:
    ignored = ("seed", "prompt.positive")
    one = key_without(body.items, *ignored)
    assert key_without([{**item, "seed": [0.5, {"x": None}]} for item in body.items], *ignored) == one
    assert key_without([{n: m for n, m in item.items() if n != "seed"} for item in body.items], *ignored) == one
    assert key_without([{**item, "steps": 99} for item in body.items], *ignored) != one
    assert key_without([{**item, "seed2": 1} for item in body.items], *ignored) != one
    assert key_without([*body.items, {}], *ignored) != one
    assert one != key(body.raw)


SAME_WITHOUT_SEED_AND_PROMPT = {
    "another seed": ([{"seed": 1}], [{"seed": 2}]),
    "no seed": ([{"seed": 1}], [{}]),
    "a seed of null": ([{"seed": None}], [{}]),
    "a seed that is an object": ([{"seed": {"a": 1}}], [{"seed": [1]}]),
    "in the second item": ([{"a": 1}, {"seed": 1}], [{"a": 1}, {}]),
    "another prompt": ([{"prompt": {"positive": "x", "n": 1}}], [{"prompt": {"positive": "y", "n": 1}}]),
    "no positive": ([{"prompt": {"positive": "x"}}], [{"prompt": {}}]),
}
DIFFERENT_WITHOUT_SEED_AND_PROMPT = {
    "an empty prompt and none": ([{"prompt": {"positive": "x"}}], [{}]),
    "an empty prompt and null": ([{"prompt": {"positive": "x"}}], [{"prompt": None}]),
    "an empty prompt and an empty list": ([{"prompt": {"positive": "x"}}], [{"prompt": []}]),
    "through a string": ([{"prompt": "positive"}], [{"prompt": "x"}]),
    "through a string and none": ([{"prompt": "positive"}], [{}]),
    "through null": ([{"prompt": None}], [{}]),
    "through a list": ([{"prompt": [{"positive": "x"}]}], [{"prompt": [{"positive": "y"}]}]),
    "deeper than the path": ([{"a": {"seed": 1}}], [{"a": {"seed": 2}}]),
    "deeper than the longer path": ([{"a": {"prompt": {"positive": 1}}}], [{"a": {"prompt": {"positive": 2}}}]),
    "another end": ([{"prompt": {"negative": "x"}}], [{"prompt": {"negative": "y"}}]),
    "longer than the path": ([{"prompt": {"x": {"positive": 1}}}], [{"prompt": {"x": {"positive": 2}}}]),
    "the end alone": ([{"positive": 1}], [{"positive": 2}]),
    "a name with a dot": ([{"prompt.positive": 1}], [{"prompt.positive": 2}]),
    "a name like it": ([{"Seed": 1}], [{"Seed": 2}]),
    "a name that begins with it": ([{"seed_": 1}], [{"seed_": 2}]),
    "the number of items": ([{"seed": 1}], [{"seed": 1}, {"seed": 1}]),
}


@pytest.mark.parametrize(("one", "other"), SAME_WITHOUT_SEED_AND_PROMPT.values(), ids=SAME_WITHOUT_SEED_AND_PROMPT)
def test_bodies_that_differ_in_seed_or_prompt_share_a_key(one: Any, other: Any) -> None:
    assert key_without(one, "seed", "prompt.positive") == key_without(other, "seed", "prompt.positive")
    assert key_without(one) != key_without(other)


@pytest.mark.parametrize(
    ("one", "other"), DIFFERENT_WITHOUT_SEED_AND_PROMPT.values(), ids=DIFFERENT_WITHOUT_SEED_AND_PROMPT
)
def test_bodies_that_differ_elsewhere_have_different_keys(one: Any, other: Any) -> None:
    assert key_without(one, "seed", "prompt.positive") != key_without(other, "seed", "prompt.positive")


def test_a_path_may_have_several_parts() -> None:
    bodies: list[Any] = [[{"a": {"b": {"c": {"d": value}, "c.d": 1}}}] for value in (1, [2])]
    assert len({key_without(body, "a.b.c.d") for body in bodies}) == 1
    assert len({key_without(body, "a.b.c.x", "b.c.d", "a.c.d") for body in bodies}) == 2
    assert present(canonicalise(plain(bodies[0])), ["a.b.c", "a.b.c.d", "a.b.c.d.e", "b.c.d"]) == ["a.b.c", "a.b.c.d"]


def test_numbers_beside_an_ignored_member_stay_exact() -> None:
    exact = [MIN, MIN + 1, MAX, MAX - 1, 2**53 + 1, 0.1, 5e-324, 1.5e300 / 1e300]
    keys = {key_without([{"seed": 1, "n": number}], "seed") for number in exact}
    assert len(keys) == len(exact)
    assert keys == {key_without([{"n": number}], "seed") for number in exact}


def test_an_empty_list_of_ignored_members_equals_none() -> None:
    assert key_without([{"seed": 1}]) == key(b'[{"seed":1}]')
    assert key_of(b'[{"seed":1}]', **FIELDS, ignored=[]) == key(b'[{"seed":1}]')


def test_the_key_with_ignored_members_has_not_changed() -> None:
    """Like `test_the_key_of_a_request_has_not_changed`."""
    question = [{"seed": 1, "steps": 20, "prompt": {"positive": "x", "negative": "y"}}]
    assert (
        key_without(question, "seed", "prompt.positive")
        == "df572e677ce57136e39f64fa5af8c372200fa031968ce50c532f0f8c805520dc"
    )


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ([{}], []),
        ([{"seed": 0}], ["seed"]),
        ([{"seed": None}], ["seed"]),
        ([{}, {"seed": 0}], ["seed"]),
        ([{"prompt": {}}], []),
        ([{"prompt": "positive"}], []),
        ([{"prompt": ["positive"]}], []),
        ([{"prompt": {"positive": ""}}], ["prompt.positive"]),
        ([{"prompt": {"positive": {}}, "seed": 1}], ["prompt.positive", "seed"]),
        ([{"positive": 1, "a": {"seed": 1}, "prompt.positive": 1}], []),
        ([{"seed": 1}, {"prompt": {"positive": []}}, {}], ["prompt.positive", "seed"]),
    ],
)
def test_the_ignored_members_of_a_body_are_found(body: Any, found: list[str]) -> None:
    assert present(canonicalise(plain(body)), ["prompt.positive", "seed"]) == found
    assert present(canonicalise(plain(body)), []) == []


@given(small_questions, st.lists(names, min_size=1, max_size=3).map(tuple))
def test_a_member_is_present_if_removing_it_changes_the_body(question: Any, path: Paths) -> None:
    shorter = [without_paths(item, {path}) for item in question]
    member = ".".join(path)
    assert present(canonicalise(plain(question)), [member]) == ([member] if shorter != question else [])
