"""Assertions about latency on a busy machine.

A test that fails with `LateError`, and with nothing else, is run again, at most twice (`only_rerun` in pyproject.toml).
"""


class LateError(AssertionError):
    """The result was right, but late."""


def assert_in_time(took_s: float, within_s: float, why: str = "") -> None:
    if took_s >= within_s:
        raise LateError(f"it took {took_s:.3f} s, longer than {within_s:.3f} s. {why}")
