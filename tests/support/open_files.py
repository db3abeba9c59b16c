"""Which files this process has open. Others than a test opens may be closed meanwhile, by threads or by collection."""

from collections import Counter
from contextlib import suppress
from pathlib import Path


def open_files() -> Counter[str]:
    """What each descriptor refers to: a path, or the number of a socket or pipe."""
    found = Counter[str]()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            found[str(descriptor.readlink())] += 1
    return found
