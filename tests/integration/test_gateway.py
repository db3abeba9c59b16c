"""Estimates over a socket, with a real store and the simulator as upstream."""

import contextlib
import random

import httpx2
import pytest

from bodies import BODIES, respell
from gateway_fixture import (
    API_KEY,
    DESIGN,
    EXPIRED,
    MARKETING,
    PATH,
    RETIRED,
    GatewayFixture,
    OpenGateway,
    answers,
    cache_status,
    code_of,
)
from proxy.auth import digest_of, token_of
from proxy.cache.canonical import canonicalise
from serving import NO_TLS

FLUX = b'[{"model":"Flux"}]'
"""The simulator's price is 2.75 credits."""


def test_the_second_request_is_a_hit_for_another_team_and_spelling(gateway: GatewayFixture) -> None:
    miss = gateway.ask(b'[{"steps":20,"model":"JuggernautXL"}]')
    assert (miss.status_code, cache_status(miss)) == (200, "fwd=miss; fwd-status=200; stored; ttl=3600")
    assert "age" not in miss.headers
    assert miss.headers["content-type"] == "application/json"

    hit = gateway.ask(b' [{ "model" : "\\u004auggernautXL", "steps": 2.0e1 }]', x_api_key=MARKETING)
    assert hit.content == miss.content
    assert cache_status(hit) in {"hit; ttl=3600", "hit; ttl=3599"}
    assert hit.headers["age"] == "0"
    assert hit.headers["estimate-proxy-balance-age"] == "0"
    assert gateway.simulator.calls == 1


def test_upstream_gets_the_canonical_body_and_only_our_key(gateway: GatewayFixture) -> None:
    gateway.ask(b'[ {"b":1.0,"a":"\\u002b"} ]', authorization="Bearer team", cookie="c=1", x_forwarded_for="10.0.0.1")
    (received,) = gateway.simulator.received
    assert received.body == b'[{"a":"+","b":1}]'
    assert received.api_keys == [API_KEY.encode()]
    names = {name for name, _ in received.headers}
    assert names == {
        *(b"host", b"content-length", b"content-type", b"accept", b"accept-encoding", b"user-agent", b"x-api-key"),
    }
    assert not any(DESIGN.encode() in value for _, value in received.headers)


def test_every_body_is_a_miss_then_a_hit_in_five_spellings(gateway: GatewayFixture) -> None:
    answers_by_question: dict[str, bytes] = {}
    for body in BODIES:
        first = gateway.ask(body.raw)
        expected = "hit" if body.question in answers_by_question else "fwd=miss"
        assert cache_status(first).startswith(expected), body.name
        assert answers_by_question.setdefault(body.question, first.content) == first.content
        for seed in range(5):
            again = gateway.ask(respell(body.items, random.Random(seed)))
            assert cache_status(again).startswith("hit"), body.name
            assert again.content == first.content
    questions = {body.question: canonicalise(body.raw) for body in BODIES}
    assert {received.body for received in gateway.simulator.received} == set(questions.values())
    assert gateway.simulator.calls == len(questions)


def test_a_hit_shows_the_newest_balance_of_any_answer(gateway: GatewayFixture) -> None:
    assert gateway.ask().json() == {"data": {"estimated": 2.75, "balance": 10_000}, "error": {}}
    gateway.simulator.balance = 41
    assert gateway.ask(b"[{}]").json()["data"]["balance"] == 41
    assert gateway.ask().json() == {"data": {"estimated": 2.75, "balance": 41}, "error": {}}


def test_balances_belong_to_their_account(open_gateway: OpenGateway) -> None:
    gateway = open_gateway(teams={"marketing": {"tokens": [digest_of(MARKETING)], "account": "second"}})
    gateway.simulator.script(answers(b'{"data":{"estimated":1,"balance":7}}'))
    gateway.ask()
    other = gateway.ask(x_api_key=MARKETING)
    assert cache_status(other).startswith("fwd=miss")
    assert gateway.simulator.received[-1].api_keys == [b"rn-second-key"]
    assert code_of(other) == "upstream-refused"


def test_another_gateway_on_the_store_finds_price_and_balance(open_gateway: OpenGateway) -> None:
    first, second = open_gateway(), open_gateway()
    first.ask()
    hit = second.ask()
    assert hit.json()["data"] == {"estimated": 2.75, "balance": 10_000}
    assert cache_status(hit).startswith("hit")


