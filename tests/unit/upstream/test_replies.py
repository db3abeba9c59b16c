"""How upstream's responses are classified: each row of the error table, and numbers that keep their spelling.

Also the encoding of failures that a leader shares with waiting processes.
"""

import json
from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bodies import respell
from proxy.cache.prices import Price
from proxy.problems import Code, Problem
from proxy.upstream.replies import (
    MAX_FAILURE_BYTES,
    MAX_RETRY_AFTER_S,
    Failed,
    Priced,
    Rejected,
    Reply,
    Unpriced,
    decode_failure,
    encode_failure,
    read_reply,
    rejection_of,
    retry_after_seconds,
)

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
SECRET = r'rn/"canary\+key'
ANSWER = b'{"data":{"estimated":5,"balance":20},"error":{}}'
PAGE = b"<!doctype html><title>Attention required</title>"
GOOD_STATUSES = [200, 201, 299, 400, 404, 409, 422, 499]


def reply(status: int, body: bytes, *, retry_after: str | None = None) -> Reply:
    headers = {} if retry_after is None else {"retry-after": retry_after}
    return read_reply(status, body, headers=headers, secret=SECRET, now=NOW)


def failure(status: int, body: bytes) -> Code:
    failed = reply(status, body)
    assert isinstance(failed, Failed)
    assert failed.upstream_status == status
    assert failed.problem.retry_after_s is None
    return failed.problem.code


# --- what cannot be shown ---------------------------------------------------------------------------------------

BROKEN = {
    "500": (500, ANSWER),
    "500 with an envelope": (500, b'{"data":null,"error":{"code":500,"message":"boom"}}'),
    "502 page": (502, PAGE),
    "503": (503, b"{}"),
    "500 with our key refused in it": (500, b'{"error":{"code":401}}'),
    "599": (599, ANSWER),
    "600": (600, ANSWER),
    "page as 200": (200, PAGE),
    "page as 400": (400, PAGE),
    "page as 401": (401, PAGE),
    "page as 403": (403, PAGE),
    "page as 404": (404, PAGE),
    "204": (204, b""),
    "200 and nothing": (200, b""),
    "200 and space": (200, b"  "),
    "300": (300, ANSWER),
    "301": (301, ANSWER),
    "302 page": (302, PAGE),
    "304": (304, b""),
    "399": (399, ANSWER),
    "199": (199, ANSWER),
    "cut short": (200, ANSWER[:-1]),
    "something behind it": (200, ANSWER + b"x"),
    "NaN": (200, b'{"data":{"estimated":NaN},"error":{}}'),
    "Infinity": (400, b'{"error":{"code":-Infinity}}'),
    "byte order mark": (200, b"\xef\xbb\xbf" + ANSWER),
    "UTF-16": (200, ANSWER.decode().encode("utf-16")),
    "Latin-1": (200, b'{"data":{"estimated":5,"note":"\xe9"}}'),
    "half a surrogate pair": (200, rb'{"data":{"estimated":5,"note":"\ud83d"}}'),
    "half a surrogate pair in a name": (404, rb'{"\ud83d":1}'),
    "100,000 brackets": (200, b"[" * 100_000 + b"]" * 100_000),
    "500 levels": (400, b"[" * 500 + b"]" * 500),
    "control character": (200, b'{"data":{"estimated":5,"note":"\n"}}'),
    "single quotes": (200, b"{'data':{'estimated':5}}"),
}


@pytest.mark.parametrize(("status", "body"), BROKEN.values(), ids=BROKEN)
def test_a_response_that_is_not_an_answer_is_an_upstream_error(status: int, body: bytes) -> None:
    assert failure(status, body) is Code.UPSTREAM_ERROR


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, b"{}"),
        (401, b"null"),
        (403, b"[]"),
        (403, ANSWER),
        (401, b'{"err":{"code":400,"message":"no"}}'),
        (200, b'{"data":{"estimated":5,"balance":20},"error":{"code":401,"message":"no"}}'),
        (200, b'{"data":null,"error":{"code":"401","message":"no"}}'),
        (200, b'{"data":null,"err":{"code":403}}'),
        (400, b'{"error":{"code":403}}'),
        (404, b'{"err":{"code":"403"},"error":{}}'),
        (422, b'{"err":{"code":401},"error":{"code":422}}'),
    ],
)
def test_a_refusal_of_our_key_is_never_passed_on(status: int, body: bytes) -> None:
    assert failure(status, body) is Code.UPSTREAM_REFUSED


