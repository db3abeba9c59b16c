"""The request header fields that the gateway uses."""

import pytest

from proxy.gateway.freshness import Directives
from proxy.http.headers import RequestHeaders
from proxy.problems import BadRequest, Code


def head(**fields: str | list[str]) -> RequestHeaders:
    headers = []
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        headers += [(name.replace("_", "-").encode(), one.encode("latin-1")) for one in values]
    return RequestHeaders([(b"host", b"x"), *headers, (b"user-agent", b"x"), (b"user-agent", b"y")])


@pytest.mark.parametrize(
    ("fields", "token"),
    [
        ({}, None),
        ({"x_api_key": "ep_1"}, "ep_1"),
        ({"x_api_key": " ep_1 "}, "ep_1"),
        ({"x_api_key": ""}, ""),
        ({"authorization": "Bearer ep_2"}, "ep_2"),
        ({"authorization": "bearer  ep_2 "}, "ep_2"),
        ({"authorization": "Basic ep_2"}, None),
        ({"authorization": "ep_2"}, None),
        ({"x_api_key": "ep_1", "authorization": "Bearer ep_2"}, "ep_1"),
        ({"x_api_key": "ep_1", "authorization": "Basic ep_2"}, "ep_1"),
    ],
)
def test_the_token_is_found(fields: dict[str, str], token: str | None) -> None:
    assert head(**fields).token == token


@pytest.mark.parametrize("name", ["x_api_key", "authorization"])
def test_a_repeated_credential_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="was sent 3 times") as refused:
        _ = head(**{name: ["Bearer a", "Bearer a", "Bearer b"]}).token
    assert refused.value.problem.code is Code.INVALID_REQUEST


def test_list_fields_are_joined() -> None:
    headers = head(cache_control=["no-cache", "max-age=5"], accept=["text/csv", "*/*"])
    assert headers.directives == Directives(no_cache=True, max_age_s=5)
    assert headers.accept == "text/csv, */*"
    assert head().directives == Directives()
    assert head().accept is None
    assert head(accept="").accept is None


@pytest.mark.parametrize(
    ("given", "usable"),
    [("r-1.a_B", True), ("a" * 128, True), ("a" * 129, False), ("", False), ("a b", False), ("é", False)],
)
def test_a_usable_request_id_is_kept(given: str, usable: bool) -> None:  # noqa: FBT001 -- a row of a table
    assert head(x_request_id=given).request_id == (given if usable else None)
    assert head(x_request_id=[given, given]).request_id is None
    assert head().request_id is None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"content_type": "application/json"},
        {"content_type": "Application/JSON ; charset=utf-8"},
        {"content_encoding": "Identity"},
    ],
)
def test_plain_json_is_accepted(fields: dict[str, str]) -> None:
    head(**fields).check_media_type()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"content_type": "text/plain"}, Code.UNSUPPORTED_MEDIA_TYPE),
        ({"content_type": ""}, Code.UNSUPPORTED_MEDIA_TYPE),
        ({"content_encoding": "gzip"}, Code.UNSUPPORTED_MEDIA_TYPE),
        ({"content_type": ["application/json", "application/json"]}, Code.INVALID_REQUEST),
        ({"content_encoding": ["identity", "gzip"]}, Code.INVALID_REQUEST),
    ],
)
def test_other_media_types_and_codings_are_refused(fields: dict[str, str], code: Code) -> None:
    with pytest.raises(BadRequest) as refused:
        head(**fields).check_media_type()
    assert refused.value.problem.code is code


def test_the_content_length_is_0_if_absent() -> None:
    assert (head(content_length="12").content_length, head().content_length) == (12, 0)
