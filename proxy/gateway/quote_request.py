"""Reads the body of `POST /v1/quote`: variants, or a grid of variants, and the questions that price them.

The body has one of two forms:

* `{"variants":[{"label":"a","body":[…]}, …]}`
* `{"base":[…],"vary":{"quality":["Regular","Plus"],"steps":[20,30]}}`: every combination, the last path fastest.

Both take `breakdown` (`items` or `members`) and `quantity`. Variants are made one by one, so that the caller can do
something else in between. Their number and the size of all questions are limited.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, Literal

import orjson

from proxy.cache.canonical import canonical_items, load
from proxy.cache.generation import mode_of
from proxy.problems import BadRequest, Code

MAX_VARIANTS = 64
MAX_QUESTIONS = 256
"""Distinct questions in a call: what a call can take from a team's rate, and can ask RenderNet."""

MAX_QUESTION_BYTES = 4 * 2**20
"""All bodies of a call together: a grid of a large body would take much memory and CPU time otherwise."""

MAX_QUANTITY = 10**6
MAX_LABEL_CHARACTERS = 200
"""Limits the labels of `variants`. Those of a grid are as long as its paths and values."""

Breakdown = Literal["items", "members"]

_FORMS = (
    'Send {"variants":[{"label":"a","body":[…]}, …]} to price bodies, or {"base":[…],"vary":{"steps":[20,30]}} to '
    "price every combination of these values."
)
_OPTIONS = {"breakdown", "quantity"}


@dataclass(frozen=True, slots=True)
class Line:
    """A question that explains the price of a variant.

    part: the index of the item that is asked alone, or the name of the member that is left out.
    mode_changes: without the member, another mode wins in an item.
    """

    part: int | str
    canonical: bytes
    mode_changes: bool = False


@dataclass(frozen=True, slots=True)
class Variant:
    """A body to price. `changes`: the members that a grid sets in it, as JSON values."""

    label: str
    canonical: bytes
    changes: Sequence[Mapping[str, Any]] = ()
    lines: Sequence[Line] = ()


@dataclass(frozen=True, slots=True)
class QuoteRequest:
    """A valid quote, except for its bodies.

    quantity: None if the client gave none.
    bodies: with their labels; or base and vary: the body of a grid, and the values of each path.
    """

    breakdown: Breakdown | None
    quantity: int | None
    bodies: Sequence[tuple[str, Any]] = ()
    base: bytes = b""
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def variants(self) -> Iterator[Variant]:
        """The variants in order. Raises `BadRequest` for a body that is invalid, and if they are too large together."""
        size = 0
        for variant in self._whole():
            self._check_size(size + _lines_size(variant, self.breakdown))
            lines = _lines_of(variant, self.breakdown)
            size += len(variant.canonical) + sum(len(line.canonical) for line in lines)
            self._check_size(size)
            yield Variant(variant.label, variant.canonical, variant.changes, lines)

    def _whole(self) -> Iterator[Variant]:
        """The variants without their lines."""
        for label, body in self.bodies:
            yield Variant(label, _canonical(body, f"Variant {label!r}"))
        if not self.vary:
            return
        largest = sum(max(len(orjson.dumps(value)) for value in values) for values in self.vary.values())
        self._check_size(largest * len(orjson.loads(self.base)))
        for values in product(*self.vary.values()):
            setting = dict(zip(self.vary, values, strict=True))
            items = orjson.loads(self.base)
            changes = [_set(items, path, value) for path, value in setting.items()]
            label = ", ".join(f"{path}={_text(value)}" for path, value in setting.items())
            yield Variant(label, _canonical(items, f"Variant {label!r}"), changes)

    def _check_size(self, size: int) -> None:
        if size > MAX_QUESTION_BYTES:
            raise _bad(
                f"The bodies of this quote's questions have more than {MAX_QUESTION_BYTES} bytes together: send fewer "
                "variants, or leave out the breakdown."
            )


def read_quote(raw: bytes) -> QuoteRequest:
    """Reads the body of a request. Raises `BadRequest` (`invalid-body`) unless it has one of the two forms."""
    document = load(raw)
    if isinstance(document, list):
        raise _bad(f"The body is an array, as for an estimate. {_FORMS}")
    if not isinstance(document, dict) or ("variants" in document) == ("base" in document or "vary" in document):
        raise _bad(_FORMS)
    allowed = _OPTIONS | ({"variants"} if "variants" in document else {"base", "vary"})
    if unknown := sorted(document.keys() - allowed):
        raise _bad(f"The quote has an unknown member {unknown[0]!r}: it can have {', '.join(sorted(allowed))}.")
    breakdown, quantity = _breakdown(document), _quantity(document)
    if "variants" in document:
        return QuoteRequest(breakdown, quantity, bodies=_bodies(document["variants"]))
    return QuoteRequest(
        breakdown, quantity, base=_canonical(document.get("base"), "base"), vary=_vary(document.get("vary"))
    )


def _breakdown(document: Mapping[str, Any]) -> Breakdown | None:
    breakdown: Breakdown | None = document.get("breakdown")
    if breakdown not in (None, "items", "members"):
        raise _bad('breakdown must be "items" (each item alone) or "members" (the body without each member).')
    return breakdown


