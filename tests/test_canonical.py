"""One question, one spelling, one key; and of what is no question, nothing but a refusal.

Two models stand beside the code. `meaning` says when two parsed values are one JSON value; `strict_reading` is a
second reader, made of the standard library, that takes raw bytes to the canonical ones or refuses them. Neither
shares a line with what it judges.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterator
from itertools import combinations
from random import Random
from string import hexdigits
from typing import Any

import orjson
import pytest
import rfc8785
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bodies import BODIES, Body, respell
from proxy.canonical import MAX_DEPTH, canonicalise, key_of, present
from proxy.problems import BadRequest, Code, Problem

FIELDS = {"origin": "https://api.example", "account": "default", "path": "/pub/v1/generations/estimate", "query": ""}
SAMPLE = '[{"prompt":{"positive":"caf\\u00e9 \\ud83d\\ude00 ö"},"seed":-12.50e+1,"n":[true,false,null,{}]}]'.encode()
MIN, MAX = -(2**63), 2**64 - 1


def key(raw: bytes) -> str:
    return key_of(canonicalise(raw), **FIELDS)


def plain(value: Any) -> bytes:
    return json.dumps(value).encode()


# --- the two models -------------------------------------------------------------------------------------------


def meaning(value: Any) -> Any:
    """Equal for two values exactly if they are the same JSON value: numbers by value, objects without order."""
    match value:
        case bool():
            return ("boolean", value)
        case int() | float():
            return ("number", value)  # Python compares integers with floats exactly
        case dict():
            return ("object", frozenset((name, meaning(member)) for name, member in value.items()))
        case list():
            return ("array", tuple(meaning(item) for item in value))
    return value


class Number(str):
    """A number of the strict reader's, as it was spelled."""

    __slots__ = ()


class Members(list[tuple[str, Any]]):
    """The members of an object of the strict reader's, the hidden ones too."""


class RefusedError(Exception):
    """The strict reader's only answer to what is no question."""


def strict_reading(raw: bytes) -> bytes | None:
    """The canonical bytes that a reader who knows the rules, but not our code, makes of `raw`; None if refused."""
    try:
        value = json.loads(
            raw.decode(),
            parse_int=Number,
            parse_float=Number,
            parse_constant=refuse,
            object_pairs_hook=Members,
        )
        refuse_wherever(value)
        if not (type(value) is list and value and all(type(item) is Members for item in value)):
            return None
        return written(value, 1).encode()
    except (ValueError, RecursionError, RefusedError):
        return None


def refuse(_: str) -> None:
    raise RefusedError


def refuse_wherever(value: Any) -> None:
    """What even a hidden member may not have: half a character, or a number that overflows a double."""
    match value:
        case Number():
            if math.isinf(float(value)):
                raise RefusedError
        case str():
            value.encode()  # UnicodeEncodeError is a ValueError
        case Members():
            for name, member in value:
                refuse_wherever(name)
                refuse_wherever(member)
        case list():
            for item in value:
                refuse_wherever(item)


def written(value: Any, level: int) -> str:
    match value:
        case Number():
            return written_number(value)
        case Members():
            members = sorted(dict(value).items())
            return nested("{}", [f"{written(n, level)}:{written(v, level + 1)}" for n, v in members], level)
        case list():
            return nested("[]", [written(item, level + 1) for item in value], level)
    return json.dumps(value, ensure_ascii=False)


def nested(brackets: str, parts: list[str], level: int) -> str:
    if level > MAX_DEPTH:
        raise RefusedError
    return brackets[0] + ",".join(parts) + brackets[1]


def written_number(number: Number) -> str:
    exact = int(number) if re.fullmatch("-?[0-9]+", number) else float(number)
    if exact != int(exact):
        spelled = repr(exact).replace("e-0", "e-")
        return re.sub(r"^(-?)(\d)(?:\.(\d+))?e-5$", r"\g<1>0.0000\2\3", spelled)  # the exponent starts at 1e-6
    if not MIN <= exact <= MAX:
        raise RefusedError
    return str(int(exact))