@pytest.mark.parametrize("body", [ANSWER, PAGE, b"", b'{"error":{"code":401}}', SECRET.encode()])
@pytest.mark.parametrize(("header", "seconds"), [("7", 7), ("Sun, 22 Nov 2026 12:01:30 GMT", 90), ("soon", None)])
def test_a_429_is_busy_whatever_its_body(body: bytes, header: str, seconds: int | None) -> None:
    busy = reply(429, body, retry_after=header)
    assert isinstance(busy, Failed)
    assert busy.upstream_status == 429
    assert (busy.problem.code, busy.problem.retry_after_s) == (Code.UPSTREAM_BUSY, seconds)


@pytest.mark.parametrize("status", [400, 402, 404, 405, 409, 413, 422, 428, 430, 451, 499])
@pytest.mark.parametrize(
    "body",
    [
        b'{"data":null,"error":{"code":422,"message":"steps"}}',
        b' {"err" : {"code": "4010", "n": 1.50}, "err2": "\\u00e9"} \n',
        b'{"error":"401"}',
        b'{"error":{"code":[401]},"err":{"code":{"401":null}}}',
        b'{"data":{"code":401},"code":403,"error":[{"code":401}]}',
        b"[]",
        b'"no"',
        b"null",
        b"401",
        b'{"a":1,"a":2}',
    ],
)
def test_a_rejection_of_the_body_is_passed_through_unchanged(status: int, body: bytes) -> None:
    assert reply(status, body) == Rejected(status, body)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            b'{"data":null,"error":{"code":"no_such_style","message":"There is no such style."}}',
            ("no_such_style", "There is no such style."),
        ),
        (b'{"error":{"code":"no_such_style"}}', ("no_such_style", None)),
        (b"<html>", (None, None)),
    ],
)
def test_a_rejections_code_and_message_are_upstreams(body: bytes, words: tuple[str | None, str | None]) -> None:
    assert rejection_of(body) == words


# --- upstream's own words ---------------------------------------------------------------------------------------


def problem_of(status: int, body: bytes, **headers: str) -> Problem:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    failed = read_reply(status, body, headers=named, secret=SECRET, now=NOW)
    assert isinstance(failed, Failed)
    assert failed.upstream_status == status
    return failed.problem


def upstream_member_of(status: int, body: bytes) -> object:
    return problem_of(status, body).members.get("upstream")


WORDS = {
    "code and message": (b'{"code":"internal","message":"boom"}', "internal", "boom"),
    "a number": (b'{"code":1e3,"message":"boom"}', "1e3", "boom"),
    "no code": (b'{"message":"boom"}', None, "boom"),
    "no message": (b'{"code":500}', "500", None),
    "other types": (b'{"code":true,"message":"boom"}', None, "boom"),
    "a text": (b'"boom"', None, "boom"),
    "a bare number": (b"5.0", None, "5.0"),
    "control characters": (
        rb'{"code":"a\nb","message":"\u001b[31mboom\u0000\u202e"}',
        "a\ufffdb",
        "\ufffd[31mboom\ufffd\ufffd",
    ),
    "the longest": (b'{"code":"%b","message":"%b"}' % (b"c" * 64, b"m" * 500), "c" * 64, "m" * 500),
    "too long": (b'{"code":"%b","message":"%b"}' % (b"c" * 65, b"m" * 9999), "c" * 63 + "…", "m" * 499 + "…"),
}


@pytest.mark.parametrize("status", [302, 401, 403, 429, 500, 503])
@pytest.mark.parametrize("member", [b"error", b"err"])
@pytest.mark.parametrize(("said", "code", "message"), WORDS.values(), ids=WORDS)
def test_upstreams_own_code_and_message_are_kept(
    status: int, member: bytes, said: bytes, code: str | None, message: str | None
) -> None:
    words = {"status": status, "code": code, "message": message}
    assert upstream_member_of(status, b'{"data":null,"%b":%b}' % (member, said)) == words


