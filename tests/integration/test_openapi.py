"""`GET /openapi.json`: the document says what the gateway serves, and the gateway answers as the document says."""

from typing import Any, cast

import orjson
from starlette.routing import Route

from gateway_fixture import PATH, GatewayFixture, settings
from proxy.app import build
from proxy.gateway.in_flight import InFlightTracker
from proxy.http.openapi.document import openapi_document
from proxy.telemetry.metrics import Metrics

ASSETS = ("/docs/", "/page/")
"""Scripts and styles of our pages are not in the document."""


def test_it_is_public_and_can_be_revalidated(gateway: GatewayFixture) -> None:
    response = gateway.client.get("/openapi.json", headers={"x-api-key": ""})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert response.json() == orjson.loads(orjson.dumps(openapi_document()))
    again = gateway.client.get("/openapi.json", headers={"if-none-match": response.headers["etag"]})
    assert again.status_code == 304


def test_every_path_that_is_served_is_documented_and_no_other() -> None:
    configured = settings("redis://127.0.0.1:1", "http://127.0.0.1:1")
    routes = cast("list[Route]", build(configured, {}, InFlightTracker(), Metrics()).routes)
    served = {route.path: (route.methods or set()) - {"HEAD"} for route in routes if not route.path.startswith(ASSETS)}
    paths: dict[str, Any] = openapi_document()["paths"]
    assert served == {path: {method.upper() for method in methods} for path, methods in paths.items()}
    assert PATH in served