def check_refusal(problem: Problem) -> None:
    assert problem.code is Code.INVALID_BODY
    assert re.fullmatch(r"The body .{10,200}\.", problem.detail)
    assert problem.detail.isprintable()


def reading(raw: bytes) -> bytes | None:
    """What the gateway makes of `raw`. Anything but canonical bytes or a sound refusal fails the test."""
    try:
        canonical = canonicalise(raw)
    except BadRequest as refusal:
        check_refusal(refusal.problem)
        return None
    assert canonicalise(canonical) == canonical
    return canonical


# --- values of every kind -------------------------------------------------------------------------------------


def within_64_bits(number: float) -> float:
    return math.frexp(number)[0] if number.is_integer() and not MIN <= number <= MAX else number


texts = st.text(max_size=8)
numbers = st.integers(MIN, MAX) | st.floats(allow_nan=False, allow_infinity=False).map(within_64_bits)
leaves = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
items = st.dictionaries(texts, values, max_size=4)
questions = st.lists(items, min_size=1, max_size=3)
chances = st.builds(Random, st.integers(0, 2**32 - 1))


@given(questions)
def test_canonicalising_is_idempotent(question: Any) -> None:
    canonical = canonicalise(plain(question))
    assert canonicalise(canonical) == canonical


@given(questions)
def test_canonical_bytes_parse_back_to_the_same_value(question: Any) -> None:
    canonical = canonicalise(plain(question))
    assert meaning(json.loads(canonical)) == meaning(question)
    assert meaning(orjson.loads(canonical)) == meaning(question)


@given(questions)
def test_the_strict_reader_writes_the_same_bytes(question: Any) -> None:
    raw = plain(question)
    assert canonicalise(raw) == strict_reading(raw)


@given(questions, chances)
def test_respelling_never_changes_bytes_or_key(question: Any, random: Random) -> None:
    respelled = respell(question, random)
    assert canonicalise(respelled) == canonicalise(plain(question))
    assert key(respelled) == key(plain(question))


@given(questions, questions)
def test_two_values_share_their_bytes_only_if_they_are_one(one: Any, other: Any) -> None:
    assert (canonicalise(plain(one)) == canonicalise(plain(other))) == (meaning(one) == meaning(other))


def neighbours(value: Any, new: Any) -> Iterator[Any]:
    """Values that differ from `value` in one place: another stands there, or something is gone or added."""
    yield [value] if meaning(new) == meaning(value) else new
    match value:
        case None | bool():
            pass
        case int():
            yield value - 1 if value > 0 else value + 1
        case float():
            yield math.nextafter(value, 0 if value == 0.5 else 0.5)
        case str():
            yield value + "\0"
            yield "\u0301" + value
        case dict():
            yield value | {unused(value): new}
            yield value | {unused(value): None}
            for name in value:
                yield {n: m for n, m in value.items() if n != name}
                yield from (value | {name: member} for member in neighbours(value[name], new))
        case list():
            yield [*value, new]
            yield from (value[::-1] for _ in value[:1] if meaning(value[::-1]) != meaning(value))
            for at, item in enumerate(value):
                yield from ([*value[:at], other, *value[at + 1 :]] for other in neighbours(item, new))


def unused(names: Any) -> str:
    return str(max(names, key=len, default="")) + "x"


def is_question(value: Any) -> bool:
    return type(value) is list and bool(value) and all(type(item) is dict for item in value)


@given(questions, values)
def test_changing_any_value_always_changes_the_key(question: Any, new: Any) -> None:
    others = [other for other in neighbours(question, new) if is_question(other)]
    assert len(others) > len(question)
    assert key(plain(question)) not in {key(plain(other)) for other in others}


composed = st.lists(st.sampled_from("éÅñ각ガỆ"), min_size=1, max_size=4).map("".join)


@given(composed)
def test_unicode_forms_stay_apart(text: str) -> None:
    nfc, nfd = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert key(plain([{"a": nfc}])) != key(plain([{"a": nfd}]))
    assert key(plain([{nfc: 1}])) != key(plain([{nfd: 1}]))


# --- RFC 8785 as the oracle -------------------------------------------------------------------------------------