@pytest.mark.parametrize(
    "body",
    [PAGE, b"", b"{}", b"[]", b"null", ANSWER, b'{"error":{}}', b'{"error":{"code":[1],"message":{}}}'],
)
@pytest.mark.parametrize("status", [401, 429, 500])
def test_without_a_code_or_message_there_is_no_upstream_member(status: int, body: bytes) -> None:
    assert upstream_member_of(status, body) is None


@pytest.mark.parametrize(
    ("status", "body", "headers", "detail"),
    [
        (500, b'{"error":{"code":"internal","message":"boom"}}', {}, "RenderNet answered 500: try"),
        (500, PAGE, {}, "RenderNet answered 500 without a usable JSON body: try"),
        (200, PAGE, {}, "RenderNet answered 200 without a usable JSON body: try"),
        (
            200,
            b"\xef\xbb\xbf" + ANSWER,
            {},
            "RenderNet answered 200 with a byte order mark, which JSON must not have: try",
        ),
        (
            200,
            ANSWER.decode().encode("utf-16"),
            {},
            "RenderNet answered 200 with a byte order mark, which JSON must not have",
        ),
        (
            200,
            b"x",
            {"content_encoding": "GZip"},
            "RenderNet answered 200 in the content coding gzip, which was not requested",
        ),
        (
            503,
            b"x",
            {"content_encoding": "br"},
            "RenderNet answered 503 in the content coding br, which was not requested",
        ),
        (200, ANSWER, {"content_encoding": SECRET}, "RenderNet answered 200 in an unknown content coding: try"),
    ],
)
def test_the_detail_says_what_is_wrong(status: int, body: bytes, headers: dict[str, str], detail: str) -> None:
    problem = problem_of(status, body, **headers)
    assert problem.code is Code.UPSTREAM_ERROR
    assert problem.detail.startswith(detail)
    assert problem.detail.endswith(": try again later.")
    assert SECRET not in problem.detail


def test_the_identity_content_coding_is_accepted() -> None:
    read = read_reply(200, ANSWER, headers={"content-encoding": "identity"}, secret=SECRET, now=NOW)
    assert read == Priced(Price(b"5", b""), b"20")


# --- our key ----------------------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(character):04X}" for character in text)


SPELLINGS = {
    "as JSON writes it": json.dumps(SECRET)[1:-1],
    "all escaped": escaped(SECRET),
    "small letters": escaped(SECRET).lower(),
    "first escaped": escaped(SECRET[0]) + json.dumps(SECRET[1:])[1:-1],
    "slashes escaped": json.dumps(SECRET)[1:-1].replace("/", "\\/"),
    "with an escape before it": "\\n\\\\\\u0041" + json.dumps(SECRET)[1:-1],
}
PLACES = {
    "alone": '"%s"',
    "value": '{"data":{"estimated":5,"note":"before %s after"},"error":{}}',
    "name": '{"data":{"estimated":5,"before %s after":1},"error":{}}',
    "deep": '{"data":{"estimated":5,"x":[[{"y":["%s"]}]]},"error":{}}',
    "message": '{"data":null,"error":{"code":400,"message":"%s"}}',
    "hidden value": '{"data":{"estimated":5,"x":"%s","x":1},"error":{}}',
    "hidden object": '{"error":{"message":"%s"},"data":{"estimated":5},"error":{}}',
}


@pytest.mark.parametrize("status", GOOD_STATUSES)
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_response_with_our_key_is_withheld(status: int, spelling: str, place: str) -> None:
    assert failure(status, place.replace("%s", spelling).encode()) is Code.UPSTREAM_ERROR


def test_our_key_is_found_even_as_part_of_an_escape() -> None:
    withheld = read_reply(422, rb'{"error":{"message":"rn\/new"}}', secret=r"rn\/new", now=NOW)
    assert isinstance(withheld, Failed)


@pytest.mark.parametrize("status", [199, 301, 401, 403, 429, 500])
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_no_part_of_a_failure_shows_our_key(status: int, spelling: str) -> None:
    failed = reply(status, b'{"error":{"message":"%s"}}' % spelling.encode(), retry_after=SECRET)
    assert isinstance(failed, Failed)
    shown = failed.problem.document("req-1").decode() + repr(failed) + repr(failed.problem.headers)
    assert "canary" not in shown


