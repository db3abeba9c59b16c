"""The body of a purge: two forms, in which a body is parsed exactly as in an estimate."""

import json
import re
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bodies import BODIES, Body, respell
from proxy.cache.canonical import canonicalise
from proxy.gateway.purge import PurgeRequest, parse_purge
from proxy.problems import BadRequest, Code

READ = {
    "a whole book": (b'{"account":"studio","all":true}', PurgeRequest("studio", None)),
    "the default account's": (b'{"all":true}', PurgeRequest("default", None)),
    "spelled otherwise": (b' { "\\u0061ll" : true } \n', PurgeRequest("default", None)),
    "a question": (b'{"account":"studio","body":[{}]}', PurgeRequest("studio", b"[{}]")),
    "the default account's question": (b'{"body":[{}]}', PurgeRequest("default", b"[{}]")),
    "with a query": (
        b'{"account":"studio","body":[{}],"query":"type=image&x=%20"}',
        PurgeRequest("studio", b"[{}]", "type=image&x=%20"),
    ),
    "with no query": (b'{"body":[{}],"query":""}', PurgeRequest("default", b"[{}]")),
    "a body in another spelling": (
        b'{"body":[{"b":7.0,"a":{"d":-0.0,"c":"\\u00e9"}}]}',
        PurgeRequest("default", '[{"a":{"c":"é","d":0},"b":7}]'.encode()),
    ),
    "members of these names inside the body": (
        b'{"body":[{"all":true,"body":[{}],"account":1}]}',
        PurgeRequest("default", b'[{"account":1,"all":true,"body":[{}]}]'),
    ),
    "the last of two": (
        b'{"body":{},"body":[{}],"account":"a","account":"b"}',
        PurgeRequest("b", b"[{}]"),
    ),
    "any account": (b'{"account":"No Such One","all":true}', PurgeRequest("No Such One", None)),
}

REFUSED = {
    "nothing": b"",
    "no JSON": b"account=default&all=true",
    "cut short": b'{"account":"default","all":true',
    "Latin-1": b'{"account":"\xe9","all":true}',
    "a byte order mark": b'\xef\xbb\xbf{"all":true}',
    "half a character": rb'{"account":"\ud800","all":true}',
    "NaN": b'{"body":[{"a":NaN}]}',
    "null": b"null",
    "true": b"true",
    "a list": b"[]",
    "the bare body": b"[{}]",
    "the form in a list": b'[{"all":true}]',
    "no member": b"{}",
    "an account alone": b'{"account":"default"}',
    "all that is false": b'{"all":false}',
    "all that is null": b'{"all":null}',
    "all that is 1": b'{"all":1}',
    "all that is 1.0": b'{"all":1.0}',
    "all that is text": b'{"all":"true"}',
    "all, hidden": b'{"all":true,"all":false}',
    "All": b'{"All":true}',
    "all and a body": b'{"all":true,"body":[{}]}',
    "not all, but a body": b'{"all":false,"body":[{}]}',
    "all and a query": b'{"all":true,"query":""}',
    "all and more": b'{"all":true,"dry_run":true}',
    "a body and more": b'{"body":[{}],"key":"0"}',
    "a body and an unknown name of theirs": b'{"body":[{}],"Account":"default"}',
    "a body that is an object": b'{"body":{}}',
    "a body that is text": b'{"body":"[{}]"}',
    "a body that is null": b'{"body":null}',
    "a body of nothing": b'{"body":[]}',
    "a body of numbers": b'{"body":[1]}',
    "a body of lists": b'{"body":[[{}]]}',
    "an account of null": b'{"account":null,"all":true}',
    "an account of 1": b'{"account":1,"body":[{}]}',
    "an account of a list": b'{"account":["default"],"all":true}',
    "a query of null": b'{"body":[{}],"query":null}',
    "a query of an object": b'{"body":[{}],"query":{"type":"image"}}',
}


def refusal(raw: bytes) -> str:
    with pytest.raises(BadRequest) as caught:
        parse_purge(raw)
    problem = caught.value.problem
    assert problem.code is Code.INVALID_BODY
    assert problem.detail.isprintable()
    return problem.detail


