"""Reads the config, and the files that it names."""

from pathlib import Path

MAX_CONFIG_BYTES = 4 * 2**20


class UnreadableError(Exception):
    """Says why a file cannot be read, as a predicate."""


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a file, without a byte order mark. Raises `UnreadableError`."""
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise UnreadableError(f"has more than {max_bytes} bytes")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UnreadableError("is not UTF-8 text") from None
    except ValueError:
        raise UnreadableError("cannot be read: this is not a valid file name") from None
