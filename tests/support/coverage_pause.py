"""Pauses coverage in pytest's process for modules that use the fixture.

Up to Python 3.11, measuring doubles the CPU time of all Python code in a process, that of libraries too. These modules
take long, and run no line of the gateway in this process that others do not run.
"""

from collections.abc import Iterator

import coverage
import pytest


@pytest.fixture(scope="module")
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