@given(
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1),
    st.integers(),
    st.sampled_from([200, 422]),
)
@example('"\\/', 0, 200)
def test_our_key_is_found_in_any_spelling(secret: str, seed: int, status: int) -> None:
    body = respell({"data": {"estimated": 5, "note": f"é{secret}\\"}, "error": {}}, Random(seed))
    failed = read_reply(status, body, secret=secret, now=NOW)
    assert isinstance(failed, Failed)
    assert "contains the gateway's API key" in failed.problem.detail


@pytest.mark.parametrize(
    "note",
    [
        SECRET.upper(),
        SECRET[:-1],
        SECRET[:5] + " " + SECRET[5:],
        escaped(SECRET),  # in JSON text its backslashes stand for themselves
    ],
)
def test_text_that_only_resembles_our_key_is_passed_through(note: str) -> None:
    body = json.dumps({"data": None, "error": {"message": note}}).encode()
    assert reply(422, body) == Rejected(422, body)


# --- prices -----------------------------------------------------------------------------------------------------


def with_estimate(number: str) -> bytes:
    return b'{"data":{"estimated":%s,"balance":20},"error":{}}' % number.encode()


USABLE = ["5", "5.0", "0.10", "1e2", "1E+2", "0", "0.0", "-0", "0e5", "1e-7", "1000000", "1e6", "1000000.000"]
OF_64_CHARACTERS = [
    "0." + "1" * 62,
    "1" + "0" * 59 + "e-55",
    "0.10000000000000000555111512312578270211815834045410156250000000",
]
UNUSABLE = ["null", "true", "false", '"5"', '""', "[5]", '{"value":5}', "-1", "-0.01", "-1e-9", "1000001", "1e7"]
ABSURD = ["1000000.0000001", "1e400", "1e99999999999999999999", "1e-99999999999999999999", "1" * 5000]


@pytest.mark.parametrize("number", [*USABLE, *OF_64_CHARACTERS])
def test_an_estimate_keeps_its_spelling(number: str) -> None:
    assert reply(200, with_estimate(number)) == Priced(Price(number.encode(), b""), b"20")


@pytest.mark.parametrize("number", [*UNUSABLE, *ABSURD, *(number.replace("1", "11", 1) for number in OF_64_CHARACTERS)])
def test_an_unusable_estimate_is_unpriced(number: str) -> None:
    assert reply(200, with_estimate(number)) == Unpriced(with_estimate(number), b"20")


def test_numbers_have_a_maximum_length() -> None:
    assert {len(number) for number in OF_64_CHARACTERS} == {64}


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"5",
        b'"5"',
        b"[]",
        b'[{"data":{"estimated":5}}]',
        b"{}",
        b'{"estimated":5}',
        b'{"data":null}',
        b'{"data":5}',
        b'{"data":[5]}',
        b'{"data":[{"estimated":5}],"error":{}}',
        b'{"data":{}}',
        b'{"data":{"Estimated":5}}',
    ],
)
def test_an_answer_without_an_estimate_is_unpriced(body: bytes) -> None:
    assert reply(200, body) == Unpriced(body, None)


@pytest.mark.parametrize(
    "error", ['{"code":500,"message":"later"}', '{"message":""}', '"later"', "true", "1", "0", "[1]", '{"code":402}']
)
def test_an_estimate_beside_an_error_is_unpriced(error: str) -> None:
    body = b'{"data":{"estimated":5,"balance":20},"error":%s}' % error.encode()
    assert reply(200, body) == Unpriced(body, b"20")


@pytest.mark.parametrize("rest", ["", ',"error":{}', ',"error":null', ',"error":""', ',"error":[]', ',"error":false'])
@pytest.mark.parametrize("status", [200, 201, 299])
def test_an_empty_error_is_ignored(rest: str, status: int) -> None:
    assert reply(status, b'{"data":{"estimated":5}%s}' % rest.encode()) == Priced(Price(b"5", b""), None, status)


