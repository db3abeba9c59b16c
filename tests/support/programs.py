"""Programs of the machine that widen the tests."""

import os
import shutil

import pytest


def program(name: str) -> str:
    """The path of a program; skips the test where there is none, never on CI."""
    found = shutil.which(name)
    if found is None:
        assert os.environ.get("CI") != "true", f"{name} is missing, and on CI nothing is skipped"
        pytest.skip(f"{name} is not installed")
    return found
