"""How many examples hypothesis tries for a property."""

from hypothesis import settings


def count(factor: int) -> int:
    """`factor` times the number of the profile, which is 60 in a full run and 20 in `scripts/test --unit`."""
    return factor * settings().max_examples


def examples(factor: int) -> settings:
    """A decorator: tries `count(factor)` examples."""
    return settings(max_examples=count(factor))
