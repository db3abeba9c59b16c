"""Programs of the machine, such as nginx or promtool, without which some tests cannot run."""

import os
import shutil

import pytest


def program(name: str, untested: str = "", *, on_ci: bool = True) -> str:
    """The path of a program. Skips the test if it is missing; on CI the test fails.

    untested: what the skipped test would have shown.
    on_ci: whether .ci/run installs the program.
    """
    found = shutil.which(name)
    if found is None:
        assert not (on_ci and os.environ.get("CI") == "true"), f"{name} is not installed, and CI must not skip tests"
        pytest.skip(f"{name} is not installed" + (f": {untested}" if untested else ""))
    return found