@pytest.mark.parametrize(
    ("balance", "known"),
    [
        ("20", b"20"),
        ("19.50", b"19.50"),
        ("-3", b"-3"),
        ("0", b"0"),
        ("1e3", b"1e3"),
        ("1" * 64, b"1" * 64),
        ("1" * 65, None),
        ("null", None),
        ("true", None),
        ('"20"', None),
        ("[]", None),
    ],
)
def test_a_balance_is_known_if_it_is_a_number(balance: str, known: bytes | None) -> None:
    priced = b'{"data":{"balance":%s,"estimated":5}}' % balance.encode()
    unpriced = b'{"data":{"balance":%s}}' % balance.encode()
    assert reply(200, priced) == Priced(Price(b"5", b""), known)
    assert reply(200, unpriced) == Unpriced(unpriced, known)


@pytest.mark.parametrize(
    ("data", "rest"),
    [
        (' "plan" : "pro" , "estimated" : 5 ', '"plan":"pro"'),
        ('"z":1.50,"estimated":5,"a":[1e2,-0,{"b":2.0}],"n":null', '"z":1.50,"a":[1e2,-0,{"b":2.0}],"n":null'),
        ('"estimated":1,"note":"a b\\u00e9\\"","estimated":5', '"note":"a bé\\""'),
        ('"estimated":5,"id":' + "9" * 5000, '"id":' + "9" * 5000),
        ('"estimated":5,"big":1e400', '"big":1e400'),
    ],
)
def test_the_rest_of_the_data_is_kept(data: str, rest: str) -> None:
    body = b'{"data":{%s,"balance":20},"error":{},"more":1}' % data.encode()
    assert reply(200, body) == Priced(Price(b"5", rest.encode()), b"20")


# --- Retry-After ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0),
        ("007", 7),
        ("3601", 3601),
        (str(MAX_RETRY_AFTER_S), MAX_RETRY_AFTER_S),
        (str(MAX_RETRY_AFTER_S + 1), MAX_RETRY_AFTER_S),
        ("9" * 64, MAX_RETRY_AFTER_S),
        ("9" * 65, None),
        ("-1", None),
        ("+1", None),
        ("1.5", None),
        ("1 2", None),
        ("\u0661", None),
        ("\u00b2", None),
        ("soon", None),
        (", ,", None),
        ("Sun, 22 Nov 2026 12:00:00 GMT", 0),
        ("Sun, 22 Nov 2026 12:01:30 GMT", 90),
        ("Sunday, 22-Nov-26 12:01:30 GMT", 90),
        ("Sun Nov 22 12:01:30 2026", 90),
        ("Sun, 22 Nov 2026 12:01:30", 90),
        ("Sun, 22 Nov 2026 14:01:30 +0200", 90),
        ("Sun, 22 Nov 2026 12:01:30 -0000", 90),
        ("Sun, 22 Nov 2026 11:59:59 GMT", 0),
        ("Sat, 01 Jan 0001 00:00:00 GMT", 0),
        ("Sun, 32 Nov 2026 12:00:00 GMT", None),
        ("Sun, 22 Nov 99999999999999 12:00:00 GMT", None),
        ("Sun, 22 Nov 2026 12:00:00 +99999999999999", None),
        ("Sun, 22 Nov 2026 12:00:00 -9999", None),
        ("Sun, 22 Nov 2026 " + "9" * 5000 + ":00:00 GMT", None),
    ],
)
def test_retry_after(value: str | None, seconds: int | None) -> None:
    assert retry_after_seconds(value, NOW) == seconds


def test_fractions_of_a_second_are_rounded() -> None:
    assert retry_after_seconds("Sun, 22 Nov 2026 12:01:30 GMT", NOW + timedelta(seconds=0.4)) == 90


date_parts = st.sampled_from(["Sun", ",", " ", "22", "Nov", "2026", "12:01:30", ":", "GMT", "-", "+", "9", "9" * 20])


@given(st.text(max_size=20) | st.lists(date_parts, max_size=14).map("".join))
def test_any_retry_after_is_a_wait_or_is_ignored(value: str) -> None:
    seconds = retry_after_seconds(value, NOW)
    assert seconds is None or seconds >= 0


# --- words for those who wait -----------------------------------------------------------------------------------