def test_without_a_known_balance_a_stored_price_is_fetched_again(open_gateway: OpenGateway) -> None:
    open_gateway().ask()
    gateway = open_gateway()
    for book in gateway.store.keys("ep1:book:*"):
        gateway.store.delete(book)
    assert cache_status(gateway.ask()).startswith("fwd=miss")
    assert cache_status(gateway.ask()).startswith("hit")


def test_numbers_and_other_members_of_data_are_returned_unchanged(gateway: GatewayFixture) -> None:
    answer = b'{"data":{"balance":20.00,"note":"\\u00e9","estimated":5.10,"parts":[1.50,1E2]},"error":{},"x":1}'
    gateway.simulator.script(answers(answer))
    expected = '{"data":{"estimated":5.10,"balance":20.00,"note":"é","parts":[1.50,1E2]},"error":{}}'
    assert gateway.ask().text == expected
    assert gateway.ask().text == expected


@pytest.mark.usefixtures("cold")
def test_a_price_ages_and_expires(open_gateway: OpenGateway) -> None:
    gateway = open_gateway(cache={"ttl_s": 60, "stale_while_revalidate_s": 0, "stale_if_error_s": 0})
    gateway.ask()
    (key,) = gateway.store.keys("ep1:*:price")
    assert 59_000 < gateway.store.pttl(key) <= 60_000
    gateway.age(12)
    hit = gateway.ask()
    assert hit.headers["age"] == "12"
    assert cache_status(hit) in {"hit; ttl=48", "hit; ttl=47"}
    gateway.age(50)
    assert cache_status(gateway.ask()) == "fwd=stale; fwd-status=200; stored; ttl=60"


@pytest.mark.usefixtures("cold")
def test_a_stored_text_that_cannot_be_read_is_a_miss(gateway: GatewayFixture) -> None:
    gateway.ask()
    (key,) = gateway.store.keys("ep1:*:price")
    texts = ("", "1", "nonsense", "2 1 9 a b c", "2 x 60000 a b c 5 ", "2 1 x a b c 5 ", "1 1 60000 a b c 5 ")
    for text in texts:
        gateway.store.set(key, text)
        assert cache_status(gateway.ask()) == "fwd=miss; fwd-status=200; stored; ttl=3600", text


class TestCredentials:
    @pytest.mark.parametrize(
        "headers",
        [
            {"x_api_key": DESIGN},
            {"x_api_key": "", "authorization": ""},
        ],
    )
    def test_a_token_in_x_api_key_is_accepted(self, gateway: GatewayFixture, headers: dict[str, str]) -> None:
        expected = 200 if headers["x_api_key"] else 401
        assert gateway.ask(**headers).status_code == expected

    def test_a_bearer_token_is_accepted(self, gateway: GatewayFixture) -> None:
        for scheme in ("Bearer", "bearer", "BEARER"):
            response = httpx2.post(
                gateway.url + PATH,
                content=FLUX,
                headers={"authorization": f"{scheme} {DESIGN}", "content-type": "application/json"},
                trust_env=False,
                verify=NO_TLS,
            )
            assert response.status_code == 200

    @pytest.mark.parametrize("authorization", [None, "Bearer", f"Basic {DESIGN}", DESIGN, "Bearer x y"])
    def test_a_missing_token_is_refused(self, gateway: GatewayFixture, authorization: str | None) -> None:
        headers = {} if authorization is None else {"authorization": authorization}
        response = httpx2.post(gateway.url + PATH, content=FLUX, headers=headers, trust_env=False, verify=NO_TLS)
        assert (response.status_code, code_of(response)) == (401, "unknown-token")
        assert response.headers["www-authenticate"] == "Bearer"
        assert "cache-status" not in response.headers

    @pytest.mark.parametrize("token", [DESIGN[:-1], DESIGN + "x", EXPIRED, "ep_" + "x" * 38, "\xe9", API_KEY])
    def test_an_unknown_token_is_refused(self, gateway: GatewayFixture, token: str) -> None:
        response = gateway.client.post(PATH, content=FLUX, headers=[(b"x-api-key", token.encode("latin-1"))])
        assert (response.status_code, code_of(response)) == (401, "unknown-token")

    def test_an_expired_token_is_distinguished_from_an_unknown_one(self, open_gateway: OpenGateway) -> None:
        last_day = {"sha256": digest_of(EXPIRED), "label": "ci", "expires": "2026-01-31"}
        gateway = open_gateway(teams={"design": {"tokens": [last_day]}})
        details = [gateway.ask(x_api_key=token).json()["detail"] for token in (EXPIRED, token_of("x" * 32))]
        assert details[0] == (
            "The token has expired: 2026-01-31 was the last day of this token of the team 'design' with the label "
            "'ci'. Ask the gateway's operator for a new one."
        )
        assert details[1].startswith("The token is unknown or mistyped: ")

    def test_x_api_key_takes_precedence_over_bearer(self, gateway: GatewayFixture) -> None:
        assert gateway.ask(x_api_key="ep_wrong", authorization=f"Bearer {DESIGN}").status_code == 401
        assert gateway.ask(x_api_key=DESIGN, authorization="Bearer ep_wrong").status_code == 200

    @pytest.mark.parametrize("name", [b"X-API-KEY", b"Authorization"])
    def test_a_header_sent_twice_is_refused(self, gateway: GatewayFixture, name: bytes) -> None:
        header = b"%s: Bearer %s\r\n" % (name, DESIGN.encode())
        reply = gateway.raw(
            b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s%sContent-Length: 4\r\n\r\n[{}]"
            % (PATH.encode(), header, header)
        )
        assert reply.startswith(b"HTTP/1.1 400 ")
        assert b'"code":"invalid-request"' in reply

    def test_a_disabled_team_is_refused(self, gateway: GatewayFixture) -> None:
        response = gateway.ask(x_api_key=RETIRED)
        assert (response.status_code, code_of(response)) == (403, "team-disabled")
        assert gateway.simulator.calls == 0


