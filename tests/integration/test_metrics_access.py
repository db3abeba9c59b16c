"""Access to `/metrics`, and its formats."""

import httpx2
import pytest

from gateway_fixture import DESIGN, EXPIRED, RETIRED, OpenGateway, code_of
from metrics_fixture import ADMIN
from prometheus import OPENMETRICS, SCRAPER
from proxy.http.paths import METRICS_PATH
from serving import NO_TLS


class TestAccess:
    @pytest.mark.parametrize(
        ("headers", "status", "code"),
        [
            ({}, 401, "unknown-token"),
            ({"x-api-key": "ep_nobody"}, 401, "unknown-token"),
            ({"x-api-key": EXPIRED}, 401, "unknown-token"),
            ({"x-api-key": DESIGN}, 403, "forbidden"),
            ({"x-api-key": RETIRED}, 403, "forbidden"),
            ({"authorization": f"Bearer {DESIGN}"}, 403, "forbidden"),
        ],
    )
    def test_metrics_need_a_token(
        self, headers: dict[str, str], status: int, code: str, open_scraped_gateway: OpenGateway
    ) -> None:
        answer = httpx2.get(open_scraped_gateway().url + METRICS_PATH, headers=headers, trust_env=False, verify=NO_TLS)
        assert (answer.status_code, code_of(answer)) == (status, code)
        assert ("www-authenticate" in answer.headers) == (status == 401)
        assert "estimate_proxy_" not in answer.text

    @pytest.mark.parametrize("token", [SCRAPER, ADMIN])
    @pytest.mark.parametrize("header", [("x-api-key", "{}"), ("authorization", "Bearer {}")])
    def test_a_metrics_token_and_an_admin_token_give_access(
        self, token: str, header: tuple[str, str], open_scraped_gateway: OpenGateway
    ) -> None:
        named = {header[0]: header[1].format(token)}
        answer = httpx2.get(open_scraped_gateway().url + METRICS_PATH, headers=named, trust_env=False, verify=NO_TLS)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        assert "estimate_proxy_store_up" in answer.text

    @pytest.mark.parametrize("headers", [{}, {"x-api-key": DESIGN}, {"x-api-key": "ep_nobody"}])
    def test_public_metrics_need_no_token(self, headers: dict[str, str], open_scraped_gateway: OpenGateway) -> None:
        gateway = open_scraped_gateway(metrics={"public": True})
        assert (
            httpx2.get(gateway.url + METRICS_PATH, headers=headers, trust_env=False, verify=NO_TLS).status_code == 200
        )

    def test_a_metrics_token_gives_access_to_nothing_else(self, open_scraped_gateway: OpenGateway) -> None:
        gateway = open_scraped_gateway()
        assert code_of(gateway.ask(x_api_key=SCRAPER)) == "forbidden"
        for path in ("/v1/usage", "/v1/quota"):
            assert code_of(gateway.client.get(path, headers={"x-api-key": SCRAPER})) == "forbidden"

    @pytest.mark.parametrize(
        ("accept", "media_type"),
        [
            ("", "text/plain; version=0.0.4; charset=utf-8"),
            ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
            ("text/plain;version=not-a-number", "text/plain; version=0.0.4; charset=utf-8"),
            (OPENMETRICS, "application/openmetrics-text; version=1.0.0; charset=utf-8"),
            ("Application/OpenMetrics-Text", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
            ("application/openmetrics-text;version=ß", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
            ("text/html,application/openmetrics-text", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        ],
    )
    def test_the_scraper_chooses_the_format(
        self, accept: str, media_type: str, open_scraped_gateway: OpenGateway
    ) -> None:
        headers = {b"x-api-key": SCRAPER.encode(), b"accept": accept.encode()}
        answer = open_scraped_gateway().client.get(METRICS_PATH, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == media_type
        assert answer.headers["vary"] == "accept"
        assert answer.text.endswith("# EOF\n") == ("openmetrics" in media_type)
