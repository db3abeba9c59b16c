"""The simulator over a real socket, and its price function on its own.

One server runs for all tests, and each test gives it its own simulator. The socket listens before the server runs, so
a client can connect at once.
"""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import httpx2
import orjson
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from faulty_rendernet import Fault
from proxy.demo.simulator import ESTIMATE_PATH, Exchange, Responder, estimate, json_number, price_of
from scripted_simulator import Simulator
from serving import NO_TLS

KEY = "rn-canary/+key"
LEAVING = httpx2.Timeout(5, read=0.2)
PLUS = {"model": "JuggernautXL", "quality": "Plus", "steps": 20}

# Bodies in the shapes that public clients send, without members that change no price.
EVERY_MODE = {
    **PLUS,
    "batch_size": 1,
    "segment": {"asset_id": "ast_01", "find": "red shirt", "replace": "blue shirt"},
    "style": "Bokeh",
    "style_detail": {"name": "Black & White", "base_model": "flux"},
    "true_touch": {"asset_id": "ast_01", "enhance_strength": 0.5, "scale_factor": 1.5},
    "narrator": {"video_asset_id": "ast_vid0000001", "script": "Welcome to the channel", "voice": "Rachel"},
    "video_anyone": {"media_id": "ast_01", "prompt": "static camera", "duration": 5},
}
FLUX_STYLE = {
    "style_detail": {"name": "Raw Photo", "base_model": "flux"},
    "prompt": {"positive": "neon signs"},
}
PRICED = [
    ([EVERY_MODE], b"5"),
    ([PLUS], b"2"),
    ([{**PLUS, "batch_size": 1.0}], b"2"),
    ([{**PLUS, "style": "Bokeh", "reference_image_id": "ast_Q1w2E3r4T5"}], b"2.5"),
    ([{**PLUS, "batch_size": 2, "steps": 30, "aspect_ratio": "3:2"}], b"4.5"),
    ([{**PLUS, "quality": "Regular", "seed": 1873, "facelock": None}], b"1"),
    ([{**PLUS, "quality": "Regular", "facelock": {"asset_id": "ast_f4c3L0ck01"}}], b"1"),
    (
        [
            {
                "model": "flux",
                "style": "Realistic",
                "steps": 25,
                "quality": "Standard",
                "facelock": "ast_A1b2C3d4E5",
            }
        ],
        b"3.5",
    ),
    ([{"model": "RealVisXL_V3.0_Turbo", "quality": "Plus", "style": "Cinematic", "steps": 30}], b"2.25"),
    ([{**FLUX_STYLE, "model": "RealVisXL_V3.0_Turbo", "quality": "Plus", "steps": 30, "seed": -1}], b"6.25"),
    ([{"model": "Flux", "prompt": {"negative": "", "positive": "a man"}, "aspect_ratio": "16:9"}], b"2.75"),
    ([{"model": "Flux", "control_net": {"asset_id": "ast_cn00000001", "name": "Canny"}}], b"2.75"),
    ([{**FLUX_STYLE, "batch_size": 2, "seed": 0}], b"6.5"),
    ([FLUX_STYLE, FLUX_STYLE], b"6.5"),
    ([{"loras": [], "model": "JuggernautXL", "quality": "Regular", "steps": 10}], b"1"),
    ([{"segment": {"asset_id": "ast_seg0000001", "find": "red shirt", "replace": "green coat"}}], b"5"),
    ([{"true_touch": {"asset_id": "ast_tt00000001", "scale_factor": 1.5}}], b"3"),
    ([{"narrator": {"image_asset_id": "ast_img0000003", "audio_asset_id": "ast_aud0000003"}}], b"10"),
    ([{"narrator": {"video_asset_id": "ast_vid0000007", "script": "Here are three tips."}}], b"10.5"),
    ([{"narrator": {"script": "こんにちは、今日は新しい機能を紹介します。" * 12}}], b"15.25"),
    ([{"video_anyone": {"media_id": "ast_8fK2mN0pQr", "prompt": "a bicycle", "duration": 5}}], b"30"),
    (
        [{**PLUS, "batch_size": 4}, {"true_touch": {"scale_factor": 2}}, {"video_anyone": {"duration": 5}}],
        b"34.5",
    ),
    ([PLUS, PLUS, PLUS, FLUX_STYLE], b"8"),
    ([{"model": "RealVisXL_V3.0_Turbo"}], b"1"),
    ([{"model": "RealVisXL_V3.0_Turbo"}] * 2, b"1.5"),
    ([{"model": "JuggernautXL", "batch_size": "2", "cfg_scale": "7", "steps": "30"}], b"2.5"),
    ([dict.fromkeys(EVERY_MODE)], b"1"),
    ([{}], b"1"),
]

