"""Content negotiation and validators of static files."""

import pytest

from proxy.http.static_files import accepts, is_listed


@pytest.mark.parametrize(
    ("accept_encoding", "accepted"),
    [
        ("gzip", True),
        ("gzip, deflate, br, zstd", True),
        ("br;q=1, GZIP ; q=0.5", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000, br", False),
        ("br,\tgzip", True),
        ("x-gzip-like, br", False),
        ("", False),
    ],
)
def test_a_file_is_compressed_for_clients_that_accept_gzip(accept_encoding: str, accepted: bool) -> None:  # noqa: FBT001 -- a row of the table
    assert accepts(accept_encoding, "gzip") == accepted


@pytest.mark.parametrize(
    ("if_none_match", "listed"),
    [('"a"', True), ('W/"a"', True), ('"b", W/"a"', True), ("*", True), ('"b"', False), ('"ab"', False), ("", False)],
)
def test_tags_are_compared_weakly(if_none_match: str, listed: bool) -> None:  # noqa: FBT001 -- a row of the table
    assert is_listed('"a"', if_none_match) == listed
