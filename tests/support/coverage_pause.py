"""Pauses coverage in the thread of the tests, for modules that use the fixture.

Where coverage traces, it doubles the CPU time of all Python code in a thread, that of libraries too. These modules take
long, and other tests run every line of the gateway that their own thread runs.
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
