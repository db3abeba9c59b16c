"""The documents and headers of all problems, compared with the documented table."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import problems
from proxy.problems import BadRequest, Code, Outcome, Problem, ProxyError

DOCUMENTED = {
    "invalid-body": (400, "invalid"),
    "invalid-request": (400, "invalid"),
    "invalid-query": (400, "invalid"),
    "unknown-token": (401, "unauthenticated"),
    "team-disabled": (403, "team-disabled"),
    "forbidden": (403, "unauthenticated"),
    "not-found": (404, "invalid"),
    "method-not-allowed": (405, "invalid"),
    "body-too-large": (413, "invalid"),
    "headers-too-large": (431, "invalid"),
    "not-implemented": (501, "invalid"),
    "version-not-supported": (505, "invalid"),
    "unsupported-media-type": (415, "invalid"),
    "rate-limited": (429, "rate-limited"),
    "quota-exceeded": (402, "quota-exceeded"),
    "over-ceiling": (402, "over-ceiling"),
    "internal-error": (500, "internal-error"),
    "upstream-error": (502, "upstream-error"),
    "upstream-refused": (502, "upstream-refused"),
    "unpriced": (502, "unpriced"),
    "upstream-busy": (503, "upstream-busy"),
    "overloaded": (503, "overloaded"),
    "draining": (503, "cancelled"),
    "store-unavailable": (503, "store-unavailable"),
    "upstream-timeout": (504, "upstream-timeout"),
    "not-cached": (504, "not-cached"),
}

TYPES = {"quota-exceeded": "https://iana.org/assignments/http-problem-types#quota-exceeded"}

every_code = pytest.mark.parametrize("code", Code)


def headers(problem: Problem) -> dict[bytes, bytes]:
    pairs = problem.headers
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_the_codes_are_those_documented() -> None:
    assert {str(code) for code in Code} == set(DOCUMENTED)


@every_code
def test_status_and_outcome_of_a_problem(code: Code) -> None:
    problem = Problem(code, "Do something else.")
    assert (problem.status, problem.outcome) == DOCUMENTED[code]


@every_code
def test_a_document_is_both_a_problem_and_an_error_envelope(code: Code) -> None:
    document = json.loads(Problem(code, "Do something else.").document("req-1"))
    title = document.pop("title")
    assert document == {
        "type": TYPES.get(code.value, f"urn:estimate-proxy:problem:{code.value}"),
        "status": DOCUMENTED[code][0],
        "detail": "Do something else.",
        "request_id": "req-1",
        "data": None,
        "error": {"code": code.value, "message": "Do something else."},
    }
    assert title[0].isupper()
    assert 10 < len(title) < 60


def test_a_problem_may_have_more_members_and_another_status() -> None:
    problem = Problem(Code.QUOTA_EXCEEDED, "Wait.", members={"quota": {"limit": 5}}, other_status=429)
    document = json.loads(problem.document("req-1"))
    assert (problem.status, document["status"], document["quota"]) == (429, 429, {"limit": 5})


def test_each_code_has_its_own_title() -> None:
    titles = {json.loads(Problem(code, "").document(""))["title"] for code in Code}
    assert len(titles) == len(Code)


@given(st.text(), st.from_regex(r"[A-Za-z0-9._-]{1,128}", fullmatch=True))
def test_any_text_is_encoded_correctly(detail: str, request_id: str) -> None:
    document = json.loads(Problem(Code.INTERNAL_ERROR, detail).document(request_id))
    assert (document["detail"], document["error"]["message"], document["request_id"]) == (detail, detail, request_id)


@every_code
def test_problems_are_never_cached(code: Code) -> None:
    expected = {b"content-type": b"application/problem+json", b"cache-control": b"no-store"}
    if code == "unknown-token":
        expected[b"www-authenticate"] = b"Bearer"
    if DOCUMENTED[code][0] == 503:
        expected[b"retry-after"] = b"1"
    assert headers(Problem(code, "")) == expected


def test_additional_fields_are_sent() -> None:
    problem = Problem(Code.METHOD_NOT_ALLOWED, "", fields=((b"allow", b"GET, HEAD"),))
    assert headers(problem)[b"allow"] == b"GET, HEAD"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(None, b"1"), (0, b"0"), (1, b"1"), (3600, b"3600"), (3601, None), (10**64, None)]
)
def test_only_waits_of_up_to_an_hour_are_sent(seconds: int | None, expected: bytes | None) -> None:
    problem = Problem(Code.UPSTREAM_BUSY, "", retry_after_s=seconds)
    assert headers(problem).get(b"retry-after") == expected


def test_a_bad_request_carries_its_problem() -> None:
    error = BadRequest(Code.INVALID_REQUEST, "Send one token.")
    assert error.problem == Problem(Code.INVALID_REQUEST, "Send one token.")
    assert str(error) == "Send one token."


def subclasses(tree: type[Exception], level: int) -> Iterator[str]:
    for kind in sorted(tree.__subclasses__(), key=lambda kind: kind.__name__):
        yield "    " * level + kind.__name__
        yield from subclasses(kind, level + 1)


def test_the_docstring_draws_the_tree_of_exceptions() -> None:
    drawn = [line.split("── ")[1].split()[0] for line in (problems.__doc__ or "").splitlines() if "── " in line]
    assert (
        drawn
        == [name.strip() for name in subclasses(ProxyError, 0)]
        == [
            "BadRequest",
            "ClientGone",
            "Overloaded",
            "StoreUnavailable",
            "StoreOutcomeUnknown",
        ]
    )


def test_each_problem_has_an_outcome() -> None:
    assert {Problem(code, "").outcome for code in Code} <= set(Outcome)
