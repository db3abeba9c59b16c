"""The Starlette application: its router, and before that the endpoint of estimates and CORS."""

from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Lifespan, Receive, Scope, Send

from proxy.gateway.in_flight import InFlightTracker
from proxy.gateway.live_config import ConfigHolder
from proxy.http.connection import SCOPE_HEADERS
from proxy.http.cors import Cors
from proxy.http.endpoint import Endpoint, refuse, refuse_route
from proxy.telemetry.metrics import Metrics
from proxy.upstream.address import ESTIMATE_PATH


class Application(Starlette):
    """Calls the endpoint of estimates directly, without Starlette's middleware and router, which saves time.

    The endpoint turns exceptions into responses itself.
    """

    def __init__(
        self,
        estimate: Endpoint,
        routes: Sequence[Route],
        live: ConfigHolder,
        tracker: InFlightTracker,
        metrics: Metrics,
        *,
        lifespan: Lifespan[Starlette],
    ) -> None:
        super().__init__(
            routes=[Route(ESTIMATE_PATH, estimate, methods=["POST"]), *routes],
            exception_handlers={HTTPException: partial(refuse_route, tracker, metrics)},
            lifespan=lifespan,
        )
        self.router.redirect_slashes = False  # a redirect would repeat the request's Host header
        self._estimate = estimate
        self._cors = Cors(self._serve, lambda: live.config.cors_origins, partial(refuse, tracker, metrics))

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        if scope["type"] == "http" and scope[SCOPE_HEADERS].origin is not None:
            return self._cors(scope, receive, send)
        return self._serve(scope, receive, send)

    def _serve(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        is_estimate = scope["type"] == "http" and scope["path"] == ESTIMATE_PATH and scope["method"] == "POST"
        return self._estimate(scope, receive, send) if is_estimate else super().__call__(scope, receive, send)
