"""JSON values of every kind, and questions made of them: how they are spelled plainly, and the key they get."""

import json
import math
from random import Random
from typing import Any

from hypothesis import strategies as st

from canonical_model import MAX, MIN
from proxy.cache.canonical import canonicalise, key_of

FIELDS = {"origin": "https://api.example", "account": "default", "path": "/pub/v1/generations/estimate", "query": ""}


def key(raw: bytes) -> str:
    return key_of(canonicalise(raw), **FIELDS)


def plain(value: Any) -> bytes:
    return json.dumps(value).encode()


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
