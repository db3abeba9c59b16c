"""Pauses coverage in pytest's process for the folders whose `conftest.py` imports the fixture.

Up to Python 3.11, measuring doubles the CPU time of all Python code in a process, that of libraries too. The tests of
`tests/models` and `tests/processes` run no line of the gateway in this process that others do not run.
"""

from collections.abc import Iterator

import coverage
import pytest


@pytest.fixture(scope="module", autouse=True)
def coverage_paused() -> Iterator[None]:
    running = coverage.Coverage.current()
    if running is None:
        yield
        return
    running.stop()
    try:
        yield
    finally:
        running.start()
