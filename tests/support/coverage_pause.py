"""Pauses coverage in the thread of the tests, for modules that use the fixture.

Up to Python 3.11, measuring doubles the CPU time of all Python code in a thread, that of libraries too. These modules
take long, and their own thread runs no line of the gateway that others do not run.
"""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def coverage_paused() -> Iterator[None]:
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)
