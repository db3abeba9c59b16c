"""The mode of an item of a body (model, style, narrator, …): decides which one RenderNet prices."""

from typing import Any

NO_MODE = ""

_MODES = ("segment", "style", "model", "true_touch", "narrator", "video_anyone")
_NAMED = frozenset(("style", "model"))


def mode_of(item: dict[str, Any]) -> tuple[str, str | None]:
    """The mode that wins, and for a style or a model its name; `NO_MODE` if the item has none.

    RenderNet prices an item by the first of `_MODES` that is present. A mode that is `null` counts as absent, because
    some clients send every member they know.
    """
    for mode in _MODES:
        value = item.get(mode)
        if value is not None:
            return mode, value if mode in _NAMED and isinstance(value, str) else None
    return NO_MODE, None