@pytest.mark.parametrize(("raw", "wanted"), READ.values(), ids=READ)
def test_a_purge_is_parsed(raw: bytes, wanted: PurgeRequest) -> None:
    assert parse_purge(raw) == wanted


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED)
def test_any_other_document_is_refused(raw: bytes) -> None:
    refusal(raw)


@pytest.mark.parametrize("raw", [b"[]", b"{}", b'{"all":1}', b'{"body":{}}', b'{"body":[{}],"query":1}'])
def test_a_refusal_says_what_to_send(raw: bytes) -> None:
    detail = refusal(raw)
    assert '{"account":"default","body":[…]}' in detail
    assert '{"account":"default","all":true}' in detail


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
def test_a_body_is_parsed_as_in_an_estimate(body: Body) -> None:
    random = Random(body.name)
    for _ in range(3):
        raw = respell({"body": body.items, "account": "studio"}, random)
        assert parse_purge(raw) == PurgeRequest("studio", canonicalise(body.raw))


EXACT = {
    "-2**63": b"-9223372036854775808",
    "-2**63 + 1": b"-9223372036854775807",
    "-2**63 as a double": b"-9223372036854775809.0",
    "2**64 - 1": b"18446744073709551615",
    "2**53 + 1": b"9007199254740993",
    "a small fraction": b"5e-324",
    "-2**63 - 1 in a string": b'"-9223372036854775809"',
    "31 levels": b"[" * 30 + b"]" * 30,
}
INEXACT = {
    "-2**63 - 1": b"-9223372036854775809",
    "-2**63 - 1024": b"-9223372036854776832",
    "-2**63 - 1025": b"-9223372036854776833",
    "2**64": b"18446744073709551616",
    "2**64 as a double": b"18446744073709551615.0",
    "1e400": b"1e400",
    "400 digits": b"9" * 400,
    "33 levels": b"[" * 31 + b"]" * 31,
    "300 levels": b"[" * 300 + b"]" * 300,
    "1,000 levels": b"[" * 1000 + b"]" * 1000,
    "100,000 levels": b"[" * 100_000 + b"]" * 100_000,
}


@pytest.mark.parametrize("number", EXACT.values(), ids=EXACT)
def test_a_body_that_can_be_estimated_can_be_purged(number: bytes) -> None:
    body = b'[{"a":%s}]' % number
    assert parse_purge(b'{"body":%s}' % body).canonical == canonicalise(body)


@pytest.mark.parametrize("number", INEXACT.values(), ids=INEXACT)
def test_a_body_that_cannot_be_estimated_cannot_be_purged(number: bytes) -> None:
    body = b'[{"a":%s}]' % number
    with pytest.raises(BadRequest) as caught:
        canonicalise(body)
    assert without_position(refusal(b'{"body":%s}' % body)) == without_position(caught.value.problem.detail)


def without_position(detail: str) -> str:
    return re.sub(r": line \d+ column \d+ \(char \d+\)", "", detail)


texts = st.text(max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
forms = st.fixed_dictionaries(
    {},
    optional={
        "all": st.just(value=True) | values,
        "body": st.lists(st.dictionaries(texts, values, max_size=2), max_size=2) | values,
        "account": texts | values,
        "query": texts | values,
        "more": values,
    },
)


def has_valid_form(form: dict[str, Any]) -> bool:
    """Whether the document has one of the two forms, written independently of the code."""
    is_text = all(isinstance(form.get(name, ""), str) for name in ("account", "query"))
    body = form.get("body")
    is_body = isinstance(body, list) and body != [] and all(isinstance(item, dict) for item in body)
    whole_book = form.get("all") is True and set(form) in ({"all"}, {"all", "account"})
    question = is_body and {"body"} <= set(form) <= {"body", "account", "query"}
    return is_text and (whole_book or question)


@given(forms)
def test_a_document_is_parsed_if_it_has_one_of_the_two_forms(form: dict[str, Any]) -> None:
    raw = json.dumps(form).encode()
    if not has_valid_form(form):
        refusal(raw)
        return
    canonical = canonicalise(json.dumps(form["body"]).encode()) if "body" in form else None
    assert parse_purge(raw) == PurgeRequest(form.get("account", "default"), canonical, form.get("query", ""))