def _quantity(document: Mapping[str, Any]) -> int | None:
    quantity = document.get("quantity")
    if quantity is not None and not (type(quantity) is int and 1 <= quantity <= MAX_QUANTITY):
        raise _bad(f"quantity must be a whole number from 1 to {MAX_QUANTITY}.")
    return quantity


def _bodies(variants: Any) -> list[tuple[str, Any]]:
    if not isinstance(variants, list) or not variants:
        raise _bad(f"variants must be an array of 1 to {MAX_VARIANTS} objects with label and body.")
    _check_number(len(variants), "The quote has")
    bodies: dict[str, Any] = {}
    for index, variant in enumerate(variants):
        if not isinstance(variant, dict) or variant.keys() != {"label", "body"}:
            raise _bad(f'The variant at index {index} must be an object like {{"label":"a","body":[…]}}.')
        label = variant["label"]
        if not isinstance(label, str) or not 1 <= len(label) <= MAX_LABEL_CHARACTERS:
            raise _bad(f"The label at index {index} must be a string of 1 to {MAX_LABEL_CHARACTERS} characters.")
        if label in bodies:
            raise _bad(f"Two variants have the label {label!r}: give each its own.")
        bodies[label] = variant["body"]
    return list(bodies.items())


def _vary(vary: Any) -> dict[str, list[Any]]:
    if not isinstance(vary, dict) or not vary:
        raise _bad('vary must be an object of paths and their values, such as {"quality":["Regular","Plus"]}.')
    for path, values in vary.items():
        if not all(path.split(".")):
            raise _bad(f"vary has the path {path!r}: a path is a member's name, or several with dots between them.")
        if not isinstance(values, list) or not values:
            raise _bad(f"vary must have an array of one or more values for {path!r}.")
        texts = [_text(value) for value in values]
        if len(set(texts)) < len(texts):
            raise _bad(f"vary has a value of {path!r} twice, and so two variants with one label: leave one out.")
    _check_number(prod(map(len, vary.values())), "The grid makes")
    return vary


def _check_number(variants: int, beginning: str) -> None:
    if variants > MAX_VARIANTS:
        raise _bad(f"{beginning} {variants} variants, and at most {MAX_VARIANTS} are allowed: send several quotes.")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _canonical(body: Any, place: str) -> bytes:
    try:
        return canonical_items(body)
    except BadRequest as error:
        raise _bad(f"{place}: {error.problem.detail}") from None


def _set(items: Sequence[dict[str, Any]], path: str, value: Any) -> dict[str, Any]:
    """Sets a member in each item that has its parent, and returns the change. Raises `BadRequest` if none has it."""
    *parents, name = path.split(".")
    found = [parent for item in items if _has_place(parent := _below(item, parents), name)]
    if not found:
        raise _bad(
            f"vary sets {path!r}, but no item of base has its parent, {'.'.join(parents)!r}: add it to base, or "
            "correct the path."
        )
    is_added = any(isinstance(parent, dict) and name not in parent for parent in found)
    for parent in found:
        parent[name if isinstance(parent, dict) else int(name)] = value
    return {"path": path, "value": value, **({"added": True} if is_added else {})}


def _below(value: Any, names: Sequence[str]) -> Any:
    """What a path leads to; None if there is nothing."""
    for name in names:
        match value:
            case dict():
                value = value.get(name)
            case list() if _is_index(value, name):
                value = value[int(name)]
            case _:
                return None
    return value


def _has_place(parent: Any, name: str) -> bool:
    return isinstance(parent, dict) or (isinstance(parent, list) and _is_index(parent, name))


def _is_index(elements: list[Any], name: str) -> bool:
    """Whether `name` is the index of an element."""
    is_number = name.isascii() and name.isdigit() and len(name) <= len(str(MAX_QUESTION_BYTES))
    return is_number and int(name) < len(elements)


def _lines_size(variant: Variant, breakdown: Breakdown | None) -> int:
    """An upper bound of the size of the variant's questions, before they are made."""
    if breakdown != "members":
        return len(variant.canonical)
    return len(variant.canonical) * len(_members(orjson.loads(variant.canonical)))


def _lines_of(variant: Variant, breakdown: Breakdown | None) -> Sequence[Line]:
    if breakdown is None:
        return ()
    items = orjson.loads(variant.canonical)
    if breakdown == "items":
        return [Line(index, _dump([item])) for index, item in enumerate(items)]
    lines = []
    for member in _members(items):
        rest = [{name: value for name, value in item.items() if name != member} for item in items]
        mode_changes = any(mode_of(before)[0] != mode_of(after)[0] for before, after in zip(items, rest, strict=True))
        lines.append(Line(member, _dump(rest), mode_changes))
    return lines


def _members(items: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """The names of the items' members, sorted."""
    return sorted({name for item in items for name in item})


def _dump(items: Sequence[Any]) -> bytes:
    return orjson.dumps(items, option=orjson.OPT_SORT_KEYS)


def _bad(detail: str) -> BadRequest:
    return BadRequest(Code.INVALID_BODY, detail)
