"""`GET /healthz` and `GET /readyz`: what load balancers and orchestrators ask, without a token."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from proxy.gateway.in_flight import InFlightTracker
from proxy.http.responses import request_id_of
from proxy.problems import DEFAULT_RETRY_AFTER_S
from proxy.store.client import Store
from proxy.upstream.client import Upstream


async def liveness(request: Request) -> Response:
    return _answer(request, {"status": "alive"})


async def readiness(
    stores: Sequence[Store], upstream: Upstream, tracker: InFlightTracker, request: Request
) -> Response:
    """Ready unless draining.

    A lost store or upstream is only reported as degraded: it affects all replicas at once, and the gateway still serves
    without it as documented.
    """
    if tracker.draining:
        headers = {"connection": "close", "retry-after": str(DEFAULT_RETRY_AFTER_S)}
        return _answer(request, {"status": "draining"}, 503, headers)
    are_up = await asyncio.gather(*(store.is_up() for store in stores))
    degraded: list[str] = [store.role for store, is_up in zip(stores, are_up, strict=True) if not is_up]
    if upstream.is_failing:
        degraded.append("upstream")
    return _answer(request, {"status": "ready", "degraded": degraded})


def _answer(
    request: Request, document: Mapping[str, Any], status: int = 200, more_headers: Mapping[str, str] | None = None
) -> Response:
    headers = {"cache-control": "no-store", "x-request-id": request_id_of(request), **(more_headers or {})}
    return JSONResponse(document, status, headers)
