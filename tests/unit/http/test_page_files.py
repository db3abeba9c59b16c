"""The files of the usage page: which there are, where they are from, and how large they are."""

import gzip
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest

import proxy.http
from proxy.http.page_routes import page_files
from proxy.http.static_files import accepts

PAGE = Path(*proxy.http.__path__, "page")
VENDORED = (PAGE / "vendor", Path(__file__).parents[2] / "support" / "vendor")
MAX_COMPRESSED_BYTES = 60_000
LIST = "vendored.toml"


def test_every_file_of_the_page_is_served() -> None:
    found = {path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*") if path.is_file()}
    assert found == {*page_files(), "index.html", f"vendor/{LIST}"}


def test_the_page_is_small() -> None:
    sizes = {name: len(gzip.compress((PAGE / name).read_bytes())) for name in ("index.html", *page_files())}
    assert sum(sizes.values()) <= MAX_COMPRESSED_BYTES, sizes


def test_the_page_names_no_other_origin() -> None:
    """But for the namespace of SVG, and addresses in comments of licences."""
    own = [PAGE / name for name in ("index.html", *page_files()) if not name.startswith("vendor/")]
    texts = {path.name: path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "") for path in own}
    assert [name for name, text in texts.items() if "//" in text.replace("// ", "")] == []


@pytest.mark.parametrize("folder", VENDORED, ids=["page", "tests"])
def test_vendored_files_are_listed_with_their_digests(folder: Path) -> None:
    listed = {entry["name"]: entry for entry in tomllib.loads((folder / LIST).read_text("utf-8"))["files"]}
    assert set(listed) == {path.name for path in folder.iterdir()} - {LIST}
    for name, entry in listed.items():
        assert entry["sha256"] == sha256((folder / name).read_bytes()).hexdigest(), name
        assert {"licence", "version", "source"} <= set(entry)


@pytest.mark.parametrize(
    ("accept", "accepted"),
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        ("application/json, text/html;q=0.5", True),
        ("TEXT/HTML", True),
        ("text/html;q=0, */*", False),
        ("*/*", False),
        ("application/json", False),
        ("", False),
    ],
)
def test_only_clients_that_name_html_accept_it(accept: str, accepted: bool) -> None:  # noqa: FBT001
    assert accepts(accept, "text/html") == accepted