class TestBodies:
    @pytest.mark.parametrize("body", [b"", b"{", b"{}", b"[]", b"[1]", b"\xef\xbb\xbf[{}]", b"[{}]x", b"[" * 100_000])
    def test_a_body_that_is_not_an_array_of_objects_is_refused(self, gateway: GatewayFixture, body: bytes) -> None:
        response = gateway.ask(body)
        assert (response.status_code, code_of(response)) == (400, "invalid-body")
        assert gateway.simulator.calls == 0

    @pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", None])
    def test_json_or_no_content_type_is_accepted(self, gateway: GatewayFixture, content_type: str | None) -> None:
        headers = {} if content_type is None else {"content-type": content_type}
        assert gateway.client.post(PATH, content=FLUX, headers=headers).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {"content_type": "text/plain"},
            {"content_type": "application/x-www-form-urlencoded"},
            {"content_type": ""},
            {"content_encoding": "gzip"},
            {"content_encoding": "br, identity"},
        ],
    )
    def test_other_content_types_and_codings_are_refused(
        self, gateway: GatewayFixture, headers: dict[str, str]
    ) -> None:
        response = gateway.ask(**headers)
        assert (response.status_code, code_of(response)) == (415, "unsupported-media-type")

    def test_the_size_limit_applies_to_the_body_as_sent(self, open_gateway: OpenGateway) -> None:
        gateway = open_gateway(server={"max_body_bytes": 1000})
        body = b'[{"prompt":{"positive":"%s"}}]'
        fits = body % (b"x" * (1000 - len(body) + 2))
        assert len(fits) == 1000
        assert gateway.ask(fits).status_code == 200
        response = gateway.ask(fits + b" ")
        assert (response.status_code, code_of(response)) == (413, "body-too-large")
        assert response.headers["connection"] == "close"
        assert response.json()["detail"] == (
            "The body is larger than the gateway's limit of 1000 bytes: if it has several items, send them in several "
            "requests; if it has one, shorten it."
        )

    @pytest.mark.parametrize("size", [300_000, 5_000_000, 50_000_000])
    def test_a_body_far_too_large_gets_a_413(self, gateway: GatewayFixture, size: int) -> None:
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nX-API-KEY: %s\r\nContent-Length: %d\r\n\r\n"
        with gateway.connect() as connection:
            connection.sendall(head % (PATH.encode(), DESIGN.encode(), size))
            with contextlib.suppress(ConnectionError):
                for _ in range(0, size, 100_000):
                    connection.sendall(b" " * 100_000)
            with contextlib.suppress(ConnectionError):
                reply = connection.recv(65536)
        assert size > 4_000_000 or reply.startswith(b"HTTP/1.1 413 ")
        assert gateway.ask().status_code == 200
