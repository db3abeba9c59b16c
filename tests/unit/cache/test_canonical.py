"""Canonical JSON: of generated values, compared with RFC 8785, and of bodies as clients spell them."""

import json
import math
import unicodedata
from collections.abc import Iterator
from itertools import combinations
from random import Random
from typing import Any

import orjson
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from bodies import BODIES, Body, respell
from canonical_model import meaning, strict_reading
from examples import count, examples
from json_values import chances, key, plain, questions, texts, values
from proxy.cache.canonical import canonicalise

# --- values of every kind -------------------------------------------------------------------------------------


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
def test_two_values_have_the_same_bytes_only_if_they_are_equal(one: Any, other: Any) -> None:
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
def test_changing_any_value_changes_the_key(question: Any, new: Any) -> None:
    others = [other for other in neighbours(question, new) if is_question(other)]
    assert len(others) > len(question)
    assert key(plain(question)) not in {key(plain(other)) for other in others}


composed = st.lists(st.sampled_from("éÅñ각ガỆ"), min_size=1, max_size=4).map("".join)


@given(composed)
def test_unicode_forms_are_different_values(text: str) -> None:
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


def test_it_equals_rfc_8785_where_both_apply() -> None:
    seen = skipped = fractional = 0

    @examples(5)
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
    assert seen >= count(5)
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


def test_two_bodies_have_the_same_key_only_if_they_are_one_question() -> None:
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
