"""Usage over HTTP with a real ledger: which answers count, their credits, and their models."""

from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest

from faulty_rendernet import Fault
from gateway_fixture import DESIGN, EXPIRED, MARKETING, PATH, GatewayFixture, answers, cache_status, code_of
from proxy.demo.simulator import Responder
from proxy.quota.model_names import MAX_MODELS
from proxy.upstream.circuit_breaker import MIN_ANSWERS
from quota_fixture import (
    FLUX,
    ONE,
    SEGMENT,
    Limited,
    by_model,
    exactly,
    exceeded,
    left,
    quota,
    rate,
    requests,
    row,
    shown,
    team,
    usage,
    used,
)
from serving import wait_until

pytestmark = pytest.mark.usefixtures("within_a_minute")

FAILURES: dict[str, tuple[Fault | Responder, int]] = {
    "upstream-error": (Fault.SERVER_ERROR, 502),
    "upstream-rejected": (answers(b'{"data":null,"error":{"code":"no_such_style"}}', 422), 422),
    "upstream-refused": (Fault.REFUSED_KEY, 502),
    "upstream-busy": (Fault.BUSY, 503),
    "upstream-timeout": (Fault.HANG, 504),
    "unpriced": (Fault.UNPRICED_NULL, 200),
}


class TestWhatCounts:
    def test_every_answer_counts_each_time(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100))
        for directives in ("", "", "max-age=0", "no-cache", "no-store"):
            assert gateway.ask(FLUX, cache_control=directives).status_code == 200
        assert used(gateway) == [Decimal("13.75"), 5]
        assert by_model(gateway) == {"Flux": row(5, Decimal("13.75"), hit=1, miss=4)}

    @pytest.mark.usefixtures("cold")
    def test_stale_answers_count_but_their_refresh_does_not(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100))
        gateway.ask(FLUX)
        gateway.age(3600 + 100)
        assert "stale-while-revalidate" in cache_status(gateway.ask(FLUX))
        wait_until(lambda: gateway.simulator.calls == 2 and not gateway.store.keys("ep1:*:lease"))
        gateway.age(3600 + 400)
        gateway.simulator.script(Fault.SERVER_ERROR)
        assert "stale-if-error" in cache_status(gateway.ask(FLUX))
        assert used(gateway) == [Decimal("8.25"), 3]
        assert by_model(gateway) == {"Flux": row(3, Decimal("8.25"), stale=2, miss=1)}

    def test_an_answer_shared_with_another_request_counts(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100))
        with ThreadPoolExecutor() as pool, gateway.simulator.hold() as hold:
            asked = [pool.submit(gateway.ask, FLUX) for _ in range(3)]
            wait_until(lambda: usage(gateway)["requests"] == 3)
            hold.release()
            assert {future.result().status_code for future in asked} == {200}
        assert gateway.simulator.calls == 1
        assert used(gateway) == [Decimal("8.25"), 3]
        assert by_model(gateway) == {"Flux": row(3, Decimal("8.25"), miss=1, collapsed=2)}

    def test_a_request_in_flight_counts_already(self, limited: Limited) -> None:
        gateway = limited(quota(1), requests(1))
        with ThreadPoolExecutor() as pool, gateway.simulator.hold() as hold:
            asked = pool.submit(gateway.ask, ONE)
            assert gateway.simulator.arrived(1)
            assert exceeded(gateway.ask(FLUX), 429)["violated-policies"] == ["requests-month"]
            assert usage(gateway) == row(1, refused=1, quota_exceeded=1, cancelled=1)
            hold.release()
            assert asked.result().status_code == 200
        assert usage(gateway) == row(1, 1, refused=1, miss=1, quota_exceeded=1)

    @pytest.mark.parametrize("failure", FAILURES)
    def test_a_failure_counts_as_a_request_without_credits(self, failure: str, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100), upstream={"timeout_s": 0.2})
        answer, status = FAILURES[failure]
        gateway.simulator.script(answer)
        failed = gateway.ask(FLUX)
        assert failed.status_code == status
        assert left(failed) == {"credits-month": 100, "requests-month": 99}
        assert used(gateway) == [0, 1]
        assert by_model(gateway) == {"-": row(1, **{failure: 1})}

    def test_a_refused_answer_without_a_price_counts_without_credits(self, limited: Limited) -> None:
        gateway = limited(quota(100), upstream={"on_unpriced": "refuse"})
        gateway.simulator.script(Fault.UNPRICED_NEGATIVE)
        assert code_of(gateway.ask()) == "unpriced"
        assert usage(gateway) == row(1, unpriced=1)

    def test_a_timeout_counts_as_a_request_without_credits(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100), server={"request_timeout_s": 0.2})
        with gateway.simulator.hold() as hold:
            assert code_of(gateway.ask(FLUX)) == "upstream-timeout"
            assert used(gateway) == [0, 1]
            hold.release()
        wait_until(lambda: usage(gateway) == row(1, upstream_timeout=1))

    def test_a_request_during_upstreams_retry_after_does_not_count(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100))
        gateway.simulator.script(answers(b"{}", 429, retry_after="30"))
        asked, unasked = gateway.ask(FLUX), gateway.ask(ONE)
        assert (code_of(asked), code_of(unasked)) == ("upstream-busy", "upstream-busy")
        assert [left(answer)["requests-month"] for answer in (asked, unasked)] == [99, 99]
        assert (gateway.simulator.calls, used(gateway)) == (1, [0, 1])
        assert by_model(gateway) == {"-": row(1, refused=1, upstream_busy=2)}

    def test_requests_during_an_open_circuit_do_not_count(self, limited: Limited) -> None:
        gateway = limited(requests(100))
        gateway.simulator.script(*[Fault.SERVER_ERROR] * MIN_ANSWERS)
        for number in range(MIN_ANSWERS):
            assert gateway.ask(b'[{"seed":%d}]' % number).status_code == 502
        refused = gateway.ask(FLUX)
        assert (code_of(refused), left(refused)) == ("upstream-busy", {"requests-month": 100 - MIN_ANSWERS})
        assert (gateway.simulator.calls, used(gateway)) == (MIN_ANSWERS, [MIN_ANSWERS])
        assert usage(gateway) == row(MIN_ANSWERS, refused=1, upstream_error=MIN_ANSWERS, upstream_busy=1)

    def test_requests_with_only_if_cached_and_no_price_do_not_count(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100))
        absent = gateway.ask(FLUX, cache_control="only-if-cached")
        assert (code_of(absent), left(absent)) == ("not-cached", {"credits-month": 100, "requests-month": 100})
        assert usage(gateway) == row(refused=1, not_cached=1)
        gateway.ask(FLUX)
        assert gateway.ask(FLUX, cache_control="only-if-cached").status_code == 200
        assert used(gateway) == [Decimal("5.5"), 2]

    def test_invalid_requests_are_not_counted_at_all(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100))
        bad = [
            gateway.ask(b"{}"),
            gateway.ask(content_type="text/plain"),
            gateway.ask(x_api_key=EXPIRED),
            gateway.ask(cache_control="max-age=x"),
            gateway.client.get(PATH),
        ]
        assert [response.status_code for response in bad] == [400, 415, 401, 400, 405]
        for response in bad:
            assert {"ratelimit", "ratelimit-policy", "estimate-proxy-warning"}.isdisjoint(response.headers)
        assert (usage(gateway), used(gateway)) == (row(), [0, 0])

    def test_a_client_that_leaves_is_charged_for_its_request(self, limited: Limited) -> None:
        gateway = limited(quota(100), requests(100))
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {DESIGN}\r\nContent-Length: {len(FLUX)}\r\n\r\n"
        with gateway.simulator.hold() as hold:
            with gateway.connect() as leader, gateway.connect() as follower:
                leader.sendall(head.encode() + FLUX)
                assert gateway.simulator.arrived(1)
                follower.sendall(head.encode() + FLUX)
                wait_until(lambda: used(gateway) == [0, 2])
            hold.release()
        wait_until(lambda: by_model(gateway) == {"Flux": row(2, Decimal("5.5"), miss=1, collapsed=1)})
        assert used(gateway) == [Decimal("5.5"), 2]

    def test_a_client_that_leaves_before_its_body_is_complete_is_not_charged(self, limited: Limited) -> None:
        gateway = limited(requests(100))
        with gateway.connect() as connection:
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {DESIGN}\r\nContent-Length: 4\r\n\r\n["
            connection.sendall(head.encode())
            wait_until(lambda: gateway.tracker.arriving_bytes)
        wait_until(lambda: not gateway.tracker.arriving_bytes)
        assert (usage(gateway), used(gateway)) == (row(), [0])

    @pytest.mark.usefixtures("cold")
    def test_usage_equals_the_requests_exactly(self, limited: Limited) -> None:
        """Makes requests with all outcomes; quotas and the sum of all rows agree."""
        gateway = limited(quota(21.5), requests(100), rate=rate(15), upstream={"timeout_s": 0.3})
        simulator = gateway.simulator
        _assert_results(gateway, [(FLUX, "200"), (FLUX, "200"), (b"[1]", "invalid-body")])
        with ThreadPoolExecutor() as pool, simulator.hold() as hold:
            pair = [pool.submit(gateway.ask, SEGMENT) for _ in range(2)]
            wait_until(lambda: usage(gateway)["requests"] == 4)
            hold.release()
            assert {future.result().status_code for future in pair} == {200}
        gateway.age(3600 + 100)
        assert "stale-while-revalidate" in cache_status(gateway.ask(FLUX))
        wait_until(lambda: simulator.calls == 3 and not gateway.store.keys("ep1:*:lease"))
        gateway.age(3600 + 400)
        simulator.script(*(FAILURES[name][0] for name in ("upstream-rejected", "unpriced")))
        simulator.script(Fault.SERVER_ERROR, Fault.REFUSED_KEY, Fault.HANG)
        _assert_results(gateway, [(ONE, "422"), (ONE, "200"), (ONE, "upstream-error")])
        _assert_results(gateway, [(ONE, "upstream-refused"), (ONE, "upstream-timeout")])
        assert code_of(gateway.ask(ONE, cache_control="only-if-cached")) == "not-cached"
        simulator.script(Fault.SERVER_ERROR, None, answers(b"{}", 429, retry_after="30"))
        assert "stale-if-error" in cache_status(gateway.ask(FLUX))
        exceeded(gateway.ask(ONE))
        _assert_results(gateway, [(b"[{},{}]", "upstream-busy"), (b"[{},{}]", "upstream-busy"), (FLUX, "rate-limited")])

        rows = by_model(gateway)
        refused = {"not_cached": 1, "quota_exceeded": 1, "rate_limited": 1, "upstream_busy": 2}
        failed = dict.fromkeys(("upstream_error", "upstream_rejected", "upstream_refused", "upstream_timeout"), 1)
        assert rows == {
            "Flux": row(4, 11, hit=1, stale=2, miss=1),
            "segment": row(2, 10, miss=1, collapsed=1),
            "-": row(6, 0, refused=4, unpriced=1, **refused, **failed),
        }
        assert used(gateway) == [21, 12]
        total = usage(gateway)
        for column in ("requests", "refused", "estimated_credits"):
            assert total[column] == sum(row[column] for row in rows.values())
        for row_ in rows.values():
            assert sum(row_["outcomes"].values()) == row_["requests"] + row_["refused"]


def _assert_results(gateway: GatewayFixture, bodies: list[tuple[bytes, str]]) -> None:
    """Sends each body, and compares the problem's code, or else the status."""
    for body, expected in bodies:
        response = gateway.ask(body)
        result = code_of(response) if "problem" in response.headers["content-type"] else str(response.status_code)
        assert result == expected


AMOUNTS = {
    "0.000001": "0.000001",
    "0.1": "0.1",
    "1e6": "1000000",
    "5.0": "5",
    "1e-7": "0.000001",
    "1E+2": "100",
    "0": "0",
    "999999.9999999": "1000000",
}
"""As upstream writes them, and as they count: rounded up to a micro-credit."""


def priced(estimated: str) -> Responder:
    return answers(b'{"data":{"estimated":%b,"balance":7},"error":{}}' % estimated.encode())


class TestAmounts:
    def test_they_are_exact_and_shown_as_upstream_wrote_them(self, limited: Limited) -> None:
        gateway = limited(quota(9e6), requests(100))
        gateway.simulator.script(*map(priced, AMOUNTS))
        for number, written in enumerate(AMOUNTS):
            body, counted = b'[{"model":"m%d"}]' % number, Decimal(AMOUNTS[written])
            for answer in (gateway.ask(body), gateway.ask(body)):
                assert answer.content == b'{"data":{"estimated":%b,"balance":7},"error":{}}' % written.encode()
            assert by_model(gateway)[f"m{number}"]["estimated_credits"] == 2 * counted
        spent = 2 * sum(map(Decimal, AMOUNTS.values()))
        assert usage(gateway)["estimated_credits"] == used(gateway)[0] == spent == Decimal("4000210.200004")
        (own, _) = shown(gateway, "/v1/quota")["quotas"]
        assert own["remaining"] == 9 * 10**6 - spent
        assert left(gateway.ask(b'[{"model":"m6"}]'))["credits-month"] == 4_999_789

    @pytest.mark.parametrize(("limit", "status"), [(1_000_000.100002, 200), (1_000_000.100001, 402)])
    def test_a_quota_is_exact_to_a_micro_credit(self, limit: float, status: int, limited: Limited) -> None:
        gateway = limited(quota(limit))
        gateway.simulator.script(priced("1e6"), priced("0.1"), priced("0.0000015"))
        assert [gateway.ask(body).status_code for body in (ONE, FLUX, SEGMENT)] == [200, 200, status]


class TestModels:
    def test_they_are_named_by_the_member_that_decides_the_price(self, limited: Limited) -> None:
        expected = {
            "segment": b'[{"style":"Anime","segment":{},"model":"Flux"}]',
            "Anime": b'[{"model":"Flux","style":"Anime"}]',
            "Flux": b'[{"true_touch":{},"model":"Flux"},{"model":"Flux","steps":9}]',
            "true_touch": b'[{"narrator":{},"true_touch":{"scale_factor":2}}]',
            "narrator": b'[{"video_anyone":{},"narrator":{"script":"x"}}]',
            "video_anyone": b'[{"video_anyone":{"duration":5}}]',
            "mixed": b'[{"model":"Flux"},{"segment":{}}]',
            "other": b'[{"model":"=HYPERLINK(1)"}]',
            "-": b'[{"steps":30}]',
        }
        gateway = limited()
        answers_ = {model: gateway.ask(body) for model, body in expected.items()}
        assert by_model(gateway) == {
            model: row(1, exactly(answer)["data"]["estimated"], miss=1) for model, answer in answers_.items()
        }

    def test_names_are_limited_and_the_rest_count_as_other(self, limited: Limited) -> None:
        gateway, half = limited(teams={"marketing": team(MARKETING)}), MAX_MODELS // 2
        for number in range(half + 2):
            gateway.ask(b'[{"model":"m%d"}]' % number)
        for number in range(half, MAX_MODELS + 1):
            gateway.ask(b'[{"model":"m%d"}]' % number, x_api_key=MARKETING)
        gateway.ask(b'[{"model":"m%d"}]' % half)
        rows, others = by_model(gateway), by_model(gateway, MARKETING)
        assert set(rows) == {*(f"m{number}" for number in range(half + 1)), "other"}, (
            "one team brings half of the names"
        )
        assert rows[f"m{half}"] == row(1, 1, hit=1), "names are the organisation's"
        assert rows["other"] == row(2, 2, miss=2)
        assert set(others) == {*(f"m{number}" for number in range(half, MAX_MODELS)), "other"}
        assert others["other"] == row(1, 1, miss=1)
