"""Paths of requests as log lines and problems show them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.auth import token_of
from proxy.http.paths import MAX_SHOWN_CHARACTERS, shown_path, without_tokens

TOKEN = token_of("TamarinTail2" + "t" * 20)


@pytest.mark.parametrize(
    ("raw_path", "shown"),
    [
        ("/pub/v1/generations/estimate", "/pub/v1/generations/estimate"),
        ("/a-b_c~1.json;x=1,2:3@4!$&'()*+", "/a-b_c~1.json;x=1,2:3@4!$&'()*+"),
        ("/%61%2fb", "/a/b"),
        ("/%0a%00%1b%7f%e9%22%5C", "/%0A%00%1B%7F%E9%22%5C"),
        ("/100%25%3fx%23y", "/100%25%3Fx%23y"),
        ("/%2561", "/%2561"),
        ("/%zz%", "/%25zz%25"),
        (f"/v1/{TOKEN}/x", "/v1/ep_***/x"),
        (f"/x{TOKEN[:-1]}!", "/xep_***!"),
        (f"/{TOKEN.swapcase()}", "/ep_***"),
        ("/" + TOKEN.replace("_", "%5f"), "/ep_***"),
        ("/step_count", "/step_count"),
        ("*", "*"),
    ],
)
def test_a_path_is_shown_escaped_and_without_tokens(raw_path: str, shown: str) -> None:
    assert shown_path(raw_path.encode()) == shown


@given(st.text("".join(map(chr, range(0x21, 0x7F))), max_size=400))
def test_a_shown_path_is_short_and_printable(raw_path: str) -> None:
    shown = shown_path(raw_path.encode())
    assert len(shown) <= MAX_SHOWN_CHARACTERS + len("...")
    assert shown.isascii()
    assert shown.isprintable()
    assert " " not in shown


def test_a_token_is_masked_before_a_path_is_cut() -> None:
    shown = shown_path(b"/" + b"x" * (MAX_SHOWN_CHARACTERS - 20) + b"/" + TOKEN.encode())
    assert shown.endswith("/ep_***")


def test_tokens_in_a_text_are_masked() -> None:
    assert without_tokens(f"The parameter {TOKEN!r} is unknown.") == "The parameter 'ep_***' is unknown."