# A short alphabet: setting up all of Unicode takes hypothesis a second.
TEXT = st.text("09.-+_e Flux\ud800\u0663あ", max_size=8)
NUMBERS = st.sampled_from([*"0123", "20", "1.5", "1e9999", "-1e9999", "1e99999999999999999999", "nan", "sNaN", "1_0"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
INNER = st.sampled_from(["base_model", "scale_factor", "script", "duration", "asset_id"])
ITEMS = st.dictionaries(
    st.sampled_from([*EVERY_MODE, "seed", "prompt", "sampler", "character", "unheard_of"]),
    JSON | st.dictionaries(INNER, JSON, max_size=3),
    max_size=8,
)


class SimulatorServer:
    """The ASGI app of the server; it calls the current simulator."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    @contextmanager
    def serving(self, simulator: Simulator) -> Iterator[httpx2.Client]:
        self.simulator, self.ended = simulator, threading.Semaphore(0)
        with httpx2.Client(
            base_url=self.base_url, trust_env=False, verify=NO_TLS, headers={"X-API-KEY": KEY}
        ) as client:
            yield client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ended = self.ended
        await self.simulator.app(scope, receive, send)
        ended.release()


@pytest.fixture(scope="module")
def host() -> Iterator[SimulatorServer]:
    sock = socket.create_server(("127.0.0.1", 0))
    host = SimulatorServer(f"http://127.0.0.1:{sock.getsockname()[1]}")
    config = uvicorn.Config(
        host,
        interface="asgi3",
        lifespan="off",
        log_config=None,
        access_log=False,
        ws="none",
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    yield host
    server.should_exit = True
    thread.join()


@pytest.fixture
def simulator() -> Simulator:
    return Simulator(api_key=KEY, balance=20)


@pytest.fixture
def client(host: SimulatorServer, simulator: Simulator) -> Iterator[httpx2.Client]:
    with host.serving(simulator) as client:
        yield client


def ask(client: httpx2.Client, body: Any = (PLUS,), **headers: str) -> httpx2.Response:
    return client.post(ESTIMATE_PATH, content=orjson.dumps(body), headers=headers)


class TestPrices:
    @pytest.mark.parametrize(("body", "price"), PRICED)
    def test_bodies_of_public_clients_have_their_prices(self, body: list[dict[str, Any]], price: bytes) -> None:
        assert json_number(estimate(body)) == price

    @given(item=ITEMS)
    def test_any_body_has_a_positive_price_in_quarters(self, item: dict[str, Any]) -> None:
        price = price_of(item)
        assert price > 0
        assert price % Decimal("0.25") == 0

    @given(items=st.lists(ITEMS, min_size=1, max_size=4))
    def test_a_request_has_a_minimum_and_a_rebate_from_the_third_item_on(self, items: list[dict[str, Any]]) -> None:
        prices = [price_of(item) for item in items]
        first, later, total = sum(prices[:2], Decimal()), sum(prices[2:], Decimal()), estimate(items)
        assert max(Decimal(1), first + later * Decimal("0.75")) <= total <= max(Decimal(1), first + later)
        assert total < first + later or all(price < 1 for price in prices[2:])

    @given(item=ITEMS, seed=JSON, prompt=JSON, sampler=JSON)
    def test_seed_prompt_and_sampler_are_neutral(
        self, item: dict[str, Any], seed: Any, prompt: Any, sampler: Any
    ) -> None:
        assert price_of({**item, "seed": seed, "prompt": prompt, "sampler": sampler}) == price_of(item)

    @given(item=ITEMS, batch_size=st.integers(1, 50))
    def test_twice_the_batch_is_twice_the_price(self, item: dict[str, Any], batch_size: int) -> None:
        once = price_of({**item, "batch_size": batch_size})
        assert price_of({**item, "batch_size": 2 * batch_size}) == 2 * once
        assert price_of({**item, "batch_size": str(batch_size)}) == once

    @given(unusable=st.none() | st.booleans() | st.sampled_from([0, -1, "", "many", "nan", [], {}, 1e300, 10**5000]))
    def test_an_unusable_value_counts_as_its_default(self, unusable: Any) -> None:
        assert price_of({**PLUS, "batch_size": unusable, "steps": unusable}) == 2
        assert price_of({"true_touch": {"scale_factor": unusable}}) == 2
        assert price_of({"video_anyone": {"duration": unusable}}) == 30

    def test_an_empty_mode_counts_as_present(self) -> None:
        assert price_of({"segment": "", "model": "Flux"}) == 5
        assert price_of({"style": "", "model": "Flux"}) == Decimal("3.25")

    def test_the_first_mode_present_wins(self) -> None:
        item, prices = dict(EVERY_MODE), []
        for name in ("segment", "style", "style_detail", "model", "true_touch", "narrator", "video_anyone"):
            prices.append(price_of(item))
            del item[name]
        assert prices == [Decimal(text) for text in ("5", "6", "6", "2", "3", "10.5", "30")]

    @pytest.mark.parametrize(
        ("more", "price"),
        [
            ({"quality": "Regular"}, "1"),
            ({"model": "Flux"}, "5.5"),
            ({"steps": 21}, "2.25"),
            ({"steps": 41}, "2.75"),
        ],
    )
    def test_quality_model_and_steps_change_the_price(self, more: dict[str, Any], price: str) -> None:
        assert price_of({**PLUS, **more}) == Decimal(price)

    @given(quarters=st.integers(1, 10**12))
    def test_only_fractions_have_a_decimal_point(self, quarters: int) -> None:
        text = json_number(Decimal(quarters) / 4)
        assert Decimal(text.decode()) * 4 == quarters
        assert (b"." in text) == (quarters % 4 != 0)
        assert not text.endswith(b".0")


class TestOrdinaryAnswers:
    def test_an_estimate(self, simulator: Simulator, client: httpx2.Client) -> None:
        answer = ask(client)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        assert answer.content == b'{"data":{"estimated":2,"balance":20},"error":{}}'
        assert ask(client, [{"model": "Flux"}]).content == b'{"data":{"estimated":2.75,"balance":20},"error":{}}'
        assert simulator.calls == 2

    def test_received_requests_are_recorded(self, simulator: Simulator, client: httpx2.Client) -> None:
        client.post(f"{ESTIMATE_PATH}?type=image", content=b"[{}]", headers={"X-Team": "a"})
        (received,) = simulator.received
        assert (received.path, received.query, received.body) == (ESTIMATE_PATH, b"type=image", b"[{}]")
        assert (b"x-team", b"a") in received.headers
        assert received.api_keys == [KEY.encode()]

    @pytest.mark.parametrize("keys", [[], ["wrong"], [KEY, KEY], [""]])
    def test_only_the_one_key_is_accepted(self, client: httpx2.Client, keys: list[str]) -> None:
        del client.headers["X-API-KEY"]
        headers = [("x-api-key", key) for key in keys]
        answer = client.post(ESTIMATE_PATH, content=b"[{}]", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "unauthorized"

    def test_a_body_must_be_an_array_of_objects(self, simulator: Simulator, client: httpx2.Client) -> None:
        bodies = [b"", b"{}", b"[]", b"[1]", b"[{},null]", b"[{}", b'[{"seed":NaN}]', b"\xff", b"[" * 5000]
        answers = [client.post(ESTIMATE_PATH, content=body) for body in bodies]
        assert {answer.status_code for answer in answers} == {400}
        assert all(answer.json()["data"] is None and answer.json()["error"]["message"] for answer in answers)
        assert simulator.calls == len(bodies)

    def test_a_missing_asset_is_404(self, client: httpx2.Client) -> None:
        answer = ask(client, [PLUS, {"unheard_of": [{"facelock": "ast_missing01"}]}])
        assert answer.status_code == 404
        assert "ast_missing01" in answer.json()["error"]["message"]
        assert ask(client, [{"ast_missing": 1, "facelock": "not ast_missing"}]).status_code == 200

    def test_deep_nesting_is_handled(self, client: httpx2.Client) -> None:
        nested = b'[{"batch_size":' + b"[" * 1000 + b"]" * 1000 + b"}]"
        assert client.post(ESTIMATE_PATH, content=nested).status_code == 200

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", ESTIMATE_PATH),
            ("POST", ESTIMATE_PATH + "/"),
            ("POST", "/pub/v1/generations"),
            ("GET", "/"),
        ],
    )
    def test_nothing_else_is_served(self, simulator: Simulator, client: httpx2.Client, method: str, path: str) -> None:
        answer = client.request(method, path)
        assert answer.status_code == 404
        assert answer.json() == {"data": None, "error": {"code": "not_found", "message": "No such endpoint"}}
        assert simulator.calls == 0
        assert [received.path for received in simulator.received] == [path]


class TestBalance:
    def test_it_decreases_with_each_call_and_stops_at_zero(self, host: SimulatorServer) -> None:
        with host.serving(Simulator(api_key=KEY, balance=8, spend_every=2)) as client:
            balances = [ask(client).json()["data"]["balance"] for _ in range(8)]
        assert balances == [8, 5, 5, 2, 2, 0, 0, 0]

    def test_it_can_stay_constant(self, host: SimulatorServer) -> None:
        with host.serving(Simulator(api_key=KEY, balance=8, spend_every=0)) as client:
            assert {ask(client).json()["data"]["balance"] for _ in range(3)} == {8}


class TestFaults:
    @pytest.mark.parametrize(
        ("fault", "status", "code"),
        [
            (Fault.SERVER_ERROR, 500, "internal_error"),
            (Fault.BUSY, 429, "too_many_requests"),
            (Fault.BUSY_FOR_NO_TIME, 429, "too_many_requests"),
            (Fault.ERROR_IN_200, 200, "estimate_failed"),
            (Fault.REFUSED_KEY, 401, "unauthorized"),
            (Fault.FORBIDDEN, 403, "forbidden"),
        ],
    )
    def test_envelopes(self, simulator: Simulator, client: httpx2.Client, fault: Fault, status: int, code: str) -> None:
        simulator.script(fault)
        answer = ask(client)
        assert (answer.status_code, answer.json()["data"], answer.json()["error"]["code"]) == (
            status,
            None,
            code,
        )
        assert answer.headers.get("retry-after") == ("1" if fault is Fault.BUSY else None)

    @pytest.mark.parametrize(
        ("fault", "estimated"),
        [
            (Fault.UNPRICED_TEXT, "5"),
            (Fault.UNPRICED_NULL, None),
            (Fault.UNPRICED_NEGATIVE, -5),
            (Fault.UNPRICED_BOOL, True),
            (Fault.UNPRICED_HUGE, 2_000_000_000),
        ],
    )
    def test_unpriced(self, simulator: Simulator, client: httpx2.Client, fault: Fault, estimated: object) -> None:
        simulator.script(fault)
        answer = ask(client)
        assert answer.status_code == 200
        assert answer.content == orjson.dumps({"data": {"estimated": estimated, "balance": 20}, "error": {}})

    @pytest.mark.parametrize(("fault", "status"), [(Fault.HTML_PAGE, 502), (Fault.HTML_IN_200, 200)])
    def test_html(self, simulator: Simulator, client: httpx2.Client, fault: Fault, status: int) -> None:
        simulator.script(fault)
        answer = ask(client)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8")
        assert answer.text.startswith("<!DOCTYPE html>")

    def test_chunked(self, simulator: Simulator, client: httpx2.Client) -> None:
        simulator.script(Fault.CHUNKED, None)
        chunked, plain = ask(client), ask(client)
        assert "content-length" not in chunked.headers
        assert chunked.headers["transfer-encoding"] == "chunked"
        assert (chunked.status_code, chunked.content) == (plain.status_code, plain.content)

    def test_chunked_is_several_chunks(self, simulator: Simulator, client: httpx2.Client) -> None:
        simulator.script(Fault.CHUNKED)
        lines = (
            f"POST {ESTIMATE_PATH} HTTP/1.1",
            "host: a",
            f"x-api-key: {KEY}",
            "connection: close",
            "content-length: 4",
            "",
            "[{}]",
        )
        with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as sock:
            sock.sendall("\r\n".join(lines).encode())
            with sock.makefile("rb") as answer:
                wire = answer.read()
        assert wire.count(b"\r\n7\r\n") == 6

    def test_echoed_keys(self, simulator: Simulator, client: httpx2.Client) -> None:
        simulator.script(Fault.ECHOES_KEY, Fault.ECHOES_KEY_ESCAPED)
        plain, escaped = ask(client), ask(client)
        assert plain.status_code == escaped.status_code == 400
        assert KEY.encode() in plain.content
        assert KEY.encode() not in escaped.content
        assert b"\\u0072\\u006e\\u002d" in escaped.content
        assert KEY in escaped.json()["error"]["message"]

    def test_truncated(self, simulator: Simulator, client: httpx2.Client) -> None:
        simulator.script(Fault.TRUNCATED_JSON)
        answer = ask(client)
        assert (answer.status_code, answer.headers["content-length"]) == (200, str(len(answer.content)))
        with pytest.raises(orjson.JSONDecodeError):
            orjson.loads(answer.content)

    def test_oversized(self, simulator: Simulator, client: httpx2.Client) -> None:
        simulator.script(Fault.OVERSIZED)
        answer = ask(client)
        assert len(answer.content) > 2 * 1024 * 1024
        assert answer.json()["data"]["estimated"] == 2

    def test_extra_data_keeps_its_spelling(self, simulator: Simulator, client: httpx2.Client) -> None:
        simulator.script(Fault.EXTRA_DATA)
        answer = ask(client)
        assert b'"currency":"credits","breakdown":[{"item":0,"credits":1.50}]' in answer.content
        assert answer.json()["data"]["estimated"] == 2

    def test_redirect(self, simulator: Simulator, client: httpx2.Client) -> None:
        simulator.script(Fault.REDIRECT)
        answer = ask(client)
        assert (answer.status_code, answer.headers["location"]) == (302, "/pub/v1/elsewhere")

    def test_a_hanging_request_ends_with_its_client(
        self, host: SimulatorServer, simulator: Simulator, client: httpx2.Client
    ) -> None:
        simulator.script(Fault.HANG)
        with pytest.raises(httpx2.ReadTimeout):
            client.post(ESTIMATE_PATH, content=b"[{}]", timeout=LEAVING)
        assert simulator.calls == 1
        assert host.ended.acquire(timeout=5)

    def test_every_fault_can_be_scripted(self, simulator: Simulator, client: httpx2.Client) -> None:
        answering = [fault for fault in Fault if fault is not Fault.HANG]
        simulator.script(*answering)
        for _ in answering:
            ask(client)
        assert ask(client).content == b'{"data":{"estimated":2,"balance":14},"error":{}}'

    def test_a_script_runs_in_order_and_takes_functions(self, simulator: Simulator, client: httpx2.Client) -> None:
        def teapot(exchange: Exchange) -> JSONResponse:
            return JSONResponse({"ordinary": exchange.status, "sent": len(exchange.received.body)}, 418)

        simulator.script(None, teapot, Fault.BUSY)
        answers = [ask(client, [{}]) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 418, 429, 200]
        assert answers[1].json() == {"ordinary": 200, "sent": 4}

    def test_a_fault_does_not_change_a_refusal(self, simulator: Simulator, client: httpx2.Client) -> None:
        simulator.script(Fault.EXTRA_DATA, Fault.OVERSIZED, Fault.UNPRICED_NULL, Fault.CHUNKED, None)
        answers = [ask(client, []) for _ in range(5)]
        assert {(answer.status_code, answer.content) for answer in answers} == {(400, answers[-1].content)}

    def test_random_faults_repeat_with_their_seed(self, host: SimulatorServer) -> None:
        faults: dict[Responder, float] = {Fault.BUSY: 0.25, Fault.SERVER_ERROR: 0.25}

        def statuses(seed: int) -> list[int]:
            with host.serving(Simulator(api_key=KEY, faults=faults, latency_s=(0, 0.001), seed=seed)) as client:
                return [ask(client).status_code for _ in range(60)]

        first = statuses(1)
        assert set(first) == {200, 429, 500}
        assert 15 < first.count(200) < 45
        assert statuses(1) == first
        assert statuses(2) != first

    def test_a_fault_of_probability_1_always_occurs(self, host: SimulatorServer) -> None:
        with host.serving(Simulator(api_key=KEY, faults={Fault.BUSY: 1.0})) as client:
            assert {ask(client).status_code for _ in range(10)} == {429}


class TestHold:
    def test_held_requests_are_counted_and_answered_after_the_release(
        self, simulator: Simulator, client: httpx2.Client
    ) -> None:
        with ThreadPoolExecutor(3) as pool, simulator.hold() as hold:
            answers = [pool.submit(ask, client) for _ in range(3)]
            assert simulator.arrived(3)
            assert len(simulator.received) == 3
            assert not any(answer.done() for answer in answers)
            hold.release()
            hold.release()
            assert {answer.result(5).status_code for answer in answers} == {200}
            assert ask(client).status_code == 200

    def test_a_new_hold_holds_again(self, simulator: Simulator, client: httpx2.Client) -> None:
        for calls in (1, 2):
            with ThreadPoolExecutor(1) as pool, simulator.hold():
                answer = pool.submit(ask, client)
                assert simulator.arrived(calls)
                assert not answer.done()

    def test_a_client_that_leaves_affects_no_other(self, simulator: Simulator, client: httpx2.Client) -> None:
        with ThreadPoolExecutor(1) as pool, simulator.hold():
            answer = pool.submit(ask, client)
            with pytest.raises(httpx2.ReadTimeout):
                client.post(ESTIMATE_PATH, content=b"[{}]", timeout=LEAVING)
            assert simulator.arrived(2)
            assert not answer.done()
        assert answer.result().status_code == 200

    def test_waiting_for_calls_that_never_arrive_ends(self, simulator: Simulator) -> None:
        assert not simulator.arrived(1, within_s=0.01)
