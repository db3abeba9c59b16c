"""What counts, over sockets and in a real ledger: which answers, how much each of them, and under which model."""

from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest

from faulty_rendernet import Fault
from gateway_fixture import DESIGN, EXPIRED, MARKETING, PATH, Scene, answers, cache_status, code_of
from proxy.demo.simulator import Responder
from proxy.quota.model_names import MAX_MODELS
from proxy.upstream.circuit_breaker import MIN_ANSWERS
from quota_scenes import (
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
    def test_every_answer_each_time(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        for directives in ("", "", "max-age=0", "no-cache", "no-store"):
            assert scene.ask(FLUX, cache_control=directives).status_code == 200
        assert used(scene) == [Decimal("13.75"), 5]
        assert by_model(scene) == {"Flux": row(5, Decimal("13.75"), hit=1, miss=4)}

    @pytest.mark.usefixtures("cold")
    def test_stale_ones_too_and_not_what_is_asked_behind_them(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        scene.ask(FLUX)
        scene.age(3600 + 100)
        assert "stale-while-revalidate" in cache_status(scene.ask(FLUX))
        wait_until(lambda: scene.simulator.calls == 2 and not scene.store.keys("ep1:*:lease"))
        scene.age(3600 + 400)
        scene.simulator.script(Fault.SERVER_ERROR)
        assert "stale-if-error" in cache_status(scene.ask(FLUX))
        assert used(scene) == [Decimal("8.25"), 3]
        assert by_model(scene) == {"Flux": row(3, Decimal("8.25"), stale=2, miss=1)}

    def test_one_that_waited_for_anothers(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        with ThreadPoolExecutor() as pool, scene.simulator.hold() as hold:
            asked = [pool.submit(scene.ask, FLUX) for _ in range(3)]
            wait_until(lambda: usage(scene)["requests"] == 3)
            hold.release()
            assert {future.result().status_code for future in asked} == {200}
        assert scene.simulator.calls == 1
        assert used(scene) == [Decimal("8.25"), 3]
        assert by_model(scene) == {"Flux": row(3, Decimal("8.25"), miss=1, collapsed=2)}

    def test_one_under_way_is_a_request_already(self, limited: Limited) -> None:
        scene = limited(quota(1), requests(1))
        with ThreadPoolExecutor() as pool, scene.simulator.hold() as hold:
            asked = pool.submit(scene.ask, ONE)
            assert scene.simulator.arrived(1)
            assert exceeded(scene.ask(FLUX), 429)["violated-policies"] == ["requests-month"]
            assert usage(scene) == row(1, refused=1, quota_exceeded=1, cancelled=1)
            hold.release()
            assert asked.result().status_code == 200
        assert usage(scene) == row(1, 1, refused=1, miss=1, quota_exceeded=1)

    @pytest.mark.parametrize("failure", FAILURES)
    def test_a_failure_is_a_request_without_credits(self, failure: str, limited: Limited) -> None:
        scene = limited(quota(100), requests(100), upstream={"timeout_s": 0.2})
        answer, status = FAILURES[failure]
        scene.simulator.script(answer)
        failed = scene.ask(FLUX)
        assert failed.status_code == status
        assert left(failed) == {"credits-month": 100, "requests-month": 99}
        assert used(scene) == [0, 1]
        assert by_model(scene) == {"-": row(1, **{failure: 1})}

    def test_an_answer_without_a_price_that_is_refused(self, limited: Limited) -> None:
        scene = limited(quota(100), upstream={"on_unpriced": "refuse"})
        scene.simulator.script(Fault.UNPRICED_NEGATIVE)
        assert code_of(scene.ask()) == "unpriced"
        assert usage(scene) == row(1, unpriced=1)

    def test_one_whose_time_is_over_before_upstream_answers(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100), server={"request_timeout_s": 0.2})
        with scene.simulator.hold() as hold:
            assert code_of(scene.ask(FLUX)) == "upstream-timeout"
            assert used(scene) == [0, 1]
            hold.release()
        wait_until(lambda: usage(scene) == row(1, upstream_timeout=1))

    def test_what_upstream_did_not_want_to_be_asked_is_no_request(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        scene.simulator.script(answers(b"{}", 429, retry_after="30"))
        asked, unasked = scene.ask(FLUX), scene.ask(ONE)
        assert (code_of(asked), code_of(unasked)) == ("upstream-busy", "upstream-busy")
        assert [left(answer)["requests-month"] for answer in (asked, unasked)] == [99, 99]
        assert (scene.simulator.calls, used(scene)) == (1, [0, 1])
        assert by_model(scene) == {"-": row(1, refused=1, upstream_busy=2)}

    def test_behind_an_open_circuit_there_is_no_request(self, limited: Limited) -> None:
        scene = limited(requests(100))
        scene.simulator.script(*[Fault.SERVER_ERROR] * MIN_ANSWERS)
        for number in range(MIN_ANSWERS):
            assert scene.ask(b'[{"seed":%d}]' % number).status_code == 502
        refused = scene.ask(FLUX)
        assert (code_of(refused), left(refused)) == ("upstream-busy", {"requests-month": 100 - MIN_ANSWERS})
        assert (scene.simulator.calls, used(scene)) == (MIN_ANSWERS, [MIN_ANSWERS])
        assert usage(scene) == row(MIN_ANSWERS, refused=1, upstream_error=MIN_ANSWERS, upstream_busy=1)

    def test_what_was_not_to_be_asked_is_no_request(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        absent = scene.ask(FLUX, cache_control="only-if-cached")
        assert (code_of(absent), left(absent)) == ("not-cached", {"credits-month": 100, "requests-month": 100})
        assert usage(scene) == row(refused=1, not_cached=1)
        scene.ask(FLUX)
        assert scene.ask(FLUX, cache_control="only-if-cached").status_code == 200
        assert used(scene) == [Decimal("5.5"), 2]

    def test_what_is_no_question_is_not_counted_at_all(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        bad = [
            scene.ask(b"{}"),
            scene.ask(content_type="text/plain"),
            scene.ask(x_api_key=EXPIRED),
            scene.ask(cache_control="max-age=x"),
            scene.client.get(PATH),
        ]
        assert [response.status_code for response in bad] == [400, 415, 401, 400, 405]
        for response in bad:
            assert {"ratelimit", "ratelimit-policy", "estimate-proxy-warning"}.isdisjoint(response.headers)
        assert (usage(scene), used(scene)) == (row(), [0, 0])

    def test_a_client_that_goes_away_is_charged_for_what_it_asked(self, limited: Limited) -> None:
        scene = limited(quota(100), requests(100))
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {DESIGN}\r\nContent-Length: {len(FLUX)}\r\n\r\n"
        with scene.simulator.hold() as hold:
            with scene.connect() as leader, scene.connect() as follower:
                leader.sendall(head.encode() + FLUX)
                assert scene.simulator.arrived(1)
                follower.sendall(head.encode() + FLUX)
                wait_until(lambda: used(scene) == [0, 2])
            hold.release()
        wait_until(lambda: by_model(scene) == {"Flux": row(2, Decimal("5.5"), miss=1, collapsed=1)})
        assert used(scene) == [Decimal("5.5"), 2]

    def test_a_client_that_goes_away_before_its_body_is_there_is_not(self, limited: Limited) -> None:
        scene = limited(requests(100))
        with scene.connect() as connection:
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {DESIGN}\r\nContent-Length: 4\r\n\r\n["
            connection.sendall(head.encode())
            wait_until(lambda: scene.tracker.arriving_bytes)
        wait_until(lambda: not scene.tracker.arriving_bytes)
        assert (usage(scene), used(scene)) == (row(), [0])

    @pytest.mark.usefixtures("cold")
    def test_usage_is_exactly_what_was_asked(self, limited: Limited) -> None:
        """A day's life of a team, by its outcomes; the quotas and the sum of all rows say the same."""
        scene = limited(quota(21.5), requests(100), rate=rate(15), upstream={"timeout_s": 0.3})
        simulator = scene.simulator
        _ask_for(scene, [(FLUX, "200"), (FLUX, "200"), (b"[1]", "invalid-body")])
        with ThreadPoolExecutor() as pool, simulator.hold() as hold:
            pair = [pool.submit(scene.ask, SEGMENT) for _ in range(2)]
            wait_until(lambda: usage(scene)["requests"] == 4)
            hold.release()
            assert {future.result().status_code for future in pair} == {200}
        scene.age(3600 + 100)
        assert "stale-while-revalidate" in cache_status(scene.ask(FLUX))
        wait_until(lambda: simulator.calls == 3 and not scene.store.keys("ep1:*:lease"))
        scene.age(3600 + 400)
        simulator.script(*(FAILURES[name][0] for name in ("upstream-rejected", "unpriced")))
        simulator.script(Fault.SERVER_ERROR, Fault.REFUSED_KEY, Fault.HANG)
        _ask_for(scene, [(ONE, "422"), (ONE, "200"), (ONE, "upstream-error")])
        _ask_for(scene, [(ONE, "upstream-refused"), (ONE, "upstream-timeout")])
        assert code_of(scene.ask(ONE, cache_control="only-if-cached")) == "not-cached"
        simulator.script(Fault.SERVER_ERROR, None, answers(b"{}", 429, retry_after="30"))
        assert "stale-if-error" in cache_status(scene.ask(FLUX))
        exceeded(scene.ask(ONE))
        _ask_for(scene, [(b"[{},{}]", "upstream-busy"), (b"[{},{}]", "upstream-busy"), (FLUX, "rate-limited")])

        rows = by_model(scene)
        refused = {"not_cached": 1, "quota_exceeded": 1, "rate_limited": 1, "upstream_busy": 2}
        failed = dict.fromkeys(("upstream_error", "upstream_rejected", "upstream_refused", "upstream_timeout"), 1)
        assert rows == {
            "Flux": row(4, 11, hit=1, stale=2, miss=1),
            "segment": row(2, 10, miss=1, collapsed=1),
            "-": row(6, 0, refused=4, unpriced=1, **refused, **failed),
        }
        assert used(scene) == [21, 12]
        total = usage(scene)
        for column in ("requests", "refused", "estimated_credits"):
            assert total[column] == sum(row[column] for row in rows.values())
        for row_ in rows.values():
            assert sum(row_["outcomes"].values()) == row_["requests"] + row_["refused"]


def _ask_for(scene: Scene, expected: list[tuple[bytes, str]]) -> None:
    """Asks one body after the other, for a problem's code, or else a status."""
    for body, word in expected:
        response = scene.ask(body)
        told = code_of(response) if "problem" in response.headers["content-type"] else str(response.status_code)
        assert told == word


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
    def test_are_exact_and_shown_as_upstream_wrote_them(self, limited: Limited) -> None:
        scene = limited(quota(9e6), requests(100))
        scene.simulator.script(*map(priced, AMOUNTS))
        for number, written in enumerate(AMOUNTS):
            body, counted = b'[{"model":"m%d"}]' % number, Decimal(AMOUNTS[written])
            for answer in (scene.ask(body), scene.ask(body)):
                assert answer.content == b'{"data":{"estimated":%b,"balance":7},"error":{}}' % written.encode()
            assert by_model(scene)[f"m{number}"]["estimated_credits"] == 2 * counted
        spent = 2 * sum(map(Decimal, AMOUNTS.values()))
        assert usage(scene)["estimated_credits"] == used(scene)[0] == spent == Decimal("4000210.200004")
        (own, _) = shown(scene, "/v1/quota")["quotas"]
        assert own["remaining"] == 9 * 10**6 - spent
        assert left(scene.ask(b'[{"model":"m6"}]'))["credits-month"] == 4_999_789

    @pytest.mark.parametrize(("limit", "status"), [(1_000_000.100002, 200), (1_000_000.100001, 402)])
    def test_a_micro_credit_decides(self, limit: float, status: int, limited: Limited) -> None:
        scene = limited(quota(limit))
        scene.simulator.script(priced("1e6"), priced("0.1"), priced("0.0000015"))
        assert [scene.ask(body).status_code for body in (ONE, FLUX, SEGMENT)] == [200, 200, status]


class TestModels:
    def test_are_named_by_what_decides_the_price(self, limited: Limited) -> None:
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
        scene = limited()
        answers_ = {model: scene.ask(body) for model, body in expected.items()}
        assert by_model(scene) == {
            model: row(1, exactly(answer)["data"]["estimated"], miss=1) for model, answer in answers_.items()
        }

    def test_have_so_many_names_and_the_rest_are_others(self, limited: Limited) -> None:
        scene = limited(teams={"marketing": team(MARKETING)})
        for number in range(MAX_MODELS + 2):
            scene.ask(b'[{"model":"m%d"}]' % number)
        scene.ask(b'[{"model":"m%d"}]' % MAX_MODELS, x_api_key=MARKETING)
        rows = by_model(scene)
        assert set(rows) == {*(f"m{number}" for number in range(MAX_MODELS)), "other"}
        assert rows["other"] == row(2, 2, miss=2)
        assert by_model(scene, MARKETING) == {"other": row(1, 1, hit=1)}, "names are the organisation's"
