"""Reduces a body to what is learned from it: its scope, and the values and classes of its leaves.

* A leaf is a member that is not an object or array, or an empty one. Its path goes through arrays: `0.loras.1.weight`.
* A scope is all bodies with the same items, modes, models and leaf paths, asked with the same query string and the same
  ignored members. Ignored members are removed first.
* A setting is all bodies of a scope that have the same values in the leaves that count, and values of the same classes
  in the leaves that are left out. `lua/learned_observe.lua` computes the same id.
* Classes: each sentinel (null, booleans, 0, -1, "" and empty containers) is a class of its own. Other numbers form four
  classes: by sign, and by whether they are whole. Strings that spell a number have the same classes, apart from those
  of numbers. All other strings are one class.
"""

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from hashlib import blake2b, sha1
from math import isfinite
from typing import Any, NamedTuple

import orjson

from proxy.cache.canonical import remove_members
from proxy.cache.generation import mode_of

MAX_LEAVES = 128
"""Limits what is kept for a scope, and the work for one answer. Bodies with more leaves are not learned from."""

FORMAT = 1
"""The version of scopes and settings. It is part of a scope's id, so a new format does not find older evidence."""

MAX_PATH_CHARACTERS = 8192
"""Limits the paths of a body's leaves together, for the same reason."""

MAX_SHOWN_NAME = 64
"""Longer names of models are cut where they are shown. The whole name belongs to the scope."""

MAX_TEXT = 22
"""Longer strings are replaced by a digest of this length."""

MAX_SPELLED_NUMBER = 64
"""Characters; a longer string of digits counts as a string."""

LEFT_OUT = "1"

_CONSTANTS = {None: "null", False: "false", True: "true"}
_NEVER_LEFT_OUT_SUFFIXES = ("_id", "_ids", "_url")
_SPELLS_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


class Reduced(NamedTuple):
    """A body as far as it is learned from.

    scope: its id. items: of each item the mode that wins, and its name.
    paths: of the leaves, in order. never_left_out: for each leaf, whether its value always counts.
    """

    scope: str
    items: tuple[str, ...]
    paths: tuple[str, ...]
    values: tuple[Any, ...]
    never_left_out: tuple[bool, ...]


class LeafClass(NamedTuple):
    """The class of a value, with what its range is measured by.

    is_sentinel: the class is the value.
    number: the value, or the number that a string spells. length: of a string.
    """

    name: str
    is_sentinel: bool
    number: float | None = None
    length: int | None = None


def reduce(
    canonical: bytes, *, query: str, ignored: tuple[str, ...], never_learn: Collection[str] = ()
) -> Reduced | None:
    """The reduced body; None if it cannot be learned from.

    That is so if the paths of its leaves are ambiguous (a member name with a dot, or of digits only), or too many.
    """
    items = orjson.loads(canonical)
    if ignored:
        remove_members(items, ignored)
    paths: list[str] = []
    values: list[Any] = []
    if not all(_collect(item, str(index), paths, values) for index, item in enumerate(items) if item):
        return None
    if len(paths) > MAX_LEAVES or sum(map(len, paths)) > MAX_PATH_CHARACTERS:
        return None
    modes = [mode_of(item) for item in items]
    of_leaves = tuple(paths)
    return Reduced(
        _scope_id(query, ignored, modes, of_leaves),
        tuple(mode if name is None else f"{mode} {name[:MAX_SHOWN_NAME]}" for mode, name in modes),
        of_leaves,
        tuple(values),
        _never_left_out(of_leaves, frozenset(never_learn)),
    )


def text_of(value: Any) -> str:
    """A text that only equal values have. It has no line break, and no `~`, which begins a class, at its start."""
    if type(value) is str:
        if len(value) <= MAX_TEXT and value.isascii() and value.isprintable():
            return '"' + value
        return "#" + blake2b(value.encode(), digest_size=MAX_TEXT // 2).hexdigest()
    return _CONSTANTS[value] if value is None or type(value) is bool else repr(value)


def class_of(value: Any) -> LeafClass:
    kind = type(value)
    if kind is str:
        return _class_of_string(value)
    if kind is int or kind is float:
        if value in (0, -1):
            return LeafClass(repr(value), is_sentinel=True)
        return LeafClass(_class_of_number(value), is_sentinel=False, number=float(value))
    return LeafClass(text_of(value), is_sentinel=True)


def setting_id(reduced: Reduced, left_out: str) -> str:
    """The id of a body's setting.

    left_out: a character for each leaf, `LEFT_OUT` if it is left out.
    """
    parts = [
        "~" + class_of(value).name if mark == LEFT_OUT else text_of(value)
        for value, mark in zip(reduced.values, left_out, strict=True)
    ]
    parts.insert(0, left_out)
    return sha1("\n".join(parts).encode(), usedforsecurity=False).hexdigest()[:24]


def _scope_id(
    query: str, ignored: tuple[str, ...], modes: Sequence[tuple[str, str | None]], paths: Sequence[str]
) -> str:
    described = orjson.dumps([FORMAT, query, sorted(set(ignored)), modes, paths])
    return blake2b(described, digest_size=12).hexdigest()


def _collect(value: Any, path: str, paths: list[str], values: list[Any]) -> bool:
    """Appends the leaves of a value. Returns False if their paths would be ambiguous."""
    if type(value) is dict and value:
        for name, member in value.items():
            if "." in name or name.isdecimal() or not _collect(member, f"{path}.{name}", paths, values):
                return False
        return True
    if type(value) is list and value:
        return all(_collect(member, f"{path}.{index}", paths, values) for index, member in enumerate(value))
    paths.append(path)
    values.append(value)
    return True


@lru_cache(maxsize=1024)
def _never_left_out(paths: tuple[str, ...], never_learn: frozenset[str]) -> tuple[bool, ...]:
    return tuple(_always_counts(path, never_learn) for path in paths)


def _always_counts(path: str, never_learn: frozenset[str]) -> bool:
    """Whether a leaf is, or is in, a member that is never left out.

    `never_learn` may leave array indices out: `loras.weight` is the weight of each LoRA.
    """
    _, *names = path.split(".")
    if any(name == "id" or name.endswith(_NEVER_LEFT_OUT_SUFFIXES) for name in names):
        return True
    if not never_learn:
        return False
    without_indices = [name for name in names if not name.isdecimal()]
    return any(
        ".".join(some[:length]) in never_learn
        for some in (names, without_indices)
        for length in range(1, len(some) + 1)
    )


def _class_of_number(number: float) -> str:
    return ("-" if number < 0 else "+") + ("i" if float(number).is_integer() else "f")


def _class_of_string(value: str) -> LeafClass:
    if not value:
        return LeafClass('"', is_sentinel=True)
    length = len(value)
    if length <= MAX_SPELLED_NUMBER and _SPELLS_NUMBER.fullmatch(value):
        number = float(value)
        if number in (0, -1):
            return LeafClass(f'"{number:g}', is_sentinel=True, length=length)
        if isfinite(number):
            return LeafClass('"' + _class_of_number(number), is_sentinel=False, number=number, length=length)
    return LeafClass("s", is_sentinel=False, length=length)
