"""The usage page: `GET /` for clients that accept HTML, and the files that it loads."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proxy.http.paths import PAGE_PATH
from proxy.http.static_files import package_file, static_routes

PAGE_FILES = (
    "api.js",
    "calendar.js",
    "chart.js",
    "controls.js",
    "csv.js",
    "dom.js",
    "exact.js",
    "icon.svg",
    "main.js",
    "quotas.js",
    "quote.js",
    "sections.js",
    "state.js",
    "style.css",
    "tables.js",
    "usage.js",
    "vendor/uPlot-LICENSE.txt",
    "vendor/uPlot.css",
    "vendor/uPlot.js",
)

_NOT_FOUND = 404


def page_routes() -> list[Route]:
    return [
        Route(PAGE_PATH, _page, methods=["GET"]),
        *static_routes({f"{PAGE_PATH}page/{name}": f"page/{name}" for name in PAGE_FILES}),
    ]


async def _page(request: Request) -> Response:
    """The page; the usual 404 for API clients, whose base URL may be wrong."""
    if not accepts_html(request.headers.get("accept", "")):
        raise HTTPException(_NOT_FOUND)
    response = await package_file("page/index.html").respond(request)
    response.headers["vary"] += ", accept"
    return response


def accepts_html(accept: str) -> bool:
    """Whether an `Accept` header names HTML, as browsers' do. `*/*` does not: every client sends that."""
    parts = (part.partition(";") for part in accept.lower().replace(" ", "").split(","))
    return any(name == "text/html" and weight not in ("q=0", "q=0.0") for name, _, weight in parts)
