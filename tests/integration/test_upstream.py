"""Failures and unusual answers of upstream, and the gateway's responses to clients."""

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from faulty_rendernet import Fault
from gateway_fixture import API_KEY, MARKETING, GatewayFixture, OpenGateway, answers, break_off, cache_status, code_of
from metric_samples import sample_value
from serving import free_port, wait_until

PRICED = b'{"data":{"estimated":5,"balance":20},"error":{}}'


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (Fault.SERVER_ERROR, 502, "upstream-error"),
        (Fault.HTML_PAGE, 502, "upstream-error"),
        (Fault.HTML_IN_200, 502, "upstream-error"),
        (Fault.TRUNCATED_JSON, 502, "upstream-error"),
        (Fault.OVERSIZED, 502, "upstream-error"),
        (Fault.REDIRECT, 502, "upstream-error"),
        (Fault.ECHOES_KEY, 502, "upstream-error"),
        (Fault.ECHOES_KEY_ESCAPED, 502, "upstream-error"),
        (Fault.REFUSED_KEY, 502, "upstream-refused"),
        (Fault.FORBIDDEN, 502, "upstream-refused"),
        (Fault.BUSY_FOR_NO_TIME, 503, "upstream-busy"),
    ],
)
def test_a_failure_becomes_a_problem_and_is_not_stored(
    gateway: GatewayFixture, fault: Fault, status: int, code: str
) -> None:
    gateway.simulator.script(fault)
    failed = gateway.ask()
    assert (failed.status_code, code_of(failed)) == (status, code)
    assert cache_status(failed).startswith("fwd=miss")
    assert API_KEY not in failed.text
    recovered = gateway.ask()
    assert cache_status(recovered) == "fwd=miss; fwd-status=200; stored; ttl=3600"
    assert len(gateway.simulator.received) == 2


@pytest.mark.parametrize(
    "fault",
    [
        Fault.ERROR_IN_200,
        Fault.UNPRICED_TEXT,
        Fault.UNPRICED_NULL,
        Fault.UNPRICED_BOOL,
        Fault.UNPRICED_NEGATIVE,
        Fault.UNPRICED_HUGE,
    ],
)
def test_an_unpriced_answer_passes_through_and_is_not_stored(open_gateway: OpenGateway, fault: Fault) -> None:
    gateway = open_gateway()
    gateway.simulator.script(fault, fault)
    passed = gateway.ask()
    assert passed.status_code == 200
    assert cache_status(passed) == "fwd=miss; fwd-status=200"
    assert not gateway.store.keys("ep1:*:price")

    refusing = open_gateway(upstream={"on_unpriced": "refuse"})
    refused = refusing.ask()
    assert (refused.status_code, code_of(refused)) == (502, "unpriced")


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422, 451])
def test_refusals_of_a_body_pass_through_unchanged(gateway: GatewayFixture, status: int) -> None:
    body = b'{ "data": null, "error": {"code": "bad", "message": "\\u00e9"} }'
    gateway.simulator.script(answers(body, status, set_cookie="a=b", x_upstream="1", cache_control="max-age=60"))
    response = gateway.ask()
    assert (response.status_code, response.content) == (status, body)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    assert cache_status(response) == f"fwd=miss; fwd-status={status}"
    assert not {"set-cookie", "x-upstream"} & set(response.headers)
    assert gateway.ask().status_code == 200


BOOM = b'{"data":null,"error":{"code":"internal","message":"boom"}}'


def test_its_error_message_is_in_the_problem_and_in_the_log(
    gateway: GatewayFixture, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.simulator.script(answers(BOOM, 500))
    failed = gateway.ask()
    assert (failed.status_code, code_of(failed)) == (502, "upstream-error")
    assert failed.json()["detail"] == "RenderNet answered 500: try again later."
    assert failed.json()["upstream"] == {"status": 500, "code": "internal", "message": "boom"}
    assert cache_status(failed) == "fwd=miss; fwd-status=500"
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert line.getMessage() == "upstream fails for the account default: upstream-error (500, internal: boom)"


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, "upstream-refused"), (403, "upstream-refused"), (429, "upstream-busy"), (503, "upstream-error")],
)
def test_its_error_message_reaches_every_waiting_request(gateway: GatewayFixture, status: int, code: str) -> None:
    gateway.simulator.script(answers(BOOM, status))
    with ThreadPoolExecutor(3) as pool, gateway.simulator.hold() as hold:
        asked = [pool.submit(gateway.ask) for _ in range(3)]
        wait_until(lambda: gateway.tracker.in_flight == 3)
        hold.release()
        responses = [future.result() for future in asked]
    words = {"status": status, "code": "internal", "message": "boom"}
    assert [(code_of(response), response.json()["upstream"]) for response in responses] == [(code, words)] * 3
    assert gateway.simulator.calls <= 1