ascii_names = st.text(st.characters(max_codepoint=127), max_size=6)
rfc_numbers = (
    st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(1e-5, 2.0**53 - 1)
    | st.floats(-(2.0**53) + 1, -1e-5)
    | st.integers(-(10**9), 10**9).map(lambda thousandths: thousandths / 1000)
    | st.sampled_from([0.0, -0.0, 1e-5, 0.1, 7.0, 2.0**52 - 0.5])
)
rfc_leaves = st.none() | st.booleans() | rfc_numbers | texts
rfc_values = st.recursive(
    rfc_leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ascii_names, inner, max_size=3),
    max_leaves=8,
)
rfc_questions = st.lists(st.dictionaries(ascii_names, rfc_values, max_size=4), min_size=1, max_size=3)


def fractions(value: Any) -> list[float]:
    match value:
        case float():
            return [] if value.is_integer() else [value]
        case dict():
            return [fraction for member in value.values() for fraction in fractions(member)]
        case list():
            return [fraction for item in value for fraction in fractions(item)]
    return []


def test_rfc_8785_says_the_same_where_both_speak() -> None:
    seen = skipped = fractional = 0

    @settings(max_examples=500)
    @given(rfc_questions)
    def agree(question: Any) -> None:
        nonlocal seen, skipped, fractional
        seen += 1
        fractional += bool(fractions(question))
        if any("e" in orjson.dumps(fraction).decode() for fraction in fractions(question)):
            skipped += 1  # RFC 8785 would write 1e-6 as 0.000001
        else:
            assert canonicalise(plain(question)) == rfc8785.dumps(question)

    agree()
    assert seen >= 500
    assert skipped / seen < 0.05
    assert fractional / seen > 0.1


# --- bodies as clients send them --------------------------------------------------------------------------------


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
def test_a_body_has_one_key_in_every_spelling(body: Body) -> None:
    random = Random(body.name)
    spellings = {respell(body.items, random) for _ in range(25)} | {body.raw}
    assert len(spellings) > 10
    assert {key(raw) for raw in spellings} == {key(body.raw)}
    assert {strict_reading(raw) for raw in spellings} == {canonicalise(body.raw)}


def test_two_bodies_share_a_key_only_if_they_are_one_question() -> None:
    for one, other in combinations(BODIES, 2):
        assert (key(one.raw) == key(other.raw)) == (one.question == other.question), (one.name, other.name)


def test_the_bodies_cover_equal_and_different_questions() -> None:
    names = {body.name for body in BODIES}
    assert len(names) == len(BODIES) > 50
    assert {body.equals for body in BODIES} > {"", "image", "every mode at once"}
    assert {body.equals for body in BODIES} <= names | {""}


def test_a_body_as_net_writes_it() -> None:
    as_net = rb'[{"sampler":"DPM\u002B\u002B SDE","script":"Bye \uD83D\uDC4B \u0026 \u003Cthanks\u003E","seed":null}]'
    as_fetch = '[{"seed":null,"script":"Bye 👋 & <thanks>","sampler":"DPM++ SDE"}]'.encode()
    assert canonicalise(as_net) == '[{"sampler":"DPM++ SDE","script":"Bye 👋 & <thanks>","seed":null}]'.encode()
    assert key(as_net) == key(as_fetch)


# --- the key ----------------------------------------------------------------------------------------------------