spelled_numbers = st.sampled_from([b"5", b"-3", b"0.10", b"1e2", b"1" * 64])
bodies = st.text(max_size=20).map(lambda note: json.dumps({"note": note}, ensure_ascii=False).encode())
unpriced = st.builds(Unpriced, bodies, st.none() | spelled_numbers, st.integers(200, 299))
rejected = st.builds(Rejected, st.integers(400, 499), bodies)
waits = st.none() | st.integers(0, MAX_RETRY_AFTER_S)
members = st.sampled_from([{}, {"upstream": {"status": 500, "code": "internal", "message": None}}])
problems = st.builds(Problem, st.sampled_from(Code), st.text(max_size=20), waits, members=members)
failed = st.builds(Failed, problems, st.none() | st.integers(100, 999), st.booleans())


@given(unpriced | rejected | failed)
@example(Unpriced(b"null", None))
@example(Unpriced(b'{"balance":null,"status":400}', b"0"))
@example(Rejected(400, b'{"body":"","balance":"1"}'))
@example(Failed(Problem(Code.UPSTREAM_BUSY, "Later.", 0), None, asked=False))
@example(Failed(Problem(Code.UPSTREAM_TIMEOUT, "Later."), None, asked=True))
def test_a_shared_failure_is_decoded_unchanged(left: Unpriced | Rejected | Failed) -> None:
    word = encode_failure(left)
    assert word
    found = decode_failure(word)
    assert found == left
    if isinstance(found, Failed):
        assert type(found.problem.code) is Code


ANY_ANSWERS = st.sampled_from(
    [
        PAGE,
        b"",
        ANSWER,
        b"null",
        b"{}",
        b'{"error":{"code":401}}',
        b'{"err":{"message":"no"}}',
        b'{"data":{"balance":1.50}}',
    ]
)
ANY_WAITS = st.sampled_from(
    [None, "", "7", "9" * 64, "soon", "Fri, 31 Dec 9999 23:59:59 GMT", "Sun, 22 Nov 2026 12:00:30 GMT"]
)


@given(st.sampled_from([200, 400, 401, 422, 429, 500, 503]), ANY_ANSWERS, ANY_WAITS)
def test_any_upstream_failure_can_be_shared(status: int, body: bytes, retry_after: str | None) -> None:
    said = reply(status, body, retry_after=retry_after)
    if not isinstance(said, Priced):
        assert decode_failure(encode_failure(said)) == said


def test_a_failure_that_is_too_long_is_not_shared() -> None:
    empty = len(encode_failure(Rejected(400, b'""')))
    longest = b'"%s"' % (b"x" * (MAX_FAILURE_BYTES - empty))
    assert len(encode_failure(Rejected(400, longest))) == MAX_FAILURE_BYTES
    assert encode_failure(Rejected(400, longest.replace(b"x", b"xx", 1))) == b""
    assert encode_failure(Unpriced(b'"%s"' % (b"x" * MAX_FAILURE_BYTES), b"5")) == b""


def test_the_limit_of_a_shared_failure_counts_bytes_not_characters() -> None:
    body = b'"%s"' % ("é" * (MAX_FAILURE_BYTES // 2)).encode()
    assert encode_failure(Unpriced(body, None)) == b""


def test_the_encoding_of_shared_failures_has_not_changed() -> None:
    """Gateways of two versions may share a store, and read each other's failures."""
    assert encode_failure(Unpriced(b"{}", b"5.0")) == b'{"body":"{}","balance":"5.0"}'
    assert encode_failure(Rejected(422, b"[]")) == b'{"status":422,"body":"[]"}'
    assert encode_failure(Failed(Problem(Code.UPSTREAM_ERROR, "Later.", 3), 502)) == (
        b'{"code":"upstream-error","detail":"Later.","retry_after_s":3,"upstream_status":502,"asked":true}'
    )


def test_a_failure_from_a_newer_gateway_can_be_decoded() -> None:
    busy = b'{"code":"upstream-busy","detail":"Later.","retry_after_s":3,"upstream_status":429,"asked":true,"more":1}'
    assert decode_failure(busy) == Failed(Problem(Code.UPSTREAM_BUSY, "Later.", 3), 429)
