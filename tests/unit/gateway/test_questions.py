"""Bodies as questions, and what is remembered of them."""

import pytest

from bodies import BODIES
from proxy.cache.canonical import canonicalise
from proxy.gateway.questions import MAX_REMEMBERED, CanonicalRequest, RequestParser
from proxy.problems import BadRequest
from proxy.quota.model_names import model_of
from proxy.upstream.address import Address

ADDRESS = Address.of("https://api.rendernet.ai")
BODY = b'[ {"model": "Flux", "seed": 1.0} ]'


@pytest.fixture
def reader() -> RequestParser:
    return RequestParser(ADDRESS)


def read(
    reader: RequestParser,
    raw: bytes = BODY,
    *,
    account: str = "default",
    query: bytes = b"",
    ignored: tuple[str, ...] = (),
) -> CanonicalRequest:
    return reader.read(raw, account=account, query=query, ignored=ignored)


def test_a_question_is_the_same_whether_it_is_read_or_recognised(reader: RequestParser) -> None:
    for body in BODIES:
        first, second = (read(reader, body.raw, query=b"type=image") for _ in range(2))
        canonical = canonicalise(body.raw)
        key = ADDRESS.key_of(canonical, account="default", query="type=image", ignored=())
        for question in (first, second):
            assert (question.canonical, question.model) == (canonical, model_of(canonical))
            assert (question.key, question.query) == (key, "type=image")
            assert (question.account, question.ignored) == ("default", ())
        assert first.body_digest == second.body_digest


def test_whatever_else_decides_a_key_is_part_of_what_is_recognised(reader: RequestParser) -> None:
    questions = [
        read(reader),
        read(reader, account="second"),
        read(reader, query=b"type=image"),
        read(reader, ignored=("seed",)),
        read(reader, BODY.replace(b"1.0", b"2")),
    ]
    assert len({question.key for question in questions}) == len(questions)
    ignoring = read(reader, BODY.replace(b"1.0", b"2"), ignored=("seed",))
    assert ignoring.key == questions[3].key
    assert ignoring.body_digest != questions[3].body_digest


def test_what_is_no_question_is_refused_each_time(reader: RequestParser) -> None:
    for _ in range(2):
        with pytest.raises(BadRequest):
            read(reader, b"[]")
    assert not reader._parsed


def test_those_that_were_read_longest_ago_are_forgotten_and_read_again(reader: RequestParser) -> None:
    first = read(reader)
    for number in range(MAX_REMEMBERED - 1):
        read(reader, b'[{"seed":%d}]' % number)
    oldest, kept, *_ = reader._parsed
    read(reader, b'[{"seed":-1}]')
    assert len(reader._parsed) == MAX_REMEMBERED
    assert kept in reader._parsed
    assert oldest not in reader._parsed
    assert read(reader).key == first.key
    assert oldest in reader._parsed


def test_no_body_is_kept(reader: RequestParser) -> None:
    read(reader, b'[{"prompt":{"positive":"a secret campaign"}}]')
    assert "secret" not in repr(reader._parsed)
