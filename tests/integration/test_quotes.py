"""`POST /v1/quote` with a real ledger and an upstream whose prices follow no rule."""

import json
import os
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from hashlib import sha256
from typing import Any

import httpx2
import pytest

from gateway_fixture import MARKETING, RETIRED, GatewayFixture, OpenGateway, answers, cache_status, code_of
from prometheus import scrape
from proxy.cache.canonical import canonicalise
from proxy.demo.simulator import Received, envelope
from quota_fixture import (
    ADMIN,
    FLUX,
    ONE,
    SEGMENT,
    Limited,
    exactly,
    left,
    limits,
    quota,
    rate,
    requests,
    row,
    usage,
    used,
)
from serving import wait_until

pytestmark = pytest.mark.usefixtures("within_a_minute")

QUOTE = "/v1/quote"
PRICE = Decimal("2.75")
"""Of `FLUX`."""


def post(gateway: GatewayFixture, document: Any, **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return gateway.client.post(QUOTE, content=content, headers={"content-type": "application/json", **named})


def quoted(gateway: GatewayFixture, document: Any, **headers: str) -> Any:
    response = post(gateway, document, **headers)
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    return exactly(response)


def variants(*bodies: Any, **options: Any) -> Any:
    named = [{"label": f"v{number}", "body": body} for number, body in enumerate(bodies)]
    return {"variants": named, **options}


def bodies(*raw: bytes, **options: Any) -> Any:
    return variants(*map(json.loads, raw), **options)


def steps(count: int, **options: Any) -> Any:
    """A grid of bodies that were not asked before."""
    return {"base": [{"model": "Flux"}], "vary": {"seed": list(range(count))}, **options}


def errors(document: Any) -> list[str | None]:
    return [variant["error"]["code"] if "error" in variant else None for variant in document["variants"]]


def estimates(document: Any) -> list[Any]:
    return [variant["estimated"] for variant in document["variants"]]


def answer_by_body(
    gateway: GatewayFixture, monkeypatch: pytest.MonkeyPatch, replies: Mapping[bytes, tuple[int, bytes]]
) -> None:
    """Questions of a quote arrive at RenderNet in any order, so their answers depend on the body alone."""
    ordinary = gateway.simulator.ordinary_answer
    monkeypatch.setattr(
        gateway.simulator, "ordinary_answer", lambda received: replies.get(received.body) or ordinary(received)
    )


def hidden(canonical: bytes) -> Decimal | int:
    """A price that depends on the whole body, a status that refuses it, or 200 for an answer without a price."""
    number = int.from_bytes(sha256(canonical).digest()[:6])
    return 422 if number % 23 == 0 else 200 if number % 29 == 0 else Decimal(number % 10**8).scaleb(-6)


def hidden_answer(received: Received) -> tuple[int, bytes]:
    match hidden(received.body):
        case 422:
            return 422, envelope("invalid_steps", "steps is too high")
        case int(status):
            return status, b'{"data":{"balance":7},"error":{}}'
        case price:
            return 200, b'{"data":{"estimated":%b,"balance":7},"error":{}}' % format(price, "f").encode()


def expected(canonical: bytes) -> tuple[Decimal | None, str | None]:
    """The amount that a quote shows for a body, or the code of its error."""
    found = hidden(canonical)
    if isinstance(found, Decimal):
        return found, None
    return None, "invalid_steps" if found == 422 else "unpriced"


def as_sent(body: Any) -> bytes:
    return canonicalise(json.dumps(body).encode())


def minus(one: Decimal | None, *others: Decimal | None) -> Decimal | None:
    known = [other for other in others if other is not None]
    return None if one is None or len(known) < len(others) else one - sum(known, Decimal())


class HiddenPrices:
    """Checks quotes against `hidden`, and counts what they should have asked."""

    def __init__(self) -> None:
        self.stored: set[bytes] = set()
        self.calls = 0

    def check(self, sent: list[Any], document: Any, breakdown: str | None) -> None:
        questions: set[bytes] = set()
        first, _ = expected(as_sent(sent[0]))
        for body, shown in zip(sent, document["variants"], strict=True):
            whole, code = self._asked(body, questions)
            assert (shown["estimated"], shown.get("error", {}).get("code")) == (whole, code)
            assert shown["delta"] == minus(whole, first)
            if breakdown == "items":
                lines = [self._asked([item], questions) for item in body]
                assert [line["estimated"] for line in shown["breakdown"]] == [price for price, _ in lines]
                assert shown["residual"] == minus(whole, *(price for price, _ in lines))
            elif breakdown == "members":
                members = sorted({member for item in body for member in item})
                assert [line["member"] for line in shown["breakdown"]] == members
                for line in shown["breakdown"]:
                    rest = [{name: item[name] for name in item if name != line["member"]} for item in body]
                    without, code = self._asked(rest, questions)
                    assert (line["marginal"], line.get("error", {}).get("code")) == (minus(whole, without), code)
        self.calls += len(questions - self.stored)
        self.stored |= {question for question in questions if expected(question)[0] is not None}
        known = [price for price in estimates(document) if price is not None]
        assert known == [] or estimates(document)[int(document["cheapest"][1:])] == min(known)

    def _asked(self, body: Any, questions: set[bytes]) -> tuple[Decimal | None, str | None]:
        questions.add(as_sent(body))
        return expected(as_sent(body))


def test_random_bodies_are_priced_exactly(limited: Limited, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as `QUOTE_BODIES` says, against a price function that adds nothing up."""
    gateway, prices, chance = limited(quota(10**9), requests(10**9)), HiddenPrices(), random.Random(11)
    monkeypatch.setattr(gateway.simulator, "ordinary_answer", hidden_answer)
    names = ["model", "steps", "batch_size", "quality"]
    for _ in range(int(os.environ.get("QUOTE_BODIES", "160")) // 20):
        sent = [
            [
                {name: chance.randrange(9) for name in chance.sample(names, chance.randrange(4))}
                for _ in range(chance.randint(1, 3))
            ]
            for _ in range(20)
        ]
        breakdown = chance.choice([None, "items", "members"])
        prices.check(sent, quoted(gateway, variants(*sent, breakdown=breakdown)), breakdown)
    assert gateway.simulator.calls == prices.calls
    assert used(gateway) == [0, prices.calls], "one request for each question that reached RenderNet, and no credits"
    assert usage(gateway)["estimated_credits"] == 0


class TestAnswers:
    def test_a_quote_and_an_estimate_agree(self, gateway: GatewayFixture) -> None:
        gateway.ask(FLUX)
        shown = quoted(gateway, bodies(FLUX, ONE))
        assert [variant["basis"] for variant in shown["variants"]] == ["stored", "asked"]
        for raw, price in zip((FLUX, ONE), estimates(shown), strict=True):
            response = gateway.ask(raw)
            assert exactly(response)["data"] == {"estimated": price, "balance": shown["balance"]}
            assert cache_status(response).startswith("hit")
        assert gateway.simulator.calls == 2
        assert [variant["basis"] for variant in quoted(gateway, bodies(FLUX, ONE))["variants"]] == ["stored"] * 2

    def test_equal_questions_are_asked_once(self, gateway: GatewayFixture) -> None:
        same = [{"steps": 20.0, "model": "Flux"}], [{"model": "Flux", "steps": 20}]
        shown = quoted(gateway, variants(*same, breakdown="items"))
        assert estimates(shown) == [PRICE, PRICE]
        assert gateway.simulator.calls == 1

    def test_quotas_quantity_and_balance(self, limited: Limited) -> None:
        gateway = limited(quota(10), requests(5), org={"quotas": [quota(100, "week")]})
        gateway.ask(ONE)
        response = post(gateway, bodies(FLUX, ONE, quantity=9))
        shown = exactly(response)
        assert (shown["cheapest"], shown["quantity"], shown["total"], shown["balance"]) == ("v1", 9, 9, 10_000)
        assert [list(one.values()) for one in shown["quotas"]] == [
            ["team", "estimated_credits", "month", 9, True, 9],
            ["team", "requests", "month", 3, False, 3],
            ["org", "estimated_credits", "week", 99, True, 99],
        ]
        assert list(shown["quotas"][0]) == ["scope", "measure", "per", "remaining", "fits", "how_many"]
        assert left(response) == {"credits-month": 9, "requests-month": 3, "org-credits-week": 99}

    def test_rendernets_refusal_is_that_variants_error(
        self, gateway: GatewayFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refusals = {
            FLUX: (422, envelope("invalid_steps", "steps must be at most 200")),
            SEGMENT: (400, b'"no"'),
        }
        answer_by_body(gateway, monkeypatch, refusals)
        shown = quoted(gateway, bodies(FLUX, ONE, SEGMENT))
        problems = [variant.get("error") for variant in shown["variants"]]
        assert problems == [
            {"code": "invalid_steps", "message": "steps must be at most 200"},
            None,
            {"code": "upstream-rejected", "message": "RenderNet refused the body with status 400."},
        ]
        assert shown["cheapest"] == "v1"

    def test_failures_are_errors_of_their_variants(
        self, gateway: GatewayFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failures = {FLUX: (500, b"{}"), ONE: (200, b'{"data":{"balance":1},"error":{}}')}
        answer_by_body(gateway, monkeypatch, failures)
        shown = quoted(gateway, bodies(FLUX, ONE))
        assert errors(shown) == ["upstream-error", "unpriced"]
        assert (shown["cheapest"], estimates(shown)) == (None, [None, None])

    def test_only_if_cached_asks_nothing(self, limited: Limited) -> None:
        gateway = limited(requests(100), rate=rate(5))
        gateway.ask(FLUX)
        shown = quoted(gateway, bodies(ONE, FLUX), cache_control="only-if-cached")
        assert (errors(shown), estimates(shown)) == (["not-cached", None], [None, PRICE])
        assert (gateway.simulator.calls, used(gateway)) == (1, [1])

    def test_no_cache_asks_again(self, gateway: GatewayFixture) -> None:
        gateway.ask(FLUX)
        assert quoted(gateway, bodies(FLUX), cache_control="no-cache")["variants"][0]["basis"] == "asked"
        assert gateway.simulator.calls == 2

    @pytest.mark.usefixtures("cold")
    def test_a_stale_price_stands_in_for_a_failure(self, open_gateway: OpenGateway) -> None:
        gateway = open_gateway(cache={"ttl_s": 100, "stale_while_revalidate_s": 0})
        gateway.ask(FLUX)
        gateway.age(500)
        gateway.simulator.script(answers(b"{}", 500))
        (variant,) = quoted(gateway, bodies(FLUX))["variants"]
        assert (variant["estimated"], variant["basis"]) == (PRICE, "stored")
        assert variant["age_s"] >= 500
        assert variant["ttl_s"] <= -400

    def test_the_query_string_is_part_of_the_question(self, gateway: GatewayFixture) -> None:
        gateway.ask(FLUX)
        response = gateway.client.post(f"{QUOTE}?type=image", json=bodies(FLUX))
        assert response.json()["variants"][0]["basis"] == "asked"
        assert gateway.simulator.received[-1].query == b"type=image"


class TestLimits:
    def test_what_the_rate_does_not_allow_has_its_error(self, limited: Limited) -> None:
        gateway = limited(requests(100), rate=rate(5))
        gateway.ask(ONE)
        shown = quoted(gateway, bodies(ONE, *(b'[{"steps":%d}]' % n for n in range(20, 25))))
        assert errors(shown) == [None] * 4 + ["rate-limited"] * 2
        assert (gateway.simulator.calls, used(gateway)) == (4, [4])
        assert errors(quoted(gateway, bodies(ONE))) == ["rate-limited"]
        assert usage(gateway) == row(4, 1, refused=3, miss=4, rate_limited=3)

    def test_stored_prices_use_one_of_the_rate_each(self, limited: Limited) -> None:
        gateway = limited(requests(100, on_exceed="warn"), rate=rate(10))
        quoted(gateway, steps(3))
        response = post(gateway, steps(3))
        assert limits(response)["rate"]["r"] == 4
        assert errors(quoted(gateway, steps(3))) == [None] * 3
        assert errors(quoted(gateway, steps(3))) == [None, "rate-limited", "rate-limited"]
        assert used(gateway) == [3]

    def test_a_price_that_a_quota_would_refuse_is_hidden(self, limited: Limited) -> None:
        gateway = limited(quota(2.5), requests(100))
        for basis in ("asked", "stored"):
            response = post(gateway, variants([{}], json.loads(FLUX), [{}, {}, {}], breakdown="items"))
            shown = exactly(response)
            assert errors(shown) == [None, "quota-exceeded", "quota-exceeded"]
            assert shown["variants"][0]["basis"] == basis
            assert shown["variants"][1]["breakdown"][0]["estimated"] is None
            assert shown["variants"][2]["residual"] is None
            assert shown["variants"][1]["error"]["message"].endswith("this estimate needs more than the whole quota.")
            assert "2.75" not in response.text
        assert used(gateway) == [0, 3], "what was asked stays a request"

    def test_a_used_up_quota_shows_nothing_and_asks_nothing(self, limited: Limited) -> None:
        gateway = limited(quota(1))
        gateway.ask(ONE)
        shown = quoted(gateway, bodies(ONE, FLUX))
        assert errors(shown) == ["quota-exceeded"] * 2
        assert shown["quotas"][0]["remaining"] == 0
        assert gateway.simulator.calls == 1

    def test_a_quota_on_requests_stops_the_asking(self, limited: Limited) -> None:
        gateway = limited(requests(3))
        shown = quoted(gateway, steps(5))
        assert errors(shown) == ["quota-exceeded"] * 5, "a team without requests sees no price"
        assert gateway.simulator.calls == 3

    def test_at_most_eight_are_asked_at_a_time(self, gateway: GatewayFixture) -> None:
        with ThreadPoolExecutor() as pool, gateway.simulator.hold() as hold:
            running = pool.submit(quoted, gateway, steps(20))
            assert gateway.simulator.arrived(8)
            wait_until(lambda: gateway.tracker.waiting == 8)
            assert gateway.tracker.in_flight == 9, "else eight waiting questions would hide eight active requests"
            assert gateway.simulator.calls == 8
            hold.release()
            assert estimates(running.result(10)) == [PRICE] * 20
        wait_until(lambda: gateway.tracker.in_flight == gateway.tracker.waiting == 0)

    def test_what_is_not_answered_at_the_deadline_has_its_error(self, open_gateway: OpenGateway) -> None:
        gateway = open_gateway(server={"request_timeout_s": 0.5})
        gateway.ask(ONE)
        with gateway.simulator.hold():
            shown = quoted(gateway, variants([{}], *[[{"steps": number}] for number in range(20)]))
            assert errors(shown) == [None] + ["upstream-timeout"] * 20
            assert gateway.simulator.calls == 9
        messages = {variant["error"]["message"] for variant in shown["variants"][1:]}
        assert messages == {
            "RenderNet did not answer within 0.5 s: send the request again.",
            "No time was left to ask RenderNet: send the quote again.",
        }

    def test_equal_quotes_at_once_ask_once(self, limited: Limited) -> None:
        gateway = limited(requests(100))
        with ThreadPoolExecutor() as pool, gateway.simulator.hold() as hold:
            running = [pool.submit(quoted, gateway, steps(5)) for _ in range(3)]
            wait_until(lambda: gateway.tracker.waiting == 15)
            hold.release()
            assert [estimates(future.result(10)) for future in running] == [[PRICE] * 5] * 3
        assert (gateway.simulator.calls, used(gateway)) == (5, [5])
        assert usage(gateway) == row(5, miss=5)

    def test_without_the_ledger_nothing_is_shown(self, open_gateway: OpenGateway) -> None:
        gateway = open_gateway(store={"url": "redis://127.0.0.1:1"})
        shown = quoted(gateway, bodies(FLUX))
        assert (errors(shown), shown["quotas"]) == (["store-unavailable"], None)


class TestNonsense:
    @pytest.mark.parametrize(
        ("document", "says"),
        [
            (variants(*[[{}]] * 65), "The quote has 65 variants, and at most 64 are allowed: send several quotes."),
            ({"variants": []}, "variants must be an array of 1 to 64 objects with label and body."),
            ({"variants": [{"label": "a", "body": [{}]}] * 2}, "Two variants have the label 'a': give each its own."),
            ({"base": [{}], "vary": {"prompt.positive": ["a"]}}, "no item of base has its parent, 'prompt'"),
            ({"base": [{}], "vary": {"a": list(range(65))}}, "The grid makes 65 variants, and at most 64 are allowed"),
            (
                variants(
                    *[[{"a": n, "b": n, "c": n}] for n in range(63)], [dict.fromkeys("abcd", 64)], breakdown="members"
                ),
                "The quote would ask 257 distinct questions, and at most 256 are allowed: send fewer variants",
            ),
            (
                variants({"model": "Flux"}),
                "Variant 'v0': The body must be a JSON array of one or more generation objects.",
            ),
            (b'{"variants":[{"label":"a","body":[{"steps":NaN}]}]}', "The body is not valid JSON"),
            ([{"model": "Flux"}], "The body is an array, as for an estimate. Send {"),
        ],
    )
    def test_it_is_refused_with_what_to_change(self, document: Any, says: str, gateway: GatewayFixture) -> None:
        response = post(gateway, document)
        assert (response.status_code, code_of(response)) == (400, "invalid-body")
        assert says in response.json()["detail"]
        assert gateway.simulator.calls == 0

    def test_256_questions_are_allowed(self, gateway: GatewayFixture) -> None:
        document = variants(*[[{"a": n, "b": n, "c": n}] for n in range(64)], breakdown="members")
        shown = quoted(gateway, document, cache_control="only-if-cached")
        assert errors(shown) == ["not-cached"] * 64

    def test_tokens_and_methods(self, limited: Limited) -> None:
        gateway = limited(teams={"film": {"tokens": []}})
        assert post(gateway, bodies(ONE), x_api_key="ep_nobody").status_code == 401
        assert post(gateway, bodies(ONE), x_api_key=ADMIN).status_code == 403
        assert gateway.client.get(QUOTE).headers["allow"] == "POST"

    def test_a_disabled_team(self, gateway: GatewayFixture) -> None:
        assert code_of(post(gateway, bodies(ONE), x_api_key=RETIRED)) == "team-disabled"
        assert quoted(gateway, bodies(ONE), x_api_key=MARKETING)["cheapest"] == "v0"


def test_metrics_call_it_a_quote(open_scraped_gateway: OpenGateway) -> None:
    """A quote that was answered from the price book is a hit."""
    gateway = open_scraped_gateway()

    def found() -> dict[tuple[str, ...], float]:
        series = scrape(gateway.client).series("requests_total", "team", "operation", "outcome")
        return {labels: value for labels, value in series.items() if labels[1] == "quote"}

    for _ in range(2):
        quoted(gateway, steps(2))
    wait_until(lambda: len(found()) == 2)
    assert found() == {("design", "quote", "hit"): 1, ("design", "quote", "miss"): 1}
