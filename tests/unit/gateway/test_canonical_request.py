"""Parsing bodies into canonical requests, and the cache of parsed bodies."""

import pytest

from bodies import BODIES
from proxy.cache.canonical import canonicalise
from proxy.gateway.canonical_request import MAX_CACHED_BODIES, CanonicalRequest, RequestParser
from proxy.problems import BadRequest
from proxy.quota.model_names import model_of
from proxy.upstream.address import UpstreamAddress

ADDRESS = UpstreamAddress.of("https://api.rendernet.ai")
BODY = b'[ {"model": "Flux", "seed": 1.0} ]'


@pytest.fixture
def parser() -> RequestParser:
    return RequestParser(ADDRESS)


def parse(
    parser: RequestParser,
    raw: bytes = BODY,
    *,
    account: str = "default",
    query: bytes = b"",
    ignored: tuple[str, ...] = (),
) -> CanonicalRequest:
    return parser.parse(raw, account=account, query=query, ignored=ignored)


def test_a_cached_body_gives_the_same_request_as_a_parsed_one(parser: RequestParser) -> None:
    for body in BODIES:
        first, second = (parse(parser, body.raw, query=b"type=image") for _ in range(2))
        canonical = canonicalise(body.raw)
        key = ADDRESS.key_of(canonical, account="default", query="type=image", ignored=())
        for request in (first, second):
            assert (request.canonical, request.model) == (canonical, model_of(canonical))
            assert (request.key, request.query) == (key, "type=image")
            assert (request.account, request.ignored) == ("default", ())
        assert first.body_digest == second.body_digest


def test_account_query_and_ignored_members_are_part_of_the_cache_key(parser: RequestParser) -> None:
    requests = [
        parse(parser),
        parse(parser, account="second"),
        parse(parser, query=b"type=image"),
        parse(parser, ignored=("seed",)),
        parse(parser, BODY.replace(b"1.0", b"2")),
    ]
    assert len({request.key for request in requests}) == len(requests)
    ignoring = parse(parser, BODY.replace(b"1.0", b"2"), ignored=("seed",))
    assert ignoring.key == requests[3].key
    assert ignoring.body_digest != requests[3].body_digest


def test_an_invalid_body_is_refused_each_time_and_not_cached(parser: RequestParser) -> None:
    for _ in range(2):
        with pytest.raises(BadRequest):
            parse(parser, b"[]")
    assert not parser._parsed


def test_the_cache_evicts_the_oldest_body_which_is_then_parsed_again(parser: RequestParser) -> None:
    first = parse(parser)
    for number in range(MAX_CACHED_BODIES - 1):
        parse(parser, b'[{"seed":%d}]' % number)
    oldest, kept, *_ = parser._parsed
    parse(parser, b'[{"seed":-1}]')
    assert len(parser._parsed) == MAX_CACHED_BODIES
    assert kept in parser._parsed
    assert oldest not in parser._parsed
    assert parse(parser).key == first.key
    assert oldest in parser._parsed


def test_the_cache_keeps_no_bodies(parser: RequestParser) -> None:
    parse(parser, b'[{"prompt":{"positive":"a secret campaign"}}]')
    assert "secret" not in repr(parser._parsed)
