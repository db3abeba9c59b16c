"""Promises of how soon, on a machine that has much else to do.

A test that fails by `LateError`, and by nothing else, is played again, twice at the most (`only_rerun` in
pyproject.toml): what is late three times is slow.
"""


class LateError(AssertionError):
    """It was right, and not soon enough."""


def assert_in_time(took_s: float, within_s: float, why: str = "") -> None:
    if took_s >= within_s:
        raise LateError(f"it took {took_s:.3f} s, and {within_s:.3f} s at the most were allowed. {why}")