def test_the_key_of_a_question_is_what_it_was() -> None:
    """Prices are stored under it: if this value has to change, `KEY_FORMAT` has to change with it."""
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
def test_a_character_cannot_slip_from_one_field_into_the_next(text: str, data: st.DataObject) -> None:
    def key_when_cut(cuts: list[int]) -> str:
        origin, account, path, query = (text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
        return key_of(b"[{}]", origin=origin, account=account, path=path, query=query)

    some_cuts = st.lists(st.integers(0, len(text)), min_size=3, max_size=3).map(sorted)
    one, other = data.draw(some_cuts), data.draw(some_cuts)
    assert (key_when_cut(one) == key_when_cut(other)) == (one == other)


def test_the_body_and_the_query_are_told_apart() -> None:
    assert key_of(b'[{"a":1}]', **FIELDS) != key_of(b"[{}]", **FIELDS | {"query": '[{"a":1}]'})


# --- members that do not count ------------------------------------------------------------------------------------

Paths = tuple[str, ...]


def key_less(question: Any, *ignored: str) -> str:
    return key_of(canonicalise(plain(question)), **FIELDS, ignored=ignored)


def less(value: Any, paths: set[Paths]) -> Any:
    """`value` without what stands at the paths, made anew."""
    if not isinstance(value, dict):
        return value
    return {
        name: less(member, {path[1:] for path in paths if path[0] == name and len(path) > 1})
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


@settings(max_examples=500)
@given(small_questions, small_questions, ignored_paths)
@example([{"a": {"b": 1}}], [{"a": {}}], ["a.b"])
@example([{"a": {}}], [{}], ["a.b"])
@example([{"a": {"b": 1}, "c": 1}], [{"c": 1}], ["a.b", "a"])
def test_two_questions_share_a_key_if_what_counts_is_one(one: Any, other: Any, ignored: list[str]) -> None:
    paths: set[Paths] = {tuple(path.split(".")) for path in ignored}
    counted = [meaning([less(item, paths) for item in question]) for question in (one, other)]
    assert (key_less(one, *ignored) == key_less(other, *ignored)) == (counted[0] == counted[1])


@given(small_questions, ignored_paths, st.randoms(use_true_random=False))
def test_order_and_repetition_of_the_ignored_do_not_matter(question: Any, ignored: list[str], random: Random) -> None:
    otherwise = random.sample(ignored, len(ignored)) + ignored[:2]
    assert key_less(question, *otherwise) == key_less(question, *ignored)


@given(questions, ignored_paths, ignored_paths)
def test_another_list_of_ignored_members_is_another_key(question: Any, ignored: list[str], others: list[str]) -> None:
    """Even where the body has none of them: prices that other rules have stored are not found."""
    assert (key_less(question, *ignored) == key_less(question, *others)) == (set(ignored) == set(others))


@given(questions, texts.filter(lambda name: "." not in name), values)
def test_an_ignored_member_counts_neither_by_its_value_nor_by_its_absence(question: Any, name: str, new: Any) -> None:
    without = [{n: m for n, m in item.items() if n != name} for item in question]
    changed = [{**item, name: new} for item in question]
    assert key_less(question, name) == key_less(without, name) == key_less(changed, name)
    assert key_less(without) != key_less(changed)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
def test_a_seed_that_is_ignored_never_counts(body: Body) -> None:
    ignored = ("seed", "prompt.positive")
    one = key_less(body.items, *ignored)
    assert key_less([{**item, "seed": [0.5, {"x": None}]} for item in body.items], *ignored) == one
    assert key_less([{n: m for n, m in item.items() if n != "seed"} for item in body.items], *ignored) == one
    assert key_less([{**item, "steps": 99} for item in body.items], *ignored) != one
    assert key_less([{**item, "seed2": 1} for item in body.items], *ignored) != one
    assert key_less([*body.items, {}], *ignored) != one
    assert one != key(body.raw)


SAME_LESS_SEED_AND_PROMPT = {
    "another seed": ([{"seed": 1}], [{"seed": 2}]),
    "no seed": ([{"seed": 1}], [{}]),
    "a seed of null": ([{"seed": None}], [{}]),
    "a seed that is an object": ([{"seed": {"a": 1}}], [{"seed": [1]}]),
    "in the second item": ([{"a": 1}, {"seed": 1}], [{"a": 1}, {}]),
    "another prompt": ([{"prompt": {"positive": "x", "n": 1}}], [{"prompt": {"positive": "y", "n": 1}}]),
    "no positive": ([{"prompt": {"positive": "x"}}], [{"prompt": {}}]),
}
APART_LESS_SEED_AND_PROMPT = {
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


@pytest.mark.parametrize(("one", "other"), SAME_LESS_SEED_AND_PROMPT.values(), ids=SAME_LESS_SEED_AND_PROMPT)
def test_one_question_less_seed_and_prompt(one: Any, other: Any) -> None:
    assert key_less(one, "seed", "prompt.positive") == key_less(other, "seed", "prompt.positive")
    assert key_less(one) != key_less(other)


@pytest.mark.parametrize(("one", "other"), APART_LESS_SEED_AND_PROMPT.values(), ids=APART_LESS_SEED_AND_PROMPT)
def test_two_questions_less_seed_and_prompt(one: Any, other: Any) -> None:
    assert key_less(one, "seed", "prompt.positive") != key_less(other, "seed", "prompt.positive")


def test_a_path_may_be_long() -> None:
    bodies: list[Any] = [[{"a": {"b": {"c": {"d": value}, "c.d": 1}}}] for value in (1, [2])]
    assert len({key_less(body, "a.b.c.d") for body in bodies}) == 1
    assert len({key_less(body, "a.b.c.x", "b.c.d", "a.c.d") for body in bodies}) == 2
    assert present(canonicalise(plain(bodies[0])), ["a.b.c", "a.b.c.d", "a.b.c.d.e", "b.c.d"]) == ["a.b.c", "a.b.c.d"]


def test_numbers_beside_an_ignored_member_stay_exact() -> None:
    exact = [MIN, MIN + 1, MAX, MAX - 1, 2**53 + 1, 0.1, 5e-324, 1.5e300 / 1e300]
    keys = {key_less([{"seed": 1, "n": number}], "seed") for number in exact}
    assert len(keys) == len(exact)
    assert keys == {key_less([{"n": number}], "seed") for number in exact}


def test_no_ignored_member_is_none() -> None:
    assert key_less([{"seed": 1}]) == key(b'[{"seed":1}]')
    assert key_of(b'[{"seed":1}]', **FIELDS, ignored=[]) == key(b'[{"seed":1}]')


def test_the_key_of_a_question_less_some_members_is_what_it_was() -> None:
    """As its like for no ignored members."""
    question = [{"seed": 1, "steps": 20, "prompt": {"positive": "x", "negative": "y"}}]
    assert (
        key_less(question, "seed", "prompt.positive")
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
def test_ignored_members_that_a_body_has(body: Any, found: list[str]) -> None:
    assert present(canonicalise(plain(body)), ["prompt.positive", "seed"]) == found
    assert present(canonicalise(plain(body)), []) == []


@given(small_questions, st.lists(names, min_size=1, max_size=3).map(tuple))
def test_a_member_is_present_if_leaving_it_out_leaves_something_out(question: Any, path: Paths) -> None:
    shorter = [less(item, {path}) for item in question]
    member = ".".join(path)
    assert present(canonicalise(plain(question)), [member]) == ([member] if shorter != question else [])


# --- what is no question, and what is one only just -------------------------------------------------------------


def nested_arrays(depth: int) -> bytes:
    """A body of `depth` levels, of which two are its own array and the item in it."""
    return b'[{"a":' + b"[" * (depth - 2) + b"]" * (depth - 2) + b"}]"


def nested_objects(depth: int) -> bytes:
    return b"[" + b'{"a":' * (depth - 1) + b"0" + b"}" * (depth - 1) + b"]"


def with_number(number: str) -> bytes:
    return b'[{"a":%s}]' % number.encode()


REFUSED = {
    "nothing": b"",
    "white space only": b" \t\r\n",
    "an empty array": b"[]",
    "an object": b"{}",
    "a number": b"7",
    "a string": b'"x"',
    "an empty string": b'""',
    "null": b"null",
    "an array of a number": b"[1]",
    "an array of null": b"[null]",
    "an array of an array": b"[[]]",
    "an object and a number": b"[{},1]",
    "an object in an object": b'{"a":[{}]}',
    "NaN": with_number("NaN"),
    "Infinity": with_number("Infinity"),
    "-Infinity": with_number("-Infinity"),
    "NaN as an item": b"[NaN]",
    "1e400": with_number("1e400"),
    "-1e400": with_number("-1e400"),
    "1e400, hidden": b'[{"a":1e400,"a":1}]',
    "2**64": with_number(str(2**64)),
    "2**64 in an inner array": b'[{"a":[[18446744073709551616]]}]',
    "2**64 as a double": with_number("18446744073709551616.0"),
    "2**64 - 1 as a double, which is 2**64": with_number("18446744073709551615.0"),
    "-2**63 - 1": with_number(str(-(2**63) - 1)),
    "-2**63 - 1 in a body with a string": b'[{"\\"a":"\\\\","b":[0,-9223372036854775809]}]',
    "-2**63 - 1 after one that is hidden": b'[{"a":-9223372036854775809,"a":-9223372036854775809}]',
    "-2**63 - 1024, the last that a double takes for -2**63": with_number(str(-(2**63) - 1024)),
    "-2**63 - 1025": with_number(str(-(2**63) - 1025)),
    "-2**63 - 2048 as a double": with_number("-9223372036854777856.0"),
    "1e19 is below 2**64, 1e20 is not": with_number("1e20"),
    "400 digits": with_number("9" * 400),
    "5000 digits": with_number("9" * 5000),
    "5000 digits, hidden": b'[{"a":' + b"9" * 5000 + b',"a":1}]',
    "300 digits": with_number("9" * 300),
    "1.7e308": with_number("1.7e308"),
    "a high surrogate alone": rb'[{"a":"\ud800"}]',
    "a low surrogate alone": rb'[{"a":"\udc00"}]',
    "two high surrogates": rb'[{"a":"\ud83d\ud83d"}]',
    "surrogates the wrong way round": rb'[{"a":"\ude00\ud83d"}]',
    "a surrogate alone in a name": rb'[{"\ud800":1}]',
    "a surrogate alone, hidden": rb'[{"a":"\ud800","a":1}]',
    "a raw surrogate": b'[{"a":"\xed\xa0\x80"}]',
    "a raw pair of surrogates (CESU-8)": b'[{"a":"\xed\xa0\xbd\xed\xb8\x80"}]',
    "Latin-1": '[{"a":"é"}]'.encode("latin-1"),
    "an overlong form": b'[{"a":"\xc0\xaf"}]',
    "beyond Unicode": b'[{"a":"\xf4\x90\x80\x80"}]',
    "half a character": b'[{"a":"\xe2\x82"}]',
    "a byte order mark": b"\xef\xbb\xbf[{}]",
    "UTF-16": "[{}]".encode("utf-16"),
    "UTF-16, little-endian": "[{}]".encode("utf-16-le"),
    "UTF-32": "[{}]".encode("utf-32"),
    "100,000 brackets": b"[" * 100_000,
    "100,000 brackets, closed": b"[" * 100_000 + b"]" * 100_000,
    "100,000 objects": b'[{"a":' * 100_000,
    "50,000 brackets in a member": nested_arrays(50_000),
    "33 levels of arrays": nested_arrays(33),
    "33 levels of objects": nested_objects(33),
    "800 levels": nested_objects(800),
    "something after it": b"[{}] x",
    "a second body": b"[{}][{}]",
    "NUL after it": b"[{}]\0",
    "NUL in a string": b'[{"a":"\0"}]',
    "a line feed in a string": b'[{"a":"\n"}]',
    "a tab in a string": b'[{"a":"\t"}]',
    "U+001F in a name": b'[{"\x1f":1}]',
    "a vertical tab before it": b"\x0b[{}]",
    "a no-break space before it": "\u00a0[{}]".encode(),
    "single quotes": b"[{'a':1}]",
    "no quotes": b"[{a:1}]",
    "a comment": b"[{}/* */]",
    "a line comment": b"[{}] // so",
    "a comma after the last item": b"[{},]",
    "a comma after the last member": b'[{"a":1,}]',
    "two commas": b'[{"a":1,,"b":2}]',
    "no comma": b"[{}{}]",
    "no colon": b'[{"a" 1}]',
    "no value": b'[{"a":}]',
    "no name": b"[{:1}]",
    "a number for a name": b"[{1:1}]",
    "an unknown escape": rb'[{"a":"\x41"}]',
    "a short escape": rb'[{"a":"\u41"}]',
    "an escape of other letters": rb'[{"a":"\u00g0"}]',
    "a leading zero": with_number("01"),
    "a leading zero behind a sign": with_number("-01"),
    "a plus": with_number("+1"),
    "a sign alone": with_number("-"),
    "no digit before the point": with_number(".5"),
    "no digit after the point": with_number("1."),
    "no digit in the exponent": with_number("1e"),
    "hexadecimal": with_number("0x10"),
    "other digits": with_number("\u0661"),
    "a capital": with_number("True"),
    "Python's None": with_number("None"),
    "undefined": with_number("undefined"),
}

READ = {
    "white space around it": (b" \t\r\n[ {\n} ]\n", b"[{}]"),
    "2**64 - 1": (with_number(str(MAX)), with_number(str(MAX))),
    "-2**63": (with_number(str(MIN)), with_number(str(MIN))),
    "-2**63 as a double": (with_number("-9223372036854775808.0"), with_number(str(MIN))),
    "-2**63 with an exponent": (with_number("-9223372036854775808e0"), with_number(str(MIN))),
    "-2**63 from below, as a double": (with_number("-9223372036854775809.0"), with_number(str(MIN))),
    "-2**63 from below, with an exponent": (with_number("-9223372036854775809E0"), with_number(str(MIN))),
    "-2**63 - 1 in a string": (b'[{"a":"-9223372036854775809"}]', b'[{"a":"-9223372036854775809"}]'),
    "-2**63 - 1 behind a quote": (rb'[{"a":"\",-9223372036854775809,\\"}]', rb'[{"a":"\",-9223372036854775809,\\"}]'),
    "-2**63 - 1 as an exponent": (with_number("1e-9223372036854775809"), with_number("0")),
    "-2**63 - 1, hidden": (b'[{"a":-9223372036854775809,"a":1}]', b'[{"a":1}]'),
    "2**64, hidden": (b'[{"a":18446744073709551616,"a":1}]', b'[{"a":1}]'),
    "1e19": (with_number("1e19"), with_number("10000000000000000000")),
    "2**53 + 1": (with_number("9007199254740993"), with_number("9007199254740993")),
    "2**53 + 1 as a double": (with_number("9007199254740993.0"), with_number("9007199254740992")),
    "300 digits that an exponent takes back": (with_number("1" + "0" * 300 + "e-300"), with_number("1")),
    "an underflow": (with_number("-1e-400"), with_number("0")),
    "the smallest double": (with_number("4.94e-324"), with_number("5e-324")),
    "-0": (with_number("-0"), with_number("0")),
    "-0.0": (with_number("-0.0"), with_number("0")),
    "0 with a vast exponent": (with_number("0e99999999999999999999"), with_number("0")),
    "0.1 at length": (with_number("0.1000000000000000055511151231257827"), with_number("0.1")),
    "1e-5": (with_number("1e-5"), with_number("0.00001")),
    "1e-6": (with_number("0.000001"), with_number("1e-6")),
    "32 levels of arrays": (nested_arrays(32), nested_arrays(32)),
    "32 levels of objects": (nested_objects(32), nested_objects(32)),
    "the last of three": (b'[{"a":1,"b":0,"a":2,"\\u0061":3}]', b'[{"a":3,"b":0}]'),
    "an object hidden by another": (b'[{"a":{"b":1},"a":{"c":2}}]', b'[{"a":{"c":2}}]'),
    "names by code point": (
        '[{"\U0001f600":1,"\uffff":2,"é":3,"z":4,"Z":5,"":6}]'.encode(),
        '[{"":6,"Z":5,"z":4,"é":3,"\uffff":2,"\U0001f600":1}]'.encode(),
    ),
    "escapes": (
        rb'[{"a":"\u0022\u005c\/\u0008\u000c\u000a\u000d\u0009\u001f\u007f\u2028"}]',
        rb'[{"a":"\"\\/\b\f\n\r\t\u001f' + "\x7f\u2028".encode() + b'"}]',
    ),
    "NUL, escaped": (rb'[{"\u0000":"\u0000"}]', rb'[{"\u0000":"\u0000"}]'),
    "a pair of surrogates": (rb'[{"a":"\uD83D\uDE00"}]', '[{"a":"😀"}]'.encode()),
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED)
def test_refused(raw: bytes) -> None:
    assert reading(raw) is None
    assert strict_reading(raw) is None


@pytest.mark.parametrize(("raw", "canonical"), READ.values(), ids=READ)
def test_read(raw: bytes, canonical: bytes) -> None:
    assert reading(raw) == canonical
    assert strict_reading(raw) == canonical


def test_a_body_cut_short_is_refused_wherever_the_cut_is() -> None:
    assert reading(SAMPLE) == strict_reading(SAMPLE) is not None
    assert [end for end in range(len(SAMPLE)) if reading(SAMPLE[:end]) is not None] == []


@pytest.mark.parametrize("depth", [33, 900, 1000, 1015])
def test_the_depth_of_a_hidden_member_does_not_count(depth: int) -> None:
    """Not even where a body is looked at twice, for an integer that could be too small."""
    hidden = nested_arrays(depth)[2:-2]
    assert reading(b'[{%s,"a":-9223372036854775808}]' % hidden) == with_number(str(MIN))
    assert reading(b'[{%s,"a":-9223372036854775809}]' % hidden) is None


def test_an_unfinished_string_does_not_take_long() -> None:
    """A scan that begins anew at each of its quotes would: this much would take it hours."""
    assert reading(b'[{"a":-92233720368547,"b":"' + b'\\"' * 130_000) is None


def test_refusals_say_what_is_wrong() -> None:
    def detail(raw: bytes) -> str:
        with pytest.raises(BadRequest) as caught:
            canonicalise(raw)
        return caught.value.problem.detail

    assert "not valid JSON" in detail(b"[{]")
    assert "array of one or more" in detail(b"[]")
    assert "beyond 64 bits" in detail(with_number(str(2**64)))
    assert "beyond 64 bits" in detail(with_number(str(MIN - 1)))
    assert "deeper than 32" in detail(nested_objects(33))


# --- anything at all ----------------------------------------------------------------------------------------------


def judge(raw: bytes) -> None:
    assert reading(raw) == strict_reading(raw)


@given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda inside: b'[{"a":"' + inside + b'"}]'))
def test_bytes_have_one_reading_or_none(raw: bytes) -> None:
    judge(raw)


tokens = (
    st.sampled_from('[]{},:"\\0-e \n\ufeff')
    | st.sampled_from(['"a"', '"\\u0061"', '"\\ud83d\\ude00"', '"\\ud83d"', "true", "null", "NaN"])
    | st.sampled_from(["1", "7.0", ".5", "1e400", str(MAX), str(MAX + 1), str(MIN), str(MIN - 1)])
)


@settings(max_examples=300)
@given(st.lists(tokens, max_size=12).map("".join))
def test_tokens_have_one_reading_or_none(text: str) -> None:
    judge(text.encode())
    judge(b'[{"a":' + text.encode() + b"}]")


number_texts = st.from_regex(
    r"-?(0|[1-9][0-9]{0,25}|18446744073709[0-9]{6}|92233720368547[0-9]{5})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?",
    fullmatch=True,
)


@settings(max_examples=500)
@given(number_texts)
@example("-9223372036854776832")
def test_numbers_have_one_reading_or_none(number: str) -> None:
    judge(with_number(number))


@settings(max_examples=1000)
@given(st.sampled_from(BODIES), chances, st.integers(1, 3))
def test_damaged_bodies_have_one_reading_or_none(body: Body, random: Random, times: int) -> None:
    raw = bytearray(respell(body.items, random))
    for _ in range(times):
        start = random.randrange(len(raw) + 1)
        end = min(len(raw), start + random.choice([0, 1, 1, 2, 30]))
        raw[start:end] = random.choice(
            [
                b"",
                random.randbytes(1),
                raw[start:end] * 2,
                random.choices(b'[]{},:"\\0123456789.eE-+ \n' + hexdigits.encode()),
            ]
        )
    judge(bytes(raw))
