"""The usage page: `GET /` for clients that accept HTML, and the files that it loads."""

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proxy.http.paths import PAGE_PATH
from proxy.http.static_files import MEDIA_TYPES, accepts, package_file, static_routes

_FOLDER = Path(__file__).parent / "page"
_NOT_FOUND = 404


def page_routes() -> list[Route]:
    return [
        Route(PAGE_PATH, _page, methods=["GET"]),
        *static_routes({f"{PAGE_PATH}page/{name}": f"page/{name}" for name in page_files()}),
    ]


def page_files() -> list[str]:
    """The files in the page's folder that browsers load, but for the page itself."""
    names = [path.relative_to(_FOLDER).as_posix() for path in _FOLDER.rglob("*") if path.suffix in MEDIA_TYPES]
    return sorted({*names} - {"index.html"})


async def _page(request: Request) -> Response:
    """The page; the usual 404 for API clients, whose base URL may be wrong."""
    if not accepts(request.headers.get("accept", ""), "text/html"):  # `*/*` is not enough: every client sends that
        raise HTTPException(_NOT_FOUND)
    response = await package_file("page/index.html").respond(request)
    response.headers["vary"] += ", accept"
    return response
