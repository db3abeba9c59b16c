"""What `estimate-proxy quote` reads: a quote document, one body, or a plan of bodies, one a line (JSON Lines)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

MAX_VARIANTS = 64
"""Of one call: see `proxy.gateway.quote_request`."""

MAX_CALL_BYTES = 200_000
"""Of the lines in one call. The default of `server.max_body_bytes` is 262,144."""


class BadInput(Exception):  # noqa: N818 -- named as `BadRequest` is
    """What is wrong with the file."""


@dataclass(frozen=True, slots=True)
class Body:
    """A line of a plan, or the only body. `text` is sent as it is."""

    label: str
    text: bytes


@dataclass(frozen=True, slots=True)
class Input:
    """Either a quote document, whose variants are alternatives, or bodies, which are all planned."""

    document: bytes | None = None
    bodies: Sequence[Body] = ()


def read_input(raw: bytes) -> Input:
    """Raises `BadInput`."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return Input(bodies=_lines(raw, error))
    match value:
        case list():
            return Input(bodies=[Body("body", raw.strip())])
        case {"variants": _} | {"base": _} | {"vary": _}:
            return Input(document=raw)
    raise BadInput("it is neither a quote document (variants, or base and vary) nor a body (an array of objects)")


def calls_of(bodies: Sequence[Body]) -> Iterator[Sequence[Body]]:
    """The bodies of each call."""
    batch: list[Body] = []
    size = 0
    for body in bodies:
        if batch and (len(batch) == MAX_VARIANTS or size + len(body.text) > MAX_CALL_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(body)
        size += len(body.text)
    yield batch


def document_of(bodies: Sequence[Body]) -> bytes:
    """The quote document of these bodies, which stay as they were written."""
    variants = [b'{"label":%b,"body":%b}' % (orjson.dumps(body.label), body.text) for body in bodies]
    return b'{"variants":[%b]}' % b",".join(variants)


def _lines(raw: bytes, error: orjson.JSONDecodeError) -> list[Body]:
    lines = [(number, line.strip()) for number, line in enumerate(raw.split(b"\n"), 1)]
    bodies = [_body(number, line) for number, line in lines if line]
    if len(bodies) == 0:
        raise BadInput(f"it is not JSON: {error}")
    return bodies


def _body(number: int, line: bytes) -> Body:
    try:
        value: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"line {number} is not JSON: {error}") from None
    if not isinstance(value, list):
        raise BadInput(f"line {number} is not a body: each line of a plan is an array of generation objects")
    return Body(f"line {number}", line)
