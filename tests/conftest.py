"""What all tests share, and nothing that needs a server: tests/unit imports little, so it starts quickly."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from configs import Problems, Read

# No deadline per example: a busy machine is slow, and only the suite as a whole has a time limit.
# 60 examples instead of hypothesis' 100: properties took a minute of the suite, and each run tries other examples.
hypothesis.settings.register_profile("full", deadline=None, max_examples=60)
# For `scripts/test --unit`.
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)
hypothesis.settings.load_profile("full")


COVERAGE_VARIABLE = "COVERAGE_PROCESS_CONFIG"
COVERAGE = pytest.StashKey[str]()
"""What this variable was: coverage sets it, so that Python processes measure themselves."""

MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 -- pytest and tempfile make private folders in it
MEMORY_BYTES = 2**30
"""Several times what all tests together write. In many containers there are only 64 MiB."""


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    _keep_files_in_memory()
    _disable_nagle(config)
    if not config.getoption("numprocesses", None):  # tests run in this process
        config.stash[COVERAGE] = os.environ.pop(COVERAGE_VARIABLE, "")


def _keep_files_in_memory() -> None:
    """Puts temporary files, also of the processes that tests start, in memory if there is room for them.

    An embedded store answers nothing for as long as a write waits for a slow disk, and then its gateway refuses.
    """
    if MEMORY_FOLDER.is_dir():
        found = os.statvfs(MEMORY_FOLDER)
        if found.f_bavail * found.f_frsize >= MEMORY_BYTES and not found.f_flag & (os.ST_NOEXEC | os.ST_RDONLY):
            os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY_FOLDER)


def _disable_nagle(config: pytest.Config) -> None:
    """Disables Nagle's algorithm for pytest-rerunfailures, which makes each test of an xdist worker wait for 40 ms.

    The plugin's client writes twice and then reads, so the second write waits for the server's delayed ACK.
    """
    connection = getattr(getattr(config, "failures_db", None), "sock", None)
    if isinstance(connection, socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


@pytest.fixture(scope="module")
def measured_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    """For modules that test what only processes run: these count for coverage, which makes a start a third longer."""
    with pytest.MonkeyPatch.context() as patch:
        if config := request.config.stash[COVERAGE]:
            patch.setenv(COVERAGE_VARIABLE, config)
        yield


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return Read(tmp_path)


@pytest.fixture
def problems_of(read: Read) -> Problems:
    return Problems(read)
