"""Tests of the command line in this process, each in an empty folder."""

import pytest

from command_line import empty_environment, run

__all__ = ["empty_environment", "run"]


@pytest.fixture(autouse=True)
def clean(empty_environment: None) -> None:
    """Before all other fixtures, which write files."""
