"""The mode of an item that RenderNet prices."""

from typing import Any

import pytest

from proxy.cache.generation import NO_MODE, mode_of


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({}, (NO_MODE, None)),
        ({"model": None}, (NO_MODE, None)),
        ({"model": "Flux"}, ("model", "Flux")),
        ({"model": "Flux", "style": "Bokeh"}, ("style", "Bokeh")),
        ({"model": "Flux", "style": None}, ("model", "Flux")),
        ({"style": {"name": "x"}}, ("style", None)),
        ({"video_anyone": {}, "narrator": {}, "true_touch": {}}, ("true_touch", None)),
        ({"segment": "x", "style": "Bokeh"}, ("segment", None)),
    ],
)
def test_the_first_mode_that_is_present_wins(item: dict[str, Any], expected: tuple[str, str | None]) -> None:
    assert mode_of(item) == expected