def test_its_error_message_is_withheld_if_it_contains_our_key(
    gateway: GatewayFixture, caplog: pytest.LogCaptureFixture
) -> None:
    for status in (401, 429, 500):
        gateway.simulator.script(answers(BOOM.replace(b"boom", API_KEY.encode()), status))
        failed = gateway.ask(b'[{"steps":%d}]' % status)
        assert "upstream" not in failed.json()
        assert API_KEY not in failed.text + caplog.text


def test_its_status_is_reported_unchanged(gateway: GatewayFixture) -> None:
    gateway.simulator.script(answers(PRICED, 201), answers(b"{}", 203))
    assert cache_status(gateway.ask()) == "fwd=miss; fwd-status=201; stored; ttl=3600"
    assert cache_status(gateway.ask(b"[{}]")) == "fwd=miss; fwd-status=203"


def test_the_circuit_breaker_logs_when_it_opens_and_closes_and_why(
    open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It logs each change, although other log lines are suppressed for a while after a recovery."""
    monkeypatch.setattr("proxy.upstream.circuit_breaker.OPEN_S", 0.2)
    caplog.set_level("INFO", "proxy.upstream.client")
    gateway, body = open_gateway(), iter(b'[{"steps":%d}]' % n for n in range(1000))
    gateway.simulator.script(Fault.SERVER_ERROR)
    assert gateway.ask(next(body)).status_code == 502
    assert gateway.ask(next(body)).status_code == 200
    caplog.clear()
    gateway.simulator.script(*[Fault.SERVER_ERROR] * 12)
    while code_of(failed := gateway.ask(next(body))) == "upstream-error":
        pass
    assert code_of(failed) == "upstream-busy"
    wait_until(lambda: gateway.ask(next(body)).status_code == 200)
    lines = [record.getMessage() for record in caplog.records if "circuit breaker" in record.getMessage()]
    about, reason = (
        "circuit breaker of the account default",
        "upstream-error (500, internal_error: Something went wrong)",
    )
    half_opens = f"{about} half-opens after … s: one probe, for 2 s at most"
    assert [re.sub(r"after \d+\.\d s", "after … s", line) for line in lines] == [
        f"{about} opens for 0.2 s: 9 of 10 answers within 10 s were failures; the last error: {reason}",
        *(half_opens, f"{about} opens for 0.2 s: the probe failed; the last error: {reason}") * 4,
        half_opens,
        f"{about} closes after … s: the probe was answered",
    ]


def test_a_chunked_answer_is_accepted(gateway: GatewayFixture) -> None:
    gateway.simulator.script(Fault.CHUNKED)
    assert gateway.ask().json()["data"]["estimated"] == 2.75


def test_its_cookies_are_not_sent_back(gateway: GatewayFixture) -> None:
    gateway.simulator.script(answers(PRICED, set_cookie="session=1; Path=/"))
    gateway.ask()
    gateway.ask(b"[{}]")
    assert all(name != b"cookie" for received in gateway.simulator.received for name, _ in received.headers)


@pytest.mark.parametrize(
    ("retry_after", "expected"),
    [("7", "7"), ("3600", "3600"), ("3601", None), ("soon", "1"), ("-1", "1"), (None, "1")],
)
def test_its_retry_after_is_passed_on_up_to_an_hour(
    gateway: GatewayFixture, retry_after: str | None, expected: str | None
) -> None:
    headers = {} if retry_after is None else {"retry_after": retry_after}
    gateway.simulator.script(answers(b"busy", 429, **headers))
    response = gateway.ask()
    assert code_of(response) == "upstream-busy"
    assert response.headers.get("retry-after") == expected


def test_its_retry_after_may_be_a_date(gateway: GatewayFixture) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    gateway.simulator.script(answers(b"{}", 429, retry_after=date))
    assert 85 <= int(gateway.ask().headers["retry-after"]) <= 90


def test_the_query_is_sent_and_is_part_of_the_key(gateway: GatewayFixture) -> None:
    path = "/pub/v1/generations/estimate"
    for query in (b"", b"type=image", b"type=video", b"a=%2F&b=%zz&c='\xff\""):
        response = gateway.client.post(f"{path}?{query.decode('latin-1')}" if query else path, content=b"[{}]")
        assert cache_status(response).startswith("fwd=miss")
    sent = [received.query for received in gateway.simulator.received]
    assert sent[:3] == [b"", b"type=image", b"type=video"]
    assert sent[3].startswith(b"a=%2F&b=%zz&c='%")
    assert cache_status(gateway.client.post(f"{path}?type=image", content=b"[{}]")).startswith("hit")


class TestTime:
    def test_a_hanging_upstream_times_out(self, open_gateway: OpenGateway) -> None:
        gateway = open_gateway(upstream={"timeout_s": 0.2})
        gateway.simulator.script(Fault.HANG)
        response = gateway.ask()
        assert (response.status_code, code_of(response)) == (504, "upstream-timeout")
        assert cache_status(response) == "fwd=miss"
        assert cache_status(gateway.ask()).endswith("stored; ttl=3600")

    def test_one_deadline_over_the_whole_answer(self, open_gateway: OpenGateway) -> None:
        gateway = open_gateway(server={"request_timeout_s": 0.3}, upstream={"timeout_s": 5})
        with gateway.simulator.hold():
            response = gateway.ask()
        assert (response.status_code, code_of(response)) == (504, "upstream-timeout")
        assert cache_status(response) == "fwd=miss"

    def test_a_slow_drip_does_not_outlive_the_timeout(self, open_gateway: OpenGateway) -> None:
        with dripping() as url:
            gateway = open_gateway(upstream={"timeout_s": 0.3, "base_url": url})
            assert code_of(gateway.ask()) == "upstream-timeout"

    def test_an_unreachable_upstream_is_a_502(self, open_gateway: OpenGateway) -> None:
        gateway = open_gateway(upstream={"base_url": f"http://127.0.0.1:{free_port()}"})
        response = gateway.ask()
        assert (response.status_code, code_of(response)) == (502, "upstream-error")
        assert gateway.client.get("/readyz").json() == {"status": "ready", "degraded": ["upstream"]}

    def test_readiness_recovers_with_upstream(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(Fault.SERVER_ERROR)
        gateway.ask()
        assert gateway.client.get("/readyz").json()["degraded"] == ["upstream"]
        gateway.ask()
        assert gateway.client.get("/readyz").json()["degraded"] == []


class TestCollapsing:
    def test_equal_requests_at_once_make_one_call(self, gateway: GatewayFixture) -> None:
        spellings = [b'[{"model":"Flux","steps":7}]', b'[{"steps":7.0,"model":"Fl\\u0075x"}]']
        with ThreadPoolExecutor(20) as pool, gateway.simulator.hold() as hold:
            tokens: tuple[dict[str, str], ...] = ({"x_api_key": MARKETING}, {})
            asked = [pool.submit(gateway.ask, spellings[n % 2], **tokens[n % 2]) for n in range(20)]
            wait_until(lambda: gateway.tracker.in_flight == 20)
            hold.release()
            responses = [future.result() for future in asked]
        assert gateway.simulator.calls == 1
        assert {response.text for response in responses} == {'{"data":{"estimated":2.75,"balance":10000},"error":{}}'}
        statuses = sorted(cache_status(response) for response in responses)
        assert statuses.count("fwd=miss; fwd-status=200; stored; ttl=3600") == 1
        assert statuses.count("fwd=miss; fwd-status=200; stored; ttl=3600; collapsed") == 19
        assert all("age" not in response.headers for response in responses)

    def test_followers_are_answered_if_the_leaders_client_leaves(self, gateway: GatewayFixture) -> None:
        with ThreadPoolExecutor(1) as pool, gateway.simulator.hold() as hold:
            leader = gateway.connect()
            head = f"POST /pub/v1/generations/estimate HTTP/1.1\r\nHost: x\r\nX-API-KEY: {MARKETING}\r\n"
            leader.sendall(head.encode() + b"Content-Length: 18\r\n\r\n" + b'[{"model":"Flux"}]')
            assert gateway.simulator.arrived(1)
            follower = pool.submit(gateway.ask)
            wait_until(lambda: gateway.tracker.in_flight == 2)
            break_off(leader)
            hold.release()
            response = follower.result()
        assert response.json()["data"]["estimated"] == 2.75
        assert cache_status(response).endswith("collapsed")
        assert gateway.simulator.calls == 1

    def test_a_price_is_stored_although_its_only_client_has_left(self, gateway: GatewayFixture) -> None:
        with gateway.simulator.hold() as hold:
            leader = gateway.connect()
            head = f"POST /pub/v1/generations/estimate HTTP/1.1\r\nHost: x\r\nX-API-KEY: {MARKETING}\r\n"
            leader.sendall(head.encode() + b"Content-Length: 18\r\n\r\n" + b'[{"model":"Flux"}]')
            assert gateway.simulator.arrived(1)
            break_off(leader)
            hold.release()
        wait_until(lambda: gateway.tracker.in_flight == 0)
        assert cache_status(gateway.ask()).startswith("hit")
        assert gateway.simulator.calls == 1

    def test_a_failure_reaches_every_follower_after_one_call(self, gateway: GatewayFixture) -> None:
        gateway.simulator.script(answers(b"{}", 429, retry_after="9"))
        with ThreadPoolExecutor(5) as pool, gateway.simulator.hold() as hold:
            asked = [pool.submit(gateway.ask) for _ in range(5)]
            wait_until(lambda: gateway.tracker.in_flight == 5)
            hold.release()
            responses = [future.result() for future in asked]
        assert {(code_of(response), response.headers["retry-after"]) for response in responses} == {
            ("upstream-busy", "9")
        }
        assert len(gateway.simulator.received) == 1

    def test_a_lease_lasts_as_long_as_its_fetch_and_a_quick_one_is_not_renewed(
        self, open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lease_s = 0.4
        for module in ("cache.leases", "gateway.fetcher"):
            monkeypatch.setattr(f"proxy.{module}.LEASE_S", lease_s)
        patient = {"timeout_s": 8}  # renewals are slower on a busy machine
        one, other = open_gateway(upstream=patient), open_gateway(upstream=patient)
        with ThreadPoolExecutor(2) as pool, one.simulator.hold() as hold:
            asked = [pool.submit(one.ask)]
            assert one.simulator.arrived(1)
            wait_until(lambda: renewals(one) >= 8)  # the lifetime of two leases
            asked.append(pool.submit(other.ask))
            wait_until(lambda: renewals(one) >= 16)
            hold.release()
            assert [future.result().status_code for future in asked] == [200, 200]
        assert one.simulator.calls == 1
        before = renewals(one)
        assert one.ask(b"[{}]").status_code == 200
        assert renewals(one) == before

    def test_different_requests_do_not_wait_for_each_other(self, gateway: GatewayFixture) -> None:
        with ThreadPoolExecutor(2) as pool, gateway.simulator.hold() as hold:
            asked = [pool.submit(gateway.ask, body) for body in (b"[{}]", b'[{"a":null}]')]
            assert gateway.simulator.arrived(2)
            hold.release()
            assert {cache_status(future.result()) for future in asked} == {"fwd=miss; fwd-status=200; stored; ttl=3600"}


def renewals(gateway: GatewayFixture) -> float:
    """Returns how often the gateway has renewed a lease."""
    return sample_value(gateway.metrics, "estimate_proxy_store_duration_seconds_count", call="lease_keep")


@contextlib.contextmanager
def dripping() -> Iterator[str]:
    """Starts an upstream that sends its answer byte by byte and never ends."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
                while not over.wait(0.05):
                    connection.sendall(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        over.set()
        thread.join()
